"""What a lens says layer by layer on a prompt: one forward pass, statistics chunk by chunk, never `[layers, batch,
pos, d_vocab]`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.hooks import Hook, residual_reads, run
from tl_lenses.lens import Lens
from tl_lenses.model import Batch, LensModel, check_model, n_layers, name_of, prepare, tokenizer_of
from tl_lenses.sites import LayerOrSite, resolve_layer, site, site_layer
from tl_lenses.token_text import token_text

STATISTICS = ("entropy", "kl", "cross_entropy", "rank", "max_prob", "target_logprob", "logprob_diff")


@dataclass(frozen=True)
class Trajectory:
    """Statistics of one lens on a batch of prompts. Every statistic is `[layer, batch, pos]`, fp32, on the CPU; NaN
    (ids: -1) at pads.

    Attributes:
        layers: the row axis: layers `0..n_layers` and sites; the last row usually is the model itself.
        tokens: `[batch, pos]`; `mask` is False at pads; `targets` is the id scored at each position (-1 where there
            is none).
        stats: the statistics by name, also as attributes: `entropy`, `kl` (KL(model || lens), nats), `cross_entropy`
            (nats), `rank` (1 is
            the top token), `max_prob`, `target_logprob`, `logprob_diff` (target minus anti-target).
        top_ids, top_probs: `[layer, batch, pos, k]`, best first.
    """

    layers: tuple[int | str, ...]
    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    targets: Int[Tensor, "batch pos"]
    anti_targets: Int[Tensor, "batch pos"] | None
    stats: dict[str, Tensor]
    top_ids: Int[Tensor, "layer batch pos k"]
    top_probs: Float[Tensor, "layer batch pos k"]
    n_layers: int
    name: str = ""
    model_name: str = ""
    vocab: dict[int, str] = field(default_factory=dict, repr=False)

    def _stat(self, name: str) -> Float[Tensor, "layer batch pos"] | Int[Tensor, "layer batch pos"]:
        if name not in self.stats:
            if name == "logprob_diff":
                raise ValueError("logprob_diff needs anti_targets: pass them to trajectory(...)")
            raise ValueError(f"no statistic {name!r}; there are {', '.join(self.stats)}")
        return self.stats[name]

    entropy = property(lambda self: self._stat("entropy"), doc="Entropy of the lens' distribution, nats.")
    kl = property(lambda self: self._stat("kl"), doc="KL(model || lens), nats.")
    cross_entropy = property(lambda self: self._stat("cross_entropy"), doc="`-log p(target)`, nats.")
    rank = property(
        lambda self: self._stat("rank"),
        doc="Rank of the target; 1 is the top token, ties count strictly larger logits.",
    )
    max_prob = property(lambda self: self._stat("max_prob"), doc="Probability of the top token.")
    target_logprob = property(lambda self: self._stat("target_logprob"), doc="`log p(target)`, nats.")
    logprob_diff = property(lambda self: self._stat("logprob_diff"), doc="`log p(target) - log p(anti_target)`, nats.")

    def delta(self, stat: str) -> Float[Tensor, "layer_minus_1 batch pos"] | Int[Tensor, "layer_minus_1 batch pos"]:
        """Change of a statistic from each row to the next."""
        value = self._stat(stat)
        if not value.is_floating_point():  # ranks: -1 says that there is none
            value = value.float().masked_fill(value < 0, torch.nan)
        return value.diff(dim=0)

    def __getitem__(self, key: Any) -> "Trajectory":
        """`traj[layers, batch, pos]`: a smaller trajectory. Slices, ints (which keep their axis) or lists of indices
        along each axis."""
        keys = key if isinstance(key, tuple) else (key,)
        if len(keys) > 3:
            raise IndexError("a trajectory has three axes: traj[layers, batch, pos]")
        shape = (len(self.layers), *self.tokens.shape)
        rows, batch, pos = (_axis(k, n) for k, n in zip((*keys, *[slice(None)] * (3 - len(keys))), shape, strict=True))
        grid = lambda x: x[rows][:, batch][:, :, pos]
        plane = lambda x: x[batch][:, pos]
        return replace(
            self,
            layers=tuple(self.layers[i] for i in rows),
            tokens=plane(self.tokens),
            mask=plane(self.mask),
            targets=plane(self.targets),
            anti_targets=None if self.anti_targets is None else plane(self.anti_targets),
            stats={name: grid(value) for name, value in self.stats.items()},
            top_ids=grid(self.top_ids),
            top_probs=grid(self.top_probs),
        )

    def __str__(self) -> str:
        from tl_lenses import views

        return views.to_text(self)

    def __rich__(self) -> Any:
        from tl_lenses import views

        return views.terminal(self)

    def _repr_html_(self) -> str:
        from tl_lenses import views

        return views.html_fragment(self)

    def figure(self, stat: str = "kl", **kwargs: Any) -> Any:
        """A plotly heat map of a statistic (extra `plot`). See `views.figure`."""
        from tl_lenses import views

        return views.figure(self, stat, **kwargs)

    def save(self, path: Any, **kwargs: Any) -> None:
        """Write `.html` (self-contained), `.svg`, `.csv`, `.json`, or `.png` (extra `plot`). See `views.save`."""
        from tl_lenses import views

        views.save(self, path, **kwargs)

    def to_frame(self) -> Any:
        """A pandas data frame, one row per layer and token."""
        from tl_lenses import views

        return views.frame(self)


def _axis(key: Any, n: int) -> list[int]:
    if isinstance(key, slice):
        return list(range(n))[key]
    index = [key] if isinstance(key, int) else [int(i) for i in key]
    if any(not -n <= i < n for i in index):
        raise IndexError(f"index {key} is outside an axis of {n}")
    return [i % n for i in index]


@dataclass(frozen=True)
class Trajectories(Mapping[str, Trajectory]):
    """Trajectories of several lenses from one forward pass, by name; `divergence` compares them."""

    by_name: dict[str, Trajectory]
    pairs: dict[tuple[str, str, str], Float[Tensor, "layer batch pos"]]

    def __getitem__(self, name: str) -> Trajectory:  # type: ignore[override]
        if name not in self.by_name:
            raise KeyError(f"no lens {name!r}; there are {', '.join(self.by_name)}")
        return self.by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    def divergence(self, a: str, b: str, kind: Literal["kl", "js", "tv"] = "kl") -> Float[Tensor, "layer batch pos"]:
        """KL(a || b) or Jensen-Shannon divergence in nats, or total variation, between two lenses."""
        if kind not in S.PAIRWISE:
            raise ValueError(f"no divergence {kind!r}; there are {', '.join(S.PAIRWISE)}")
        for name in (a, b):
            self[name]  # an unknown name raises  # noqa: B018
        if a == b:
            return torch.where(self[a].mask, 0.0, torch.nan).expand(len(self[a].layers), -1, -1).clone()
        return self.pairs[a, b, kind]

    def __str__(self) -> str:
        return "\n".join(str(t) for t in self.values())

    def _repr_html_(self) -> str:
        from tl_lenses import views

        return views.html_fragment(self)

    def save(self, path: Any, **kwargs: Any) -> None:
        """One page for all lenses (`.html`, `.csv`, `.json`). See `views.save`."""
        from tl_lenses import views

        views.save(self, path, **kwargs)

    def to_frame(self) -> Any:
        """A data frame of all of them, with a column `lens`."""
        import pandas

        return pandas.concat([t.to_frame().assign(lens=name) for name, t in self.items()], ignore_index=True)


def layers_of(lenses: Mapping[str, Lens], layers: Iterable[LayerOrSite] | slice | None, depth: int) -> list[int | str]:
    """The rows to compute: layers resolved to `0..n_layers`, and sites.

    Raises:
        ValueError: fitted lenses with different layers and none asked for; none; a layer twice; out of range.
    """
    if layers is None or isinstance(layers, slice):
        first, *others = ([x for x in lens.layers] for lens in lenses.values())
        common: list[int | str] = [x for x in first if all(x in other for other in others)]
        fitted = {name: lens.layers for name, lens in lenses.items() if lens.translators is not None}
        if len({tuple(f) for f in fitted.values()}) > 1:
            raise ValueError(f"the lenses have different layers ({fitted}): pass layers=[...] that all of them have")
        if isinstance(layers, slice):
            return [
                *(x for x in common[layers] if x != depth),
                depth,
            ]  # a stride keeps the last row, which is the model
        return common
    chosen = [resolve_layer(x, depth) if isinstance(x, int) else x for x in layers]
    if not chosen:
        raise ValueError("an empty list of layers has nothing to read")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"a layer is given twice: {chosen}")
    return chosen


def next_tokens(tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """The token that follows each position, -1 where there is none (the end, pads)."""
    following = torch.full_like(tokens, -1)
    following[:, :-1] = torch.where(mask[:, :-1] & mask[:, 1:], tokens[:, 1:], -1)
    return following


def _ids(model: LensModel, wanted: Any, tokens: Tensor, mask: Tensor, what: str) -> Int[Tensor, "batch pos"]:
    if isinstance(wanted, str):
        ids = tokenizer_of(model)(wanted, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"{what}={wanted!r} is {len(ids)} tokens, expected one (a leading space often matters)")
        wanted = ids[0]
    if isinstance(wanted, int):
        wanted = torch.full_like(tokens, wanted)
    wanted = torch.as_tensor(wanted)
    if wanted.shape != tokens.shape:
        raise ValueError(
            f"{what} has shape {list(wanted.shape)}, expected that of the tokens, {list(tokens.shape)}: the id scored at each position (-1 for none)"
        )
    if wanted.is_floating_point() or wanted.dtype == torch.bool:
        raise TypeError(f"{what} must be token ids, got a {wanted.dtype} tensor")
    if (wanted < -1).any() or (wanted >= model.cfg.d_vocab).any():
        raise ValueError(f"{what} has ids outside -1..{model.cfg.d_vocab - 1}")
    return torch.where(mask, wanted.to(tokens), -1)


@torch.no_grad()
def trajectory(
    model: LensModel,
    lens: Lens | Mapping[str, Lens],
    prompt: str | list[str] | Int[Tensor, "batch pos"] | Int[Tensor, " pos"],
    layers: Iterable[LayerOrSite] | slice | None = None,
    targets: Int[Tensor, "batch pos"] | int | str | None = None,
    anti_targets: Int[Tensor, "batch pos"] | int | str | None = None,
    top_k: int = 10,
    hooks: Iterable[Hook] = (),
    teacher: Literal["clean"] | None = None,
    cache: Any = None,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    *,
    prepend_bos: bool = True,
    chunk_size: int | None = None,
) -> Any:
    """What a lens (or several, from one forward pass) says at every layer and position of a prompt.

    Args:
        lens: a `Lens`, or `{name: Lens}` for `Trajectories`.
        prompt: text (BOS is prepended), several texts, or token ids `[batch, pos]`.
        layers: layers or sites; a slice strides over the lens' layers and keeps the last; all of the lens' by default.
        targets: the id scored *at* each position, `[batch, pos]` (-1 for none), or one id or token for all; by
            default the next token.
        anti_targets: the same, for `logprob_diff`.
        hooks: your interventions; they run before our reads, and the teacher of KL is the same hooked run.
        teacher: "clean" compares with one more run without `hooks`.
        cache: an `ActivationCache` to read residuals from instead of running the model; `prompt` must be its token ids.
        attention_mask: for padded token ids; pads enter no statistic.
        prepend_bos: for text; ids are never changed.
        chunk_size: positions decoded at a time; by default as many as fit 6 MiB of logits.

    Returns:
        `Trajectory`, or `Trajectories` for a mapping.

    Raises:
        ValueError: unknown layer or site, targets of another shape, activations that are not finite (the layer is
        named), lenses with
            different layers.

    Source: Belrose et al. 2023 (Tuned Lens), Figure 1 and section 3; the tuned-lens package's `PredictionTrajectory`.

    Example:
        >>> traj = tll.trajectory(model, tll.Lens(model), "The capital of France is")      # doctest: +SKIP
        >>> print(traj); traj.save("heat.html")                                          # doctest: +SKIP
    """
    check_model(model, what="a trajectory")
    lenses = dict(lens) if isinstance(lens, Mapping) else {"": lens}
    if not lenses:
        raise ValueError("an empty mapping of lenses has nothing to show")
    for name, one in lenses.items():
        if one.model is not model:
            raise ValueError(f"lens {name!r} was made for another model object: use Lens(model, ...) with this one")
    if teacher not in (None, "clean"):
        raise ValueError(f"teacher must be None or 'clean', got {teacher!r}")
    if cache is not None and (list(hooks) or teacher):
        raise ValueError("cache= holds a run that is over: hooks and teacher have nothing to act on")
    depth = n_layers(model)
    rows = layers_of(lenses, layers, depth)
    batch = prepare(model, prompt, attention_mask, prepend_bos=prepend_bos)
    mask = (
        torch.ones_like(batch.tokens, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask.bool()
    )
    goal = next_tokens(batch.tokens, mask) if targets is None else _ids(model, targets, batch.tokens, mask, "targets")
    anti = None if anti_targets is None else _ids(model, anti_targets, batch.tokens, mask, "anti_targets")
    for one in lenses.values():
        for row in rows:
            one[row]  # a layer that was not fitted raises here, before the run  # noqa: B018

    if cache is None:
        resid: dict[Any, Tensor] = {}
        hooks = list(hooks)
        own = run(
            model, batch.tokens, [*hooks, *residual_reads(model, rows, resid)], attention_mask=batch.attention_mask
        )
        reference = run(model, batch.tokens, attention_mask=batch.attention_mask) if teacher == "clean" else own
    else:
        resid = {row: _cached(model, cache, row, batch) for row in rows}
        own = reference = None
        final = _cached(model, cache, depth, batch)
    for row in rows:
        if not resid[row][mask].isfinite().all():
            raise ValueError(
                f"the residual at {site(model, row)!r} has values that are not finite: the model overflows there (try float32 or bfloat16)"
            )

    where = mask.flatten().nonzero()[:, 0]
    flat = lambda x: x.flatten(0, 1)
    n, d_vocab = len(where), int(model.cfg.d_vocab)
    k = max(0, min(top_k, d_vocab))
    names = [s for s in STATISTICS if s != "logprob_diff" or anti is not None]
    out = {
        name: {s: torch.zeros(len(rows), n, dtype=torch.long if s == "rank" else torch.float32) for s in names}
        for name in lenses
    }
    ids = {name: torch.zeros(len(rows), n, k, dtype=torch.long) for name in lenses}
    probs = {name: torch.zeros(len(rows), n, k) for name in lenses}
    pairs = {
        (a, b, kind): torch.zeros(len(rows), n)
        for a in lenses
        for b in lenses
        for kind in S.PAIRWISE
        if a != b and (kind == "kl" or a < b)
    }
    any_lens = next(iter(lenses.values()))

    for part in S.chunks(n, d_vocab, chunk_size):
        at = where[part]
        teacher_logits = any_lens.readout(flat(final)[at]) if reference is None else flat(reference)[at]
        logp_teacher = S.log_probs(teacher_logits)
        p_teacher = logp_teacher.exp()
        target, other = flat(goal)[at], None if anti is None else flat(anti)[at]
        for i, row in enumerate(rows):
            seen: dict[str, Tensor] = {}
            x = flat(resid[row])[at]
            for name in lenses:
                # The last row is the model's own output, interventions on the final norm included.
                is_model = row == depth or (isinstance(row, str) and site_layer(row, depth) == depth)
                logits = (teacher_logits if own is None else flat(own)[at]) if is_model else lenses[name][row](x)
                logp = seen[name] = S.log_probs(logits)
                put = out[name]
                put["rank"][i, part] = S.rank(logits, target).cpu()
                put["entropy"][i, part] = S.entropy(logp).cpu()
                put["kl"][i, part] = S.kl(logp_teacher, logp, p_teacher).float().cpu()
                score = S.target_logprob(logp, target)
                put["target_logprob"][i, part] = score.cpu()
                put["cross_entropy"][i, part] = -score.cpu()
                put["max_prob"][i, part] = logp.amax(-1).exp().cpu()
                if other is not None:
                    put["logprob_diff"][i, part] = (score - S.target_logprob(logp, other)).cpu()
                best, weight = S.top_k(logp, k)
                ids[name][i, part], probs[name][i, part] = best.cpu(), weight.cpu()
                del logits
            for (a, b, kind), value in pairs.items():
                value[i, part] = S.PAIRWISE[kind](seen[a], seen[b]).cpu()

    def grid(x: Tensor) -> Tensor:
        """`[layer, real positions, ...]` back to `[layer, batch, pos, ...]`, pads marked."""
        full = torch.full(
            (len(rows), mask.numel(), *x.shape[2:]), torch.nan if x.is_floating_point() else -1, dtype=x.dtype
        )
        full[:, where.cpu()] = x
        return full.reshape(len(rows), *mask.shape, *x.shape[2:])

    tokens, mask, goal = batch.tokens.cpu(), mask.cpu(), goal.cpu()
    anti = None if anti is None else anti.cpu()
    shown = {int(i) for x in (tokens, goal, anti, *ids.values()) if x is not None for i in x.unique() if i >= 0}
    tokenizer = getattr(model, "tokenizer", None)
    vocab = {i: str(i) for i in shown} if tokenizer is None else token_text(tokenizer, shown)
    made = {
        name: Trajectory(
            tuple(rows), tokens, mask, goal, anti, {s: grid(v) for s, v in out[name].items()}, grid(ids[name]), grid(probs[name]),
            depth, name, name_of(model), vocab,
        )
        for name in lenses
    }  # fmt: skip
    if not isinstance(lens, Mapping):
        return made[""]
    full = {key: grid(value) for key, value in pairs.items()}
    full |= {(b, a, kind): value for (a, b, kind), value in full.items() if kind != "kl"}  # JS and TV are symmetric
    return Trajectories(made, full)


def _cached(model: LensModel, cache: Any, layer: LayerOrSite, batch: Batch) -> Tensor:
    name = site(model, layer)
    depth = n_layers(model)
    aliases: Sequence[str] = [name]
    if (resolved := site_layer(name, depth)) is not None:  # the same activation under its other name
        aliases = [
            name,
            *([f"blocks.{resolved - 1}.hook_resid_post"] if resolved else []),
            *([f"blocks.{resolved}.hook_resid_pre"] if resolved < depth else []),
        ]
    found = next((alias for alias in aliases if alias in cache.keys()), None)
    if found is None:
        raise ValueError(
            f"the cache does not hold {name!r}: run_with_cache with a names_filter that keeps it (the final residual is needed as teacher)"
        )
    x = cache[found]
    if x.ndim == 2:
        x = x[None]
    if x.shape[:2] != batch.tokens.shape:
        raise ValueError(
            f"the cache holds {list(x.shape[:2])} positions at {name!r}, the tokens are {list(batch.tokens.shape)}: pass the tokens of that run"
        )
    return x

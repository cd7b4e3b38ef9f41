"""What a lens says layer by layer on a prompt: statistics of every layer and position from one forward pass."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.checks import entry, one_of, several, whole_number
from tl_lenses.decode import Calibrated, Chunk, Reading, decode, most_rows, read_cache, read_run
from tl_lenses.deprecation import renamed
from tl_lenses.hooks import Hook, checked_hooks
from tl_lenses.layers import LayerOrSite
from tl_lenses.lens import Lens, common_layers, decoders_of, named_lenses, printable
from tl_lenses.model import LensModel, bos_before, check_model, n_layers, name_of, prepare, tokenizer_of
from tl_lenses.progress import progress
from tl_lenses.shown import Shown
from tl_lenses.token_text import token_text
from tl_lenses.tokens import Batch, encode, next_tokens, used_positions
from tl_lenses.unembed import Readout

STATISTICS = ("entropy", "kl", "cross_entropy", "rank", "max_prob", "target_logprob", "logprob_diff")


TRACKED, TRACKED_CELLS = 8, 1024  # by default: tokens in a row, in batches of at most so many tokens


@dataclass(frozen=True)
class Tracked:
    """How likely chosen tokens are everywhere.

    Attributes:
        ids: `[batch, n]`, -1 where a row has fewer.
        ranks: `[layer, batch, pos, n]`; 1 is the top token, ties count strictly larger logits.
        probs: their probabilities.
    """

    ids: Int[Tensor, "batch n"]
    ranks: Int[Tensor, "layer batch pos n"]
    probs: Float[Tensor, "layer batch pos n"]


@dataclass(frozen=True, repr=False)
class Trajectory(Shown):
    """Statistics of one lens on a batch of prompts. Every statistic is `[layer, batch, pos]`, fp32, on the CPU; NaN
    (ids: -1) at pads.

    Attributes:
        layers: the row axis: layers `0..n_layers` and sites; the last row usually is the model itself.
        tokens: `[batch, pos]`; `mask` is False at pads; `targets` is the id scored at each position (-1 where there
            is none).
        stats: the statistics by name, also as attributes: `entropy`, `kl` (KL(model || lens), nats), `cross_entropy`
            (nats), `rank` (1 is the top token), `max_prob`, `target_logprob`, `logprob_diff` (target minus anti-target), and
            `score` (of the target, where the call had `calibrated`).
        top_ids, top_probs: `[layer, batch, pos, k]`, best first.
        settings: "bos", the text of the BOS that was put before a text; None before ids, and where there is none.
            "lens", the lens' kind: "logit", or its fitter.
        left_out: `[batch, pos]`, real positions that the lens' fit left out (`skip_first`); pictures fade them.
        tracked: rank and probability of the tokens of `track` at every cell.
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
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    left_out: Bool[Tensor, "batch pos"] | None = None
    tracked: Tracked | None = None

    def _stat(self, name: str) -> Float[Tensor, "layer batch pos"] | Int[Tensor, "layer batch pos"]:
        needed = {"logprob_diff": "anti_targets: pass them", "score": "calibrated=tll.marginals(...): pass it"}
        if isinstance(name, str) and name in needed and name not in self.stats:
            raise ValueError(f"{name} needs {needed[name]} to trajectory(...)")
        if not isinstance(name, str) or name not in self.stats:
            raise ValueError(f"no statistic {name!r}; there are {', '.join(self.stats)}")
        return self.stats[name]

    entropy = property(lambda self: self._stat("entropy"), doc="Entropy of the lens' distribution, nats.")
    kl = property(lambda self: self._stat("kl"), doc="KL(model || lens), nats.")
    cross_entropy = property(lambda self: self._stat("cross_entropy"), doc="`-log p(target)`, nats.")
    rank = property(
        lambda self: self._stat("rank"), doc="Rank of the target; 1 is the top token, ties count strictly larger logits."
    )
    max_prob = property(lambda self: self._stat("max_prob"), doc="Probability of the top token.")
    target_logprob = property(lambda self: self._stat("target_logprob"), doc="`log p(target)`, nats.")
    logprob_diff = property(lambda self: self._stat("logprob_diff"), doc="`log p(target) - log p(anti_target)`, nats.")

    score = property(lambda self: self._stat("score"), doc="Calibrated score of the target; NaN at the model's own row.")

    def delta(self, stat: str) -> Float[Tensor, "layer_minus_1 batch pos"] | Int[Tensor, "layer_minus_1 batch pos"]:
        """Change of a statistic from each row to the next."""
        value = self._stat(stat)
        if not value.is_floating_point():  # ranks: -1 says that there is none
            value = value.float().masked_fill(value < 0, torch.nan)
        return value.diff(dim=0)

    def __getitem__(self, key: Any) -> "Trajectory":
        """`traj[layers, batch, pos]`: a smaller trajectory. Slices, ints (which keep their axis) or lists of indices
        along each axis.

        Raises:
            TypeError: the name of a statistic, which is an attribute.
            IndexError: outside an axis.
        """
        if isinstance(key, str):
            raise TypeError(f"a trajectory is cut by traj[layers, batch, pos]; a statistic is an attribute: traj.{key}")
        keys = key if isinstance(key, tuple) else (key,)
        if len(keys) > 3:
            raise IndexError("a trajectory has three axes: traj[layers, batch, pos]")
        shape = (len(self.layers), *self.tokens.shape)
        rows, batch, pos = (_axis(k, n) for k, n in zip((*keys, *[slice(None)] * (3 - len(keys))), shape, strict=True))
        grid = lambda x: x[rows][:, batch][:, :, pos]
        plane = lambda x: x[batch][:, pos]
        return replace(
            self, layers=tuple(self.layers[i] for i in rows), tokens=plane(self.tokens), mask=plane(self.mask),
            targets=plane(self.targets), anti_targets=None if self.anti_targets is None else plane(self.anti_targets),
            stats={name: grid(value) for name, value in self.stats.items()}, top_ids=grid(self.top_ids),
            top_probs=grid(self.top_probs),
            left_out=None if self.left_out is None else plane(self.left_out),
            tracked=self.tracked and Tracked(self.tracked.ids[batch], grid(self.tracked.ranks), grid(self.tracked.probs)),
        )  # fmt: skip

    def __repr__(self) -> str:
        rows, pos = self.tokens.shape
        lens = f"{self.name!r} on " * bool(self.name) + repr(self.model_name)
        shape = f"{len(self.layers)} layers x {rows} x {pos} tokens"
        return f"Trajectory({lens}, {shape}, {', '.join(self.stats)}, top {self.top_ids.shape[-1]})"

    def __rich__(self) -> Any:
        return self._views.terminal(self)

    def _repr_html_(self) -> str:
        return self._views.html_fragment(self)

    def figure(self, stat: str = "kl", **kwargs: Any) -> Any:
        """A plotly heat map of a statistic (extra `plot`). See `views.figure`."""
        return self._views.figure(self, stat, **kwargs)

    def save(self, path: str | Path, **kwargs: Any) -> Path:
        """Write `.html` (self-contained), `.svg`, `.csv`, `.json`, or `.png` (extra `plot`). See `views.save`."""
        return self._views.save(self, path, **kwargs)

    def to_frame(self) -> Any:
        """A pandas data frame, one row per layer and token."""
        return self._views.frame(self)


def _axis(key: Any, n: int) -> list[int]:
    if isinstance(key, slice):
        return list(range(n))[key]
    single = isinstance(key, int) or not isinstance(key, Iterable) or getattr(key, "ndim", 1) == 0
    index = [whole_number("an index", i) for i in ([key] if single else several("indices", key, "whole numbers"))]
    if any(not -n <= i < n for i in index):
        raise IndexError(f"index {key} is outside an axis of {n}")
    return [i % n for i in index]


@dataclass(frozen=True, repr=False)
class Trajectories(Shown, Mapping[str, Trajectory]):
    """Trajectories of several lenses from one forward pass, by name; `divergence` compares them."""

    by_name: dict[str, Trajectory]
    pairs: dict[tuple[str, str, str], Float[Tensor, "layer batch pos"]]

    def __getitem__(self, name: str) -> Trajectory:  # type: ignore[override]
        return entry(self.by_name, "lens", printable(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    def divergence(self, a: str, b: str, kind: Literal["kl", "js", "tv"] = "kl") -> Float[Tensor, "layer batch pos"]:
        """KL(a || b) or Jensen-Shannon divergence in nats, or total variation, between two lenses."""
        one_of("kind", kind, tuple(S.PAIRWISE))
        for name in (a, b):
            self[name]  # an unknown name raises  # noqa: B018
        if a == b:
            return torch.where(self[a].mask, 0.0, torch.nan).expand(len(self[a].layers), -1, -1).clone()
        return self.pairs[printable(a), printable(b), kind]

    def __repr__(self) -> str:
        first = next(iter(self.by_name.values()))
        rows, pos = first.tokens.shape
        shape = f"{len(first.layers)} layers x {rows} x {pos} tokens"
        return f"Trajectories({', '.join(map(repr, self))} on {first.model_name!r}, {shape}, {', '.join(first.stats)})"

    def __str__(self) -> str:
        return "\n".join(str(t) for t in self.values())

    def figure(self, stat: str = "kl") -> Any:
        """A matplotlib figure (extra `plot`): the mean over tokens by layer, a line per lens. See `views.means_lines`."""
        return self._views.means_lines(self, stat).figure()

    def _repr_html_(self) -> str:
        return self._views.html_fragment(self)

    def save(self, path: str | Path, **kwargs: Any) -> Path:
        """One page for all lenses (`.html`, `.csv`, `.json`). See `views.save`."""
        return self._views.save(self, path, **kwargs)

    def to_frame(self) -> Any:
        """A data frame of all of them, with a column `lens`."""
        import pandas

        return pandas.concat([t.to_frame().assign(lens=name) for name, t in self.items()], ignore_index=True)


def _ids(model: LensModel, scored: Any, tokens: Tensor, mask: Tensor, what: str) -> Int[Tensor, "batch pos"]:
    """The id scored at each position, from ids, one id, or the text of one token."""
    if isinstance(scored, str):
        ids = encode(tokenizer_of(model), [scored])[0]
        if len(ids) != 1:
            raise ValueError(f"{what}={scored!r} is {len(ids)} tokens, expected one (a leading space often matters)")
        scored = ids[0]
    try:
        scored = torch.as_tensor(scored)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{what} must be token ids or the text of one token, got {scored!r}") from None
    if scored.is_floating_point() or scored.dtype == torch.bool:
        raise TypeError(f"{what} must be token ids, got a {scored.dtype} tensor")
    if scored.ndim == 0:
        scored = torch.full_like(tokens, int(scored))
    if scored.shape != tokens.shape:
        raise ValueError(
            f"{what} has shape {list(scored.shape)}, expected that of the tokens, {list(tokens.shape)}: the id scored at each position (-1 for none)"
        )
    if (scored < -1).any() or (scored >= model.cfg.d_vocab).any():
        raise ValueError(f"{what} has ids outside -1..{model.cfg.d_vocab - 1}")
    return torch.where(mask, scored.to(tokens), -1)


@renamed(prompt="tokens")
@torch.no_grad()
def trajectory(
    model: LensModel,
    lens: Lens | Mapping[str, Lens],
    tokens: str | list[Any] | Int[Tensor, "batch pos"] | Int[Tensor, " pos"],
    layers: Iterable[LayerOrSite] | slice | None = None,
    targets: Int[Tensor, "batch pos"] | int | str | None = None,
    *,
    anti_targets: Int[Tensor, "batch pos"] | int | str | None = None,
    top_k: int = 10,
    track: Iterable[str | int] | None = None,
    calibrated: Calibrated | None = None,
    hooks: Iterable[Hook] = (),
    teacher: Literal["clean"] | None = None,
    cache: Any = None,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    prepend_bos: bool = True,
    chunk_size: int | None = None,
) -> Any:
    """What a lens (or several, from one forward pass) says at every layer and position of a prompt.

    Args:
        lens: a `Lens`, or `{name: Lens}` for `Trajectories`.
        tokens: text (BOS is prepended), several texts, messages of a chat or several chats, or token ids `[batch, pos]`.
        layers: layers or sites; a slice strides over the lens' layers and keeps the last; all of the lens' by default.
        targets: the id scored *at* each position, `[batch, pos]` (-1 for none), or one id or token for all; by
            default the next token.
        anti_targets: the same, for `logprob_diff`.
        top_k: how many of the likeliest tokens are kept per cell; 0 for none.
        track: tokens (one token's text, or ids) whose rank and probability are kept at every cell, for `traj.tracked` and
            the page. By default the model's own top tokens, the last 8 different ones of a row, in batches of up to 1,024
            tokens; () for none.
        calibrated: of `marginals`: ranks and top tokens go by the score of a token beside what the lens says on average (z, or
            log-probability minus the marginal's), the target's is the statistic `score`. Probabilities stay, and so does the model's own row.
        hooks: your interventions; they run before our reads, and the teacher of KL is the same hooked run.
        teacher: "clean" compares with one more run without `hooks`.
        cache: an `ActivationCache` to read residuals from instead of running the model; `tokens` must be its token ids.
        attention_mask: for padded token ids; pads enter no statistic.
        prepend_bos: for text; ids are never changed.
        chunk_size: positions whose logits exist at a time; by default as many as fit 128 MiB with those of a few layers.

    Returns:
        `Trajectory`, or `Trajectories` for a mapping.

    Raises:
        TypeError: something else than lenses, layers, ids or numbers; the error says what was expected.
        ValueError: unknown layer or site, targets of another shape, activations that are not finite (the layer is
            named), lenses with different layers.

    Source: Belrose et al. 2023 (Tuned Lens), Figure 1 and section 3; the tuned-lens package's `PredictionTrajectory`.

    Example:
        >>> traj = tll.trajectory(model, tll.Lens(model), "The capital of France is")      # doctest: +SKIP
        >>> print(traj); traj.save("heat.html")                                          # doctest: +SKIP
    """
    check_model(model, what="a trajectory")
    lenses = named_lenses(model, lens)
    hooks = checked_hooks(model, hooks)
    if teacher is not None:
        one_of("teacher", teacher, ("clean",))  # or None, which is the run itself
    if cache is not None and (hooks or teacher):
        raise ValueError("cache= holds a run that is over: hooks and teacher have nothing to act on")
    k = min(whole_number("top_k", top_k, least=0), int(model.cfg.d_vocab))
    chunk_size = None if chunk_size is None else whole_number("chunk_size", chunk_size, least=1)
    if calibrated is not None and not isinstance(calibrated, Calibrated):
        raise TypeError(f"calibrated must be what tll.marginals returns, got {type(calibrated).__name__}")
    rows = common_layers(lenses, layers, n_layers(model))
    decoders = decoders_of(lenses, rows)
    batch = prepare(model, tokens, attention_mask, prepend_bos=prepend_bos)
    mask = used_positions(batch, False)
    next_ids = next_tokens(batch.tokens, mask)
    goal = next_ids if targets is None else _ids(model, targets, batch.tokens, mask, "targets")
    anti = None if anti_targets is None else _ids(model, anti_targets, batch.tokens, mask, "anti_targets")

    if cache is None:
        reading = read_run(model, batch, rows, hooks, mask, clean_teacher=teacher == "clean")
    else:
        reading = read_cache(model, batch, rows, cache, mask)
    readout = next(iter(lenses.values())).readout
    followed = _own_top(reading, readout, mask) if track is None else _named_ids(model, track, batch.tokens)
    more = ("logprob_diff",) * (anti is not None) + ("score",) * (calibrated is not None)
    table = _Table.empty(list(lenses), len(rows), len(reading.where), (k, followed.shape[1]), more)
    score = lambda name, i, logp: None if calibrated is None or reading.is_model(rows[i]) else calibrated.score(name, rows[i], logp)  # fmt: skip
    with progress(total=len(rows) * len(reading.where), desc="trajectory") as bar:
        for chunk in decode(reading, decoders, readout, chunk_size):
            other = None if anti is None else anti.flatten()[chunk.at]
            table.fill(chunk, (goal.flatten()[chunk.at], other, followed[chunk.at // mask.shape[1]]), score)
            bar.update(len(chunk.logits) * len(chunk.at))
    settings = {"bos": bos_before(model, tokens, prepend_bos)} | ({} if calibrated is None else {"calibrated": repr(calibrated)})
    made = table.trajectories(model, rows, Batch(batch.tokens, mask), (goal, anti, followed), settings)
    made = replace(made, by_name={name: _of_lens(t, lenses[name]) for name, t in made.by_name.items()})
    return made if isinstance(lens, Mapping) else made[""]


def _of_lens(traj: Trajectory, lens: Lens) -> Trajectory:
    """With the lens' kind, and the positions that its fit left out."""
    meta: dict[str, Any] = {"fitter": "logit"} if lens.translators is None else lens.translators.meta
    first = traj.mask & (traj.mask.cumsum(1) == 1) & bool(meta.get("settings", {}).get("skip_first", False))
    return replace(traj, settings={**traj.settings, "lens": str(meta.get("fitter", "fitted"))}, left_out=first)


def _own_top(reading: Reading, readout: Readout, mask: Tensor) -> Int[Tensor, "batch n"]:
    """The last `TRACKED` different top tokens of the run's own output in each row; -1 where there are fewer."""
    if mask.sum() > TRACKED_CELLS:
        return mask.new_empty(len(mask), 0, dtype=torch.long)
    output, most = reading.output, most_rows(readout.weights()[0])
    chosen: list[dict[int, None]] = [{} for _ in mask]
    places = [row.nonzero()[:, 0].tolist() for row in mask]
    # From the end, some positions of every row at a time: each look is a product with the whole vocabulary, and most texts need few.
    while wanting := [i for i, row in enumerate(places) if row and len(chosen[i]) < TRACKED]:
        each = max(1, min(2 * TRACKED, most // len(wanting)))
        last = {i: places[i][-each:] for i in wanting[:most]}
        x = torch.cat([output.x[i, positions] for i, positions in last.items()])
        top = S.likeliest(readout.logits(x) if output.hidden else x).tolist()
        for i, positions in last.items():
            found, top = top[: len(positions)], top[len(positions) :]
            chosen[i] |= dict.fromkeys(reversed(found))
            places[i] = places[i][: -len(positions)]
    ids = [list(row)[:TRACKED] for row in chosen]
    n = max(map(len, ids))
    return torch.tensor([[*row, *[-1] * (n - len(row))] for row in ids], device=mask.device)


def _named_ids(model: LensModel, track: Any, tokens: Tensor) -> Int[Tensor, "batch n"]:
    """The ids of `track`, the same for each row."""
    each = [
        _ids(model, token, tokens[:1, :1], torch.ones_like(tokens[:1, :1], dtype=torch.bool), "track")
        for token in several("track", track, "tokens")
    ]
    return torch.cat([tokens.new_empty(1, 0), *each], 1).expand(len(tokens), -1)


@dataclass(frozen=True)
class _Table:
    """What is measured at the real positions, on the CPU: `[row, position]` and `[row, position, k]`."""

    stats: dict[str, dict[str, Tensor]]
    top_ids: dict[str, Tensor]
    top_probs: dict[str, Tensor]
    ranks: dict[str, Tensor]
    probs: dict[str, Tensor]
    pairs: dict[tuple[str, str, str], Tensor]

    @classmethod
    def empty(cls, names: list[str], n_rows: int, n: int, sizes: tuple[int, int], more: Sequence[str]) -> "_Table":
        """Zeros to be filled, for so many likeliest and so many tracked tokens, with `more` statistics than those of every call."""
        k, n_tracked = sizes
        kinds = [*(s for s in STATISTICS if s != "logprob_diff"), *more]
        dtype = lambda s: torch.long if s == "rank" else torch.float32
        return cls(
            {name: {s: torch.zeros(n_rows, n, dtype=dtype(s)) for s in kinds} for name in names},
            {name: torch.zeros(n_rows, n, k, dtype=torch.long) for name in names},
            {name: torch.zeros(n_rows, n, k) for name in names},
            {name: torch.zeros(n_rows, n, n_tracked, dtype=torch.int32) for name in names},
            {name: torch.zeros(n_rows, n, n_tracked) for name in names},
            {
                (a, b, kind): torch.zeros(n_rows, n)
                for a in names
                for b in names
                for kind in S.PAIRWISE
                if a != b and (kind == "kl" or names.index(a) < names.index(b))
            },
        )

    def fill(
        self, chunk: Chunk, ids: tuple[Tensor, Tensor | None, Tensor], score: Callable[[str, int, Tensor], Tensor | None]
    ) -> None:  # fmt: skip
        """The numbers of some positions; `ids` are targets, anti-targets and tokens to follow, `score` calibrates log-probabilities, if it does."""
        part, (target, other, followed) = chunk.part, ids
        scored = torch.cat([target[:, None], followed], 1)
        for i, by_name in chunk.logits.items():
            distributions: dict[str, tuple[Tensor, Tensor]] = {}
            for name, logits in by_name.items():
                logp, p = distributions[name] = chunk.distribution(logits, name)
                put, calibrated, room = self.stats[name], score(name, i, logp), chunk.rooms.like("room", logits)
                order = logits if calibrated is None else calibrated
                put["entropy"][i, part] = S.entropy(logp, p, room).cpu()
                put["kl"][i, part] = S.kl(chunk.logp, logp, chunk.p, room).float().cpu()
                ranks, logprobs = S.ranks(order, scored, chunk.rooms), S.target_logprobs(logp, scored)
                put["rank"][i, part], self.ranks[name][i, part] = ranks[:, 0].cpu(), ranks[:, 1:].int().cpu()
                self.probs[name][i, part], of_target = logprobs[:, 1:].exp().cpu(), logprobs[:, 0]
                put["target_logprob"][i, part] = of_target.cpu()
                put["cross_entropy"][i, part] = -of_target.cpu()
                if "score" in put:
                    put["score"][i, part] = torch.nan if calibrated is None else S.target_logprob(calibrated, target).cpu()
                put["max_prob"][i, part] = logp.amax(-1).exp().cpu()
                if other is not None:
                    put["logprob_diff"][i, part] = (of_target - S.target_logprob(logp, other)).cpu()
                best, _ = S.largest(logp if calibrated is None else calibrated, self.top_ids[name].shape[-1])
                self.top_ids[name][i, part] = best.cpu()
                self.top_probs[name][i, part] = logp.gather(-1, best).exp().cpu()
            for a, b in combinations(distributions, 2):
                (logp, p), (logq, q) = distributions[a], distributions[b]
                both = S.pairwise(p, q, logp, logq)
                self.pairs[b, a, "kl"][i, part] = both.pop("reverse").cpu()
                for kind, value in both.items():
                    self.pairs[a, b, kind][i, part] = value.cpu()

    def trajectories(
        self, model: LensModel, rows: list[int | str], batch: Batch, scored: tuple[Tensor, Tensor | None, Tensor],
        settings: dict[str, Any],
    ) -> Trajectories:  # fmt: skip
        """Laid out over the batch, pads marked, with the texts of all ids that are shown."""
        tokens, mask = batch.tokens.cpu(), used_positions(batch, False).cpu()
        goal, anti, followed = (x if x is None else x.cpu() for x in scored)
        assert goal is not None and followed is not None
        real = mask.flatten()

        def grid(x: Tensor) -> Tensor:
            """`[row, real positions, ...]` to `[row, batch, pos, ...]`."""
            nothing = torch.nan if x.is_floating_point() else -1
            full = torch.full((len(rows), mask.numel(), *x.shape[2:]), nothing, dtype=x.dtype)
            full[:, real] = x
            return full.reshape(len(rows), *mask.shape, *x.shape[2:])

        shown = (tokens, goal, anti, followed, *self.top_ids.values())
        ids = {int(i) for x in shown if x is not None for i in x.unique() if i >= 0}
        tokenizer = getattr(model, "tokenizer", None)
        vocab = {i: str(i) for i in ids} if tokenizer is None else token_text(tokenizer, ids)
        made = {
            name: Trajectory(
                tuple(rows), tokens, mask, goal, anti, {s: grid(v) for s, v in stats.items()}, grid(self.top_ids[name]),
                grid(self.top_probs[name]), n_layers(model), name, name_of(model), vocab, settings, None,
                Tracked(followed, grid(self.ranks[name]), grid(self.probs[name])) if followed.numel() else None,
            )
            for name, stats in self.stats.items()
        }  # fmt: skip
        pairs = {key: grid(value) for key, value in self.pairs.items()}
        # Jensen-Shannon and total variation are symmetric.
        return Trajectories(made, pairs | {(b, a, kind): x for (a, b, kind), x in pairs.items() if kind != "kl"})

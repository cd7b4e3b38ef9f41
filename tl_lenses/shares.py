"""A logit as a sum, exactly: over the components of a state that a lens reads, or over the states of a layer that a logit is made of."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.checks import flag, several, whole_number
from tl_lenses.files import csv_text, json_text, readable
from tl_lenses.hooks import Hook, check_edits, checked_hooks, patch, read, run
from tl_lenses.layers import LayerOrSite, as_layer, layer_site, resolve_layer
from tl_lenses.lens import LayerLens, Lens, one_lens
from tl_lenses.linearised import Linearised
from tl_lenses.model import LensModel, check_model, dtype_of, lock_of, n_layers, name_of, prepare
from tl_lenses.shown import Tabled
from tl_lenses.sites import positions, site
from tl_lenses.token_text import token_text
from tl_lenses.tokens import Batch


@dataclass(frozen=True, repr=False)
class Shares(Tabled):
    """Parts of logits: `total = values.sum(axis) + rest`, where axis is that of the rows, or of the positions.

    Attributes:
        title: what is summed.
        rows: names of the components, or layers.
        tokens: the prompt's tokens, a column each.
        values: `[row, pos]`, logits.
        total: the logit of each position (a sum over rows) or of each row (a sum over positions), before a soft cap.
        rest: what no part has: biases.
        over: "rows" or "positions".
        targets: the token whose logit it is, for each of `total`.
    """

    title: str
    rows: tuple[str, ...]
    tokens: tuple[str, ...]
    values: Float[Tensor, "row pos"]
    total: Float[Tensor, " n"]
    rest: Float[Tensor, " n"]
    over: Literal["rows", "positions"]
    targets: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Shares({self.title!r}, {len(self.rows)} rows, {len(self.tokens)} positions, over {self.over})"

    def _table(self) -> tuple[str, list[str], list[list[Any]], str]:
        rows: list[list[Any]] = [[name, *part] for name, part in zip(self.rows, self.values.tolist(), strict=True)]
        columns, rest, total = ["", *self.tokens], self.rest.tolist(), self.total.tolist()
        if self.over == "rows":
            rows += [["rest", *rest], ["total", *total], ["of", *self.targets]]
            return self.title, columns, rows, "logits; the sum over rows is that of the token below"
        rows = [[*row, r, t] for row, r, t in zip(rows, rest, total, strict=True)]
        return self.title, [*columns, "rest", "total"], rows, "logits; the sum over positions and the rest is the total"

    def _records(self) -> list[dict[str, Any]]:
        target = lambda r, c: self.targets[c if self.over == "rows" else r]
        return [
            {"row": row, "pos": c, "token": token, "target": target(r, c), "value": float(self.values[r, c])}
            for r, row in enumerate(self.rows)
            for c, token in enumerate(self.tokens)
        ]

    def to_frame(self) -> Any:
        """A pandas data frame, a row per part and position: row, pos, token, target, value."""
        return self._views.rows_frame(self._records())

    def heat_map(self) -> Any:
        """The parts as a `views.Heat`, which gives `.svg()`, `.png()` and `.figure()`; the first part of a sum is at the bottom."""
        names = [f"{token} → {target}" for token, target in zip(self.tokens, self.targets, strict=False)]
        return self._views.Heat(
            self.title, [readable(row) for row in self.rows[::-1]], [readable(c) for c in (names if self.over == "rows" else self.tokens)],
            self.values.flip(0).tolist(), "", "", high=max(float(self.values.abs().max()), 1e-6), diverging=True,
        )  # fmt: skip

    def figure(self) -> Any:
        """A plotly heat map (extra `plot`)."""
        return self.heat_map().figure()

    def save(self, path: str | Path, *, overwrite: bool = True) -> Path:
        """Write `.csv`, `.json`, `.html` (the table), or `.svg` and `.png` (the heat map).

        Example:
            >>> shares.save("parts.svg")      # doctest: +SKIP
        """
        numbers = {"title": self.title, "over": self.over, "rest": self.rest.tolist(), "total": self.total.tolist()}
        writers: dict[str, Any] = {
            ".csv": lambda: csv_text(self._records()), ".json": lambda: json_text({**numbers, "rows": self._records()}) + "\n",
            ".html": lambda: self._views.page_of("shares", self._repr_html_()), ".svg": lambda: self.heat_map().svg(),
            ".png": lambda: self.heat_map().png(),
        }  # fmt: skip
        return self._views.save_as(path, writers, example="parts.svg", overwrite=overwrite)


def components(
    model: LensModel,
    lens: Lens,
    tokens: Any,
    layer: LayerOrSite = -1,
    *,
    targets: Any = None,
    heads: bool = False,
    hooks: Iterable[Hook] = (),
) -> Shares:
    """What each component of a state adds to its lens' logit: `logit_v = sum_c g_v W_l c / scale(W_l h + b) + rest_v`.

    The state `h_l` is a sum of the embedding and of what attention and MLP of each block before l have written. The final norm's scale is
    held at the lens' own point; then the lens is linear, and the sum exact. `rest` has the biases of lens, norm and unembedding.
    The logit lens gives direct logit attribution, and with layer -1 that of the model.

    Args:
        tokens: one prompt: text, token ids or messages.
        layer: of the residual, `0..n_layers` (negative ones from the end).
        targets: the token at each position, one id for all or a list; by default the lens' own likeliest.
        heads: a row per head in place of attention's, and one per block for its biases.
        hooks: interventions under which to run.

    Raises:
        ValueError: several prompts; a layer that was not fitted; targets that are not in the vocabulary.

    Source: Elhage et al. 2021 (A Mathematical Framework for Transformer Circuits), direct logit attribution.

    Example:
        >>> tll.components(model, lens, "The capital of France is", layer=6).save("parts.svg")      # doctest: +SKIP
    """
    check_model(model, what="an attribution")
    one_lens(model, lens, "components")
    batch, depth = _prompt(model, tokens), n_layers(model)
    end = resolve_layer(as_layer(layer), depth)
    decode = lens[end]
    flag("heads", heads)
    with torch.enable_grad():
        states, written = _parts_of(model, batch, end, heads, checked_hooks(model, hooks))
    with torch.enable_grad(), Linearised("detached", strict=False):
        h = states[-1].detach().requires_grad_()
        hidden = decode.hidden(h[None])[0]
        ids = _targets(model, decode, hidden, targets)
        logits = _logits(decode, hidden, ids)
        (direction,) = torch.autograd.grad(logits.sum(), h)
        direction, states = _wide(direction), [_wide(x) for x in states]
        names, rows = ["embedding"], [(states[0] * direction).sum(-1)]
        for i in range(end):
            before, between, after = states[2 * i : 2 * i + 3]
            attention = ((between - before) * direction).sum(-1)
            if heads:
                out, z = written[i]
                (grad,) = torch.autograd.grad((out[0] * direction).sum(), z)
                each = (grad * z).detach().reshape(len(h), int(model.cfg.n_heads), -1).sum(-1)
                names += [f"{i} head {k}" for k in range(each.shape[1])]
                rows += list(each.unbind(1))
                attention = attention - each.sum(1)
            names += [f"{i} attention bias" if heads else f"{i} attention", f"{i} mlp"]
            rows += [attention, ((after - between) * direction).sum(-1)]
    values, total = torch.stack(rows).detach().cpu(), logits.detach().cpu()
    texts = _texts(model, [*batch.tokens[0].tolist(), *ids.tolist()])
    return Shares(
        f"{name_of(model)}: the lens at layer {end} as a sum", tuple(names), texts[: len(h)], values, total,
        total - values.sum(0), "rows", texts[len(h) :],
    )  # fmt: skip


def detached(
    model: LensModel,
    tokens: Any,
    target: int | None = None,
    *,
    pos: Any = -1,
    layers: Iterable[int] | None = None,
    hooks: Iterable[Hook] = (),
) -> Shares:
    """The exact lens of one prompt: a logit as a sum over the states of a layer, `logit_v = sum_s a_l(s) . h_l[s] + rest_l`.

    With attention patterns, norms' scales, ratios of activations and gates held at this run's values, the model after layer l is affine in its
    states. One backward pass gives all `a_l(s)`. Exact says how the number was made here, not what would follow a change:
    patterns would change too.

    Args:
        tokens: one prompt: text, token ids or messages.
        target: id of the token, by default the model's likeliest.
        pos: of the logit, as `tll.positions` takes it.
        layers: `0..n_layers`, all by default.
        hooks: interventions under which to run.

    Raises:
        ValueError: several prompts or positions; a model with a nonlinearity that is not in the rule (`tl_lenses.linearised`), found
            because states and biases do not add up to the logit.

    Source: Golden 2025 (2505.24293), section 3.

    Example:
        >>> print(tll.detached(model, "The capital of France is"))      # doctest: +SKIP
    """
    check_model(model, what="an attribution")
    batch, depth = _prompt(model, tokens), n_layers(model)
    chosen = range(depth + 1) if layers is None else several("layers", layers)
    numbers = [resolve_layer(as_layer(layer), depth) for layer in chosen]
    if not numbers:
        raise ValueError("an empty list of layers has nothing to show: give at least one")
    where = positions(model, batch.tokens, pos)
    if where.shape != (1, 1):
        raise ValueError(f"a logit is of one position, and {pos!r} selects {where.shape[1]}: give one")
    at, seen, decode = int(where), {}, Lens(model)[depth]
    reads = [read(site(model, layer), seen, key=layer, detach=False) for layer in {*numbers, 0, depth}]
    root = patch(0, lambda x: x.detach().requires_grad_())
    biases = {name: p for name, p in model.named_parameters() if _is_bias(name)}  # type: ignore[attr-defined]
    flags, pairs = [(p, p.requires_grad) for p in biases.values()], [*checked_hooks(model, hooks), root, *reads]
    check_edits(model, pairs)  # its passes would see the rule's gradients
    with torch.enable_grad(), lock_of(model), Linearised("detached"):
        try:
            for p, _ in flags:
                p.requires_grad_()
            run(model, batch.tokens, pairs)
            hidden = decode.hidden(seen[depth])[0, at : at + 1]
            ids = _targets(model, decode, hidden, target)
            logit = _logits(decode, hidden, ids)[0]
            asked = [*(seen[layer] for layer in (*numbers, 0)), *biases.values()]
            grads = torch.autograd.grad(logit, asked, allow_unused=True)
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)
    inner = lambda g, x: torch.zeros(()) if g is None else (_wide(g) * _wide(x)).detach().sum(-1)
    parts = list(map(inner, grads, asked))
    _, b_u = decode.readout.weights()
    explained = float(sum(part.double().sum() for part in parts[len(numbers) :])) + (0.0 if b_u is None else float(b_u[ids].sum()))
    logit = logit.detach()
    share = 1e-3 if dtype_of(model).itemsize >= 4 else 0.02  # of what half precision rounds
    if abs(explained - float(logit)) > share * max(1.0, float(hidden.detach().abs().max()), abs(float(logit))):
        raise ValueError(
            f"states and biases of {name_of(model)!r} add up to {explained:.4f} and its logit is {float(logit):.4f}: it has a "
            "nonlinearity that the rule does not hold, so there is no exact sum for it"
        )
    values = torch.stack([part[0] for part in parts[: len(numbers)]]).cpu()
    total = logit.cpu().expand(len(numbers)).clone()
    texts = _texts(model, [*batch.tokens[0].tolist(), int(ids)])
    return Shares(
        f"{name_of(model)}: the logit of {texts[-1]!r} after {texts[at]!r} as a sum over states", tuple(str(n) for n in numbers),
        texts[:-1], values, total, total - values.sum(1), "positions", texts[-1:] * len(numbers),
    )  # fmt: skip


def _prompt(model: LensModel, tokens: Any) -> Batch:
    batch = prepare(model, tokens)
    if len(batch.tokens) != 1:
        raise ValueError(f"a sum is of one prompt, got {len(batch.tokens)}: pass them one by one")
    return batch


def _parts_of(
    model: LensModel, batch: Batch, end: int, heads: bool, hooks: list[Hook]
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """States `[pos, d]` before and after every attention and MLP below a layer; and what each attention has written, of its heads only."""
    seen: dict[Any, Tensor] = {}
    out, z = {}, {}
    pairs, parallel = list(hooks), _is_parallel(model)
    for i in range(end + 1):
        name = layer_site(i, n_layers(model))
        if i == n_layers(model):
            pairs.append(read(name, seen, key=2 * i))
            break
        pairs += [patch(name, lambda x: x.detach()), read(name, seen, key=2 * i)]
        if i == end:
            break
        if heads:
            pairs += [patch(f"blocks.{i}.attn.hook_z", lambda x: x.detach().requires_grad_())]
            pairs += [read(f"blocks.{i}.attn.hook_z", z, key=i, detach=False)]
            pairs += [read(f"blocks.{i}.hook_attn_out", out, key=i, detach=False)]
        pairs.append(read(f"blocks.{i}.{'hook_attn_out' if parallel else 'hook_resid_mid'}", seen, key=2 * i + 1))
    check_edits(model, pairs)  # its passes would see the rule's gradients
    with Linearised("detached", strict=False):
        run(model, batch.tokens, pairs)
    if parallel:  # what attention wrote, as a state: nothing is between attention and MLP
        for i in range(end):
            seen[2 * i + 1] = seen[2 * i] + seen[2 * i + 1]
    return [seen[key][0] for key in sorted(seen)], [(out[i], z[i]) for i in sorted(z)]


def _is_parallel(model: LensModel) -> bool:
    """Whether attention and MLP read the same state: there is no residual between them."""
    return bool(getattr(model.cfg, "parallel_attn_mlp", False)) or "blocks.0.hook_resid_mid" not in model.hook_dict


def _is_bias(name: str) -> bool:
    last = name.rpartition(".")[2].lstrip("_")  # `_b_V`: heads that share keys and values
    return last.startswith("b_") or last == "b" or "bias" in last


def _targets(model: LensModel, decode: LayerLens, hidden: Tensor, targets: Any) -> Tensor:
    """Ids `[pos]`."""
    if targets is None:
        return decode.readout.logits(hidden.detach()).argmax(-1)
    given = targets.flatten().tolist() if isinstance(targets, Tensor) else targets
    given = [given] * len(hidden) if not isinstance(given, (list, tuple)) else list(given)
    ids = [whole_number("a target", i, least=0, most=int(model.cfg.d_vocab) - 1) for i in given]
    if len(ids) != len(hidden):
        raise ValueError(f"{len(ids)} targets for {len(hidden)} positions: give one id, or one for each")
    return torch.tensor(ids, device=hidden.device)


def _logits(decode: LayerLens, hidden: Tensor, ids: Tensor) -> Float[Tensor, " pos"]:
    """Of one token per position, before a soft cap."""
    w_u, b_u = decode.readout.weights()
    logits = (_wide(hidden) * _wide(w_u[:, ids].T)).sum(-1)
    return logits if b_u is None else logits + b_u[ids]


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: sums of half-precision products lose what small parts add."""
    return x if x.dtype == torch.float64 else x.float()


def _texts(model: LensModel, ids: list[int]) -> tuple[str, ...]:
    tokenizer = getattr(model, "tokenizer", None)
    vocab = {i: str(i) for i in ids} if tokenizer is None else token_text(tokenizer, set(ids))
    return tuple(vocab[i] for i in ids)

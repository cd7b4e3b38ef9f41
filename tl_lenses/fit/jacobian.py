"""The Jacobian lens: a layer's average first-order effect on the final residual, and the same with the R-lens' backward rule."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_lenses.checks import flag, one_of, several, whole_number
from tl_lenses.fit.common import NotFinite, place, record, rows_for
from tl_lenses.fit.state import Checkpoint, alone
from tl_lenses.fit.team import Team, is_sharded, processes
from tl_lenses.hooks import Hook, check_edits, checked_hooks, patch, read, run
from tl_lenses.identity import same_model
from tl_lenses.layers import LayerOrSite, layer_site, site_layer
from tl_lenses.linearised import Linearised
from tl_lenses.model import LensModel, check_model, n_layers, prepare
from tl_lenses.progress import progress
from tl_lenses.text.batches import Bookmark, Text
from tl_lenses.tokens import Batch, used_positions
from tl_lenses.translators import Row, Translators
from tl_lenses.unembed import Readout

ROWS = 32  # of a backward pass: prompts times copies of them


@dataclass(frozen=True)
class Averaging:
    """What is averaged over which positions. `fit_jacobian` says what each field means."""

    rows: tuple[Row, ...]
    rule: Literal["jacobian", "relevance"] = "jacobian"
    skip_first: int = 16
    skip_last: bool = True
    limit_prompts: int | None = None
    rows_per_pass: int = ROWS
    hooks: tuple[Hook, ...] = ()

    def settings(self) -> dict[str, Any]:
        """JSON values that decide the result."""
        return {
            "rule": self.rule, "targets": "sum", "sources": "mean", "prompts": "mean", "skip_first": self.skip_first,
            "skip_last": self.skip_last, "limit_prompts": self.limit_prompts,
        }  # fmt: skip

    def valid(self, batch: Batch) -> Bool[Tensor, "batch pos"]:
        """V, the positions that are sources and targets: real ones, but for the first `skip_first` and the last of each row."""
        real = used_positions(batch, False).cpu()
        from_start, from_end = real.cumsum(1), real.flip(1).cumsum(1).flip(1)
        return real & (from_start > self.skip_first) & (from_end > int(self.skip_last))


class Counts(NamedTuple):
    """How much of a text was read: batches, prompts in the average, positions of these."""

    batches: int = 0
    prompts: int = 0
    positions: int = 0


@torch.inference_mode(False)
@torch.no_grad()
def fit_jacobian(
    model: LensModel,
    tokens: Any,
    layers: Iterable[LayerOrSite] | None = None,
    *,
    target_layer: LayerOrSite | None = None,
    rule: Literal["jacobian", "relevance"] = "jacobian",
    skip_first: int = 16,
    skip_last: bool = True,
    limit_prompts: int | None = None,
    rows_per_pass: int = ROWS,
    hooks: Iterable[Hook] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    note: Mapping[str, Any] | None = None,
    show_progress: bool | None = None,
) -> Translators:
    """The averaged Jacobian: `J_l = mean_prompts (1 / |V|) sum_{t in V} sum_{t' in V} d h_L[t'] / d h_l[t]`, `W = J_l`, `b = 0`.

    Effects on all targets t' are summed (those before t are zero), sources and prompts averaged; the published lenses are made so.
    A lens of it says what a state makes the model more likely to say later, to first order; the sum makes it larger than a
    regression's map, which a norm undoes and steering does not. To fit over shards of the prompts: `fit.jacobian.merge`.

    Args:
        tokens: prompts, a row each: `[n, seq]`, `token_batches(...)` or an iterable of batches. Published: 100 to 1,000 of 128.
        layers: source layers or sites, by default all below the target.
        target_layer: target layer or site, the final residual by default; `n_layers - 1` is the published variant.
        rule: of the backward pass: "jacobian", or "relevance" for the R-lens (`tl_lenses.linearised`).
        skip_first: positions at the start of each prompt that are neither source nor target.
        skip_last: leave out the last position of each prompt too. Prompts without a position left do not count.
        limit_prompts: stop after so many.
        rows_per_pass: rows of a backward pass, at least the prompts of a batch: each is there in copies, one per output dimension.
        hooks: interventions under which to fit.
        checkpoint, checkpoint_every, note: as in `fit_tuned`; the file keeps the sum, every so many batches.

    Returns:
        `Translators` with `meta["n_prompts"]`.

    Raises:
        ValueError: no prompt is long enough; a source that does not lead to the target; gradients that are not finite; a
            checkpoint of other settings, text or model; a model whose activations have a backward of their own, with
            "relevance"; a model that is spread over processes; stored states, which have no gradients.
        TypeError: a setting of the wrong type.

    Source: Gurnee et al. 2026 (2607.15495), and their code's estimator.

    Example:
        >>> lens = tll.Lens(model, tll.fit_jacobian(model, prompts, limit_prompts=100))      # doctest: +SKIP
    """
    check_model(model, what="a fit")
    if is_sharded(model):
        raise ValueError("fit_jacobian needs the whole model in each process: load it without sharding, and merge parts")
    text = Text.of(tokens).to_run("fit_jacobian")
    one_of("rule", rule, ("jacobian", "relevance"))
    flag("skip_last", skip_last)
    limit_prompts = None if limit_prompts is None else whole_number("limit_prompts", limit_prompts, least=1)
    skip_first = whole_number("skip_first", skip_first, least=0)
    rows_per_pass = whole_number("rows_per_pass", rows_per_pass, least=1)
    averaging = Averaging(
        _rows(model, layers, target_layer), rule, skip_first, skip_last, limit_prompts, rows_per_pass,
        tuple(checked_hooks(model, hooks)),
    )  # fmt: skip
    every = whole_number("checkpoint_every", checkpoint_every, least=1)
    team = processes()
    settings = {**averaging.settings(), "rows": [list(row) for row in averaging.rows], "note": note}
    kept = Checkpoint.of(checkpoint, "fit_jacobian", settings, [model], team)
    with alone(checkpoint, team):
        total, counts = _averaged(model, text, averaging, kept, every, show_progress)
    if not counts.prompts:
        raise ValueError(
            f"no prompt is long enough: with skip_first={skip_first} and skip_last={skip_last} a row needs "
            f"{skip_first + 1 + skip_last} tokens; give longer rows, or skip less"
        )
    weights = total / counts.prompts
    meta = record(model, rule, counts.positions, averaging.settings(), next(iter(kept.identities), None))
    meta |= {"n_prompts": counts.prompts, "skip_first": skip_first}
    return Translators(averaging.rows, weights, weights.new_zeros(weights.shape[:2]), n_layers=n_layers(model), meta=meta)


def merge(parts: Sequence[Translators]) -> Translators:
    """The lens of all prompts from lenses of disjoint ones: `J = sum n_i J_i / sum n_i`.

    Raises:
        TypeError: something else than translators.
        ValueError: none; maps of other rows, settings or models; maps that do not say how many prompts they are of.

    Example:
        >>> merge([fit_jacobian(model, half) for half in (prompts[:50], prompts[50:])])      # doctest: +SKIP
    """
    parts = several("parts", parts, "Translators")
    if not parts or not all(isinstance(part, Translators) for part in parts):
        raise TypeError("merge takes a list of Translators, one per shard of the prompts")
    first = parts[0]
    counts = [part.meta.get("n_prompts") for part in parts]
    if not all(isinstance(n, int) and n > 0 for n in counts):
        raise ValueError(f"each part must say how many prompts it is of, got n_prompts={counts}: merge what fit_jacobian made")
    about = lambda part: {"rows": part.rows, "fitter": part.meta.get("fitter"), **part.meta.get("settings", {})}
    for part in parts[1:]:
        theirs = about(part)
        differ = [key for key, value in about(first).items() if theirs.get(key) != value and key != "limit_prompts"]
        known = first.meta.get("fingerprint"), part.meta.get("fingerprint")
        same = None in known or same_model(*known, first.meta.get("model_dtype"))
        if differ or first.d_in != part.d_in or not same:
            raise ValueError(
                f"these parts are not of one fit: they differ in {differ or 'the model'}; fit the shards with the same settings"
            )
    weights = sum(n * part.weights.detach().double() for n, part in zip(counts, parts, strict=True)) / sum(counts)
    seen = sum(part.meta.get("tokens_seen", 0) for part in parts)
    meta = {**first.meta, "n_prompts": sum(counts), "tokens_seen": seen}
    return Translators(first.rows, weights.float(), first.biases, n_layers=first.n_layers, meta=meta)  # type: ignore[union-attr]


def _rows(model: LensModel, layers: Iterable[LayerOrSite] | None, target: LayerOrSite | None) -> tuple[Row, ...]:
    depth = n_layers(model)
    end = depth if target is None else site_layer(place(model, target))
    return tuple(rows_for(model, range(end) if layers is None and end else layers, target))


def _averaged(
    model: LensModel, text: Text, averaging: Averaging, checkpoint: Checkpoint, every: int, show_progress: bool | None
) -> tuple[Float[Tensor, "n_rows d_out d_in"] | Any, Counts]:
    """The sum over prompts, of all processes, on the CPU, and how many they were."""
    team, total, counts, bookmark = checkpoint.team, None, Counts(), None
    if (state := checkpoint.resume()) is not None:
        bookmark, counts = Bookmark.load(state["position"]), Counts(*state["counts"])
        total = state["sum"] if team.first else None
    check_edits(model, list(averaging.hooks))  # every process makes its passes now, or none
    stream = text.stream(at=bookmark, endless=False)
    shown = progress(total=text.n_batches, initial=counts.batches, desc=averaging.rule, show=show_progress if team.first else False)
    with shown as bar, closing(stream), team.together():
        for batch, bookmark in stream:
            left = None if averaging.limit_prompts is None else averaging.limit_prompts - counts.prompts
            long = averaging.valid(batch).any(1).nonzero()[:left, 0]
            batch = batch.take(long.to(batch.tokens.device))
            mine, _ = team.rows_of(batch, counts.prompts)
            if len(long) and mine is not None:
                part = sum_of_jacobians(model, mine, averaging)
                total = part if total is None else total.to(part.device) + part
            used = int(averaging.valid(batch).sum())
            counts = Counts(counts.batches + 1, counts.prompts + len(long), counts.positions + used)
            bar.update()
            if averaging.limit_prompts is not None and counts.prompts >= averaging.limit_prompts:
                break
            if checkpoint.file is not None and counts.batches % every == 0:
                total = _of_all(total, team)
                state = {"position": bookmark.state(), "counts": list(counts), "sum": total}
                checkpoint.keep(state, f"after {counts.prompts} prompts")
                total = total if team.first else None
    return _of_all(total, team), counts


def _of_all(total: Tensor | None, team: Team) -> Tensor | None:
    """The sum over processes; a process may have had no prompt yet."""
    shapes = [shape for shape in team.gather(None if total is None else tuple(total.shape)) if shape is not None]
    if not shapes:
        return None
    total = torch.zeros(shapes[0]) if total is None else total.cpu().contiguous()
    team.add_up(total.view(-1))
    return total


def sum_of_jacobians(model: LensModel, batch: Batch, averaging: Averaging) -> Float[Tensor, "n_rows d_out d_in"]:
    """`sum_prompts (1 / |V|) sum_{t in V} sum_{t' in V} d y[t'] / d x[t]`, on the model's device.

    One forward pass of the prompts in copies. A backward pass has a cotangent `e_i` at every target: causality leaves out the targets
    before a source. Each copy has another i, so that a pass has `prompts x copies` rows, for all sources at once.
    """
    batch = prepare(model, batch.tokens, batch.attention_mask)
    n, copies = len(batch.tokens), max(1, averaging.rows_per_pass // len(batch.tokens))
    valid = averaging.valid(batch)
    repeat = lambda x: None if x is None else x.repeat(copies, 1)
    y, xs = _graph(model, Batch(repeat(batch.tokens), repeat(batch.attention_mask)), averaging)  # type: ignore[arg-type]
    d_out = y.shape[-1]
    share = valid.to(y.device, torch.float32)
    share = share / share.sum(1, keepdim=True)
    total = torch.zeros(len(xs), d_out, xs[0][0, 0].numel(), device=y.device)
    for start in range(0, d_out, copies):
        dims = range(start, min(start + copies, d_out))
        cotangent = torch.zeros_like(y).view(copies, n, *y.shape[1:])
        for copy, i in enumerate(dims):
            cotangent[copy, ..., i] = valid.to(y)
        grads = torch.autograd.grad(y, xs, cotangent.view_as(y), retain_graph=dims.stop < d_out, allow_unused=True)
        for row, grad in enumerate(grads):
            if grad is None:
                raise ValueError(f"{averaging.rows[row][0]!r} does not lead to {averaging.rows[row][1]!r}: leave it out")
            by_copy = grad.flatten(2).float().to(y.device).view(copies, n, y.shape[1], -1)[: len(dims)]
            total[row, start : dims.stop] = torch.einsum("k b t d, b t -> k d", by_copy, share)
    if not total.isfinite().all():
        row = int((~total.isfinite()).flatten(1).any(1).nonzero()[0])
        raise NotFinite(f"gradients at {averaging.rows[row][0]!r} are not finite: try float32 or bfloat16")
    return total


def _graph(model: LensModel, batch: Batch, averaging: Averaging) -> tuple[Tensor, list[Tensor]]:
    """Target `[rows, pos, d_out]` and sources of one pass, with its graph from the earliest source on."""
    seen: dict[str, Tensor] = {}
    sources, target = [source for source, _ in averaging.rows], averaging.rows[0][1]
    # A site inside a block is behind the block's own residual.
    root = layer_site(min(int(name.split(".")[1]) if name.startswith("blocks.") else 0 for name in sources), n_layers(model))
    hooks = [*averaging.hooks, patch(root, lambda x: x.detach().requires_grad_())]
    hooks += [read(name, seen, detach=False) for name in (*sources, target)]
    check_edits(model, hooks)  # its passes would see the rule's gradients
    rule = nullcontext() if averaging.rule == "jacobian" else Linearised("relevance")
    with torch.enable_grad(), Readout(model).without_logits([], hooks), rule:
        run(model, batch.tokens, hooks, attention_mask=batch.attention_mask)
        return seen[target].flatten(2), [seen[name] for name in sources]

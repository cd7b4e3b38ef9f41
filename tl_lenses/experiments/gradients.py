"""Does a block go down the gradient of the loss? Cosine between what each block adds and the loss' gradient at its input."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.data import as_batches
from tl_lenses.edits import Edit
from tl_lenses.evaluation import used_positions
from tl_lenses.experiments.picture import Lines, Picture
from tl_lenses.experiments.report import Report, Table, named
from tl_lenses.hooks import Hook, patch, read, run
from tl_lenses.model import LensModel, check_model, n_layers, prepare
from tl_lenses.progress import progress
from tl_lenses.sites import resolve_layer, site
from tl_lenses.trajectory import next_tokens

LOW, HIGH = 0.05, 0.95


@dataclass(frozen=True)
class Gradients(Report):
    """Cosines between block outputs and gradients, a row per sequence.

    Attributes:
        layers: `l` of the block's input h_l, `0..n_layers - 1`.
        cosine: `[sequence, layer]`, over all positions and dimensions of a sequence at once.
        shuffled: the same with the block output of another sequence of the batch; NaN in a batch of one.
        random: `[sequence, layer, draw]`, with directions at random.
        negative_positions: share of positions `[sequence, layer]` whose own cosine is negative.
    """

    layers: list[int]
    cosine: Float[Tensor, "sequence layer"]
    shuffled: Float[Tensor, "sequence layer"]
    random: Float[Tensor, "sequence layer draw"]
    negative_positions: Float[Tensor, "sequence layer"]

    name = "gradients"

    def negative(self) -> Float[Tensor, " layer"]:
        """Share of sequences whose cosine is negative."""
        return (self.cosine < 0).double().mean(0)

    def below_random(self) -> Float[Tensor, " layer"]:
        """Share of sequences whose cosine is below the lowest 5 % of random directions."""
        return (self.cosine < self.bounds()[0]).double().mean(0)

    def bounds(self) -> tuple[Float[Tensor, " layer"], Float[Tensor, " layer"]]:
        """The 5th and the 95th percentile of the cosine with random directions."""
        flat = self.random.transpose(0, 1).flatten(1).double()
        return flat.quantile(LOW, 1), flat.quantile(HIGH, 1)

    def tables(self) -> list[Table]:
        """A row per layer."""
        low, high = self.cosine.double().quantile(LOW, 0), self.cosine.double().quantile(HIGH, 0)
        random_low, random_high = self.bounds()
        percent = lambda x: [f"{100 * v:.1f} %" for v in x.tolist()]
        numbers = zip(
            self.cosine.mean(0).tolist(), low.tolist(), high.tolist(), percent(self.negative()),
            percent(self.negative_positions.nanmean(0)), random_low.tolist(), random_high.tolist(),
            percent(self.below_random()), self.shuffled.nanmean(0).tolist(), strict=True,
        )  # fmt: skip
        return [
            Table(
                f"block outputs and the loss' gradient, {self.model}: {len(self.cosine)} sequences",
                ["l", "cosine", "5th", "95th", "< 0", "pos. < 0", "rand. 5th", "95th", "< rand.", "other"],
                [[str(layer), *row] for layer, row in zip(self.layers, numbers, strict=True)],
                "cosine of F_l and dL/dh_l over sequences, with percentiles; < 0: share of sequences (of single positions) where the block "
                "goes down the loss; rand.: directions at random; < rand.: sequences under their 5th percentile; other: F_l of another sequence",
                percent=False,
            )
        ]  # fmt: skip

    def pictures(self) -> dict[str, Picture]:
        """Mean and percentiles per layer, with those of random directions."""
        at = lambda x: list(zip(self.layers, x.tolist(), strict=True))
        series = {
            "mean": at(self.cosine.mean(0)), "5th percentile": at(self.cosine.double().quantile(LOW, 0)),
            "95th percentile": at(self.cosine.double().quantile(HIGH, 0)), "random, 5th": at(self.bounds()[0]),
            "random, 95th": at(self.bounds()[1]),
        }  # fmt: skip
        return {"cosine": Lines(f"block output and gradient, {self.model}", series, "layer l of the input", "cosine")}

    def rows(self) -> list[dict[str, Any]]:
        """A row per sequence and layer."""
        return [
            {
                "sequence": i, "layer": layer, "cosine": float(self.cosine[i, c]), "shuffled": float(self.shuffled[i, c]),
                "negative_positions": float(self.negative_positions[i, c]),
            }
            for i in range(len(self.cosine))
            for c, layer in enumerate(self.layers)
        ]  # fmt: skip


def gradients(
    model: LensModel,
    tokens: Any,
    *,
    layers: Iterable[int] | None = None,
    skip_first: bool = True,
    hooks: Iterable[Hook] = (),
    draws: int = 16,
    seed: int = 0,
    show_progress: bool | None = None,
) -> Gradients:
    """Cosine of what block l adds, `F_l = h_(l+1) - h_l`, and the loss' gradient `dL/dh_l`, per sequence.

    `L(h_l + F_l) ~ L(h_l) + <F_l, dL/dh_l>`: negative where the block goes down the loss. Compared with directions at
    random and with another sequence's F_l.

    Args:
        model: its parameters get no gradients.
        tokens: text, as `evaluate` takes it; a row is a sequence, L its summed cross entropy.
        layers: inputs of blocks, `0..n_layers - 1`; all by default.
        skip_first: leave out real position 0 of each row, whose residual has an outsized norm.
        hooks: your interventions; they run before our reads.
        draws: random directions per sequence and layer.
        seed: of these.

    Raises:
        ValueError: `n_layers` among the layers (no block follows it), one twice or out of range; no draw; text without
            a next token.

    Source: Belrose et al. 2023 (Tuned Lens), appendix C and Figure 19.

    Example:
        >>> found = gradients(model, heldout)      # doctest: +SKIP
        >>> found.negative(), found.bounds()      # doctest: +SKIP
    """
    check_model(model, what="gradients")
    depth = n_layers(model)
    wanted = list(range(depth)) if layers is None else sorted(resolve_layer(layer, depth) for layer in layers)
    if not wanted or depth in wanted or len(set(wanted)) != len(wanted):
        raise ValueError(f"expected different layers of 0..{depth - 1}, those that a block follows, got {wanted}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    generator, hooks = torch.Generator().manual_seed(seed), list(hooks)
    names = ("cosine", "shuffled", "random", "negative_positions")
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in progress(as_batches(tokens), desc="gradients", show=show_progress):
        batch = prepare(model, batch.tokens, batch.attention_mask)
        goal = next_tokens(batch.tokens, used_positions(batch, False))
        used = used_positions(batch, skip_first) & (goal >= 0)
        rows = used.any(1).nonzero()[:, 0]
        if not len(rows):
            continue
        residual, slope = _gradients(model, batch, goal, wanted, hooks)
        kept = used[rows]
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for layer in wanted:
            output, gradient = (residual[layer + 1] - residual[layer])[rows], slope[layer][rows]
            draw = [
                _cosine(torch.randn(output.shape, generator=generator).to(output), gradient, kept) for _ in range(draws)
            ]
            other = _cosine(output.roll(1, 0), gradient, kept) if len(rows) > 1 else torch.full((1,), torch.nan)
            place = torch.cosine_similarity(output, gradient, dim=-1)
            share = ((place < 0) & kept).sum(1) / kept.sum(1)
            values = (_cosine(output, gradient, kept), other.to(output), torch.stack(draw, -1), share)
            for name, value in zip(names, values, strict=True):
                parts[name].append(value.cpu())
        for name in names:
            found[name].append(torch.stack(parts[name], 1))
    if not found["cosine"]:
        raise ValueError("no position has a next token to predict: pass rows of three tokens or more")
    settings = {"sequences": sum(map(len, found["cosine"])), "draws": draws, "seed": seed, "skip_first": skip_first}
    return Gradients(named(model), wanted, *(torch.cat(found[name]) for name in names), settings=settings)


def _gradients(
    model: LensModel, batch: Any, goal: Tensor, layers: list[int], hooks: list[Hook]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Residuals of the layers and of those behind their blocks, and the gradients of the summed loss at the layers."""
    seen: dict[Any, Tensor] = {}
    reads = [
        read(site(model, layer), seen, key=layer, detach=False) for layer in sorted({*layers, *(a + 1 for a in layers)})
    ]
    with torch.enable_grad():
        # The graph starts at layer 0, whether or not the model's parameters want gradients; those get none.
        leaf: Edit = lambda x: x.detach().requires_grad_()
        logits = run(model, batch.tokens, [patch(0, leaf), *hooks, *reads], attention_mask=batch.attention_mask)
        loss = -S.target_logprob(S.log_probs(logits), goal)[goal >= 0].sum()
        slopes = torch.autograd.grad(loss, [seen[layer] for layer in layers])
    return {layer: x.detach() for layer, x in seen.items()}, dict(zip(layers, slopes, strict=True))


def _cosine(
    a: Float[Tensor, "row pos d"], b: Float[Tensor, "row pos d"], kept: Bool[Tensor, "row pos"]
) -> Float[Tensor, " row"]:
    """Cosine over the kept positions and all dimensions of a row at once."""
    a, b = a * kept[..., None], b * kept[..., None]
    return torch.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)

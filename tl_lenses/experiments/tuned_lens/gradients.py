"""Does a block go down the gradient of the loss? Cosine between what each block adds and the loss' gradient at its input."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.checks import seed_of, whole_number
from tl_lenses.edits import Edit
from tl_lenses.experiments.grid import Grid, Table
from tl_lenses.experiments.report import Report
from tl_lenses.experiments.subject import Layers, Subject, text_settings
from tl_lenses.hooks import Hook, checked_hooks, patch, read, run
from tl_lenses.model import LensModel
from tl_lenses.sites import site
from tl_lenses.tokens import Batch, next_tokens, used_positions
from tl_lenses.views import Picture

LOW, HIGH = 0.05, 0.95


@dataclass(frozen=True, repr=False)
class Gradients(Report):
    """Cosines between block outputs and gradients, a row per sequence.

    The grid has the axes sequence, layer (`l` of the block's input h_l, `0..n_layers - 1`) and draw, and the values

    - `cosine` `[sequence, layer]`, over all positions and dimensions of a sequence at once;
    - `shuffled`, the same with the block output of another sequence of the batch; NaN in a batch of one;
    - `negative_positions`, the share of positions whose own cosine is negative;
    - `random` `[sequence, layer, draw]`, the cosine with directions at random.
    """

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

    def summary(self) -> Grid:
        """Per layer means, percentiles and shares over the sequences."""
        low, high = self.cosine.double().quantile(LOW, 0), self.cosine.double().quantile(HIGH, 0)
        random_low, random_high = self.bounds()
        values = {
            "mean": self.cosine.mean(0), "low": low, "high": high, "negative": self.negative(),
            "negative_positions": self.negative_positions.nanmean(0), "random_low": random_low, "random_high": random_high,
            "random_mean": self.random.double().mean((0, 2)),
            "below_random": self.below_random(), "shuffled": self.shuffled.nanmean(0),
        }  # fmt: skip
        return Grid.over({"layer": self.layers}, values)

    def tables(self) -> list[Table]:
        """A row per layer."""
        headings = {
            "mean": "cosine", "low": "5th", "high": "95th", "negative": "< 0", "negative_positions": "pos. < 0",
            "random_low": "rand. 5th", "random_high": "95th", "below_random": "< rand.", "shuffled": "other",
        }  # fmt: skip
        return [
            self.summary().table(
                f"block outputs and the loss' gradient, {self.model}: {len(self.cosine)} sequences", headings, columns=["l"],
                note="cosine of F_l and dL/dh_l over sequences, with percentiles; < 0: share of sequences (of single positions) where the block "
                "goes down the loss; rand.: directions at random; < rand.: sequences under their 5th percentile; other: F_l of another sequence",
                percent=["negative", "negative_positions", "below_random"],
            )
        ]  # fmt: skip

    def pictures(self) -> dict[str, Picture]:
        """Mean and percentiles per layer, beside those of random directions."""
        named = {"mean": "sequences", "random_mean": "random directions"}
        title, up = f"block output and gradient, {self.model}", "cosine: mean, and 5th to 95th percentile"
        ends = {"mean": ("low", "high"), "random_mean": ("random_low", "random_high")}
        return {"cosine": self.summary().lines(title, named, ends=ends, across="layer l of the input", up=up)}

    def rows(self) -> list[dict[str, Any]]:
        """A row per sequence and layer."""
        return self.grid.rows("cosine", "shuffled", "negative_positions")


def gradients(
    model: LensModel, tokens: Any, *, layers: Layers = None, skip_first: bool = True,
    hooks: Iterable[Hook] = (), draws: int = 16, seed: int = 0, show_progress: bool | None = None,
) -> Gradients:  # fmt: skip
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
        ValueError: `n_layers` among the layers (no block follows it), one twice or out of range; no draw; text without a
            next token.

    Source: Belrose et al. 2023 (Tuned Lens), appendix C and Figure 19.

    Example:
        >>> result = gradients(model, heldout)      # doctest: +SKIP
        >>> result.negative(), result.bounds()      # doctest: +SKIP
    """
    subject = Subject.of(model, layers=layers, what="gradients", final="never")
    draws, hooks, seed = whole_number("draws", draws, least=1), checked_hooks(model, hooks), seed_of(seed)
    generator = torch.Generator().manual_seed(seed)
    names = ("cosine", "shuffled", "negative_positions", "random")
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch, used in subject.batches(tokens, skip_first=skip_first, desc="gradients", show_progress=show_progress):
        following = next_tokens(batch.tokens, used_positions(batch, False))
        used = used & (following >= 0)
        rows = used.any(1).nonzero()[:, 0]
        if not len(rows):
            continue
        residual, slope = _gradients(model, batch, following, subject.layers, hooks)
        each = [
            _compared((residual[layer + 1] - residual[layer])[rows], slope[layer][rows], used[rows], draws, generator)
            for layer in subject.layers
        ]
        for name, columns in zip(names, zip(*each, strict=True), strict=True):
            parts[name].append(torch.stack(columns, 1))
    if not parts["cosine"]:
        raise ValueError("no position has a next token to predict: pass rows of three tokens or more")
    values = {name: torch.cat(batches) for name, batches in parts.items()}
    n = len(values["cosine"])
    grid = Grid.over({"sequence": range(n), "layer": subject.layers, "draw": range(draws)}, values)
    settings = {**text_settings(tokens), "sequences": n, "draws": draws, "seed": seed, "skip_first": skip_first}
    return Gradients(subject.name, grid=grid, settings=settings)


def _compared(
    output: Float[Tensor, "row pos d"],
    gradient: Float[Tensor, "row pos d"],
    kept: Bool[Tensor, "row pos"],
    draws: int,
    generator: torch.Generator,
) -> tuple[Tensor, ...]:
    """Of one layer and batch: the cosine, that of another row, the share of negative positions, and random directions."""
    drawn = [_cosine(torch.randn(output.shape, generator=generator).to(output), gradient, kept) for _ in range(draws)]
    other = _cosine(output.roll(1, 0), gradient, kept) if len(output) > 1 else torch.full((1,), torch.nan)
    place = torch.cosine_similarity(output, gradient, dim=-1)
    share = ((place < 0) & kept).sum(1) / kept.sum(1)
    values = (_cosine(output, gradient, kept), other.to(output), share, torch.stack(drawn, -1))
    return tuple(x.cpu() for x in values)


def _gradients(
    model: LensModel, batch: Batch, following: Tensor, layers: list[int], hooks: list[Hook]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Residuals before and after the layers' blocks, and the gradients of the summed loss at the layers."""
    seen: dict[Any, Tensor] = {}
    reads = [read(site(model, layer), seen, key=layer, detach=False) for layer in sorted({*layers, *(a + 1 for a in layers)})]
    with torch.enable_grad():
        # The graph starts at layer 0, whether or not the model's parameters want gradients; those get none.
        leaf: Edit = lambda x: x.detach().requires_grad_()
        logits = run(model, batch.tokens, [patch(0, leaf), *hooks, *reads], attention_mask=batch.attention_mask)
        loss = -S.target_logprob(S.log_probs(logits), following)[following >= 0].sum()
        slopes = torch.autograd.grad(loss, [seen[layer] for layer in layers])
    return {layer: x.detach() for layer, x in seen.items()}, dict(zip(layers, slopes, strict=True))


def _cosine(a: Float[Tensor, "row pos d"], b: Float[Tensor, "row pos d"], kept: Bool[Tensor, "row pos"]) -> Float[Tensor, " row"]:
    """Cosine over the kept positions and all dimensions of a row at once."""
    a, b = a * kept[..., None], b * kept[..., None]
    return torch.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)

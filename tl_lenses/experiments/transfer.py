"""Does the lens of one layer read another layer? The transfer penalty, beside how alike the layers' covariances are."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_lenses import stats as S
from tl_lenses.experiments.picture import Heat, Lines, Picture
from tl_lenses.experiments.ranks import spearman
from tl_lenses.experiments.report import Report, Table, named
from tl_lenses.experiments.streams import check_lenses, common_layers, residuals
from tl_lenses.hooks import Hook
from tl_lenses.lens import Lens
from tl_lenses.model import LensModel, n_layers
from tl_lenses.moments import Moments, moments

TIMES = 5.0  # an outlier dimension spreads so many times as far as the median one


@dataclass(frozen=True)
class Transfer(Report):
    """Cross entropy of every translator on every layer, and the layers' covariances.

    Attributes:
        layers: both axes.
        cross_entropy: `[l, l']`, translator l on residuals of layer l', nats per token.
        similarity: `[l, l']`, cosine of the two covariance matrices.
        spread: `[layer, d_model]`, standard deviation of every dimension.
    """

    layers: list[int]
    cross_entropy: Float[Tensor, "layer layer"]
    similarity: Float[Tensor, "layer layer"]
    spread: Float[Tensor, "layer d_model"] = field(repr=False)

    name = "transfer"

    @property
    def penalty(self) -> Float[Tensor, "layer layer"]:
        """`P[l, l'] = E CE(Lens_l(h_l')) - E CE(Lens_l'(h_l'))`, nats: a row per translator, a column per layer that it reads."""
        return _penalty(self.cross_entropy)

    def correlation(self) -> float:
        """Spearman's correlation of penalty and covariance similarity over pairs of different layers.

        The diagonal (penalty 0, similarity 1, by construction) is left out. NaN where one of them is constant.
        """
        off = ~torch.eye(len(self.layers), dtype=torch.bool)
        return float(spearman(self.penalty[off], self.similarity[off]))

    def chance(self, draws: int = 2000, seed: int = 0) -> float:
        """How often random names of the layers give a correlation at least as strong: Mantel's test.

        Pairs share layers, so they are no independent samples, and the usual p-value of a correlation does not hold.

        Source: Mantel 1967.
        """
        n, generator = len(self.layers), torch.Generator().manual_seed(seed)
        off = ~torch.eye(n, dtype=torch.bool)
        orders = [torch.randperm(n, generator=generator) for _ in range(draws)]
        drawn = torch.stack([self.similarity[order][:, order][off] for order in orders])
        found = spearman(self.penalty[off].expand(draws, -1), drawn)
        return float(((found.abs() >= abs(self.correlation()) - 1e-12).sum() + 1) / (draws + 1))

    def outliers(self, times: float = TIMES) -> dict[int, list[int]]:
        """Dimensions by layer whose standard deviation is over `times` the median one, widest first."""
        found = {}
        for layer, spread in zip(self.layers, self.spread, strict=True):
            order = spread.argsort(descending=True)
            found[layer] = order[spread[order] > times * spread.median()].tolist()
        return found

    def asymmetry(self, times: float = TIMES) -> tuple[float, float]:
        """Mean penalty of translators of layers with outlier dimensions on layers without, and the other way round.

        NaN where all the layers are of one kind.
        """
        rogue = torch.tensor([bool(dims) for dims in self.outliers(times).values()])
        part = lambda a, b: float(self.penalty[a][:, b].mean())
        return part(rogue, ~rogue), part(~rogue, rogue)

    def tables(self) -> list[Table]:
        """The penalty matrix; correlation with covariance similarity; outlier dimensions."""
        names = list(map(str, self.layers))
        rows = [[name, *row] for name, row in zip(names, self.penalty.tolist(), strict=True)]
        title = f"transfer penalty, {self.model}"
        note = "row: translator of layer l; column: the layer that it reads; nats per token over that layer's own translator"
        forth, back = self.asymmetry()
        summary = [
            ["Spearman's correlation of penalty and covariance similarity", self.correlation()],
            ["as strong with the layers' names shuffled (Mantel)", f"{self.chance():.4f}"],
            ["penalty between neighbours, mean", self._at_distance(1)],
            ["penalty at half the depth or further, mean", self._at_distance(len(self.layers) // 2, further=True)],
            ["translators of layers with outlier dimensions, on layers without", forth],
            ["translators of layers without, on layers with", back],
        ]
        dims = []
        for layer, found in self.outliers().items():
            spread = self.spread[self.layers.index(layer)]
            times = spread / spread.median()
            text = ", ".join(f"{i} ({times[i]:.1f})" for i in found[:6]) + (
                f" and {len(found) - 6} more" if found[6:] else ""
            )
            dims.append(
                [str(layer), str(len(found)), text or f"none; the widest is {int(times.argmax())} ({times.max():.1f})"]
            )
        return [
            Table(title, ["l \\ l'", *names], rows, note, percent=False),
            Table("what goes with it", ["", ""], summary, percent=False),
            Table(
                "outlier dimensions", ["layer", "how many", "dimension (times the median)"], dims,
                f"standard deviation over {TIMES:g} times the layer's median one", percent=False,
            ),
        ]  # fmt: skip

    def _at_distance(self, distance: int, further: bool = False) -> float:
        index = torch.arange(len(self.layers))
        gap = (index[:, None] - index[None]).abs()
        return float(self.penalty[gap >= distance if further else gap == distance].mean())

    def pictures(self) -> dict[str, Picture]:
        """Penalty and similarity as matrices, and one against the other."""
        names, off = list(map(str, self.layers)), ~torch.eye(len(self.layers), dtype=torch.bool)
        # The few pairs that are far worse than the rest would leave one colour to all others.
        high = max(float(self.penalty[off].quantile(0.9)), 1e-6)
        points = list(zip(self.similarity[off].tolist(), self.penalty[off].tolist(), strict=True))
        return {
            "penalty": Heat(
                f"transfer penalty, {self.model}, nats", names, names, self.penalty.tolist(), "translator l", "reads l'",
                high=high,
            ),
            "similarity": Heat(
                f"covariance similarity, {self.model}", names, names, self.similarity.tolist(), "l", "l'"
            ),
            "scatter": Lines(
                f"penalty and similarity, {self.model}", {"pairs": points}, "covariance similarity", "penalty, nats",
                points=True,
            ),
        }  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """A row per pair of layers."""
        return [
            {
                "translator": a, "layer": b, "cross_entropy": float(self.cross_entropy[i, j]),
                "penalty": float(self.penalty[i, j]), "similarity": float(self.similarity[i, j]),
            }
            for i, a in enumerate(self.layers)
            for j, b in enumerate(self.layers)
        ]  # fmt: skip


@torch.no_grad()
def transfer(
    model: LensModel,
    lens: Lens,
    tokens: Any,
    *,
    layers: Iterable[int] | None = None,
    skip_first: bool = True,
    hooks: Iterable[Hook] = (),
    chunk_size: int | None = None,
    show_progress: bool | None = None,
) -> Transfer:
    """Every translator on every layer, from one pass over the text.

    `P(l -> l') = E CE(Lens_l(h_l')) - E CE(Lens_l'(h_l'))`, compared with `<S_l, S_l'>_F / (|S_l| |S_l'|)`, S_l the
    covariance of the residual at layer l.

    Args:
        model: the model that the lens is of.
        lens: a fitted lens; the logit lens has one translator only.
        tokens: held-out text, as `evaluate` takes it.
        layers: the fitted ones by default. `n_layers` may be among them: its translator is the identity.
        skip_first: leave out real position 0 of each row, whose outsized norm would be most of a covariance.
        hooks: your interventions.
        chunk_size: positions decoded at a time.

    Raises:
        ValueError: a lens of another model object, or the logit lens; fewer than two layers, or one without a
            translator; text without a next token.

    Source: Belrose et al. 2023 (Tuned Lens), section 3.3 and Figures 6 and 7.

    Example:
        >>> found = transfer(model, lens, heldout)      # doctest: +SKIP
        >>> found.penalty, found.correlation(), found.outliers()      # doctest: +SKIP
    """
    check_lenses(model, lens, "transfer")
    if lens.translators is None:
        raise ValueError(
            "the logit lens has the same translator at every layer, so nothing is transferred: pass a fitted lens"
        )
    depth = n_layers(model)
    wanted = common_layers({"lens": lens}, layers, depth)
    if layers is None:
        wanted = [layer for layer in wanted if layer != depth]
    if len(wanted) < 2:
        raise ValueError(f"transfer needs two layers at least, got {wanted}")
    decode = {layer: lens[layer] for layer in wanted}
    total, n = torch.zeros(len(wanted), len(wanted), dtype=torch.float64), 0
    evidence: Moments | None = None
    read = residuals(
        model, tokens, wanted, hooks=hooks, skip_first=skip_first, desc="transfer", show_progress=show_progress
    )
    for found, goal in read:
        x = torch.stack([found[layer] for layer in wanted])
        # Covariances alone: there is no y, so it has no columns.
        part = moments(x, x[..., :0])
        evidence = part if evidence is None else evidence + part
        for rows in S.chunks(len(goal), int(model.cfg.d_vocab), chunk_size):
            for i, layer in enumerate(wanted):
                for j in range(len(wanted)):
                    logits = decode[layer](x[j, rows])
                    total[i, j] += float(nn.functional.cross_entropy(logits.float(), goal[rows], reduction="sum"))
        n += len(goal)
    assert evidence is not None
    covariance = (evidence.xx / evidence.n).cpu()
    settings = {"tokens": n, "lens": lens.translators.meta.get("fitter"), "skip_first": skip_first}
    return Transfer(
        named(model), wanted, total / n, _similarity(covariance), covariance.diagonal(dim1=1, dim2=2).sqrt(),
        settings=settings,
    )  # fmt: skip


def _penalty(cross_entropy: Float[Tensor, "layer layer"]) -> Float[Tensor, "layer layer"]:
    return cross_entropy - cross_entropy.diagonal()


def _similarity(covariance: Float[Tensor, "layer d d"]) -> Float[Tensor, "layer layer"]:
    """`<S_l, S_l'>_F / (|S_l| |S_l'|)`."""
    flat = nn.functional.normalize(covariance.flatten(1), dim=1)
    return flat @ flat.T

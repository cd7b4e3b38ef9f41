"""Does the lens of one layer read another layer? The transfer penalty, beside how alike the layers' covariances are."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_lenses import stats as S
from tl_lenses.checks import whole_number
from tl_lenses.experiments.grid import Grid, Table
from tl_lenses.experiments.report import Report
from tl_lenses.experiments.subject import Layers, Subject, text_settings
from tl_lenses.hooks import Hook
from tl_lenses.lens import Lens, one_lens
from tl_lenses.model import LensModel
from tl_lenses.moments import Moments, moments
from tl_lenses.numerics import spearman
from tl_lenses.views import Lines, Picture

TIMES = 5.0  # an outlier dimension spreads so many times as far as the median one


@dataclass(frozen=True, repr=False)
class Transfer(Report):
    """Cross entropy of every translator on every layer, and the layers' covariances.

    The grid has the axes translator and layer (the same layers), and dimension, and the values

    - `cross_entropy` `[translator, layer]`: translator l on residuals of layer l', nats per token;
    - `penalty`: `P[l, l'] = E CE(Lens_l(h_l')) - E CE(Lens_l'(h_l'))`, nats;
    - `similarity`: cosine of the two covariance matrices;
    - `spread` `[layer, dimension]`: standard deviation of every dimension of the residual.
    """

    name = "transfer"

    @staticmethod
    def of(
        model: str,
        layers: list[int],
        cross_entropy: Float[Tensor, "layer layer"],
        similarity: Float[Tensor, "layer layer"],
        spread: Float[Tensor, "layer d_model"],
        settings: dict[str, Any],
    ) -> "Transfer":
        """The report of these numbers, with the penalty."""
        axes = {"translator": layers, "layer": layers, "dimension": range(spread.shape[1])}
        pairs = {"cross_entropy": cross_entropy, "penalty": _penalty(cross_entropy), "similarity": similarity}
        values = {**Grid.over(axes, pairs).values, "spread": (("layer", "dimension"), spread)}
        return Transfer(model, grid=Grid(axes, values), settings=settings)

    def _pairs(self) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
        """Penalty and similarity of all pairs of different layers."""
        off = ~torch.eye(len(self.layers), dtype=torch.bool)
        return self.penalty[off], self.similarity[off]

    def correlation(self) -> float:
        """Spearman's correlation of penalty and covariance similarity over pairs of different layers.

        The diagonal (penalty 0, similarity 1, by construction) is left out. NaN where one of them is constant.
        """
        return float(spearman(*self._pairs()))

    def chance(self, draws: int = 2000, seed: int = 0) -> float:
        """How often random names of the layers give a correlation at least as strong: Mantel's test.

        Pairs share layers, so they are no independent samples, and the usual p-value of a correlation does not hold.

        Source: Mantel 1967.
        """
        n, generator = len(self.layers), torch.Generator().manual_seed(seed)
        off = ~torch.eye(n, dtype=torch.bool)
        orders = [torch.randperm(n, generator=generator) for _ in range(draws)]
        shuffled = torch.stack([self.similarity[order][:, order][off] for order in orders])
        by_chance = spearman(self.penalty[off].expand(draws, -1), shuffled)
        return float(((by_chance.abs() >= abs(self.correlation()) - 1e-12).sum() + 1) / (draws + 1))

    def outliers(self, times: float = TIMES) -> dict[int, list[int]]:
        """Dimensions by layer whose standard deviation is over `times` the median one, widest first."""
        by_layer = {}
        for layer, spread in zip(self.layers, self.spread, strict=True):
            order = spread.argsort(descending=True)
            by_layer[layer] = order[spread[order] > times * spread.median()].tolist()
        return by_layer

    def asymmetry(self, times: float = TIMES) -> tuple[float, float]:
        """Mean penalty of translators of layers with outlier dimensions on layers without, and the other way round.

        NaN where all the layers are of one kind.
        """
        rogue = torch.tensor([bool(dims) for dims in self.outliers(times).values()])
        part = lambda a, b: float(self.penalty[a][:, b].mean())
        return part(rogue, ~rogue), part(~rogue, rogue)

    def tables(self) -> list[Table]:
        """The penalty matrix; correlation with covariance similarity; outlier dimensions."""
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
        for (layer, wide), spread in zip(self.outliers().items(), self.spread, strict=True):
            times = spread / spread.median()
            more = f" and {len(wide) - 6} more" if wide[6:] else ""
            text = ", ".join(f"{i} ({times[i]:.1f})" for i in wide[:6]) + more
            dims.append([str(layer), str(len(wide)), text or f"none; the widest is {int(times.argmax())} ({times.max():.1f})"])
        return [
            self.grid.table(
                f"transfer penalty, {self.model}", "penalty", down="translator", across="layer", columns=["l \\ l'"], note=note
            ),
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
        penalty, similarity = self._pairs()
        # The few pairs that are far worse than the rest would leave one colour to all others.
        high = max(float(penalty.quantile(0.9)), 1e-6)
        points = list(zip(similarity.tolist(), penalty.tolist(), strict=True))
        heat = lambda title, value, *labels, **how: self.grid.heat(
            title, value, down="translator", across="layer", labels=labels, **how
        )
        return {
            "penalty": heat(
                f"transfer penalty, {self.model}, nats", "penalty", "translator l", "reads l'", high=high, good="low"
            ),
            "similarity": heat(f"covariance similarity, {self.model}", "similarity", "l", "l'"),
            "scatter": Lines(
                f"penalty and similarity, {self.model}", {"pairs": points}, "covariance similarity", "penalty, nats",
                points=True,
            ),
        }  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """A row per pair of layers."""
        return self.grid.rows("cross_entropy", "penalty", "similarity")


@torch.no_grad()
def transfer(
    model: LensModel, lens: Lens, tokens: Any, *, layers: Layers = None, skip_first: bool = True,
    hooks: Iterable[Hook] = (), chunk_size: int | None = None, show_progress: bool | None = None,
) -> Transfer:  # fmt: skip
    """Every translator on every layer, from one pass over the text.

    `P(l -> l') = E CE(Lens_l(h_l')) - E CE(Lens_l'(h_l'))`, compared with `<S_l, S_l'>_F / (|S_l| |S_l'|)`, S_l the
    covariance of the residual at layer l.

    Args:
        lens: a fitted lens; the logit lens has one translator only.
        tokens: held-out text, as `evaluate` takes it.
        layers: the fitted ones by default. `n_layers` may be among them: its translator is the identity.
        skip_first: leave out real position 0 of each row, whose outsized norm would be most of a covariance.
        chunk_size: positions decoded at a time.

    Raises:
        ValueError: a lens of another model object, or the logit lens; fewer than two layers, or one without a
            translator; text without a next token.

    Source: Belrose et al. 2023 (Tuned Lens), section 3.3 and Figures 6 and 7.

    Example:
        >>> result = transfer(model, lens, heldout)      # doctest: +SKIP
        >>> result.penalty, result.correlation(), result.outliers()      # doctest: +SKIP
    """
    one_lens(model, lens, "transfer")
    chunk_size = None if chunk_size is None else whole_number("chunk_size", chunk_size, least=1)
    if lens.translators is None:
        raise ValueError("the logit lens has the same translator at every layer, so nothing is transferred: pass a fitted lens")
    subject = Subject.of(model, lens, layers, what="transfer", final="asked")
    fitted = subject.layers
    if len(fitted) < 2:
        raise ValueError(f"transfer needs two layers at least, got {fitted}")
    decode = {layer: lens[layer] for layer in fitted}
    total, n = torch.zeros(len(fitted), len(fitted), dtype=torch.float64), 0
    evidence: Moments | None = None
    read = subject.predictions(tokens, hooks=hooks, skip_first=skip_first, desc="transfer", show_progress=show_progress)
    for states, following in read:
        x = torch.stack([states[layer] for layer in fitted])
        # Covariances alone: there is no y, so it has no columns.
        part = moments(x, x[..., :0])
        evidence = part if evidence is None else evidence + part
        for rows in S.chunks(len(following), int(model.cfg.d_vocab), chunk_size):
            for i, layer in enumerate(fitted):
                for j in range(len(fitted)):
                    logits = decode[layer](x[j, rows])
                    total[i, j] += float(nn.functional.cross_entropy(logits.float(), following[rows], reduction="sum"))
        n += len(following)
    assert evidence is not None
    covariance = (evidence.xx / evidence.n).cpu()
    fitter = lens.translators.meta.get("fitter")
    settings = {**text_settings(tokens), "tokens": n, "lens": fitter, "skip_first": skip_first}
    spread = covariance.diagonal(dim1=1, dim2=2).sqrt()
    return Transfer.of(subject.name, fitted, total / n, _similarity(covariance), spread, settings)


def _penalty(cross_entropy: Float[Tensor, "layer layer"]) -> Float[Tensor, "layer layer"]:
    return cross_entropy - cross_entropy.diagonal()


def _similarity(covariance: Float[Tensor, "layer d d"]) -> Float[Tensor, "layer layer"]:
    """`<S_l, S_l'>_F / (|S_l| |S_l'|)`."""
    flat = nn.functional.normalize(covariance.flatten(1), dim=1)
    return flat @ flat.T

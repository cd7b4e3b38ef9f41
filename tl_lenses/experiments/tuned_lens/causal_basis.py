"""Which directions of a layer matter to a lens, and do they matter to the model as much? Causal basis extraction."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses import edits
from tl_lenses import stats as S
from tl_lenses.checks import one_of
from tl_lenses.experiments.basis import SOLVERS, Basis, bases_of, check_k
from tl_lenses.experiments.grid import Grid, Table
from tl_lenses.experiments.report import Report
from tl_lenses.experiments.subject import Layers, Subject, Texts, logits_of, text_settings
from tl_lenses.hooks import patch
from tl_lenses.lens import Lens, one_lens
from tl_lenses.model import LensModel, d_model
from tl_lenses.numerics import percentiles, spearman, spearman_draws
from tl_lenses.progress import progress
from tl_lenses.sites import site
from tl_lenses.views import Lines, Picture

BITS = 1 / math.log(2)  # nats to bits


@dataclass(frozen=True, repr=False)
class CausalBasis(Report):
    """Directions of every layer with their effect on the lens and on the model.

    The grid has the axes layer and direction (the largest energy first), and the values

    - `energy`: KL between the lens and the lens with the direction ablated, nats;
    - `effect`: KL between the model and the model with the direction ablated in that layer, nats.

    Both are means over the states, of which `settings["n"]` is the number.

    Attributes:
        bases: per layer, `vectors [k, d_model]` and `energies [k]` (nats).
    """

    bases: dict[int, Basis]

    name = "causal-basis"

    def spearman(self, layer: int) -> float:
        """Rank correlation of the effects on the lens and on the model; NaN where there are fewer than three directions."""
        at = self.grid.at(layer=layer)
        return float(spearman(at["energy"], at["effect"])) if len(self.directions) > 2 else math.nan

    def tables(self) -> list[Table]:
        """A row per layer."""
        lens, model = self.energy * BITS, self.effect * BITS
        columns = {
            "Spearman": torch.tensor([self.spearman(layer) for layer in self.layers], dtype=torch.float64),
            "sum, lens": lens.sum(1), "sum, model": model.sum(1), "largest, lens": lens[:, 0], "largest, model": model[:, 0],
            "smallest, model": model.min(1).values,
        }  # fmt: skip
        summary = Grid.over({"layer": self.layers}, columns)
        n, k = self.settings["n"], len(self.directions)
        title = f"causal basis, {self.model}: {k} directions per layer, {n} positions"
        return [summary.table(title, list(columns), note="KL in bits, each direction mean-ablated alone")]

    def pictures(self) -> dict[str, Picture]:
        """Effect on the model against effect on the lens, a dot per direction; Spearman per layer."""
        bits = self.grid.map(lambda x: (x * BITS).double().clamp_min(1e-9))  # a logarithmic axis has no zero
        dots = {f"layer {layer}": [(row["energy"], row["effect"]) for row in bits.at(layer=layer).rows()] for layer in self.layers}
        title, axes = f"causal directions, {self.model}", ("effect on the lens, bits", "effect on the model, bits")
        pictures: dict[str, Picture] = {"effects": Lines(title, dots, *axes, points=True, log_x=True, log_y=True)}
        if len(self.layers) > 1 and len(self.directions) > 2:
            ranks = {"Spearman": [(layer, self.spearman(layer)) for layer in self.layers]}
            at = {layer: bits.at(layer=layer) for layer in self.layers}
            ends = {layer: percentiles(spearman_draws(x["energy"], x["effect"])) for layer, x in at.items()}
            band = [(layer, float(low), float(high)) for layer, (low, high) in ends.items()]
            up, bands = "rank correlation, 95% over directions", {"Spearman": band}
            pictures["spearman"] = Lines(f"lens against model, {self.model}", ranks, up=up, bands=bands)
        return pictures


def causal_basis(
    model: LensModel, lens: Lens, tokens: Any, *, k: int = 32, layers: Layers = None,
    n: int = 512, solver: str = "fast", skip_first: bool = True, show_progress: bool | None = None,
) -> CausalBasis:  # fmt: skip
    """Directions by their effect on a lens, and the effect of each on the model.

        sigma(v) = E KL( f(h) || f(r(h, v)) ),   r(h, v) = h - v v^T (h - mean h),   v_i = argmax sigma, orthogonal to v_1 .. v_{i-1}
        effect(v) = E KL( M(x) || M(x; h_l <- r(h_l, v)) )

    Args:
        tokens: text, as `evaluate` takes it.
        k: directions per layer; d_model is the whole basis, as the paper has it.
        layers: `0..n_layers-1` by default; ablated is the input of block l.
        n: positions; rows are taken until there are so many.
        solver: "fast", or "lbfgs", the published procedure (slower).
        skip_first: leave out each row's first position, there and in the ablations.

    Returns:
        `CausalBasis`: per layer the directions, both effects, and their rank correlation.

    Raises:
        ValueError: k larger than d_model; a lens of another model or without a layer; too little text; an unknown solver.

    Source: Belrose et al. 2023 (Tuned Lens), section 4.1.

    Example:
        >>> print(causal_basis(model, lens, tokens, k=8))      # doctest: +SKIP
    """
    single = one_lens(model, lens, "causal-basis")
    subject = Subject.of(model, single, layers, what="causal-basis", final="asked", every=True)
    check_k(k, d_model(model))
    one_of("solver", solver, SOLVERS)
    texts = subject.texts(tokens, n=n, skip_first=skip_first)
    states = subject.states(texts)
    bases = bases_of(lens, states, k, solver=solver, show_progress=show_progress)
    with progress(total=k * len(subject.layers), desc="ablating in the model", show=show_progress) as bar:
        effect = [
            _effects(model, texts, layer, basis.vectors, states[layer].float().mean(0), bar) for layer, basis in bases.items()
        ]
    energy = torch.stack([basis.energies for basis in bases.values()])
    axes = {"layer": subject.layers, "direction": range(k)}
    grid = Grid.over(axes, {"energy": energy, "effect": torch.stack(effect)})
    settings = {
        **text_settings(tokens), "k": k, "n": texts.n, "solver": solver, "skip_first": skip_first, "lens": repr(lens),
    }  # fmt: skip
    return CausalBasis(subject.name, bases, grid=grid, settings=settings)


@torch.no_grad()
def _effects(
    model: LensModel, texts: Texts, layer: int, directions: Float[Tensor, "k d"], mean: Float[Tensor, " d"], bar: Any
) -> Float[Tensor, " k"]:
    """KL between the model and the model with one direction mean-ablated in the input of block `layer`, nats."""
    total = torch.zeros(len(directions), dtype=torch.float64)
    for batch, used in texts:
        clean = S.log_probs(logits_of(model, batch)[used])
        p = clean.exp()
        for i, v in enumerate(directions):
            edit = edits.where(used, edits.project(v, toward=mean))
            logq = S.log_probs(logits_of(model, batch, [patch(site(model, layer), edit)])[used])
            total[i] += float(S.kl(clean, logq, p).double().sum())
            bar.update(1 / len(texts.batches))
    return (total / texts.n).float()

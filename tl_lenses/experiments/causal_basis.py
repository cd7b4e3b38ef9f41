"""Which directions of a layer matter to a lens, and do they matter to the model as much? Causal basis extraction."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses import edits
from tl_lenses import stats as S
from tl_lenses.experiments.basis import SOLVERS, Basis, bases_of, check_k
from tl_lenses.experiments.picture import Lines, Picture
from tl_lenses.experiments.ranks import spearman
from tl_lenses.experiments.report import Report, Table, named
from tl_lenses.experiments.states import Texts, check_lens, states_of, texts_of, wanted_layers
from tl_lenses.hooks import patch, run
from tl_lenses.lens import Lens
from tl_lenses.model import LensModel, check_model, d_model
from tl_lenses.progress import progress
from tl_lenses.sites import site

BITS = 1 / math.log(2)  # nats to bits


@dataclass(frozen=True)
class CausalBasis(Report):
    """Directions of every layer with their effect on the lens and on the model.

    Attributes:
        bases: per layer, `vectors [k, d_model]` and `energies [k]` (nats), the largest first.
        effects: per layer, KL between the model and the model with the direction ablated in that layer, `[k]`, nats.
        positions: states that both are means over.
    """

    bases: dict[int, Basis]
    effects: dict[int, Float[Tensor, " k"]]
    positions: int

    name = "causal-basis"

    def spearman(self, layer: int) -> float:
        """Rank correlation of the effects on the lens and on the model; NaN where there are fewer than three directions."""
        effects = self.effects[layer]
        return float(spearman(self.bases[layer].energies, effects)) if len(effects) > 2 else math.nan

    def tables(self) -> list[Table]:
        """A row per layer."""
        k = len(next(iter(self.effects.values())))
        columns = ["layer", "Spearman", "sum, lens", "sum, model", "largest, lens", "largest, model", "smallest, model"]
        rows: list[list[Any]] = []
        for layer, basis in self.bases.items():
            lens, model = basis.energies * BITS, self.effects[layer] * BITS
            numbers = [lens.sum(), model.sum(), lens[0], model[0], model.min()]
            rows.append([str(layer), self.spearman(layer), *map(float, numbers)])
        title = f"causal basis, {self.model}: {k} directions per layer, {self.positions} positions"
        return [Table(title, columns, rows, "KL in bits, each direction mean-ablated alone", percent=False)]

    def pictures(self) -> dict[str, Picture]:
        """Effect on the model against effect on the lens, a dot per direction; Spearman per layer."""
        tiny = 1e-9  # a logarithmic axis has no zero
        dots = {
            f"layer {layer}": [
                (max(x, tiny), max(y, tiny))
                for x, y in zip((b.energies * BITS).tolist(), (self.effects[layer] * BITS).tolist(), strict=True)
            ]
            for layer, b in self.bases.items()
        }
        scatter = Lines(
            f"causal directions, {self.model}", dots, "effect on the lens, bits", "effect on the model, bits",
            points=True, log_x=True, log_y=True,
        )  # fmt: skip
        found: dict[str, Picture] = {"effects": scatter}
        if len(self.bases) > 1 and len(next(iter(self.effects.values()))) > 2:
            ranks = [(float(layer), self.spearman(layer)) for layer in self.bases]
            found["spearman"] = Lines(f"lens against model, {self.model}", {"Spearman": ranks}, up="rank correlation")
        return found

    def rows(self) -> list[dict[str, Any]]:
        """A row per layer and direction, nats."""
        return [
            {"layer": layer, "direction": i, "energy": x, "effect": y}
            for layer, basis in self.bases.items()
            for i, (x, y) in enumerate(zip(basis.energies.tolist(), self.effects[layer].tolist(), strict=True))
        ]


def causal_basis(
    model: LensModel,
    lens: Lens,
    tokens: Any,
    *,
    k: int = 32,
    layers: Iterable[int] | None = None,
    n: int = 512,
    solver: str = "fast",
    skip_first: bool = True,
    show_progress: bool | None = None,
) -> CausalBasis:
    """Directions by their effect on a lens, and the effect of each on the model.

        sigma(v) = E KL( f(h) || f(r(h, v)) ),   r(h, v) = h - v v^T (h - mean h),   v_i = argmax sigma, orthogonal to v_1 .. v_{i-1}
        effect(v) = E KL( M(x) || M(x; h_l <- r(h_l, v)) )

    Args:
        model: whose layers are read and ablated.
        lens: f.
        tokens: text, `token_batches(...)` or what `evaluate` takes.
        k: directions per layer; d_model is the whole basis, as the paper has it.
        layers: `0..n_layers-1` by default. The input of block l is what is ablated.
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
    check_model(model, what="an experiment")
    check_k(k, d_model(model))
    if solver not in SOLVERS:
        raise ValueError(f"solver must be 'fast' or 'lbfgs', got {solver!r}")
    wanted = wanted_layers(model, layers)
    check_lens(model, lens, wanted)
    texts = texts_of(model, tokens, n=n, skip_first=skip_first)
    states = states_of(model, texts, wanted)
    bases = bases_of(lens, states, k, solver=solver, show_progress=show_progress)
    bar = progress(total=k * len(wanted), desc="ablating in the model", show=show_progress)
    found = {}
    for layer, basis in bases.items():
        found[layer] = effects(model, texts, layer, basis.vectors, states[layer].float().mean(0), bar)
    bar.close()
    settings = {"k": k, "n": texts.n, "solver": solver, "skip_first": skip_first, "lens": repr(lens)}
    return CausalBasis(named(model), bases, found, texts.n, settings=settings)


@torch.no_grad()
def effects(
    model: LensModel,
    texts: Texts,
    layer: int,
    directions: Float[Tensor, "k d"],
    mean: Float[Tensor, " d"],
    bar: Any = None,
) -> Float[Tensor, " k"]:
    """KL between the model and the model with one direction mean-ablated in the input of block `layer`, nats."""
    total = torch.zeros(len(directions), dtype=torch.float64)
    for batch, used in texts:
        step = lambda hooks, batch=batch: run(model, batch.tokens, hooks, attention_mask=batch.attention_mask)
        clean = S.log_probs(step([])[used])
        p = clean.exp()
        for i, v in enumerate(directions):
            edit = edits.where(used, edits.project(v, toward=mean))
            logq = S.log_probs(step([patch(site(model, layer), edit)])[used])
            total[i] += float(S.kl(clean, logq, p).double().sum())
            if bar is not None:
                bar.update(1 / len(texts.batches))
    return (total / texts.n).float()

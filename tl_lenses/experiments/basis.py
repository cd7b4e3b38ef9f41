"""Causal basis extraction: directions of a layer in the order of their effect through a lens, by two solvers.

    v_i = argmax sigma(v),   |v| = 1,  v orthogonal to v_1 .. v_{i-1};      sigma as in `energy.py`

sigma has many local maxima, so the result of a solver depends on its start. `"lbfgs"` is the published procedure: L-BFGS from
the i-th left singular vector of the translated unembedding, through the lens' own logits. `"fast"` climbs the same way from the same
starts, with the energy of `energy.py` and without the published procedure's last evaluations, which add next to nothing. Better starts were
tried and do not help (docs/log.md): the best direction of one step takes away from the steps that follow.

Source: Belrose et al. 2023 (Tuned Lens), section 4.1 and its appendix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses import edits
from tl_lenses.checks import one_of, whole_number
from tl_lenses.experiments.energy import Energy, energy_of
from tl_lenses.lens import LayerLens, Lens
from tl_lenses.numerics import climb
from tl_lenses.progress import progress

SOLVERS = ("fast", "lbfgs")
# The published procedure: so many evaluations per direction, and the relative change of the energy that ends it.
MAX_EVALUATIONS, ENOUGH = 100, 1e-4
# The fast one stops where so many evaluations add less than this share of the energy.
PATIENCE, FLAT = 4, 1e-3


@dataclass(frozen=True)
class Basis:
    """Directions of one layer, the one with the largest energy first."""

    vectors: Float[Tensor, "k d"]  # `[k, d_model]`, orthonormal rows
    energies: Float[Tensor, " k"]  # sigma of each on the states it was found on, nats
    evaluations: int  # how often the energy of a direction and its gradient were computed


def extract(decode: LayerLens, states: Float[Tensor, "n d"], k: int, *, solver: str = "fast", bar: Any = None) -> Basis:
    """The first k causal directions of a lens at one layer.

    Example:
        >>> extract(lens[4], states, 8).energies      # doctest: +SKIP
    """
    check_k(k, states.shape[-1])
    one_of("solver", solver, SOLVERS)
    energy = energy_of(decode, states, fast=solver == "fast")
    with torch.enable_grad():
        vectors, evaluations = _climbed(energy, k, bar, fast=solver == "fast")
    with torch.no_grad():
        energies = torch.stack([energy.exact(v) for v in vectors])
    order = energies.argsort(descending=True)
    return Basis(vectors[order], energies[order], evaluations)


def bases_of(
    lens: Lens, states: dict[int, Float[Tensor, "n d"]], k: int, *, solver: str = "fast", show_progress: bool | None = None
) -> dict[int, Basis]:
    """`extract` for every layer, with a progress bar."""
    with progress(total=k * len(states), desc="directions", show=show_progress) as bar:
        return {layer: extract(lens[layer], x, k, solver=solver, bar=bar) for layer, x in states.items()}


def check_k(k: int, width: int) -> None:
    """Refuse a number of directions that there is no room for."""
    if not 1 <= whole_number("k", k) <= width:
        raise ValueError(f"k is {k}: a basis of this model has 1 to {width} directions (d_model)")


def check_subspaces(
    subspaces: Any, layers: Sequence[int], width: int, *, of: str = "name", names: Sequence[str] | None = None
) -> dict[str, dict[int, Float[Tensor, "k d"]]]:
    """Subspaces by name and layer as `[k, d_model]`, a single direction as `[1, d_model]`; of these names, all by default."""
    if not isinstance(subspaces, Mapping) or not all(isinstance(given, Mapping) for given in subspaces.values()):
        raise TypeError(f"subspaces must be a mapping {{{of}: {{layer: directions}}}}, got {type(subspaces).__name__}")
    names = list(subspaces) if names is None else names
    if missing := [name for name in names if name not in subspaces]:
        raise ValueError(f"subspaces are given for {sorted(subspaces)} and not for {of} {missing[0]!r}")
    return {name: _checked(subspaces[name], layers, width, name) for name in names}


def _checked(given: Mapping[int, Tensor], layers: Sequence[int], width: int, name: str) -> dict[int, Float[Tensor, "k d"]]:
    what = f"subspaces of {name!r} are given"
    if extra := [layer for layer in given if layer not in layers]:
        raise ValueError(f"{what} for layer {extra[0]} which layers={list(layers)} leaves out: add it to the list")
    if missing := [layer for layer in layers if layer not in given]:
        raise ValueError(f"{what} for layers {sorted(given)} and not for layer {missing[0]}: leave it out of layers, or give one")
    rows = {layer: x[None] if x.ndim == 1 else x for layer, x in given.items()}
    for layer, x in rows.items():
        if x.ndim != 2 or x.shape[-1] != width:
            raise ValueError(f"the subspace {name!r} of layer {layer} has shape {list(x.shape)}, expected [k, {width}]")
        edits.project(x, orthonormal=True)
    return rows


def _starts(decode: LayerLens, k: int) -> Float[Tensor, "d k"]:
    """Left singular vectors of the translated unembedding `W^T W_U`, filled up where the vocabulary is small."""
    w_u, _ = decode.readout.weights()
    w_u = w_u.float() if decode.affine is None else decode.affine.weight.float().T @ w_u.float()
    starts = torch.linalg.svd(w_u, full_matrices=False).U[:, :k]
    if starts.shape[1] < k:
        rest = torch.randn(len(starts), k - starts.shape[1], generator=torch.Generator().manual_seed(0)).to(starts)
        starts = torch.linalg.qr(torch.cat([starts, rest], 1)).Q
    return starts


def _climbed(energy: Energy, k: int, bar: Any, *, fast: bool) -> tuple[Float[Tensor, "k d"], int]:
    """A climb from every start in turn, in the complement of the directions before it, and the evaluations of all.

    The published procedure lets the optimiser run until its own tolerances (1e-7, 1e-9) or the evaluations end it; the fast one
    is the same climb, left where it has become flat.
    """
    starts, evaluations = _starts(energy.decode, k), 0
    vectors, flat = starts.new_zeros(0, len(starts)), (PATIENCE, FLAT) if fast else None

    def slope(v: Tensor) -> tuple[float, Tensor]:
        """sigma(v) and its gradient."""
        nonlocal evaluations
        evaluations += 1
        v = v.detach().requires_grad_()
        value = energy(v) if fast else energy.exact(v)
        (gradient,) = torch.autograd.grad(value, v)
        return float(value.detach()), gradient

    for i in range(k):
        v = climb(slope, starts[:, i], vectors, evaluations=MAX_EVALUATIONS, enough=ENOUGH, flat=flat)
        vectors = torch.cat([vectors, v[None]])
        if bar is not None:
            bar.update()
    return vectors, evaluations

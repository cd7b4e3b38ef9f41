"""Causal basis extraction: directions of a layer in the order of their effect through a lens, by two solvers.

    v_i = argmax sigma(v),   |v| = 1,  v orthogonal to v_1 .. v_{i-1};      sigma as in `energy.py`

sigma has many local maxima, so what a solver finds depends on where it starts. `"lbfgs"` is the published procedure: L-BFGS from
the i-th left singular vector of the translated unembedding, through the lens' own logits. `"fast"` climbs the same way from the same
starts, with the energy of `energy.py` and without the published procedure's last evaluations, which add next to nothing. Better starts were
tried and do not help (docs/log.md): the best direction of one step takes away from the steps that follow.

Source: Belrose et al. 2023 (Tuned Lens), section 4.1 and its appendix.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.experiments.energy import Energy, energy_of
from tl_lenses.lens import LayerLens, Lens
from tl_lenses.progress import progress

SOLVERS = ("fast", "lbfgs")
# The published procedure: so many evaluations per direction, and the relative change of the energy that ends it.
MAX_EVALUATIONS, ENOUGH = 100, 1e-4
# The fast one stops where so many evaluations add less than this share of the energy.
PATIENCE, FLAT = 4, 1e-3


@dataclass(frozen=True)
class Basis:
    """Directions of one layer, the one with the largest energy first.

    Attributes:
        vectors: `[k, d_model]`, orthonormal rows.
        energies: sigma of each on the states it was found on, nats.
        evaluations: how often the energy of a direction and its gradient were computed.
    """

    vectors: Float[Tensor, "k d"]
    energies: Float[Tensor, " k"]
    evaluations: int


def extract(
    decode: LayerLens,
    states: Float[Tensor, "n d"],
    k: int,
    *,
    solver: str = "fast",
    bar: Any = None,
) -> Basis:
    """The first k causal directions of a lens at one layer.

    Args:
        decode: `lens[l]`.
        states: residuals of layer l, `[n, d_model]`.
        k: directions, at most d_model.
        solver: "fast", or "lbfgs", which is the published procedure.
        bar: a progress bar that is updated for every direction.

    Raises:
        ValueError: k larger than d_model, an unknown solver, fewer than two states.

    Example:
        >>> extract(lens[4], states, 8).energies      # doctest: +SKIP
    """
    check_k(k, states.shape[-1])
    if solver not in SOLVERS:
        raise ValueError(f"solver must be 'fast' or 'lbfgs', got {solver!r}")
    energy = _Counted(energy_of(decode, states, fast=solver == "fast"))
    with torch.enable_grad():
        vectors = _lbfgs(energy, k, bar, early=solver == "fast")
    with torch.no_grad():
        energies = torch.stack([energy.energy.exact(v) for v in vectors])
    order = energies.argsort(descending=True)
    return Basis(vectors[order], energies[order], energy.evaluations)


def bases_of(
    lens: Lens,
    states: dict[int, Float[Tensor, "n d"]],
    k: int,
    *,
    solver: str = "fast",
    show_progress: bool | None = None,
) -> dict[int, Basis]:
    """`extract` for every layer, with a progress bar."""
    bar = progress(total=k * len(states), desc="directions", show=show_progress)
    found = {layer: extract(lens[layer], x, k, solver=solver, bar=bar) for layer, x in states.items()}
    bar.close()
    return found


def check_k(k: int, width: int) -> None:
    """Refuse a number of directions that there is no room for.

    Raises:
        ValueError: k below 1 or above the width.
    """
    if not 1 <= k <= width:
        raise ValueError(f"k is {k}: a basis of this model has 1 to {width} directions (d_model)")


class _Counted:
    """An energy that counts its evaluations."""

    def __init__(self, energy: Energy) -> None:
        self.energy, self.evaluations = energy, 0

    def slope(self, v: Tensor, *, exact: bool = False) -> tuple[float, Tensor]:
        """sigma(v) and its gradient."""
        self.evaluations += 1
        v = v.detach().requires_grad_()
        value = self.energy.exact(v) if exact else self.energy(v)
        (gradient,) = torch.autograd.grad(value, v)
        return float(value.detach()), gradient


def _starts(decode: LayerLens, k: int) -> Float[Tensor, "d k"]:
    """Left singular vectors of the translated unembedding `W^T W_U`, filled up where the vocabulary is small."""
    w_u, _ = decode.readout.weights()
    w_u = w_u.float() if decode.affine is None else decode.affine.weight.float().T @ w_u.float()
    found = torch.linalg.svd(w_u, full_matrices=False).U[:, :k]
    if found.shape[1] < k:
        rest = torch.randn(len(found), k - found.shape[1], generator=torch.Generator().manual_seed(0)).to(found)
        found = torch.linalg.qr(torch.cat([found, rest], 1)).Q
    return found


def _off(v: Float[Tensor, " d"], found: Float[Tensor, "i d"]) -> Float[Tensor, " d"]:
    """v without its part in the span of `found`, at length 1; where nothing is left of it, something else that is."""
    for _ in range(3):  # once more than round-off needs, for a v that was drawn anew
        v = v - found.T @ (found @ v)
        if not float(v.norm()) > 1e-6:
            v = torch.randn(len(v), generator=torch.Generator().manual_seed(len(found))).to(v)
        v = v / v.norm()
    return v


def _lbfgs(energy: _Counted, k: int, bar: Any, *, early: bool) -> Float[Tensor, "k d"]:
    """L-BFGS with strong Wolfe line search from every start in turn, in the complement of what was found.

    The published procedure lets the optimiser go on until its own tolerances (1e-7, 1e-9) or the evaluations end it; `early` is the
    same climb, left where it has become flat.
    """
    starts = _starts(energy.energy.decode, k)
    found = starts.new_zeros(0, len(starts))
    for i in range(k):
        v = torch.nn.Parameter(_off(starts[:, i], found))
        optimizer = torch.optim.LBFGS([v], line_search_fn="strong_wolfe", max_iter=MAX_EVALUATIONS)
        seen: list[float] = []
        tops: list[tuple[float, Tensor]] = []  # the best so far, after each evaluation

        def closure(v: Any = v, seen: Any = seen, tops: Any = tops, found: Tensor = found) -> Tensor:
            at = _off(v.detach(), found)
            value, slope = energy.slope(at, exact=not early)
            v.grad = -_tangent(slope, at, found) / v.detach().norm()  # the chain rule through the projection
            seen.append(value)
            tops.append((value, at) if not tops or value > tops[-1][0] else tops[-1])
            if early and (len(seen) == MAX_EVALUATIONS or _flat([top for top, _ in tops])):
                raise _Arrived
            return torch.tensor(-value)

        try:
            while len(seen) < MAX_EVALUATIONS:
                optimizer.step(closure)  # type: ignore[arg-type]
                v.data = _off(v.data, found)
                if len(seen) > 1 and abs(seen[-1] - seen[-2]) < ENOUGH * abs(seen[-1]):
                    break
        except _Arrived:
            v.data = tops[-1][1]
        found = torch.cat([found, _off(v.detach(), found)[None]])
        if bar is not None:
            bar.update()
    return found


class _Arrived(Exception):
    """Ends a climb from inside the optimiser, which knows an absolute tolerance only."""


def _flat(tops: list[float]) -> bool:
    """Whether the last evaluations have added less than `FLAT` to the best energy so far."""
    return len(tops) > PATIENCE and tops[-1] - tops[-1 - PATIENCE] < FLAT * tops[-1]


def _tangent(slope: Tensor, v: Tensor, found: Tensor) -> Tensor:
    """The part of a gradient along which v may move."""
    slope = slope - v * (slope @ v)
    return slope - found.T @ (found @ slope)

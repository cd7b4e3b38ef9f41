"""Causal basis extraction: directions of a layer in the order of their effect through a lens, by two solvers.

    v_i = argmax sigma(v),   |v| = 1,  v orthogonal to v_1 .. v_{i-1};      sigma as in `energy.py`

sigma has many local maxima, so what a solver finds depends on where it starts. `"lbfgs"` is the published procedure: L-BFGS from
the i-th left singular vector of the translated unembedding. `"block"` looks for k good starts together and on a part of the states
(orthogonal iteration on the gradients), takes the best of what is left for each direction, and finishes it on all states.

Source: Belrose et al. 2023 (Tuned Lens), section 4.1 and its appendix.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.experiments.energy import Energy, energy_of
from tl_lenses.lens import LayerLens

SOLVERS = ("block", "lbfgs")
# The published procedure: so many evaluations per direction, and the relative change of the energy that ends it.
MAX_EVALUATIONS, ENOUGH = 100, 1e-4
# Of the block solver: states that the starts are looked for on, rounds of that, and iterations of the end.
START_STATES, START_ROUNDS, END_ITERATIONS = 128, 10, 40


@dataclass(frozen=True)
class Basis:
    """Directions of one layer, the one with the largest energy first.

    Attributes:
        vectors: `[k, d_model]`, orthonormal rows.
        energies: sigma of each on the states it was found on, nats.
        evaluations: how often the energy of a direction and its gradient were computed, counted in passes over all states.
    """

    vectors: Float[Tensor, "k d"]
    energies: Float[Tensor, " k"]
    evaluations: float


def extract(
    decode: LayerLens,
    states: Float[Tensor, "n d"],
    k: int,
    *,
    solver: str = "block",
    bar: Any = None,
) -> Basis:
    """The first k causal directions of a lens at one layer.

    Args:
        decode: `lens[l]`.
        states: residuals of layer l, `[n, d_model]`.
        k: directions, at most d_model.
        solver: "block", or "lbfgs", which is the published procedure.
        bar: a progress bar that is updated for every direction.

    Raises:
        ValueError: k larger than d_model, an unknown solver, fewer than two states.

    Example:
        >>> extract(lens[4], states, 8).energies      # doctest: +SKIP
    """
    check_k(k, states.shape[-1])
    if solver not in SOLVERS:
        raise ValueError(f"solver must be 'block' or 'lbfgs', got {solver!r}")
    energy = _Counted(energy_of(decode, states, fast=solver == "block"))
    with torch.enable_grad():
        vectors = (_block if solver == "block" else _lbfgs)(energy, k, bar)
    with torch.no_grad():
        energies = torch.stack([energy.energy.exact(v) for v in vectors])
    order = energies.argsort(descending=True)
    return Basis(vectors[order], energies[order], energy.evaluations)


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
        self.energy, self.evaluations = energy, 0.0

    def slope(self, v: Tensor, part: Energy | None = None, *, exact: bool = False) -> tuple[float, Tensor]:
        """sigma(v) and its gradient, on all states or a part."""
        chosen = part or self.energy
        self.evaluations += len(chosen.states) / len(self.energy.states)
        v = v.detach().requires_grad_()
        value = chosen.exact(v) if exact else chosen(v)
        (gradient,) = torch.autograd.grad(value, v)
        return float(value.detach()), gradient

    @torch.no_grad()
    def value(self, v: Tensor, part: Energy) -> float:
        """sigma(v) on a part."""
        self.evaluations += len(part.states) / len(self.energy.states)
        return float(part(v))


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
    """v without its part in the span of `found`, at length 1; twice, for round-off."""
    for _ in range(2):
        v = v - found.T @ (found @ v)
        v = v / v.norm().clamp_min(torch.finfo(v.dtype).tiny)
    return v


# --- the published procedure


def _lbfgs(energy: _Counted, k: int, bar: Any) -> Float[Tensor, "k d"]:
    starts = _starts(energy.energy.decode, k)
    found = starts.new_zeros(0, len(starts))
    for i in range(k):
        v = torch.nn.Parameter(_off(starts[:, i], found))
        optimizer = torch.optim.LBFGS([v], line_search_fn="strong_wolfe", max_iter=MAX_EVALUATIONS)
        seen: list[float] = []

        def closure(v: Any = v, seen: list[float] = seen, found: Tensor = found) -> Tensor:
            length = v.detach().norm()
            at = _off(v.detach(), found)
            value, slope = energy.slope(at, exact=True)
            # The chain rule through the projection.
            v.grad = -_tangent(slope, at, found) / length
            seen.append(value)
            return torch.tensor(-value)

        while len(seen) < MAX_EVALUATIONS:
            optimizer.step(closure)  # type: ignore[arg-type]
            v.data = _off(v.data, found)
            if len(seen) > 1 and abs(seen[-1] - seen[-2]) < ENOUGH * abs(seen[-1]):
                break
        found = torch.cat([found, _off(v.detach(), found)[None]])
        if bar is not None:
            bar.update()
    return found


def _tangent(slope: Tensor, v: Tensor, found: Tensor) -> Tensor:
    """The part of a gradient along which v may move."""
    slope = slope - v * (slope @ v)
    return slope - found.T @ (found @ slope)


# --- the faster one


def _block(energy: _Counted, k: int, bar: Any) -> Float[Tensor, "k d"]:
    n = len(energy.energy.states)
    part = energy.energy.part(slice(None, None, max(1, n // START_STATES)))
    pool = list(_together(energy, part, _starts(energy.energy.decode, k)).T)
    found = pool[0].new_zeros(0, len(pool[0]))
    for _ in range(k):
        left = [_off(v, found) for v in pool]
        values = [energy.value(v, part) for v in left]
        best = max(range(len(pool)), key=values.__getitem__)
        pool.pop(best)
        found = torch.cat([found, _finish(energy, left[best], found)[None]])
        if bar is not None:
            bar.update()
    return found


def _together(energy: _Counted, part: Energy, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """Orthogonal iteration on the gradients: `V <- QR [grad sigma(v_1), ..., grad sigma(v_k)]`, the largest energy first."""
    for _ in range(START_ROUNDS):
        pairs = [energy.slope(v, part) for v in vectors.T]
        pairs.sort(key=lambda pair: -pair[0])
        slopes = [slope / slope.norm().clamp_min(torch.finfo(slope.dtype).tiny) for _, slope in pairs]
        vectors = torch.linalg.qr(torch.stack(slopes, 1)).Q
    return vectors


def _finish(energy: _Counted, start: Float[Tensor, " d"], found: Float[Tensor, "i d"]) -> Float[Tensor, " d"]:
    """L-BFGS on `log sigma`, whose gradient has the same size for every direction, until a step adds less than `ENOUGH`."""
    v = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.LBFGS(
        [v], line_search_fn="strong_wolfe", max_iter=END_ITERATIONS, tolerance_change=ENOUGH, history_size=20
    )

    def closure() -> Tensor:
        at = _off(v.detach(), found)
        value, slope = energy.slope(at)
        value = max(value, torch.finfo(torch.float32).tiny)
        v.grad = -_tangent(slope, at, found) / (v.detach().norm() * value)
        return torch.tensor(-math.log(value))

    optimizer.step(closure)  # type: ignore[arg-type]
    return _off(v.detach(), found)

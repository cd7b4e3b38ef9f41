"""Closed forms: moments in, affine maps out. Float64 throughout.

With `C = xx / n` (covariance of the input) and `B = yx / n`, least squares is `W = B C^-1`, `b = mean_y - W mean_x`.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.affine import base
from tl_lenses.checks import finite_number, one_of
from tl_lenses.moments import Moments

Map = tuple[Float[Tensor, "n_rows d_out d_in"], Float[Tensor, "n_rows d_out"]]


def _bias(m: Moments, weight: Float[Tensor, "n_rows d_out d_in"]) -> Float[Tensor, "n_rows d_out"]:
    return m.mean_y - (weight @ m.mean_x[..., None])[..., 0]


def _check(m: Moments, need: int) -> None:
    if m.n < need:
        raise ValueError(
            f"{m.n} tokens are fewer than a covariance of width {m.xx.shape[-1]} needs (at least {need}): give more tokens, "
            "or fit_tuned(init='identity'), or bias only (solve.shift)"
        )


def _check_kind(m: Moments) -> None:
    if not isinstance(m, Moments):
        raise TypeError(f"expected Moments, got {type(m).__name__}: tl_lenses.moments.moments(x, y) makes them")


def ridge_path(m: Moments, strengths: Sequence[float], toward: Literal["identity", "zero"] = "identity") -> list[Map]:
    """Ridge for several strengths from one factorisation.

    `W = (B + k T) (C + k I)^-1` with `T` the identity or zero and `k = strength * trace(C) / d`, so a strength means the same
    on every layer and model. Strength 0 is least squares.

    Args:
        m: moments of `(x, y)`.
        strengths: relative to the mean eigenvalue of the covariance.
        toward: what a large strength gives: the identity (the logit lens) or zero.

    Returns:
        `(weights [n_rows, d_out, d_in], biases [n_rows, d_out])` per strength, float64.

    Raises:
        ValueError: no more samples than dimensions, a negative strength, identity between different widths.
    """
    _check_kind(m)
    d_out, d_in = m.yx.shape[1:]
    _check(m, d_in + 1)
    if isinstance(strengths, (str, bytes)) or not hasattr(strengths, "__iter__"):
        raise TypeError(f"strengths must be a list of numbers, got {strengths!r}")
    strengths = [finite_number("a ridge strength", strength, least=0) for strength in strengths]
    one_of("toward", toward, ("identity", "zero"))
    if toward == "identity" and d_out != d_in:
        raise ValueError(f"ridge toward the identity needs equal widths, got {d_in} -> {d_out}: use toward='zero'")
    values, vectors = torch.linalg.eigh(m.xx / m.n)  # C = V diag(values) V^T
    values = values.clamp_min(0)
    scale = values.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    zeros = torch.zeros_like(m.yx[0])
    target = zeros.fill_diagonal_(1.0) if toward == "identity" else zeros
    rotated = (m.yx / m.n) @ vectors  # B V
    rotated_target = target @ vectors
    maps = []
    for strength in strengths:
        k = strength * scale
        # Directions that the data never takes keep T: a pseudoinverse, not a division by rounding error.
        alive = values + k > values.amax(-1, keepdim=True) * d_in * torch.finfo(torch.float64).eps
        inverse = torch.where(alive, 1 / torch.where(alive, values + k, 1.0), 0.0)
        solved = torch.where(alive[:, None], (rotated + k[:, None] * rotated_target) * inverse[:, None], rotated_target)
        weight = solved @ vectors.mT
        maps.append((weight, _bias(m, weight)))
    return maps


def ridge(m: Moments, strength: float = 0.0, toward: Literal["identity", "zero"] = "identity") -> Map:
    """One strength of `ridge_path`."""
    return ridge_path(m, [strength], toward)[0]


def procrustes(m: Moments, scaled: bool = False) -> Map:
    """The rotation (times one scale, if asked) that best maps x to y: `W = U V^T` of the singular vectors of `B`.

    Source: Schönemann 1966, "A generalized solution of the orthogonal Procrustes problem".
    """
    _check_kind(m)
    if m.yx.shape[1] != m.yx.shape[2]:
        raise ValueError(f"a rotation needs equal widths, got {m.yx.shape[2]} -> {m.yx.shape[1]}")
    _check(m, m.xx.shape[-1] + 1)
    u, s, vh = torch.linalg.svd(m.yx)
    weight = u @ vh
    if scaled:
        trace = m.xx.diagonal(dim1=-2, dim2=-1).sum(-1)
        weight = weight * (s.sum(-1) / trace)[:, None, None]
    return weight, _bias(m, weight)


def shift(m: Moments) -> Map:
    """Bias only: `W = I`, `b = mean_y - mean_x`."""
    _check_kind(m)
    if m.yx.shape[1] != m.yx.shape[2]:
        raise ValueError(f"a shift needs equal widths, got {m.yx.shape[2]} -> {m.yx.shape[1]}")
    _check(m, 1)
    weight = base(*m.yx.shape[1:], dtype=torch.float64, device=m.xx.device).expand_as(m.yx).clone()
    return weight, _bias(m, weight)


def r_squared(
    m: Moments, weight: Float[Tensor, "n_rows d_out d_in"], bias: Float[Tensor, "n_rows d_out"]
) -> Float[Tensor, " n_rows"]:
    """Share of y's variance that a map explains on the sample of `m` (held out, say).

    `1 - sum |W x + b - y|^2 / sum |y - mean_y|^2`
    """
    _check_kind(m)
    for name, x, shape in (("weight", weight, m.yx.shape), ("bias", bias, m.mean_y.shape)):
        if not isinstance(x, Tensor) or x.shape != shape:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor of shape {list(shape)}, got {got}")
    weight, bias = weight.double(), bias.double()
    # sum |W x + b - y|^2 = tr(W xx W^T) - 2 tr(W yx^T) + yy + n |W mean_x + b - mean_y|^2
    quadratic = ((weight @ m.xx) * weight).sum((-2, -1))
    cross = (weight * m.yx).sum((-2, -1))
    offset = (weight @ m.mean_x[..., None])[..., 0] + bias - m.mean_y
    residual = quadratic - 2 * cross + m.yy.sum(-1) + m.n * (offset**2).sum(-1)
    return 1 - residual / m.yy.sum(-1)

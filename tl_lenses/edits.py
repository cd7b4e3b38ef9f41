"""What to put in place of an activation: functions from the selected `[batch, k, d]` to the same shape.

Each name here is a factory (called with its settings, returns the edit), except `zero`, which has none. Edits compose as
functions do; none writes in place.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Edit = Callable[[Tensor], Tensor]


def _like(value: Tensor | float, x: Tensor) -> Tensor:
    """`value` in x's dtype, device and shape: `[d]`, `[k, d]`, `[batch, 1, d]`, ... spread over the selection."""
    value = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    if value.ndim == x.ndim - 1 and value.ndim >= 2 and value.shape[0] == x.shape[0] != x.shape[1]:
        value = value[:, None]  # one vector per row, [batch, d]
    try:
        return value.expand_as(x)
    except RuntimeError:
        raise ValueError(f"a value of shape {list(value.shape)} does not fit the selected activation {list(x.shape)}") from None


def replace(value: Float[Tensor, "*shape"]) -> Edit:
    """`x -> value`: `[d]` everywhere, `[k, d]` per position, `[batch, d]` per row (where batch differs from k),
    `[batch, k, d]`.

    >>> replace(torch.tensor([1.0, 2.0]))(torch.zeros(1, 1, 2))
    tensor([[[1., 2.]]])
    """
    return lambda x: _like(value, x).clone()


def add(value: Float[Tensor, "*shape"], scale: float = 1.0) -> Edit:
    """`x -> x + scale * value`: steering.

    >>> add(torch.ones(2), scale=3.0)(torch.zeros(1, 1, 2))
    tensor([[[3., 3.]]])
    """
    return lambda x: x + scale * _like(value, x)


def scale(factor: float | Tensor) -> Edit:
    """`x -> factor * x`.

    >>> scale(2.0)(torch.ones(1, 1, 2))
    tensor([[[2., 2.]]])
    """
    return lambda x: x * _like(factor, x)


def zero(x: Tensor | None = None) -> Any:
    """`x -> 0`: zero ablation. The edit itself, so `patch(site, zero)`; `zero()` gives it too.

    >>> zero(torch.ones(1, 1, 2))
    tensor([[[0., 0.]]])
    """
    return zero if x is None else torch.zeros_like(x)


def mean(value: Float[Tensor, "*shape"] | None = None, over: str = "batch") -> Edit:
    """`x -> mean`: mean ablation, with a given mean or the mean of the selection itself.

    Args:
        value: the mean (over a data set, say); None takes it from the selection.
        over: "batch" averages the rows and keeps positions, "all" averages rows and positions.

    >>> mean(over="all")(torch.tensor([[[1.0], [3.0]]]))
    tensor([[[2.],
             [2.]]])
    """
    if not isinstance(over, str) or over not in ("batch", "all"):
        raise ValueError(f"over must be 'batch' or 'all', got {over!r}")
    if value is not None:
        return replace(value)
    dims = (0,) if over == "batch" else (0, 1)
    return lambda x: x.mean(dims, keepdim=True).expand_as(x).clone()


def resample(seed: int = 0, source: Float[Tensor, "*shape"] | None = None) -> Edit:
    """`x[i] -> x[pi(i)]`: each row gets another row's activation, by a random derangement (no row keeps its own).

    Args:
        seed: of the permutation; the same for every call.
        source: activations to draw from instead, `[n, k, d]`: row i gets a random one.

    Raises:
        ValueError: one row only, which has no other.
    """

    def edit(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if source is not None:
            chosen = torch.randint(len(source), (len(x),), generator=generator)
            return _like(source[chosen.to(source.device)], x).clone()
        if len(x) < 2:
            raise ValueError("resample needs at least two rows in the batch, or source=activations to draw from")
        # A random cycle has no fixed point, and is a derangement without rejection sampling.
        order = torch.randperm(len(x), generator=generator)
        pi = torch.empty_like(order)
        pi[order] = order.roll(1)
        return x[pi.to(x.device)]

    return edit


def noise(std: float, seed: int = 0) -> Edit:
    """`x -> x + std * e`, e standard normal from `seed` (Meng et al. 2022 corrupt embeddings so)."""

    def edit(x: Tensor) -> Tensor:
        e = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        return x + std * e.to(x)

    return edit


def interpolate(value: Float[Tensor, "*shape"], alpha: float) -> Edit:
    """`x -> (1 - alpha) x + alpha value`: 0 changes nothing, 1 replaces.

    >>> interpolate(torch.tensor([4.0]), 0.25)(torch.zeros(1, 1, 1))
    tensor([[[1.]]])
    """
    return lambda x: torch.lerp(x, _like(value, x).contiguous(), alpha)


def project(
    directions: Float[Tensor, "k d"] | Float[Tensor, " d"],
    keep: bool = False,
    toward: Float[Tensor, "*shape"] | Edit | None = None,
    *,
    orthonormal: bool = False,
) -> Edit:
    """`x -> x + P (c - x)`, P the projector on the span of `directions`: ablates a subspace (or keeps only it).

    Args:
        directions: rows that span the subspace; they need not be orthogonal.
        keep: keep the subspace and ablate its complement.
        toward: c, what the ablated part becomes: 0 by default, a mean for mean ablation, or an edit that is applied to
            x, such as `resample(seed)` for resample ablation.
        orthonormal: the rows are orthonormal, which is checked.

    Raises:
        ValueError: directions that are all zero, or that are not orthonormal and said to be.

    Source: Belrose et al. 2023 (Tuned Lens), appendix on ablating subspaces.

    Example:
        >>> x = torch.tensor([[[3.0, 4.0]], [[5.0, 6.0]]])
        >>> project(torch.tensor([1.0, 0.0]), toward=mean(over="all"))(x)
        tensor([[[4., 4.]],
        <BLANKLINE>
                [[4., 6.]]])
    """
    if not isinstance(directions, Tensor) or directions.ndim not in (1, 2) or not directions.is_floating_point():
        got = list(directions.shape) if isinstance(directions, Tensor) else type(directions).__name__
        raise ValueError(f"directions must be a floating-point tensor [d] or [k, d], got {got}")
    rows = directions[None] if directions.ndim == 1 else directions
    if orthonormal:
        error = (rows.double() @ rows.double().T - torch.eye(len(rows), dtype=torch.float64, device=rows.device)).abs()
        if not float(error.max()) < 1e-3:
            raise ValueError(
                f"the directions are said to be orthonormal and are not: V V^T differs from the identity by "
                f"{float(error.max()):.3g}; orthonormalise them, or leave orthonormal=True away"
            )
    # The right singular vectors span the rows even where they are dependent, unlike QR.
    _, s, vh = torch.linalg.svd(rows.double(), full_matrices=False)
    if not s.numel() or s[0] == 0:
        raise ValueError("the directions to project on are all zero")
    basis = vh[s > s[0] * 1e-10]

    def edit(x: Tensor) -> Tensor:
        b = basis.to(x)
        goal = toward if toward is None or isinstance(toward, Tensor) else toward(x)
        gap = -x if goal is None else _like(goal, x) - x
        inside = (gap @ b.T) @ b
        return x + (gap - inside if keep else inside)

    return edit


def where(mask: Bool[Tensor, "batch k"], edit: Edit) -> Edit:
    """`x[mask] -> edit(x[mask])`: an edit of some positions, which it sees as rows `[n, 1, d]` of one batch.

    So the mean of `mean()` is over all of them, and `resample()` gives each the activation of another one, whatever
    their row. Pads and the first position stay out of an ablation like this.

    Args:
        mask: of the selected positions; True is edited.
        edit: what happens there.

    Raises:
        ValueError: a mask of another shape than the selection.

    Example:
        >>> where(torch.tensor([[False, True]]), scale(2.0))(torch.ones(1, 2, 1))
        tensor([[[1.],
                 [2.]]])
    """

    def edited(x: Tensor) -> Tensor:
        if x.shape[:2] != mask.shape:
            raise ValueError(f"a mask of shape {list(mask.shape)} does not fit positions {list(x.shape[:2])}")
        chosen = mask.to(x.device)
        out = x.clone()
        out[chosen] = edit(x[chosen][:, None])[:, 0]
        return out

    return edited


def norm_match(edit: Edit | Float[Tensor, "*shape"], norm: float | Tensor | None = None) -> Edit:
    """`x -> edit(x) * |x| / |edit(x)|`: another edit's direction with the replaced vector's length, or with a given
    `norm`.

    >>> norm_match(torch.tensor([3.0, 4.0]))(torch.tensor([[[0.0, 10.0]]]))
    tensor([[[6., 8.]]])
    """
    inner = replace(edit) if isinstance(edit, Tensor) else edit

    def matched(x: Tensor) -> Tensor:
        new = inner(x)
        length = x.norm(dim=-1, keepdim=True) if norm is None else torch.as_tensor(norm, dtype=x.dtype, device=x.device)
        return new * (length / new.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny))

    return matched


def affine(map: Callable[[Tensor], Tensor], pinv: bool = False) -> Edit:
    """`x -> W x + b`, an `Affine` (or any callable) as an edit; `pinv` applies its pseudoinverse."""
    chosen = map.pinv() if pinv else map  # type: ignore[attr-defined]
    return lambda x: chosen(x)

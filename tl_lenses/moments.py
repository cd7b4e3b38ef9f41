"""Streaming means and covariances in float64. Evidence merges, so that shards and machines are a sum (`a + b`)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """First and second moments of pairs `(x, y)`, one set per row; everything float64.

    Attributes:
        n: number of samples seen.
        mean_x, mean_y: `[n_rows, d_in]`, `[n_rows, d_out]`.
        xx: `[n_rows, d_in, d_in]`, sum of `(x - mean_x)(x - mean_x)^T`.
        yx: `[n_rows, d_out, d_in]`, sum of `(y - mean_y)(x - mean_x)^T`.
        yy: `[n_rows, d_out]`, sum of `(y - mean_y)^2` per coordinate, for R^2.

    Source of the merge: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
    variances".

    Example:
        >>> x = torch.randn(1, 100, 3)
        >>> moments(x[:, :50], x[:, :50]).__add__(moments(x[:, 50:], x[:, 50:])).n
        100
    """

    n: int
    mean_x: Float[Tensor, "n_rows d_in"]
    mean_y: Float[Tensor, "n_rows d_out"]
    xx: Float[Tensor, "n_rows d_in d_in"]
    yx: Float[Tensor, "n_rows d_out d_in"]
    yy: Float[Tensor, "n_rows d_out"]

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both samples together."""
        if self.yx.shape != other.yx.shape:
            raise ValueError(
                f"moments of different shape do not merge: {list(self.yx.shape)} and {list(other.yx.shape)}"
            )
        n = self.n + other.n
        if n == 0:
            return self
        share = other.n / n
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        between = self.n * share  # n_a n_b / (n_a + n_b)
        return Moments(
            n,
            self.mean_x + share * dx,
            self.mean_y + share * dy,
            self.xx + other.xx + between * dx[:, :, None] * dx[:, None, :],
            self.yx + other.yx + between * dy[:, :, None] * dx[:, None, :],
            self.yy + other.yy + between * dy**2,
        )

    def __radd__(self, other: object) -> "Moments":
        """So that `sum(shards)` works."""
        return self if other == 0 else NotImplemented  # type: ignore[return-value]


def moments(
    x: Float[Tensor, "n_rows n d_in"], y: Float[Tensor, "n_rows n d_out"] | Float[Tensor, "1 n d_out"]
) -> Moments:
    """The moments of one batch; `y` may be shared by all rows.

    Raises:
        ValueError: values that are not finite.
    """
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("activations that are not finite cannot be averaged")
    x, y = x.double(), y.double().expand(len(x), -1, -1)
    mean_x, mean_y = x.mean(1), y.mean(1)
    x, y = x - mean_x[:, None], y - mean_y[:, None]
    return Moments(x.shape[1], mean_x, mean_y, x.mT @ x, y.mT @ x, (y**2).sum(1))


def empty(n_rows: int, d_in: int, d_out: int, device: str | torch.device = "cpu") -> Moments:
    """Moments of nothing: the neutral element of `+`."""
    zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=device)
    return Moments(
        0,
        zeros(n_rows, d_in),
        zeros(n_rows, d_out),
        zeros(n_rows, d_in, d_in),
        zeros(n_rows, d_out, d_in),
        zeros(n_rows, d_out),
    )

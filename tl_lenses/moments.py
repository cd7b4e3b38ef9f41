"""Streaming means and covariances in float64. Evidence merges, so that shards and machines are a sum (`a + b`)."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """First and second moments of pairs `(x, y)`, one set per row; everything float64.

    Rows that share x (one source, several targets) may hold its moments once: `mean_x [1, d_in]`, `xx [1, d_in, d_in]`.

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
    mean_x: Float[Tensor, "#n_rows d_in"]
    mean_y: Float[Tensor, "n_rows d_out"]
    xx: Float[Tensor, "#n_rows d_in d_in"]
    yx: Float[Tensor, "n_rows d_out d_in"]
    yy: Float[Tensor, "n_rows d_out"]

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both samples together."""
        if self.yx.shape != other.yx.shape:
            raise ValueError(f"moments of different shape do not merge: {list(self.yx.shape)} and {list(other.yx.shape)}")
        n = self.n + other.n
        if n == 0:
            return self
        share = other.n / n
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        between = self.n * share  # n_a n_b / (n_a + n_b)
        # Added in place: a sum of matrices without three more of their size.
        outer = lambda to, a, b: to.baddbmm_(a[:, :, None], b[:, None].expand(len(a), 1, -1), alpha=between)
        return Moments(
            n, self.mean_x + share * dx, self.mean_y + share * dy, outer(self.xx + other.xx, dx, dx),
            outer(self.yx + other.yx, dy, dx), self.yy + other.yy + between * dy**2,
        )  # fmt: skip

    def __radd__(self, other: object) -> "Moments":
        """So that `sum(shards)` works."""
        return self if other == 0 else NotImplemented  # type: ignore[return-value]


def moments(x: Float[Tensor, "n_rows n d_in"], y: Float[Tensor, "n_rows n d_out"] | Float[Tensor, "1 n d_out"]) -> Moments:
    """The moments of one batch; `y` may be shared by all rows.

    Raises:
        ValueError: values that are not finite.
    """
    rows = grouped_moments(list(x), list(y), [[0 if len(y) == 1 else i] for i in range(len(x))])
    joined = (torch.cat([getattr(row, field.name) for row in rows]) for field in fields(Moments)[1:])
    return Moments(rows[0].n, *joined)


def grouped_moments(
    x: Sequence[Float[Tensor, "n d_in"]], y: Sequence[Float[Tensor, "n d_out"]], targets: Sequence[Sequence[int]]
) -> tuple[Moments, ...]:
    """The moments of one batch for pairs of several sources and targets: one `Moments` per source.

    A covariance is computed once per source and a mean once per source and target; only `yx` is per pair. `targets` are those that
    each source is paired with, as indices of `y`.

    Example:
        >>> x, y = torch.randn(100, 3), torch.randn(100, 5)
        >>> [m.yx.shape for m in grouped_moments([x, 2 * x], [y, -y], [[0], [0, 1]])]
        [torch.Size([1, 5, 3]), torch.Size([2, 5, 3])]
    """
    if not all(bool(part.isfinite().all()) for part in (*x, *y)):
        raise ValueError("activations that are not finite cannot be averaged")
    ys = [part.double() for part in y]
    means = [part.mean(0) for part in ys]
    ys = [part - mean for part, mean in zip(ys, means, strict=True)]
    squares = [(part**2).sum(0) for part in ys]
    summed = []
    for part, chosen in zip(x, targets, strict=True):
        part = part.double()
        mean_x = part.mean(0)
        part = part - mean_x
        pick = lambda values, chosen=chosen: torch.stack([values[j] for j in chosen])
        yx = torch.stack([ys[j].mT @ part for j in chosen])
        summed.append(Moments(len(part), mean_x[None], pick(means), (part.mT @ part)[None], yx, pick(squares)))
    return tuple(summed)

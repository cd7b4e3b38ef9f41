"""Numbers of ranks, AUROC and Spearman's correlation, with bootstrap intervals. Ties share the mean of their ranks."""

import torch
from jaxtyping import Float
from torch import Tensor

DRAWS = 1000  # of a bootstrap interval


def average_ranks(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """1 for the smallest value; equal values share the mean of their ranks.

    >>> average_ranks(torch.tensor([3.0, 1.0, 3.0]))
    tensor([2.5000, 1.0000, 2.5000], dtype=torch.float64)
    """
    x = x.double().contiguous()
    ordered = x.sort(-1).values
    below, upto = torch.searchsorted(ordered, x), torch.searchsorted(ordered, x, right=True)
    return (below + upto + 1).double() / 2


def auroc(normal: Float[Tensor, "*batch n"], anomalous: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch"]:
    """The chance that an anomalous score is above a normal one, a tie counting one half: 1 is perfect, 0.5 chance.

    `(sum of the anomalous ranks - m (m + 1) / 2) / (n m)`

    Source: Mann and Whitney 1947; Hanley and McNeil 1982.

    >>> float(auroc(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0])))
    0.875
    """
    n, m = normal.shape[-1], anomalous.shape[-1]
    ranks = average_ranks(torch.cat([normal.double(), anomalous.double()], -1))
    return (ranks[..., n:].sum(-1) - m * (m + 1) / 2) / (n * m)


def spearman(a: Float[Tensor, "*batch n"], b: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Pearson's correlation of the ranks; NaN where one of the two is constant.

    >>> float(spearman(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([3.0, 5.0, 6.0])))
    1.0
    """
    x, y = average_ranks(a), average_ranks(b)
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    return (x * y).sum(-1) / ((x**2).sum(-1) * (y**2).sum(-1)).sqrt()


def percentiles(draws: Float[Tensor, "draw ..."], level: float = 0.95) -> tuple[Tensor, Tensor]:
    """The middle `level` of bootstrap draws (percentile interval), along the first axis; draws that are NaN are left out."""
    tail = (1 - level) / 2
    return draws.nanquantile(tail, 0), draws.nanquantile(1 - tail, 0)


def resampled(n: int, draws: int, seed: int) -> Tensor:
    """Indices `[draws, n]` of samples with replacement."""
    return torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))


def spearman_draws(
    a: Float[Tensor, " n"], b: Float[Tensor, " n"], *, draws: int = DRAWS, seed: int = 0
) -> Float[Tensor, " draw"]:
    """Spearman's correlation of resampled pairs. The same seed gives the same samples, so that two of them compare in pairs."""
    index = resampled(len(a), draws, seed)
    return torch.cat([spearman(a[part], b[part]) for part in index.split(max(1, 2**20 // max(len(a), 1)))])

"""Numbers that are about no language model: minimisers, a Gaussian, a shrunk covariance, the gain of a norm, ranks and intervals.

There are two L-BFGS, since they answer different questions and the published numbers rest on both. `minimise` moves every row
of a batch by itself, each with its own curvature, step and end. `climb` moves one direction on a sphere with torch's own
optimiser and its strong Wolfe line search, as the published causal basis extraction does; another line search ends in other
local maxima.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_lenses.moments import Moments

DRAWS = 1000  # of a bootstrap interval

# --- minimisers


def minimise(
    f: Callable[[Float[Tensor, "m d"], Int[Tensor, " m"]], Float[Tensor, " m"]],
    x: Float[Tensor, "n d"],
    *,
    steps: int = 100,
    memory: int = 10,
    tol: float = 1e-5,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"], int]:
    """L-BFGS of every row by itself, in one batch: own curvature, own step, own end.

    Args:
        f: `(x[rows], rows) -> value` per row; differentiable.
        x: where to start.
        steps: at most.
        memory: pairs of curvature.
        tol: norm of the gradient at which a row ends.

    Returns:
        The minima, the norms of their gradients, and how often f was evaluated.

    Source: Nocedal and Wright 2006, algorithm 7.4; backtracking to Armijo's condition, pairs without curvature left out.
    """
    count = 0

    def evaluate(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            value = f(y, rows)
            (gradient,) = torch.autograd.grad(value.sum(), y)
        return value.detach(), gradient

    dot = lambda a, b: (a * b).sum(-1)
    x = x.detach().clone()
    active = torch.arange(len(x), device=x.device)
    value, gradient = evaluate(x, active)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    scale = 1 / gradient.norm(dim=-1).clamp_min(1.0)
    for _ in range(steps):
        active = active[gradient[active].norm(dim=-1) > tol]
        if not len(active):
            break
        direction, alphas = gradient.clone(), []
        for s, y, rho in reversed(pairs):
            alphas.append(rho * dot(s, direction))
            direction = direction - alphas[-1][:, None] * y
        direction = scale[:, None] * direction
        for (s, y, rho), alpha in zip(pairs, reversed(alphas), strict=True):
            direction = direction + (alpha - rho * dot(y, direction))[:, None] * s
        uphill = dot(direction, gradient) <= 0
        direction = -torch.where(uphill[:, None], gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1.0), direction)
        new, new_value, new_gradient = x.clone(), value.clone(), gradient.clone()
        step, trying = torch.ones_like(value), active
        for _ in range(20):
            at = x[trying] + step[trying, None] * direction[trying]
            v, g = evaluate(at, trying)
            enough = v <= value[trying] + 1e-4 * step[trying] * dot(direction[trying], gradient[trying])
            good = trying[enough]
            new[good], new_value[good], new_gradient[good] = at[enough], v[enough], g[enough]
            trying = trying[~enough]
            if not len(trying):
                break
            step[trying] = step[trying] / 2
        s, y = new - x, new_gradient - gradient
        curvature = dot(s, y)
        has = curvature > 1e-8 * s.norm(dim=-1) * y.norm(dim=-1)
        rho = torch.where(has, 1 / curvature.where(has, torch.ones_like(curvature)), 0.0)
        pairs = [*pairs[1 - memory :], (s, y, rho)]
        scale = torch.where(has, curvature / dot(y, y).clamp_min(1e-30), scale)
        x, value, gradient = new, new_value, new_gradient
        stuck = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        stuck[trying] = True  # no step goes down: round-off
        active = active[~stuck[active]]
    return x, gradient.norm(dim=-1), count


def climb(
    slope: Callable[[Float[Tensor, " d"]], tuple[float, Float[Tensor, " d"]]],
    start: Float[Tensor, " d"],
    others: Float[Tensor, "i d"],
    *,
    evaluations: int = 100,
    enough: float = 1e-4,
    flat: tuple[int, float] | None = None,
) -> Float[Tensor, " d"]:
    """A local maximum among directions of length 1 that are orthogonal to others.

    `argmax f(v),  |v| = 1,  others v = 0`, by L-BFGS with a strong Wolfe line search on `f(project(v))`.

    Args:
        slope: `v -> (f(v), gradient)`.
        start: where to begin; its part in the span of the others is taken off.
        others: orthonormal rows.
        evaluations: of f, at most; the last line search is carried to its end, unless `flat` is given.
        enough: the relative change of f between two evaluations that ends it, looked at where the optimiser has ended.
        flat: `(n, share)` ends the climb where n evaluations have added less than this share of f, and returns the best point.

    Source: Belrose et al. 2023 (Tuned Lens), appendix on causal basis extraction.
    """
    v = torch.nn.Parameter(off_span(start, others))
    optimizer = torch.optim.LBFGS([v], line_search_fn="strong_wolfe", max_iter=evaluations)
    seen: list[float] = []
    tops: list[tuple[float, Tensor]] = []  # the best so far, after each evaluation

    def closure() -> Tensor:
        at = off_span(v.detach(), others)
        value, gradient = slope(at)
        gradient = gradient - at * (gradient @ at)  # along the sphere, and off the others: where v may move
        # the chain rule through the projection
        v.grad = -(gradient - others.T @ (others @ gradient)) / v.detach().norm()
        seen.append(value)
        tops.append((value, at) if not tops or value > tops[-1][0] else tops[-1])
        if flat is not None:
            n, share = flat
            if len(seen) == evaluations or len(tops) > n and tops[-1][0] - tops[-1 - n][0] < share * tops[-1][0]:
                raise _Arrived
        return torch.tensor(-value)

    try:
        while len(seen) < evaluations:
            optimizer.step(closure)  # type: ignore[arg-type]
            v.data = off_span(v.data, others)
            if len(seen) > 1 and abs(seen[-1] - seen[-2]) < enough * abs(seen[-1]):
                break
    except _Arrived:
        v.data = tops[-1][1]
    return off_span(v.detach(), others)


def off_span(v: Float[Tensor, " d"], others: Float[Tensor, "i d"]) -> Float[Tensor, " d"]:
    """v without its part in the span of orthonormal rows, at length 1; where nothing is left of it, a direction at random."""
    for _ in range(3):  # once more than round-off needs, for a v that was drawn anew
        v = v - others.T @ (others @ v)
        if not float(v.norm()) > 1e-6:
            v = torch.randn(len(v), generator=torch.Generator().manual_seed(len(others))).to(v)
        v = v / v.norm()
    return v


class _Arrived(Exception):
    """Ends a climb from inside the optimiser, which knows an absolute tolerance only."""


# --- Gaussians


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution over states: `-log p(h) = |L^-1 (h - mean)|^2 / 2 + const`, covariance `L L^T`."""

    mean: Float[Tensor, " d"]
    factor: Float[Tensor, "d d"]

    @staticmethod
    def of(sums: Moments, row: int = 0, ridge: float = 1e-3) -> "Gaussian":
        """From moments of states, the covariance with `ridge` times its mean variance added on the diagonal.

        Args:
            sums: `moments(x, y)`; y does not count.
            row: the layer, as the moments have it.
            ridge: share of the mean variance.

        Raises:
            ValueError: fewer than two samples.
        """
        if sums.n < 2:
            raise ValueError(f"a prior needs two states at least, the moments hold {sums.n}")
        covariance = sums.xx[row] / sums.n
        level = covariance.diagonal().mean().clamp_min(1e-12)
        covariance = covariance + ridge * level * torch.eye(len(covariance)).to(covariance)
        return Gaussian(sums.mean_x[row].float(), torch.linalg.cholesky(covariance).float())

    def whiten(self, h: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """`L^-1 (h - mean)`: a natural state has about d_model as its square."""
        return torch.linalg.solve_triangular(self.factor, (h - self.mean).T, upper=False).T

    def colour(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """`mean + L z`."""
        return self.mean + z @ self.factor.T


def ledoit_wolf(x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "d d"], float]:
    """The covariance of centred samples, shrunk to a multiple of the identity, and the weight of that."""
    n, d = x.shape
    sample = x.T @ x / n
    goal = sample.diagonal().mean()
    distance = (sample**2).sum() - d * goal**2
    noise = (((x**2).sum(1) ** 2).mean() - (sample**2).sum()) / n
    weight = float((noise / distance).clamp(0, 1)) if distance > 0 else 1.0
    eye = torch.eye(d, dtype=x.dtype, device=x.device)
    return (1 - weight) * sample + weight * goal * eye, weight


# --- norms


@torch.no_grad()
def gain(norm: nn.Module | None, d: int, like: Tensor) -> tuple[Float[Tensor, " d"], bool]:
    """The gain of a norm and whether it removes the mean, found by what it does to vectors of +1 and -1; none is (1, False)."""
    if norm is None:
        return torch.ones(d).to(like), False
    signs = torch.ones(d).to(like)
    signs[1::2] = -1
    if d % 2:
        signs[-1] = 0
    call = lambda x: norm(x[None, None])[0, 0]
    gains = torch.ones(d).to(like)
    for shift in (0, 1):  # the zero of an odd width is somewhere else the second time
        x = signs.roll(shift)
        y = (call(x) - call(torch.zeros_like(x))) * x.square().mean().sqrt()
        gains = torch.where(x != 0, y * x, gains)
    return gains, bool(torch.allclose(call(signs), call(signs + 1), rtol=1e-3, atol=1e-3))


# --- ranks and intervals


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


def mean_interval(x: Float[Tensor, "n ..."], *, draws: int = DRAWS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The 95% bootstrap interval of the mean over the first axis; NaN of fewer than two.

    >>> [round(float(end), 1) for end in mean_interval(torch.tensor([0.0, 1.0, 1.0, 1.0] * 25))]
    [0.7, 0.8]
    """
    if len(x) < 2:
        none = torch.full(x.shape[1:], torch.nan, dtype=torch.float64)
        return none, none
    index, x = resampled(len(x), draws, seed), x.double()
    return percentiles(torch.cat([x[some].mean(1) for some in index.split(50)]))


# Student's t: 97.5% quantiles of 1 to 19 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131, 2.12, 2.11, 2.101, 2.093)  # fmt: skip


def jackknife(statistic: Callable[[Tensor], float], groups: int) -> tuple[float, float, float]:
    """A statistic of independent groups of data, with the 95% interval of its delete-one jackknife.

    `theta +- t se`, `se^2 = (g - 1) / g sum_i (theta_(i) - mean theta_(.))^2`, theta_(i) without group i, t of g - 1 degrees of freedom.

    Args:
        statistic: of the indices of some groups.
        groups: how many, at most 20; of one group the interval is NaN.

    Source: Efron and Tibshirani 1993 (An Introduction to the Bootstrap), chapter 11.

    >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    >>> [round(v, 3) for v in jackknife(lambda some: float(x[some].mean()), 4)]
    [2.5, 0.446, 4.554]
    """
    every = torch.arange(groups)
    whole = statistic(every)
    if groups < 2:
        return whole, math.nan, math.nan
    without = torch.tensor([statistic(every[every != i]) for i in range(groups)], dtype=torch.float64)
    wide = _T[groups - 2] * math.sqrt((groups - 1) / groups * float((without - without.mean()).square().sum()))
    return whole, whole - wide, whole + wide


def spearman_draws(a: Float[Tensor, " n"], b: Float[Tensor, " n"], *, draws: int = DRAWS, seed: int = 0) -> Float[Tensor, " draw"]:
    """Spearman's correlation of resampled pairs. The same seed gives the same samples, so that two of them compare in pairs."""
    index = resampled(len(a), draws, seed)
    return torch.cat([spearman(a[part], b[part]) for part in index.split(max(1, 2**20 // max(len(a), 1)))])

"""Is a reading right as often as it says it is? Confidence against hits."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.checks import whole_number
from tl_lenses.experiments.grid import Grid, Table
from tl_lenses.experiments.report import Report
from tl_lenses.views import Lines, Picture


@dataclass(frozen=True, repr=False)
class Calibration(Report):
    """Hits and confidence in bins of equal width, over the axis "bin".

    Attributes:
        ece: expected calibration error, `sum_b n_b / n |share of hits in b - mean confidence in b|`.
        brier: Brier score, `mean (confidence - hit)^2`.
        grid: per bin with values "n", "confidence" and "hits"; bins without values are left out.
    """

    ece: float = 0.0
    brier: float = 0.0

    name = "calibration"

    def tables(self) -> list[Table]:
        """A row per bin."""
        n = int(self.grid["n"].sum())
        title = f"calibration of {n} answers: ECE {self.ece:.3f}, Brier {self.brier:.3f}"
        rows = [[row["bin"], str(int(row["n"])), row["confidence"], row["hits"]] for row in self.grid.rows()]
        return [Table(title, ["confidence", "n", "mean", "hits"], rows, percent=False)]

    def pictures(self) -> dict[str, Picture]:
        """The reliability diagram: hits over confidence with Wilson's 95% interval, beside what a calibrated reading has."""
        places = sorted(zip(*(self.grid[name].tolist() for name in ("confidence", "hits", "n")), strict=True))
        series = {"hits": [(x, hits) for x, hits, _ in places], "calibrated": [(0.0, 0.0), (1.0, 1.0)]}
        band = [(x, *wilson(hits, n)) for x, hits, n in places]
        title = f"ECE {self.ece:.3f}, Brier {self.brier:.3f}"
        return {"reliability": Lines(title, series, "confidence", "share of hits", bands={"hits": band})}


def wilson(share: float, n: float) -> tuple[float, float]:
    """The 95% score interval of a share of n, `(p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)`.

    Source: Wilson 1927.

    >>> [round(end, 3) for end in wilson(0.9, 10)]
    [0.596, 0.982]
    """
    z2 = 1.959964**2 / n
    middle, wide = share + z2 / 2, (z2 * (share * (1 - share) + z2 / 4)) ** 0.5
    return max(0.0, (middle - wide) / (1 + z2)), min(1.0, (middle + wide) / (1 + z2))


def calibration(hits: Any, confidence: Any, *, bins: int = 10) -> Calibration:
    """ECE and Brier score of answers with a confidence, such as the frequency of the mode of a cell's samples.

    Args:
        hits: 1 or True where an answer is right, 0 or False elsewhere; a tensor or a list.
        confidence: from 0 to 1, of the same shape.
        bins: of equal width on (0, 1]; 0 falls into the first.

    Raises:
        ValueError, TypeError: other shapes, no values, values outside 0 to 1, hits that are neither 0 nor 1.

    Source: Naeini et al. 2015 (ECE); Guo et al. 2017, equation 3; Brier 1950.

    Example:
        >>> print(f"{calibration([1, 0, 1, 1], [1.0, 0.6, 0.6, 0.9], bins=5).ece:.3f}")
        0.075
    """
    bins = whole_number("bins", bins, least=1)
    hit, sure = _numbers("hits", hits), _numbers("confidence", confidence)
    if hit.shape != sure.shape or not hit.numel():
        raise ValueError(f"hits are {list(hit.shape)} and confidence {list(sure.shape)}: expected one of each per answer")
    if not bool(((sure >= 0) & (sure <= 1)).all()) or not bool(((hit == 0) | (hit == 1)).all()):
        raise ValueError("confidence must lie between 0 and 1, and hits must be 0 or 1")
    hit, sure = hit.flatten(), sure.flatten()
    place = ((sure * bins).ceil().long() - 1).clamp_min(0)
    there = place.unique()
    of = [place == b for b in there]
    n = torch.stack([x.sum().double() for x in of])
    mean, right = torch.stack([sure[x].mean() for x in of]), torch.stack([hit[x].mean() for x in of])
    axes = {"bin": [f"{b / bins:.2f}–{(b + 1) / bins:.2f}" for b in there.tolist()]}
    return Calibration(
        "", grid=Grid.over(axes, {"n": n, "confidence": mean, "hits": right}), settings={"bins": bins},
        ece=float((n / n.sum() * (right - mean).abs()).sum()), brier=float((sure - hit).square().mean()),
    )  # fmt: skip


def _numbers(name: str, values: Any) -> Float[Tensor, "*n"]:
    try:
        return torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be numbers, got {type(values).__name__}") from None

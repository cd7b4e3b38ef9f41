"""What every experiment needs: scores of many cells and what may be said of them, controls, and a result that prints and saves.

The best of many cells is a maximum over many tries, so three numbers always stand together: the *oracle* (an item counts where
any cell has it), the *best fixed cell* (chosen and measured on the same items), and the *held-out cell* (chosen on one half of the
items and measured on the other, both ways, averaged). Beside them stand controls that went through the same cells.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.experiments.picture import Heat, Picture
from tl_lenses.experiments.report import Report, Table, named
from tl_lenses.model import LensModel, n_layers
from tl_lenses.patchscopes import Source
from tl_lenses.patchscopes.sources import collect

__all__ = [
    "CONDITIONS", "MEAN", "PATCHED", "RANDOM", "SHUFFLED", "UNPATCHED", "Cells", "Pair", "Result", "Summary", "Table",
    "named", "others", "random_like", "vectors_of",
]  # fmt: skip

Pair = tuple[Any, Any]
PATCHED, SHUFFLED, RANDOM, MEAN, UNPATCHED = (
    "patched", "shuffled sources", "random vector", "mean vector", "unpatched",
)  # fmt: skip
CONDITIONS = (PATCHED, SHUFFLED, RANDOM, MEAN, UNPATCHED)


@dataclass(frozen=True)
class Summary:
    """One condition in three numbers, with the cell that is best over all items."""

    oracle: float
    best: float
    best_cell: Pair | None
    held_out: float


@dataclass(frozen=True)
class Cells:
    """Scores of every condition in every cell.

    Attributes:
        pairs: the cells `(l, l*)`.
        scores: per condition `[item, cell]`, from 0 to 1; one column for what has no cells.
        groups: items with the same name here (prompts of one subject, say) go into the same half.
        chosen: cells that a best one may be chosen from; all by default.
        seed: of the halves.
    """

    pairs: list[Pair]
    scores: dict[str, Float[Tensor, "item cell"]]
    groups: list[Any]
    chosen: list[int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, x in self.scores.items():
            if x.shape not in ((len(self.groups), len(self.pairs)), (len(self.groups), 1)):
                raise ValueError(
                    f"scores of {name!r} are {list(x.shape)}: expected [{len(self.groups)}, {len(self.pairs)}] or one column"
                )

    def summary(self, condition: str = PATCHED) -> Summary:
        """Oracle, best fixed cell and held-out cell of a condition. NaN where there are no items, or one group only."""
        x = self.scores[condition].double()
        if not len(x):
            return Summary(math.nan, math.nan, None, math.nan)
        single = x.shape[1] == 1
        cells = [0] if single else list(range(len(self.pairs))) if self.chosen is None else self.chosen
        x = x[:, cells]
        means = x.mean(0)
        best = int(means.argmax())
        held = [
            float(x[measure, int(x[choose].mean(0).argmax())].mean())
            for choose, measure in _halves(self.groups, self.seed)
        ]
        return Summary(
            float(x.max(1).values.mean()),
            float(means[best]),
            None if single else self.pairs[cells[best]],
            sum(held) / len(held) if held else math.nan,
        )

    def mean(self, condition: str = PATCHED) -> Float[Tensor, " cell"]:
        """Mean score of every cell."""
        return self.scores[condition].double().mean(0)

    def by_source_layer(self, condition: str = PATCHED) -> dict[Any, float]:
        """For each source layer, the share of items that any target layer has: the paper's accuracy of a layer."""
        x = self.scores[condition].double()
        found = {}
        for layer in dict.fromkeys(a for a, _ in self.pairs):
            mine = [i for i, (a, _) in enumerate(self.pairs) if a == layer]
            found[layer] = float(x[:, mine].max(1).values.mean()) if x.shape[1] > 1 else float(x.mean())
        return found

    def subset(self, items: Sequence[int]) -> "Cells":
        """Some of the items."""
        rows = torch.tensor(list(items), dtype=torch.long)
        return Cells(
            self.pairs, {name: x[rows] for name, x in self.scores.items()}, [self.groups[i] for i in items],
            self.chosen, self.seed,
        )  # fmt: skip

    def table(self, title: str = "", *, percent: bool = True) -> Table:
        """A row per condition: oracle, best fixed cell, held-out cell."""
        rows = []
        for name in self.scores:
            one = self.summary(name)
            cell = "" if one.best_cell is None else _pair(one.best_cell)
            rows.append([name, one.oracle, one.best, cell, one.held_out])
        return Table(title, ["", "oracle", "best fixed", "(l, l*)", "held-out"], rows, percent=percent)

    def heat(self, title: str, condition: str = PATCHED, *, high: float = 1.0) -> Heat:
        """Mean scores as a matrix: source layers down, target layers across; a single row where l* = l everywhere."""
        if all(a == b for a, b in self.pairs):
            values = [[self.mean(name)[i].item() for i in range(len(self.pairs))] for name in self._full()]
            return Heat(title, self._full(), [str(a) for a, _ in self.pairs], values, "", "layer", high=high)
        means = dict(zip(self.pairs, self.mean(condition).tolist(), strict=True))
        down, across = (list(dict.fromkeys(pair[i] for pair in self.pairs)) for i in (0, 1))
        values = [[means.get((a, b), math.nan) for b in across] for a in down]
        return Heat(title, list(map(str, down)), list(map(str, across)), values, high=high)

    def _full(self) -> list[str]:
        return [name for name, x in self.scores.items() if x.shape[1] == len(self.pairs)]

    def rows(self, **more: Any) -> list[dict[str, Any]]:
        """A row per condition and cell: mean score and number of items."""
        found = []
        for name, x in self.scores.items():
            cells = self.pairs if x.shape[1] == len(self.pairs) else [(None, None)]
            for (a, b), value in zip(cells, x.double().mean(0).tolist(), strict=True):
                found.append(
                    {**more, "condition": name, "layer": a, "target_layer": b, "score": value, "items": len(x)}
                )
        return found


def _pair(pair: Pair) -> str:
    return f"{pair[0]}, {pair[1]}"


def _halves(groups: Sequence[Any], seed: int) -> list[tuple[list[int], list[int]]]:
    """Items to choose on and items to measure on, both ways; no group is in both. Nothing where there is one group only."""
    names = sorted(set(groups), key=repr)
    if len(names) < 2:
        return []
    random.Random(seed).shuffle(names)
    first = set(names[: len(names) // 2])
    one = [i for i, name in enumerate(groups) if name in first]
    two = [i for i, name in enumerate(groups) if name not in first]
    return [(one, two), (two, one)]


# --- vectors and controls


def vectors_of(model: LensModel, sources: Sequence[Source], hooks: Sequence[Any] = ()) -> Float[Tensor, "n layer d"]:
    """Every source at every layer `0..n_layers`, one pass per prompt length."""
    layers = list(range(n_layers(model) + 1))
    found = collect(model, sources, layers, list(hooks))
    return torch.stack([torch.cat([one.by_layer[layer] for layer in layers]) for one in found])


def random_like(vectors: Float[Tensor, "n layer d"], seed: int = 0) -> Float[Tensor, "n layer d"]:
    """Directions at random, each of the length of its vector."""
    x = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed)).to(vectors)
    return x * (vectors.norm(dim=-1, keepdim=True) / x.norm(dim=-1, keepdim=True))


def others(answers: Sequence[Any], seed: int = 0) -> list[int]:
    """For every item another one with another answer, at random: whose vector the shuffled control takes.

    Raises:
        ValueError: all answers are the same.

    >>> others(["a", "b"])
    [1, 0]
    """
    rng, found = random.Random(seed), []
    for answer in answers:
        mine = [i for i, other in enumerate(answers) if other != answer]
        if not mine:
            raise ValueError(f"shuffled sources need two different answers, all {len(answers)} are {answer!r}")
        found.append(rng.choice(mine))
    return found


# --- results


@dataclass(frozen=True)
class Result(Report):
    """What an experiment over cells found.

    Attributes:
        cells: scores by condition and cell.
    """

    cells: Cells

    name = "result"

    def tables(self) -> list[Table]:
        """What is printed."""
        return [self.cells.table(f"{self.name}, {self.model}: {len(self.cells.groups)} items")]

    def pictures(self) -> dict[str, Picture]:
        """What is drawn, the first one by `figure()`."""
        return {"heat": self.cells.heat(f"{self.name}, {self.model}")}

    def rows(self) -> list[dict[str, Any]]:
        """A row per condition and cell (l, l*), with the mean score and the number of items."""
        return self.cells.rows()

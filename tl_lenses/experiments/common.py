"""Patchscopes experiments have in common: scores of many cells and three numbers that sum them up, controls, and a result.

The best of many cells is a maximum over many tries, so three numbers always stand together: the *oracle* (an item counts where
any cell has it), the *best fixed cell* (chosen and measured on the same items), and the *held-out cell* (chosen on one half of the
items and measured on the other, both ways, averaged). Beside them stand controls that went through the same cells.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.experiments.grid import Grid, Table
from tl_lenses.experiments.report import Report
from tl_lenses.model import LensModel, n_layers
from tl_lenses.patchscopes import Source
from tl_lenses.patchscopes.sources import read_vectors, ready_sources
from tl_lenses.views import Heat, Lines, Picture

Pair = tuple[Any, Any]
PATCHED, SHUFFLED, RANDOM, MEAN, UNPATCHED = (
    "patched", "shuffled sources", "random vector", "mean vector", "unpatched",
)  # fmt: skip
RUN = (PATCHED, SHUFFLED, RANDOM, MEAN)  # conditions that have cells
CONDITIONS = (*RUN, UNPATCHED)


@dataclass(frozen=True)
class Summary:
    """One condition in three numbers, with the cell that is best over all items."""

    oracle: float
    best: float
    best_cell: Pair | None
    held_out: float


@dataclass(frozen=True)
class Cells:
    """Scores of every condition in every cell."""

    pairs: list[Pair]  # the cells `(l, l*)`
    # per condition `[item, cell]`, from 0 to 1; one column for a condition without cells
    scores: dict[str, Float[Tensor, "item cell"]]
    groups: list[Any]  # items with the same name here (prompts of one subject, say) go into the same half
    chosen: list[int] | None = None  # cells that a best one may be chosen from; all by default
    seed: int = 0  # of the halves

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
        held = [float(x[measure, int(x[choose].mean(0).argmax())].mean()) for choose, measure in _halves(self.groups, self.seed)]
        cell = None if single else self.pairs[cells[best]]
        held_out = sum(held) / len(held) if held else math.nan
        return Summary(float(x.max(1).values.mean()), float(means[best]), cell, held_out)

    def mean(self, condition: str = PATCHED) -> Float[Tensor, " cell"]:
        """Mean score of every cell."""
        return self.scores[condition].double().mean(0)

    @property
    def layers(self) -> list[Any]:
        """Source layers."""
        return list(dict.fromkeys(a for a, _ in self.pairs))

    @property
    def _of_layers(self) -> list[list[int]]:
        """The cells of every source layer."""
        return [[i for i, (a, _) in enumerate(self.pairs) if a == layer] for layer in self.layers]

    def by_source_layer(self, condition: str = PATCHED) -> dict[Any, float]:
        """For each source layer, the share of items that any target layer has: the paper's accuracy of a layer."""
        return dict(zip(self.layers, self.profile(condition)["score"][0].tolist(), strict=True))

    def profile(self, *conditions: str, **more: Float[Tensor, " layer"] | None) -> Grid:
        """`by_source_layer` of several conditions, as the value "score" over the axes "condition" and "layer".

        Args:
            more: further rows; None adds nothing.
        """
        rows = {name: self._best_targets(name).mean(0) for name in conditions}
        rows |= {name: row for name, row in more.items() if row is not None}
        return Grid.over({"condition": list(rows), "layer": self.layers}, {"score": torch.stack([*rows.values()])})

    def _best_targets(self, condition: str) -> Float[Tensor, "item layer"]:
        """The best score over target layers."""
        x = self.scores[condition].double().expand(-1, len(self.pairs))
        return torch.stack([x[:, at].amax(1) for at in self._of_layers], 1)

    def over_targets(self, x: Float[Tensor, "item cell"] | None) -> Float[Tensor, " layer"] | None:
        """Means over items and target layers."""
        return None if x is None else torch.stack([x.double().mean(0)[at].mean() for at in self._of_layers])

    def beside(self, **scores: Float[Tensor, "item cell"] | None) -> "Cells":
        """The cells with further scores; None adds nothing."""
        return replace(self, scores=self.scores | {name: x for name, x in scores.items() if x is not None})

    def subset(self, items: Sequence[int]) -> "Cells":
        """Some of the items."""
        rows = torch.tensor(list(items), dtype=torch.long)
        scores = {name: x[rows] for name, x in self.scores.items()}
        return replace(self, scores=scores, groups=[self.groups[i] for i in items])

    def table(self, title: str = "", *, percent: bool = True) -> Table:
        """A row per condition: oracle, best fixed cell, held-out cell."""
        rows = []
        for name in self.scores:
            summary = self.summary(name)
            cell = "" if summary.best_cell is None else "{}, {}".format(*summary.best_cell)
            rows.append([name, summary.oracle, summary.best, cell, summary.held_out])
        return Table(title, ["", "oracle", "best fixed", "(l, l*)", "held-out"], rows, percent=percent)

    def heat(self, title: str, condition: str = PATCHED, *, high: float = 1.0) -> Heat:
        """Mean scores as a matrix: source layers down, the last one on top, and target layers across; a row per condition where l* = l."""
        if all(a == b for a, b in self.pairs):
            full = [name for name, x in self.scores.items() if x.shape[1] == len(self.pairs)]
            means = torch.stack([self.mean(name) for name in full])
            grid = Grid.over({"": full, "layer": [a for a, _ in self.pairs]}, {"score": means})
            return grid.heat(title, "score", down="", across="layer", high=high)
        return heat_of_pairs(title, self.pairs, self.mean(condition), high=high)

    def lines(self, title: str, up: str = "score") -> Lines:
        """Mean scores over source layers (of the best target layer, item by item) by condition, with 95% intervals over items."""
        full = [name for name, x in self.scores.items() if x.shape[1] == len(self.pairs)]
        axes = {"item": list(range(len(self.groups))), "condition": full, "layer": self.layers}
        grid = Grid.over(axes, {"score": torch.stack([self._best_targets(name) for name in full], 1)})
        return grid.spread("item", seed=self.seed).lines(title, "score", by="condition", up=up)

    def rows(self, **more: Any) -> list[dict[str, Any]]:
        """A row per condition and cell: mean score and number of items."""
        return [
            {**more, "condition": name, "layer": a, "target_layer": b, "score": score, "items": len(x)}
            for name, x in self.scores.items()
            for (a, b), score in zip(
                self.pairs if x.shape[1] == len(self.pairs) else [(None, None)], self.mean(name).tolist(), strict=True
            )
        ]


def heat_of_pairs(title: str, pairs: Sequence[Pair], values: Float[Tensor, " pair"], **how: Any) -> Heat:
    """Numbers of pairs (l, l*) as a matrix, the last l on top; `how` as `Heat` takes it."""
    value = dict(zip(pairs, values.tolist(), strict=True))
    down, across = (list(dict.fromkeys(pair[i] for pair in pairs)) for i in (0, 1))
    down = down[::-1]
    matrix = [[value.get((a, b), math.nan) for b in across] for a in down]
    return Heat(title, list(map(str, down)), list(map(str, across)), matrix, **how)


def _halves(groups: Sequence[Any], seed: int) -> list[tuple[list[int], list[int]]]:
    """Items to choose on and items to measure on, both ways; no group is in both. Nothing where there is one group only."""
    names = sorted(set(groups), key=repr)
    if len(names) < 2:
        return []
    random.Random(seed).shuffle(names)
    first = set(names[: len(names) // 2])
    chosen = [i for i, name in enumerate(groups) if name in first]
    rest = [i for i, name in enumerate(groups) if name not in first]
    return [(chosen, rest), (rest, chosen)]


# --- vectors and controls


def vectors_of(model: LensModel, sources: Sequence[Source], hooks: Sequence[Any] = ()) -> Float[Tensor, "n layer d"]:
    """Every source at every layer `0..n_layers`, one pass per prompt length."""
    layers = list(range(n_layers(model) + 1))
    states, _ = read_vectors(model, ready_sources(model, sources, layers), layers, list(hooks))
    return torch.stack([torch.cat([by_layer[layer] for layer in layers]) for by_layer in states])


def random_like(vectors: Float[Tensor, "*n d"], seed: int | torch.Generator = 0) -> Float[Tensor, "*n d"]:
    """Directions at random, each of the length of its vector."""
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    x = torch.randn(vectors.shape, generator=generator).to(vectors)
    return x * (vectors.norm(dim=-1, keepdim=True) / x.norm(dim=-1, keepdim=True))


def others(answers: Sequence[Any], seed: int = 0) -> list[int]:
    """For every item another one with another answer, at random: whose vector the shuffled control takes.

    >>> others(["a", "b"])
    [1, 0]
    """
    rng, chosen = random.Random(seed), []
    for answer in answers:
        different = [i for i, other in enumerate(answers) if other != answer]
        if not different:
            raise ValueError(f"shuffled sources need two different answers, all {len(answers)} are {answer!r}")
        chosen.append(rng.choice(different))
    return chosen


@dataclass(frozen=True)
class Controlled:
    """Vectors of items, and the vectors of their controls."""

    vectors: Float[Tensor, "n layer d"]  # of the items
    shuffled: list[int]  # for every item the other one whose vector it takes
    noise: Float[Tensor, "n layer d"]  # random directions, each of the length of its vector
    mean: Float[Tensor, "1 layer d"]  # of all vectors

    @staticmethod
    def of(vectors: Float[Tensor, "n layer d"], answers: Sequence[Any], seed: int = 0) -> "Controlled":
        """The controls of vectors whose right answers are given."""
        return Controlled(vectors, others(answers, seed), random_like(vectors, seed), vectors.mean(0, keepdim=True))

    def ask(self, patched: Callable[[Source], Sequence[Any]], items: Sequence[int] | None = None) -> dict[str, list[Any]]:
        """The answers with each vector in place, in one sweep: per condition a list with an entry per item.

        Args:
            items: those that share this target prompt. All do by default; the answer with a shuffled vector is then known
                already, from another item.
        """
        if items is None:
            k = len(self.vectors)
            answers = list(patched(Source(torch.cat([self.vectors, self.noise, self.mean]))))
            answers[k:k] = [answers[i] for i in self.shuffled]
        else:
            at, swapped, k = list(items), [self.shuffled[i] for i in items], len(items)
            x = torch.cat([self.vectors[at], self.vectors[swapped], self.noise[at], self.mean])
            answers = list(patched(Source(x)))
        patched_answers, shuffled, noise = (answers[i * k : (i + 1) * k] for i in range(3))
        return {PATCHED: patched_answers, SHUFFLED: shuffled, RANDOM: noise, MEAN: [answers[-1]] * k}


def scores_of(
    texts: Mapping[str, Sequence[Sequence[str]]], answers: Sequence[str], score: Callable[[str, str], float]
) -> dict[str, Float[Tensor, "item cell"]]:
    """Scores of texts by condition, item and cell, each against the item's right answer."""
    return {
        name: torch.tensor([[float(score(text, answer)) for text in row] for row, answer in zip(rows, answers, strict=True)])
        for name, rows in texts.items()
    }


# --- results


@dataclass(frozen=True, repr=False)
class Result(Report):
    """The result of an experiment over cells.

    Attributes:
        cells: scores by condition and cell.
    """

    cells: Cells

    name = "result"

    @property
    def layers(self) -> list[Any]:
        """Source layers."""
        return self.cells.layers

    def tables(self) -> list[Table]:
        """Every condition in three numbers."""
        return [self.cells.table(f"{self.name}, {self.model}: {len(self.cells.groups)} items")]

    def pictures(self) -> dict[str, Picture]:
        """Mean scores by cell (by condition and layer where l* = l), and by source layer with their intervals."""
        title = f"{self.name}, {self.model}"
        return {"heat": self.cells.heat(title), "layers": self.cells.lines(title)}

    def rows(self) -> list[dict[str, Any]]:
        """A row per condition and cell (l, l*), with the mean score and the number of items."""
        return self.cells.rows()

    def __repr__(self) -> str:
        cells = self.cells
        return f"{type(self).__name__}({self.model!r}: {len(cells.groups)} items, {len(cells.pairs)} cells, {len(cells.scores)} conditions)"

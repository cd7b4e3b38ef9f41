"""Numbers with named axes, which become rows, tables, lines and heat maps by themselves."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_lenses.numerics import mean_interval
from tl_lenses.views import Heat, Lines

UPWARD = ("layer", "block", "translator")  # axes whose first label is at the bottom of a picture
Named = str | Mapping[str, str] | Sequence[str]  # values: one, several, or several with their headings


@dataclass(frozen=True)
class Table:
    """Rows to print; numbers are shares (in percent where asked), None and NaN stay empty."""

    title: str
    columns: list[str]
    rows: list[list[Any]]
    note: str = ""
    percent: bool = True

    def cell(self, value: Any) -> str:
        """A cell as text."""
        if isinstance(value, float):
            return "–" if math.isnan(value) else f"{100 * value:.1f}" if self.percent else f"{value:.3f}"
        return "" if value is None else str(value)


@dataclass(frozen=True)
class Grid:
    """Tensors over named axes.

    >>> grid = Grid({"lens": ["a", "b"], "layer": [0, 4]}, {"kl": (("lens", "layer"), torch.tensor([[2.0, 1.0], [1.5, 0.5]]))})
    >>> grid.rows()[1]
    {'lens': 'a', 'layer': 4, 'kl': 1.0}
    >>> grid.table("KL", "kl", across="lens").rows
    [['0', 2.0, 1.5], ['4', 1.0, 0.5]]
    >>> grid.at(lens="b")["kl"]
    tensor([1.5000, 0.5000])
    """

    # labels by axis, in the order of rows: `{"lens": ["logit", "tuned"], "layer": [0, 1, 2]}`
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    # by name, the axes that a tensor has, and the tensor: `{"kl": (("lens", "layer"), x)}`
    values: Mapping[str, tuple[Sequence[str], Tensor]] = field(default_factory=dict)
    # `[every axis]`, cells that were measured; None for all of them
    there: Bool[Tensor, "*axes"] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, (axes, x) in self.values.items():
            expected = [len(self.axes[axis]) for axis in axes]
            if list(x.shape) != expected:
                raise ValueError(f"{name!r} is {list(x.shape)}: expected {expected}, the axes {', '.join(axes)}")

    @staticmethod
    def of_rows(rows: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> "Grid":
        """Rows of numbers as a grid; cells without a row stay NaN and are left out again by `rows`.

        >>> Grid.of_rows([{"lens": "a", "layer": 0, "kl": 2.0}, {"lens": "b", "layer": 1, "kl": 1.0}], ["lens", "layer"]).rows()
        [{'lens': 'a', 'layer': 0, 'kl': 2.0}, {'lens': 'b', 'layer': 1, 'kl': 1.0}]
        """
        labels = {axis: list(dict.fromkeys(row[axis] for row in rows)) for axis in axes}
        for axis, seen in labels.items():
            if all(isinstance(x, int) for x in seen):
                labels[axis] = sorted(seen)
        shape = [len(seen) for seen in labels.values()]
        there = torch.zeros(shape, dtype=torch.bool)
        names = [name for name in rows[0] if name not in axes] if rows else []
        values = {name: torch.full(shape, torch.nan, dtype=torch.float64) for name in names}
        for row in rows:
            at = tuple(labels[axis].index(row[axis]) for axis in axes)
            there[at] = True
            for name in names:
                values[name][at] = row[name]
        return Grid(labels, {name: (tuple(axes), x) for name, x in values.items()}, there)

    @staticmethod
    def over(axes: Mapping[str, Sequence[Any]], values: Mapping[str, Tensor]) -> "Grid":
        """Tensors over the axes in this order; one with fewer dimensions has the first of them.

        >>> Grid.over({"lens": ["a", "b"], "layer": [0, 4]}, {"kl": torch.zeros(2, 2), "share": torch.ones(2)}).values["share"]
        (('lens',), tensor([1., 1.]))
        """
        return Grid(axes, {name: (tuple(axes)[: x.ndim], x) for name, x in values.items()})

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of a value."""
        if name not in self.values:
            raise KeyError(f"no {name!r}: there are {', '.join(self.values)}")
        return self.values[name][1]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def at(self, **labels: Any) -> "Grid":
        """A part of the grid: one label of an axis (the axis goes), or a list of labels.

        Raises:
            ValueError: a label that the axis does not have.
        """
        grid = self
        for axis, label in labels.items():
            grid = grid._cut(axis, label)
        return grid

    def _cut(self, axis: str, label: Any) -> "Grid":
        several, known = isinstance(label, list), list(self.axes[axis])
        if wrong := [x for x in (label if several else [label]) if x not in known]:
            raise ValueError(f"no {axis} {wrong[0]!r}: there are {', '.join(map(str, known))}")
        index: Any = [known.index(x) for x in label] if several else known.index(label)

        def cut(axes: Sequence[str], x: Tensor) -> tuple[Sequence[str], Tensor]:
            if axis not in axes:
                return axes, x
            place = list(axes).index(axis)
            if several:
                return axes, x.index_select(place, torch.tensor(index))
            return tuple(a for a in axes if a != axis), x.select(place, index)

        axes = {a: label if a == axis else x for a, x in self.axes.items() if several or a != axis}
        there = None if self.there is None else cut(tuple(self.axes), self.there)[1]
        return Grid(axes, {name: cut(*value) for name, value in self.values.items()}, there)

    def mean(self, axis: str) -> "Grid":
        """Means over an axis, in the tensors' own dtype; values without the axis stay."""

        def over(axes: Sequence[str], x: Tensor) -> tuple[Sequence[str], Tensor]:
            if axis not in axes:
                return axes, x
            x = x if x.is_floating_point() else x.double()
            return tuple(a for a in axes if a != axis), x.mean(list(axes).index(axis))

        return Grid({a: x for a, x in self.axes.items() if a != axis}, {n: over(*v) for n, v in self.values.items()})

    def spread(self, axis: str, *, seed: int = 0) -> "Grid":
        """`mean`, and the ends of its 95% interval over resampled labels of the axis, `NAME_low` and `NAME_high`.

        >>> sorted(Grid.over({"item": [0, 1], "layer": [0]}, {"kl": torch.zeros(2, 1)}).spread("item"))
        ['kl', 'kl_high', 'kl_low']
        """
        means, ends = self.mean(axis), {}
        for name, (axes, x) in self.values.items():
            if axis in axes:
                interval = mean_interval(x.movedim(list(axes).index(axis), 0), seed=seed)
                ends |= {f"{name}_{end}": (means.values[name][0], e) for end, e in zip(("low", "high"), interval, strict=True)}
        return Grid(means.axes, {**means.values, **ends})

    # --- as rows

    def _cells(self, names: Iterable[str]) -> tuple[list[str], dict[str, list[Any]], list[bool]]:
        """The axes that some values have, these values flat over all of them, and which cells were measured."""
        names = list(names)
        axes = [axis for axis in self.axes if any(axis in self.values[name][0] for name in names)]
        shape = [len(self.axes[axis]) for axis in axes]

        def flat(given: Sequence[str], x: Tensor) -> list[Any]:
            x = x.permute([list(given).index(axis) for axis in axes if axis in given])
            return x.reshape([len(self.axes[a]) if a in given else 1 for a in axes]).expand(shape).flatten().tolist()

        whole = self.there is not None and axes == list(self.axes)
        there = self.there.flatten().tolist() if whole and self.there is not None else [True] * math.prod(shape)
        return axes, {name: flat(*self.values[name]) for name in names}, there

    def rows(self, *names: str) -> list[dict[str, Any]]:
        """A dict per cell: the labels of its axes, then the values (all of them by default).

        A value that lacks an axis of another one is repeated along it.
        """
        axes, columns, there = self._cells(names or self.values)
        labels = itertools.product(*(self.axes[axis] for axis in axes))
        return [
            {**dict(zip(axes, label, strict=True)), **{name: column[i] for name, column in columns.items()}}
            for i, label in enumerate(labels)
            if there[i]
        ]

    # --- as a table or a picture

    def table(
        self, title: str, values: Named, *, down: str | Sequence[str] = "layer", across: str | None = None,
        by_label: bool = False, percent: bool | Iterable[str] = False, note: str = "",
        columns: Sequence[str] | None = None,
    ) -> Table:  # fmt: skip
        """A row per label of `down`, a column per value and label of `across`.

        Args:
            values: names of values, or `{name: heading}`; "{}" in a heading is the label of `across`.
            down: an axis, or several: a row for every combination that was measured.
            by_label: all values of the first label, then those of the next; otherwise all labels of the first value.
            percent: the whole table in percent, or the values that are written as "12.5 %".
        """
        headings = _named(values, "{}" if across else None)
        downs = [down] if isinstance(down, str) else list(down)
        labels = [None] if across is None else list(self.axes[across])
        pairs = [(name, x) for name in headings for x in labels]
        if by_label:
            pairs = [(name, x) for x in labels for name in headings]
        shares = set() if isinstance(percent, bool) else set(percent)
        cells: dict[tuple[Any, ...], dict[tuple[str, Any], Any]] = {}
        for name in headings:
            for row in self.rows(name):
                place = tuple(row[axis] for axis in downs)
                value = f"{100 * row[name]:.1f} %" if name in shares else row[name]
                cells.setdefault(place, {})[name, None if across is None else row.get(across)] = value
        return Table(
            title,
            [*(columns or downs), *(headings[name].format(x) for name, x in pairs)],
            [[*map(str, place), *(cell.get(pair) for pair in pairs)] for place, cell in cells.items()],
            note,
            percent=percent is True,
        )

    def series(self, values: Named, *, x: str = "layer", by: str | None = None) -> dict[str, list[tuple[Any, float]]]:
        """Points `(label of x, value)` of every line: a line per value, and per label of `by`.

        Args:
            values: names of values, or `{name: name of its line}`; "{}" is the label of `by`.
        """
        names = _named(values, "{}" if by else None)
        lines: dict[str, list[tuple[Any, float]]] = {}
        for label in [None] if by is None else self.axes[by]:
            grid = self if by is None else self.at(**{by: label})
            for name, called in names.items():
                lines[called.format(label)] = [(row[x], float(row[name])) for row in grid.rows(name)]
        return lines

    def lines(
        self, title: str, values: Named, *, x: str = "layer", by: str | None = None,
        ends: Mapping[str, tuple[str, str]] | None = None, **how: Any,
    ) -> Lines:  # fmt: skip
        """`series` as a picture, with a band around a line where the ends of its interval are known.

        Args:
            ends: the values that are the lower and upper end of a value; by default `NAME_low` and `NAME_high`, where there are such.
            how: `across`, `up`, `points`, `log_x`, `log_y` of `Lines`; `across` is x by default.
        """
        names = _named(values, "{}" if by else None)
        both = {name: (ends or {}).get(name, (f"{name}_low", f"{name}_high")) for name in names}
        lows, highs = (
            self.series({both[n][i]: called for n, called in names.items() if {*both[n]} <= {*self.values}}, x=x, by=by)
            for i in (0, 1)
        )
        bands = {name: [(x, low, high) for (x, low), (_, high) in zip(lows[name], highs[name], strict=True)] for name in lows}
        return Lines(title, self.series(values, x=x, by=by), **{"across": x, "bands": bands, **how})

    def heat(self, title: str, value: str, *, down: str, across: str, **how: Any) -> Heat:
        """A value as a matrix, the last layer or block on top.

        `how`: `high`, `low`, `diverging`, `good`, `hover`, and other names for `down` and `across` in `labels`.
        """
        axes, x = self.values[value]
        if set(axes) != {down, across}:
            raise ValueError(f"{value!r} has the axes {', '.join(axes)}, a heat map needs {down} and {across} alone")
        matrix = (x if tuple(axes) == (down, across) else x.T).double()
        rows, named = list(map(str, self.axes[down])), how.pop("labels", (down, across))
        if down in UPWARD:
            rows, matrix = rows[::-1], matrix.flip(0)
        return Heat(title, rows, list(map(str, self.axes[across])), matrix.tolist(), *named, **how)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Grid":
        """Every value changed by a function that keeps its shape, such as a change of units."""
        return Grid(self.axes, {name: (axes, function(x)) for name, (axes, x) in self.values.items()}, self.there)

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __repr__(self) -> str:
        axes = ", ".join(f"{len(labels)} {axis}" for axis, labels in self.axes.items())
        return f"Grid({axes}: {', '.join(self.values)})"


def _named(values: Named, blank: str | None) -> dict[str, str]:
    """Names of values with their headings: a single one by its label alone, where there are labels."""
    if isinstance(values, str):
        return {values: blank or values}
    if isinstance(values, Mapping):
        return dict(values)
    return {name: f"{name}, {blank}" if blank else name for name in values}


def interval(mean: float, low: float, high: float, *, digits: int = 2) -> str:
    """A number with its interval, as a cell of a table.

    >>> interval(0.5, 0.25, 0.75), interval(math.nan, 0.0, 0.0)
    ('0.50 (0.25, 0.75)', '–')
    """
    return "–" if math.isnan(mean) else f"{mean:.{digits}f} ({low:.{digits}f}, {high:.{digits}f})"

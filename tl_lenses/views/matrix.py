"""Any matrix in the same frame as a trajectory: the page, the picture, the text and the numbers."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Num
from rich.table import Table
from rich.text import Text
from torch import Tensor

from tl_lenses.checks import one_of, plain_text, several
from tl_lenses.files import csv_text, readable
from tl_lenses.views import document
from tl_lenses.views.cells import cell_style, color_legend
from tl_lenses.views.heatmap import Heat
from tl_lenses.views.saving import save_as
from tl_lenses.views.style import Stat, number, scale_of
from tl_lenses.views.term import to_text

Labels = Iterable[Any] | None


@dataclass(frozen=True, repr=False)
class Matrix:
    """A matrix to show; `picture` is its heat map."""

    picture: Heat

    def __repr__(self) -> str:
        return f"Matrix({self.picture.title!r}, {len(self.picture.rows)} x {len(self.picture.columns)})"

    def __rich__(self) -> Table:
        heat, scale = self.picture, self.picture.scale
        table = Table(
            title=heat.title, caption=color_legend(scale), box=None, padding=0, title_justify="left", caption_justify="left"
        )
        table.add_column(Text(f"{heat.down} "), justify="right")
        for label in heat.columns:
            table.add_column(Text(f" {label}"), justify="right")
        for label, row in zip(heat.rows, heat.values, strict=True):
            table.add_row(
                Text(f"{label} "), *(Text(f" {number(scale.stat, v)}", cell_style(scale.color(v), dim=True)) for v in row)
            )
        return table

    def __str__(self) -> str:
        return to_text(self.__rich__())

    def _repr_html_(self) -> str:
        return document.in_notebook(self.html(), len(self.picture.rows))

    def html(self) -> str:
        """The page: one file, offline."""
        return _page(self.picture)

    def svg(self) -> str:
        """A standalone SVG."""
        return self.picture.svg()

    def png(self) -> bytes:
        """The SVG's picture as PNG (extra `plot`)."""
        return self.picture.png()

    def figure(self) -> Any:
        """A plotly figure (extra `plot`)."""
        return self.picture.figure()

    def to_frame(self) -> Any:
        """A pandas frame, a row per cell: row, column, value."""
        import pandas

        heat = self.picture
        cells = ((r, c, v) for r, row in zip(heat.rows, heat.values, strict=True) for c, v in zip(heat.columns, row, strict=True))
        return pandas.DataFrame(cells, columns=["row", "column", "value"])

    def save(self, path: str | Path, *, overwrite: bool = True) -> Path:
        """Write `.html`, `.svg`, `.png` (extra `plot`) or `.csv`. See `views.save_as`."""
        writers: dict[str, Callable[[], str | bytes]] = {
            ".html": self.html, ".svg": self.svg, ".png": self.png, ".csv": lambda: csv_text(self.to_frame()),
        }  # fmt: skip
        return save_as(path, writers, example="heat.html", overwrite=overwrite)


def _page(heat: Heat) -> str:
    """The page: the same cells, keys and lines as a trajectory's."""
    flat = lambda rows: [v for row in reversed(rows) for v in row]
    texts = [[heat.text(r, c) for c in range(len(heat.columns))] for r in range(len(heat.rows))]
    words, places, labels = document.Vocabulary(), list(range(len(heat.columns))), [readable(r) for r in reversed(heat.rows)]
    row = {
        "name": "", "positions": places, "tokens": [words.token(c) for c in heat.columns], "targets": [-1] * len(places),
        "tracked": [], "faded": [i for i in places if heat.faded is not None and heat.faded[i]],
    }  # fmt: skip
    cells = {
        "shown": [words.token(t) if t else -1 for t in flat(texts)],
        "stats": {"value": list(map(document.short, flat(heat.values)))},
    }
    data = document.shared("value", "value", follow=False) | document.ranks(2) | {
        "layers": labels, "names": labels, "k": 0, "stats": {"value": document.scale_data(heat.scale)}, "rows": [row],
        "lenses": [{"name": "", "rows": [cells | {"top": [], "probs": []}]}], "labelled": True, "turned": True,
        "words": [heat.down or "row", heat.across or "column"], "vocab": words.entries,
    }  # fmt: skip
    columns = [(document.token_html(c), "") for c in heat.columns]
    content = lambda text: escape(readable(text)) if text else ""
    rows = [
        (readable(label), "", [(v, "", content(t)) for v, t in zip(values, line, strict=True)])
        for label, values, line in zip(heat.rows, heat.values, texts, strict=True)
    ]
    corner = " \\ ".join(filter(None, (heat.down, heat.across)))
    return document.written(heat.title, escape(heat.note), heat.scale, document.table(heat.scale, corner, columns, rows), data)


def heat(
    values: Num[Tensor, "row column"] | Sequence[Sequence[float]],
    *,
    rows: Labels = None,
    columns: Labels = None,
    title: str = "",
    unit: str = "",
    good: Literal["high", "low"] | None = "high",
    down: str = "",
    across: str = "",
) -> Matrix:
    """Any matrix as a page, an SVG, a table in the terminal or a frame; bright is good.

    Args:
        values: numbers, row 0 on top; NaN stays empty.
        rows, columns: a label each; by default their numbers.
        title: the heading.
        unit: of the values, for the legend ("nats").
        good: which end is bright; None has two colours around zero.
        down, across: names of the axes ("layer", "head").

    Raises:
        TypeError, ValueError: values that are no matrix, or labels that do not fit it.

    Example:
        >>> import tl_lenses as tll
        >>> patched = tll.views.heat([[0.0, 1.5], [0.2, 0.1]], down="layer", across="head", title="patched", unit="nats")
        >>> patched
        Matrix('patched', 2 x 2)
        >>> path = patched.save("patched.svg")          # doctest: +SKIP
    """
    given: Any = values.detach().cpu() if isinstance(values, Tensor) else values
    given = given.tolist() if hasattr(given, "tolist") else given  # of numpy too
    matrix = [several("a row of values", row, "numbers") for row in several("values", given, "rows")]
    if not matrix or not matrix[0] or len({len(row) for row in matrix}) != 1:
        raise ValueError("values must be a matrix [row, column]: rows of equal length, with a number in each cell")
    if any(not isinstance(v, (int, float)) for row in matrix for v in row):
        raise TypeError("values must be a matrix [row, column] with a number in each cell: of more axes select some first")
    if good is not None:
        one_of("good", good, ("high", "low"))
    labels = lambda name, given, n: [str(x) for x in (range(n) if given is None else several(name, given, "labels"))]
    for name, text in (("title", title), ("unit", unit), ("down", down), ("across", across)):
        plain_text(name, text)
    names = labels("rows", rows, len(matrix)), labels("columns", columns, len(matrix[0]))
    ends = {"high": ("low", "high"), "low": ("high", "low"), None: ("negative", "positive")}[good]
    finite = [float(v) for row in matrix for v in row if math.isfinite(v)] or [0.0]
    # From end to end: in a matrix of patching effects the few far from 0 are what there is to see.
    low, high, diverging = min(finite), max(finite), good is None
    stat = Stat("value", title or "value", unit, good, "linear", diverging, low, high, dark=ends[0], bright=ends[1])
    colors = scale_of(stat, finite)
    return Matrix(Heat(title, *names, matrix, down, across, colors=colors))

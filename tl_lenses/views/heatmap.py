"""Heat maps: one value that is drawn as SVG and PNG (no browser) or as an interactive plotly figure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from typing import Any, Literal

from tl_lenses.checks import plain_text, several
from tl_lenses.views.canvas import BAR, MARGIN, SIZE, Box, Shape, Words, advance, legend, to_png, to_svg
from tl_lenses.views.glyphs import cell_width, clip, clip_parts, parts, readable
from tl_lenses.views.style import Scale, Stat, ink, number

_ROW = 23  # height of a row, pixels
_PAD = 7  # from the edge of a cell to its text
_NARROWEST = 3  # characters
_BARS, _BAR_INK = 110, "#1d91c0"  # width of a whole bar, and its colour
_SLIDE = 1920  # pixels
_MONO = "Menlo, Consolas, DejaVu Sans Mono, monospace"
_plotly = partial(escape, quote=False)  # plotly shows `&quot;` as it is written


@dataclass(frozen=True)
class Heat:
    """A matrix to draw: row 0 at the top, bright is high (or good, with `colors`), NaN stays empty.

    Attributes:
        title: the heading.
        rows, columns: a label each.
        values: `[row][column]`.
        down, across: names of the two axes.
        texts: the texts of the cells, left-aligned; by default the values, centred.
        high: the value of the brightest colour.
        low: the value of the darkest one; with `diverging` it is `-high`, and 0 is neutral.
        diverging: two colours, for values of both signs.
        good: which end is bright.
        colors: colour range of a statistic, with its legend; replaces `high`, `low` and `diverging`.
        note: below the title; lines with "\\n".
        bold: `[row][column]`, which texts are bold.
        hover: `[row][column]`, the hover text of a cell (lines with "\\n"); by default its labels and its value.
        beside: a text to the right of each row.
        bars: a share from 0 to 1 for each row, a bar to the right of that text.
        above: the heading of these texts.
        widest: cut texts and column labels to this many characters.
        faded: which columns are shown faintly.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    down: str = "l"
    across: str = "l*"
    texts: Sequence[Sequence[str]] | None = None
    high: float = 1.0
    low: float = 0.0
    diverging: bool = False
    good: Literal["high", "low"] = "high"
    colors: Scale | None = None
    note: str = ""
    bold: Sequence[Sequence[bool]] | None = None
    hover: Sequence[Sequence[str]] | None = None
    beside: Sequence[str] | None = None
    bars: Sequence[float] | None = None
    above: str = ""
    widest: int | None = None
    faded: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        plain_text("title", self.title)
        rows, columns = (several(name, getattr(self, name), "labels") for name in ("rows", "columns"))
        if wrong := [label for label in [*rows, *columns] if not isinstance(label, str)]:
            raise TypeError(f"a label must be text, got a {type(wrong[0]).__name__}")
        values = [several("a row of values", row, "numbers") for row in several("values", self.values, "rows")]
        if len(values) != len(rows) or any(len(row) != len(columns) for row in values):
            raise ValueError(f"values must be [{len(rows)}][{len(columns)}], a number for each row and column")
        if wrong := [v for row in values for v in row if not isinstance(v, (int, float))]:
            raise TypeError(f"a value must be a number, got a {type(wrong[0]).__name__}")

    @property
    def scale(self) -> Scale:
        """The colour range of the values."""
        if self.colors is not None:
            return self.colors
        high = (abs(self.high) or 1.0) if self.diverging else self.high if self.high > self.low else self.low + 1.0
        low = -high if self.diverging else self.low
        finite = [v for row in self.values for v in row if math.isfinite(v)]
        beyond = (any(v < low for v in finite), any(v > high for v in finite))
        return Scale(Stat("value", "", "", self.good, diverging=self.diverging), low, high, beyond)

    def text(self, r: int, c: int) -> str:
        """The text of a cell."""
        value = self.values[r][c]
        return self.texts[r][c] if self.texts is not None else "" if math.isnan(value) else number(self.scale.stat, value)

    def about(self, r: int, c: int) -> str:
        """The hover text of a cell."""
        if self.hover is not None:
            return self.hover[r][c]
        places = ((self.down, self.rows[r]), (self.across, self.columns[c]))
        where = ", ".join(f"{name} = {label}".removeprefix(" = ") for name, label in places if name or label)
        return f"{where}: {self.values[r][c]:.3f}"

    def svg(self) -> str:
        """A standalone SVG that needs no fonts and follows the reader's dark or light theme.

        >>> Heat("accuracy", ["0"], ["0", "1"], [[0.0, 1.0]]).svg().startswith("<svg")
        True
        """
        return Panels([self]).svg()

    def _repr_svg_(self) -> str:
        return self.svg()  # of notebooks

    def png(self) -> bytes:
        """The SVG's picture as PNG, 2 dots a pixel (extra `plot`).

        Raises:
            ImportError: matplotlib is not installed.
        """
        return Panels([self]).png()

    def wrapped(self, width: int) -> "Panels":
        """In blocks of columns, one below the other, each at most `width` pixels wide (but one column at least)."""
        room, blocks, used = width - 2 * MARGIN - _stub(self), [[]], 0
        for c, column in enumerate(_widths(self)):
            if blocks[-1] and used + column > room:
                blocks.append([])
                used = 0
            blocks[-1].append(c)
            used += column
        return Panels([columns_of(self, block) for block in blocks])

    def figure(self) -> Any:
        """A plotly figure (extra `plot`); its `z` are the values (log₁₀ of them on a logarithmic scale).

        Raises:
            ImportError: plotly is not installed.
        """
        try:
            import plotly.graph_objects as go
        except ImportError:
            raise ImportError("figures need plotly: pip install tl-lenses[plot]") from None
        cells = [range(len(self.columns))] * len(self.rows)
        per_cell = lambda f: [[f(r, c) for c in columns] for r, columns in enumerate(cells)]
        scale = self.scale
        text = lambda r, c: _plotly(_cut(self, self.text(r, c)))
        # plotly drops spaces that repeat
        about = lambda r, c: _plotly(self.about(r, c)).replace("\n", "<br>").replace("  ", "\u00a0\u00a0")
        heatmap = go.Heatmap(
            z=per_cell(lambda r, c: _axis(scale, self.values[r][c])),
            x=list(range(len(self.columns))),  # numbers, not labels: equal labels would fall into one column
            y=list(range(len(self.rows))),
            zmin=_axis(scale, scale.low),
            zmax=_axis(scale, scale.high),
            colorscale=_colorscale(scale),
            colorbar=_colorbar(scale),
            text=per_cell(lambda r, c: f"<b>{text(r, c)}</b>" if self.bold is not None and self.bold[r][c] else text(r, c)),
            texttemplate="%{text}",
            textfont={"size": 11, "family": _MONO},
            customdata=per_cell(about),
            hovertemplate="%{customdata}<extra></extra>",
            hoverlabel={"align": "left", "font": {"family": _MONO}},
            hoverongaps=False,
            xgap=1,
            ygap=1,
        )
        return _arranged(self, go.Figure(heatmap))


@dataclass(frozen=True)
class Panels:
    """Heat maps one below the other, such as several lenses on one scale; equal titles, notes and legends stand once."""

    heats: Sequence[Heat]

    def svg(self) -> str:
        """A standalone SVG of all of them."""
        return to_svg(self.heats[0].title, self.heats[0].scale.stat.title, *_stacked(self.heats))

    def _repr_svg_(self) -> str:
        return self.svg()  # of notebooks

    def png(self) -> bytes:
        """The SVG's picture as PNG (extra `plot`)."""
        return to_png(*_stacked(self.heats))


@dataclass(frozen=True)
class Slide:
    """Heat maps side by side on one scale, in 16:9 and 1920 pixels wide: for a talk."""

    title: str
    note: str
    heats: Sequence[Heat]

    def svg(self) -> str:
        """A standalone SVG."""
        return to_svg(self.title, self.heats[0].scale.stat.title, *_slide(self), shown=_SLIDE)

    def _repr_svg_(self) -> str:
        return self.svg()  # of notebooks

    def png(self) -> bytes:
        """The SVG's picture as PNG (extra `plot`)."""
        return to_png(*_slide(self), shown=_SLIDE)


def _slide(slide: Slide) -> tuple[int, int, list[Shape]]:
    """Width, height and shapes, pixels: heading and legend, the maps below from left to right, in the middle of 16:9."""
    shapes: list[Shape] = [Words(MARGIN, 33, slide.title, "title"), Words(MARGIN, 54, slide.note, "ui soft")]
    bar, y = legend(slide.heats[0].scale, MARGIN, 81)
    shapes += bar
    x, high, words = 0, 0, MARGIN + max(round(9.6 * len(slide.title)), 7 * len(slide.note))
    for heat in slide.heats:
        wide, tall, drawn = _drawn(heat, no_note=True, no_legend=True)
        shapes += [replace(shape, x=shape.x + x, y=shape.y + y) for shape in drawn]
        x, high = x + wide, max(high, tall)
    width, height = max(x, words), y + high
    full = max(width, math.ceil(height * 16 / 9 / 16) * 16)
    down = (round(full * 9 / 16) - height) // 2
    return full, round(full * 9 / 16), [replace(s, x=s.x + (full - width) // 2, y=s.y + down) for s in shapes]


def _stacked(heats: Sequence[Heat]) -> tuple[int, int, list[Shape]]:
    """Width, height and shapes, pixels."""
    width, y, shapes = 0, 0, list[Shape]()
    for before, heat in zip([None, *heats], heats, strict=False):
        same = [before is not None and f(before) == f(heat) for f in (lambda h: h.title, lambda h: h.note, lambda h: h.scale)]
        wide, high, drawn = _drawn(heat, *same)
        shapes += [replace(shape, y=shape.y + y) for shape in drawn]
        width, y = max(width, wide), y + high
    return width, y, shapes


def columns_of(heat: Heat, keep: Sequence[int]) -> Heat:
    """Some of the columns, on the same scale."""
    pick = lambda rows: None if rows is None else [[row[c] for c in keep] for row in rows]
    line = lambda row: None if row is None else [row[c] for c in keep]
    return replace(
        heat, columns=line(heat.columns), values=pick(heat.values), texts=pick(heat.texts), bold=pick(heat.bold),
        hover=pick(heat.hover), faded=line(heat.faded), colors=heat.scale,
    )  # fmt: skip


def _cut(heat: Heat, text: str) -> str:
    """A text or column label as it is written."""
    shown = readable(text) if text else ""
    return shown if heat.widest is None else clip(shown, heat.widest)


# --- SVG and PNG


def _widths(heat: Heat) -> list[int]:
    """Of the columns, pixels."""
    rows = range(len(heat.rows))
    needs = [
        max(cell_width(_cut(heat, t)) for t in [label, *(heat.text(r, c) for r in rows)]) for c, label in enumerate(heat.columns)
    ]
    if heat.texts is None:
        needs = [max(needs, default=0)] * len(needs)
    return [round(advance(max(n, _NARROWEST))) + 2 * _PAD for n in needs]


def _stub(heat: Heat) -> int:
    """Width of the rows' labels, pixels."""
    return round(advance(max(map(cell_width, [heat.down, *heat.rows])))) + 2 * _PAD


def _drawn(heat: Heat, no_title: bool = False, no_note: bool = False, no_legend: bool = False) -> tuple[int, int, list[Shape]]:
    """Width, height and shapes, pixels."""
    scale, centred = heat.scale, heat.texts is None
    columns = range(len(heat.columns))
    widths, stub = _widths(heat), _stub(heat)
    lefts = [MARGIN + stub + sum(widths[:c]) for c in range(len(widths) + 1)]

    y, shapes = 0, list[Shape]()
    if not no_title:
        y += 33
        shapes.append(Words(MARGIN, y, heat.title, "title"))
    if heat.note and not no_note:
        for line in heat.note.split("\n"):
            y += 19
            shapes.append(Words(MARGIN, y, line, "ui soft"))
    if not no_legend:
        bar, y = legend(scale, MARGIN, y + (24 if heat.note and not no_note else 27))
        shapes += bar
    if heat.across:
        y += 26
        shapes.append(Words(lefts[0] + _PAD * (not centred), y, heat.across, "soft"))
    y += 20 if heat.across else 29
    shapes.append(Words(lefts[0] - _PAD, y, heat.down, "soft", "end"))
    top = y + 9  # of the first row of cells
    beside = round(advance(max(map(cell_width, [heat.above, *(heat.beside or [])])))) + 2 * _PAD
    if heat.above:
        shapes.append(Words(lefts[-1] + _PAD, y, heat.above, "soft"))
    for c in columns:
        shapes.append(_in_cell(heat, lefts[c], y, widths[c], heat.columns[c], "" if centred else "b"))
    for r, label in enumerate(heat.rows):
        y = top + r * _ROW
        shapes.append(Words(lefts[0] - _PAD, y + 16, label, "soft", "end"))
        for c in columns:
            color = scale.color(heat.values[r][c])
            faint = heat.faded is not None and heat.faded[c]
            shapes.append(Box(lefts[c], y, widths[c] - 1, _ROW - 1, color, heat.about(r, c), 2, faint))
            kind = ("b " if heat.bold is not None and heat.bold[r][c] else "") + ("soft" if faint or not color else "")
            words = _in_cell(heat, lefts[c], y + 16, widths[c], heat.text(r, c), kind.strip())
            shapes.append(replace(words, color=ink(color) if color and not faint else None))
        if heat.beside is not None:
            shapes.append(Words(lefts[-1] + _PAD, y + 16, heat.beside[r], ""))
        if heat.bars is not None:
            shapes.append(Box(lefts[-1] + beside, y + 5, max(1, round(_BARS * heat.bars[r])), _ROW - 11, _BAR_INK))
    ends = round(0.6 * SIZE * len(scale.stat.dark + scale.stat.bright + " " * 8))
    needed = (
        lefts[-1] + beside * (heat.beside is not None) + _BARS * (heat.bars is not None),
        MARGIN + max(BAR, round(0.6 * SIZE * len(scale.stat.title))) + ends,
        MARGIN + round(9.6 * len(heat.title)),
        7 * max(map(len, heat.note.split("\n"))) - MARGIN,
        MARGIN + stub + _PAD + round(advance(cell_width(heat.across))),
    )
    return max(needed) + MARGIN, top + _ROW * len(heat.rows) + MARGIN, shapes


def _in_cell(heat: Heat, x: int, y: int, width: int, text: str, kind: str) -> Words:
    """A text in its column: numbers in the middle, words from the left, the spaces at a token's ends lighter."""
    pieces = parts(text) if text else []
    pieces = tuple(pieces if heat.widest is None else clip_parts(pieces, heat.widest))
    return Words(x + width / 2, y, pieces, kind, "middle") if heat.texts is None else Words(x + _PAD, y, pieces, kind)


# --- plotly


def _axis(s: Scale, value: float) -> float | None:
    """A value on the figure's colour axis: itself, its log₁₀ on a logarithmic scale, None where undefined."""
    if not math.isfinite(value):
        return None
    return math.log10(max(value, 1e-12)) if s.stat.curve == "log" else value


def _colorscale(s: Scale) -> list[tuple[float, str]]:
    """Our colours at even steps of the colour axis. A sqrt curve so bends the colours and leaves the axis linear."""
    n = 128
    low, high = _axis(s, s.low) or 0.0, _axis(s, s.high) or 0.0
    at = (low + i / n * (high - low) for i in range(n + 1))
    return [(i / n, s.color(10**v if s.stat.curve == "log" else v) or "#000000") for i, v in enumerate(at)]


def _colorbar(s: Scale) -> dict[str, Any]:
    """With the legend's three values, which say where cells lie beyond an end."""
    return {
        "title": {"text": _plotly(s.stat.title), "side": "right"}, "thickness": 14, "tickmode": "array",
        "tickvals": [_axis(s, v) for v in s.ticks()], "ticktext": s.labels(),
    }  # fmt: skip


def _arranged(heat: Heat, fig: Any) -> Any:
    """The figure with its size, its labels and the texts beside the rows."""
    rows, columns = list(map(_plotly, heat.rows)), [_plotly(_cut(heat, label)) for label in heat.columns]
    texts = [*columns, *(_cut(heat, heat.text(r, c)) for r in range(len(rows)) for c in range(len(columns)))]
    left = 50 + 7 * max(map(cell_width, heat.rows), default=0)
    inner = max(60, 7 * max(map(cell_width, texts), default=0) + 4) * len(columns)
    room = 40 + round(7 * max(map(cell_width, heat.beside))) if heat.beside else 0
    if heat.beside:
        inner = max(inner, 130)
        fig.update_xaxes(domain=[0, inner / (inner + room)])
    for y, text in enumerate(heat.beside or []):
        style = {"font": {"size": 11, "family": _MONO}, "showarrow": False, "xanchor": "left", "align": "left"}
        fig.add_annotation(x=len(columns) - 0.5, y=y, xshift=10, text=_plotly(text), **style)
    note = f"<br><sub>{_plotly(heat.note).replace(chr(10), '; ')}</sub>" if heat.note else ""
    fig.update_layout(
        title={"text": _plotly(heat.title) + note, "font": {"size": 16}},
        width=max(480, inner + room + left + 110),
        height=max(300, 25 * len(rows) + 190),
        margin={"l": left, "r": 20, "t": 80, "b": 80},
        plot_bgcolor="rgba(0,0,0,0)",
    )
    plain = {"tickmode": "array", "showgrid": False, "zeroline": False, "tickfont": {"family": _MONO}}
    fig.update_xaxes(
        tickvals=list(range(len(columns))), ticktext=columns, title=_plotly(heat.across) or None,
        tickangle=-40 if any(cell_width(label) > 4 for label in columns) else None, **plain,
    )  # fmt: skip
    fig.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=rows, title=_plotly(heat.down) or None, autorange="reversed", **plain
    )
    return fig

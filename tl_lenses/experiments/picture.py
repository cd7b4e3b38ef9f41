"""Pictures of results, as SVG that needs nothing and as plotly figures: heat maps here, lines and points in `lines.py`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from tl_lenses.experiments.lines import Lines, lines_figure, lines_svg

__all__ = ["Heat", "Lines", "Picture", "figure_of", "heat_figure", "heat_svg", "svg_of"]

_ROW, _COLUMN, _MARGIN, _FONT = 24, 52, 20, 12


@dataclass(frozen=True)
class Heat:
    """A matrix to draw: rows from the top, bright is high, NaN stays empty.

    Attributes:
        title: what it shows.
        rows, columns: a label each.
        values: `[row][column]`.
        down, across: what the rows and the columns are.
        texts: what to write into the cells; the values by default.
        high: the value of the brightest colour.
        low: the value of the darkest one; with `diverging` it is `-high`, and 0 is neutral.
        diverging: two colours, for values of both signs.
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

    @property
    def floor(self) -> float:
        """The value at the other end of the colours."""
        return -self.high if self.diverging else self.low

    def shade(self, value: float) -> float:
        """Where a value lies between the ends of the colours, 0 to 1."""
        return min(max((value - self.floor) / ((self.high - self.floor) or 1.0), 0.0), 1.0)

    def text(self, r: int, c: int) -> str:
        """What is written into a cell."""
        value = self.values[r][c]
        return self.texts[r][c] if self.texts is not None else "" if math.isnan(value) else f"{value:.2f}"


def heat_svg(heat: Heat) -> str:
    """A standalone SVG.

    >>> heat_svg(Heat("accuracy", ["0"], ["0", "1"], [[0.0, 1.0]])).startswith("<svg")
    True
    """
    from tl_lenses.views.style import ink, ramp

    columns = range(len(heat.columns))
    words = [heat.text(r, c) for r in range(len(heat.rows)) for c in columns]
    wide = max([_COLUMN, *(8 * len(word) + 14 for word in [*words, *heat.columns])])
    stub = _MARGIN + 14 + 7 * max(len(label) for label in [heat.down, *heat.rows])
    top = 84
    width = max(stub + wide * len(heat.columns) + _MARGIN, 2 * _MARGIN + 8 * len(heat.title), 320)
    height = top + _ROW * len(heat.rows) + _MARGIN
    face = 'font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" font-size="{_FONT}" {face}>',
        f"<title>{escape(heat.title)}</title>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        f'<text x="{_MARGIN}" y="32" font-size="15" font-weight="650" font-family="system-ui, sans-serif" '
        f'fill="#1b1f24">{escape(heat.title)}</text>',
        f'<text x="{stub - 8}" y="{top - 8}" text-anchor="end" fill="#5d6673">{escape(heat.down)}</text>',
        f'<text x="{stub}" y="{top - 26}" fill="#5d6673">{escape(heat.across)}</text>',
    ]
    for c, label in enumerate(heat.columns):
        x = stub + c * wide + wide / 2
        out.append(f'<text x="{x:g}" y="{top - 8}" text-anchor="middle" fill="#1b1f24">{escape(label)}</text>')
    for r, label in enumerate(heat.rows):
        y = top + r * _ROW
        out.append(f'<text x="{stub - 8}" y="{y + 16}" text-anchor="end" fill="#1b1f24">{escape(label)}</text>')
        for c in columns:
            value = heat.values[r][c]
            color = "#eceff3" if math.isnan(value) else ramp(heat.shade(value), heat.diverging)
            x = stub + c * wide
            where = f"{heat.down} = {label}, {heat.across} = {heat.columns[c]}: {value:.3f}"
            out.append(
                f'<rect x="{x}" y="{y}" width="{wide - 1}" height="{_ROW - 1}" rx="2" fill="{color}"><title>'
                f"{escape(where)}</title></rect>"
                f'<text x="{x + wide / 2:g}" y="{y + 16}" text-anchor="middle" fill="{ink(color)}" '
                f'pointer-events="none" xml:space="preserve">{escape(heat.text(r, c))}</text>'
            )
    return "\n".join([*out, "</svg>", ""])


def heat_figure(heat: Heat) -> Any:
    """A plotly figure (extra `plot`).

    Raises:
        ImportError: plotly is not installed.
    """
    from tl_lenses.views.style import ramp

    try:
        import plotly.graph_objects as go
    except ImportError:
        raise ImportError("figures need plotly: pip install tl-lenses[plot]") from None
    cells = [[escape(heat.text(r, c), quote=False) for c in range(len(heat.columns))] for r in range(len(heat.rows))]
    figure = go.Figure(
        go.Heatmap(
            z=[[None if math.isnan(v) else v for v in row] for row in heat.values],
            x=list(range(len(heat.columns))),
            y=list(range(len(heat.rows))),
            zmin=heat.floor,
            zmax=heat.high,
            colorscale=[(i / 64, ramp(i / 64, heat.diverging)) for i in range(65)],
            text=cells,
            texttemplate="%{text}",
            xgap=1,
            ygap=1,
            hoverongaps=False,
        )
    )
    plain = {"tickmode": "array", "showgrid": False, "zeroline": False}
    figure.update_xaxes(
        tickvals=list(range(len(heat.columns))), ticktext=list(map(escape, heat.columns)), title=heat.across, **plain
    )
    figure.update_yaxes(
        tickvals=list(range(len(heat.rows))), ticktext=list(map(escape, heat.rows)), title=heat.down,
        autorange="reversed", **plain,
    )  # fmt: skip
    figure.update_layout(
        title={"text": escape(heat.title, quote=False), "font": {"size": 16}},
        width=max(480, 60 * len(heat.columns) + 240),
        height=max(320, 26 * len(heat.rows) + 180),
        plot_bgcolor="rgba(0,0,0,0)",
    )
    return figure


Picture = Heat | Lines


def svg_of(picture: Picture) -> str:
    """A picture as a standalone SVG."""
    return heat_svg(picture) if isinstance(picture, Heat) else lines_svg(picture)


def figure_of(picture: Picture) -> Any:
    """A picture as a plotly figure (extra `plot`)."""
    return heat_figure(picture) if isinstance(picture, Heat) else lines_figure(picture)

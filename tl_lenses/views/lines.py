"""Lines, points and bars in one frame, with bands, drawn by matplotlib (extra `plot`) as SVG and PNG."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from textwrap import fill
from typing import Any

from tl_lenses.checks import plain_text, several
from tl_lenses.files import readable
from tl_lenses.views.canvas import plotting
from tl_lenses.views.style import LINES

LABELS = 12  # of more lines the names stand in a legend, or at a bar of their colours
GAP = 0.055  # between two names, of the frame's height
_LAYER = re.compile(r"(layer )?\d+")
Point = tuple[float | int | str, float | int]


@dataclass(frozen=True)
class Lines:
    """Series to draw in one frame.

    Attributes:
        title: the heading.
        series: points `(x, y)` by name; a y that is not finite leaves a gap.
            Names of up to 12 lines stand at their ends; names that are numbers or "layer 3" have colours from dark to bright, and more
            than 12 of them a bar of these colours.
        across, up: names of the axes, with units.
        points: dots alone (a scatter plot); otherwise they are joined.
        log_x, log_y: logarithmic axes; values must be positive.
        bands: `(x, low, high)` by name of a series: a light area around its line, or an error bar on its bar or dot.
        bars: bars side by side instead of lines; x may be text.
        ticks: the text at each x; otherwise numbers.
    """

    title: str
    series: Mapping[str, Sequence[Point]]
    across: str = "layer"
    up: str = ""
    points: bool = False
    log_x: bool = False
    log_y: bool = False
    bands: Mapping[str, Sequence[tuple[float | int | str, float | int, float | int]]] = field(default_factory=dict)
    bars: bool = False
    ticks: Mapping[Any, str] | None = None

    def __post_init__(self) -> None:
        plain_text("title", self.title)
        if not isinstance(self.series, Mapping):
            raise TypeError(f"series must be a mapping {{name: points}}, got {type(self.series).__name__}")
        for name, points in self.series.items():
            pairs = several(f"series {name!r}", points, "(x, y)")
            if not all(isinstance(p, (tuple, list)) and len(p) == 2 for p in pairs):
                raise TypeError(f"series {name!r} must be a list of points (x, y)")

    def figure(self) -> Any:
        """A matplotlib figure (extra `plot`), free of pyplot's state.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: no finite point, a point that a logarithmic axis cannot have, or a band without its series.
        """
        return _drawn(self)

    def svg(self) -> str:
        """A standalone SVG, the same bytes for the same value; text stays text.

        >>> Lines("KL", {"tuned": [(0, 1.0), (1, 0.5)]}, up="nats").svg().count("<svg")
        1
        """
        return _saved(self, "svg", {"Date": None, "Creator": None}).decode()

    def _repr_svg_(self) -> str:
        return self.svg()  # of notebooks

    def png(self) -> bytes:
        """A PNG, the same bytes for the same value."""
        return _saved(self, "png", {"Software": None})


def _saved(lines: Lines, kind: str, metadata: dict[str, None]) -> bytes:
    figure, file = _drawn(lines), BytesIO()
    with plotting():
        figure.savefig(file, format=kind, dpi=150, metadata=metadata)
    return file.getvalue()


def _printable(lines: Lines) -> Lines:
    """The same with texts that a font has glyphs for."""
    named = lambda by_name: {readable(str(name)): points for name, points in by_name.items()}
    ticks = None if lines.ticks is None else {x: readable(str(text)) for x, text in lines.ticks.items()}
    title, across, up = (readable(text) for text in (lines.title, lines.across, lines.up))
    return replace(lines, title=title, across=across, up=up, series=named(lines.series), bands=named(lines.bands), ticks=ticks)


def _drawn(lines: Lines) -> Any:
    lines = _printable(lines)
    _check(lines)
    longest = max(map(len, lines.series))
    at_lines = not lines.bars and not lines.points and 1 < len(lines.series) <= LABELS
    below = longest > 24 and not at_lines  # the legend stands below the frame, else beside it
    with plotting():
        from matplotlib.figure import Figure

        per_row = max(1, 90 // (longest + 7))
        height = 3.8 + below * 0.22 * math.ceil(len(lines.series) / per_row)
        wide = 6.4 + at_lines * max(0.0, 0.075 * (longest - 14))
        figure = Figure((max(wide, 1 + 0.085 * len(lines.title)), height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(lines.title, loc="left", fontsize=11, fontweight="bold", parse_math=False)
        axes.set_xlabel(lines.across, parse_math=False)
        axes.set_ylabel(fill(lines.up, 44), parse_math=False)  # as high as the frame
        places = _places(lines)
        colors = _colors(list(lines.series))
        for i, (name, points) in enumerate(lines.series.items()):
            _series(lines, axes, i, colors[i], name, [(places[x], y) for x, y in points], places)
        if lines.log_x:
            axes.set_xscale("log")
            _plain_numbers(axes.xaxis, *axes.get_xlim())
        if lines.log_y:
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis, *axes.get_ylim())
        _ticks(lines, axes, places)
        if at_lines:
            _labels(axes)
        elif len(lines.series) > LABELS and _in_order(list(lines.series)):
            _color_bar(axes, list(lines.series), colors)
        elif len(lines.series) > 1:
            beside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0}
            under = {"loc": "outside lower left", "ncols": per_row}
            legend = figure.legend(**under, frameon=False) if below else axes.legend(**beside, frameon=False)
            for text in legend.get_texts():
                text.set_parse_math(False)
    return figure


def _labels(axes: Any) -> None:
    """The name of each line beside its last point, in its colour; names that would overlap are moved apart."""
    frame = axes.transData + axes.transAxes.inverted()
    ends = []
    for line in axes.lines:
        points = [(x, y) for x, y in line.get_xydata() if math.isfinite(y)]
        if points:
            ends.append((frame.transform(points[-1])[1], line, points[-1]))
    ends.sort(key=lambda end: end[0])
    n = len(ends)
    heights = spread([height for height, *_ in ends], GAP)
    heights = [min(max(height, i * GAP), 1 - (n - 1 - i) * GAP) for i, height in enumerate(heights)]  # inside the frame
    for (_, line, end), height in zip(ends, heights, strict=True):
        axes.annotate(
            line.get_label(), end, (1.02, height), xycoords="data", textcoords="axes fraction", va="center", color=line.get_color(),
            fontsize=9, parse_math=False, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "lw": 0.5, "alpha": 0.5, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)},
        )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Increasing places, moved as little as it takes to be `gap` apart: neighbours that are too near share their middle.

    >>> [round(x, 2) for x in spread([0.0, 0.5, 0.52], 0.1)]
    [0.0, 0.46, 0.56]
    """
    groups: list[list[float]] = []  # each is spread evenly around its mean
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > 2 * _middle(groups[-1]) - _top(groups[-1], gap):
            last = groups.pop()
            groups[-1] += last
    return [_middle(group) + gap * (i - (len(group) - 1) / 2) for group in groups for i in range(len(group))]


def _middle(group: Sequence[float]) -> float:
    return sum(group) / len(group)


def _top(group: Sequence[float], gap: float) -> float:
    return _middle(group) + gap * (len(group) - 1) / 2


def _colors(names: Sequence[str]) -> list[Any]:
    """A colour for each series: from dark to bright where the names are numbers or "layer 3", else one unlike the others."""
    if _in_order(names):
        from matplotlib import colormaps

        return [colormaps["viridis"](0.8 * i / (len(names) - 1)) for i in range(len(names))]
    return [LINES[i % len(LINES)] for i in range(len(names))]


def _in_order(names: Sequence[str]) -> bool:
    """Whether the names are of layers, from one to the next."""
    return len(names) > 2 and all(_LAYER.fullmatch(name) for name in names)


def _color_bar(axes: Any, names: Sequence[str], colors: Sequence[Any]) -> None:
    """The colours of many layers in one bar, with the numbers of some."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    shown = range(0, len(names), math.ceil(len(names) / LABELS))
    scale = ScalarMappable(Normalize(-0.5, len(names) - 0.5), ListedColormap(list(colors)))
    bar = axes.figure.colorbar(scale, ax=axes, ticks=list(shown), label="layer", aspect=30)
    bar.ax.set_yticklabels([names[i].removeprefix("layer ") for i in shown])
    bar.ax.tick_params(length=0)
    bar.ax.grid(False)
    bar.outline.set_visible(False)


def _plain_numbers(axis: Any, low: Any, high: Any) -> None:
    """0.5 and not 5 x 10^-1 on a logarithmic axis; 1, 2 and 5 of each power of ten where it spans few of them."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _ticks(lines: Lines, axes: Any, places: Mapping[Any, float]) -> None:
    texts = lines.ticks if lines.ticks is not None else {x: x for x in places} if lines.bars else {}
    if texts:
        long = sum(len(str(text)) + 2 for text in texts.values()) > 60
        turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if long else {}
        at = [places.get(x, x) for x in texts]
        axes.set_xticks(at, [str(text) for text in texts.values()], parse_math=False, **turned)
    elif not lines.log_x and all(x.is_integer() for x in places.values()):
        axes.xaxis.get_major_locator().set_params(integer=True)


def _series(lines: Lines, axes: Any, i: int, color: Any, name: str, points: list[tuple[float, float | int]], places: Any) -> None:
    """One series with its band. A name that starts with "_" is shown as well."""
    label = name if not name.startswith("_") else f"\u200b{name}"
    xs, ys = [x for x, _ in points], [y if math.isfinite(y) else math.nan for _, y in points]
    band = [(places[x], low, high) for x, low, high in lines.bands.get(name, [])]
    if lines.bars:
        n = len(lines.series)
        width = 0.8 / n
        shift = width * (i - (n - 1) / 2)
        axes.bar([x + shift for x in xs], ys, width, color=color, label=label)
        band = [(x + shift, low, high) for x, low, high in band]
    elif lines.points:
        axes.plot(xs, ys, "o", markersize=3.5, color=color, label=label, markeredgewidth=0)
    else:
        axes.plot(xs, ys, "o-", markersize=4, linewidth=1.8, color=color, label=label)
    if band and (lines.bars or lines.points):
        axes.vlines([x for x, _, _ in band], *([b[k] for b in band] for k in (1, 2)), color="#1b1f24", linewidth=1)
    elif band:
        axes.fill_between(*([b[k] for b in band] for k in (0, 1, 2)), color=color, alpha=0.18, linewidth=0)


def _places(lines: Lines) -> dict[Any, float]:
    """The coordinate of each x: its value, or for bars its place in order of appearance."""
    xs = dict.fromkeys(x for points in [*lines.series.values(), *lines.bands.values()] for x, *_ in points)
    return {x: float(i) for i, x in enumerate(xs)} if lines.bars else {x: float(x) for x in xs}


def _check(lines: Lines) -> None:
    if unknown := [name for name in lines.bands if name not in lines.series]:
        raise ValueError(f"{lines.title!r} has a band for {unknown[0]!r}: no series of that name, only {list(lines.series)}")
    finite = [p for points in lines.series.values() for p in points if math.isfinite(p[1])]
    if not finite:
        raise ValueError(f"{lines.title!r} has no finite point to draw")
    for i, log in ((0, lines.log_x), (1, lines.log_y)):
        if bad := [p[i] for points in lines.series.values() for p in points if log and float(p[i]) <= 0]:
            raise ValueError(f"{lines.title!r} has the value {bad[0]}, which a logarithmic axis cannot have")

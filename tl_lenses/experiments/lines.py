"""Lines over an axis, or points in a plane: an SVG that needs nothing, and a plotly figure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 560, 300, 70, 56, 20, 50
_MONO = 'font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace"'


@dataclass(frozen=True)
class Lines:
    """Series to draw in one frame.

    Attributes:
        title: what it shows.
        series: points `(x, y)` by name; a y that is not finite leaves a gap.
        across, up: what the axes are, with units.
        points: dots alone (a scatter plot); otherwise they are joined.
        log_x, log_y: logarithmic axes; values must be positive.
    """

    title: str
    series: Mapping[str, Sequence[tuple[float | int, float | int]]]
    across: str = "layer"
    up: str = ""
    points: bool = False
    log_x: bool = False
    log_y: bool = False


def _ticks(low: float, high: float, log: bool, n: int = 5) -> list[float]:
    """Round numbers from low to high (of a logarithmic axis: powers of ten, as exponents)."""
    if log:
        found = [float(e) for e in range(math.ceil(low), math.floor(high) + 1)]
        return found or [low, high]
    raw = (high - low) / n or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 0.5
    return low - pad, high + pad


def _label(value: float, log: bool) -> str:
    return f"{10**value:g}" if log else f"{value:g}"


def lines_svg(lines: Lines) -> str:
    """A standalone SVG.

    Raises:
        ValueError: no finite point, or one that a logarithmic axis cannot have.

    >>> lines_svg(Lines("KL", {"tuned": [(0, 1.0), (1, 0.5)]}, up="nats")).startswith("<svg")
    True
    """
    from tl_lenses.views.style import LINES

    series = {name: _scaled(lines, list(points)) for name, points in lines.series.items()}
    finite = [p for points in series.values() for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
    if not finite:
        raise ValueError(f"{lines.title!r} has no finite point to draw")
    (x0, x1), (y0, y1) = _range([x for x, _ in finite]), _range([y for _, y in finite])
    legend = 18 * len(series) + 8
    width, height = max(_WIDTH, 40 + 9 * len(lines.title)), _HEIGHT + (legend if len(series) > 1 else 0)
    inner_w, inner_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    at_x = lambda x: _LEFT + (x - x0) / (x1 - x0) * inner_w
    at_y = lambda y: _TOP + (y1 - y) / (y1 - y0) * inner_h
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" font-size="12" {_MONO}>',
        f"<title>{escape(lines.title)}</title>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        f'<text x="20" y="28" font-size="15" font-weight="650" font-family="system-ui, sans-serif" fill="#1b1f24">'
        f"{escape(lines.title)}</text>",
        f'<text x="20" y="46" fill="#5d6673">{escape(lines.up)}</text>',
        f'<text x="{_LEFT + inner_w / 2:g}" y="{_HEIGHT - 10}" text-anchor="middle" fill="#5d6673">{escape(lines.across)}</text>',
    ]
    for tick in _ticks(y0, y1, lines.log_y):
        y = at_y(tick)
        out.append(f'<line x1="{_LEFT}" x2="{_LEFT + inner_w}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e3e7ec"/>')
        out.append(
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#1b1f24">{_label(tick, lines.log_y)}</text>'
        )
    for tick in _ticks(x0, x1, lines.log_x, 10):
        x = at_x(tick)
        out.append(
            f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle" fill="#1b1f24">'
            f"{_label(tick, lines.log_x)}</text>"
        )
    for i, (name, points) in enumerate(series.items()):
        color = LINES[i % len(LINES)]
        for run in [] if lines.points else _runs(points):
            path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in run)
            out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        for (x, y), (raw_x, raw_y) in zip(points, lines.series[name], strict=True):
            if math.isfinite(x) and math.isfinite(y):
                out.append(
                    f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="{2.5 if lines.points else 3}" fill="{color}"><title>'
                    f"{escape(name)}: {raw_x:g}, {raw_y:.4g}</title></circle>"
                )
        if len(series) > 1:
            y = _HEIGHT + 18 * i
            out.append(f'<rect x="{_LEFT}" y="{y - 4}" width="14" height="4" fill="{color}"/>')
            out.append(f'<text x="{_LEFT + 22}" y="{y + 2}" fill="#1b1f24">{escape(name)}</text>')
    return "\n".join([*out, "</svg>", ""])


def _scaled(lines: Lines, points: Sequence[tuple[float | int, float | int]]) -> list[tuple[float, float]]:
    def scaled(value: float | int, log: bool) -> float:
        if log and value <= 0:
            raise ValueError(f"{lines.title!r} has the value {value}, which a logarithmic axis cannot have")
        return math.log10(value) if log and math.isfinite(value) else float(value)

    return [(scaled(x, lines.log_x), scaled(y, lines.log_y)) for x, y in points]


def _runs(points: list[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Stretches without a gap."""
    found: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[0]) and math.isfinite(point[1]):
            found[-1].append(point)
        elif found[-1]:
            found.append([])
    return [run for run in found if len(run) > 1]


def lines_figure(lines: Lines) -> Any:
    """A plotly figure (extra `plot`).

    Raises:
        ImportError: plotly is not installed.
    """
    from tl_lenses.views.style import LINES

    try:
        import plotly.graph_objects as go
    except ImportError:
        raise ImportError("figures need plotly: pip install tl-lenses[plot]") from None
    figure = go.Figure()
    for i, (name, points) in enumerate(lines.series.items()):
        xs, ys = [x for x, _ in points], [y if math.isfinite(y) else None for _, y in points]
        mode, color = "markers" if lines.points else "lines+markers", LINES[i % len(LINES)]
        figure.add_trace(go.Scatter(x=xs, y=ys, mode=mode, name=escape(name, quote=False), marker_color=color))
    figure.update_xaxes(title=lines.across, type="log" if lines.log_x else None)
    figure.update_yaxes(title=lines.up, type="log" if lines.log_y else None)
    figure.update_layout(title={"text": escape(lines.title, quote=False), "font": {"size": 16}})
    return figure

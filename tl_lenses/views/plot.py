"""The plotly view: an interactive heat map for people who script figures. Plotly is an extra, imported when asked."""

import math
from functools import partial
from html import escape
from typing import Any

import torch

from tl_lenses.views.glyphs import clip, readable
from tl_lenses.views.grid import Grid, Trajectory, grid, heading, pick, values
from tl_lenses.views.style import Scale, Stat, change, number, scale_of

_escape = partial(escape, quote=False)  # plotly shows `&quot;` as it is written
_WIDEST = 10  # cells for a token inside the map; the hover shows it whole
_MONO = "Menlo, Consolas, DejaVu Sans Mono, monospace"


def figure(traj: Trajectory, stat: str | None = None, *, batch: int = 0, delta: bool = False) -> Any:
    """A plotly heat map of one batch row: layers up, tokens across, top tokens in the cells, the top k on hover.

    `delta` draws the change from the layer below instead, around zero; the map's `z` are the values (of the rank,
    log₁₀). ImportError without plotly, ValueError for an unknown statistic or batch row.

    >>> figure(traj, "kl").show()
    """
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise ImportError("figures need plotly: pip install tl-lenses[plot]") from None
    info = pick(traj, stat)
    g = grid(traj, batch)
    x = values(traj, info)
    rows = range(len(g.labels))
    if delta:
        x = torch.diff(x.log10() if info.curve == "log" else x, dim=0)
        info, rows = change(info), rows[1:]
    s = scale_of(info, x.flatten().sort().values.tolist())
    shown = x[:, batch, g.positions].tolist()
    z = [[_axis(s, v) for v in row] for row in shown]

    heatmap = go.Heatmap(
        z=z,
        x=list(range(len(g.positions))),  # numbers, not tokens: equal tokens would fall into one column
        y=list(range(len(rows))),
        zmin=_axis(s, s.low),
        zmax=_axis(s, s.high),
        colorscale=_colorscale(s),
        colorbar=_colorbar(s),
        text=[[_cell(g, layer, c) for c in range(len(g.positions))] for layer in rows],
        texttemplate="%{text}",
        textfont={"size": 11, "family": _MONO},
        customdata=[
            [_hover(g, layer, c, info, v) for c, v in enumerate(row)] for layer, row in zip(rows, shown, strict=True)
        ],
        hovertemplate="%{customdata}<extra></extra>",
        hoverlabel={"align": "left", "font": {"family": _MONO}},
        hoverongaps=False,
        xgap=1,
        ygap=1,
    )
    fig = go.Figure(heatmap)
    fig.update_layout(
        title={"text": _escape(heading(traj)), "font": {"size": 16}},
        width=max(520, 68 * len(g.positions) + 190),
        height=max(300, 25 * len(rows) + 170),
        margin={"l": 60, "r": 20, "t": 60, "b": 80},
        plot_bgcolor="rgba(0,0,0,0)",
    )
    plain = {"tickmode": "array", "showgrid": False, "zeroline": False}
    ticks = [_escape(clip(readable(t), _WIDEST)) for t in g.tokens]
    fig.update_xaxes(
        tickvals=list(range(len(ticks))), ticktext=ticks, tickangle=-40, tickfont={"family": _MONO}, **plain
    )
    fig.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=[_escape(g.labels[r]) for r in rows], title="layer", **plain
    )
    return fig


def _axis(s: Scale, value: float) -> float | None:
    """A value on the figure's colour axis: itself, its log₁₀ on a log scale, None where undefined."""
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
    bar: dict[str, Any] = {"title": {"text": _escape(s.stat.title), "side": "right"}, "thickness": 14}
    if s.stat.curve == "log":
        powers = range(math.ceil(math.log10(s.low)), math.floor(math.log10(s.high)) + 1)
        bar |= {"tickmode": "array", "tickvals": list(powers), "ticktext": [number(s.stat, 10**p) for p in powers]}
    return bar


def _cell(g: Grid, layer: int, column: int) -> str:
    """The top token, bold where it is the target. Plotly picks the ink that reads on the colour."""
    text = _escape(clip(readable(g.top[layer][column][0][0]), _WIDEST))
    return f"<b>{text}</b>" if g.hits[layer][column] else text


def _hover(g: Grid, layer: int, column: int, info: Stat, value: float) -> str:
    target = g.targets[column]
    where = f"layer {_escape(g.labels[layer])}, position {g.positions[column]}: <b>{_escape(readable(g.tokens[column]))}</b>"
    shown = "–" if math.isnan(value) else f"{value:.4g}" + " nats" * (info.unit == "nats")
    lines = [
        where + (f" → <b>{_escape(readable(target))}</b>" if target is not None else ""),
        f"{_escape(info.label)}: {shown}",
        *(f"{100 * p:6.2f}%  {_escape(readable(t))}".replace(" ", "\u00a0") for t, p in g.top[layer][column]),
    ]
    return "<br>".join(lines)

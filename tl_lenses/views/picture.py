"""A static picture of the grid as SVG text: for papers, READMEs and slides. No plotting library, no fonts."""

from html import escape

from tl_lenses.views.glyphs import cell_width, clip_parts, parts, readable
from tl_lenses.views.grid import Trajectory, grid, heading, pick, row_values, scale
from tl_lenses.views.style import DIVERGING, SEQUENTIAL, Scale, ink

_FONT = 12
_CELL = 0.602 * _FONT  # advance of one terminal cell in the monospaced faces below
_PAD = 7  # from a cell's edge to its text
_ROW = 23
_WIDEST, _NARROWEST = 10, 3  # cells for a token
_MARGIN = 20
_BAR = 200  # width of the legend's bar

# Without a background a picture is unreadable on half of the pages it is put in, so it has one and follows the theme.
_CSS = f"""
  text {{
    font: {_FONT}px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
    white-space: pre; fill: #1b1f24
  }}
  .ui {{ font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }}
  .title {{ font-size: 16px; font-weight: 650 }}
  .soft {{ fill: #5d6673 }}
  .b {{ font-weight: 700 }}
  .f {{ opacity: .55 }}
  .page {{ fill: #ffffff }}
  .none {{ fill: #eceff3 }}
  .line {{ stroke: #d9dee5; fill: none }}
  @media (prefers-color-scheme: dark) {{
    text {{ fill: #e6e9ed }}
    .soft {{ fill: #98a2b0 }}
    .page {{ fill: #14171b }}
    .none {{ fill: #23282f }}
    .line {{ stroke: #333a44 }}
  }}
"""


def svg(traj: Trajectory, stat: str | None = None, *, batch: int = 0, title: str | None = None) -> str:
    """A standalone SVG heat map of one batch row: top token per cell, last layer on top, coloured by the statistic.

    The picture grows with the tokens (slice a long trajectory first). ValueError for an unknown statistic or batch row.

    >>> Path("heat.svg").write_text(svg(traj, "entropy"), encoding="utf-8")
    """
    info = pick(traj, stat)
    s = scale(info, traj)
    g = grid(traj, batch, 1)
    values = row_values(traj, info, batch, g.positions)
    n_layers = len(g.labels)

    tokens = [[layer[c][0][0] for layer in g.top] for c in range(len(g.positions))]
    cells = [max(cell_width(readable(t)) for t in [g.tokens[c], *column]) for c, column in enumerate(tokens)]
    widths = [round(min(max(n, _NARROWEST), _WIDEST) * _CELL + 2 * _PAD) for n in cells]
    stub = round(max(cell_width(label) for label in [*g.labels, "layer"]) * _CELL) + 2 * _PAD
    lefts = [_MARGIN + stub + sum(widths[:c]) for c in range(len(widths))]

    title = title or heading(traj)
    has_targets = any(t is not None for t in g.targets)
    note = f"{n_layers} layers × {len(g.positions)} tokens; in each cell the top token" + (
        "; bold: it is the target" if has_targets else ""
    )
    top = 150  # of the first row of cells: title, note, legend and header are above
    legend_width = max(_BAR, round(0.6 * _FONT * len(info.title))) + round(
        0.6 * _FONT * (len(info.dark + info.bright) + 2)
    )
    full_width = max(
        _MARGIN * 2 + stub + sum(widths),
        _MARGIN * 2 + legend_width,
        _MARGIN * 2 + round(9.6 * len(title)),
        7 * len(note),
    )
    full_height = top + _ROW * n_layers + _MARGIN

    size = f'width="{full_width}" height="{full_height}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {full_width} {full_height}" role="img">',
        f"<title>{escape(title)}: {escape(info.title)}</title>",
        f"<style>{_CSS}</style>",
        f'<rect class="page" {size} rx="8"/>',
        f'<text class="ui title" x="{_MARGIN}" y="33">{escape(title)}</text>',
        f'<text class="ui soft" x="{_MARGIN}" y="52">{escape(note)}</text>',
        *_legend(s, _MARGIN, 76),
        f'<text class="soft" x="{_MARGIN + stub - _PAD}" y="{top - 9}" text-anchor="end">layer</text>',
    ]
    for c, left in enumerate(lefts):
        out.append(f'<text class="b" x="{left + _PAD}" y="{top - 9}">{_token(g.tokens[c])}</text>')
    for row, layer in enumerate(reversed(range(n_layers))):
        y = top + row * _ROW
        label = escape(g.labels[layer])
        out.append(f'<text class="soft" x="{_MARGIN + stub - _PAD}" y="{y + 16}" text-anchor="end">{label}</text>')
        for c, left in enumerate(lefts):
            out += _cell(tokens[c][layer], s.color(values[layer][c]), g.hits[layer][c], left, y, widths[c])
    return "\n".join([*out, "</svg>", ""])


def _cell(text: str, color: str | None, bold: bool, x: int, y: int, width: int) -> list[str]:
    """A coloured box, a hairline narrower than its place, and the token on it."""
    fill = f'fill="{color}"' if color else 'class="none"'
    weight = "b" if bold else ""
    # as a style: an attribute would lose against the style sheet's text colour
    on = f'class="{weight}" style="fill:{ink(color)}"' if color else f'class="soft {weight}"'
    return [
        f'<rect {fill} x="{x}" y="{y}" width="{width - 1}" height="{_ROW - 1}" rx="2"/>',
        f'<text {on} x="{x + _PAD}" y="{y + 16}">{_token(text)}</text>',
    ]


def _token(text: str) -> str:
    """A token cut to a cell's width, its edge spaces lighter."""
    pieces = clip_parts(parts(text), _WIDEST)
    return "".join(f'<tspan class="f">{escape(p)}</tspan>' if faint else escape(p) for p, faint in pieces)


def _legend(s: Scale, x: int, y: int) -> list[str]:
    """Title and unit, the bar with its two ends in words, and three values below it."""
    stops = DIVERGING if s.stat.diverging else SEQUENTIAL
    name = "tl-lenses-diverging" if s.stat.diverging else "tl-lenses-sequential"
    left = x + (round(0.55 * _FONT * len(s.stat.dark)) + 10 if s.stat.dark else 0)
    gradient = "".join(f'<stop offset="{i / (len(stops) - 1):g}" stop-color="{c}"/>' for i, c in enumerate(stops))
    ticks = zip(s.labels(), ("start", "middle", "end"), (0, _BAR / 2, _BAR), strict=True)
    return [
        f'<defs><linearGradient id="{name}">{gradient}</linearGradient></defs>',
        f'<text class="ui b" x="{x}" y="{y}">{escape(s.stat.title)}</text>',
        f'<text class="ui soft" x="{x}" y="{y + 19}">{escape(s.stat.dark)}</text>',
        f'<rect class="line" fill="none" x="{left}" y="{y + 8}" width="{_BAR}" height="13" rx="3"/>',
        f'<rect style="fill:url(#{name})" x="{left}" y="{y + 8}" width="{_BAR}" height="13" rx="3"/>',
        f'<text class="ui soft" x="{left + _BAR + 8}" y="{y + 19}">{escape(s.stat.bright)}</text>',
        *(
            f'<text class="ui soft" x="{left + dx:g}" y="{y + 36}" text-anchor="{a}">{escape(t)}</text>'
            for t, a, dx in ticks
        ),
    ]

"""The page: one self-contained HTML file. A table that is readable without JavaScript, and behaviour on top of it.

Python writes the table of the first lens and batch row; `page.js` repaints it from the data for the other choices.
"""

import html as escaping
import json
import math
import uuid
from collections.abc import Mapping
from importlib import resources
from typing import Any

from tl_lenses.views.glyphs import parts
from tl_lenses.views.grid import Grid, Trajectory, available, batch_row, grid, heading, lenses, pick, row_values, scale
from tl_lenses.views.style import DIVERGING, LEVELS, LINES, SEQUENTIAL, Scale, Stat, ink, ramp, stat_info

_CELLS = 50_000  # in a notebook, over all lenses and batch rows
_HELP = (
    "Hover a cell, or move with the arrow keys, for its top tokens; "
    "click or Enter pins it here with the statistic by layer."
)


def html(
    traj: Trajectory | Mapping[str, Trajectory],
    stat: str | None = None,
    *,
    title: str | None = None,
    batch: int | None = None,
) -> str:
    """One self-contained page: a layer x token grid with the top token in each cell, last layer on top.

    A mapping `{name: traj}` gets a selector of the lens, several batch rows one of the row (`batch` keeps one), and
    there is one of the statistic, which starts at `stat` (kl, else entropy). No network is needed. ValueError for an
    unknown statistic, a batch row out of range, or lenses read on different tokens or layers.

    >>> Path("heat.html").write_text(html({"logit": a, "tuned": b}, "entropy"), encoding="utf-8")
    """
    found = lenses(traj)
    first = next(iter(found.values()))
    rows = list(range(first.tokens.shape[0])) if batch is None else [batch_row(first, batch)]
    return _page(found, pick(first, stat), title, rows)


def _page(found: dict[str, Trajectory], info: Stat, title: str | None, rows: list[int]) -> str:
    first = next(iter(found.values()))
    title = title or (heading(first) if len(found) == 1 else f"{first.model_name}: {', '.join(found)}".strip(": "))
    grids = {name: [grid(t, b) for b in rows] for name, t in found.items()}
    names = [n for n in available(first) if all(n in available(t) for t in found.values()) or n == info.name]
    scales = {n: scale(stat_info(n), *found.values()) for n in names}
    top = next(iter(grids.values()))[0]
    data = _data(found, grids, rows, scales, info.name)
    files = resources.files("tl_lenses.views")
    return _PAGE.format(
        title=escaping.escape(title),
        css=files.joinpath("page.css").read_text("utf-8") + _palette(),
        subtitle=_subtitle(first, top, len(rows)),
        legend=_legend(scales[info.name]),
        table=_table(first, top, scales[info.name], row_values(first, info, rows[0], top.positions)),
        # "<" and ">" as escapes: no token can end the script element, whatever it says
        data=json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        .replace("&", "\\u0026")
        .replace("<", "\\u003c")
        .replace(">", "\\u003e"),
        js=files.joinpath("page.js").read_text("utf-8"),
    )


def html_fragment(
    traj: Trajectory | Mapping[str, Trajectory], stat: str | None = None, *, title: str | None = None
) -> str:
    """The page in an `<iframe srcdoc>` for notebooks (`_repr_html_`): nothing leaks in or out, and ids cannot collide.

    >>> IPython.display.HTML(html_fragment(traj))
    """
    found = lenses(traj)
    first = next(iter(found.values()))
    height = min(max(25 * len(first.layers) + 250, 480), 900)  # the table with its heading; room for the card
    # A notebook keeps what it shows: of a large batch only the rows that a few megabytes hold.
    rows = range(first.tokens.shape[0])[
        : max(1, _CELLS // max(1, len(found) * len(first.layers) * first.tokens.shape[1]))
    ]
    page = escaping.escape(_page(found, pick(first, stat), title, list(rows)))
    return (
        f'<iframe id="tl-lenses-{uuid.uuid4().hex[:12]}" title="lens heat map" sandbox="allow-scripts" '
        f'style="width:100%;height:{height}px;border:0;resize:vertical" srcdoc="{page}"></iframe>'
    )


def _data(
    found: dict[str, Trajectory], grids: dict[str, list[Grid]], rows: Any, scales: dict[str, Scale], stat: str
) -> dict[str, Any]:
    """Everything `page.js` draws, small: tokens as indices into one vocabulary, numbers rounded to what is shown."""
    first = next(iter(found.values()))
    vocab: dict[str, int] = {}

    def index(text: str | None) -> int:
        return -1 if text is None else vocab.setdefault(text, len(vocab))

    shared = next(iter(grids.values()))
    data = {
        "stat": stat,
        "layers": shared[0].labels,
        "names": [str(layer) for layer in first.layers],
        "k": min(t.top_ids.shape[-1] for t in found.values()),
        "levels": LEVELS,
        "ramps": [", ".join(SEQUENTIAL), ", ".join(DIVERGING)],
        "inks": LINES,
        "help": _HELP,
        "stats": {name: _scale(s) for name, s in scales.items()},
        "rows": [
            {
                "name": f"{b}: " + "".join(g.tokens)[:40].strip(),
                "positions": g.positions,
                "tokens": [index(t) for t in g.tokens],
                "targets": [index(t) for t in g.targets],
            }
            for b, g in zip(rows, shared, strict=True)
        ],
    }
    data["lenses"] = [
        {
            "name": name,
            "rows": [_cells(t, b, g, data["k"], scales, index) for b, g in zip(rows, grids[name], strict=True)],
        }
        for name, t in found.items()
    ]
    data["vocab"] = [_glyphs(text) for text in vocab]
    return data


def _cells(traj: Trajectory, b: int, g: Grid, k: int, scales: dict[str, Scale], index: Any) -> dict[str, Any]:
    flat = [pair for layer in g.top for cell in layer for pair in cell[:k]]
    return {
        "top": [index(text) for text, _ in flat],
        "probs": [round(1e4 * p) if math.isfinite(p) else 0 for _, p in flat],
        "stats": {
            name: [_short(v) for layer in row_values(traj, s.stat, b, g.positions) for v in layer]
            for name, s in scales.items()
            if name in available(traj)
        },
    }


def _short(value: float) -> float | int | None:
    """Four significant digits; integers as such; null where there is no number."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.4g}")


def _scale(s: Scale) -> dict[str, Any]:
    return {
        "label": s.stat.label,
        "title": s.stat.title,
        "unit": s.stat.unit,
        "curve": s.stat.curve,
        "diverging": s.stat.diverging,
        "flip": s.flipped,
        "low": s.low,
        "high": s.high,
        "ticks": s.labels(),
        "ends": [s.stat.dark, s.stat.bright],
    }


def _glyphs(text: str) -> str | list[str]:
    """A token for `page.js`: a string, or strings in turn plain and faint."""
    pieces = parts(text)
    if len(pieces) == 1 and not pieces[0][1]:
        return pieces[0][0]
    return [""] * pieces[0][1] + [piece for piece, _ in pieces]


def _token(text: str) -> str:
    return "".join(
        f"<i>{escaping.escape(p)}</i>" if faint else escaping.escape(p, quote=False) for p, faint in parts(text)
    )


def _subtitle(traj: Trajectory, g: Grid, n_rows: int) -> str:
    size = f"{len(g.labels)} layers × {len(g.positions)} tokens"
    if traj.tokens.shape[0] > 1:
        size += f", {n_rows} of {traj.tokens.shape[0]} rows"
    on_top = "the model itself on top" if traj.layers[-1] == traj.n_layers else "last layer on top"
    target = "; <b>bold</b>: the top token is the target" if any(t is not None for t in g.targets) else ""
    return f"{size}; {on_top}; in each cell the top token{target}"


def _legend(s: Scale) -> str:
    dark, bright = (escaping.escape(e) for e in (s.stat.dark, s.stat.bright))
    ticks = "".join(f"<span>{escaping.escape(t)}</span>" for t in s.labels())
    stops = ", ".join(DIVERGING if s.stat.diverging else SEQUENTIAL)
    return (
        f"<b>{escaping.escape(s.stat.title)}</b><span>{dark}</span>"
        f'<div style="background:linear-gradient(90deg,{stops})"></div><span>{bright}</span><p>{ticks}</p>'
    )


def _table(traj: Trajectory, g: Grid, s: Scale, values: list[list[float]]) -> str:
    head = "".join(
        f'<th scope="col" title="position {p}">{_token(t)}</th>' for p, t in zip(g.positions, g.tokens, strict=True)
    )
    body = []
    for layer in reversed(range(len(g.labels))):
        name, label = escaping.escape(str(traj.layers[layer])), escaping.escape(g.labels[layer])
        cells = "".join(
            f'<td class="{_level(s, v)}{" t" if hit else ""}">{_token(cell[0][0])}</td>'
            for v, hit, cell in zip(values[layer], g.hits[layer], g.top[layer], strict=True)
        )
        body.append(f'<tr><th scope="row" title="{name}">{label}</th>{cells}</tr>')
    return f'<thead><tr><th scope="col">layer</th>{head}</tr></thead>\n<tbody>\n' + "\n".join(body) + "\n</tbody>"


def _level(s: Scale, value: float) -> str:
    """The cell's colour as a class name: c0..c63, d0..d63 on the diverging map, n for none."""
    t = s.position(value)
    return "n" if t is None else f"{'d' if s.stat.diverging else 'c'}{round(t * (LEVELS - 1))}"


def _palette() -> str:
    """The classes that `_level` names: background and the ink that reads on it."""
    rules = []
    for letter, diverging in (("c", False), ("d", True)):
        for i in range(LEVELS):
            color = ramp(i / (LEVELS - 1), diverging)
            rules.append(f".{letter}{i}{{background:{color};color:{ink(color)}}}")
    return "".join(rules)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{css}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="sub">{subtitle}</p>
<div class="bar">
<label hidden>lens <select id="lens"></select></label>
<label hidden>colour by <select id="stat"></select></label>
<label hidden>row <select id="row"></select></label>
<div class="legend" id="legend">{legend}</div>
</div>
<main>
<div class="scroll" id="scroll">
<table id="grid">
{table}
</table>
</div>
<div id="panel">
<noscript><p class="note">With JavaScript, cells show their top tokens and statistics.</p></noscript>
</div>
</main>
<div id="card" role="tooltip" hidden></div>
<svg id="svg" width="0" height="0" aria-hidden="true"></svg>
<script type="application/json" id="data">{data}</script>
<script>
{js}
</script>
</body>
</html>
"""

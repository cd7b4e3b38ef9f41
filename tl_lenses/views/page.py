"""The page: one self-contained HTML file. Its table can be read without JavaScript, which adds the interaction.

Python writes the table of the first lens and batch row; `page.js` repaints it from the data for the other choices.
"""

import html as escaping
import json
import math
import uuid
from collections.abc import Mapping
from importlib import resources
from itertools import combinations, pairwise
from typing import Any

import torch

from tl_lenses.checks import plain_text
from tl_lenses.files import readable
from tl_lenses.views.glyphs import parts
from tl_lenses.views.grid import (
    FADED,
    Difference,
    Grid,
    Trajectory,
    available,
    base_name,
    batch_row,
    difference,
    grid,
    heading,
    lenses,
    pick,
    row_values,
    scale,
    set_aside,
    token,
    values,
)
from tl_lenses.views.heatmap import Heat
from tl_lenses.views.style import DIVERGING, LEVELS, LINES, SEQUENTIAL, Scale, Stat, between, ink, ramp, stat_info

# A character each for a rank or a probability: printable, and none that JSON or HTML would write longer.
_CODES = "".join(c for c in map(chr, range(32, 127)) if c not in '"\\<>&')
_FALLS = 5  # characters for a factor e of a probability
_BETWEEN = tuple(stat.name for stat in between("", "").values())
_SHARED = {
    "levels": LEVELS,
    "ramps": [", ".join(SEQUENTIAL), ", ".join(DIVERGING)],
    "inks": LINES,
    "codes": _CODES,
    "falls": _FALLS,
}
_CELLS = 50_000  # in a notebook, over all lenses and batch rows
_QUESTION = """<details><summary title="What is this?">?</summary>
<p>A row is a layer: what the model would say if it stopped there; the top row is the model itself. The target is the token
scored at a position, by default the next one of the text. Nats are bits times 0.69: a KL of 0.69 nats costs as much as a coin
flip. At layer 0 of a model whose embedding is its unembedding, the logit lens sees the token itself and mostly says it again, so it is
far off: fitted lenses mend that.</p></details>"""
_HELP = (
    "Hover a cell, or move with the arrow keys, for its top tokens; "
    "click or Enter pins it here with the statistic by layer. "
    "Click a token of the pinned list to follow its rank."
)


def html(
    traj: Trajectory | Mapping[str, Trajectory],
    stat: str | None = None,
    *,
    title: str | None = None,
    batch: int | None = None,
    diff: tuple[str, str] | None = None,
) -> str:
    """One self-contained page: a layer x token grid with the top token in each cell, last layer on top.

    A mapping `{name: traj}` gets a selector of the lens, which has them side by side and the difference of two as well
    (`diff=(a, b)` starts with a - b), several batch rows one of the row (`batch` keeps one), and there is one of the
    statistic, which starts at `stat` (kl, else entropy). Tokens that the trajectories tracked can be followed: their rank
    and probability by layer and position, and their rank as a map. No network is needed. ValueError for an unknown
    statistic or lens, a batch row out of range, or lenses read on different tokens or layers.

    >>> Path("heat.html").write_text(html({"logit": a, "tuned": b}, "entropy"), encoding="utf-8")
    """
    by_name = lenses(traj)
    first = next(iter(by_name.values()))
    rows = list(range(first.tokens.shape[0])) if batch is None else [batch_row(first, batch)]
    differences = _differences(traj, None if diff is None else difference(traj, diff))  # type: ignore[arg-type]
    return _page(
        by_name, differences, pick(first if diff is None else differences[-1], stat), title, rows, diff is not None
    )


def _differences(trajs: Any, last: Difference | None = None) -> list[Difference]:
    """Of every later lens to every earlier one, and at the end the one asked for."""
    pairs = [(b, a) for a, b in combinations(lenses(trajs), 2) if last is None or (b, a) != last.of]
    return [*(difference(trajs, pair) for pair in pairs), *([] if last is None else [last])]


def _page(
    by_name: dict[str, Trajectory],
    differences: list[Difference],
    info: Stat,
    title: str | None,
    rows: list[int],
    opens_last: bool,
) -> str:
    first, every = next(iter(by_name.values())), [*by_name.values(), *differences]
    title = None if title is None else plain_text("title", title)
    title = title or (
        heading(first) if len(by_name) == 1 else f"{base_name(first.model_name)}: {', '.join(by_name)}".strip(": ")
    )
    grids = [[grid(t, b) for b in rows] for t in by_name.values()]
    names = [n for n in available(first) if all(n in available(t) for t in by_name.values()) or n == info.name]
    aside = set_aside(*by_name.values())
    data = _data(
        by_name, grids, rows, {n: scale(stat_info(n), *by_name.values()) for n in names if n not in _BETWEEN}, info.name
    )
    fitted = (i for i, t in enumerate(by_name.values()) if getattr(t, "settings", {}).get("lens") != "logit")
    start = len(every) - 1 if opens_last else next(fitted, 0)
    data |= {"start": start, "lenses": data["lenses"] + [_of_difference(d, list(by_name), rows) for d in differences]}
    for row, b, g in zip(data["rows"], rows, grids[0], strict=True):
        row["faded"] = [i for i, p in enumerate(g.positions) if aside[b, p]]
    opened = every[start]
    colors = scale(info, *(by_name.values() if start < len(by_name) else [opened]))
    top = grid(opened, rows[0], 1)
    return _written(
        title, _subtitle(first, top, len(rows), faded=any(row["faded"] for row in data["rows"])), _legend(colors),
        _table(opened, top, colors, row_values(opened, info, rows[0], top.positions), data["rows"][0]["faded"]), data,
    )  # fmt: skip


def _written(title: str, subtitle: str, legend: str, table: str, data: dict[str, Any]) -> str:
    files = resources.files("tl_lenses.views")
    return _PAGE.format(
        title=escaping.escape(title),
        css=files.joinpath("page.css").read_text("utf-8") + _palette(),
        subtitle=subtitle,
        legend=legend,
        table=table,
        help="" if "matrix" in data else _QUESTION,
        # "<" and ">" as escapes: no token can end the script element
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
    by_name = lenses(traj)
    first = next(iter(by_name.values()))
    height = min(max(25 * len(first.layers) + 250, 480), 900)  # the table with its heading; room for the card
    # A notebook stores its output, so it gets only as many rows of a large batch as fit in a few megabytes.
    cells_per_row = max(1, len(by_name) * len(first.layers) * first.tokens.shape[1])
    rows = range(first.tokens.shape[0])[: max(1, _CELLS // cells_per_row)]
    page = escaping.escape(_page(by_name, _differences(traj), pick(first, stat), title, list(rows), False))
    return _frame(page, height)


def matrix_html(heat: Heat) -> str:
    """The page of any matrix, with the same cells, keys and lines."""
    flat = lambda rows: [v for row in reversed(rows) for v in row]
    texts = [[heat.text(r, c) for c in range(len(heat.columns))] for r in range(len(heat.rows))]
    vocab: dict[str, int] = {}
    word = lambda text: vocab.setdefault(text, len(vocab))
    places = list(range(len(heat.columns)))
    colors, labels = heat.scale, [readable(label) for label in reversed(heat.rows)]
    row = {
        "name": "", "positions": places, "tokens": [word(c) for c in heat.columns], "targets": [-1] * len(places),
        "tracked": [], "faded": [i for i in places if heat.faded is not None and heat.faded[i]],
    }  # fmt: skip
    cells = {
        "top": [word(t) for t in flat(texts)],
        "probs": [],
        "stats": {"value": list(map(_short, flat(heat.values)))},
    }
    data = {
        **_SHARED, "stat": "value", "layers": labels, "names": labels, "k": 1, "stats": {"value": _scale(colors)}, "rows": [row],
        "start": 0, "lenses": [{"name": "", "rows": [cells]}], "matrix": True, "words": [heat.down or "row", heat.across or "column"],
        "help": _HELP.partition(", for")[0] + " for its value" + _HELP[_HELP.index(";") :].partition(" with")[0] + ".",
        "ranks": [], "exact": 0, "rank": None, "vocab": [_glyphs(t) if t else "" for t in vocab],
    }  # fmt: skip
    head = "".join(f'<th scope="col">{_token(c)}</th>' for c in heat.columns)
    body = "\n".join(
        f'<tr><th scope="row">{escaping.escape(readable(label))}</th>'
        + "".join(
            f'<td class="{_level(colors, v)}">{escaping.escape(readable(t)) if t else ""}</td>'
            for v, t in zip(values, line, strict=True)
        )
        + "</tr>"
        for label, values, line in zip(heat.rows, heat.values, texts, strict=True)
    )
    corner = escaping.escape(" \\ ".join(filter(None, (heat.down, heat.across))))
    table = f'<thead><tr><th scope="col">{corner}</th>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>'
    return _written(heat.title, escaping.escape(heat.note), _legend(colors), table, data)


def matrix_fragment(heat: Heat) -> str:
    """`matrix_html` in a frame for notebooks."""
    return _frame(escaping.escape(matrix_html(heat)), min(max(25 * len(heat.rows) + 250, 320), 900))


def _frame(page: str, height: int) -> str:
    return (
        f'<iframe id="tl-lenses-{uuid.uuid4().hex[:12]}" title="lens heat map" sandbox="allow-scripts" '
        f'style="width:100%;height:{height}px;border:0;resize:vertical" srcdoc="{page}"></iframe>'
    )


def _data(
    by_name: dict[str, Trajectory], grids: list[list[Grid]], rows: list[int], scales: dict[str, Scale], stat: str
) -> dict[str, Any]:
    """The data of `page.js`, kept small: tokens as indices into one vocabulary, numbers rounded for display, ranks a character each."""
    first = next(iter(by_name.values()))
    vocab: dict[str, int] = {}

    def index(text: str | None) -> int:
        return -1 if text is None else vocab.setdefault(text, len(vocab))

    followed = getattr(first, "tracked", None)
    ids = [[] if followed is None else [i for i in followed.ids[b].tolist() if i >= 0] for b in rows]
    worst = max(
        [int(t.tracked.ranks.max()) for t in by_name.values() if getattr(t, "tracked", None) is not None], default=1000
    )
    ranks = _rank_steps(worst)
    data = {
        **_SHARED, "stat": stat, "layers": grids[0][0].labels, "names": [readable(str(layer)) for layer in first.layers],
        "k": min(t.top_ids.shape[-1] for t in by_name.values()), "words": ["layer", "position"], "help": _HELP,
        "stats": {name: _scale(s) for name, s in scales.items()},
        "ranks": ranks, "exact": next((a for a, b in pairwise(ranks) if b > a + 1), ranks[-1]),
        "rank": _scale(Scale(Stat("token", "rank", "1 = top", "low", "log", low=1.0, dark="far from the top", bright="top token"), 1.0, float(max(worst, 2)))),
        "rows": [
            {
                "name": f"{b}: " + "".join(g.tokens)[:40].strip(), "positions": g.positions,
                "tokens": [index(t) for t in g.tokens], "targets": [index(t) for t in g.targets],
                "tracked": [index(token(first, i)) for i in row],
            }
            for b, g, row in zip(rows, grids[0], ids, strict=True)
        ],
    }  # fmt: skip
    cells = lambda t, of: [
        _cells(t, b, g, data["k"], scales, index) | _followed(t, b, g, len(row), ranks)
        for b, g, row in zip(rows, of, ids, strict=True)
    ]
    data["lenses"] = [
        {"name": name, "rows": cells(t, of)} for (name, t), of in zip(by_name.items(), grids, strict=True)
    ]
    data["vocab"] = [_glyphs(text) for text in vocab]
    return data


def _of_difference(d: Difference, names: list[str], rows: list[int]) -> dict[str, Any]:
    """A difference for `page.js`, which subtracts by itself; what it cannot make are the divergences."""
    a, b = (names.index(name) for name in d.of)
    columns = [torch.nonzero(d.mask[row]).flatten() for row in rows]
    kept = lambda b, at: {
        n: [_short(v) for v in values(d, d.drawn[n])[:, b, at].flatten().tolist()] for n in _BETWEEN if n in d.stats
    }
    return {
        "name": d.name, "minus": [a, b], "scales": {n: _scale(scale(s, d)) for n, s in d.drawn.items()},
        "rows": [{"stats": kept(b, at)} for b, at in zip(rows, columns, strict=True)],
    }  # fmt: skip


def _rank_steps(worst: int) -> list[int]:
    """Ranks up to `worst` for `_CODES`: each one at first, then in steps of a few percent."""
    growth = 1.0
    while True:
        steps = [1]
        while steps[-1] < worst and len(steps) <= len(_CODES):
            steps.append(min(worst, max(steps[-1] + 1, round(steps[-1] * growth))))
        if len(steps) <= len(_CODES):
            return steps
        growth += 0.005


def _followed(traj: Trajectory, b: int, g: Grid, n: int, ranks: list[int]) -> dict[str, Any]:
    """Ranks and probabilities of the tracked tokens of a row: a text of a token, one character a cell."""
    if not n or getattr(traj, "tracked", None) is None:
        return {"ranks": [""] * n, "falls": [""] * n}
    pick = lambda x: x[:, b, g.positions, :n].flatten(0, 1).T
    steps = torch.tensor(ranks)
    below = torch.searchsorted(steps, pick(traj.tracked.ranks).long().contiguous(), right=True) - 1
    falls = (-_FALLS * pick(traj.tracked.probs).clamp_min(1e-30).log()).round().clamp(0, len(_CODES) - 1).long()
    letters = lambda x: ["".join(_CODES[i] for i in line) for line in x.tolist()]
    return {"ranks": letters(below.clamp_min(0)), "falls": letters(falls)}


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
        "label": s.stat.label, "title": s.stat.title, "unit": s.stat.unit, "curve": s.stat.curve,
        "diverging": s.stat.diverging, "flip": s.flipped, "low": s.low, "high": s.high, "ticks": s.labels(),
        "ends": [s.stat.dark, s.stat.bright],
    }  # fmt: skip


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


def _subtitle(traj: Trajectory, g: Grid, n_rows: int, *, faded: bool) -> str:
    size = f"{len(g.labels)} layers × {len(g.positions)} tokens"
    if traj.tokens.shape[0] > 1:
        size += f", {n_rows} of {traj.tokens.shape[0]} rows"
    on_top = "the model itself on top" if traj.layers[-1] == traj.n_layers else "last layer on top"
    target = "; <b>bold</b>: the top token is the target" if any(t is not None for t in g.targets) else ""
    return f"{size}; {on_top}; in each cell the top token{target}" + f"; {FADED}" * faded


def _legend(s: Scale) -> str:
    dark, bright = (escaping.escape(e) for e in (s.stat.dark, s.stat.bright))
    ticks = "".join(f"<span>{escaping.escape(t)}</span>" for t in s.labels())
    stops = ", ".join(DIVERGING if s.stat.diverging else SEQUENTIAL)
    return (
        f"<b>{escaping.escape(s.stat.title)}</b><span>{dark}</span>"
        f'<div style="background:linear-gradient(90deg,{stops})"></div><span>{bright}</span><p>{ticks}</p>'
    )


def _table(traj: Trajectory, g: Grid, s: Scale, values: list[list[float]], faded: list[int]) -> str:
    head = "".join(
        f'<th scope="col" title="position {p}">{_token(t)}</th>' for p, t in zip(g.positions, g.tokens, strict=True)
    )
    body = []
    for layer in reversed(range(len(g.labels))):
        name, label = escaping.escape(readable(str(traj.layers[layer]))), escaping.escape(g.labels[layer])
        cells = "".join(
            f'<td class="{_level(s, v)}{" t" * hit}{" o" * (c in faded)}">{_token(cell[0][0])}</td>'
            for c, (v, hit, cell) in enumerate(zip(values[layer], g.hits[layer], g.top[layer], strict=True))
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
<label hidden>follow a token <input id="word" list="tracked" size="9" autocomplete="off"></label>
<datalist id="tracked"></datalist>
<label hidden>find <input id="find" type="search" size="9"></label>
<div id="chips"></div>
<div class="legend" id="legend">{legend}</div>
{help}
</div>
<canvas id="strip" hidden></canvas>
<main>
<div id="tables">
<section><p></p><div class="scroll"><table>
{table}
</table></div></section>
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

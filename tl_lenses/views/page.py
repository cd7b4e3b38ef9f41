"""The page: one self-contained HTML file. Its table can be read without JavaScript, which adds the interaction.

Python writes the table of the first lens and batch row; `page.js` repaints it from the data for the other choices.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch

from tl_lenses.checks import plain_text, several
from tl_lenses.files import readable
from tl_lenses.views import document
from tl_lenses.views import grid as G
from tl_lenses.views.grid import Difference, Grid, Trajectory
from tl_lenses.views.reading import readings
from tl_lenses.views.style import Scale, Stat, between, stat_info

_BETWEEN = tuple(stat.name for stat in between("", "").values())
_CELLS = 50_000  # in a notebook, over all lenses and batch rows
_QUESTION = """A row is a layer: what the model would say if it stopped there; the top row is the model itself. The target is the token
scored at a position, by default the next one of the text. Nats are bits times 0.69: a KL of 0.69 nats costs as much as a coin
flip. At layer 0 of a model whose embedding is its unembedding, the logit lens sees the token itself and mostly says it again, so it is
far off: fitted lenses mend that."""


def html(
    traj: Trajectory | Mapping[str, Trajectory],
    stat: str | None = None,
    *,
    title: str | None = None,
    batch: int | None = None,
    diff: tuple[str, str] | None = None,
    scopes: Sequence[Any] = (),
) -> str:
    """One self-contained page: a layer x token grid with the top token in each cell, last layer on top.

    A mapping `{name: traj}` gets a selector of the lens, which has them side by side and the difference of two as well
    (`diff=(a, b)` starts with a - b), several batch rows one of the row (`batch` keeps one), and there is one of the
    statistic, which starts at `stat` (kl, else entropy). Tokens that the trajectories tracked can be followed: their rank
    and probability by layer and position, and their rank as a map. No network is needed.

    `scopes`: results of patchscopes (or their `faithfulness`) whose sources are vectors of this prompt. A click on such a
    cell shows what they say of it; a corner marks it.

    ValueError for an unknown statistic or lens, a batch row out of range, lenses read on different tokens or layers, or a
    patchscope without a vector of this prompt.

    >>> Path("heat.html").write_text(html({"logit": a, "tuned": b}, "entropy"), encoding="utf-8")
    """
    by_name, scopes = G.lenses(traj), several("scopes", scopes, "results of patchscopes")
    first = next(iter(by_name.values()))
    rows = list(range(first.tokens.shape[0])) if batch is None else [G.batch_row(first, batch)]
    differences = _differences(traj, None if diff is None else G.difference(traj, diff))  # type: ignore[arg-type]
    info = G.pick(first if diff is None else differences[-1], stat)
    return _page(by_name, differences, info, title, rows, opens_last=diff is not None, scopes=scopes)


def _differences(trajs: Any, last: Difference | None = None) -> list[Difference]:
    """Of every later lens to every earlier one, and at the end the one asked for."""
    pairs = [(b, a) for a, b in combinations(G.lenses(trajs), 2) if last is None or (b, a) != last.of]
    return [*(G.difference(trajs, pair) for pair in pairs), *([] if last is None else [last])]


def _page(
    by_name: dict[str, Trajectory],
    differences: list[Difference],
    info: Stat,
    title: str | None,
    rows: list[int],
    *,
    opens_last: bool = False,
    scopes: Sequence[Any] = (),
) -> str:
    first, every = next(iter(by_name.values())), [*by_name.values(), *differences]
    title = None if title is None else plain_text("title", title)
    title = title or (
        G.heading(first) if len(by_name) == 1 else f"{G.base_name(first.model_name)}: {', '.join(by_name)}".strip(": ")
    )
    grids = [[G.grid(t, b) for b in rows] for t in by_name.values()]
    names = [n for n in G.available(first) if all(n in G.available(t) for t in by_name.values()) or n == info.name]
    aside = G.set_aside(*by_name.values())
    words, scales = document.Vocabulary(), {n: G.scale(stat_info(n), *by_name.values()) for n in names if n not in _BETWEEN}
    data = _data(by_name, grids, rows, scales, words) | document.shared(info.name, "top tokens")
    fitted = (i for i, t in enumerate(by_name.values()) if getattr(t, "settings", {}).get("lens") != "logit")
    start = len(every) - 1 if opens_last else next(fitted, 0)
    data |= {"start": start, "lenses": data["lenses"] + [_of_difference(d, list(by_name), rows) for d in differences]}
    for row, b, g in zip(data["rows"], rows, grids[0], strict=True):
        row["faded"] = [i for i, p in enumerate(g.positions) if aside[b, p]]
    if scopes:
        data["readings"] = readings(first, rows, scopes, words)
    data["vocab"] = words.entries
    opened = every[start]
    colors = G.scale(info, *(by_name.values() if start < len(by_name) else [opened]))
    top = G.grid(opened, rows[0], 1)
    shown = G.row_values(opened, info, rows[0], top.positions)
    about = _subtitle(first, top, len(rows), faded=any(row["faded"] for row in data["rows"]), linked=bool(scopes))
    return document.written(title, about, colors, _table(opened, top, colors, shown, data["rows"][0]["faded"]), data, _QUESTION)


def html_fragment(traj: Trajectory | Mapping[str, Trajectory], stat: str | None = None, *, title: str | None = None) -> str:
    """The page in an `<iframe srcdoc>` for notebooks (`_repr_html_`): nothing leaks in or out, and ids cannot collide.

    >>> IPython.display.HTML(html_fragment(traj))
    """
    by_name = G.lenses(traj)
    first = next(iter(by_name.values()))
    # A notebook stores its output, so it gets only as many rows of a large batch as fit in a few megabytes.
    cells_per_row = max(1, len(by_name) * len(first.layers) * first.tokens.shape[1])
    rows = range(first.tokens.shape[0])[: max(1, _CELLS // cells_per_row)]
    return document.in_notebook(_page(by_name, _differences(traj), G.pick(first, stat), title, list(rows)), len(first.layers))


def _data(
    by_name: dict[str, Trajectory], grids: list[list[Grid]], rows: list[int], scales: dict[str, Scale], words: document.Vocabulary
) -> dict[str, Any]:
    """The data of `page.js`, kept small: tokens as indices into one vocabulary, numbers rounded for display, ranks a character each."""
    first = next(iter(by_name.values()))
    followed = getattr(first, "tracked", None)
    ids = [[] if followed is None else [i for i in followed.ids[b].tolist() if i >= 0] for b in rows]
    worst = max([int(t.tracked.ranks.max()) for t in by_name.values() if getattr(t, "tracked", None) is not None], default=1000)
    data = {
        "layers": grids[0][0].labels, "names": [readable(str(layer)) for layer in first.layers],
        "k": min(t.top_ids.shape[-1] for t in by_name.values()), "words": ["layer", "position"],
        "stats": {name: document.scale_data(s) for name, s in scales.items()}, **document.ranks(worst),
        "rows": [
            {
                "name": f"{b}: " + "".join(g.tokens)[:40].strip(), "positions": g.positions,
                "tokens": [words.token(t) for t in g.tokens], "targets": [words.token(t) for t in g.targets],
                "tracked": [words.token(G.token(first, i)) for i in row],
            }
            for b, g, row in zip(rows, grids[0], ids, strict=True)
        ],
    }  # fmt: skip
    cells = lambda t, of: [
        _cells(t, b, g, data["k"], scales, words) | _followed(t, b, g, len(row), data["ranks"])
        for b, g, row in zip(rows, of, ids, strict=True)
    ]
    data["lenses"] = [{"name": name, "rows": cells(t, of)} for (name, t), of in zip(by_name.items(), grids, strict=True)]
    return data


def _of_difference(d: Difference, names: list[str], rows: list[int]) -> dict[str, Any]:
    """A difference for `page.js`, which subtracts by itself; what it cannot make are the divergences."""
    a, b = (names.index(name) for name in d.of)
    columns = [torch.nonzero(d.mask[row]).flatten() for row in rows]
    kept = lambda b, at: {
        n: [document.short(v) for v in G.values(d, d.drawn[n])[:, b, at].flatten().tolist()] for n in _BETWEEN if n in d.stats
    }
    return {
        "name": d.name, "minus": [a, b], "scales": {n: document.scale_data(G.scale(s, d)) for n, s in d.drawn.items()},
        "rows": [{"stats": kept(b, at)} for b, at in zip(rows, columns, strict=True)],
    }  # fmt: skip


def _followed(traj: Trajectory, b: int, g: Grid, n: int, ranks: list[int]) -> dict[str, Any]:
    """Ranks and probabilities of the tracked tokens of a row: a text of a token, one character a cell."""
    if not n or getattr(traj, "tracked", None) is None:
        return {"ranks": [""] * n, "falls": [""] * n}
    pick = lambda x: x[:, b, g.positions, :n].flatten(0, 1).T
    steps = torch.tensor(ranks)
    below = torch.searchsorted(steps, pick(traj.tracked.ranks).long().contiguous(), right=True) - 1
    falls = (-document.FALLS * pick(traj.tracked.probs).clamp_min(1e-30).log()).round().clamp(0, len(document.CODES) - 1).long()
    letters = lambda x: ["".join(document.CODES[i] for i in line) for line in x.tolist()]
    return {"ranks": letters(below.clamp_min(0)), "falls": letters(falls)}


def _cells(traj: Trajectory, b: int, g: Grid, k: int, scales: dict[str, Scale], words: document.Vocabulary) -> dict[str, Any]:
    flat = [pair for layer in g.top for cell in layer for pair in cell[:k]]
    return {
        "top": [words.token(text) for text, _ in flat],
        "probs": [round(1e4 * p) if math.isfinite(p) else 0 for _, p in flat],
        "stats": {
            name: [document.short(v) for layer in G.row_values(traj, s.stat, b, g.positions) for v in layer]
            for name, s in scales.items()
            if name in G.available(traj)
        },
    }


def _subtitle(traj: Trajectory, g: Grid, n_rows: int, *, faded: bool, linked: bool) -> str:
    size = f"{len(g.labels)} layers × {len(g.positions)} tokens"
    if traj.tokens.shape[0] > 1:
        size += f", {n_rows} of {traj.tokens.shape[0]} rows"
    on_top = "the model itself on top" if traj.layers[-1] == traj.n_layers else "last layer on top"
    target = "; <b>bold</b>: the top token is the target" if any(t is not None for t in g.targets) else ""
    return (
        f"{size}; {on_top}; in each cell the top token{target}"
        + f"; {G.FADED}" * faded
        + "; a corner: click it for its patchscopes" * linked
    )


def _table(traj: Trajectory, g: Grid, s: Scale, values: list[list[float]], faded: list[int]) -> str:
    columns = [(document.token_html(t), f"position {p}") for p, t in zip(g.positions, g.tokens, strict=True)]
    cells = lambda layer: [
        (v, " t" * hit + " o" * (c in faded), document.token_html(cell[0][0]))
        for c, (v, hit, cell) in enumerate(zip(values[layer], g.hits[layer], g.top[layer], strict=True))
    ]
    rows = [(g.labels[i], readable(str(traj.layers[i])), cells(i)) for i in reversed(range(len(g.labels)))]
    return document.table(s, "layer", columns, rows)

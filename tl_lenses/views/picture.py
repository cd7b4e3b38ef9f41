"""A trajectory as a heat map: the top token in each cell, last layer on top, coloured by a statistic."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tl_lenses.checks import plain_text, whole_number
from tl_lenses.views import grid as G
from tl_lenses.views.glyphs import likeliest, readable, shorten
from tl_lenses.views.grid import Grid, Trajectory
from tl_lenses.views.heatmap import Heat, Panels, Slide, columns_of
from tl_lenses.views.lines import Lines
from tl_lenses.views.style import Stat, change, scale_of

_WIDEST = 10  # characters of a token in the map; over a cell it is shown whole


def heat_map(traj: Trajectory, stat: str | None = None, *, batch: int = 0, delta: bool = False) -> Heat:
    """The heat map of one batch row; with `delta` the change from the layer below instead, around zero.

    ValueError for an unknown statistic or batch row.

    >>> heat_map(traj, "kl").png()
    """
    return _map(G.checked(traj), stat, batch, delta, G.set_aside(traj))


def _map(traj: Trajectory, stat: str | None, batch: int, delta: bool, aside: Tensor) -> Heat:
    """With the positions `aside`, `[batch, pos]`, faded."""
    info = G.pick(traj, stat)
    g = G.grid(traj, batch)
    left_out = aside[batch, g.positions].tolist()
    x, colors, rows = G.values(traj, info), G.scale(info, traj), list(range(len(g.labels)))
    if delta:
        x = torch.diff(x.log10() if info.curve == "log" else x, dim=0)
        info, rows = change(info), rows[1:]
        colors = scale_of(info, x[:, ~aside].flatten().sort().values.tolist())
    shown = x[:, batch, g.positions].flip(0).tolist()
    rows, columns = rows[::-1], range(len(g.positions))
    note = f"{len(rows)} layers × {len(columns)} tokens; in each cell the top token"
    return Heat(
        G.heading(traj), [g.labels[r] for r in rows], g.tokens, shown, "layer", "",
        texts=[[g.top[r][c][0][0] for c in columns] for r in rows],
        colors=colors,
        note=note + "; bold: it is the target" * any(t is not None for t in g.targets) + f"\n{G.FADED}" * any(left_out),
        bold=[[g.hits[r][c] for c in columns] for r in rows],
        hover=[[_hover(g, r, c, info, v) for c, v in zip(columns, row, strict=True)] for r, row in zip(rows, shown, strict=True)],
        widest=_WIDEST,
        faded=left_out,
    )  # fmt: skip


def panels(
    traj: Trajectory | Mapping[str, Trajectory],
    stat: str | None = None,
    *,
    batch: int = 0,
    title: str | None = None,
    diff: tuple[str, str] | None = None,
    width: int | None = None,
) -> Panels:
    """Heat maps of one batch row on one scale: a lens each, or the difference `diff=(a, b)` of two.

    `width`: pixels, at which the tokens go on below. ValueError for an unknown statistic, lens or batch row.

    >>> panels({"logit": a, "tuned": b}, "kl").svg()
    """
    title = None if title is None else plain_text("title", title)
    if diff is not None:
        traj = G.difference(traj, diff)
    by_name = G.lenses(traj)
    info = G.pick(next(iter(by_name.values())), stat)
    shared, aside = G.scale(info, *by_name.values()), G.set_aside(*by_name.values())
    named = {name: G.heading(t, name if len(by_name) > 1 else "") for name, t in by_name.items()}
    maps = [
        replace(_map(t, info.name, batch, False, aside), colors=shared, title=title or named[name]) for name, t in by_name.items()
    ]
    if width is None:
        return Panels(maps)
    width = whole_number("width", width, least=1)
    return Panels([part for m in maps for part in m.wrapped(width).heats])


def slide(
    traj: Trajectory | Mapping[str, Trajectory],
    stat: str | None = None,
    *,
    answer: str | None = None,
    batch: int = 0,
    tokens: int = 4,
    rows: int = 13,
) -> Slide:
    """A figure for a talk, 16:9: lenses side by side on one scale, and beside each layer the answer's probability and rank.

    The answer is that of the last position: by default the model's own, else one of the tokens that the trajectories
    tracked. The last `tokens` of a batch row are shown, and at most `rows` layers, evenly spaced, with the last.
    ValueError for an unknown statistic, lens, batch row or answer.

    >>> Path("talk.png").write_bytes(slide({"logit": a, "tuned": b}, answer=" Tokyo").png())
    """
    by_name = G.lenses(traj)
    first, batch = next(iter(by_name.values())), G.batch_row(next(iter(by_name.values())), batch)
    tokens, rows = (whole_number(*pair, least=1) for pair in (("tokens", tokens), ("rows", rows)))
    place = int(first.mask[batch].nonzero()[-1])
    tracked = getattr(first, "tracked", None)
    ids = [] if tracked is None else tracked.ids[batch].tolist()
    known = {G.token(first, i): n for n, i in enumerate(ids) if i >= 0}
    answer = G.token(first, int(first.top_ids[-1, batch, place, 0])) if answer is None else plain_text("answer", answer)
    if answer not in known:
        raise ValueError(f"the answer {answer!r} was not tracked, only {list(known)}: pass track=[{answer!r}] to trajectory")
    every = math.ceil(len(first.layers) / rows)
    heats = []
    for (name, t), heat in zip(by_name.items(), panels(by_name, stat, batch=batch).heats, strict=True):
        probs, ranks = (x[:, batch, place, known[answer]].flip(0).tolist() for x in (t.tracked.probs, t.tracked.ranks))
        says = [f"{100 * p:5.1f}% #{r:,}" for p, r in zip(probs, ranks, strict=True)]
        part = columns_of(replace(heat, title=f"{name} lens"), range(len(heat.columns))[-tokens:])
        assert part.texts is not None and part.bold is not None
        bold = [[*row[:-1], row[-1] or cells[-1] == answer] for row, cells in zip(part.bold, part.texts, strict=True)]
        pick = lambda row: row[::every]
        heats.append(
            replace(
                part, rows=pick(part.rows), values=pick(part.values), texts=pick(part.texts), bold=pick(bold), hover=pick(part.hover),
                beside=pick(says), bars=pick(probs), above=f"{readable(answer)}, rank",
            )
        )  # fmt: skip
    text = "".join(G.token(first, i) for i in first.tokens[batch, first.mask[batch]].tolist())
    text = text.removeprefix(getattr(first, "settings", {}).get("bos") or "")
    note = f"right: probability and rank of {readable(answer)} as the next token, by layer"
    return Slide(f"{G.base_name(first.model_name)}: {shorten(readable(text), 80)}", note, heats)


def svg(traj: Trajectory | Mapping[str, Trajectory], stat: str | None = None, **how: Any) -> str:
    """A standalone SVG of `panels`: top token per cell, last layer on top, coloured by the statistic.

    The picture grows with the tokens unless `width` says where they go on below; lenses stand one below the other on one
    scale. ValueError for an unknown statistic, lens or batch row.

    >>> Path("heat.svg").write_text(svg(traj, "entropy"), encoding="utf-8")
    """
    return panels(traj, stat, **how).svg()


def figure(traj: Trajectory, stat: str | None = None, *, batch: int = 0, delta: bool = False) -> Any:
    """A plotly heat map of one batch row: last layer on top, tokens across, top tokens in the cells, the top k on hover.

    `delta` draws the change from the layer below instead, around zero; the map's `z` are the values (of the rank,
    log₁₀). ImportError without plotly, ValueError for an unknown statistic or batch row.

    >>> figure(traj, "kl").show()
    """
    return heat_map(traj, stat, batch=batch, delta=delta).figure()


def means_lines(trajs: Trajectory | Mapping[str, Trajectory], stat: str | None = None) -> Lines:
    """One line per lens: the mean of a statistic over tokens (of the rank, the geometric one), layer by layer.

    A band reaches from the 25th to the 75th percentile of the tokens.

    ValueError for an unknown statistic, lenses on different layers or tokens, or no finite value.

    >>> means_lines({"logit": a, "tuned": b}, "kl").svg()
    """
    by_name = G.lenses(trajs)
    first = next(iter(by_name.values()))
    info, labels = G.pick(first, stat), G.row_labels(first.layers)
    plain = all(isinstance(layer, int) for layer in first.layers)
    xs = list(first.layers) if plain else list(range(len(labels)))
    series, bands = {}, {}
    for name, traj in by_name.items():
        x = G.values(traj, G.pick(traj, info.name)).flatten(1)
        mean = x.log().nanmean(1).exp() if info.curve == "log" else x.nanmean(1)
        low, high = x.nanquantile(torch.tensor((0.25, 0.75), dtype=x.dtype), 1).tolist()
        series[name] = list(zip(xs, mean.tolist(), strict=True))
        bands[name] = list(zip(xs, low, high, strict=True))
    up = f"{info.title}: {'geometric ' * (info.curve == 'log')}mean, and middle half of the tokens"
    ticks = None if plain else dict(zip(xs, labels, strict=True))
    title = f"{G.base_name(first.model_name)}: {info.label} by layer" if first.model_name else f"{info.label} by layer"
    return Lines(title, series, up=up, log_y=info.curve == "log", bands=bands, ticks=ticks)


def _hover(g: Grid, layer: int, column: int, info: Stat, value: float) -> str:
    target = g.targets[column]
    shown = "–" if math.isnan(value) else f"{value:.4g}" + " nats" * (info.unit == "nats")
    where = f"layer {g.labels[layer]}, position {g.positions[column]}: {readable(g.tokens[column])}"
    lines = [
        where + (f" → {readable(target)}" if target is not None else ""),
        f"{info.label}: {shown}",
        *likeliest(g.top[layer][column]),
    ]
    return "\n".join(lines)

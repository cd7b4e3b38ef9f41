"""A patchscope's result in the terminal and as a heat map: the next token or the text of the target prompt, by (l, l*) and source.

One of three tables: a matrix l x l* per source for a sweep of many l with many l*, a row per source where there are many
sources, otherwise a row per pair and a column per source. Rows that are layers have the last one on top. Its page is `reading`.

A result is known here only by its attributes (`sources, pairs, top_ids, top_probs, vocab, text, settings`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.text import Text

from tl_lenses.checks import index
from tl_lenses.views.cells import cell_style, color_legend, in_blocks
from tl_lenses.views.glyphs import cell_width, clip, distinct, likeliest, pad, parts, readable, shorten
from tl_lenses.views.grid import base_name, row_labels, token
from tl_lenses.views.heatmap import Heat
from tl_lenses.views.style import STATS, number, scale_of

Result = Any  # duck-typed: a view never imports what it draws

_FEW = 6  # sources as columns; more of them become rows
_FULL = 0.4  # share of the cells l x l* that a sweep has to fill to be drawn as a matrix
_WIDEST, _NARROWEST = 10, 3  # terminal cells for a token
_TEXT = 24  # terminal cells that a column of texts gets at least
_NUMBER = 5  # a space and a probability
_TERMINAL = (600, 200)  # most cells and rows that are drawn; a note counts the rest
_NOTE = 110  # characters of a line below the heading
_TOP = 5  # tokens on hover
SCALE = scale_of(STATS["max_prob"], [])  # from 0 to 1, whatever the values


@dataclass(frozen=True)
class Cell:
    """One source and pair: the likeliest tokens with their probabilities, and the generated text if there is one."""

    source: int
    pair: int
    where: str
    top: list[tuple[str, float]]
    text: str | None
    prob: float  # of the top token


@dataclass(frozen=True)
class Panel:
    """One table, from the top. A cell is None where a sweep has no such pair.

    `narrow`: the columns are layers, of which there are many, and not sources.
    """

    corner: str
    rows: list[str]
    columns: list[str]
    cells: list[list[Cell | None]]
    narrow: bool = False
    title: str = ""
    left_out: str = ""


@dataclass(frozen=True)
class ScopeView:
    """The result of `patchscope_table`: laid out when a console prints it, which knows its width and colours."""

    prompt: str
    notes: list[str]
    panels: list[Panel]
    with_text: bool
    numbers: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = console.no_color or console.color_system is None
        yield _layout(self, options.max_width, plain)


def patchscope_table(result: Result, *, numbers: bool = False) -> ScopeView:
    """A table for the terminal, the last layer on top: print it with `rich.print`.

    A cell is the generated text where there is one (in quotes, newlines as "↵", cut to the width), else the top token
    and its probability. Without text, a sweep of many l with many l* is a matrix: l down, l* across. In it the colour is the
    probability, and with `numbers` both are there; before a text `numbers` writes it as well.

    >>> rich.print(patchscope_table(result))
    """
    return ScopeView(prompt_of(checked(result)), notes_of(result), panels_of(result, *_TERMINAL), result.text is not None, numbers)


def patchscope_heat(result: Result, source: int = 0) -> Heat:
    """A heat map of one source: l down with the last one on top, l* across, coloured by the top token's probability.

    In a cell of a sweep the continuation, or the top token and its probability. Where each l has one l*, a single column of
    layers, with the continuations beside it. Nothing is cut. ValueError for a source that is not there.

    >>> patchscope_heat(result).svg()
    """
    n = len(checked(result).sources)
    source = index("source", source, n, f"this result has {n} source{'s' * (n > 1)}")
    square, said = is_sweep(result), result.text is not None
    panel = _matrix(result, source) if square else _by_pair(result, [source], len(result.pairs))
    cells, prompt, model = panel.cells, prompt_of(result), base_name(result.settings.get("model") or "")
    about = (
        f"vector of {quoted(result.sources[source])}",
        f"into {prompt}" * bool(prompt),
        f"in each cell {cell_says(said and square)}",
    )
    width = lambda column: max((cell_width(readable(c.top[0][0])) for c in column if c), default=0)
    widest = list(map(width, zip(*cells, strict=True)))
    return Heat(
        f"{model}: patchscope" if model else "patchscope", panel.rows, panel.columns if square else [""],
        [[math.nan if c is None else c.prob for c in row] for row in cells],
        "source layer l" if square else panel.corner, "target layer l*" if square else "",
        texts=[[_in_cell(c, said and square, w) for c, w in zip(row, widest, strict=True)] for row in cells],
        colors=SCALE,
        note="\n".join(line for text in about if text for line in wrap(text, _NOTE)),
        hover=[["" if c is None else _hover(c) for c in row] for row in cells],
        beside=None if square or not said else [quoted(row[0].text) if row[0] else "" for row in cells],
    )  # fmt: skip


def _in_cell(cell: Cell | None, said: bool, width: int) -> str:
    """The continuation where it is `said`, else the top token, filled to a width, and its probability."""
    if cell is None or said:
        return "" if cell is None else quoted(cell.text)
    token = cell.top[0][0]
    return f"{token}{' ' * (width - cell_width(readable(token)))} {number(SCALE.stat, cell.prob)}"


def patchscope_figure(result: Result, source: int = 0) -> Any:
    """`patchscope_heat` as a plotly figure; the hover shows the likeliest tokens.

    ImportError without plotly, ValueError for a source that is not there.

    >>> patchscope_figure(result).show()
    """
    return patchscope_heat(result, source).figure()


# --- from a result to panels


def checked(result: Any) -> Result:
    if not all(hasattr(result, name) for name in ("sources", "pairs", "top_ids", "settings")):
        raise TypeError(f"expected the result of a patchscope, got {type(result).__name__}: tll.patchscope makes one")
    return result


def panels_of(result: Result, most_cells: int, most_rows: int, *, wide: bool = False) -> list[Panel]:
    """The tables to draw, with at most so many cells and rows, and a note that counts the rest.

    `wide`: a sweep's texts are a matrix as well.
    """
    n, n_pairs = len(checked(result).sources), len(result.pairs)
    if not n or not n_pairs or not result.top_ids.shape[-1]:
        raise ValueError("this result has no cells to show: expected a source, a pair and a top token at least")
    if (wide or result.text is None) and is_sweep(result):
        shown = min(n, max(1, most_cells // n_pairs))
        panels = [replace(_matrix(result, s), title=result.sources[s]) for s in range(shown)]
        return [*panels[:-1], replace(panels[-1], left_out=_left_out((n, shown, "sources")))]
    if result.text is None and n > _FEW and n > n_pairs:
        return [_by_source(result, min(n, most_rows, max(1, most_cells // n_pairs)))]
    shown_pairs = min(n_pairs, most_rows)
    sources = list(range(min(n, max(1, most_cells // shown_pairs))))
    return [_by_pair(result, sources, shown_pairs)]


def _left_out(*counts: tuple[int, int, str]) -> str:
    """A note from tuples (number, number shown, plural noun)."""
    missing = [f"{n - shown} of {n} {noun}" for n, shown, noun in counts if shown < n]
    return f"({' and '.join(missing)} are left out: result.to_frame() has all)" if missing else ""


def _matrix(result: Result, s: int) -> Panel:
    """l down, the last one on top, and l* across, for one source."""
    down, across = _axes(result)
    down = down[::-1]
    index_of = {pair: p for p, pair in enumerate(result.pairs)}
    cells = [[cell_of(result, s, index_of[a, b]) if (a, b) in index_of else None for b in across] for a in down]
    return Panel("l\\l*", row_labels(down), row_labels(across), cells, narrow=True)


def _by_source(result: Result, n_rows: int) -> Panel:
    """A row per source, a column per pair."""
    corner, labels = _pair_labels(result)
    rows = [readable(source) for source in result.sources[:n_rows]]
    cells: list[list[Cell | None]] = [[cell_of(result, s, p) for p in range(len(labels))] for s in range(n_rows)]
    left_out = _left_out((len(result.sources), n_rows, "sources"))
    return Panel(f"source \\ {corner}", rows, labels, cells, narrow=True, left_out=left_out)


def _by_pair(result: Result, sources: list[int], n_rows: int) -> Panel:
    """A row per pair, the last one on top, and a column per source; a single source is the title."""
    corner, labels = _pair_labels(result)
    single_source = len(result.sources) == 1
    columns = [readable(result.sources[s]) for s in sources]
    if single_source:
        columns = ["top token" if result.text is None else "text"]
    rows = range(n_rows)[::-1]
    cells: list[list[Cell | None]] = [[cell_of(result, s, p) for s in sources] for p in rows]
    left_out = _left_out((len(labels), n_rows, "pairs"), (len(result.sources), len(sources), "sources"))
    title = result.sources[0] if single_source else ""
    return Panel(corner, [labels[p] for p in rows], columns, cells, title=title, left_out=left_out)


def _axes(result: Result) -> list[tuple[Any, ...]]:
    """The different l and the different l*, in order of appearance."""
    return [tuple(dict.fromkeys(pair[i] for pair in result.pairs)) for i in (0, 1)]


def is_sweep(result: Result) -> bool:
    """Many l, each with many l*: enough of the pairs to fill a matrix."""
    n_down, n_across, n = *map(len, _axes(result)), len(set(result.pairs))
    return n > n_down > 1 and n > n_across > 1 and n >= _FULL * n_down * n_across


def _pair_labels(result: Result) -> tuple[str, list[str]]:
    """The name of the pairs, and a label for each: `3` where l* = l or where there is no l, else `3 → 5`."""
    down, across = _axes(result)
    target_label = dict(zip(across, row_labels(across), strict=True))
    if down == (None,) or all(a == b for a, b in result.pairs):
        return "l*" if down == (None,) else "layer", [target_label[b] for _, b in result.pairs]
    source_label = dict(zip(down, row_labels(down), strict=True))
    return "l → l*", [f"{source_label[a]} → {target_label[b]}" for a, b in result.pairs]


def cell_of(result: Result, s: int, p: int) -> Cell:
    a, b = result.pairs[p]
    ids, probs = result.top_ids[s, p, :_TOP].tolist(), result.top_probs[s, p, :_TOP].tolist()
    where = f"l* = {b}" if a is None else f"layer {a}" if a == b else f"l = {a} → l* = {b}"
    text = None if result.text is None else result.text[s][p]
    return Cell(s, p, where, [(token(result, i), w) for i, w in zip(ids, probs, strict=True)], text, probs[0])


def prompt_of(result: Result) -> str:
    """The target prompt in quotes and on one line, or its token ids if it was given as ids, or nothing."""
    target = result.settings.get("target", "")
    return (f'"{whole(target)}"' if target else "") if isinstance(target, str) else f"token ids {list(target)}"


def cell_says(said: bool) -> str:
    """What stands in a cell."""
    return "the continuation of the prompt" if said else "the top token and its probability"


def notes_of(result: Result) -> list[str]:
    """Settings that are not the default ones."""
    settings, generated = result.settings, result.text is not None
    notes = {
        f"mode {settings.get('mode')}": settings.get("mode", "replace") != "replace",
        f"patched at {settings.get('when')}".replace("_", " "): generated and settings.get("when", "prompt") != "prompt",
        f"sampled, seed {settings.get('seed')}": generated and settings.get("do_sample"),
    }
    return [note for note, is_set in notes.items() if is_set]


# --- text


def whole(text: str) -> str:
    """Text on one line with its spaces; newlines and invisible characters become marks."""
    return "".join(" " * len(piece) if faint else piece for piece, faint in parts(text)) if text else ""


def quoted(text: str | None) -> str:
    """`"text"` on one line."""
    return f'"{whole(text or "")}"'


def _quoted(text: str, room: int, *, end: bool = False) -> str:
    """`"text"` in at most `room` cells, cut in the middle (the two ends of a prompt say most) or at the `end`."""
    text, room = whole(text), max(room - 2, 1)
    return f'"{clip(text, room) if end else shorten(text, room)}"'


# --- terminal


def _layout(view: ScopeView, width: int, plain: bool) -> Group:
    title = "patchscope" + (f" into {shorten(view.prompt, max(width - 16, 12))}" if view.prompt else "")
    lines = [Text(clip(title, width), style="bold")]
    lines += [Text(clip(", ".join(view.notes), width))] if view.notes else []
    lines.append(_legend(view, width, plain))
    for panel in view.panels:
        lines.append(Text(""))
        if panel.title:
            lines.append(Text(clip("source ", width)).append(_quoted(panel.title, max(width - 7, 4)), "bold"))
        lines += _panel(view, panel, width, plain)
        if panel.left_out:
            lines.append(Text(clip(panel.left_out, width), style="dim"))
    for line in lines:
        line.no_wrap, line.overflow = True, "crop"
    return Group(*lines)


def _panel(view: ScopeView, panel: Panel, width: int, plain: bool) -> list[Text]:
    """Blocks of columns that fit the width, one below the other."""
    most, of_sources = max(6, width // 3), panel.corner.startswith("source")
    labels = distinct(panel.rows, most)
    stub = min(max(cell_width(label) for label in [panel.corner, *labels]), most)
    gap = 1 if panel.narrow else 2  # of which the cell next to a token has its colour
    room = max(width - stub - (2 - gap), _NARROWEST + gap + 1 + _NUMBER)
    share = max(_TEXT, room // len(panel.columns) - gap) if view.with_text else _TEXT
    columns = distinct(panel.columns, room if panel.narrow else share)
    needs = [_need(view, panel, c, cell_width(columns[c]), plain) for c in range(len(columns))]
    lines: list[Text] = []
    if view.with_text:
        most_text = max(_TEXT, _level(needs, room - gap * len(needs)))
        needs = [min(need, most_text) for need in needs]
    for block in in_blocks(needs, room, gap):
        if lines:
            lines.append(Text(""))
        stubs = [pad(shorten(label, stub), stub, right=not of_sources) + " " * (2 - gap) for label in [panel.corner, *labels]]
        lines.append(Text(stubs[0], style="bold"))
        for c, w in block:
            lines[-1].append(" " * gap + pad(shorten(columns[c], w), w))
        lines[-1].rstrip()
        for label, row in zip(stubs[1:], panel.cells, strict=True):
            line = Text(label)
            for c, w in block:
                line.append(" " * (gap - 1)).append_text(_drawn(view, row[c], w, plain, panel.narrow))
            if plain or view.with_text:
                line.rstrip()
            lines.append(line)
    return lines


def _need(view: ScopeView, panel: Panel, column: int, head: int, plain: bool) -> int:
    """The width that a column needs; `head` is the width of its heading."""
    cells = [row[column] for row in panel.cells if row[column] is not None]
    if view.with_text:
        more = 2 + _NUMBER * view.numbers
        return max([cell_width(whole(c.text or "")) + more for c in cells if c] + [_NARROWEST, head])
    numbered = plain or not panel.narrow or view.numbers
    tokens = [min(cell_width(readable(c.top[0][0])), 2 * _WIDEST) for c in cells if c]
    widest = max([*tokens, _NARROWEST])
    if panel.narrow:
        return min(max(widest, head - _NUMBER * numbered), _WIDEST) + _NUMBER * numbered
    return max(widest + _NUMBER, min(head, _TEXT))


def _level(needs: list[int], room: int) -> int:
    """The largest width that columns may have side by side; short ones leave their room to long ones."""
    for rank, need in enumerate(sorted(needs)):
        share = room // (len(needs) - rank)
        if need > share:
            return share
        room -= need
    return max(needs)


def _drawn(view: ScopeView, cell: Cell | None, width: int, plain: bool, narrow: bool) -> Text:
    """A cell filled to its width and the space before it."""
    if cell is None:
        return Text(" " * (width + 1))
    shown = number(SCALE.stat, cell.prob).rjust(_NUMBER) if view.numbers or not view.with_text and (plain or not narrow) else ""
    if view.with_text:
        before = f"{shown.strip()} " * bool(shown)
        return Text(" " + pad(before + _quoted(cell.text or "", width - len(before), end=True), width))
    name = pad(readable(cell.top[0][0]), width - len(shown))
    return Text(f" {name}{shown}", style=cell_style(None if plain else SCALE.color(cell.prob)))


def _legend(view: ScopeView, width: int, plain: bool) -> Text:
    if view.with_text:
        return Text(clip(f"in each cell: {cell_says(True)}", width))
    axes = "l down, l* across; " if view.panels[0].corner == "l\\l*" else ""
    if plain:
        return Text(clip(f"{axes}in each cell: {cell_says(False)}", width))
    legend = color_legend(SCALE, axes)
    legend.truncate(width, overflow="ellipsis")
    return legend


# --- heat map


def _hover(cell: Cell) -> str:
    """The hover text of a cell of the heat map."""
    return "\n".join([cell.where, *likeliest(cell.top), *([] if cell.text is None else [quoted(cell.text)])])

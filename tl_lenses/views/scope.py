"""Views of a patchscope's result: the next token or the text of the target prompt, by pair of layers (l, l*) and source.

One of three tables: a matrix l x l* per source for a sweep of many l with many l*, a row per source where there are many
sources, otherwise a row per pair and a column per source.

A result is known here only by its attributes (`sources, pairs, top_ids, top_probs, vocab, text, settings`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.text import Text

from tl_lenses.checks import index
from tl_lenses.views.cells import cell_style, color_legend, in_blocks
from tl_lenses.views.glyphs import cell_width, clip, clip_parts, distinct, pad, parts, readable, shorten
from tl_lenses.views.grid import row_labels, token
from tl_lenses.views.heatmap import Heat
from tl_lenses.views.style import STATS, ink, number, ramp, scale_of

Result = Any  # duck-typed: a view never imports what it draws

_FEW = 6  # sources as columns; more of them become rows
_FULL = 0.4  # share of the cells l x l* that a sweep has to fill to be drawn as a matrix
_WIDEST, _NARROWEST = 10, 3  # terminal cells for a token
_TEXT = 24  # terminal cells that a column of texts gets at least
_NUMBER = 5  # a space and a probability
_TERMINAL, _PAGE = (600, 200), (10_000, 10_000)  # most cells and rows that are drawn; a note counts the rest
_TOP = 5  # tokens on hover
_SCALE = scale_of(STATS["max_prob"], [])  # from 0 to 1, whatever the values


@dataclass(frozen=True)
class Cell:
    """One source and pair: the likeliest tokens with their probabilities, and the generated text if there is one."""

    where: str
    top: list[tuple[str, float]]
    text: str | None
    prob: float  # of the top token


@dataclass(frozen=True)
class Panel:
    """One table. A cell is None where a sweep has no such pair.

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

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = console.no_color or console.color_system is None
        yield _layout(self, options.max_width, plain)


def patchscope_table(result: Result) -> ScopeView:
    """A table for the terminal: print it with `rich.print`.

    A cell is the generated text where there is one (in quotes, newlines as "↵", cut to the width), else the top token
    and its probability. Without text, a sweep of many l with many l* is a matrix: l down, l* across.

    >>> rich.print(patchscope_table(result))
    """
    return ScopeView(_prompt(_checked(result)), _notes(result), _panels(result, *_TERMINAL), result.text is not None)


def patchscope_html(result: Result) -> str:
    """The table as an HTML fragment for notebooks: no scripts, styles of its own; a cell's title has the top tokens.

    >>> IPython.display.HTML(patchscope_html(result))
    """
    panels = _panels(result, *_PAGE)
    prompt = _prompt(result)
    title = f"patchscope into <code>{escape(shorten(prompt, 400))}</code>" if prompt else "patchscope"
    title += "".join(f" · {escape(note)}" for note in _notes(result))
    body = "".join(_panel_html(panel) for panel in panels)
    return f'<div class="tl-lenses-scope"><style>{_CSS}</style><p>{title}</p>{body}{_legend_html(result)}</div>'


def patchscope_heat(result: Result, source: int = 0) -> Heat:
    """A heat map of one source: l down, l* across, the top token in each cell, coloured by its probability.

    Where each l has one l*, a single column of layers, with the generated texts beside it if there are any.
    ValueError for a source that is not there.

    >>> patchscope_heat(result).svg()
    """
    n = len(_checked(result).sources)
    source = index("source", source, n, f"this result has {n} source{'s' * (n > 1)}")
    square = _is_sweep(result)
    panel = _matrix(result, source) if square else _by_pair(result, [source], len(result.pairs))
    cells, prompt = panel.cells, _prompt(result)
    return Heat(
        f"patchscope of {shorten(readable(result.sources[source]), 60)}", panel.rows,
        panel.columns if square else [""], [[math.nan if c is None else c.prob for c in row] for row in cells],
        "source layer l" if square else panel.corner, "target layer l*" if square else "",
        texts=[["" if c is None else c.top[0][0] for c in row] for row in cells],
        colors=_SCALE,
        note=f"into {shorten(prompt, 70)}" if prompt else "",
        hover=[["" if c is None else _hover(c) for c in row] for row in cells],
        beside=None if square or result.text is None else [_quoted(r[0].text or "", 48) if r[0] else "" for r in cells],
        widest=_WIDEST,
    )  # fmt: skip


def patchscope_figure(result: Result, source: int = 0) -> Any:
    """`patchscope_heat` as a plotly figure; the hover shows the likeliest tokens.

    ImportError without plotly, ValueError for a source that is not there.

    >>> patchscope_figure(result).show()
    """
    return patchscope_heat(result, source).figure()


# --- from a result to panels


def _checked(result: Any) -> Result:
    if not all(hasattr(result, name) for name in ("sources", "pairs", "top_ids", "settings")):
        raise TypeError(f"expected the result of a patchscope, got {type(result).__name__}: tll.patchscope makes one")
    return result


def _panels(result: Result, most_cells: int, most_rows: int) -> list[Panel]:
    """The tables to draw, with at most so many cells and rows, and a note that counts the rest."""
    n, n_pairs = len(_checked(result).sources), len(result.pairs)
    if not n or not n_pairs or not result.top_ids.shape[-1]:
        raise ValueError("this result has no cells to show: expected a source, a pair and a top token at least")
    if result.text is None and _is_sweep(result):
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
    """l down, l* across, for one source."""
    down, across = _axes(result)
    index_of = {pair: p for p, pair in enumerate(result.pairs)}
    cells = [[_cell(result, s, index_of[a, b]) if (a, b) in index_of else None for b in across] for a in down]
    return Panel("l\\l*", row_labels(down), row_labels(across), cells, narrow=True)


def _by_source(result: Result, n_rows: int) -> Panel:
    """A row per source, a column per pair."""
    corner, labels = _pair_labels(result)
    rows = [readable(source) for source in result.sources[:n_rows]]
    cells: list[list[Cell | None]] = [[_cell(result, s, p) for p in range(len(labels))] for s in range(n_rows)]
    left_out = _left_out((len(result.sources), n_rows, "sources"))
    return Panel(f"source \\ {corner}", rows, labels, cells, narrow=True, left_out=left_out)


def _by_pair(result: Result, sources: list[int], n_rows: int) -> Panel:
    """A row per pair, a column per source; a single source is the title."""
    corner, labels = _pair_labels(result)
    single_source = len(result.sources) == 1
    columns = [readable(result.sources[s]) for s in sources]
    if single_source:
        columns = ["top token" if result.text is None else "text"]
    cells: list[list[Cell | None]] = [[_cell(result, s, p) for s in sources] for p in range(n_rows)]
    left_out = _left_out((len(labels), n_rows, "pairs"), (len(result.sources), len(sources), "sources"))
    title = result.sources[0] if single_source else ""
    return Panel(corner, labels[:n_rows], columns, cells, title=title, left_out=left_out)


def _axes(result: Result) -> list[tuple[Any, ...]]:
    """The different l and the different l*, in order of appearance."""
    return [tuple(dict.fromkeys(pair[i] for pair in result.pairs)) for i in (0, 1)]


def _is_sweep(result: Result) -> bool:
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


def _cell(result: Result, s: int, p: int) -> Cell:
    a, b = result.pairs[p]
    ids, probs = result.top_ids[s, p, :_TOP].tolist(), result.top_probs[s, p, :_TOP].tolist()
    where = f"l* = {b}" if a is None else f"layer {a}" if a == b else f"l = {a} → l* = {b}"
    text = None if result.text is None else result.text[s][p]
    return Cell(where, [(token(result, i), w) for i, w in zip(ids, probs, strict=True)], text, probs[0])


def _prompt(result: Result) -> str:
    """The target prompt in quotes and on one line, or its token ids if it was given as ids, or nothing."""
    target = result.settings.get("target", "")
    return (f'"{_whole(target)}"' if target else "") if isinstance(target, str) else f"token ids {list(target)}"


def _notes(result: Result) -> list[str]:
    """Settings that are not the default ones."""
    settings, generated = result.settings, result.text is not None
    notes = {
        f"mode {settings.get('mode')}": settings.get("mode", "replace") != "replace",
        f"patched at {settings.get('when')}".replace("_", " "): generated
        and settings.get("when", "prompt") != "prompt",
        f"sampled, seed {settings.get('seed')}": generated and settings.get("do_sample"),
    }
    return [note for note, is_set in notes.items() if is_set]


# --- text


def _whole(text: str) -> str:
    """Text on one line with its spaces; newlines and invisible characters become marks."""
    return "".join(" " * len(piece) if faint else piece for piece, faint in parts(text)) if text else ""


def _quoted(text: str, room: int, *, end: bool = False) -> str:
    """`"text"` in at most `room` cells, cut in the middle (the two ends of a prompt say most) or at the `end`."""
    text, room = _whole(text), max(room - 2, 1)
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
        side = pad if of_sources else _right
        lines.append(Text(side(panel.corner, stub) + " " * (2 - gap), style="bold"))
        for c, w in block:
            lines[-1].append(" " * gap + pad(shorten(columns[c], w), w))
        lines[-1].rstrip()
        for label, row in zip(labels, panel.cells, strict=True):
            line = Text(side(label, stub) + " " * (2 - gap))
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
        return max([cell_width(_whole(c.text or "")) + 2 for c in cells if c] + [_NARROWEST, head])
    numbered = plain or not panel.narrow
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
    if view.with_text:
        return Text(" " + pad(_quoted(cell.text or "", width, end=True), width))
    shown = number(_SCALE.stat, cell.prob).rjust(_NUMBER) if plain or not narrow else ""
    name = pad(readable(cell.top[0][0]), width - len(shown))
    return Text(f" {name}{shown}", style=cell_style(None if plain else _SCALE.color(cell.prob)))


def _right(label: str, width: int) -> str:
    label = shorten(label, width)
    return " " * (width - cell_width(label)) + label


def _legend(view: ScopeView, width: int, plain: bool) -> Text:
    if view.with_text:
        return Text(clip("in each cell: the continuation of the prompt", width))
    axes = "l down, l* across; " if view.panels[0].corner == "l\\l*" else ""
    if plain:
        return Text(clip(f"{axes}in each cell: the top token and its probability", width))
    legend = color_legend(_SCALE, axes)
    legend.truncate(width, overflow="ellipsis")
    return legend


# --- html

# Every rule starts with our class; "!important" against the table styles that notebooks bring.
_CSS = """
.tl-lenses-scope { font: 13px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
.tl-lenses-scope p, .tl-lenses-scope .wide { margin: 6px 0; overflow-x: auto; }
.tl-lenses-scope table { border-collapse: separate; border-spacing: 1px; border: 0; margin: 0; width: auto; font: inherit; }
.tl-lenses-scope tr { background: none !important; }
.tl-lenses-scope th, .tl-lenses-scope td { text-align: left !important; vertical-align: top !important; white-space: pre;
  padding: 2px 8px; border: 0; border-radius: 2px; background: none; unicode-bidi: isolate; }
.tl-lenses-scope th, .tl-lenses-scope b { font-weight: 600; }
.tl-lenses-scope tbody th { font-weight: 500; opacity: .7; font-variant-numeric: tabular-nums; }
.tl-lenses-scope tbody th.r { text-align: right !important; }
.tl-lenses-scope td, .tl-lenses-scope code, .tl-lenses-scope b {
  font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 12px; }
.tl-lenses-scope code { background: none; color: inherit; padding: 0; }
.tl-lenses-scope td.text { white-space: pre-wrap; min-width: 12em; max-width: 42em; border-bottom: 1px solid #8883; }
.tl-lenses-scope i { font-style: normal; opacity: .55; }
.tl-lenses-scope .p { opacity: .8; padding-left: .7em; font-variant-numeric: tabular-nums; }
.tl-lenses-scope .note { font-size: 12px; }
.tl-lenses-scope .bar { display: inline-block; width: 120px; height: 10px; border-radius: 2px; vertical-align: -1px; }
"""


def _panel_html(panel: Panel) -> str:
    source = f'<p>source <b>"{escape(_whole(panel.title))}"</b></p>' if panel.title else ""
    side = "" if panel.corner.startswith("source") else "r"
    heads = "".join(f"<th>{_marked(label)}</th>" for label in panel.columns)
    body = "".join(
        f'<tr><th class="{side}">{_marked(label)}</th>{"".join(_cell_html(c, not panel.narrow) for c in row)}</tr>'
        for label, row in zip(panel.rows, panel.cells, strict=True)
    )
    left_out = f'<p class="note">{escape(panel.left_out)}</p>' if panel.left_out else ""
    corner = {"l\\l*": "l ↓ &nbsp;l* →"}.get(panel.corner, escape(panel.corner))
    head = f"<thead><tr><th>{corner}</th>{heads}</tr></thead>"
    return f'{source}<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>{left_out}'


def _cell_html(cell: Cell | None, numbered: bool) -> str:
    if cell is None:
        return "<td></td>"
    title = escape("\n".join([cell.where, *_likeliest(cell)]))
    if cell.text is not None:
        return f'<td class="text" title="{title}">"{escape(_whole(cell.text))}"</td>'
    color = _SCALE.color(cell.prob)
    style = f' style="background:{color} !important;color:{ink(color)} !important"' if color else ""
    shown = f'<span class="p">{number(_SCALE.stat, cell.prob)}</span>' if numbered else ""
    return f'<td{style} title="{title}">{_marked(cell.top[0][0])}{shown}</td>'


def _likeliest(cell: Cell) -> list[str]:
    return [f"{100 * w:6.2f}%  {readable(t)}" for t, w in cell.top]


def _marked(text: str) -> str:
    """A token or label, its edge spaces faint."""
    return "".join(f"<i>{escape(p)}</i>" if faint else escape(p) for p, faint in clip_parts(parts(text), 48))


def _legend_html(result: Result) -> str:
    if result.text is not None:
        return '<p class="note">in each cell: the continuation of the prompt; hover for the likeliest next tokens</p>'
    stops = ",".join(ramp(i / 8) for i in range(9))
    dark, _, bright = _SCALE.labels()
    bar = f'<span class="bar" style="background:linear-gradient(90deg,{stops})"></span>'
    return f'<p class="note">{escape(_SCALE.stat.title)}: {dark} {bar} {bright}; hover for the likeliest tokens</p>'


def _hover(cell: Cell) -> str:
    """The hover text of a cell of the heat map."""
    return "\n".join([cell.where, *_likeliest(cell), *([] if cell.text is None else [_quoted(cell.text, 60)])])

"""The terminal's view: a layer x token table, last layer on top, fitted to the width of whatever console prints it."""

import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from tl_lenses.views.glyphs import cell_width, clip, pad, readable
from tl_lenses.views.grid import Grid, Trajectory, grid, heading, pick, row_values, scale
from tl_lenses.views.style import Scale, ink, number, ramp

_WIDEST, _NARROWEST = 10, 3  # cells for a token: longer ones are cut, shorter columns filled
_NUMBER = 5  # cells for a value, where it is written
_BLOCKS = 4  # blocks stacked at most; what is left out is said


@dataclass(frozen=True)
class TerminalView:
    """What `terminal` returns: laid out when a console asks, since only that knows its width and colours."""

    title: str
    grid: Grid
    values: list[list[float]]
    scale: Scale
    last_is_model: bool
    width: int | None
    top: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = console.no_color or console.color_system is None
        yield _layout(self, min(self.width or options.max_width, options.max_width), plain)


def terminal(
    traj: Trajectory, stat: str | None = None, *, batch: int = 0, width: int | None = None, top: int = 1
) -> TerminalView:
    """A layer x token table of the top tokens, coloured by a statistic: print it with `rich.print`.

    `stat` defaults to kl, else entropy; `top` tokens per cell; `width` in terminal cells, the console's if None.
    Positions that do not fit continue in blocks below, at most four: the last ones are kept. Without colours the value
    stands in the cell. ValueError for an unknown statistic or batch row.

    >>> rich.print(terminal(traj, "entropy"))
    """
    info = pick(traj, stat)
    g = grid(traj, batch, max(1, top))
    n_rows = traj.tokens.shape[0]
    row = f", row {batch % n_rows} of {n_rows}" if n_rows > 1 else ""
    return TerminalView(
        title=f"{heading(traj)}{row}: {len(g.labels)} layers × {len(g.positions)} tokens",
        grid=g,
        values=row_values(traj, info, batch, g.positions),
        scale=scale(info, traj),
        last_is_model=traj.layers[-1] == traj.n_layers,
        width=width,
        top=max(1, top),
    )


def to_text(
    traj: Trajectory | RenderableType,
    stat: str | None = None,
    *,
    batch: int = 0,
    width: int | None = None,
    top: int = 1,
    color: bool | None = None,
) -> str:
    """`terminal` as a string for `print`, with ANSI colours if standard output has them, or as `color` says.

    Any other rich renderable (`scores_table`) is made a string in the same way.

    >>> print(to_text(traj, width=60))
    """
    tty = sys.stdout.isatty() if color is None else color
    console = Console(
        file=io.StringIO(),
        force_terminal=tty,
        width=width,
        color_system=("truecolor" if color else "auto") if tty else None,
        no_color=False if color else None,
        legacy_windows=False,
    )
    with console.capture() as capture:
        console.print(terminal(traj, stat, batch=batch, width=width, top=top) if hasattr(traj, "stats") else traj)
    return capture.get().rstrip("\n")


def _layout(view: TerminalView, width: int, plain: bool) -> Group:
    g = view.grid
    stub = min(max(cell_width(label) for label in g.labels), max(5, width // 3))
    extra = 1 + _NUMBER if plain else 0
    room = max(width - stub - 1, _NARROWEST + 1 + extra)
    widths = [_column_width(g, i, plain) + extra for i in range(len(g.positions))]
    widths = [min(w, room - 1) for w in widths]
    blocks = _wrap(widths, room)
    left_out = sum(len(block) for block in blocks[:-_BLOCKS])
    shown = blocks[-_BLOCKS:]
    items: list[RenderableType] = [Text(clip(view.title, width), style="bold"), _legend(view, width, plain)]
    if not g.positions:
        items.append(Text("(no tokens: this row is all pads)", style="dim"))
    if left_out:
        note = f"(the first {left_out} of {len(g.positions)} positions are left out: "
        items.append(Text(note + "slice the trajectory or save it as .html)", style="dim"))
    for block in shown:
        items += [Text(""), _block(view, block, widths, stub, plain)]
    return Group(*items)


def _column_width(g: Grid, column: int, plain: bool) -> int:
    """Cells for the tokens of a column, header included; next to a written value the header may use its room."""
    cells = [cell_width(readable(text)) for layer in g.top for text, _ in layer[column]]
    header = cell_width(readable(g.tokens[column])) - (1 + _NUMBER) * plain
    return min(max([*cells, header, _NARROWEST]), _WIDEST)


def _wrap(widths: list[int], room: int) -> list[list[int]]:
    """Columns in blocks that fit the room, in reading order."""
    blocks: list[list[int]] = []
    used = room
    for column, width in enumerate(widths):
        if used + width + 1 > room:
            blocks.append([])
            used = 0
        blocks[-1].append(column)
        used += width + 1
    return blocks


def _block(view: TerminalView, columns: list[int], widths: list[int], stub: int, plain: bool) -> Table:
    """One stacked table. Cells are filled to their width here, so that rich has nothing left to decide."""
    g = view.grid
    table = Table(box=None, padding=0, pad_edge=False, header_style="bold")
    table.add_column(_stub("layer" if stub >= 5 else "", stub), width=stub + 1, no_wrap=True)
    for c in columns:
        table.add_column(Text(" " + pad(readable(g.tokens[c]), widths[c])), width=widths[c] + 1, no_wrap=True)
    for layer in reversed(range(len(g.labels))):
        is_model = view.last_is_model and layer == len(g.labels) - 1
        label = _stub(g.labels[layer], stub, "bold" if is_model else "")
        table.add_row(label, *(_cell(view, layer, c, widths[c], plain) for c in columns))
    return table


def _stub(label: str, width: int, style: str = "") -> Text:
    label = clip(label, width)
    return Text(" " * (width - cell_width(label)) + label + " ", style=style)


def _cell(view: TerminalView, layer: int, column: int, width: int, plain: bool) -> Text:
    value = view.values[layer][column]
    tokens = [readable(text) for text, _ in view.grid.top[layer][column]]
    if plain:
        written = number(view.scale.stat, value).rjust(_NUMBER)
        lines = [f" {pad(t, width - _NUMBER - 1)} {written if i == 0 else ' ' * _NUMBER}" for i, t in enumerate(tokens)]
        return Text("\n".join(lines))
    color = view.scale.color(value)
    style = Style(color=ink(color), bgcolor=color) if color else Style(dim=True)
    bold = view.grid.hits[layer][column]
    text = Text()
    for i, t in enumerate(tokens):
        text.append("\n" * (i > 0)).append(f" {pad(t, width)}", style + Style(bold=bold and i == 0))
    return text


def _legend(view: TerminalView, width: int, plain: bool) -> Text:
    """What the colour or the number means. Words are dropped from the end until it fits."""
    stat = view.scale.stat
    if plain:
        return Text(clip(f"in each cell: the top token and {stat.title}", width))
    dark, _, bright = view.scale.labels()
    legend = Text(f"{stat.title}: {dark} ")
    for i in range(12):
        legend.append(" ", Style(bgcolor=ramp(i / 11, stat.diverging)))
    legend.append(f" {bright}" + (f" ({stat.bright})" if stat.bright else ""))
    if any(any(row) for row in view.grid.hits) and legend.cell_len + 32 < width:
        legend.append("   bold").stylize("bold", legend.cell_len - 4)
        legend.append(": the top token is the target")
    legend.truncate(width, overflow="ellipsis")
    return legend

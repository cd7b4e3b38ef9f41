"""The terminal's view: a layer x token table, last layer on top, fitted to the width of the console that prints it."""

import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from tl_lenses.checks import whole_number
from tl_lenses.views.cells import cell_style, color_legend, in_blocks
from tl_lenses.views.glyphs import cell_width, clip, pad, readable
from tl_lenses.views.grid import FADED, Grid, Trajectory, grid, heading, pick, row_values, scale, set_aside
from tl_lenses.views.style import Scale, number

_WIDEST, _NARROWEST = 10, 3  # cells for a token: longer ones are cut, shorter columns filled
_NUMBER = 5  # cells for a value, where it is written
_BLOCKS = 4  # most blocks of columns that are stacked; a note counts the rest


@dataclass(frozen=True)
class TerminalView:
    """The result of `terminal`: laid out when a console prints it, which knows its width and colours."""

    title: str
    grid: Grid
    values: list[list[float]]
    scale: Scale
    last_is_model: bool
    width: int | None
    top: int
    faded: list[bool]
    numbers: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield _layout(self, min(self.width or options.max_width, options.max_width), _ways(console, self.numbers))


def terminal(
    traj: Trajectory, stat: str | None = None, *, batch: int = 0, width: int | None = None, top: int = 1, numbers: bool = False
) -> TerminalView:
    """A layer x token table of the top tokens, coloured by a statistic: print it with `rich.print`.

    `stat` defaults to kl, else entropy; `top` tokens per cell; `width` in terminal cells, the console's if None.
    Positions that do not fit continue in blocks below, at most four: the last ones are kept. The value stands in the cell
    with `numbers`, and where there are no colours or 16. ValueError for an unknown statistic or batch row.

    >>> rich.print(terminal(traj, "entropy"))
    """
    info, top = pick(traj, stat), max(1, whole_number("top", top))
    width = None if width is None else whole_number("width", width, least=1)
    g = grid(traj, batch, top)
    n_rows = traj.tokens.shape[0]
    row = f", row {batch % n_rows} of {n_rows}" if n_rows > 1 else ""
    return TerminalView(
        title=f"{heading(traj)}{row}: {len(g.labels)} layers × {len(g.positions)} tokens", grid=g,
        values=row_values(traj, info, batch, g.positions), scale=scale(info, traj),
        last_is_model=traj.layers[-1] == traj.n_layers, width=width, top=top,
        faded=set_aside(traj)[batch, g.positions].tolist(), numbers=numbers,
    )  # fmt: skip


def to_text(
    traj: Trajectory | RenderableType, stat: str | None = None, *, batch: int = 0, width: int | None = None,
    top: int = 1, color: bool | None = None, numbers: bool = False,
) -> str:  # fmt: skip
    """`terminal` as a string for `print`, with ANSI colours if standard output has them, or as `color` says.

    Any other rich renderable (`scores_table`) is made a string in the same way.

    >>> print(to_text(traj, width=60))
    """
    width = None if width is None else whole_number("width", width, least=1)
    tty = sys.stdout.isatty() if color is None else color
    colors = ("truecolor" if color else "auto") if tty else None
    no_color = False if color else None
    console = Console(
        file=io.StringIO(), force_terminal=tty, width=width, color_system=colors, no_color=no_color,
        legacy_windows=False,
    )  # fmt: skip
    with console.capture() as capture:
        console.print(terminal(traj, stat, batch=batch, width=width, top=top, numbers=numbers) if hasattr(traj, "stats") else traj)
    return capture.get().rstrip("\n")


def _ways(console: Console, numbers: bool) -> tuple[bool, bool]:
    """Whether cells have a colour, and a number: both on request, the number alone where colours are too few."""
    color = not console.no_color and console.color_system not in (None, "standard", "windows")
    return color, numbers or not color


def _layout(view: TerminalView, width: int, ways: tuple[bool, bool]) -> Group:
    numbers = ways[1]
    g = view.grid
    stub = min(max(cell_width(label) for label in g.labels), max(5, width // 3))
    extra = 1 + _NUMBER if numbers else 0
    room = max(width - stub - 1, _NARROWEST + 1 + extra)
    widths = [_column_width(g, i, numbers) + extra for i in range(len(g.positions))]
    blocks = in_blocks(widths, room)
    left_out = sum(map(len, blocks[:-_BLOCKS]))
    items: list[RenderableType] = [Text(clip(view.title, width), style="bold"), _legend(view, width, ways)]
    if any(view.faded):
        items.append(Text(clip(FADED, width), style="dim"))
    if not g.positions:
        items.append(Text("(no tokens: this row is all pads)", style="dim"))
    if left_out:
        note = f"(the first {left_out} of {len(g.positions)} positions are left out: "
        items.append(Text(note + "slice the trajectory or save it as .html)", style="dim"))
    for block in blocks[-_BLOCKS:]:
        items += [Text(""), _block(view, block, stub, ways)]
    return Group(*items)


def _column_width(g: Grid, column: int, numbers: bool) -> int:
    """Cells for the tokens of a column, header included; next to a written value the header may use its room."""
    cells = [cell_width(readable(text)) for layer in g.top for text, _ in layer[column]]
    header = cell_width(readable(g.tokens[column])) - (1 + _NUMBER) * numbers
    return min(max([*cells, header, _NARROWEST]), _WIDEST)


def _block(view: TerminalView, columns: list[tuple[int, int]], stub: int, ways: tuple[bool, bool]) -> Table:
    """One stacked table. Cells are filled to their width here, so that rich wraps and cuts nothing."""
    g = view.grid
    table = Table(box=None, padding=0, pad_edge=False, header_style="bold")
    table.add_column(Text(pad("layer" if stub >= 5 else "", stub, right=True) + " "), width=stub + 1, no_wrap=True)
    for c, width in columns:
        table.add_column(Text(" " + pad(readable(g.tokens[c]), width)), width=width + 1, no_wrap=True)
    for layer in reversed(range(len(g.labels))):
        is_model = view.last_is_model and layer == len(g.labels) - 1
        label = Text(pad(g.labels[layer], stub, right=True) + " ", style="bold" if is_model else "")
        table.add_row(label, *(_cell(view, layer, c, width, ways) for c, width in columns))
    return table


def _cell(view: TerminalView, layer: int, column: int, width: int, ways: tuple[bool, bool]) -> Text:
    color, numbers = ways
    value, faded = view.values[layer][column], view.faded[column]
    written = number(view.scale.stat, value).rjust(_NUMBER) if numbers else ""
    style = cell_style(None if faded else view.scale.color(value), dim=True) if color else cell_style(None, dim=faded)
    bold = color and view.grid.hits[layer][column]
    text = Text()
    for i, (token, _) in enumerate(view.grid.top[layer][column]):
        line = f" {pad(readable(token), width - (_NUMBER + 1) * numbers)}"
        line += f" {written if i == 0 else ' ' * _NUMBER}" * numbers
        text.append("\n" * (i > 0)).append(line, style + Style(bold=bold and i == 0))
    return text


def _legend(view: TerminalView, width: int, ways: tuple[bool, bool]) -> Text:
    """The meaning of the colour or of the number, cut at the end to fit."""
    if not ways[0]:
        return Text(clip(f"in each cell: the top token and {view.scale.stat.title}", width))
    legend = color_legend(view.scale)
    if any(any(row) for row in view.grid.hits) and legend.cell_len + 32 < width:
        legend.append("   bold").stylize("bold", legend.cell_len - 4)
        legend.append(": the top token is the target")
    legend.truncate(width, overflow="ellipsis")
    return legend

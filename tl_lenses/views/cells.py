"""What the tables of the terminal share: columns in blocks that fit its width, coloured cells, and the legend."""

from collections.abc import Sequence

from rich.style import Style
from rich.text import Text

from tl_lenses.views.style import Scale, ink, ramp

_STEPS = 12  # coloured cells in the legend


def in_blocks(widths: Sequence[int], room: int, gap: int = 1) -> list[list[tuple[int, int]]]:
    """Columns `(number, width)` in blocks that fit into `room` cells, in reading order, with `gap` before each column.

    >>> in_blocks([3, 4, 9], room=10)
    [[(0, 3), (1, 4)], [(2, 9)]]
    """
    blocks: list[list[tuple[int, int]]] = []
    used = room
    for column, width in enumerate(widths):
        width = min(width, room - gap)
        if used + width + gap > room:
            blocks.append([])
            used = 0
        blocks[-1].append((column, width))
        used += width + gap
    return blocks


def cell_style(color: str | None, *, dim: bool = False) -> Style:
    """Text that reads on a background; without a colour plain, or dim."""
    return Style(color=ink(color), bgcolor=color) if color else Style(dim=True) if dim else Style()


def color_legend(scale: Scale, before: str = "") -> Text:
    """The statistic, the colours between the values at the two ends, and what the bright end means."""
    dark, _, bright = scale.labels()
    legend = Text(f"{before}{scale.stat.title}: {dark} ")
    for i in range(_STEPS):
        legend.append(" ", Style(bgcolor=ramp(i / (_STEPS - 1), scale.stat.diverging)))
    return legend.append(f" {bright}" + (f" ({scale.stat.bright})" if scale.stat.bright else ""))

"""Boxes and words at pixels, drawn as SVG text or, by matplotlib, as PNG: the two look alike."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from io import BytesIO
from typing import Any

from tl_lenses.files import readable
from tl_lenses.views.style import Scale, ramp

SIZE = 12  # of the letters, pixels
MARGIN = 20
BAR = 200  # width of the legend's bar
FAINT = 0.3

# Without a background a picture is unreadable on half of the pages it is put in, so it has one and follows the theme.
_CSS = f"""
  text {{
    font: {SIZE}px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
    white-space: pre; fill: #1b1f24; pointer-events: none
  }}
  .ui, .title {{ font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }}
  .title {{ font-size: 16px; font-weight: 650 }}
  .soft {{ fill: #5d6673 }}
  .b {{ font-weight: 700 }}
  .f {{ opacity: .55 }}
  .page {{ fill: #ffffff }}
  .none {{ fill: #eceff3 }}
  @media (prefers-color-scheme: dark) {{
    text {{ fill: #e6e9ed }}
    .soft {{ fill: #98a2b0 }}
    .page {{ fill: #14171b }}
    .none {{ fill: #23282f }}
  }}
"""

_LOOK: dict[str, Any] = {
    "axes.edgecolor": "#98a2b0",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.color": "#e3e7ec",
    "savefig.bbox": "standard",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "tl-lenses",
}
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Box:
    """A filled rectangle, grey for "no value" where `color` is None; `about` is its hover text; `faint` shows the page through."""

    x: float | int
    y: float | int
    width: float | int
    height: float | int
    color: str | None
    about: str = ""
    radius: float | int = 0
    faint: bool = False

    def svg(self) -> str:
        """As an SVG element."""
        fill = f'fill="{self.color}"' if self.color else 'class="none"'
        fill += f' opacity="{FAINT}"' * self.faint
        radius = f' rx="{self.radius:g}"' if self.radius else ""
        rect = f'<rect {fill} x="{self.x:g}" y="{self.y:g}" width="{self.width:g}" height="{self.height:g}"{radius}'
        return f"{rect}><title>{_xml(self.about)}</title></rect>" if self.about else f"{rect}/>"


@dataclass(frozen=True)
class Words:
    """A text on one line, from `x` to the right unless `anchor` says otherwise; `y` is its baseline.

    `text` is a string or pieces `(text, is_faint)`; `kind` has the names of styles: "title", "ui", "soft", "b".
    """

    x: float | int
    y: float | int
    text: str | Sequence[tuple[str, bool]]
    kind: str = ""
    anchor: str = "start"
    color: str | None = None

    @property
    def pieces(self) -> list[tuple[str, bool]]:
        """The text in pieces."""
        return [(self.text, False)] if isinstance(self.text, str) else list(self.text)

    def svg(self) -> str:
        """As an SVG element."""
        body = "".join(f'<tspan class="f">{_xml(piece)}</tspan>' if faint else _xml(piece) for piece, faint in self.pieces)
        kind = f' class="{self.kind}"' if self.kind else ""
        anchor = "" if self.anchor == "start" else f' text-anchor="{self.anchor}"'
        # as a style: an attribute would lose against the style sheet's colour of text
        color = f' style="fill:{self.color}"' if self.color else ""
        return f'<text{kind} x="{self.x:g}" y="{self.y:g}"{anchor}{color}>{body}</text>'


Shape = Box | Words


def advance(characters: int) -> float:
    """Width in pixels of so many characters in the monospaced faces above."""
    return 0.602 * SIZE * characters


def legend(s: Scale, x: int, y: int) -> tuple[list[Shape], int]:
    """The shapes of a legend: name and unit, the bar with words at its ends, and three values below; and its last baseline."""
    left = x + (round(0.55 * SIZE * len(s.stat.dark)) + 10 if s.stat.dark else 0)
    shapes: list[Shape] = [Words(x, y, s.stat.title, "ui b")] if s.stat.title else []
    y = y if s.stat.title else y - 17
    width = 4  # of a step
    shapes += [Words(x, y + 19, s.stat.dark, "ui soft"), Box(left - 1, y + 7, BAR + 2, 15, "#d9dee5")]
    # Each box reaches to the end of the bar, so that no background shines through between two of them.
    color = lambda at: ramp(at / (BAR - width), s.stat.diverging)
    shapes += [Box(left + at, y + 8, BAR - at, 13, color(at)) for at in range(0, BAR, width)]
    shapes.append(Words(left + BAR + 8, y + 19, s.stat.bright, "ui soft"))
    places = zip(s.labels(), ("start", "middle", "end"), (0, BAR / 2, BAR), strict=True)
    shapes += [Words(left + dx, y + 36, label, "ui soft", anchor) for label, anchor, dx in places]
    return [shape for shape in shapes if isinstance(shape, Box) or shape.text], y + 36


def to_svg(title: str, about: str, width: int, height: int, shapes: Sequence[Shape], *, shown: int | None = None) -> str:
    """A standalone SVG, `shown` pixels wide (its own width by default); screen readers read `title` and `about`."""
    size = f'width="{width}" height="{height}"'
    outer = size if shown is None else f'width="{shown}" height="{round(height * shown / width)}"'
    name = f"{title}: {about}" if about else title
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {outer} viewBox="0 0 {width} {height}" role="img">',
        f"<title>{_xml(name)}</title>",
        f"<style>{_CSS}</style>",
        f'<rect class="page" {size} rx="8"/>',
        *(shape.svg() for shape in shapes),
    ]
    return "\n".join([*out, "</svg>", ""])


def to_png(width: int, height: int, shapes: Sequence[Shape], *, shown: int | None = None) -> bytes:
    """The same picture as PNG on white, 2 dots a pixel or `shown` dots wide (extra `plot`)."""
    with plotting():
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        figure = Figure((width / 100, height / 100))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        for order, shape in enumerate(shapes):
            if isinstance(shape, Box):
                look: dict[str, Any] = {"color": shape.color or "#eceff3", "lw": 0, "zorder": order}
                look["alpha"] = FAINT if shape.faint else 1.0
                axes.add_patch(Rectangle((shape.x, shape.y), shape.width, shape.height, **look))
                continue
            kinds = shape.kind.split()
            axes.text(
                shape.x, shape.y, readable("".join(piece for piece, _ in shape.pieces)), parse_math=False, zorder=order,
                color=shape.color or ("#5d6673" if "soft" in kinds else "#1b1f24"),
                family="DejaVu Sans" if "ui" in kinds or "title" in kinds else "DejaVu Sans Mono",
                size=(16 if "title" in kinds else SIZE) * 0.72,  # points at 100 pixels an inch
                weight="bold" if "b" in kinds or "title" in kinds else "normal",
                ha={"start": "left", "middle": "center", "end": "right"}[shape.anchor], va="baseline",
            )  # fmt: skip
        file = BytesIO()
        figure.savefig(file, format="png", dpi=200 if shown is None else 100 * shown / width, metadata={"Software": None})
    return file.getvalue()


@contextmanager
def plotting() -> Iterator[None]:
    """Draw and save matplotlib figures inside: our style replaces the user's, so that files are the same on every machine.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
    except ImportError:
        raise ImportError("figures need matplotlib: pip install tl-lenses[plot]") from None
    with style.context(["default", _LOOK]):
        yield


def _xml(text: str) -> str:
    """Escaped for SVG, which cannot hold control characters or halves of surrogate pairs."""
    return escape(_NOT_XML.sub("\ufffd", readable(text, keep="\n\t")))

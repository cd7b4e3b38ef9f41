"""The frame of all pages: one self-contained HTML file with a table that can be read without JavaScript, and the script's data.

`page`, `matrix` and `reading` fill it with trajectories, any matrix, and patchscopes.
"""

import html as escaping
import json
import math
import uuid
from collections.abc import Iterable
from importlib import resources
from itertools import pairwise
from typing import Any

from tl_lenses.views.glyphs import parts
from tl_lenses.views.style import DIVERGING, LEVELS, LINES, SEQUENTIAL, Scale, Stat, ink, number, ramp

# A character each for a rank or a probability: printable, and none that JSON or HTML would write longer.
CODES = "".join(c for c in map(chr, range(32, 127)) if c not in '"\\<>&')
FALLS = 5  # characters for a factor e of a probability
_HELP = "Hover a cell, or move with the arrow keys, for its {what}; click or Enter pins it here{with_lines}."
_FOLLOW = " Click a token of the pinned list to follow its rank."

Cell = tuple[float, str, str]  # value, marks of its class, content as HTML


def shared(stat: str, what: str, *, follow: bool = True) -> dict[str, Any]:
    """What the script needs whatever is shown; it opens with the colours of `stat`, and the help calls a cell's facts `what`."""
    lines = " with the statistic by layer" if follow else ""
    return {
        "levels": LEVELS, "ramps": [", ".join(SEQUENTIAL), ", ".join(DIVERGING)], "inks": LINES, "codes": CODES,
        "falls": FALLS, "stat": stat, "start": 0, "help": _HELP.format(what=what, with_lines=lines) + _FOLLOW * follow,
    }  # fmt: skip


def ranks(worst: int) -> dict[str, Any]:
    """The scale of tokens' ranks up to `worst`, what the characters of `CODES` stand for, and up to where that is exact."""
    stat = Stat("token", "rank", "1 = top", "low", "log", low=1.0, dark="far from the top", bright="top token")
    steps = rank_steps(worst)
    exact = next((a for a, b in pairwise(steps) if b > a + 1), steps[-1])
    return {"ranks": steps, "exact": exact, "rank": scale_data(Scale(stat, 1.0, float(max(worst, 2))))}


def rank_steps(worst: int) -> list[int]:
    """Ranks up to `worst` for `CODES`: each one at first, then in steps of a few percent."""
    growth = 1.0
    while True:
        steps = [1]
        while steps[-1] < worst and len(steps) <= len(CODES):
            steps.append(min(worst, max(steps[-1] + 1, round(steps[-1] * growth))))
        if len(steps) <= len(CODES):
            return steps
        growth += 0.005


class Vocabulary:
    """Texts by number, each stored once: tokens with their marks, and plain texts."""

    def __init__(self) -> None:
        self.entries: list[str | list[str]] = []
        self._at: dict[tuple[str, bool], int] = {}

    def token(self, text: str | None) -> int:
        """The number of a token; -1 for none."""
        return -1 if text is None else self._put(text, True)

    def plain(self, text: str) -> int:
        """The number of a text that is shown as it is."""
        return self._put(text, False)

    def _put(self, text: str, marked: bool) -> int:
        key = text, marked
        if key not in self._at:
            self._at[key] = len(self.entries)
            self.entries.append(_glyphs(text) if marked else text)
        return self._at[key]


def _glyphs(text: str) -> str | list[str]:
    """A token for `page.js`: a string, or strings in turn plain and faint."""
    pieces = parts(text)
    if len(pieces) == 1 and not pieces[0][1]:
        return pieces[0][0]
    return [""] * pieces[0][1] + [piece for piece, _ in pieces]


def short(value: float) -> float | int | None:
    """Four significant digits; integers as such; null where there is no number."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.4g}")


def scale_data(s: Scale) -> dict[str, Any]:
    """A colour range for the script."""
    return {
        "label": s.stat.label, "title": s.stat.title, "unit": s.stat.unit, "curve": s.stat.curve,
        "diverging": s.stat.diverging, "flip": s.flipped, "low": s.low, "high": s.high, "ticks": s.labels(),
        "ends": [s.stat.dark, s.stat.bright],
    }  # fmt: skip


def token_html(text: str) -> str:
    """A token, the marks of its spaces faint."""
    return "".join(f"<i>{escaping.escape(p)}</i>" if faint else escaping.escape(p, quote=False) for p, faint in parts(text))


def table(
    scale: Scale,
    corner: str,
    columns: Iterable[tuple[str, str]],
    rows: Iterable[tuple[str, str, Iterable[Cell]]],
    *,
    numbers: bool = False,
) -> str:
    """The table's content. Columns are (label as HTML, what its title says), rows (label, title, cells) from the top."""
    title = lambda text: f' title="{escaping.escape(text)}"' if text else ""
    head = "".join(f'<th scope="col"{title(about)}>{label}</th>' for label, about in columns)
    written = lambda value: f' data-v="{number(scale.stat, value)}"' if numbers and not math.isnan(value) else ""
    body = "\n".join(
        f'<tr><th scope="row"{title(about)}>{escaping.escape(label)}</th>'
        + "".join(f'<td class="{_level(scale, v)}{marks}"{written(v)}>{content}</td>' for v, marks, content in cells)
        + "</tr>"
        for label, about, cells in rows
    )
    corner = escaping.escape(corner)
    return f'<thead><tr><th scope="col">{corner}</th>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>'


def written(title: str, about: str, scale: Scale, table: str, data: dict[str, Any], question: str = "") -> str:
    """The page. `about` and `question` (behind the "?") are HTML."""
    file = lambda name: resources.files("tl_lenses.views").joinpath(name).read_text("utf-8")
    return file("page.html").format(
        title=escaping.escape(title),
        css=file("page.css") + _palette(),
        about=about,
        of=data.get("of", "row"),
        legend=_legend(scale),
        table=table,
        kind=' class="said"' * bool(data.get("said")),
        question=f'<details><summary title="What is this?">?</summary>\n<p>{question}</p></details>' if question else "",
        # "<" and ">" as escapes: no token can end the script element
        data=json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        .replace("&", "\\u0026")
        .replace("<", "\\u003c")
        .replace(">", "\\u003e"),
        js=file("page.js"),
    )


def in_notebook(page: str, n_rows: int) -> str:
    """A page in an `<iframe srcdoc>`: nothing leaks in or out, ids cannot collide, and its colours are the notebook's theme."""
    height = min(max(25 * n_rows + 250, 480), 900)  # the table with its heading; room for the card
    return (
        f'<style>{_THEMES}</style><iframe class="tl-lenses" id="tl-lenses-{uuid.uuid4().hex[:12]}" title="lens heat map" '
        f'sandbox="allow-scripts" style="width:100%;height:{height}px;border:0;resize:vertical" '
        f'srcdoc="{escaping.escape(page)}"></iframe>'
    )


# How Jupyter, VS Code and Colab say which theme is on. A frame's `prefers-color-scheme` is the color-scheme of the frame.
_DARK = ('[data-jp-theme-light="false"]', ".vscode-dark", "html[theme=dark]", '[data-theme="dark"]')
_LIGHT = ('[data-jp-theme-light="true"]', ".vscode-light", "html[theme=light]", '[data-theme="light"]')
_THEMES = "".join(
    f"{', '.join(f'{place} .tl-lenses' for place in places)} {{ color-scheme: {scheme}; }}"
    for places, scheme in ((_DARK, "dark"), (_LIGHT, "light"))
)


def _legend(s: Scale) -> str:
    dark, bright = (escaping.escape(e) for e in (s.stat.dark, s.stat.bright))
    ticks = "".join(f"<span>{escaping.escape(t)}</span>" for t in s.labels())
    stops = ", ".join(DIVERGING if s.stat.diverging else SEQUENTIAL)
    return (
        f"<b>{escaping.escape(s.stat.title)}</b><span>{dark}</span>"
        f'<div style="background:linear-gradient(90deg,{stops})"></div><span>{bright}</span><p>{ticks}</p>'
    )


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

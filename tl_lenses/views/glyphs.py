"""Token text for display: marks for invisible characters, and cutting to a width in terminal cells."""

import os
import re
import unicodedata
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

SPACE, NEWLINE, TAB, EMPTY = "·", "↵", "⇥", "∅"
_MARKS = {"\n": NEWLINE, "\t": TAB, "\r": "␍", "\u00a0": "⍽"}
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")

Parts = list[tuple[str, bool]]


def parts(text: str) -> Parts:
    """A token as (text, is_faint) pieces. Faint are the "·" that stand for spaces at its ends: most tokens have one.

    Spaces inside are left alone; newline is "↵", tab "⇥", a lone byte "⟨0xE2⟩", other control and format characters
    "⟨U+200B⟩", nothing at all "∅"; an accent without its letter sits on "◌".

    >>> parts(" Paris\\n")
    [('·', True), ('Paris↵', False)]
    """
    if not text:
        return [(EMPTY, False)]
    body = text.strip(" ")
    head = len(text) - len(text.lstrip(" "))
    out = [(SPACE * head, True), (_visible(body), False), (SPACE * (len(text) - len(body) - head), True)]
    return [(piece, faint) for piece, faint in out if piece]


def _visible(text: str) -> str:
    out: list[str] = []
    for i, piece in enumerate(_BYTE.split(text)):
        if i % 2:
            out.append(f"⟨0x{piece}⟩")
            continue
        for c in piece:
            if c in _MARKS:
                out.append(_MARKS[c])
            elif c != " " and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"):
                out.append(f"⟨U+{ord(c):04X}⟩")
            else:
                out.append("◌" + c if unicodedata.combining(c) and not out else c)
    return "".join(out)


def readable(text: str) -> str:
    """`parts` as one string: `readable(" Paris") == "·Paris"`."""
    return "".join(piece for piece, _ in parts(text))


def cell_width(text: str) -> int:
    """Terminal cells that a string takes: two for a CJK character.

    >>> cell_width("日本")
    4
    """
    return cell_len(text)


def clip(text: str, room: int) -> str:
    """Cut to `room` terminal cells, with "…" in place of the rest.

    >>> clip("·internationally", 8)
    '·intern…'
    """
    return "".join(piece for piece, _ in clip_parts([(text, False)], room))


def clip_parts(pieces: Parts, room: int) -> Parts:
    """`clip` for the pieces of `parts`."""
    if sum(cell_len(piece) for piece, _ in pieces) <= room:
        return pieces
    out, room = [], room - 1
    for piece, faint in pieces:
        kept = piece if cell_len(piece) <= room else set_cell_size(piece, max(room, 0)).rstrip(" ")
        room = room - cell_len(piece)
        out += [(kept, faint)] if kept else []
    return [*out, ("…", False)]


def pad(text: str, room: int, *, right: bool = False) -> str:
    """Clip, then fill with spaces, at the end or before a text that stands to the `right`: exactly `room` cells wide."""
    text = clip(text, room)
    spaces = " " * (room - cell_len(text))
    return spaces + text if right else text + spaces


def likeliest(top: Sequence[tuple[str, float]]) -> list[str]:
    """Tokens with their probabilities, a line each, for hover texts.

    >>> likeliest([(" Paris", 0.925)])
    [' 92.50%  ·Paris']
    """
    return [f"{100 * p:6.2f}%  {readable(token)}" for token, p in top]


def shorten(text: str, room: int) -> str:
    """Cut to `room` cells with "…" in the middle.

    >>> shorten("abcdefghij", 5)
    'ab…ij'
    """
    if cell_width(text) <= room:
        return text
    head = clip(text, max(room - room // 2, 1)).removesuffix("…")
    tail = text[::-1]
    tail = clip(tail, room // 2 + 1).removesuffix("…")[::-1] if room > 1 else ""
    return f"{head}…{tail}"


def distinct(labels: list[str], room: int) -> list[str]:
    """Labels in at most `room` cells, cut first where all are equal: "…of Japan is…", "…of Peru is…"."""
    if len(set(labels)) > 1 and any(cell_width(label) > room for label in labels):
        head = os.path.commonprefix(labels)
        tail = os.path.commonprefix([label[len(head) :][::-1] for label in labels])[::-1]
        longest = max(len(label) for label in labels) - len(head) - len(tail)
        spare = max(room - longest - 2, 0) // 2
        before, after = max(len(head) - spare, 0), max(len(tail) - spare, 0)
        cut = (label[before : len(label) - after] for label in labels)
        labels = ["…" * (before > 0) + label + "…" * (after > 0) for label in cut]
    return [shorten(label, room) for label in labels]

"""What patchscopes say: the page of a result, and what results say of the vectors of a trajectory's cells.

A result is known here by its attributes, as in `scope`; prompts also have `source_prompts` and `target_prompts`. In its place
stands what `tll.faithfulness` made of it (`result`, `of_texts`), whose scores then stand beside the texts.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch

from tl_lenses.files import readable
from tl_lenses.views import document
from tl_lenses.views.glyphs import shorten
from tl_lenses.views.grid import Trajectory, base_name, row_labels
from tl_lenses.views.scope import SCALE, Cell, Panel, cell_of, cell_says, checked, notes_of, panels_of, prompt_of, quoted, whole
from tl_lenses.views.style import Stat, number, scale_of

_MOST = 20_000  # cells
_SOURCES = 6  # of which the prompts stand above the table
_LEVELS = {"layer": ("layer", "source"), "l*": ("target layer l*", "source"), "l → l*": ("l → l*:", "source")}
_SCORES = {
    "specificity": Stat(
        "specificity", "specificity", "nats per token", "high", diverging=True, dark="other vectors say it", bright="its own vector says it"
    ),
    "own_rank": Stat(
        "own_rank", "rank of its own vector", "1 = identified", "low", "log", low=1.0, dark="others rank first", bright="identified"
    ),
}  # fmt: skip
_QUESTION = """A patchscope takes a vector out of one run of a model and puts it into another: here the vector of the marked source
token, after l blocks, goes into the marked place of the target prompt, after l* of its blocks, and the model runs on. A row is a
layer l, the last one on top; at layer 0 the vector is the token's embedding. A text need not come from the vector: the prompt,
the mean of all vectors or the word itself may say it too, which tll.faithfulness measures. Specificity is by how many nats a token
of the text is likelier under its own vector than under those of the other sources, and rank 1 says that no other vector makes it likelier."""


def patchscope_html(result: Any) -> str:
    """One self-contained page: what the target prompt says, last layer on top, coloured by the top token's probability.

    Above it the target prompt with its place marked, and where the vectors came from; a sweep is a matrix l x l* with a
    selector of the source. A click pins a cell with its top tokens and its text. What `tll.faithfulness` returns has the
    scores beside the texts. ValueError without a cell, TypeError for something else.

    >>> Path("scope.html").write_text(patchscope_html(result), encoding="utf-8")
    """
    return _page(*_given(result), _MOST)


def patchscope_fragment(result: Any) -> str:
    """The page in a frame for notebooks, with fewer cells of a large result.

    >>> IPython.display.HTML(patchscope_fragment(result))
    """
    made, scores = _given(result)
    return document.in_notebook(_page(made, scores, _MOST // 4), len(dict.fromkeys(a for a, _ in made.pairs)))


def _given(given: Any) -> tuple[Any, Mapping[str, torch.Tensor]]:
    """A result, and the scores of its texts `[source, pair]` by name."""
    if hasattr(given, "of_texts"):
        return given.result, given.of_texts()
    return checked(given), {}


def _page(result: Any, scores: Mapping[str, torch.Tensor], most: int) -> str:
    panels = panels_of(result, most, most, wide=True)
    first, words, said = panels[0], document.Vocabulary(), result.text is not None
    turned = first.corner.startswith("source")  # rows are sources, the first on top
    drawn = {"max_prob": SCALE, **{n: scale_of(_SCORES[n], x.flatten().nan_to_num(math.nan).tolist()) for n, x in scores.items()}}
    opens = "specificity" if scores else "max_prob"
    size = max((len(c.top) for row in first.cells for c in row if c), default=0)
    labels = first.rows[::-1]
    pair = next((names for corner, names in _LEVELS.items() if first.corner == corner), None)
    data = document.shared(opens, "top tokens and text" if said else "top tokens") | document.ranks(2) | {
        "layers": labels, "names": labels, "k": size, "words": pair or (["source", "layer"] if turned else ["source layer l", "target layer l*"]),
        "stats": {name: document.scale_data(s) for name, s in drawn.items()}, "labelled": True, "of": "source", "turned": turned, "numbers": True,
        "said": said, "from": _sources(result),
        "rows": [_row(panel, words, i) for i, panel in enumerate(panels)],
        "lenses": [{"name": "", "rows": [_cells(panel.cells[::-1], scores, size, words, said) for panel in panels]}],
    }  # fmt: skip
    data["vocab"] = words.entries
    value = lambda c: math.nan if c is None else _stats(c, scores)[opens]
    shown = lambda c: "" if c is None else escape(quoted(c.text)) if said else document.token_html(c.top[0][0])
    rows = [(row, "", [(value(c), "", shown(c)) for c in cells]) for row, cells in zip(first.rows, first.cells, strict=True)]
    corner = "l ↓ l* →" if first.corner == "l\\l*" else first.corner
    table = document.table(drawn[opens], corner, [(document.token_html(c), "") for c in first.columns], rows, numbers=True)
    return document.written(_title(result), _about(result, first), drawn[opens], table, data, _QUESTION)


def _row(panel: Panel, words: document.Vocabulary, number: int) -> dict[str, Any]:
    n = len(panel.columns)
    return {
        "name": f"{number}: {shorten(readable(panel.title), 60)}", "positions": list(range(n)), "targets": [-1] * n, "tracked": [], "faded": [],
        "tokens": [words.token(c) for c in panel.columns],
    }  # fmt: skip


def _cells(
    rows: Sequence[Sequence[Cell | None]], scores: Mapping[str, torch.Tensor], k: int, words: document.Vocabulary, said: bool
) -> dict[str, Any]:
    """The cells of a table for `page.js`; where there is none, nothing has a number."""
    flat = [cell for row in rows for cell in row]
    tops = [([] if c is None else c.top[:k]) for c in flat]
    filled = [[*top, *[(None, 0.0)] * (k - len(top))] for top in tops]
    text = lambda c: words.plain("" if c is None else quoted(c.text)) if said or c is None else words.token(c.top[0][0])
    names = ["max_prob", *scores]
    return {
        "shown": [text(c) for c in flat], "from": [-1 if c is None else c.source for c in flat],
        "top": [words.token(t) for top in filled for t, _ in top],
        "probs": [round(1e4 * p) if math.isfinite(p) else 0 for top in filled for _, p in top],
        "stats": {n: [None if c is None else document.short(_stats(c, scores)[n]) for c in flat] for n in names},
    }  # fmt: skip


def _stats(cell: Cell, scores: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The numbers of a cell; sources that no score was made of have none."""
    at = lambda x: float(x[cell.source, cell.pair]) if cell.source < len(x) else math.nan
    return {"max_prob": cell.prob, **{name: at(x) for name, x in scores.items()}}


# --- prompts: texts in turn plain and marked


def _pieces(prompt: Any, bos: str | None) -> list[str]:
    """A prompt without the BOS in front of it, with the places marked that a vector is taken from or put into."""
    pieces = [""]
    for i, text in enumerate(prompt.texts):
        if (i in prompt.at) != (len(pieces) % 2 == 0):
            pieces.append("")
        pieces[-1] += text
    pieces[0] = pieces[0].removeprefix(bos or "")
    return [whole(piece) for piece in pieces]


def _sources(result: Any) -> list[list[str]]:
    prompts = getattr(result, "source_prompts", None) or [None] * len(result.sources)
    bos = result.settings.get("bos")
    return [[whole(label)] if p is None else _pieces(p, bos) for label, p in zip(result.sources, prompts, strict=True)]


def _targets(result: Any) -> list[list[str]]:
    """The prompts that receive vectors; without places in a result made by hand."""
    prompt = prompt_of(result)
    prompts, bos = getattr(result, "target_prompts", ()), result.settings.get("target_bos")
    return [_pieces(p, bos) for p in prompts] or [[prompt]] * bool(prompt)


def _html(pieces: Sequence[str]) -> str:
    inner = "".join(f"<mark>{escape(p)}</mark>" if i % 2 else escape(p) for i, p in enumerate(pieces))
    return f"<code>{inner}</code>"


def _title(result: Any) -> str:
    """`lab-gpt2: patchscope`, or `a into b: patchscope`."""
    names = [base_name(result.settings[key]) for key in ("model", "to") if result.settings.get(key)]
    return readable(": ".join([*[" into ".join(dict.fromkeys(names))] * bool(names), "patchscope"]))


def _about(result: Any, panel: Panel) -> str:
    """Below the heading: the prompts, what l and l* are, and what a cell says."""
    sources, targets, said = _sources(result), _targets(result), result.text is not None
    more = f" and of {len(sources) - _SOURCES} more" * (len(sources) > _SOURCES)
    taken = ", ".join(map(_html, sources[:_SOURCES]))
    modes = {"add": "is added to that of", "interpolate": "is mixed with that of", "norm_add": "turns that of"}
    does = modes.get(result.settings.get("mode", "replace"), "replaces that of")
    put = " or ".join(map(_html, targets)) or "the target prompt"
    lines = [
        f"The vector of {taken}{more} {does} the marked token in {put}.",
        "l: blocks of the source's model before the vector is taken; l*: blocks before it is put in"
        + ("; here l* = l" if panel.corner == "layer" else "") + f". In each cell {cell_says(said)}"
        + f"{', with the number beside it' * said}; last layer on top.",
        "; ".join(filter(None, [*notes_of(result), panel.left_out])),
    ]  # fmt: skip
    return "".join(f"<p>{line if i == 0 else escape(line)}</p>" for i, line in enumerate(lines) if line)


# --- what results say of the vectors of a trajectory


def readings(traj: Trajectory, rows: Sequence[int], scopes: Sequence[Any], words: document.Vocabulary) -> list[dict[str, Any]]:
    """For every result its target prompt, and by batch row what it says of the cells `layer,column` of the trajectory.

    A vector is that of a cell if it is of the same model and layer, and everything up to its token is the same.
    """
    made = []
    for given in scopes:
        result, scores = _given(given)
        if (model := result.settings.get("model", traj.model_name)) != traj.model_name:
            raise ValueError(f"the patchscope's vectors are of {model!r}, the trajectory is of {traj.model_name!r}")
        by_row: list[dict[str, list[Any]]] = [{} for _ in rows]
        for source, prompt in enumerate(getattr(result, "source_prompts", ())):
            for of_row, b in zip(by_row, rows, strict=True):
                ids = traj.tokens[b, traj.mask[b]].tolist()
                if prompt is None or len(prompt.at) != 1 or prompt.ids[: prompt.at[0] + 1] != ids[: prompt.at[0] + 1]:
                    continue
                for pair, (layer, into) in enumerate(result.pairs):
                    if layer in traj.layers:
                        said = _said(cell_of(result, source, pair), scores, words)
                        key = f"{traj.layers.index(layer)},{prompt.at[0]}"
                        of_row.setdefault(key, []).append([str(row_labels((into,))[0]), *said])
        if not any(by_row):
            raise ValueError(
                f"no vector of the patchscope of {shorten(repr(result.sources[0]), 60)} is a cell of this trajectory: give sources with "
                "the trajectory's prompt (a single position each), and layers that it has"
            )
        made.append({"into": _targets(result)[0], "cells": by_row})
    return made


def _said(cell: Cell, scores: Mapping[str, torch.Tensor], words: document.Vocabulary) -> list[Any]:
    """Text (-1 for none), tokens, their probabilities, and the scores as text."""
    shown = [
        f"{_SCORES[n].label} {number(_SCORES[n], v)}" for n, v in _stats(cell, scores).items() if n in scores and math.isfinite(v)
    ]
    text = -1 if cell.text is None else words.plain(quoted(cell.text))
    return [text, [words.token(t) for t, _ in cell.top], [round(1e4 * p) for _, p in cell.top], ", ".join(shown)]

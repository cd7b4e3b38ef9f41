"""Views of trajectories, scores and patchscopes. They know no models, tokenizers or lenses, and none imports another.

| I want | Call |
|---|---|
| a table in the terminal | `terminal(traj)`, `to_text(traj)` |
| a page to open or send | `html(traj)`, `html_fragment(traj)` in notebooks |
| a picture for a paper | `svg(traj)` |
| a figure to script | `figure(traj)` (plotly) |
| numbers | `frame(traj)` (pandas), `to_json(traj)` |
| a file | `save(traj, path)` |
| evaluate's rows | `scores_table(rows)`, `scores_html(rows)`, `scores_figure(rows)` |
| a patchscope's result | `patchscope_table(result)`, `patchscope_html(result)`, `patchscope_figure(result)` |
"""

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from tl_lenses.views.grid import Trajectory, lenses
from tl_lenses.views.page import html, html_fragment
from tl_lenses.views.picture import svg
from tl_lenses.views.plot import figure
from tl_lenses.views.scope import patchscope_figure, patchscope_html, patchscope_table
from tl_lenses.views.scores import scores_figure, scores_html, scores_table
from tl_lenses.views.style import STATS
from tl_lenses.views.table import frame, to_json
from tl_lenses.views.term import TerminalView, terminal, to_text

__all__ = [
    "STATS",
    "TerminalView",
    "figure",
    "frame",
    "html",
    "html_fragment",
    "patchscope_figure",
    "patchscope_html",
    "patchscope_table",
    "save",
    "scores_figure",
    "scores_html",
    "scores_table",
    "svg",
    "terminal",
    "to_json",
    "to_text",
]


def save(
    traj: Trajectory | Mapping[str, Trajectory],
    path: str | Path,
    *,
    stat: str | None = None,
    overwrite: bool = True,
) -> Path:
    """Write a view as the suffix says: `.html`, `.svg`, `.png`, `.csv` or `.json`; returns the path.

    Everything here can be made again from the trajectory, so an existing file is replaced (in one step: a reader sees
    the old file or the new one) unless `overwrite=False`. Missing folders are made. `.svg` and `.png` show batch row 0
    of one lens.

    ValueError for another suffix, an unknown statistic, or several lenses in one picture; FileExistsError with
    `overwrite=False`; ImportError where `.png` lacks the extra.

    >>> save({"logit": a, "tuned": b}, "out/heat.html", stat="entropy")
    """
    path = Path(path)
    write = _WRITERS.get(path.suffix.lower())
    if write is None:
        got = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise ValueError(f"cannot tell how to save {str(path)!r} ({got}): use one of {', '.join(_WRITERS)}")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a directory: give a file in it, such as {str(path / 'heat.html')!r}")
    if not overwrite and path.exists():
        raise FileExistsError(f"{str(path)!r} exists: choose another name or pass overwrite=True")
    data = write(traj, stat)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _single(traj: Trajectory | Mapping[str, Trajectory], kind: str) -> Trajectory:
    found = lenses(traj)
    if len(found) > 1:
        raise ValueError(
            f"a {kind} shows one lens, got {', '.join(found)}: save them one by one, or as .html, .csv or .json"
        )
    return next(iter(found.values()))


def _png(traj: Trajectory | Mapping[str, Trajectory], stat: str | None) -> bytes:
    """Through plotly and kaleido, which draw in a browser; any of the three may be missing."""
    fig = figure(_single(traj, ".png"), stat)
    try:
        return fig.to_image(format="png", scale=2)
    except Exception as error:  # plotly and kaleido raise their own kinds, which differ between versions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ImportError(
            "saving .png needs plotly, kaleido and a Chrome that it finds (pip install tl-lenses[plot]); "
            f".svg needs nothing: {reason}"
        ) from error


_WRITERS: dict[str, Callable[[Trajectory | Mapping[str, Trajectory], str | None], bytes]] = {
    ".html": lambda traj, stat: html(traj, stat).encode(),
    ".svg": lambda traj, stat: svg(_single(traj, ".svg"), stat).encode(),
    ".png": _png,
    ".csv": lambda traj, stat: frame(traj).to_csv(index=False).encode(),
    ".json": lambda traj, stat: to_json(traj).encode(),
}

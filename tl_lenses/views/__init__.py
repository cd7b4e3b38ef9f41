"""Views of trajectories, scores and patchscopes. They know no models, tokenizers or lenses, and none imports another.

| I want | Call |
|---|---|
| a table in the terminal | `terminal(traj)`, `to_text(traj)` |
| a page to open or send | `html(traj)`, `html_fragment(traj)` in notebooks |
| a picture for a paper | `svg(traj)`; several lenses, or the difference of two: `panels(trajs, diff=("tuned", "logit"))` |
| a figure for a talk, 16:9 | `slide({name: traj}, answer=" Tokyo")` |
| any matrix as a page, a picture or text | `heat(values, rows=..., columns=...)` |
| a figure to script | `figure(traj)` (plotly) |
| a heat map to change first | `heat_map(traj)`: a `Heat`, which gives `.svg()`, `.png()` and `.figure()` |
| numbers | `frame(traj)` (pandas), `to_json(traj)` |
| lenses beside each other | `means_lines({name: traj})`: a `Lines`, the mean over tokens by layer |
| a file | `save(traj, path)` |
| evaluate's rows | `scores_table(rows)`, `scores_html(rows)`, `scores_figure(rows)`, `scores_lines(rows)` |
| a patchscope's result | `patchscope_table(result)`, `patchscope_html(result)`, `patchscope_fragment(result)` in notebooks, `patchscope_figure(result)`, `patchscope_heat(result)` |
| a picture of other numbers | `Heat(...)`, `Lines(...)` |
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from tl_lenses.files import csv_text
from tl_lenses.views.grid import Difference, Trajectory, difference
from tl_lenses.views.heatmap import Heat, Panels, Slide
from tl_lenses.views.lines import Lines
from tl_lenses.views.matrix import Matrix, heat
from tl_lenses.views.page import html, html_fragment
from tl_lenses.views.picture import figure, heat_map, means_lines, panels, slide, svg
from tl_lenses.views.reading import patchscope_fragment, patchscope_html
from tl_lenses.views.rows import rows_frame, rows_html, rows_table
from tl_lenses.views.saving import page_of, save_as
from tl_lenses.views.scope import patchscope_figure, patchscope_heat, patchscope_table
from tl_lenses.views.scores import scores_figure, scores_html, scores_lines, scores_table
from tl_lenses.views.style import STATS
from tl_lenses.views.table import frame, to_json
from tl_lenses.views.term import TerminalView, terminal, to_text

Picture = Heat | Lines

__all__ = [
    "STATS", "Difference", "Heat", "Lines", "Matrix", "Panels", "Picture", "Slide", "TerminalView", "difference", "figure", "frame",
    "heat", "heat_map", "html", "html_fragment", "means_lines", "page_of", "panels", "patchscope_figure", "patchscope_fragment", "patchscope_heat", "patchscope_html", "patchscope_table",
    "rows_frame", "rows_html", "rows_table", "save", "save_as", "scores_figure", "scores_html", "scores_lines",
    "scores_table", "slide", "svg", "terminal", "to_json", "to_text",
]  # fmt: skip


def save(
    traj: Trajectory | Mapping[str, Trajectory],
    path: str | Path,
    *,
    stat: str | None = None,
    diff: tuple[str, str] | None = None,
    width: int | None = None,
    answer: str | None = None,
    overwrite: bool = True,
) -> Path:
    """Write a view, by suffix: `.html`, `.svg`, `.png`, `.csv` or `.json`; returns the path. See `save_as`.

    `.svg` and `.png` show batch row 0: lenses one below the other on one scale, tokens beyond `width` pixels below. With
    `diff=(a, b)` they show lens a minus lens b, and the page starts with it; with an `answer` they are a `slide` of it.

    ValueError for another suffix, an unknown statistic or lens; FileExistsError with `overwrite=False`; ImportError where
    `.png` lacks the extra.

    >>> save({"logit": a, "tuned": b}, "out/heat.svg", stat="entropy", diff=("tuned", "logit"))
    """
    if answer is not None and diff is not None:
        raise ValueError("a slide shows lenses side by side and no difference: give answer or diff")
    picture = lambda: panels(traj, stat, diff=diff, width=width) if answer is None else slide(traj, stat, answer=answer)
    writers: dict[str, Callable[[], str | bytes]] = {
        ".html": lambda: html(traj, stat, diff=diff),
        ".svg": lambda: picture().svg(),
        ".png": lambda: picture().png(),
        ".csv": lambda: csv_text(frame(traj)),
        ".json": lambda: to_json(traj),
    }
    return save_as(path, writers, example="heat.html", overwrite=overwrite)

"""A page to open, send or show in a notebook: of trajectories, with what patchscopes say of their vectors, or of a patchscope."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_lenses.checks import several
from tl_lenses.views.document import in_notebook
from tl_lenses.views.grid import lenses
from tl_lenses.views.page import html
from tl_lenses.views.reading import patchscope_html
from tl_lenses.views.saving import save_as


@dataclass(frozen=True, repr=False)
class Page:
    """One file, offline: `save` writes it, a notebook shows it."""

    text: str
    n_rows: int

    def __repr__(self) -> str:
        return f"Page({len(self.text) / 1000:.0f} kB)"

    def _repr_html_(self) -> str:
        return in_notebook(self.text, self.n_rows)

    def save(self, path: str | Path, *, overwrite: bool = True) -> Path:
        """Write `.html`; returns the path. See `views.save_as`."""
        writers: dict[str, Callable[[], str | bytes]] = {".html": lambda: self.text}
        return save_as(path, writers, example="page.html", overwrite=overwrite)


def page(
    shown: Any,
    *,
    scopes: Sequence[Any] = (),
    stat: str | None = None,
    title: str | None = None,
    diff: tuple[str, str] | None = None,
) -> Page:
    """The page of a trajectory, of several lenses, of a patchscope's result or of its faithfulness.

    Args:
        shown: what `trajectory`, `patchscope` or `faithfulness` returned; trajectories also as a mapping by name.
        scopes: of trajectories, results of `patchscope` or `faithfulness` whose sources are vectors of their prompt: a click
            on such a cell shows what they say of it, text, tokens and scores.
        stat, title, diff: of trajectories, as `views.html` takes them.

    Raises:
        TypeError: nothing that has a page.
        ValueError: `scopes` of another model or without a vector of the prompt; an unknown statistic or lens; options of
            trajectories with a patchscope.

    Example:
        >>> prompt = "The capital of Japan is the city of"                          # doctest: +SKIP
        >>> sources = [tll.Source(prompt, pos) for pos in range(1, 9)]                # doctest: +SKIP
        >>> said = tll.patchscope(model, sources, tll.scopes.token_identity())       # doctest: +SKIP
        >>> tll.page(tll.trajectory(model, lens, prompt), scopes=[said]).save("linked.html")      # doctest: +SKIP
    """
    if isinstance(shown, Mapping) or hasattr(shown, "top_ids") and hasattr(shown, "layers"):
        n_rows = len(next(iter(lenses(shown).values())).layers)
        return Page(html(shown, stat, title=title, diff=diff, scopes=scopes), n_rows)
    if several("scopes", scopes, "results of patchscopes") or (stat, title, diff) != (None, None, None):
        raise ValueError("scopes, stat, title and diff are of the page of a trajectory: leave them out")
    text = patchscope_html(shown)
    return Page(text, len(getattr(shown, "result", shown).pairs))

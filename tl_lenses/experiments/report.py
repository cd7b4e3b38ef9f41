"""What an experiment found: tables that print, pictures, and files. Every experiment returns a `Report` of its own."""

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tl_lenses.checkpoint import check_output, versions, write_bytes
from tl_lenses.experiments.picture import Picture, figure_of, svg_of
from tl_lenses.model import LensModel, name_of


@dataclass(frozen=True)
class Table:
    """Rows to print; numbers are shares (in percent where asked), None and NaN stay empty."""

    title: str
    columns: list[str]
    rows: list[list[Any]]
    note: str = ""
    percent: bool = True

    def cell(self, value: Any) -> str:
        """A cell as text."""
        if isinstance(value, float):
            return "–" if math.isnan(value) else f"{100 * value:.1f}" if self.percent else f"{value:.3f}"
        return "" if value is None else str(value)


@dataclass(frozen=True)
class Report:
    """What an experiment found. `print` it, or take `to_frame()`, `figure()`, `save(folder)`.

    Attributes:
        model: name of the model.
        settings: what it was run with.
    """

    model: str
    settings: dict[str, Any] = field(default_factory=dict, kw_only=True)

    name = "report"

    def tables(self) -> list[Table]:
        """What is printed."""
        raise NotImplementedError

    def pictures(self) -> dict[str, Picture]:
        """What is drawn, the first one by `figure()`."""
        raise NotImplementedError

    def rows(self) -> list[dict[str, Any]]:
        """What was measured, a dict per row of `result.csv`."""
        raise NotImplementedError

    def to_frame(self) -> Any:
        """What was measured as a pandas data frame, a row each."""
        import pandas

        return pandas.DataFrame(self.rows())

    def figure(self) -> Any:
        """The first picture as a plotly figure (extra `plot`)."""
        return figure_of(next(iter(self.pictures().values())))

    def save(self, folder: str | Path) -> Path:
        """Write `result.json`, `result.csv`, and every picture as .svg (and .html where plotly is installed).

        Files of an earlier run are replaced.

        Raises:
            ValueError: the folder is a file or cannot be written.
        """
        folder = check_output(folder, overwrite=True)
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "experiment": self.name, "model": self.model, "settings": self.settings, "versions": versions(),
            "tables": [
                {"title": t.title, "columns": t.columns, "rows": t.rows, "note": t.note} for t in self.tables()
            ],
            "pictures": list(self.pictures()), "rows": self.rows(),
        }  # fmt: skip
        write_bytes(folder / "result.json", (json.dumps(_jsonable(content), indent=1) + "\n").encode())
        write_bytes(folder / "result.csv", self.to_frame().to_csv(index=False).encode())
        for name, picture in self.pictures().items():
            write_bytes(folder / f"{name}.svg", svg_of(picture).encode())
            try:
                page = figure_of(picture).to_html(include_plotlyjs=True)
            except ImportError:
                continue
            write_bytes(folder / f"{name}.html", page.encode())
        return folder

    def __str__(self) -> str:
        from rich.console import Console, Group

        from tl_lenses import views

        tables = self.tables()
        drawn = Group(*_drawn(tables))
        # Numbers are never cut: a table that needs more than the terminal has runs over.
        # rich counts neither the lines between columns nor all of the padding.
        needed = Console(width=1000).measure(drawn).minimum + 2 * max(len(table.columns) for table in tables)
        return views.to_text(drawn, width=needed if needed > shutil.get_terminal_size((80, 24)).columns else None)

    def __rich__(self) -> Any:
        from rich.console import Group

        return Group(*_drawn(self.tables()))

    def markdown(self) -> str:
        """The tables for a page of documentation."""
        out = []
        for table in self.tables():
            out.append(f"**{table.title}**\n" if table.title else "")
            out.append("| " + " | ".join(table.columns) + " |")
            out.append("|" + "---|" * len(table.columns))
            out += ["| " + " | ".join(table.cell(v) for v in row) + " |" for row in table.rows]
            out.append(f"\n{table.note}\n" if table.note else "")
        return "\n".join(out)


def _drawn(tables: Iterable[Table]) -> list[Any]:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    found = []
    for table in tables:
        note = f"{table.note}{'; ' * bool(table.note)}in percent" if table.percent else table.note
        one = RichTable(
            title=table.title or None, caption=note or None, title_justify="left", caption_justify="left",
            box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, int(len(table.columns) < 9)), header_style="bold", title_style="bold",
        )  # fmt: skip
        for i, column in enumerate(table.columns):
            one.add_column(Text(column), justify="right" if i else "left", no_wrap=not i)
        for row in table.rows:
            one.add_row(*(Text(table.cell(v)) for v in row))
        found += [*([Text("")] if found else []), one]
    return found


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def named(model: LensModel) -> str:
    """The model's name, as tables show it."""
    return name_of(model)

"""The result of an experiment: a grid of numbers, and how it is printed, drawn and saved. Every experiment returns a `Report`."""

import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table as RichTable
from rich.text import Text

from tl_lenses.experiments.grid import Grid, Table
from tl_lenses.files import as_path, check_output, csv_text, json_text, versions, write_bytes
from tl_lenses.views import Heat, Picture, rows_html, save_as, to_text


@dataclass(frozen=True)
class Report:
    """The result of an experiment. `print` it, or call `to_frame()`, `figure()`, `save(folder)`.

    The values and the axes of the grid are attributes as well: `report.cosine` is `report.grid["cosine"]`, and
    `report.layers` are the labels of its axis "layer".

    Attributes:
        model: name of the model.
        grid: the numbers.
        settings: model, text and options of the measurement; "data" is the name of the text or of the facts.
    """

    model: str
    grid: Grid = field(default_factory=Grid, kw_only=True)
    settings: dict[str, Any] = field(default_factory=dict, kw_only=True)

    name = "report"

    def __getattr__(self, name: str) -> Any:
        grid = self.__dict__.get("grid")
        if grid is not None and not name.startswith("_"):
            if name in grid:
                return grid[name]
            for axis, labels in grid.axes.items():
                if name in (f"{axis}s", f"{axis}es"):
                    return list(labels)
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    # --- the parts that each kind of report has of its own

    def tables(self) -> list[Table]:
        """The tables to print."""
        raise NotImplementedError

    def pictures(self) -> dict[str, Picture]:
        """The pictures by name, the main one first."""
        raise NotImplementedError

    def rows(self) -> list[dict[str, Any]]:
        """The numbers, a dict per row of `result.csv`: every cell of the grid, if a report does not say otherwise."""
        return self.grid.rows()

    # --- the same for every report

    def to_frame(self) -> Any:
        """The rows as a pandas data frame."""
        import pandas

        return pandas.DataFrame(self.rows())

    def figure(self, name: str | None = None) -> Any:
        """A picture as a figure, the main one by default (extra `plot`): plotly's of a heat map, matplotlib's of lines.

        Raises:
            ValueError: no picture of this name.
        """
        return self._picture(name).figure()

    def _picture(self, name: str | None) -> Picture:
        pictures = self.pictures()
        if name is not None and name not in pictures:
            raise ValueError(f"no picture {name!r}: there are {', '.join(pictures)}")
        return pictures[name or next(iter(pictures))]

    def to_json(self) -> str:
        """Settings, tables and rows as JSON; numbers that are not finite are null."""
        content = {
            "experiment": self.name, "model": self.model, "settings": self.settings, "versions": versions(),
            "tables": [
                {"title": t.title, "columns": t.columns, "rows": t.rows, "note": t.note} for t in self.tables()
            ],
            "pictures": list(self.pictures()), "rows": self.rows(),
        }  # fmt: skip
        return json_text(content) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write one file, if the path ends in .json, .csv or .md, or .svg or .png (the main picture), or else a folder of them.

        A folder gets `result.json`, `result.csv`, and every picture as .svg; heat maps also as .html where plotly is
        installed. Files of an earlier run are replaced. Lines need matplotlib (extra `plot`): without it a warning says
        that they were left out.

        Raises:
            ValueError: another suffix; a folder that is a file or cannot be written.
        """
        path = as_path(path)
        writers: dict[str, Callable[[], str | bytes]] = {
            ".json": self.to_json, ".csv": lambda: csv_text(self.to_frame()), ".md": self.markdown,
            ".svg": lambda: self._picture(None).svg(), ".png": lambda: self._picture(None).png(),
        }  # fmt: skip
        if path.suffix.lower() in writers and not path.is_dir():
            check_output(path.parent, overwrite=True)
            return save_as(path, writers, example="result.json")
        folder = check_output(path, overwrite=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "result.json", self.to_json().encode())
        write_bytes(folder / "result.csv", csv_text(self.to_frame()).encode())
        for name, picture in self.pictures().items():
            try:
                write_bytes(folder / f"{name}.svg", picture.svg().encode())
            except ImportError as error:
                warnings.warn(f"{name}.svg is left out, the numbers are saved: {error}", stacklevel=2)
            if isinstance(picture, Heat) and find_spec("plotly") is not None:
                write_bytes(folder / f"{name}.html", picture.figure().to_html(include_plotlyjs=True).encode())
        return folder

    def __repr__(self) -> str:
        axes = ", ".join(f"{len(labels)} {axis}" for axis, labels in self.grid.axes.items())
        return f"{type(self).__name__}({self.model!r}{': ' * bool(axes)}{axes})"

    def __str__(self) -> str:
        tables = self.tables()
        drawn = Group(*_drawn(tables))
        # Numbers are never cut: a table that needs more than the terminal has runs over.
        # rich counts neither the lines between columns nor all of the padding.
        needed = Console(width=1000).measure(drawn).minimum + 2 * max(len(table.columns) for table in tables)
        return to_text(drawn, width=needed if needed > shutil.get_terminal_size((80, 24)).columns else None)

    def __rich__(self) -> Any:
        return Group(*_drawn(self.tables()))

    def _repr_html_(self) -> str:
        shown = lambda table: [[table.cell(value) for value in row] for row in table.rows]
        return "\n".join(rows_html(t.title, t.columns, shown(t), _note(t)) for t in self.tables())

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


def _note(table: Table) -> str:
    return f"{table.note}{'; ' * bool(table.note)}in percent" if table.percent else table.note


_WHOLE = 20  # characters of a cell that is kept on one line: a number with its interval


def _drawn(tables: Iterable[Table]) -> list[Any]:
    drawn = []
    for table in tables:
        rich = RichTable(
            title=table.title or None, caption=_note(table) or None, title_justify="left", caption_justify="left",
            box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, int(len(table.columns) < 9)), header_style="bold", title_style="bold",
        )  # fmt: skip
        for i, column in enumerate(table.columns):
            widest = max((len(table.cell(row[i])) for row in table.rows), default=0)
            least = widest if widest <= _WHOLE else None
            rich.add_column(Text(column), justify="right" if i else "left", no_wrap=not i, min_width=least)
        for row in table.rows:
            rich.add_row(*(Text(table.cell(v)) for v in row))
        drawn += [*([Text("")] if drawn else []), rich]
    return drawn

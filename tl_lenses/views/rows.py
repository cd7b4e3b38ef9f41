"""Tables of plain rows: the invariants of `check` and the maps of `Translators`, in the terminal and in notebooks."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from tl_lenses.checks import plain_text, several
from tl_lenses.files import readable


def rows_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> Table:
    """A rich table: text to the left, numbers (three digits) to the right, None as "–".

    >>> rich.print(rows_table("maps", ["layer", "|b|"], [[0, 1.25]]))
    """
    title, note, columns, rows = _checked(title, note, columns, rows)
    table = Table(
        title=title, caption=note or None, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD,
        show_edge=False, title_style="bold", header_style="bold",
    )  # fmt: skip
    for i, column in enumerate(columns):
        numbers = all(not isinstance(row[i], str) for row in rows)
        table.add_column(Text(column), justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(Text(cell(value)) for value in row))
    return table


def rows_html(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> str:
    """The same as an HTML fragment: no scripts, no styles beyond its own."""
    title, note, columns, rows = _checked(title, note, columns, rows)
    style = 'style="text-align:left;padding:2px 10px"'
    head = "".join(f"<th {style}>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td {style}>{escape(cell(value))}</td>" for value in row) + "</tr>" for row in rows)
    below = f"<p>{escape(note)}</p>" if note else ""
    return f"<p><b>{escape(title)}</b></p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"


def _checked(title: Any, note: Any, columns: Any, rows: Any) -> tuple[str, str, list[str], list[list[Any]]]:
    names = [plain_text("a column", column) for column in several("columns", columns, "texts")]
    cells = [several("a row", row, "cells") for row in several("rows", rows, "rows")]
    if wrong := [row for row in cells if len(row) != len(names)]:
        raise ValueError(f"a row has {len(wrong[0])} cells, expected one for each of the {len(names)} columns")
    return readable(plain_text("title", title)), readable(plain_text("note", note), keep="\n"), names, cells


def cell(value: Any) -> str:
    """A value as text."""
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else readable(str(value), keep="\n")


def rows_frame(records: Sequence[dict[str, Any]]) -> Any:
    """Rows as a pandas data frame."""
    import pandas

    if wrong := [record for record in several("records", records, "mappings") if not isinstance(record, Mapping)]:
        raise TypeError(f"a record must be a mapping, got a {type(wrong[0]).__name__}")
    return pandas.DataFrame(list(records))

"""Views of `evaluate`'s rows: dicts with lens, layer, kl, cross_entropy, bits_per_byte, top1, entropy, bias."""

import math
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from tl_lenses.checks import several
from tl_lenses.views.lines import Lines

Row = Mapping[str, Any]

# name -> (heading, unit, which is better, format)
_COLUMNS = {
    "kl": ("KL", "nats", "low", "{:.3f}"),
    "bits_per_byte": ("bits/B", "bits per byte", "low", "{:.3f}"),
    "top1": ("top-1", "agreement with the model", "high", "{:.1%}"),
    "cross_entropy": ("cross entropy", "nats", "low", "{:.3f}"),
    "entropy": ("entropy", "nats", None, "{:.3f}"),
    "bias": ("bias", "nats", "low", "{:.3f}"),
}
_SHOWN = ("kl", "bits_per_byte", "top1")
_NOTE = "KL to the model in nats; bits/B: bits per byte; top-1: agreement with the model; bold: the best lens of the layer"


def scores_table(rows: Iterable[Row], title: str | None = None) -> Table:
    """A rich table: layers down, for each lens KL, bits per byte and top-1 agreement, the layer's best lens bold.

    A lens without a row at a layer gets "–". ValueError if there are no rows or a row lacks `lens` or `layer`.

    >>> rich.print(scores_table(scores.rows))
    """
    layers, names, cells, best = _arranged(rows)
    table = Table(
        title=title, caption=_NOTE, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=0,
        show_edge=False, header_style="",
    )  # fmt: skip
    table.add_column(Text("\nlayer"), justify="right")
    for name in names:
        table.add_column("", width=1)  # air between the lenses
        for value in _SHOWN:
            # the name stands over the middle column of its lens
            above = Text(str(name), style="bold") if value == _SHOWN[1] else Text("")
            table.add_column(above.append(f"\n{_COLUMNS[value][0]}", "not bold"), justify="right", no_wrap=True)
    for layer in layers:
        row = []
        for name in names:
            row.append(Text(""))
            for value in _SHOWN:
                row.append(Text(cells[layer, name, value], style="bold" if name in best[layer, value] else ""))
        table.add_row(Text(str(layer)), *row)
    return table


def scores_html(rows: Iterable[Row]) -> str:
    """`scores_table` as an HTML table for notebooks: no scripts, no styles beyond its own.

    >>> IPython.display.HTML(scores_html(scores.rows))
    """
    layers, names, cells, best = _arranged(rows)
    edge = "padding:2px 10px;text-align:right;font-variant-numeric:tabular-nums"
    group = f"{edge};border-left:1px solid #8886"
    heads = "".join(f'<th colspan="{len(_SHOWN)}" style="{group};text-align:center">{escape(n)}</th>' for n in names)
    columns = "".join(
        f'<th style="{group if v == _SHOWN[0] else edge};font-weight:normal">{_COLUMNS[v][0]}</th>' for _ in names for v in _SHOWN
    )
    body = []
    for layer in layers:
        row = ""
        for name in names:
            for v in _SHOWN:
                text = escape(cells[layer, name, v])
                row += f'<td style="{group if v == _SHOWN[0] else edge}">'
                row += f"<b>{text}</b></td>" if name in best[layer, v] else f"{text}</td>"
        body.append(f'<tr><th style="{edge}">{escape(str(layer))}</th>{row}</tr>')
    return (
        '<table style="border-collapse:collapse">'
        f'<thead><tr><th style="{edge}"></th>{heads}</tr><tr><th style="{edge}">layer</th>{columns}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody>"
        f'<caption style="caption-side:bottom;text-align:left">{escape(_NOTE)}</caption></table>'
    )


def scores_lines(rows: Iterable[Row], value: str = "kl") -> Lines:
    """One line per lens: the value over the layers. ValueError for an unknown value.

    >>> scores_lines(scores.rows, "bits_per_byte").svg()
    """
    rows = _rows(rows)
    if not isinstance(value, str) or value not in _COLUMNS:
        raise ValueError(f"no value {value!r} in the scores: choose from {', '.join(_COLUMNS)}")
    layers, names, _, _ = _arranged(rows)
    heading, unit, _, _ = _COLUMNS[value]
    number_of = {(row["layer"], row["lens"]): _number(row, value) for row in rows}
    numbers = all(isinstance(layer, int) for layer in layers)
    xs = layers if numbers else range(len(layers))  # places where there are names: they mix with numbers
    y = lambda layer, name: math.nan if (value := number_of.get((layer, name))) is None else value
    series = {str(name): [(x, y(layer, name)) for x, layer in zip(xs, layers, strict=True)] for name in names}
    ticks = None if numbers else dict(zip(xs, map(str, layers), strict=True))
    return Lines(f"{heading} by layer", series, up=f"{heading}, {unit}", ticks=ticks)


def scores_figure(rows: Iterable[Row], value: str = "kl") -> Any:
    """`scores_lines` as a matplotlib figure.

    ValueError for an unknown value, ImportError without matplotlib.

    >>> scores_figure(scores.rows, "bits_per_byte").savefig("scores.png")
    """
    return scores_lines(rows, value).figure()


def _rows(rows: Any) -> list[Row]:
    rows = several("rows", rows, "mappings")
    if wrong := [row for row in rows if not isinstance(row, Mapping)]:
        raise TypeError(f"expected rows with the keys lens and layer, got a {type(wrong[0]).__name__}")
    return rows


def _arranged(rows: Iterable[Row]) -> tuple[list[Any], list[str], dict[tuple[Any, str, str], str], dict[tuple[Any, str], set[str]]]:
    """Layers and lenses in order of appearance, the text of each cell, and the best lenses per layer and value.

    The best lenses are compared as printed, so ties are ties. A layer with one lens has no best.
    """
    rows = _rows(rows)
    if not rows:
        raise ValueError("there are no scores to show: expected rows with lens, layer, kl, bits_per_byte, top1")
    for row in rows:
        if "lens" not in row or "layer" not in row:
            raise ValueError(f"expected rows with the keys lens and layer, got {sorted(row)}")
    layers, names = list(dict.fromkeys(r["layer"] for r in rows)), list(dict.fromkeys(r["lens"] for r in rows))
    if all(isinstance(layer, int) for layer in layers):
        layers.sort()
    row_of = {(row["layer"], row["lens"]): row for row in rows}
    cells, best = {}, {}
    for layer in layers:
        for value in _SHOWN:
            _, _, better, form = _COLUMNS[value]
            numbers = {n: _number(row_of.get((layer, n), {}), value) for n in names}
            for n, v in numbers.items():
                cells[layer, n, value] = "–" if v is None else form.format(v)
            present = {n: v for n, v in numbers.items() if v is not None}
            winner = (min if better == "low" else max)(present, key=present.__getitem__) if len(present) > 1 else None
            best[layer, value] = {n for n in present if winner and cells[layer, n, value] == cells[layer, winner, value]}
            if len(best[layer, value]) == len(present):
                best[layer, value] = set()  # all are equal, so none is best
    return layers, names, cells, best


def _number(row: Row, value: str) -> float | None:
    v = row.get(value)
    return None if v is None or math.isnan(float(v)) else float(v)

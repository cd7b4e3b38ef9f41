"""Tables as CSV and values as JSON: the text of the files that `write_bytes` writes."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tl_lenses.files.text import readable


def csv_text(rows: Any) -> str:
    """A table as CSV: a header, and one line per row.

    Fields with a comma, a quote or any line break (a bare carriage return too) are quoted; numbers that are not finite
    are empty. Control characters and lone surrogates are written readably, as `<0x1B>`.

    Args:
        rows: a pandas frame (its index is left out), or an iterable of mappings with the same keys.

    >>> csv_text([{"token": "a\\rb", "kl": float("nan")}])
    'token,kl\\n"a\\rb",\\n'
    """
    if hasattr(rows, "columns") and hasattr(rows, "itertuples"):
        names, lines = list(rows.columns), _lines(rows)
    elif isinstance(rows, Iterable) and not isinstance(rows, (str, bytes, Mapping)):
        rows = list(rows)
        if not all(isinstance(row, Mapping) for row in rows):
            raise TypeError("expected a frame or mappings, one per row")
        names = list(rows[0]) if rows else []
        lines = ([row.get(name) for name in names] for row in rows)
    else:
        raise TypeError(f"expected a frame or a list of mappings, got {type(rows).__name__}")
    # The csv module quotes only the characters of its own line end, so we ask for "\r\n" and cut it off.
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\r\n")
    text = []
    for line in [names, *lines]:
        writer.writerow([_field(value) for value in line])
        text.append(buffer.getvalue()[:-2])
        buffer.seek(0)
        buffer.truncate()
    return "".join(f"{line}\n" for line in text)


def _lines(frame: Any) -> Iterable[tuple[Any, ...]]:
    """The rows of a frame; numbers of 32 bits with the digits that they have, not with those of 64."""
    for name in frame.columns:
        if str(frame[name].dtype) in ("float32", "float16"):
            frame = frame.assign(**{name: [float(str(value)) for value in frame[name].to_numpy()]})
    return frame.itertuples(index=False, name=None)


def _field(value: Any) -> Any:
    value = _scalar(value)
    if isinstance(value, str):
        return readable(value, keep="\t\n\r")
    # pandas' NA has no truth value, so that it cannot be compared with itself as NaN can
    if value is None or type(value).__name__ == "NAType" or value != value:
        return ""
    return value


def json_text(content: Any, *, compact: bool = False) -> str:
    """JSON that every reader takes: numbers that are not finite are null, text is plain ASCII.

    Tensors, arrays, tuples and paths are written as lists, numbers and text. Lone surrogates, which no UTF-8 holds,
    are written readably. With `compact` there are no spaces and line breaks.

    >>> json_text({"kl": (1.5, float("nan"))}).split()
    ['{', '"kl":', '[', '1.5,', 'null', ']', '}']
    """
    layout: dict[str, Any] = {"separators": (",", ":")} if compact else {"indent": 1}
    return json.dumps(_plain(content, "the content"), allow_nan=False, **layout)


def _plain(value: Any, where: str) -> Any:
    if hasattr(value, "tolist"):  # of torch and numpy, arrays and single numbers
        value = value.tolist()
    value = _scalar(value)
    if isinstance(value, str):
        return "".join(readable(c) if "\ud800" <= c <= "\udfff" else c for c in value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_plain(str(key), where): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, (bytes, bytearray)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{where} is a {type(value).__name__}: expected text, numbers, lists and mappings of them")


def _scalar(value: Any) -> Any:
    """Plain Python for a numpy or torch number, and text for a path."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return str(value) if isinstance(value, Path) else value

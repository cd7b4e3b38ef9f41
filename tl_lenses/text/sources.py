"""Sources of text: lists, files, folders and `datasets`, as a stream of documents. Nothing is tokenised here.

A source is read as pairs `(text, place)`: a place is JSON, and another process can continue reading after it, without
reading the text before it where the source allows that. Errors name the file, row or byte that is wrong.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

SEPARATOR = "<|endoftext|>"  # alone on a line of a .txt file: the end of a document
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".csv")
PASSAGE = 4096  # characters after which a .txt without separators is cut at the next blank line
GROUP = 16  # documents tokenised in one call: enough for the tokenizer's threads, even books fit in memory

Place = Any  # the place of a source after a text, as JSON; None before the first
Placed = Iterator[tuple[str, Place]]


def starter(source: Iterable[Any], name: str) -> Callable[[], Iterator[Any]]:
    """A function that starts one pass over `source`; if only one pass is possible, a second call raises."""
    once = [source]

    def start() -> Iterator[Any]:
        if not once:
            kind, instead = type(source).__name__, "a list, or for text a function that returns a new iterator"
            raise ValueError(f"{name} is a {kind}, which gives one pass, and that was made. Pass {instead}.")
        return iter(once.pop() if isinstance(source, Iterator) else source)

    return start


def reader(source: Any, column: str, split: str, streaming: bool = True) -> tuple[Callable[[Place], Placed], str]:
    """A function that reads `(text, place)` of `source` after a place, and the name of the source in errors."""
    name = f"'{source}'" if isinstance(source, (str, Path)) else "the source"
    if isinstance(source, (str, Path)):
        path = os.path.expanduser(source)
        if os.path.exists(path):  # Path.exists raises where a string is too long to be a path
            files = _files(Path(path))
            return lambda place: _texts_of_files(files, column, place), name
        source = _hub(source, split, streaming)
    elif isinstance(source, Mapping):
        if split not in source:
            raise ValueError(f"the source has no split {split!r}, only {list(source)}. Pass split=...")
        return reader(source[split], column, split, streaming)
    if getattr(source, "column_names", None) is not None:  # a `datasets` object; some do not know their columns yet
        _check_column(column, source.column_names, name)
        source = source.select_columns([column])
    if not isinstance(source, Iterable) and not callable(source):
        raise TypeError(f"source should be texts, a path, a dataset or a function; got {type(source).__name__}.")
    if hasattr(source, "load_state_dict") and hasattr(source, "skip") and not _has_buffer(source):
        return lambda place: _texts_of_stream(source, column, name, place), name
    start: Callable[[], Any] = starter(source, name) if isinstance(source, Iterable) else source
    return lambda place: _texts_by_count(start, source, column, name, place), name


def bytes_of(source: Any) -> int | None:
    """About how many bytes of text a source has, without reading files; None where that is not known."""
    if isinstance(source, (str, Path)) and os.path.exists(path := os.path.expanduser(source)):
        files = _files(Path(path))
        compressed = any(file.suffix.lower() == ".parquet" for file in files)
        return None if compressed else sum(file.stat().st_size for file in files)
    if isinstance(source, Sequence) and not isinstance(source, str) and all(isinstance(text, str) for text in source):
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in source)
    return None


def _texts_by_count(start: Callable[[], Any], source: Any, column: str, name: str, place: int | None) -> Placed:
    """Texts of a source whose places are row counts: a list is sliced; of others the first `place` rows are skipped."""
    first = place or 0
    if first and isinstance(source, Sequence):
        rows: Iterable[Any] = (source[i] for i in range(first, len(source)))
    elif first and hasattr(source, "select"):  # `datasets.Dataset`, which knows its length
        rows = source.select(range(first, len(source)))
    else:
        rows = islice(iter(start()), first, None)
    return ((_text(row, column, index, name), index + 1) for index, row in enumerate(rows, first))


def _texts_of_stream(source: Any, column: str, name: str, place: Any) -> Placed:
    """Texts of a `datasets.IterableDataset`, whose own state opens the right shard."""
    # A stream keeps its state in the object, so that each pass needs one of its own.
    rows, first = source.skip(0), 0
    if place is not None:
        first, state = place
        rows.load_state_dict(state)
    for index, row in enumerate(rows, first):
        yield _text(row, column, index, name), [index + 1, rows.state_dict()]


def _has_buffer(source: Any) -> bool:
    """Whether a stream was shuffled by `datasets`, whose state then loses the documents of the buffer."""
    inner = getattr(source, "_ex_iterable", None)
    while inner is not None:
        if "BufferShuffled" in type(inner).__name__:
            return True
        inner = getattr(inner, "ex_iterable", None)
    return False


def _texts_of_files(files: list[Path], column: str, place: Any) -> Placed:
    current, first, at = 0, 0, None
    if place is not None:
        current, first, at, name, size = place
        file = files[current] if current < len(files) else None
        if file is None or (file.name, file.stat().st_size) != (name, size):
            now = "no file" if file is None else f"{file.name!r} of {file.stat().st_size}"
            raise ValueError(
                f"the text has changed since its place was noted: file {current} was {name!r} of {size} bytes, now it is {now}. "
                "Put it back, or start again."
            )
    for number, path in enumerate(files[current:], current):
        size = path.stat().st_size
        for index, (row, after) in enumerate(_rows_in(path, column, at), first):
            yield _text(row, column, index, f"'{path}'"), [number, index + 1, after, path.name, size]
        first, at = 0, None


def _text(row: Any, column: str, index: int, name: str) -> str:
    if isinstance(row, Mapping):
        _check_column(column, row, f"row {index} of {name}")
        row = row[column]
    if not isinstance(row, str):
        raise ValueError(f"the text of row {index} of {name} is a {type(row).__name__}; expected a str. Drop the row.")
    return row


def _check_column(column: str, columns: Iterable[str], name: str) -> None:
    if column not in columns:
        raise ValueError(f"{name} has no column {column!r}, only {list(columns)}. Pass text_column=...")


def _hub(source: str | Path, split: str, streaming: bool) -> Any:
    if isinstance(source, Path) or Path(source).suffix.lower() in SUFFIXES or source.startswith((".", "/", "~")):
        raise ValueError(f"there is no file or directory '{source}' (the working directory is '{Path.cwd()}').")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        shown = source if len(source) < 60 else source[:57] + "..."
        raise ValueError(f"{shown!r} is no file, directory or dataset name ('org/name'). Pass text in a list: [text].")
    import datasets

    try:
        return datasets.load_dataset(*source.split(":"), split=split, streaming=streaming)  # pyright: ignore
    except Exception as error:  # datasets has its own errors for each way in which a name can be wrong or out of reach
        raise ValueError(f"'{source}' is no file here, and as a dataset it did not load: {error}") from error


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file()]
        shown = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not any(file.stat().st_size for file in shown):
            raise ValueError(f"the directory '{path}' has no {', '.join(SUFFIXES)} file with anything in it.")
        return [file for file in shown if file.stat().st_size]
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"'{path}' ends in {path.suffix!r}; expected one of {', '.join(SUFFIXES)}. Convert it.")
    if not path.stat().st_size:
        raise ValueError(f"'{path}' is empty. Pass a file with text in it.")
    return [path]


def _rows_in(path: Path, column: str, at: Any = None) -> Iterator[tuple[Any, Any]]:
    """Rows of a file after a place, each with the place after it: a byte where a file has lines, else a row number."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(path, column, at or 0)
    elif suffix == ".csv":
        import pandas

        if not at:
            for _ in _lines(path):  # pandas does not say which byte of the file is wrong
                pass
        row = 0
        for chunk in pandas.read_csv(path, dtype=str, keep_default_na=False, chunksize=GROUP):
            _check_column(column, chunk.columns, f"'{path}'")
            for text in chunk[column]:
                row += 1
                if row > (at or 0):
                    yield text, row
    elif suffix == ".txt":
        yield from _documents(path, at)
    else:
        yield from _json_rows(path, at)


def _parquet_rows(path: Path, column: str, first: int) -> Iterator[tuple[Any, int]]:
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    _check_column(column, file.schema_arrow.names, f"'{path}'")
    row, groups = 0, list(range(file.num_row_groups))
    while groups and row + file.metadata.row_group(groups[0]).num_rows <= first:
        row += file.metadata.row_group(groups.pop(0)).num_rows
    if not groups:
        return
    for batch in file.iter_batches(columns=[column], batch_size=GROUP, row_groups=groups):
        for text in batch.column(0).to_pylist():
            row += 1
            if row > first:
                yield text, row


def _documents(path: Path, at: Any = None) -> Iterator[tuple[str, Any]]:
    offset, separated, through = at or (0, any(line.strip() == SEPARATOR for line, _ in _lines(path)), False)
    if through:
        return
    lines, size = [], 0
    for line, after in _lines(path, offset):
        ends = line.strip() == SEPARATOR
        if ends or (not separated and size >= (16 * PASSAGE if line.strip() else PASSAGE)):
            # a separator ends the document, any other line begins the next one
            yield "".join(lines).strip(), [after if ends else offset, separated, False]
            lines, size = [], 0
        if not ends:
            lines.append(line)
            size += len(line)
        offset = after
    yield "".join(lines).strip(), [offset, separated, True]


def _json_rows(path: Path, at: Any = None) -> Iterator[tuple[Any, Any]]:
    line_number, offset, inside = at or (0, 0, 0)
    lines = _lines(path, offset)
    for number, (line, after) in enumerate(lines, line_number + 1):
        try:
            if line.lstrip().startswith("["):
                whole = json.loads(line + "".join(rest for rest, _ in lines))
                yield from ((row, [number - 1, offset, i]) for i, row in enumerate(whole[inside:], inside + 1))
            elif line.strip():
                yield json.loads(line), [number, after, 0]
        except json.JSONDecodeError as error:
            expected = "a list of strings or objects, or one of them per line"
            raise ValueError(f"'{path}' is not JSON at line {number}: {error}. Expected {expected}.") from None
        offset = after


def _lines(path: Path, offset: int = 0) -> Iterator[tuple[str, int]]:
    """Lines from a byte on, each with the byte after it."""
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                at = offset + error.start
                raise ValueError(f"'{path}' is not UTF-8 at byte {at}. Convert it, for example with iconv.") from None
            first, offset = not offset, offset + len(line)
            yield (text.removeprefix("\ufeff") if first else text).replace("\r\n", "\n"), offset

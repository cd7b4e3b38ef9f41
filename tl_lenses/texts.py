"""Where text comes from: lists, files, folders and `datasets`, as a stream of documents. Never a token.

Errors say which file, row or byte is wrong.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

SEPARATOR = "<|endoftext|>"  # alone on a line of a .txt file: the end of a document
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".csv")
PASSAGE = 4096  # characters after which a .txt without separators is cut at the next blank line
GROUP = 16  # documents tokenised in one call: enough for the tokenizer's threads, even books fit in memory


def starter(source: Iterable[Any], name: str) -> Callable[[], Iterator[Any]]:
    """A function that starts going through `source`; where that works only once, a second call says so."""
    once = [source]

    def start() -> Iterator[Any]:
        if not once:
            kind, instead = type(source).__name__, "a list, or for text a function that returns a new iterator"
            raise ValueError(f"{name} is a {kind}, which gives one pass, and that was made. Pass {instead}.")
        return iter(once.pop() if isinstance(source, Iterator) else source)

    return start


def reader(source: Any, column: str, split: str) -> tuple[Callable[[], Iterator[str]], str]:
    """A function that starts reading the texts of `source`, and what errors call the source."""
    name = f"'{source}'" if isinstance(source, (str, Path)) else "the source"
    if isinstance(source, (str, Path)):
        path = os.path.expanduser(source)
        if os.path.exists(path):  # Path.exists raises where a string is too long to be a path
            named = [(file, f"'{file}'") for file in _files(Path(path))]
            return lambda: (text for file, name in named for text in _texts(_rows_in(file, column), column, name)), name
        source = _hub(source, split)
    elif isinstance(source, Mapping):
        if split not in source:
            raise ValueError(f"the source has no split {split!r}, only {list(source)}. Pass split=...")
        return reader(source[split], column, split)
    if getattr(source, "column_names", None) is not None:  # a `datasets` object; some do not know their columns yet
        _check_column(column, source.column_names, name)
        source = source.select_columns([column])
    if not isinstance(source, Iterable) and not callable(source):
        raise TypeError(f"source should be texts, a path, a dataset or a function; got {type(source).__name__}.")
    start: Callable[[], Any] = starter(source, name) if isinstance(source, Iterable) else source
    return lambda: _texts(start(), column, name), name


def _texts(rows: Iterable[Any], column: str, name: str) -> Iterator[str]:
    for index, row in enumerate(rows):
        if isinstance(row, Mapping):
            _check_column(column, row, f"row {index} of {name}")
            row = row[column]
        if not isinstance(row, str):
            raise ValueError(
                f"the text of row {index} of {name} is a {type(row).__name__}; expected a str. Drop the row."
            )
        yield row


def _check_column(column: str, columns: Iterable[str], name: str) -> None:
    if column not in columns:
        raise ValueError(f"{name} has no column {column!r}, only {list(columns)}. Pass text_column=...")


def _hub(source: str | Path, split: str) -> Any:
    if isinstance(source, Path) or Path(source).suffix.lower() in SUFFIXES or source.startswith((".", "/", "~")):
        raise ValueError(f"there is no file or directory '{source}' (the working directory is '{Path.cwd()}').")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        shown = source if len(source) < 60 else source[:57] + "..."
        raise ValueError(f"{shown!r} is no file, directory or dataset name ('org/name'). Pass text in a list: [text].")
    import datasets

    try:
        return datasets.load_dataset(*source.split(":"), split=split, streaming=True)
    except Exception as error:  # datasets has its own errors for each way in which a name can be wrong or out of reach
        raise ValueError(f"'{source}' is no file here, and as a dataset it did not load: {error}") from error


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file()]
        shown = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not any(file.stat().st_size for file in shown):
            raise ValueError(f"the directory '{path}' has no {', '.join(SUFFIXES)} file with anything in it.")
        return [file for file in shown if file.stat().st_size]
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"'{path}' ends in {path.suffix!r}; expected one of {', '.join(SUFFIXES)}. Convert it.")
    if not path.stat().st_size:
        raise ValueError(f"'{path}' is empty. Pass a file with text in it.")
    return [path]


def _rows_in(path: Path, column: str) -> Iterator[Any]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        from pyarrow import parquet

        file = parquet.ParquetFile(path)
        _check_column(column, file.schema_arrow.names, f"'{path}'")
        for batch in file.iter_batches(columns=[column], batch_size=GROUP):
            yield from batch.column(0).to_pylist()
    elif suffix == ".csv":
        import pandas

        for _ in _lines(path):  # pandas does not say which byte of the file is wrong
            pass
        for chunk in pandas.read_csv(path, dtype=str, keep_default_na=False, chunksize=GROUP):
            _check_column(column, chunk.columns, f"'{path}'")
            yield from chunk[column]
    elif suffix == ".txt":
        yield from _documents(path)
    else:
        yield from _json_rows(path)


def _documents(path: Path) -> Iterator[str]:
    separated = any(line.strip() == SEPARATOR for line in _lines(path))
    lines, size = [], 0
    for line in _lines(path):
        ends = line.strip() == SEPARATOR
        if ends or (not separated and size >= (16 * PASSAGE if line.strip() else PASSAGE)):
            yield "".join(lines).strip()
            lines, size = [], 0
        if not ends:
            lines.append(line)
            size += len(line)
    yield "".join(lines).strip()


def _json_rows(path: Path) -> Iterator[Any]:
    lines = _lines(path)
    for number, line in enumerate(lines, 1):
        try:
            if line.lstrip().startswith("["):
                yield from json.loads(line + "".join(lines))
            elif line.strip():
                yield json.loads(line)
        except json.JSONDecodeError as error:
            expected = "a list of strings or objects, or one of them per line"
            raise ValueError(f"'{path}' is not JSON at line {number}: {error}. Expected {expected}.") from None


def _lines(path: Path) -> Iterator[str]:
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                at = offset + error.start
                raise ValueError(f"'{path}' is not UTF-8 at byte {at}. Convert it, for example with iconv.") from None
            yield (text if offset else text.removeprefix("\ufeff")).replace("\r\n", "\n")
            offset += len(line)

"""Writing any view to a file: the suffix of the path selects the format."""

from collections.abc import Callable, Mapping
from pathlib import Path

from tl_lenses.files import as_path, check_output, readable, write_bytes


def save_as(path: str | Path, writers: Mapping[str, Callable[[], str | bytes]], *, example: str, overwrite: bool = True) -> Path:
    """Write the content for the path's suffix, which one of `writers` makes; returns the path.

    An existing file is replaced in one step (a reader sees the old file or the new one) unless `overwrite=False`.
    Missing folders are made.

    ValueError for another suffix; IsADirectoryError; FileExistsError with `overwrite=False`.

    >>> save_as("rows.csv", {".csv": lambda: "layer\\n0\\n"}, example="rows.csv")
    """
    path = as_path(path)
    if not isinstance(writers, Mapping):
        raise TypeError(f"writers must be a mapping {{suffix: function}}, got {type(writers).__name__}")
    write = writers.get(path.suffix.lower())
    if write is None:
        got = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise ValueError(f"cannot tell how to save {str(path)!r} ({got}): use one of {', '.join(writers)}")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a directory: give a file in it, such as {str(path / example)!r}")
    if not overwrite and path.exists():
        raise FileExistsError(f"{str(path)!r} exists: choose another name or pass overwrite=True")
    check_output(path.parent, overwrite=True)
    content = write()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, readable(content, keep="\n\t\r").encode() if isinstance(content, str) else content)
    return path


def page_of(title: str, body: str) -> str:
    """A fragment of HTML as a page of its own."""
    return f"<!doctype html>\n<meta charset=utf-8>\n<title>{title}</title>\n{body}\n"

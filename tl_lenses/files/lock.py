"""A lock file beside the output of a process, held until the process ends."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tl_lenses.files.atomic import as_path, host

_HELD: dict[Path, int] = {}  # locks of this process, and the thread that has each


@contextmanager
def locked(path: str | Path, *, again: bool = False) -> Iterator[None]:
    """Inside, no other process or thread gets the lock of `path`; with `again`, a thread that has it gets it again.

    The lock is `.NAME.lock` beside `path`; the system gives it up when its process ends, however that happens. Where
    the system has no file locks (Windows), or the file cannot be made, nothing is locked.

    Raises:
        ValueError: another one has it; says which process.

    Example:
        >>> with locked("my-lens"):      # doctest: +SKIP
        ...     translators.save("my-lens")
    """
    path = as_path(path)
    if not path.name:
        raise ValueError(f"{str(path)!r} is a folder: expected a file, or a folder with a name")
    file = path.with_name(f".{path.name}.lock").absolute()
    if again and _HELD.get(file) == threading.get_ident():
        yield
        return
    handle = _lock(path, file)
    if handle is None:
        yield
        return
    _HELD[file] = threading.get_ident()
    try:
        yield
    finally:
        del _HELD[file]
        file.unlink(missing_ok=True)
        os.close(handle)


def _lock(path: Path, file: Path) -> int | None:
    """The open and locked file; None where there are no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:  # what cannot be written says so when it is
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(handle)
            os.close(handle)
            raise ValueError(f"{path} is being written by {owner}: wait until it ends, or choose another name") from None
        except OSError:  # a file system without locks
            os.close(handle)
            file.unlink(missing_ok=True)
            return None
        # The previous owner removes the file before it unlocks it: we may have locked the removed one.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), file.stat()):
                break
        os.close(handle)
    with contextlib.suppress(OSError):  # a full disk: it is locked all the same
        os.truncate(handle, 0)
        os.write(handle, json.dumps({"pid": os.getpid(), "host": host(), "since": time.strftime("%F %T")}).encode())
    return handle


def _owner(handle: int) -> str:
    """The process that holds a lock, as the lock file says."""
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError, OSError):  # not written yet
        return "another process"

"""Atomic writes: a temporary file beside the target, then a rename. Temporary files of killed writes are removed."""

import ctypes
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

DAY = 86_400.0  # seconds after which a temporary file of another machine is removed
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


def versions() -> dict[str, str]:
    """Versions of the packages that made a file, for its record."""
    numbers = {}
    for name in ("tl-lenses", "transformer-lens", "torch", "transformers"):
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            pass
    return numbers


def as_path(path: Any) -> Path:
    """A path, of text or `os.PathLike`."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise TypeError(f"expected a path, as text or a pathlib.Path, got {path!r:.80}")
    if not os.fspath(path):
        raise ValueError("expected a path, got an empty text")
    if "\0" in os.fspath(path):
        raise ValueError(f"a path cannot hold a null character, got {path!r:.80}")
    return Path(path)


def check_output(path: str | Path, *, overwrite: bool = False) -> Path:
    """Check that a folder can be written, before hours of work rather than after them."""
    path = as_path(path)
    if path.is_file():
        raise ValueError(f"{path} is a file: expected a folder to write to")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"{path} exists and is not empty: choose another folder or pass overwrite=True")
    parent = next(p for p in [path, *path.parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"cannot write to {path}: {parent} is not a writable folder")
    return path


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically: a temporary file beside it, then a rename."""
    path = as_path(path)
    if not isinstance(content, (bytes, bytearray, memoryview)):
        raise TypeError(f"content must be bytes, got {type(content).__name__}")
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place at the end of the block, whole or not at all."""
    handle, name = tempfile.mkstemp(prefix=_prefix(path), dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place at the end of the block, all or nothing."""
    temporary = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for written in (*temporary.iterdir(), temporary):
            sync(written)
        if path.exists():
            replace_folder(temporary, path)
            shutil.rmtree(temporary)
        else:
            temporary.rename(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


# --- temporary files, with the host and the process in their names


def write_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, which is whole only after this."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"writing {path.name} failed: {error}") from error


def host() -> str:
    """The name of this machine, as a part of file names."""
    return re.sub(r"[^\w-]", "_", platform.node())[:32] or "unnamed"


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; True where the system cannot tell."""
    if os.name == "nt":  # there `os.kill(pid, 0)` ends the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _prefix(path: Path) -> str:
    """How the name of a temporary file beside `path` begins; its folder is made and swept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    return f".tl_lenses.{host()}.{os.getpid()}."


def sweep(folder: Path) -> None:
    """Remove the temporary files of writes that were killed; those of other machines after a day."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(".tl_lenses.")]
    for name in names:
        match = re.fullmatch(r"\.tl_lenses\.([\w-]+)\.(\d+)\.\w{8}(\.previous)?", name)
        if match is None:
            continue
        left = folder / name
        try:
            here = match[1] == host()
            if here and is_alive(int(match[2])) or not here and time.time() - left.lstat().st_mtime < DAY:
                continue
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        except OSError:  # another process was faster, or it is not ours to remove
            pass


# --- replacing a folder


def replace_folder(new: Path, path: Path) -> None:
    """Exchange the folders at `new` and `path`. At every moment a whole folder is at `path`.

    Where the system cannot exchange two names (it is not Linux, or the file system does not support it), `path` is
    missing between two renames. A process killed there leaves the folder at `set_aside(path)`, where `recover` looks.
    """
    if _exchange(new, path):
        return
    aside = set_aside(path)
    try:
        os.rename(path, aside)
        os.rename(new, path)
    except BaseException:
        recover(path)
        raise
    os.rename(aside, new)


def set_aside(path: Path) -> Path:
    """The place of the folder of `path` between two renames."""
    return path.with_name(f".{path.name}.tl_lenses-old")


def recover(path: Path) -> None:
    """Restore a folder that a killed `replace_folder` set aside, or remove it if the new one is in place."""
    aside = set_aside(path)
    if not aside.exists():
        return
    if path.exists():
        shutil.rmtree(aside)
    else:
        os.rename(aside, path)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where that is not possible."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or an older C library
        return False
    return rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def sync(path: Path) -> None:
    """Flush a file to the disk; or a folder, so that a rename in it survives a power failure."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes only what can be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

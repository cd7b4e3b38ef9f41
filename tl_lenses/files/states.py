"""The state of a fit: one file, and the previous one. Files that are no states are neither replaced nor removed."""

import json
import os
import re
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_lenses.files.atomic import as_path, sync, whole_file, write_tensors


class Notice(UserWarning):
    """A warning for the user: a checkpoint could not be written, or was damaged."""


def previous_of(path: str | Path) -> Path:
    """The path of the checkpoint before the newest one."""
    path = as_path(path)
    return path.with_name(f"{path.name}.previous")


def is_state(path: str | Path) -> bool:
    """Whether a file begins as `save_state` writes it, or is empty; it may be damaged further on."""
    path = as_path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(64)
    return not head or head[8:].startswith((b'{"__metadata__":{"tree":', b'{"__metadata__":{"crc32":'))


def states_of(path: str | Path) -> list[Path]:
    """The files of a fit's state: the newest, the one before it, and those of groups of layers.

    Raises:
        ValueError: a file of such a name is not the state of a fit.
    """
    path = as_path(path)
    names = rf"{re.escape(path.name)}(\.\d+of\d+)?(\.previous)?"
    files = [file for file in path.parent.iterdir() if re.fullmatch(names, file.name)] if path.parent.is_dir() else []
    for file in [path, *files]:
        _check_ours(file)
    return sorted(files)


def remove_state(path: str | Path) -> None:
    """Remove the state of a fit with all its files (`states_of`).

    Raises:
        ValueError: a file of such a name is not the state of a fit; nothing is removed.
    """
    for file in states_of(path):
        file.unlink(missing_ok=True)


def _check_ours(path: Path) -> None:
    if path.exists() and not is_state(path):
        kind = "a folder" if path.is_dir() else "not the state of a fit, or its first bytes are damaged"
        raise ValueError(f"{path} is {kind}: it is left as it is; choose another file for the checkpoint, or move it away")


def save_state(path: str | Path, tree: dict[str, Any]) -> None:
    """Write nested dicts and lists of tensors and JSON values as one safetensors file, atomically.

    The old content of `path` stays beside it as `path.previous`. After a kill, `path` is the old or the new file, whole.

    Raises:
        ValueError: `path` or `path.previous` is another kind of file; it is left as it is.
        OSError: the disk is full, or cannot be written; both files are as they were.
    """
    path = as_path(path)
    if not isinstance(tree, dict):
        raise TypeError(f"a state is a dict, got {type(tree).__name__}")
    for file in (path, previous_of(path)):
        _check_ours(file)
    tensors: dict[str, Tensor] = {}

    def strip(node: Any) -> Any:
        if isinstance(node, Tensor):
            name = str(len(tensors))
            # rows of a stacked tensor are views of one storage, which safetensors refuses
            on_cpu = node.detach().cpu().contiguous()
            tensors[name] = on_cpu.clone() if on_cpu.untyped_storage().nbytes() > on_cpu.nbytes else on_cpu
            return {"tensor": name}
        if isinstance(node, dict):
            return {"dict": [[key, strip(value)] for key, value in node.items()]}
        if isinstance(node, (list, tuple)):
            return {"list": [strip(value) for value in node]}
        return {"value": node}

    skeleton = json.dumps(strip(tree))
    metadata = {"tree": skeleton, "crc32": str(_crc32(skeleton, tensors))}
    with whole_file(path) as temporary:
        write_tensors(temporary, tensors or {"": torch.zeros(0)}, metadata)
        sync(temporary)  # before there is another previous one
        if path.exists():
            _set_aside(path, Path(f"{temporary}.previous"))


def load_state(path: str | Path) -> dict[str, Any]:
    """Read a state of `save_state`; if the newest file is missing or damaged, the previous one, with a `Notice`.

    Raises:
        ValueError: both are damaged, there is no previous one, or it is another kind of file.
    """
    previous = previous_of(path)
    _check_ours(Path(path))
    try:
        return _read_state(Path(path))
    except ValueError as error:
        if not previous.exists():
            raise
        try:
            state = _read_state(previous)
        except ValueError:
            raise ValueError(f"{error}, and {previous.name} beside it is damaged too") from None
        warnings.warn(f"{str(error).split(': delete')[0]}: going on from {previous}, one earlier", Notice, stacklevel=2)
        return state


def state_exists(path: str | Path) -> bool:
    """Whether there is anything for `load_state` to read."""
    return as_path(path).exists() or previous_of(path).exists()


def _read_state(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name}  # noqa: SIM118
            metadata = file.metadata() or {}
        skeleton = json.loads(metadata["tree"])
        if "crc32" in metadata and int(metadata["crc32"]) != _crc32(metadata["tree"], tensors):
            raise ValueError("its checksum is another")
        return _grow(skeleton, tensors)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the checkpoint {path} is damaged ({error}): delete it to start again") from None


def _grow(node: Any, tensors: dict[str, Tensor]) -> Any:
    kind, content = next(iter(node.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _grow(value, tensors) for key, value in content}
    return [_grow(value, tensors) for value in content] if kind == "list" else content


def _crc32(skeleton: str, tensors: dict[str, Tensor]) -> int:
    """Checksum of the whole content, to detect flipped bits; safetensors itself detects truncated files."""
    crc = zlib.crc32(skeleton.encode())
    for name in sorted(tensors, key=int):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), crc)  # pyright: ignore
    return crc


def _set_aside(path: Path, kept: Path) -> None:
    """Make a file the previous one; it stays at `path` too."""
    try:
        try:
            os.link(path, kept)
        except OSError:  # a file system without hard links: the copy costs time, and is as safe
            shutil.copyfile(path, kept)
            sync(kept)
        os.replace(kept, previous_of(path))
    except BaseException:
        kept.unlink(missing_ok=True)
        raise

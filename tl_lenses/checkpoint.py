"""Files: safetensors and JSON only, written atomically, saying what they are for and refused elsewhere."""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
import zlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_lenses.translators import Translators

FORMAT, VERSION = "tl_lenses.translators", 1
WEIGHTS, CONFIG = "translators.safetensors", "config.json"


def versions() -> dict[str, str]:
    """Versions of what made a file, for its record."""
    found = {}
    for name in ("tl-lenses", "transformer-lens", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def check_output(path: str | Path, *, overwrite: bool = False) -> Path:
    """A folder that can be written, checked before hours of work and not after them.

    Raises:
        ValueError: it exists and is not empty (and `overwrite` is off), or it cannot be written.
    """
    path = Path(path)
    if path.is_file():
        raise ValueError(f"{path} is a file: expected a folder to write to")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"{path} exists and is not empty: choose another folder or pass overwrite=True")
    parent = next(p for p in [path, *path.parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"cannot write to {path}: {parent} is not a writable folder")
    return path


def save(translators: Translators, path: str | Path, *, overwrite: bool = False) -> None:
    """Write translators into a folder: all or nothing.

    Both files are made in a temporary folder beside the target and renamed, so that a crash or a full disk leaves
    what was
    there before.

    Args:
        path: the folder; made with its parents.
        overwrite: replace what is there.

    Raises:
        ValueError: the folder exists, or cannot be written.
        OSError: the disk filled; nothing was changed.
    """
    from safetensors.torch import save_file

    path = check_output(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        tensors = {
            "delta": translators.delta.detach().cpu().contiguous(),
            "biases": translators.biases.detach().cpu().contiguous(),
        }
        save_file(tensors, temporary / WEIGHTS)
        config = {
            "format": FORMAT,
            "version": VERSION,
            "n_layers": translators.n_layers,
            "d_in": translators.d_in,
            "d_out": translators.d_out,
            "rows": [list(row) for row in translators.rows],
            "sha256": _sha256(temporary / WEIGHTS),
            "meta": {"versions": versions(), **translators.meta},
        }
        (temporary / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        for written in (temporary / WEIGHTS, temporary / CONFIG, temporary):
            _sync(written)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.rename(path, old / "old")
            os.rename(temporary, path)
            shutil.rmtree(old)
        else:
            os.rename(temporary, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def load(path_or_hub_id: str | Path, *, device: str | torch.device = "cpu") -> Translators:
    """Read translators from a folder, or from the Hugging Face Hub by "owner/name".

    Raises:
        FileNotFoundError: neither a folder nor a Hub name.
        ValueError: not a folder of translators, or a damaged one; says which file and why.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path_or_hub_id)
    if not path.exists():
        path = _from_hub(str(path_or_hub_id))
    if not path.is_dir() or not (path / CONFIG).is_file():
        raise ValueError(f"{path} is not a folder of translators: expected {CONFIG} and {WEIGHTS} in it")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path / CONFIG} is damaged: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        got = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path / CONFIG} is not of tl_lenses translators: expected format {FORMAT!r}, got {got!r}")
    if config["version"] > VERSION:
        raise ValueError(
            f"{path} has format version {config['version']}, this tl_lenses reads up to {VERSION}: upgrade tl-lenses"
        )
    if not (path / WEIGHTS).is_file():
        raise ValueError(f"{path} has {CONFIG} but no {WEIGHTS}: copy the whole folder")
    try:
        tensors = load_file(path / WEIGHTS, device=str(device))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path / WEIGHTS} is damaged or truncated ({error}): copy it again") from None
    if _sha256(path / WEIGHTS) != config["sha256"]:
        raise ValueError(f"{path / WEIGHTS} is damaged: its checksum is not the one in {CONFIG}; copy it again")
    delta = tensors["delta"]
    translators = Translators(
        [tuple(row) for row in config["rows"]],
        delta,
        tensors["biases"],
        n_layers=config["n_layers"],
        meta=config["meta"],
    )
    # The constructor takes full maps; what was stored is D, put back as it was so that a round trip is exact.
    translators.delta.data = delta
    return translators


def _from_hub(name: str) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise FileNotFoundError(f"no folder {name!r}, and it is not a Hub name (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[WEIGHTS, CONFIG]))
    except Exception as error:  # every network and Hub failure means the same to the caller
        raise FileNotFoundError(
            f"no folder {name!r}, and the Hub did not give it ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


# --- the state of a fit: one file, and the one before it


class Notice(UserWarning):
    """What a user should know and that stops nothing: a checkpoint that could not be written, or was damaged."""


def previous_of(path: str | Path) -> Path:
    """Where the checkpoint before the newest one is kept."""
    path = Path(path)
    return path.with_name(f"{path.name}.previous")


def remove_state(path: str | Path) -> None:
    """Remove a checkpoint and the one before it."""
    for file in (Path(path), previous_of(path)):
        file.unlink(missing_ok=True)


def save_state(path: str | Path, tree: dict[str, Any]) -> None:
    """Write nested dicts and lists of tensors and JSON values as one safetensors file, atomically.

    What `path` held stays beside it as `path.previous`. Killed at any moment, `path` is one of the two, whole.

    Raises:
        OSError: the disk is full, or cannot be written; both files are as they were.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}

    def strip(node: Any) -> Any:
        if isinstance(node, Tensor):
            name = str(len(tensors))
            # rows of a stacked tensor are views of one storage, which safetensors refuses
            held = node.detach().cpu().contiguous()
            tensors[name] = held.clone() if held.untyped_storage().nbytes() > held.nbytes else held
            return {"tensor": name}
        if isinstance(node, dict):
            return {"dict": [[key, strip(value)] for key, value in node.items()]}
        if isinstance(node, (list, tuple)):
            return {"list": [strip(value) for value in node]}
        return {"value": node}

    skeleton = json.dumps(strip(tree))
    metadata = {"tree": skeleton, "crc32": str(_crc32(skeleton, tensors))}
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary, kept = Path(name), Path(f"{name}.previous")
    try:
        try:
            save_file(tensors or {"": torch.zeros(0)}, temporary, metadata)
        except SafetensorError as error:  # safetensors writes by itself and has its own error for a full disk
            raise OSError(f"writing {path} failed: {error}") from error
        _sync(temporary)
        temporary.chmod(0o644)
        if path.exists():
            _link(path, kept)
            os.replace(kept, previous_of(path))
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        for file in (temporary, kept):
            file.unlink(missing_ok=True)
        raise


def load_state(path: str | Path) -> dict[str, Any]:
    """Read what `save_state` wrote; where the newest is missing or damaged the one before it, saying so (`Notice`).

    Raises:
        ValueError: both are damaged, or there is no other.
    """
    previous = previous_of(path)
    try:
        return _read_state(Path(path))
    except ValueError as error:
        if not previous.exists():
            raise
        try:
            found = _read_state(previous)
        except ValueError:
            raise ValueError(f"{error}, and {previous.name} beside it is damaged too") from None
        warnings.warn(f"{str(error).split(': delete')[0]}: going on from {previous}, one earlier", Notice, stacklevel=2)
        return found


def state_exists(path: str | Path) -> bool:
    """Whether there is anything for `load_state` to read."""
    return Path(path).exists() or previous_of(path).exists()


def _read_state(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name}  # noqa: SIM118
            metadata = file.metadata() or {}
        skeleton = json.loads(metadata["tree"])
        if "crc32" in metadata and int(metadata["crc32"]) != _crc32(metadata["tree"], tensors):
            raise ValueError("its checksum is another")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"the checkpoint {path} is damaged ({error}): delete it to start again") from None

    def grow(node: Any) -> Any:
        kind, content = next(iter(node.items()))
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {key: grow(value) for key, value in content}
        return [grow(value) for value in content] if kind == "list" else content

    return grow(skeleton)


def _crc32(skeleton: str, tensors: dict[str, Tensor]) -> int:
    """Of everything, so that a flipped bit is found; a truncated file safetensors finds itself."""
    crc = zlib.crc32(skeleton.encode())
    for name in sorted(tensors, key=int):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), crc)  # pyright: ignore
    return crc


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically: a temporary file beside it, then a rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _link(path: Path, other: Path) -> None:
    try:
        os.link(path, other)
    except OSError:  # a file system without hard links: the copy costs time, and is as safe
        shutil.copyfile(path, other)
        _sync(other)


def _sync(path: Path) -> None:
    """On the disk and not only in memory; a folder too, without which a rename is lost when the power fails."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

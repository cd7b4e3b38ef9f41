"""Translators on disk: a folder with `translators.safetensors` and `config.json`, both covered by checksums."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_lenses.files.atomic import as_path, check_output, recover, set_aside, versions, whole_folder, write_tensors

# Version 1 has a checksum of the weights only; version 2 one of everything that config.json says too.
FORMAT, VERSION = "tl_lenses.translators", 2
WEIGHTS, CONFIG = "translators.safetensors", "config.json"
PARAMS = "params.pt"  # of tuned-lens, beside a config.json too
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_folder(path: str | Path, *, overwrite: bool = False) -> Path:
    """`check_output` for a folder of translators: with `overwrite` only such a folder is replaced."""
    path = check_output(path, overwrite=overwrite)
    recover(path)
    names = sorted(file.name for file in path.iterdir()) if path.exists() else []
    is_ours = WEIGHTS in names or _format_of(path / CONFIG) == FORMAT
    others = [name for name in names if name not in (WEIGHTS, CONFIG) or not is_ours]
    if others:
        raise ValueError(
            f"{path} holds {others[0]!r}, which is not of translators and would be lost: choose another folder, or move it away"
        )
    return path


def save_maps(
    path: str | Path, tensors: dict[str, Tensor], sizes: dict[str, int], rows: list[list[str]],
    meta: dict[str, Any], *, overwrite: bool = False,
) -> None:  # fmt: skip
    """Write translators into a folder: all or nothing.

    Both files are made in a temporary folder beside the target, which then takes its place. A crash, a full disk or a
    kill leaves the old folder.
    """
    check_meta(meta)
    path = check_folder(as_path(path).resolve(), overwrite=overwrite)
    with whole_folder(path) as temporary:
        write_tensors(temporary / WEIGHTS, {name: x.detach().cpu().contiguous() for name, x in tensors.items()})
        record = {"sha256": sha256(temporary / WEIGHTS), "meta": {"versions": versions(), **meta}}
        config = {"format": FORMAT, "version": VERSION, **sizes, "rows": rows, **record}
        config["checksum"] = _checksum(config)
        (temporary / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def place_of(path: str | Path) -> Path | None:
    """Where on the disk a lens of this name lies, or None; a folder that a killed write left aside counts."""
    path = as_path(path)
    if path.exists():
        return path
    return set_aside(path) if path.name and set_aside(path).exists() else None


def is_ours(path: Path) -> bool:
    """Whether a folder is one that `save_maps` wrote, or was meant to be one."""
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    return WEIGHTS in names or CONFIG in names and _format_of(path / CONFIG) == FORMAT


def load_maps(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config of translators from their folder.

    Files of version 1 are read too; their config.json has no checksum, so only its form is checked.
    """
    path = as_path(path)
    if not path.is_dir() or not (path / CONFIG).is_file():
        raise ValueError(f"{path} is not a folder of translators: expected {CONFIG} and {WEIGHTS} in it")
    config = _config(path)
    if not (path / WEIGHTS).is_file():
        raise ValueError(f"{path} has {CONFIG} but no {WEIGHTS}: copy the whole folder")
    return _tensors(path, config), config


def check_meta(meta: Any) -> None:
    """Check that JSON can hold a record, and that its entries have the expected form."""
    if not isinstance(meta, dict):
        raise TypeError(f"meta should be a dict, got {type(meta).__name__}")
    for key, value in meta.items():
        try:
            json.dumps({key: value})
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(f"meta[{key!r}] cannot be written as JSON ({error}): give numbers, text, lists and dicts") from None
    if meta.get("basis", "raw") not in ("raw", "centered", "mixed"):
        raise ValueError(f'meta["basis"] should be "raw", "centered" or "mixed", got {meta["basis"]!r}')
    to = meta.get("to")
    if to is not None and not (isinstance(to, dict) and _is_count(to.get("n_layers", 1))):
        raise ValueError(f'meta["to"] should be a dict with the n_layers of the other model, got {to!r:.80}')
    held_out = meta.get("held_out")
    if held_out is not None and not (isinstance(held_out, dict)):
        raise ValueError(f'meta["held_out"] should be a dict, got {held_out!r:.80}')
    for name, record in (("", meta), ('["to"]', to or {})):
        fingerprint = record.get("fingerprint")
        if fingerprint is not None and not _is_matrix(fingerprint):
            raise ValueError(f'meta{name}["fingerprint"] should be rows of numbers, as many in each, got {fingerprint!r:.80}')


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _is_matrix(rows: Any) -> bool:
    number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)
    is_row = lambda row: isinstance(row, list) and len(row) == len(rows[0]) > 0 and all(map(number, row))
    return isinstance(rows, list) and len(rows) > 0 and all(map(is_row, rows))


def _config(path: Path) -> dict[str, Any]:
    """config.json of a folder, checked: its format, its version, its checksum and the form of each entry."""
    file = path / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        got = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{file} is not of tl_lenses translators: expected format {FORMAT!r}, got {got!r:.80}")
    version: Any = config.get("version")
    if _is_count(version) and version > VERSION:
        raise ValueError(f"{path} has format version {version}, this tl_lenses reads up to {VERSION}: upgrade tl-lenses")
    wrong = _wrong_in(config)
    if wrong:
        raise ValueError(f"{file} is damaged: {wrong}; copy the folder again")
    return config


def _wrong_in(config: dict[str, Any]) -> str | None:
    """The first thing that is wrong in a config of a known format, or None."""
    version: Any = config.get("version")
    if not _is_count(version):
        return f"its version is {version!r:.80}"
    if (version == 1) == ("checksum" in config):
        return f"version {version} has {'a' if version == 1 else 'no'} checksum of {CONFIG}"
    if version > 1 and config["checksum"] != _checksum(config):
        return "its checksum is another"
    for key in ("n_layers", "d_in", "d_out"):
        if not _is_count(config.get(key)):
            return f"{key} should be a number of at least 1, got {config.get(key)!r:.80}"
    rows = config.get("rows")
    if not isinstance(rows, list) or not rows:
        return "rows should be a list of [source site, target site], one per map"
    for row in rows:
        if not (isinstance(row, list) and len(row) == 2 and all(isinstance(site, str) for site in row)):
            return f"a row should be [source site, target site], got {row!r:.80}"
    if not isinstance(config.get("sha256"), str):
        return f"it has no checksum of {WEIGHTS}"
    try:
        check_meta(config.get("meta"))
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _tensors(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a folder: their checksum, names, shapes and types are those that the config says."""
    from safetensors.torch import load_file

    file = path / WEIGHTS
    try:
        tensors = load_file(file)
    except Exception as error:  # safetensors has its own errors, and more for types that torch does not have
        raise ValueError(f"{file} is damaged or truncated ({error or type(error).__name__}): copy it again") from None
    if sha256(file) != config["sha256"]:
        raise ValueError(f"{file} is damaged: its checksum is not the one in {CONFIG}; copy it again")
    n_rows, d_in, d_out = len(config["rows"]), config["d_in"], config["d_out"]
    for name, shape in (("delta", [n_rows, d_out, d_in]), ("biases", [n_rows, d_out])):
        if name not in tensors:
            raise ValueError(f"{file} has no {name!r}, only {sorted(tensors)}: expected what Translators.save writes")
        tensor = tensors[name]
        if list(tensor.shape) != shape:
            raise ValueError(f"{file}: {name!r} should have shape {shape}, as {CONFIG} says, got {list(tensor.shape)}")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{file}: {name!r} should hold floating point numbers of 16 to 64 bits, got {tensor.dtype}")
    return {name: tensors[name] for name in ("delta", "biases")}


def _format_of(file: Path) -> Any:
    """The format that a config.json says, or None."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return config.get("format") if isinstance(config, Mapping) else None


def _checksum(config: dict[str, Any]) -> str:
    """SHA-256 of a config without its checksum, as JSON reads it back: keys sorted, no spaces."""
    read = json.loads(json.dumps({key: value for key, value in config.items() if key != "checksum"}))
    return hashlib.sha256(json.dumps(read, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with as_path(path).open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()

"""States on disk: a folder of safetensors shards and `states.json`, which any engine can write (docs/states.md has the format)."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_lenses.files.atomic import as_path, whole_file, write_bytes, write_tensors

FORMAT, VERSION, INDEX = "tl_lenses.states", 1, "states.json"


def shard_file(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"states-{number:05d}.safetensors"


def write_shard(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write a shard, whole or not at all."""
    content = json.dumps({"format": FORMAT, "version": VERSION, **about})
    with whole_file(path) as temporary:
        write_tensors(temporary, tensors, {"about": content})


def write_index(folder: Path, about: dict[str, Any]) -> None:
    """Write `states.json`, which says that the folder is whole."""
    content = {"format": FORMAT, "version": VERSION, **about}
    write_bytes(folder / INDEX, (json.dumps(content, indent=1) + "\n").encode())


def about_states(path: str | Path) -> dict[str, Any] | None:
    """What `states.json` of a folder, or the head of a shard, says; None where it is no such file or folder, or cut off.

    Raises:
        ValueError: of a later version.
    """
    path = as_path(path)
    try:
        text = (path / INDEX).read_text(encoding="utf-8") if path.is_dir() else _head(path)
        about = json.loads(text)
    except (OSError, ValueError):
        return None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        return None
    if about.get("version") != VERSION:
        raise ValueError(f"{path} has version {about.get('version')!r}, this tl_lenses reads {VERSION}: upgrade tl-lenses")
    return about


def _head(path: Path) -> str:
    if path.suffix != ".safetensors" or not path.is_file():
        return ""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("about", "")
    except SafetensorError:  # cut off
        return ""


def text_hash(tokens: Int[Tensor, " n"], positions: Int[Tensor, " n"]) -> str:
    """SHA-256 of ids and positions as little-endian 32-bit integers, all ids first."""
    digest = hashlib.sha256()
    for part in (tokens, positions):
        digest.update(part.to(torch.int32).contiguous().numpy().astype("<i4").tobytes())
    return digest.hexdigest()


def hash_of_shards(hashes: list[str]) -> str:
    """The hash of a folder's text: SHA-256 of the hashes of its shards, in order."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()

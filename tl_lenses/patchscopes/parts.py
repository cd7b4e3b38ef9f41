"""A sweep that several processes share without a word: each runs every n-th batch of cells, and the last run reads them all.

All of them run the same code with the same arguments. Batches that a process does not run are blank there, so that what it says at its end is
not to be used. The last run computes no cell: each batch is what one of them kept, and its end is that of a single run, to the last bit.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses.files import load_state, remove_state, save_state
from tl_lenses.patchscopes.result import top_of

FORMAT = "tl_lenses.part"


@dataclass(frozen=True)
class Said:
    """The answers of a batch of cells."""

    # the likeliest next tokens
    top_ids: Int[Tensor, "cells k"]
    top_probs: Float[Tensor, "cells k"]
    ids: Sequence[list[list[int]]]  # the texts of each cell
    logits: Float[Tensor, "cells d_vocab"] | None  # at the read position; None where they are not kept

    @staticmethod
    def of(logits: Float[Tensor, "cells d_vocab"], ids: Sequence[list[list[int]]], keep_logits: bool) -> "Said":
        """From the logits of a run."""
        return Said(*top_of(logits), ids, logits.cpu() if keep_logits else None)


@dataclass
class _Share:
    """What one process runs of all sweeps: batches `part, part + of, ...`; `merges` runs none and has them all."""

    part: int = 0
    of: int = 1
    merges: bool = False
    kept: dict[int, tuple[str, dict[str, Any]]] = field(default_factory=dict)  # by batch: hash of its cells, answers
    n: int = 0  # batches so far


_SHARE: ContextVar[_Share | None] = ContextVar("tl_lenses_share", default=None)


def answers(cells: Any, run: Callable[[], Said], blank: Callable[[], Said]) -> Said:
    """The answers of the next batch: run, read, or blank; the `repr` of `cells` says which cells these are."""
    share = _SHARE.get()
    if share is None:
        return run()
    number, share.n = share.n, share.n + 1
    if not share.merges and number % share.of != share.part:
        return blank()
    key = hashlib.sha256(repr(cells).encode()).hexdigest()
    if not share.merges:
        said = run()
        share.kept[number] = key, vars(said)
        return said
    there, content = share.kept.get(number, ("", {}))
    if there != key:
        raise ValueError(
            f"batch {number} of this sweep is in no part: they are of another version or other options, or what this command runs depends "
            "on what it ran before, and then it cannot be shared"
        )
    return Said(**content)


@contextmanager
def shared(folder: Path, part: int, of: int, command: list[str]) -> Iterator[None]:
    """In the block sweeps run a share of their batches, which is a file of the folder after it; `command` says how to run it again."""
    token = _SHARE.set(share := _Share(part, of))
    try:
        yield
    finally:
        _SHARE.reset(token)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"part-{part:05d}-of-{of:05d}.safetensors"
    remove_state(file)
    save_state(file, {"format": FORMAT, "command": command, "of": of, "batches": [[n, *kept] for n, kept in share.kept.items()]})


@contextmanager
def merging(folder: Path) -> Iterator[list[str]]:
    """In the block sweeps take their answers from the parts in a folder, which must be all of one command: this is given."""
    files = sorted(folder.glob("part-*-of-*.safetensors"))
    parts = [load_state(file) for file in files]
    if not parts:
        raise ValueError(f"{folder} has no part of a sweep: run the command with --shard 0/n, 1/n, ... first")
    first = parts[0]
    for file, part in zip(files, parts, strict=True):
        if part.get("format") != FORMAT or part["of"] != first["of"] or part["command"] != first["command"]:
            raise ValueError(f"{file} is of another command than {files[0].name}: remove the parts that are not meant")
    n = first["of"]
    missing = [f"{i}/{n}" for i in range(n) if folder / f"part-{i:05d}-of-{n:05d}.safetensors" not in files]
    if missing:
        raise ValueError(f"{folder} lacks the parts {', '.join(missing)}: run the command with --shard {missing[0]}")
    kept = {number: (key, content) for part in parts for number, key, content in part["batches"]}
    token = _SHARE.set(share := _Share(merges=True, kept=kept))
    try:
        yield first["command"]
    finally:
        _SHARE.reset(token)
    if share.n != len(kept):
        raise ValueError(f"the parts hold {len(kept)} batches and {share.n} were asked for: this command cannot be shared")

"""What a fit keeps on disk while it runs, so that nothing is lost; and what it says when numbers are not finite."""

import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tl_lenses.checkpoint import Notice, load_state, save_state, state_exists
from tl_lenses.data import Batch
from tl_lenses.fit.distributed import Processes, agree, from_first

VERSION = 3  # of the contents


def state_file(checkpoint: str | Path | None, group: int, groups: int) -> Path | None:
    """Of each group of layers a file of its own, of which the finished ones stay until all are."""
    if checkpoint is None or groups == 1:
        return None if checkpoint is None else Path(checkpoint)
    return Path(checkpoint).with_name(f"{Path(checkpoint).name}.{group + 1}of{groups}")


def resume(checkpoint: str | Path | None, kind: str, settings: dict[str, Any], who: Processes) -> dict[str, Any] | None:
    """The state to go on from, if there is a file; read by the first process and sent to the others.

    Raises:
        ValueError: it is of other settings (the first difference is named) or not of this kind of fit.
    """
    state, error = None, None
    if checkpoint is not None and who.first and state_exists(checkpoint):
        try:
            state = load_state(checkpoint)
            _check(state, checkpoint, kind, settings)
        except ValueError as wrong:
            error = wrong
    agree(error, who)
    return from_first(state, who)


def _check(state: dict[str, Any], checkpoint: str | Path, kind: str, settings: dict[str, Any]) -> None:
    if state.get("format") != f"tl_lenses.{kind}":
        raise ValueError(f"{checkpoint} is not a checkpoint of {kind}: choose another file")
    if state.get("version") != VERSION:
        raise ValueError(
            f"the checkpoint {checkpoint} has version {state.get('version', 1)}, this tl_lenses goes on from {VERSION}: "
            "finish it with the version that wrote it, or delete it to start again"
        )
    for key, value in settings.items():
        if (saved := state["settings"].get(key)) != value:
            raise ValueError(
                f"the checkpoint {checkpoint} was made with {key}={saved!r}, now it is {value!r}: use the same settings, or delete it to start again"
            )


def keep(checkpoint: str | Path | None, kind: str, state: dict[str, Any], what: str, who: Processes) -> bool:
    """Write a checkpoint, if one is wanted and this is the process that writes; whether the disk holds it now.

    A write that fails costs the progress since the last one and not the run: that one stays, a `Notice` says so, and
    training goes on.
    """
    if checkpoint is None or not who.first:
        return False
    try:
        save_state(checkpoint, {"format": f"tl_lenses.{kind}", "version": VERSION, **state})
        return True
    except OSError as error:
        kept = "the one before it is kept" if state_exists(checkpoint) else "there is none yet"
        warnings.warn(
            f"the checkpoint {checkpoint} could not be written {what} ({error}); {kept}, and the fit goes on: make room",
            Notice,
            stacklevel=2,
        )
        return False


def random_state() -> dict[str, Any]:
    """Of torch's global generators, which hooks may draw from."""
    found: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def set_random_state(state: dict[str, Any]) -> None:
    """Back to what `random_state` found."""
    torch.set_rng_state(state["cpu"])
    if len(state.get("cuda", ())) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def unbroken() -> Iterator[None]:
    """Ctrl-C waits until the block is through: half an optimiser's step is no state to save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        if callable(before):
            before(*caught[0])
        else:
            raise KeyboardInterrupt


def guilty_text(
    batches: Sequence[Batch], is_finite: Callable[[Batch], bool], shown: Callable[[Batch], str]
) -> str | None:
    """The first row of text on which numbers are not finite, found by running row after row; None if no single one."""
    for batch in batches:
        for i in range(len(batch.tokens)):
            mask = None if batch.attention_mask is None else batch.attention_mask[i : i + 1]
            row = Batch(batch.tokens[i : i + 1], mask)
            if not is_finite(row):
                return shown(row)
    return None

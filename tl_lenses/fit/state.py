"""What a fit keeps on disk while it runs, so that nothing is lost; and what it says when numbers are not finite."""

import json
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tl_lenses.files import Notice, as_path, load_state, locked, save_state, state_exists
from tl_lenses.fit.team import Team
from tl_lenses.identity import identity_of, same_model
from tl_lenses.model import LensModel
from tl_lenses.tokens import Batch

VERSION = 3  # of the contents


def state_file(checkpoint: str | Path | None, group: int, groups: int) -> Path | None:
    """The file of one group of layers. Files of finished groups stay until all groups are finished."""
    if checkpoint is None:
        return None
    file = as_path(checkpoint)
    return file if groups == 1 else file.with_name(f"{file.name}.{group + 1}of{groups}")


@contextmanager
def alone(checkpoint: str | Path | None, team: Team) -> Iterator[None]:
    """Inside, no other fit writes this checkpoint; the first process has the lock."""
    with ExitStack() as stack:
        with team.together():
            if checkpoint is not None and team.first:
                stack.enter_context(locked(as_path(checkpoint), again=True))
        yield


@dataclass(frozen=True)
class Checkpoint:
    """Where the state of a fit is kept, and what it must be of to be resumed."""

    file: Path | None  # None for no checkpoint
    kind: str  # the name of the fitter
    settings: dict[str, Any]  # those that decide the result; `note`, a dict, holds the caller's own
    identities: tuple[dict[str, Any], ...]  # `identity_of` each model
    team: Team  # the first process reads and writes

    @staticmethod
    def of(
        file: str | Path | None, kind: str, settings: dict[str, Any], models: Sequence[LensModel | None], team: Team
    ) -> "Checkpoint":
        """The same in all processes: they are refused if their settings differ, and make the passes for identities all or none."""
        settings = {**settings, "note": note_of(settings["note"])}
        team.same_settings(settings)
        kept = any(team.gather(file is not None))
        identities = tuple(identity_of(model) for model in models if model is not None and kept)
        return Checkpoint(None if file is None else as_path(file), kind, settings, identities, team)

    def resume(self) -> dict[str, Any] | None:
        """The state to continue from, if there is a file; read by the first process and sent to the others."""
        state = None
        with self.team.together():
            if self.file is not None and self.team.first and state_exists(self.file):
                state = load_state(self.file)
                self._check(state)
        return self.team.from_first(state)

    def keep(self, state: dict[str, Any], moment: str) -> bool:
        """Write a checkpoint, if there is a file and this is the first process; whether the disk holds it now.

        A write that fails costs the progress since the last one and not the fit: a `Notice` says so, and training continues.
        """
        if self.file is None or not self.team.first:
            return False
        about = {"format": f"tl_lenses.{self.kind}", "version": VERSION, "identities": list(self.identities)}
        try:
            save_state(self.file, {**about, "settings": self.settings, **state})
            return True
        except OSError as error:
            kept = "the one before it is kept" if state_exists(self.file) else "there is none yet"
            warnings.warn(
                f"the checkpoint {self.file} could not be written {moment} ({error}); {kept}, and the fit goes on: make room",
                Notice,
                stacklevel=2,
            )
            return False

    def _check(self, state: dict[str, Any]) -> None:
        if state.get("format") != f"tl_lenses.{self.kind}":
            raise ValueError(f"{self.file} is not a checkpoint of {self.kind}: choose another file")
        if state.get("version") != VERSION:
            raise ValueError(
                f"the checkpoint {self.file} has version {state.get('version', 1)}, this tl_lenses goes on from {VERSION}: "
                "finish it with the version that wrote it, or delete it to start again"
            )
        saved = _flat(state["settings"])
        for key, value in _flat(self.settings).items():
            if saved.get(key) != value:
                raise ValueError(
                    f"the checkpoint {self.file} was made with {key}={saved.get(key)!r}, now it is {value!r}: "
                    "use the same settings, or delete it to start again"
                )
        # A file of an earlier version 3 has no identities.
        for before, now in zip(state.get("identities", ()), self.identities, strict=False):
            if not _same_identity(before, now):
                raise ValueError(
                    f"the checkpoint {self.file} is of another model: it was made with {_described(before)}, now it is "
                    f"{_described(now)}: use the same model, or delete it to start again"
                )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in settings.items() if k != "note"}, **(settings.get("note") or {})}


def _same_identity(a: dict[str, Any], b: dict[str, Any]) -> bool:
    close = same_model(a["fingerprint"], b["fingerprint"], a["model_dtype"], b["model_dtype"])
    return close and all(a[key] == b[key] for key in ("d_model", "model_dtype", "basis"))


def _described(identity: dict[str, Any]) -> str:
    return f"{identity['model']!r} ({identity['model_dtype']}, {identity['basis']} residuals)"


def note_of(note: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A caller's note in the form in which a file gives it back."""
    try:
        return json.loads(json.dumps(None if note is None else dict(note)))
    except (TypeError, ValueError) as error:
        raise TypeError(f"note must be a dict of JSON values such as the name of the text, got {note!r}") from error


def random_state() -> dict[str, Any]:
    """The state of torch's global generators, which hooks may draw from."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Set the generators to a state of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if len(state.get("cuda", ())) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def unbroken() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: half an optimiser's step is no state to save."""
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


def guilty_text(batches: Sequence[Batch], is_finite: Callable[[Batch], bool], shown: Callable[[Batch], str]) -> str | None:
    """The first row of text on which numbers are not finite, found by running row after row; None if no single one."""
    for batch in batches:
        for i in range(len(batch.tokens)):
            row = batch.take(slice(i, i + 1))
            if not is_finite(row):
                return shown(row)
    return None

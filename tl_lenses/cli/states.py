"""The state of a fit beside the output of the command: when it is saved, and the message when a fit ends early."""

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from tl_lenses.cli.messages import note
from tl_lenses.files import states_of


def same_groups(state: Path, n_groups: int) -> None:
    """Refuse a state of another number of groups of layers: each group has a file, and a fit looks for its own files only."""
    for file in states_of(state):
        group = re.match(r"\.\d+of(\d+)", file.name.removeprefix(state.name))
        n_groups_before = int(group[1]) if group else 1
        if n_groups_before != n_groups:
            raise ValueError(
                f"the checkpoint {file} was made with the layers in {n_groups_before} groups, now there are {n_groups}: use the same "
                "--layers and --layers-at-once, or pass --restart"
            )


@contextlib.contextmanager
def saved_when_terminated() -> Iterator[None]:
    """Treat SIGTERM (a scheduler) and SIGHUP (a closed terminal) as Ctrl-C, so that the state is saved.

    Under `nohup` SIGHUP stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    signals = [number for name in names if signal.getsignal(number := getattr(signal, name)) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, _interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _interrupt(*_: Any) -> None:
    # A shell starts what runs in the background with SIGINT ignored: sending it would do nothing.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        raise KeyboardInterrupt
    os.kill(os.getpid(), signal.SIGINT)


def say_what_is_left(state: Path, error: BaseException, history: list[dict[str, Any]], steps: int | str) -> None:
    """Where the state of a fit is that ended early, if there is one and the error does not say it."""
    has_state = bool(states_of(state))
    if not isinstance(error, KeyboardInterrupt):
        if has_state and str(state) not in str(error):
            note(f"the state of the fit is in {state}")
        return
    if not has_state:
        typer.echo("interrupted before the first step: nothing was written", err=True)
        return
    where = f"after step {history[-1]['step']} of {steps}" if history else "before its first step"
    again = "run the same command again to continue"
    typer.echo(f"interrupted {where}: the state is in {state}; {again}", err=True)

"""Output of the command: results on stdout; errors, notes and, in a terminal, the current stage on stderr."""

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence

import typer

from tl_lenses.files import Notice, readable

# Names of arguments in the library -> names of options here.
_FLAGS = {
    "overwrite=True": "--overwrite", "text_column=...": "--text-column", "split=...": "--split",
    "layers=[...]": "--layers", "anti_targets": "--anti-target", "Pass text in a list: [text].": "Pass a file.",
}  # fmt: skip
_NUMBERS = re.compile(
    r"\b(seq_len|batch_size|limit_tokens|shuffle_buffer|tokens_per_step|layers_at_once|checkpoint_every|max_new_tokens"
    r"|workers|steps|heldout_tokens)(?= must be | is \d)"
)


def say(text: str) -> None:
    """A line or a table on stdout; names in it cannot send codes to the terminal."""
    print(readable(text, keep="\n\t"), flush=True)


def fail(message: str) -> None:
    """An error, as one line on stderr."""
    typer.echo(f"error: {readable(message)}", err=True)


def note(message: str) -> None:
    """A warning for the user, as one line on stderr."""
    typer.echo(f"note: {readable(message)}", err=True)


def stage(text: str) -> None:
    """The current stage, on stderr if it is a terminal."""
    if in_terminal():
        typer.echo(f"{readable(text)} ...", err=True)


def in_terminal() -> bool:
    """Whether stderr is a terminal."""
    return sys.stderr.isatty()


def ranges(sources: Sequence[int | str]) -> str:
    """`0..7` where the layers follow each other, else a list."""
    layers = list(sources)
    first = layers[0] if layers else None
    if isinstance(first, int) and len(layers) > 2 and layers == list(range(first, first + len(layers))):
        return f"{first}..{layers[-1]}"
    return ", ".join(map(str, layers))


def joined(error: object) -> str:
    """A message on one line."""
    return " ".join(str(error).split())


def one_line(error: Exception) -> str:
    """One readable line, with the names of options instead of the library's arguments."""
    text = joined(error.args[0] if isinstance(error, KeyError) and error.args else error)
    for argument, flag in _FLAGS.items():
        text = text.replace(argument, flag)
    text = _NUMBERS.sub(lambda match: f"--{match[1].replace('_', '-')}", text)
    if isinstance(error, (ValueError, TypeError, RuntimeError, KeyError, ImportError, OSError)) and text:
        return text
    return f"{type(error).__name__}{': ' * bool(text)}{text} (tl-lenses --debug ... shows where)"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, no logs below critical, no progress bars that are not ours."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not in_terminal():  # in a terminal a download of gigabytes should be seen
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", Notice)
            warnings.showwarning = lambda message, *_, **__: note(joined(message))
            yield
    finally:
        logging.disable(level)

"""The option --shard of commands that sweep, and the arguments with which their parts are merged."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tl_lenses.cli.messages import say
from tl_lenses.patchscopes.parts import shared

Shard = Annotated[
    str | None,
    typer.Option(
        help="i/n: run every n-th batch of the sweep from the i-th on, 0 <= i < n; then `tl-lenses merge`.", metavar="I/N"
    ),
]
_arguments: list[str] = []  # of the command that runs


def noted(arguments: Sequence[str]) -> None:
    """Keep the arguments of the command that runs."""
    _arguments[:] = arguments


def parse_shard(text: str | None) -> tuple[int, int]:
    """`--shard i/n`, counted from 0.

    >>> parse_shard("2/8"), parse_shard(None)
    ((2, 8), (0, 1))
    """
    match = re.fullmatch(r"(\d+)/(\d+)", "0/1" if text is None else text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(f"--shard should be i/n with 0 <= i < n, such as 0/4 for the first of four, got {text!r}")
    return int(match[1]), int(match[2])


def parts_of(output: Any) -> Path:
    """The folder of the parts of a command that writes `output`."""
    return Path(f"{output}.parts")


@contextmanager
def sharing(shard: str | None, output: Any) -> Iterator[None]:
    """In the block sweeps run the share of `--shard`, and the command ends with it; all of them without `--shard`."""
    if shard is None:
        yield
        return
    part, of = parse_shard(shard)
    command = [a for i, a in enumerate(_arguments) if not (a.startswith("--shard") or i and _arguments[i - 1] == "--shard")]
    with shared(parts_of(output), part, of, command):
        yield
    say(f"part {part}/{of} is in {parts_of(output)}; when all {of} are there: tl-lenses merge {output}")
    raise typer.Exit(0)

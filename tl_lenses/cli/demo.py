"""The command `tl-lenses demo`."""

from pathlib import Path
from typing import Annotated

import typer

from tl_lenses.cli import options
from tl_lenses.cli.messages import say
from tl_lenses.demo import run, run_real


def demo(
    model: Annotated[
        str | None, typer.Option(help="A real model such as smollm2-135m (make real); the bundled one by default.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the lenses and the heat map.")] = Path("demo"),
    steps: Annotated[int, typer.Option(help="Steps of the tuned lens, 512 tokens each.", min=1)] = 48,
    heldout_tokens: Annotated[int, typer.Option(help="Tokens to measure on.", min=1)] = 4096,
    seed: options.TextSeed = 0,
) -> None:
    """Fit, measure and draw lenses of the bundled model, offline, in about two minutes.

    Of a real model: a lens with its heat map, a famous name described layer by layer, and the capitals of countries.

    Example: tl-lenses demo --output demo
    """
    if model is None:
        run(output, steps=steps, heldout_tokens=heldout_tokens, seed=seed, say=say)
    else:
        run_real(model, output, seed=seed, say=say)

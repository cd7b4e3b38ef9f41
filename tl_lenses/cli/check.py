"""The command `tl-lenses check`."""

from typing import Annotated

import typer
from rich.console import Console

import tl_lenses as tll
from tl_lenses.cli import options
from tl_lenses.cli.inputs import load_model


def check(
    model: options.Model = "lab-gpt2",
    prompt: Annotated[str | None, typer.Option(help="Text to check on; random tokens by default.")] = None,
    device: options.Device = None,
    dtype: options.DType = options.Dtype.float32,
    reference: Annotated[
        str | None,
        typer.Option(help="The Hugging Face model to compare with, a folder or a name on the Hub; often that of --model."),
    ] = None,
) -> None:
    """Prove on a prompt that reading and patching are right on this model; leaves with 1 if not.

    Example: tl-lenses check --model gpt2 --reference gpt2
    """
    plain = None if reference is None else load_model(reference, device, dtype.value, reference=True)
    report = tll.check(load_model(model, device, dtype.value), prompt, reference=plain)
    Console().print(report)
    if not report.ok:
        failed = sum(not check.passed for check in report.checks)
        raise ValueError(f"{failed} of {len(report.checks)} invariants fail on {model}")

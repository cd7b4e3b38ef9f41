"""The command `tl-lenses eval`."""

from pathlib import Path
from typing import Annotated

import typer

from tl_lenses.cli.inputs import (
    BatchSize,
    Data,
    Device,
    DType,
    Dtype,
    Lenses,
    Model,
    SeqLen,
    TextColumn,
    check_file,
    data_source,
    lens_names,
    load_model,
    parse_layers,
    read_batches,
    saved_lenses,
)
from tl_lenses.cli.messages import say

FILES = (".csv", ".json", ".html", ".svg", ".png")
EVAL_TOKENS = 2**14


def evaluate(
    model: Model = "lab-gpt2",
    lens: Lenses = None,
    data: Data = None,
    output: Annotated[
        Path | None, typer.Option(help="Also write the scores: .csv, .json, .html, .svg or .png.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Such as 0,4,8 or ::2 or a hook name; all by default.")] = None,
    text_column: TextColumn = "text",
    split: Annotated[
        str | None, typer.Option(help="Split of a data set; validation by default, for lab heldout.")
    ] = None,
    seq_len: SeqLen = None,
    batch_size: BatchSize = 8,
    limit_tokens: Annotated[int, typer.Option(help="Tokens of text to use.")] = EVAL_TOKENS,
    seed: Annotated[int, typer.Option(help="Of the order of the text.")] = 0,
    device: Device = None,
    dtype: DType = Dtype.float32,
) -> None:
    """Measure lenses on held-out text, the logit lens beside them: KL, bits per byte, top-1 agreement per layer.

    Example: tl-lenses eval --model gpt2 --lens my-lens --lens old=older-lens --data heldout.txt
    """
    folders = lens_names(lens, taken=("logit",))
    check_file(output, FILES)
    data = data_source(data, model, text_column)

    import tl_lenses as tll

    fitted = saved_lenses(folders)
    loaded = load_model(model, device, dtype.value)
    if split is None:
        split = "heldout" if data == "lab" else "validation"
    batches = read_batches(loaded, data, text_column, split, seq_len, batch_size, limit_tokens, seed)
    lenses = {"logit": tll.Lens(loaded), **{name: tll.Lens(loaded, maps) for name, maps in fitted.items()}}
    scores = tll.evaluate(
        loaded, lenses, batches, layers=None if layers is None else parse_layers(layers, loaded.cfg.n_layers + 1)
    )
    say(str(scores))
    if output is not None:
        about = {"model": model, "data": data, "lenses": {name: str(folder) for name, folder in folders.items()}}
        scores.save(output, about=about)
        say(f"saved in {output}")

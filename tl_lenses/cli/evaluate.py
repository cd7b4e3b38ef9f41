"""The command `tl-lenses eval`."""

from pathlib import Path
from typing import Annotated

import typer

import tl_lenses as tll
from tl_lenses.cli import inputs, options
from tl_lenses.cli.messages import say

FILES = (".csv", ".json", ".html", ".svg", ".png")
EVAL_TOKENS = 2**14


def evaluate(
    model: options.Model = "lab-gpt2",
    lens: options.Lenses = None,
    data: options.Data = None,
    output: Annotated[Path | None, typer.Option(help="Also write the scores: .csv, .json, .html, .svg or .png.")] = None,
    layers: options.Layers = None,
    text_column: options.TextColumn = "text",
    split: Annotated[str | None, typer.Option(help="Split of a data set; validation by default, for lab heldout.")] = None,
    seq_len: options.SeqLen = None,
    batch_size: options.BatchSize = 8,
    limit_tokens: options.LimitTokens = EVAL_TOKENS,
    seed: options.TextSeed = 0,
    device: options.Device = None,
    dtype: options.DType = options.Dtype.float32,
) -> None:
    """Measure lenses on held-out text, the logit lens beside them: KL, bits per byte, top-1 agreement per layer.

    Example: tl-lenses eval --model gpt2 --lens my-lens --lens old=older-lens --data heldout.txt
    """
    folders = inputs.lens_names(lens, taken=("logit",))
    inputs.check_file(output, FILES)
    data, fitted = inputs.data_source(data, model, text_column), inputs.saved_lenses(folders)
    loaded = inputs.load_model(model, device, dtype.value)
    if split is None:
        split = "heldout" if data == "lab" else "validation"
    batches = inputs.read_batches(loaded, data, text_column, split, seq_len, batch_size, limit_tokens, seed)
    lenses = {name: tll.Lens(loaded, maps) for name, maps in ({"logit": None} | fitted).items()}
    scores = tll.evaluate(loaded, lenses, batches, layers=inputs.parse_layers(layers, loaded.cfg.n_layers + 1))
    say(str(scores))
    if output is not None:
        about = {"model": model, "data": data, "lenses": {name: str(folder) for name, folder in folders.items()}}
        scores.save(output, about=about)
        say(f"saved in {output}")

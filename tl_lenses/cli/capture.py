"""The command `tl-lenses capture`: states of a text on disk, for `fit` and `eval`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from tl_lenses.cli.inputs import (
    BatchSize,
    Data,
    Device,
    DType,
    Dtype,
    Model,
    SeqLen,
    TextColumn,
    data_source,
    load_model,
    parse_layers,
    read_batches,
)
from tl_lenses.cli.messages import say, stage
from tl_lenses.cli.parts import share

CAPTURED_TOKENS = 2**18
Stored = Enum("Stored", {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}, type=str)


def capture(
    output: Annotated[Path, typer.Option(help="Folder to write; shards that are there stay.")],
    model: Model = "lab-gpt2",
    data: Data = None,
    layers: Annotated[str | None, typer.Option(help="Such as 0,4,8 or ::2 or a hook name; all by default.")] = None,
    store: Annotated[Stored | None, typer.Option(help="Type of the stored states; the model's own by default.")] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="i/n: every n-th shard from the i-th on, 0 <= i < n; the others elsewhere.", metavar="I/N"),
    ] = None,
    shard_tokens: Annotated[int | None, typer.Option(help="Tokens of a shard; about 256 MB by default.", min=1)] = None,
    text_column: TextColumn = "text",
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    seq_len: SeqLen = None,
    batch_size: BatchSize = 8,
    limit_tokens: Annotated[int, typer.Option(help="Tokens of text to use.")] = CAPTURED_TOKENS,
    seed: Annotated[int, typer.Option(help="Of the order of the text.")] = 0,
    device: Device = None,
    dtype: DType = Dtype.float32,
) -> None:
    """Store the states of a text, so that fits and evaluations on it run the model no more.

    Example: tl-lenses capture --model gpt2 --data corpus.txt --layers 4,8 --store float16 --output states
    """
    data, part = data_source(data, model, text_column), share(shard)

    import tl_lenses as tll

    loaded = load_model(model, device, dtype.value)
    batches = read_batches(loaded, data, text_column, split, seq_len, batch_size, limit_tokens, seed)
    chosen = None if layers is None else parse_layers(layers, loaded.cfg.n_layers)
    stage(f"capturing {data}")
    tll.capture(
        loaded, batches, chosen, output, dtype=None if store is None else store.value, shard=part, shard_tokens=shard_tokens
    )  # fmt: skip
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    say(
        f"{output} holds {size / 1e6:,.1f} MB of states; next: tl-lenses fit --model {model} --data {output} --output my-lens"
    )

"""The command `tl-lenses capture`: states of a text on disk, for `fit` and `eval`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

import tl_lenses as tll
from tl_lenses.cli import options
from tl_lenses.cli.inputs import data_source, load_model, parse_layers, read_batches
from tl_lenses.cli.messages import say, stage
from tl_lenses.cli.parts import parse_shard

CAPTURED_TOKENS = 2**18
Stored = Enum("Stored", {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}, type=str)


def capture(
    output: Annotated[Path, typer.Option(help="Folder to write; shards that are there stay.")],
    model: options.Model = "lab-gpt2",
    data: options.Data = None,
    layers: options.Layers = None,
    store: Annotated[Stored | None, typer.Option(help="Type of the stored states; the model's own by default.")] = None,
    shard: Annotated[
        str | None, typer.Option(help="i/n: every n-th shard from the i-th on, 0 <= i < n; the others elsewhere.", metavar="I/N")
    ] = None,
    shard_tokens: Annotated[int | None, typer.Option(help="Tokens of a shard; about 256 MB by default.", min=1)] = None,
    text_column: options.TextColumn = "text",
    split: options.Split = "train",
    seq_len: options.SeqLen = None,
    batch_size: options.BatchSize = 8,
    limit_tokens: options.LimitTokens = CAPTURED_TOKENS,
    seed: options.TextSeed = 0,
    device: options.Device = None,
    dtype: options.DType = options.Dtype.float32,
) -> None:
    """Store the states of a text, so that fits and evaluations on it run the model no more.

    Example: tl-lenses capture --model gpt2 --data corpus.txt --layers 4,8 --store float16 --output states
    """
    data, part = data_source(data, model, text_column), parse_shard(shard)
    loaded = load_model(model, device, dtype.value)
    batches = read_batches(loaded, data, text_column, split, seq_len, batch_size, limit_tokens, seed)
    chosen, kept = parse_layers(layers, loaded.cfg.n_layers), None if store is None else store.value
    stage(f"capturing {data}")
    tll.capture(loaded, batches, chosen, output, dtype=kept, shard=part, shard_tokens=shard_tokens)
    size = sum(file.stat().st_size for file in output.glob("*.safetensors")) / 1e6
    say(f"{output} holds {size:,.1f} MB of states; next: tl-lenses fit --model {model} --data {output} --output my-lens")

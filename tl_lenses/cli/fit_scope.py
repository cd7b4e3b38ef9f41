"""The command `tl-lenses fit-scope`: train the map of a scope on text, and save it for `tl-lenses patchscope --map`."""

from pathlib import Path
from typing import Annotated

import typer

import tl_lenses as tll
from tl_lenses.cli import options
from tl_lenses.cli.inputs import data_source, load_model, parse_layers, read_batches
from tl_lenses.cli.messages import say, stage
from tl_lenses.cli.patchscope import target_named
from tl_lenses.cli.states import saved_when_terminated
from tl_lenses.files import check_folder, remove_state
from tl_lenses.fit.team import leave, processes


def fit_scope(
    output: options.Output,
    model: options.Model = "lab-gpt2",
    scope: Annotated[str, typer.Option(help="The target, as of patchscope; what it should say comes right after it.")] = "repeat",
    placeholder: options.Placeholder = "x",
    labels: Annotated[
        str, typer.Option(help="token: the one under the source position; a number: so many next ones.", metavar="N")
    ] = "token",
    layers: options.SourceLayers = None,
    target_layers: options.TargetLayers = None,
    data: options.Data = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=0)] = 100,
    rank: Annotated[int, typer.Option(help="Of an additional low-rank term.", min=0)] = 0,
    lr: Annotated[float, typer.Option(help="Largest learning rate.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the choice and order of the vectors.")] = 0,
    overwrite: options.Overwrite = False,
    text_column: options.TextColumn = "text",
    split: options.Split = "train",
    seq_len: options.SeqLen = None,
    batch_size: options.BatchSize = 8,
    device: options.Device = None,
    dtype: options.DType = options.Dtype.float32,
) -> None:
    """Train the map of a scope through the frozen model. After Ctrl-C, a crash or a kill the same command goes on where it stopped.

    Example: tl-lenses fit-scope --layers 2,4 --target-layers 1 --output my-map
    """
    team, state = processes(), Path(f"{output}.checkpoint")
    if team.first:
        check_folder(output, overwrite=overwrite)
    target, source = target_named(scope, placeholder), data_source(data, model, text_column)
    loaded = load_model(model, team.device if device is None else device, dtype.value)
    depth = loaded.cfg.n_layers + 1
    batches = read_batches(loaded, source, text_column, split, seq_len, batch_size, None, seed)
    stage(f"training on {source}")
    with saved_when_terminated():
        maps = tll.fit_scope(
            loaded, batches, target, int(labels) if labels.isdecimal() else labels, steps, rank=rank, lr=lr, seed=seed, checkpoint=state,
            layers=parse_layers(layers, depth), target_layers=parse_layers(target_layers, depth),
            note={"data": source, "text_column": text_column, "split": split, "batch_size": batch_size, "seq_len": batches.seq_len},
        )  # fmt: skip
    leave()
    if not team.first:
        return
    maps.save(output, overwrite=overwrite)
    remove_state(state)
    say(str(maps))
    say(f"saved in {output}; next: tl-lenses patchscope TEXT --model {model} --scope {scope!r} --map {output}")

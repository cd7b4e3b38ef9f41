"""The command `tl-lenses fit-scope`: train the map of a scope on text, and save it for `tl-lenses patchscope --map`."""

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
from tl_lenses.cli.patchscope import target_named
from tl_lenses.cli.states import saved_when_terminated


def fit_scope(
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    model: Model = "lab-gpt2",
    scope: Annotated[
        str, typer.Option(help="The target, as of patchscope; what it should say comes right after it.")
    ] = "repeat",
    placeholder: Annotated[str, typer.Option(help="The word of an own prompt that receives the vector.")] = "x",
    labels: Annotated[
        str, typer.Option(help="token: the one under the source position; a number: so many next ones.", metavar="N")
    ] = "token",
    layers: Annotated[str | None, typer.Option(help="Source layers, such as 0,4,8 or ::2; all by default.")] = None,
    target_layers: Annotated[
        str | None, typer.Option(help="Each source layer into each of these; by default into the same layer only.")
    ] = None,
    data: Data = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=0)] = 100,
    rank: Annotated[int, typer.Option(help="Of an additional low-rank term.", min=0)] = 0,
    lr: Annotated[float, typer.Option(help="Largest learning rate.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the choice and order of the vectors.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    text_column: TextColumn = "text",
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    seq_len: SeqLen = None,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: DType = Dtype.float32,
) -> None:
    """Train the map of a scope through the frozen model. After Ctrl-C, a crash or a kill the same command goes on where it stopped.

    Example: tl-lenses fit-scope --layers 2,4 --target-layers 1 --output my-map
    """
    from tl_lenses.files import check_folder, remove_state
    from tl_lenses.fit.team import leave, processes

    team, state = processes(), Path(f"{output}.checkpoint")
    if team.first:
        check_folder(output, overwrite=overwrite)
    target, source = target_named(scope, placeholder), data_source(data, model, text_column)

    import tl_lenses as tll

    loaded = load_model(model, team.device if device is None else device, dtype.value)
    depth = loaded.cfg.n_layers + 1
    batches = read_batches(loaded, source, text_column, split, seq_len, batch_size, None, seed)
    stage(f"training on {source}")
    with saved_when_terminated():
        maps = tll.fit_scope(
            loaded, batches, target, int(labels) if labels.isdecimal() else labels, steps, rank=rank, lr=lr, seed=seed, checkpoint=state,
            layers=None if layers is None else parse_layers(layers, depth),
            target_layers=None if target_layers is None else parse_layers(target_layers, depth),
            note={"data": source, "text_column": text_column, "split": split, "batch_size": batch_size, "seq_len": batches.seq_len},
        )  # fmt: skip
    leave()
    if not team.first:
        return
    maps.save(output, overwrite=overwrite)
    remove_state(state)
    say(str(maps))
    say(f"saved in {output}; next: tl-lenses patchscope TEXT --model {model} --scope {scope!r} --map {output}")

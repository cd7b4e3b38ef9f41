"""The command `tl-lenses fit`: checks, the model and its text, the fit with its state, and the lens on disk."""

import contextlib
import functools
import sys
import time
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

import tl_lenses as tll
from tl_lenses.cli import options
from tl_lenses.cli.inputs import data_source, device_named, load_model, parse_layers, read_batches
from tl_lenses.cli.memory import fit_plan
from tl_lenses.cli.messages import fail, ranges, say, stage
from tl_lenses.cli.states import same_groups, saved_when_terminated, say_what_is_left
from tl_lenses.files import check_folder, check_output, locked, remove_state, states_of
from tl_lenses.fit.settings import Settings
from tl_lenses.fit.shard import shard as spread
from tl_lenses.fit.team import leave, processes
from tl_lenses.fit.timing import time_jacobian, time_regression, time_tuned
from tl_lenses.text.stored import is_stored

REGRESSION_TOKENS = 2**18  # a streamed data set may have no end
PROMPTS = 100  # of a Jacobian lens: rows of text, of which as many are usable and 1,000 published
HELD_OUT_TOKENS = 2**14  # read of --held-out

# The words that options take; the last four are those of `fit_tuned`.
Method = Enum("Method", {"regression": "regression", "tuned": "tuned", "jacobian": "jacobian", "relevance": "relevance"}, type=str)
Optimizer = Enum("Optimizer", {"muon": "muon", "sgd": "sgd", "adam": "adam"}, type=str)
Loss = Enum("Loss", {"kl": "kl", "ce": "ce"}, type=str)
Precision = Enum("Precision", {"auto": "auto", "float32": "float32", "bfloat16": "bfloat16"}, type=str)
Vocabulary = Enum("Vocabulary", {"exact": "exact", "sampled": "sampled", "auto": "auto"}, type=str)


def fit(
    output: options.Output,
    model: options.Model = "lab-gpt2",
    method: Annotated[
        Method, typer.Option(help="Closed-form least squares; training on the loss; averaged gradients (relevance: the R-lens).")
    ] = Method.tuned,
    data: options.Data = None,
    steps: Annotated[
        str, typer.Option(help="Optimiser steps, or auto: until the loss on --held-out no longer falls.", metavar="N")
    ] = "250",
    held_out: Annotated[
        str | None, typer.Option(help="Text of its own, as --data: each layer's best look at it is what is saved.")
    ] = None,
    tokens_per_step: Annotated[
        int | None, typer.Option(help="Batches are added up to so many; one batch by default.", min=1)
    ] = None,
    optimizer: Annotated[
        Optimizer, typer.Option(help="muon is the best measured; sgd is the published recipe's.")
    ] = Optimizer.muon,
    lr: Annotated[float | None, typer.Option(help="Learning rate at the first step; by optimiser.")] = None,
    loss: Annotated[Loss, typer.Option(help="kl to the model, or ce on the text.")] = Loss.kl,
    precision: Annotated[
        Precision, typer.Option(help="Of the products with the unembedding; auto: bf16 where the hardware has it.")
    ] = Precision.auto,
    vocabulary: Annotated[
        Vocabulary, typer.Option(help="Tokens that a step scores: all, or a weighted sample; auto: a sample of 32,768 and more.")
    ] = Vocabulary.auto,
    layers: options.Layers = None,
    seed: options.TextSeed = 0,
    overwrite: options.Overwrite = False,
    checkpoint: Annotated[Path | None, typer.Option(help="File for the state of the fit; OUTPUT.checkpoint by default.")] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(help="Steps between two states, 25; of a regression batches, 200; of a Jacobian lens batches, 10.", min=1),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on from the state, if there is one, or delete it first.")
    ] = True,
    layers_at_once: Annotated[
        int | None, typer.Option(help="Layers in memory at a time, each group a pass over the text; all by default.", min=1)
    ] = None,
    offload: Annotated[bool, typer.Option("--offload", help="Optimiser state and moments on the CPU between uses.")] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Spread the model's blocks over the processes (FSDP), where it fits none.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream/--download", help="Read a `datasets` name as it is needed, or all of it first.")
    ] = True,
    shuffle_buffer: Annotated[int, typer.Option(help="Documents that the shuffle draws from.", min=1)] = 1000,
    workers: Annotated[int, typer.Option(help="Processes that tokenise; 0: a thread, enough for most tokenizers.", min=0)] = 0,
    show_progress: Annotated[
        bool | None, typer.Option("--progress/--no-progress", help="Loss, tokens/s and time left; in a log file every half minute.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say memory, tokens and minutes, timed on one real step; write nothing.")
    ] = False,
    text_column: options.TextColumn = "text",
    split: options.Split = "train",
    seq_len: options.SeqLen = None,
    batch_size: options.BatchSize = 8,
    limit_tokens: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens of text to use; unless told regression reads at most {REGRESSION_TOKENS}, and jacobian {PROMPTS} rows."
        ),
    ] = None,
    device: options.Device = None,
    dtype: options.DType = options.Dtype.float32,
) -> None:
    """Fit a lens and save it. After Ctrl-C, a crash or a kill the same command goes on where it stopped.

    On several processes or machines: accelerate launch --num_processes 8 -m tl_lenses fit ...

    Example: tl-lenses fit --model gpt2 --data corpus.txt --output my-lens
    """
    given = SimpleNamespace(**locals())
    who = processes()
    state = given.state = Path(f"{output}.checkpoint") if checkpoint is None else checkpoint
    _check(given, who)
    history: list[dict[str, Any]] = []
    with contextlib.ExitStack() as locks:
        if who.first and not dry_run:
            for path in (output, state):
                locks.enter_context(locked(path))
        place = who.device if device is None else device
        loaded = load_model(model, "cpu" if shard else place, dtype.value)
        if shard:
            spread(loaded, device)
        chosen = parse_layers(layers, loaded.cfg.n_layers)
        batches = _batches(given, loaded)
        if chosen is None and hasattr(batches, "layers"):
            chosen = batches.layers  # of stored states
        if who.first:
            if not dry_run:
                if not resume:
                    remove_state(state)
                n_rows = loaded.cfg.n_layers if chosen is None else len(chosen)
                same_groups(state, -(-n_rows // (layers_at_once or n_rows)))
            stage("planning the memory")
            say(fit_plan(loaded, chosen, batches, _settings(given), given.method.value))
        if dry_run:
            timing = _timed(given, loaded, batches, chosen)
            leave()
            if who.first:
                say(f"{timing}\nnothing was written")
            return
        start = time.perf_counter()
        try:
            with saved_when_terminated():
                translators = _fitted(given, loaded, batches, chosen, history)
            seconds = time.perf_counter() - start
            leave()
            if not who.first:
                return
            where = _save(translators, output, overwrite)
        except BaseException as error:
            if who.first:
                say_what_is_left(state, error, history, steps)
            if not isinstance(error, KeyboardInterrupt):
                raise
            raise typer.Exit(130) from None
        remove_state(state)

    say(
        f"{method.value} lens of {model}: layers {ranges(translators.sources)}, {translators.meta['tokens_seen']:,} tokens, {seconds:.0f} s"
        + f" in {who.world} processes" * (who.world > 1)
    )
    if kept := translators.meta.get("guard", {}).get("kept_start"):
        say(
            f"{len(kept)} of {len(translators.rows)} layers were worse at the end than at the start, on tokens set aside, and keep the start"
        )
    if history:
        last = list(history[-1]["loss"].values())
        shown = [f"layer {translators.sources[i]} {last[i]:.3f}" for i in sorted({0, len(last) // 2, len(last) - 1})]
        say(f"{loss.value} of the last step, nats: {', '.join(shown)}")
    say(f"saved in {where}; next: tl-lenses eval --model {model} --lens {where}")


def _check(given: Any, who: Any) -> None:
    """Everything that can be refused before a model is loaded; texts and steps are resolved."""
    if who.first:
        check_folder(given.output, overwrite=given.overwrite)
        check_output(given.state.parent, overwrite=True)
        states_of(given.state)
    given.data = data_source(given.data, given.model, given.text_column)
    given.n_steps = _steps(given.steps, given.held_out)
    given.regression = given.method is Method.regression
    given.averaged = given.method in (Method.jacobian, Method.relevance)
    if given.averaged and (given.offload or given.shard or given.layers_at_once):
        raise ValueError(
            f"--offload, --shard and --layers-at-once are not for {given.method.value}: its layers share one backward pass"
        )
    if given.held_out is not None:
        if given.method is not Method.tuned:
            raise ValueError("--held-out is for the tuned method: a regression has no steps to stop")
        given.held_out = data_source(given.held_out, given.model, given.text_column)
    if given.shard and given.device not in (None, "cpu", "cuda"):
        raise typer.BadParameter(
            f"with --shard each process has its own: cpu, cuda or nothing, got {given.device}", param_hint="--device"
        )
    if given.device is not None:
        device_named(given.device)


def _batches(given: Any, loaded: Any) -> Any:
    """The text to fit on, or the states of one."""
    limit = given.limit_tokens
    if limit is None and given.regression and not is_stored(given.data):
        limit = REGRESSION_TOKENS
    read = functools.partial(
        read_batches, loaded, given.data, given.text_column, given.split, given.seq_len, given.batch_size,
        seed=given.seed, streaming=given.stream, shuffle_buffer=given.shuffle_buffer, workers=given.workers,
    )  # fmt: skip
    return read(PROMPTS * read(None).seq_len if limit is None and given.averaged else limit)


def _settings(given: Any) -> Any:
    """The settings of the fit, as its plan reads them."""
    large: dict[str, Any] = {"layers_at_once": given.layers_at_once, "offload": given.offload}
    if given.method is not Method.tuned:
        return Settings(**large)
    return Settings(**_of_tuned(given), held_out=given.held_out is not None, **large)


def _of_tuned(given: Any) -> dict[str, Any]:
    """Settings that only a tuned lens has."""
    words = {name: getattr(given, name).value for name in ("loss", "optimizer", "precision", "vocabulary")}
    numbers = {name: getattr(given, name) for name in ("tokens_per_step", "lr", "seed")}
    return {"steps": given.n_steps, **words, **numbers}


def _note(given: Any, batches: Any) -> dict[str, Any]:
    """Which text is read and how it is cut: the fit keeps it in its state, and refuses to resume from one of another text."""
    names = ("data", "text_column", "split", "batch_size", "limit_tokens", "seed", "shuffle_buffer", "held_out")
    stored = {"states": batches.about["text"]} if hasattr(batches, "about") else {}
    return {**{name: getattr(given, name) for name in names}, "seq_len": batches.seq_len, **stored}


def _timed(given: Any, loaded: Any, batches: Any, chosen: Any) -> Any:
    """How long the fit takes, from one step of it."""
    stage(f"timing one step on {given.data}")
    settings = _settings(given)
    if given.averaged:
        return time_jacobian(loaded, batches, chosen, given.method.value)
    if given.regression:
        return time_regression(loaded, batches, chosen, settings, batches.limit_tokens)
    return time_tuned(loaded, batches, chosen, settings, _held_out(given, loaded))


def _held_out(given: Any, loaded: Any) -> Any:
    """The text of `--held-out`."""
    if given.held_out is None:
        return None
    split = "heldout" if given.held_out == "lab" else given.split
    return read_batches(
        loaded, given.held_out, given.text_column, split, given.seq_len, given.batch_size, HELD_OUT_TOKENS, 0
    )  # fmt: skip


def _fitted(given: Any, loaded: Any, batches: Any, chosen: Any, history: list[dict[str, Any]]) -> Any:
    """The maps."""
    every = given.checkpoint_every or (200 if given.regression else 10 if given.averaged else 25)
    scale: dict[str, Any] = {
        "layers": chosen, "checkpoint": given.state, "checkpoint_every": every,
        "show_progress": given.show_progress, "note": _note(given, batches),
    }  # fmt: skip
    stage(f"fitting on {given.data}")
    if given.averaged:
        return tll.fit_jacobian(loaded, batches, rule=given.method.value, **scale)
    scale |= {"layers_at_once": given.layers_at_once, "offload": given.offload}
    if given.regression:
        return tll.fit_regression(loaded, batches, **scale)
    held_out = _held_out(given, loaded)
    return tll.fit_tuned(loaded, batches, **_of_tuned(given), log=history, held_out=held_out, **scale)


def _save(translators: Any, output: Path, overwrite: bool) -> Path:
    """Write the lens; where that fails and somebody is there, ask for another folder: the fit took long."""
    while True:
        stage(f"saving in {output}")
        try:
            translators.save(output, overwrite=overwrite)
            return output
        except (OSError, ValueError) as error:
            if not sys.stdin.isatty():
                raise
            fail(f"saving in {output} failed: {error}")
            answer = typer.prompt("another folder to save it in, or nothing to give up", default="", show_default=False)
            if not answer:
                raise
            output, overwrite = Path(answer), False


def _steps(steps: str, held_out: str | None) -> Any:
    """`--steps` as a number or "auto"."""
    if steps == "auto":
        if held_out is None:
            raise typer.BadParameter("auto needs --held-out: text whose loss tells when to stop", param_hint="--steps")
        return steps
    if not steps.isdecimal():
        raise typer.BadParameter(f"expected a number or auto, got {steps!r}", param_hint="--steps")
    return int(steps)

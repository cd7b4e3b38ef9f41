"""The command `tl-lenses`: demo, fit, eval, show, patchscope, experiment, check, version. What is heavy is imported when needed."""

import contextlib
import sys
import time
import traceback
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tl_lenses.cli_experiments import experiment
from tl_lenses.cli_inputs import (
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
    fail,
    fit_plan,
    interrupted,
    joined,
    lens_names,
    load_model,
    note_of,
    one_line,
    parse_layers,
    quiet,
    ranges,
    read_batches,
    remove_states,
    same_command,
    saved_when_terminated,
    say,
    states_of,
    write_scores,
)
from tl_lenses.cli_patchscope import patchscope

PICTURES = (".html", ".svg", ".png", ".csv", ".json")
TABLES = (".csv", ".json")
REGRESSION_TOKENS = 2**18  # a streamed data set may have no end
HELD_OUT_TOKENS = 2**14  # read of --held-out
EVAL_TOKENS = 2**14


class Method(str, Enum):
    """How to fit."""

    regression = "regression"
    tuned = "tuned"


class Optimizer(str, Enum):
    """What `fit_tuned` takes."""

    muon = "muon"
    sgd = "sgd"
    adam = "adam"


class Loss(str, Enum):
    """What `fit_tuned` takes."""

    kl = "kl"
    ce = "ce"


class Commands(TyperGroup):
    """Errors are one line on stderr, and libraries keep quiet, unless --debug is given."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run; usage errors leave with 2, others with 1, Ctrl-C with 130."""
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except Exception as error:
            if not hasattr(error, "format_message"):  # a usage error, whichever click typer comes with
                raise
            context = getattr(error, "ctx", None)
            hint = f" (see {context.command_path} --help)" if context else ""
            fail(f"{joined(error.format_message())}{hint}")  # type: ignore[attr-defined]
            code = getattr(error, "exit_code", 2)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """No arguments are a question."""
        return super().parse_args(ctx, args or ["--help"])

    def invoke(self, ctx: Any) -> Any:
        """Run the command inside the guard."""
        debug = bool(ctx.params.get("debug"))
        try:
            with contextlib.nullcontext() if debug else quiet():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if hasattr(error, "format_message"):
                raise
            if debug:
                traceback.print_exc()
            fail(one_line(error))
            raise typer.Exit(1) from None


app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """The entry point."""
    app()


@app.callback()
def _global(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the whole trace of an error, and what libraries say.")
    ] = False,
) -> None:
    """Tuned lenses and patchscopes for the models that TransformerLens loads.

    Start with: tl-lenses demo
    """


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the lenses and the heat map.")] = Path("demo"),
    steps: Annotated[int, typer.Option(help="Steps of the tuned lens, 512 tokens each.")] = 48,
    heldout_tokens: Annotated[int, typer.Option(help="Tokens to measure on.")] = 4096,
    seed: Annotated[int, typer.Option(help="Of the order of the text.")] = 0,
) -> None:
    """Fit, measure and draw lenses of the bundled model, offline, in about two minutes.

    Example: tl-lenses demo --output demo
    """
    from tl_lenses.demo import run

    run(output, steps=steps, heldout_tokens=heldout_tokens, seed=seed, say=say)


@app.command()
def fit(
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    model: Model = "lab-gpt2",
    method: Annotated[Method, typer.Option(help="Closed-form least squares, or training on the loss.")] = Method.tuned,
    data: Data = None,
    steps: Annotated[
        str, typer.Option(help="Optimiser steps, or auto: until the loss on --held-out no longer falls.", metavar="N")
    ] = "250",
    held_out: Annotated[
        str | None, typer.Option(help="Text of its own, as --data: each layer's best look at it is what is saved.")
    ] = None,
    tokens_per_step: Annotated[
        int | None, typer.Option(help="Batches are added up to so many; one batch by default.")
    ] = None,
    optimizer: Annotated[
        Optimizer, typer.Option(help="muon is the best measured; sgd is the published recipe's.")
    ] = Optimizer.muon,
    lr: Annotated[float | None, typer.Option(help="Learning rate at the first step; by optimiser.")] = None,
    loss: Annotated[Loss, typer.Option(help="kl to the model, or ce on the text.")] = Loss.kl,
    layers: Annotated[str | None, typer.Option(help="Such as 0,4,8 or ::2 or a hook name; all by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the text.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File for the state of the fit; OUTPUT.checkpoint by default.")
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between two states, 25; of a regression batches, 200.", min=1)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on from the state, if there is one, or delete it first.")
    ] = True,
    layers_at_once: Annotated[
        int | None, typer.Option(help="Layers in memory at a time, each group a pass over the text; all by default.")
    ] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Optimiser state and moments on the CPU between uses.")
    ] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Spread the model's blocks over the processes (FSDP), where it fits none.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream/--download", help="Read a `datasets` name as it is needed, or all of it first.")
    ] = True,
    shuffle_buffer: Annotated[int, typer.Option(help="Documents that the shuffle draws from.", min=1)] = 1000,
    workers: Annotated[
        int, typer.Option(help="Processes that tokenise; 0: a thread, enough for most tokenizers.", min=0)
    ] = 0,
    show_progress: Annotated[
        bool | None, typer.Option("--progress/--no-progress", help="Loss, tokens/s and time left; on in a terminal.")
    ] = None,
    text_column: TextColumn = "text",
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    seq_len: SeqLen = None,
    batch_size: BatchSize = 8,
    limit_tokens: Annotated[
        int | None,
        typer.Option(help=f"Tokens of text to use; regression reads at most {REGRESSION_TOKENS} unless told."),
    ] = None,
    device: Device = None,
    dtype: DType = Dtype.float32,
) -> None:
    """Fit a lens and save it. After Ctrl-C, a crash or a kill the same command goes on where it stopped.

    On several processes or machines: accelerate launch --num_processes 8 -m tl_lenses fit ...

    Example: tl-lenses fit --model gpt2 --data corpus.txt --output my-lens
    """
    from tl_lenses.checkpoint import check_output
    from tl_lenses.fit.distributed import leave, processes

    who = processes()
    state = checkpoint or Path(f"{output}.checkpoint")
    if who.first:
        check_output(output, overwrite=overwrite)
        check_output(state.parent, overwrite=True)
    data = data_source(data, model, text_column)
    n_steps = _steps(steps, held_out)
    if held_out is not None:
        if method is Method.regression:
            raise ValueError("--held-out is for the tuned method: a regression has no steps to stop")
        held_out = data_source(held_out, model, text_column)

    import tl_lenses as tll

    if shard and device not in (None, "cpu", "cuda"):
        raise typer.BadParameter(
            f"with --shard each process has its own: cpu, cuda or nothing, got {device}", param_hint="--device"
        )
    loaded = load_model(model, "cpu" if shard else device or who.device, dtype.value)
    if shard:
        from tl_lenses.fit.shard import shard as spread

        spread(loaded, device)
    chosen = None if layers is None else parse_layers(layers, loaded.cfg.n_layers)
    regression = method is Method.regression
    limit = limit_tokens or (REGRESSION_TOKENS if regression else None)
    batches = read_batches(
        loaded,
        data,
        text_column,
        split,
        seq_len,
        batch_size,
        limit,
        seed,
        streaming=stream,
        shuffle_buffer=shuffle_buffer,
        workers=workers,
    )
    settings = {
        "model": model, "data": data, "text_column": text_column, "split": split, "seq_len": batches.seq_len,
        "batch_size": batch_size, "limit_tokens": limit_tokens, "dtype": dtype.value, "seed": seed,
        "shuffle_buffer": shuffle_buffer, "layers_at_once": layers_at_once, "held_out": held_out,
    }  # fmt: skip
    if who.first:
        if not resume:
            remove_states(state)
        same_command(state, settings)
    scale: dict[str, Any] = {
        "layers_at_once": layers_at_once, "offload": offload, "checkpoint": state, "checkpoint_every": checkpoint_every or (200 if regression else 25),
        "show_progress": show_progress,
    }  # fmt: skip
    if who.first:
        planned = fit_plan(
            loaded,
            chosen,
            batches,
            regression,
            250 if n_steps == "auto" else n_steps,
            tokens_per_step,
            optimizer.value,
            layers_at_once,
            offload,
        )
        say(planned)
    start = time.perf_counter()
    history: list[dict[str, Any]] = []
    try:
        with saved_when_terminated():
            if regression:
                translators = tll.fit_regression(loaded, batches, chosen, **scale)
            else:
                if held_out is not None:
                    scale["held_out"] = read_batches(
                        loaded, held_out, text_column, "heldout" if held_out == "lab" else split, seq_len, batch_size,
                        HELD_OUT_TOKENS, 0,
                    )  # fmt: skip
                translators = tll.fit_tuned(
                    loaded, batches, n_steps, tokens_per_step, loss.value, optimizer=optimizer.value, lr=lr, layers=chosen,
                    seed=seed, log=history, **scale,
                )  # fmt: skip
    except BaseException as error:
        if who.first and not states_of(state):
            note_of(state).unlink(missing_ok=True)
        if not isinstance(error, KeyboardInterrupt):
            raise
        if who.first:
            typer.echo(interrupted(state, history, steps), err=True)
        raise typer.Exit(130) from None
    seconds = time.perf_counter() - start
    leave()
    if not who.first:
        return
    translators.save(output, overwrite=overwrite)
    remove_states(state)
    note_of(state).unlink(missing_ok=True)

    say(
        f"{method.value} lens of {model}: layers {ranges(translators.sources)}, {translators.meta['tokens_seen']:,} tokens, {seconds:.0f} s"
        + f" in {who.world} processes" * (who.world > 1)
    )
    if history:
        last = list(history[-1]["loss"].values())
        shown = sorted({0, len(last) // 2, len(last) - 1})
        say(
            f"{loss.value} of the last step, nats: "
            + ", ".join(f"layer {translators.sources[i]} {last[i]:.3f}" for i in shown)
        )
    say(f"saved in {output}; next: tl-lenses eval --model {model} --lens {output}")


def _steps(steps: str, held_out: str | None) -> Any:
    """`--steps` as a number or "auto".

    Raises:
        BadParameter: neither, or auto without held-out text.
    """
    if steps == "auto":
        if held_out is None:
            raise typer.BadParameter("auto needs --held-out: text whose loss tells when to stop", param_hint="--steps")
        return steps
    if not steps.isdecimal():
        raise typer.BadParameter(f"expected a number or auto, got {steps!r}", param_hint="--steps")
    return int(steps)


@app.command("eval")
def evaluate(
    model: Model = "lab-gpt2",
    lens: Lenses = None,
    data: Data = None,
    output: Annotated[Path | None, typer.Option(help="Also write the scores: .csv or .json.")] = None,
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
    check_file(output, TABLES)
    data = data_source(data, model, text_column)

    import tl_lenses as tll

    found = {name: tll.Translators.load(folder) for name, folder in folders.items()}
    loaded = load_model(model, device, dtype.value)
    split = split or ("heldout" if data == "lab" else "validation")
    batches = read_batches(loaded, data, text_column, split, seq_len, batch_size, limit_tokens, seed)
    lenses = {"logit": tll.Lens(loaded), **{name: tll.Lens(loaded, maps) for name, maps in found.items()}}
    scores = tll.evaluate(
        loaded, lenses, batches, layers=None if layers is None else parse_layers(layers, loaded.cfg.n_layers + 1)
    )
    say(str(scores))
    if output is not None:
        made = {"model": model, "data": data, "lenses": {name: str(folder) for name, folder in folders.items()}}
        write_scores(scores, output, made)
        say(f"saved in {output}")


@app.command()
def show(
    prompt: Annotated[str, typer.Argument(help="The text to read.")],
    model: Model = "lab-gpt2",
    lens: Lenses = None,
    stat: Annotated[
        str | None, typer.Option(help="kl, entropy, cross_entropy, rank, max_prob, target_logprob or logprob_diff.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Also write .html, .svg, .png, .csv or .json.")] = None,
    layers: Annotated[str | None, typer.Option(help="Such as 0,4,8 or ::2 or a hook name; all by default.")] = None,
    target: Annotated[str | None, typer.Option(help="One token to score everywhere; by default the next one.")] = None,
    anti_target: Annotated[str | None, typer.Option(help="One token for logprob_diff.")] = None,
    device: Device = None,
    dtype: DType = Dtype.float32,
) -> None:
    """What lenses (the logit lens by default) say at every layer and token of a prompt.

    Example: tl-lenses show "The capital of France is" --lens my-lens --save heat.html
    """
    from tl_lenses.views import STATS, to_text

    if stat is not None and stat not in STATS:
        raise ValueError(f"no statistic {stat!r}: choose from {', '.join(STATS)}")
    if stat == "logprob_diff" and anti_target is None:
        raise ValueError("logprob_diff needs --anti-target, the token that the target is compared with")
    folders = lens_names(lens)
    check_file(save, PICTURES)

    import tl_lenses as tll

    found = {name: tll.Translators.load(folder) for name, folder in folders.items()}
    loaded = load_model(model, device, dtype.value)
    lenses = {name: tll.Lens(loaded, maps) for name, maps in found.items()} or {"logit": tll.Lens(loaded)}
    chosen = None if layers is None else parse_layers(layers, loaded.cfg.n_layers + 1)
    trajectories = tll.trajectory(loaded, lenses, prompt, chosen, target, anti_target)
    for trajectory in trajectories.values():
        say(to_text(trajectory, stat))
    if save is not None:
        one = next(iter(trajectories.values())) if len(trajectories) == 1 else trajectories
        one.save(save, stat=stat)
        say(f"saved in {save}")


app.command()(patchscope)
app.command()(experiment)


@app.command()
def check(
    model: Model = "lab-gpt2",
    prompt: Annotated[str | None, typer.Option(help="Text to check on; random tokens by default.")] = None,
    device: Device = None,
    dtype: DType = Dtype.float32,
) -> None:
    """Prove on a prompt that reading and patching are right on this model; leaves with 1 if not.

    Example: tl-lenses check --model gpt2
    """
    from rich.console import Console

    import tl_lenses as tll

    report = tll.check(load_model(model, device, dtype.value), prompt)
    Console().print(report)
    if not report.ok:
        raise ValueError(
            f"{sum(not c.passed for c in report.checks)} of {len(report.checks)} invariants fail on {model}"
        )


@app.command()
def version() -> None:
    """Versions to put in a bug report.

    Example: tl-lenses version
    """
    import platform

    import tl_lenses
    from tl_lenses.checkpoint import versions

    for name, number in {**versions(), "tl-lenses": tl_lenses.__version__, "python": platform.python_version()}.items():
        say(f"{name} {number}")

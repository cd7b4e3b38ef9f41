"""The command `tl-lenses`: demo, fit, eval, show, check, version. What is heavy is imported when a command needs it."""

import contextlib
import io
import json
import logging
import math
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

PICTURES = (".html", ".svg", ".png", ".csv", ".json")
TABLES = (".csv", ".json")
SEQ_LEN = 128
REGRESSION_TOKENS = 2**18  # a streamed data set may have no end
EVAL_TOKENS = 2**14
# What the library calls its arguments is not what they are called here.
_FLAGS = {
    "overwrite=True": "--overwrite",
    "text_column=...": "--text-column",
    "split=...": "--split",
    "layers=[...]": "--layers",
    "anti_targets": "--anti-target",
    "Pass text in a list: [text].": "Pass a file.",
}


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


class Dtype(str, Enum):
    """Types of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


Model = Annotated[str, typer.Option(help="A Hugging Face name, a local directory, or lab-gpt2 (bundled).")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, ...; cuda if there is one.")]
DType = Annotated[Dtype, typer.Option("--dtype", help="Type of the model's weights.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="A .txt, .jsonl, .json, .parquet or .csv file, a directory of them, a `datasets` name (org/name or "
        "org/name:config), or lab (bundled text; the default for lab-gpt2)."
    ),
]
TextColumn = Annotated[str, typer.Option(help="The column of a table that has the text.")]
SeqLen = Annotated[int | None, typer.Option(help=f"Tokens per row; {SEQ_LEN}, or the context if it is shorter.")]
BatchSize = Annotated[int, typer.Option(help="Rows per batch.")]
Lenses = Annotated[list[str] | None, typer.Option("--lens", help="A folder that `fit` wrote, or NAME=FOLDER; repeatable.")]


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
            _fail(f"{_joined(error.format_message())}{hint}")  # type: ignore[attr-defined]
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
            with contextlib.nullcontext() if debug else _quiet():
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
            _fail(_line(error))
            raise typer.Exit(1) from None


app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """The entry point."""
    app()


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole trace of an error, and what libraries say.")] = False,
) -> None:
    """Tuned lenses and patchscopes for the models that TransformerLens loads.

    Start with: tl-lenses demo
    """


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the lenses and the heat map.")] = Path("demo"),
    steps: Annotated[int, typer.Option(help="Steps of the tuned lens, 512 tokens each.")] = 96,
    heldout_tokens: Annotated[int, typer.Option(help="Tokens to measure on.")] = 8192,
    seed: Annotated[int, typer.Option(help="Of the order of the text.")] = 0,
) -> None:
    """Fit, measure and draw lenses of the bundled model, offline, in about two minutes.

    Example: tl-lenses demo --output demo
    """
    from tl_lenses.demo import run

    run(output, steps=steps, heldout_tokens=heldout_tokens, seed=seed, say=_say)


@app.command()
def fit(
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    model: Model = "lab-gpt2",
    method: Annotated[Method, typer.Option(help="Closed-form least squares, or training on the loss.")] = Method.tuned,
    data: Data = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 250,
    tokens_per_step: Annotated[int | None, typer.Option(help="Batches are added up to so many; one batch by default.")] = None,
    optimizer: Annotated[Optimizer, typer.Option(help="muon is the best measured; sgd is the published recipe's.")] = Optimizer.muon,
    lr: Annotated[float | None, typer.Option(help="Learning rate at the first step; by optimiser.")] = None,
    loss: Annotated[Loss, typer.Option(help="kl to the model, or ce on the text.")] = Loss.kl,
    layers: Annotated[str | None, typer.Option(help="Such as 0,4,8 or ::2 or a hook name; all by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the text.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="File for the state of training; OUTPUT.checkpoint by default.")] = None,
    text_column: TextColumn = "text",
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    seq_len: SeqLen = None,
    batch_size: BatchSize = 8,
    limit_tokens: Annotated[
        int | None, typer.Option(help=f"Tokens of text to use; regression reads at most {REGRESSION_TOKENS} unless told.")
    ] = None,
    device: Device = None,
    dtype: DType = Dtype.float32,
) -> None:
    """Fit a lens and save it. After Ctrl-C the same command goes on where it stopped.

    Example: tl-lenses fit --model gpt2 --data corpus.txt --output my-lens
    """
    from tl_lenses.checkpoint import check_output

    check_output(output, overwrite=overwrite)
    state = checkpoint or Path(f"{output}.checkpoint")
    check_output(state.parent, overwrite=True)
    data = _data(data, model, text_column)

    import tl_lenses as tll

    loaded = _load(model, device, dtype)
    chosen = None if layers is None else _layers(layers, loaded.cfg.n_layers)
    regression = method is Method.regression
    limit = limit_tokens or (REGRESSION_TOKENS if regression else None)
    batches = _batches(loaded, data, text_column, split, seq_len, batch_size, limit, seed)
    start = time.perf_counter()
    history: list[dict[str, Any]] = []
    if regression:
        translators = tll.fit_regression(loaded, batches, chosen)
    else:
        settings = {
            "model": model, "data": data, "text_column": text_column, "split": split, "seq_len": batches.seq_len,
            "batch_size": batch_size, "limit_tokens": limit_tokens, "dtype": dtype.value,
        }  # fmt: skip
        _same_command(state, settings)
        try:
            translators = tll.fit_tuned(
                loaded, batches, steps, tokens_per_step, loss.value, optimizer=optimizer.value, lr=lr, layers=chosen,
                seed=seed, checkpoint=state, log=history,
            )  # fmt: skip
        except BaseException as error:
            if not state.exists():
                _note_of(state).unlink(missing_ok=True)
            if not isinstance(error, KeyboardInterrupt):
                raise
            typer.echo(_interrupted(state, history, steps), err=True)
            raise typer.Exit(130) from None
    seconds = time.perf_counter() - start
    translators.save(output, overwrite=overwrite)
    for file in () if regression else (state, _note_of(state)):
        file.unlink(missing_ok=True)

    _say(f"{method.value} lens of {model}: layers {_ranges(translators.sources)}, {translators.meta['tokens_seen']:,} tokens, {seconds:.0f} s")
    if history:
        last = list(history[-1]["loss"].values())
        shown = sorted({0, len(last) // 2, len(last) - 1})
        _say(f"{loss.value} of the last step, nats: " + ", ".join(f"layer {translators.sources[i]} {last[i]:.3f}" for i in shown))
    _say(f"saved in {output}; next: tl-lenses eval --model {model} --lens {output}")


@app.command("eval")
def evaluate(
    model: Model = "lab-gpt2",
    lens: Lenses = None,
    data: Data = None,
    output: Annotated[Path | None, typer.Option(help="Also write the scores: .csv or .json.")] = None,
    layers: Annotated[str | None, typer.Option(help="Such as 0,4,8 or ::2 or a hook name; all by default.")] = None,
    text_column: TextColumn = "text",
    split: Annotated[str | None, typer.Option(help="Split of a data set; validation by default, for lab heldout.")] = None,
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
    folders = _lens_names(lens, taken=("logit",))
    _check_file(output, TABLES)
    data = _data(data, model, text_column)

    import tl_lenses as tll

    found = {name: tll.Translators.load(folder) for name, folder in folders.items()}
    loaded = _load(model, device, dtype)
    split = split or ("heldout" if data == "lab" else "validation")
    batches = _batches(loaded, data, text_column, split, seq_len, batch_size, limit_tokens, seed)
    lenses = {"logit": tll.Lens(loaded), **{name: tll.Lens(loaded, maps) for name, maps in found.items()}}
    scores = tll.evaluate(loaded, lenses, batches, layers=None if layers is None else _layers(layers, loaded.cfg.n_layers + 1))
    _say(str(scores))
    if output is not None:
        made = {"model": model, "data": data, "lenses": {name: str(folder) for name, folder in folders.items()}}
        _write_scores(scores, output, made)
        _say(f"saved in {output}")


@app.command()
def show(
    prompt: Annotated[str, typer.Argument(help="The text to read.")],
    model: Model = "lab-gpt2",
    lens: Lenses = None,
    stat: Annotated[str | None, typer.Option(help="kl, entropy, cross_entropy, rank, max_prob, target_logprob or logprob_diff.")] = None,
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
    folders = _lens_names(lens)
    _check_file(save, PICTURES)

    import tl_lenses as tll

    found = {name: tll.Translators.load(folder) for name, folder in folders.items()}
    loaded = _load(model, device, dtype)
    lenses = {name: tll.Lens(loaded, maps) for name, maps in found.items()} or {"logit": tll.Lens(loaded)}
    chosen = None if layers is None else _layers(layers, loaded.cfg.n_layers + 1)
    trajectories = tll.trajectory(loaded, lenses, prompt, chosen, target, anti_target)
    for trajectory in trajectories.values():
        _say(to_text(trajectory, stat))
    if save is not None:
        one = next(iter(trajectories.values())) if len(trajectories) == 1 else trajectories
        one.save(save, stat=stat)
        _say(f"saved in {save}")


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

    report = tll.check(_load(model, device, dtype), prompt)
    Console().print(report)
    if not report.ok:
        raise ValueError(f"{sum(not c.passed for c in report.checks)} of {len(report.checks)} invariants fail on {model}")


@app.command()
def version() -> None:
    """Versions to put in a bug report.

    Example: tl-lenses version
    """
    import platform

    import tl_lenses
    from tl_lenses.checkpoint import versions

    for name, number in {**versions(), "tl-lenses": tl_lenses.__version__, "python": platform.python_version()}.items():
        _say(f"{name} {number}")


# --- what the commands share


def _load(name: str, device: str | None, dtype: Dtype) -> Any:
    """A model in eval mode and in the raw basis: bundled, from a directory, or from the Hub.

    Raises:
        ValueError: it cannot be loaded; says why.
    """
    import torch

    from tl_lenses import lab

    if sys.stderr.isatty():
        typer.echo(f"loading {name}", err=True)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype.value)
    if name in {bundled.name for bundled in lab.available()}:
        return lab.load(name, device=place, dtype=kind)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"the directory {name!r} holds no model: expected config.json and weights, as save_pretrained writes them")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
        raise ValueError(f"there is no model directory {name!r}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return _from_transformers(str(folder) if folder.is_dir() else name, folder.is_dir(), place, kind)
    except Exception as error:  # every library below has its own errors
        raise ValueError(f"cannot load the model {name!r}: {_joined(error) or type(error).__name__}") from error


def _from_transformers(name: str, local: bool, device: str, dtype: Any) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:  # TransformerLens 2.x
        from transformer_lens import HookedTransformer

        if not local:
            return HookedTransformer.from_pretrained_no_processing(name, device=device, dtype=dtype).eval()
        from tl_lenses.lab import _hooked_transformer

        hf_model = transformers.AutoModelForCausalLM.from_pretrained(name, torch_dtype=dtype).eval()
        return _hooked_transformer(Path(name), hf_model, transformers.AutoTokenizer.from_pretrained(name), device, dtype)
    return TransformerBridge.boot_transformers(name, device=device, dtype=dtype).eval()


def _data(data: str | None, model: str, column: str) -> str:
    """The source of text, looked at before a large model is loaded.

    Raises:
        ValueError: a file that is missing, empty or of another kind.
    """
    if data is None and model != "lab-gpt2":
        raise typer.BadParameter("text to read: a file, a directory, a `datasets` name, or lab", param_hint="--data")
    data = data or "lab"
    if data != "lab" and not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", data) or Path(data).exists():
        from types import SimpleNamespace

        from tl_lenses.data import token_batches

        token_batches(data, SimpleNamespace(bos_token_id=None), seq_len=2, batch_size=1, text_column=column)
    return data


def _batches(
    model: Any, data: str, column: str, split: str, seq_len: int | None, batch_size: int, limit: int | None, seed: int
) -> Any:
    from tl_lenses import lab
    from tl_lenses.data import token_batches
    from tl_lenses.model import tokenizer_of

    return token_batches(
        lab.text(split) if data == "lab" else data,
        tokenizer_of(model),
        seq_len=seq_len or min(SEQ_LEN, int(getattr(model.cfg, "n_ctx", None) or SEQ_LEN)),
        batch_size=batch_size,
        text_column=column,
        split=split,
        limit_tokens=limit,
        shuffle_seed=seed,
    )


def _layers(text: str, n: int) -> list[int | str]:
    """`0,4,8`, `::2`, `-1`, hook names, or several of them with commas; slices are Python's, of `n` layers.

    >>> _layers("0,2:4,-1,blocks.0.hook_resid_mid", 9)
    [0, 2, 3, -1, 'blocks.0.hook_resid_mid']
    """
    found: list[int | str] = []
    for item in (part.strip() for part in text.split(",")):
        if re.fullmatch(r"-?\d+", item):
            found.append(int(item))
        elif re.fullmatch(r"(-?\d+)?(:(-?\d+)?){1,2}", item):
            found += range(n)[slice(*(int(part) if part else None for part in item.split(":")))]
        elif item:
            found.append(item)
    if not found:
        raise ValueError(f"--layers {text!r} selects nothing: expected such as 0,4,8 or ::2 or a hook name")
    return found


def _lens_names(lenses: Sequence[str] | None, taken: Sequence[str] = ()) -> dict[str, str]:
    """Name -> folder of `FOLDER` and `NAME=FOLDER`.

    Raises:
        ValueError: a name twice.
    """
    found: dict[str, str] = {}
    for one in lenses or ():
        name, equals, folder = one.partition("=")
        if not equals or not name or os.path.exists(one):
            name, folder = Path(one).name or one, one
        if name in found or name in taken:
            raise ValueError(f"two lenses are called {name!r}: give --lens NAME={folder}")
        found[name] = folder
    return found


def _check_file(path: Path | None, suffixes: Sequence[str]) -> None:
    """A file that can be written, looked at before the work."""
    from tl_lenses.checkpoint import check_output

    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"cannot tell how to save {str(path)!r}: use one of {', '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a directory: give a file in it")
    check_output(path.parent, overwrite=True)


def _write_scores(scores: Any, path: Path, made: dict[str, Any]) -> None:
    from tl_lenses.checkpoint import versions, write_bytes

    if path.suffix.lower() == ".csv":
        write_bytes(path, scores.to_frame().to_csv(index=False).encode())
        return
    rows = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in scores.rows]
    content = {
        **made, "tokens": scores.tokens, "bytes_per_token": scores.bytes_per_token, **scores.settings,
        "versions": versions(), "rows": rows,
    }  # fmt: skip
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def _note_of(state: Path) -> Path:
    return state.with_name(f"{state.name}.json")


def _same_command(state: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on from a state of another model or text, which the state itself does not know.

    Raises:
        ValueError: names the first difference.
    """
    from tl_lenses.checkpoint import write_bytes

    note = _note_of(state)
    if state.exists() and note.exists():
        saved = json.loads(note.read_text(encoding="utf-8"))
        for key, value in settings.items():
            if saved.get(key) != value:
                raise ValueError(
                    f"the checkpoint {state} was made with {key} {saved.get(key)!r}, now it is {value!r}: use the same "
                    "options, or delete it to start again"
                )
    write_bytes(note, json.dumps(settings).encode())


def _interrupted(state: Path, history: list[dict[str, Any]], steps: int) -> str:
    if not state.exists():
        return "interrupted before the first step: nothing was written"
    where = f"after step {history[-1]['step']} of {steps}" if history else "before its first step"
    return f"interrupted {where}: the state is in {state}; run the same command again to go on"


def _ranges(sources: Sequence[int | str]) -> str:
    """`0..7` where the layers follow each other, else a list."""
    whole = list(sources)
    if len(whole) > 2 and all(isinstance(s, int) for s in whole) and whole == list(range(whole[0], whole[0] + len(whole))):  # type: ignore[arg-type]
        return f"{whole[0]}..{whole[-1]}"
    return ", ".join(map(str, whole))


def _say(text: str) -> None:
    print(text, flush=True)


def _fail(message: str) -> None:
    typer.echo(f"error: {message}", err=True)


def _joined(error: object) -> str:
    """A message on one line."""
    return " ".join(str(error).split())


def _line(error: Exception) -> str:
    """One readable line, with the names of options instead of the library's arguments."""
    text = _joined(error.args[0] if isinstance(error, KeyError) and error.args else error)
    for argument, flag in _FLAGS.items():
        text = text.replace(argument, flag)
    if isinstance(error, (ValueError, TypeError, RuntimeError, KeyError, ImportError, OSError)) and text:
        return text
    return f"{type(error).__name__}{': ' * bool(text)}{text} (tl-lenses --debug ... shows where)"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, no logs below critical, no progress bars that are not ours."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():  # in a terminal a download of gigabytes should be seen
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)

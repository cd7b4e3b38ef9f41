"""What the commands share: models, text and files as the command line names them, and errors as one line."""

import contextlib
import io
import json
import logging
import math
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

SEQ_LEN = 128
# What the library calls its arguments is not what they are called here.
_FLAGS = {
    "overwrite=True": "--overwrite",
    "text_column=...": "--text-column",
    "split=...": "--split",
    "layers=[...]": "--layers",
    "anti_targets": "--anti-target",
    "Pass text in a list: [text].": "Pass a file.",
}


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
Lenses = Annotated[
    list[str] | None, typer.Option("--lens", help="A folder that `fit` wrote, or NAME=FOLDER; repeatable.")
]


def load_model(name: str, device: str | None, dtype: str) -> Any:
    """A model in eval mode and in the raw basis: bundled, from a directory, or from the Hub.

    Raises:
        ValueError: it cannot be loaded; says why.
    """
    import torch

    from tl_lenses import lab

    if sys.stderr.isatty():
        typer.echo(f"loading {name}", err=True)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype)
    if name in {bundled.name for bundled in lab.available()}:
        return lab.load(name, device=place, dtype=kind)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"the directory {name!r} holds no model: expected config.json and weights, as save_pretrained writes them"
            )
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
        raise ValueError(f"there is no model directory {name!r}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return _from_transformers(str(folder) if folder.is_dir() else name, folder.is_dir(), place, kind)
    except Exception as error:  # every library below has its own errors
        raise ValueError(f"cannot load the model {name!r}: {joined(error) or type(error).__name__}") from error


def _from_transformers(name: str, local: bool, device: str, dtype: Any) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:  # TransformerLens 2.x
        from transformer_lens import HookedTransformer  # pyright: ignore

        if not local:
            return HookedTransformer.from_pretrained_no_processing(name, device=device, dtype=dtype).eval()  # pyright: ignore
        from tl_lenses.lab import _hooked_transformer

        hf_model = transformers.AutoModelForCausalLM.from_pretrained(name, torch_dtype=dtype).eval()
        return _hooked_transformer(
            Path(name).name, Path(name), hf_model, transformers.AutoTokenizer.from_pretrained(name), device, dtype
        )
    return TransformerBridge.boot_transformers(name, device=device, dtype=dtype).eval()


def data_source(data: str | None, model: str, column: str) -> str:
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


def read_batches(
    model: Any,
    data: str,
    column: str,
    split: str,
    seq_len: int | None,
    batch_size: int,
    limit: int | None,
    seed: int,
    **settings: Any,
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
        **settings,
    )


def parse_layers(text: str, n: int) -> list[int | str]:
    """`0,4,8`, `::2`, `-1`, hook names, or several of them with commas; slices are Python's, of `n` layers.

    >>> parse_layers("0,2:4,-1,blocks.0.hook_resid_mid", 9)
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


def lens_names(lenses: Sequence[str] | None, taken: Sequence[str] = ()) -> dict[str, str]:
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


def check_file(path: Path | None, suffixes: Sequence[str]) -> None:
    """A file that can be written, looked at before the work."""
    from tl_lenses.checkpoint import check_output

    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"cannot tell how to save {str(path)!r}: use one of {', '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a directory: give a file in it")
    check_output(path.parent, overwrite=True)


def write_scores(scores: Any, path: Path, made: dict[str, Any]) -> None:
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


def note_of(state: Path) -> Path:
    return state.with_name(f"{state.name}.json")


def same_command(state: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on from a state of another model or text, which the state itself does not know.

    Raises:
        ValueError: names the first difference.
    """
    from tl_lenses.checkpoint import write_bytes

    note = note_of(state)
    if states_of(state) and note.exists():
        saved = json.loads(note.read_text(encoding="utf-8"))
        for key, value in settings.items():
            if saved.get(key) != value:
                raise ValueError(
                    f"the checkpoint {state} was made with {key} {saved.get(key)!r}, now it is {value!r}: use the same "
                    "options, or delete it to start again"
                )
    write_bytes(note, json.dumps(settings).encode())


def states_of(state: Path) -> list[Path]:
    """The file of a fit's state, the one before it, and those of groups of layers."""
    names = rf"{re.escape(state.name)}(\.\d+of\d+)?(\.previous)?"
    folder = state.parent
    return [file for file in folder.iterdir() if re.fullmatch(names, file.name)] if folder.is_dir() else []


def remove_states(state: Path) -> None:
    for file in states_of(state):
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def saved_when_terminated() -> Iterator[None]:
    """A scheduler that takes the machine back sends SIGTERM: the same as Ctrl-C, so that the state is saved."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def fit_plan(
    model: Any,
    layers: list[int | str] | None,
    batches: Any,
    regression: bool,
    steps: int,
    tokens_per_step: int | None,
    optimizer: Any,
    layers_at_once: int | None,
    offload: bool,
) -> str:
    """Memory of a fit, before its first step; says how many layers fit where not all of them do."""
    from tl_lenses.divergence import product_dtype
    from tl_lenses.fit.distributed import processes
    from tl_lenses.fit.plan import plan
    from tl_lenses.fit.shard import is_sharded, sizes
    from tl_lenses.model import d_model, n_layers

    depth, width, element = n_layers(model), d_model(model), next(model.parameters()).element_size()
    sharded = processes().world if is_sharded(model) else 1
    parameters, held = sizes(model)
    held *= element
    rows = depth if layers is None else len(layers)
    if regression:  # moments of every layer, in float64
        each, rest = 0 if offload else 2 * 8 * width**2, held
        at_once = min(rows, layers_at_once or rows)
        needed = rest + each * at_once
        text = f"memory: {needed / 1e9:.2f} GB, of which moments {each * at_once / 1e9:.2f} GB"
    else:
        made = lambda at_once: plan(
            width, depth, int(model.W_U.shape[1]), n_params=parameters, n_rows=rows, rows_at_once=at_once,
            tokens_per_batch=batches.seq_len * batches.batch_size, tokens_per_step=tokens_per_step, steps=steps,
            optimizer=optimizer, state_on_cpu=offload, model_dtype="bfloat16" if element == 2 else "float32",
            precision="float32" if product_dtype("auto", model.W_U).itemsize > 2 else "bfloat16",
            device="cpu" if model.W_U.device.type == "cpu" else "cuda", sharded=sharded,
        )  # fmt: skip
        found = made(layers_at_once)
        needed, text = found.peak, str(found)
        at_once = min(rows, layers_at_once or rows)
        each = (found.peak - made(1).peak) / max(1, at_once - 1) if at_once > 1 else 0
    there = _memory(model)
    if there is not None and needed > there + held:
        fits = int(at_once - (needed - there - held) / each) if each else 0
        hint = f"pass --layers-at-once {fits}" if fits > 0 else "use a smaller --batch-size or a larger machine"
        text += f"\n{there / 1e9:.1f} GB are free beside the model, less than that: {hint}"
    return text


def _memory(model: Any) -> int | None:
    """Bytes that are free where the model is."""
    import torch

    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not everywhere
        return None


def interrupted(state: Path, history: list[dict[str, Any]], steps: int | str) -> str:
    if not states_of(state):
        return "interrupted before the first step: nothing was written"
    where = f"after step {history[-1]['step']} of {steps}" if history else "before its first step"
    return f"interrupted {where}: the state is in {state}; run the same command again to go on"


def ranges(sources: Sequence[int | str]) -> str:
    """`0..7` where the layers follow each other, else a list."""
    whole = list(sources)
    first = whole[0] if whole else None
    if isinstance(first, int) and len(whole) > 2 and whole == list(range(first, first + len(whole))):
        return f"{first}..{whole[-1]}"
    return ", ".join(map(str, whole))


def say(text: str) -> None:
    print(text, flush=True)


def fail(message: str) -> None:
    typer.echo(f"error: {message}", err=True)


def joined(error: object) -> str:
    """A message on one line."""
    return " ".join(str(error).split())


def one_line(error: Exception) -> str:
    """One readable line, with the names of options instead of the library's arguments."""
    text = joined(error.args[0] if isinstance(error, KeyError) and error.args else error)
    for argument, flag in _FLAGS.items():
        text = text.replace(argument, flag)
    if isinstance(error, (ValueError, TypeError, RuntimeError, KeyError, ImportError, OSError)) and text:
        return text
    return f"{type(error).__name__}{': ' * bool(text)}{text} (tl-lenses --debug ... shows where)"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, no logs below critical, no progress bars that are not ours."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():  # in a terminal a download of gigabytes should be seen
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from tl_lenses.checkpoint import Notice

            warnings.simplefilter("always", Notice)
            warnings.showwarning = lambda message, *_, **__: typer.echo(f"note: {joined(message)}", err=True)
            yield
    finally:
        logging.disable(level)

"""The models, text and files that options name."""

import os
import re
import sys
import tempfile
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import typer

from tl_lenses import files, lab, loading
from tl_lenses.cli.messages import stage
from tl_lenses.cli.options import SEQ_LEN
from tl_lenses.model import tokenizer_of
from tl_lenses.text.batches import token_batches
from tl_lenses.text.sources import reader
from tl_lenses.text.stored import is_stored, open_states
from tl_lenses.translators import Translators


def load_model(name: str, device: str | None, dtype: str, *, reference: bool = False) -> Any:
    """The model of `--model`, or the plain Hugging Face model of `--reference`; see `tl_lenses.loading`."""
    stage(f"loading the {'reference' if reference else 'model'} {name}")
    load = loading.load_reference if reference else loading.load_model
    return load(name, device=device_named(device), dtype=getattr(torch, dtype))


def device_named(device: str | None) -> str:
    """The device of `--device`; by default the first GPU, if there is one."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return str(torch.device(device))
    except RuntimeError:
        raise ValueError(f"--device {device!r} is no device: expected such as cpu, cuda, cuda:1 or mps") from None


def data_source(data: str | None, model: str, column: str) -> str:
    """The source of text, checked before a large model is loaded."""
    if data is None and model != "lab-gpt2":
        raise typer.BadParameter("text to read: a file, a directory, a `datasets` name, or lab", param_hint="--data")
    if data is None:
        return "lab"
    if not data:
        raise ValueError("--data is empty: expected a file, a directory, a `datasets` name, or lab")
    if is_stored(data):
        return data
    if data != "lab" and not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", data) or Path(data).exists():
        reader(data, column, "train")
    return data


def read_batches(
    model: Any, data: str, column: str, split: str, seq_len: int | None, batch_size: int, limit: int | None,
    seed: int, **settings: Any,
) -> Any:  # fmt: skip
    """Batches of a source of text, in rows of `--seq-len` or of the model's context, whichever is shorter."""
    if is_stored(data):
        if seq_len is not None:
            raise ValueError("--seq-len is of text: the rows of stored states are as they were captured")
        stored = open_states(data)
        return stored if limit is None else stored.first(limit)
    return token_batches(
        lab.text(split) if data == "lab" else data, tokenizer_of(model), batch_size=batch_size,
        seq_len=row_length(model) if seq_len is None else seq_len, text_column=column, split=split, limit_tokens=limit, shuffle_seed=seed, **settings,
    )  # fmt: skip


def row_length(model: Any) -> int:
    """Tokens of a row where `--seq-len` does not say it."""
    return min(SEQ_LEN, int(getattr(model.cfg, "n_ctx", None) or SEQ_LEN))


def read_prompts(prompts: Sequence[str] | None, file: Path | None = None) -> list[str]:
    """The texts of a command: its arguments, where "-" is standard input, and the text of a file; none of them is empty."""
    texts = [sys.stdin.read().removesuffix("\n") if text == "-" else text for text in prompts or ()]
    if file is not None:
        if not file.is_file():
            raise ValueError(f"--file {str(file)!r} is no file")
        texts.append(file.read_text(encoding="utf-8").removesuffix("\n"))
    if not texts or not all(texts):
        raise ValueError("there is no text to read: give a prompt, - for standard input, or --file")
    return texts


def as_chat(texts: Sequence[str], chat: bool) -> list[Any]:
    """Prompts as they are, or with `--chat` each as a conversation of one message."""
    return [[{"role": "user", "content": text}] for text in texts] if chat else list(texts)


def page_to_open(path: Path | None, wanted: bool) -> Path | None:
    """The file of `--open`: that of `--save`, which must be a page, or a temporary one."""
    if wanted and path is not None and path.suffix.lower() != ".html":
        raise ValueError(f"--open shows a page, and --save {str(path)!r} is none: give a file that ends in .html")
    return path if path is not None or not wanted else Path(tempfile.mkdtemp(prefix="tl-lenses-")) / "page.html"


def open_page(path: Path) -> None:
    """Show a page in the browser, where there is one."""
    if not webbrowser.open(path.resolve().as_uri()):
        raise ValueError(f"no browser can be opened here: the page is in {path}")


def parse_layers(text: str | None, n: int) -> list[int | str] | None:
    """`0,4,8`, `::2`, `-1`, hook names, or several of them with commas; slices are Python's, of `n` layers. None without.

    >>> parse_layers("0,2:4,-1,blocks.0.hook_resid_mid", 9)
    [0, 2, 3, -1, 'blocks.0.hook_resid_mid']
    """
    if text is None:
        return None
    layers: list[int | str] = []
    for item in (part.strip() for part in text.split(",")):
        if re.fullmatch(r"-?\d+", item):
            layers.append(int(item))
        elif re.fullmatch(r"(-?\d+)?(:(-?\d+)?){1,2}", item):
            layers += range(n)[slice(*(int(part) if part else None for part in item.split(":")))]
        elif item:
            layers.append(item)
    if not layers:
        raise ValueError(f"--layers {text!r} selects nothing: expected such as 0,4,8 or ::2 or a hook name")
    return layers


def lens_names(lenses: Sequence[str] | None, taken: Sequence[str] = ()) -> dict[str, str]:
    """Name -> folder of `FOLDER` and `NAME=FOLDER`."""
    folders: dict[str, str] = {}
    for text in lenses or ():
        name, equals, folder = text.partition("=")
        if not equals or not name or os.path.exists(text):
            name, folder = Path(text).name or text, text
        if name in folders or name in taken:
            raise ValueError(f"two lenses are called {name!r}: give --lens NAME={folder}")
        folders[name] = folder
    return folders


def saved_lenses(folders: Mapping[str, str]) -> dict[str, Any]:
    """Maps by name, read before a model is; the files of other packages may need its depth, and stay names until then."""
    lenses: dict[str, Any] = {}
    for name, folder in folders.items():
        place = files.place_of(folder)
        lenses[name] = folder if place is not None and not files.is_ours(place) else Translators.load(folder)
    return lenses


def check_file(path: Path | None, suffixes: Sequence[str]) -> None:
    """Check that a file can be written, before the work starts."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"cannot tell how to save {str(path)!r}: use one of {', '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a directory: give a file in it")
    files.check_output(path.parent, overwrite=True)

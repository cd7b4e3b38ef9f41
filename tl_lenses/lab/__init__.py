"""The bundled model and text: enough to run every example, test and benchmark offline.

`load` gives the model, `text` the passages that it is fitted and measured on. The model cards are the README.md files of
the folders that `path` names.
"""

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["Bundled", "available", "load", "path", "text"]

_HERE = Path(__file__).parent
_MODELS = {
    "lab-gpt2": "GPT-2 architecture, 8 layers, width 256, vocabulary 8,192, 8.5 M parameters; books and 1,304 facts",
}
_SPLITS = ("train", "heldout")
_SEPARATOR = "\n<|endoftext|>\n"


class Bundled(NamedTuple):
    """One bundled model: its name, its size on disk and what it is."""

    name: str
    n_bytes: int
    description: str


def available() -> list[Bundled]:
    """The bundled models.

    Example:
        >>> [model.name for model in available()]
        ['lab-gpt2']
    """
    return [
        Bundled(name, sum(file.stat().st_size for file in path(name).iterdir()), description)
        for name, description in _MODELS.items()
    ]


def path(name: str = "lab-gpt2") -> Path:
    """The folder of a bundled model: a Hugging Face checkpoint that TransformerLens 2, 3 and 4 all read.

    Args:
        name: one of `available()`.

    Raises:
        ValueError: there is no such model.
    """
    if name not in _MODELS:
        raise ValueError(f"expected a bundled model, one of {sorted(_MODELS)}, got {name!r}")
    return _HERE / name


def text(split: str) -> list[str]:
    """Bundled documents: passages of public-domain books, one paragraph a line.

    Args:
        split: "train" to fit lenses on, "heldout" (other books) to measure them on.

    Raises:
        ValueError: another split.

    Example:
        >>> len(text("heldout")) > 20
        True
    """
    if split not in _SPLITS:
        raise ValueError(f"expected a split, one of {list(_SPLITS)}, got {split!r}")
    return (_HERE / "text" / f"{split}.txt").read_text(encoding="utf-8").removesuffix("\n").split(_SEPARATOR)


def load(name: str = "lab-gpt2", *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A bundled model, in eval mode and in the raw basis, with its tokenizer.

    A `TransformerBridge` where the installed TransformerLens has one (3.9 and later), otherwise a `HookedTransformer`
    without weight processing. Needs no network, prints nothing, leaves the random state alone.

    Args:
        name: one of `available()`.
        device: where the weights go.
        dtype: their type; they are stored in half precision.

    Raises:
        ValueError: there is no such model, or a file of it is damaged or missing (the installation is broken).

    Example:
        >>> load().cfg.n_layers
        8
    """
    folder = path(name)
    verify(folder)

    from safetensors.torch import load_file
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    # Built here rather than by `from_pretrained`, which draws a progress bar.
    config = GPT2Config.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        hf_model: Any = GPT2LMHeadModel(config)
        # The unembedding is tied to the embedding and not stored twice.
        hf_model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        hf_model.tie_weights()
        hf_model.to(dtype).eval()
        try:
            from transformer_lens.model_bridge import TransformerBridge
        except ImportError:
            return _hooked_transformer(folder, hf_model, tokenizer, device, dtype)
        return TransformerBridge.boot_transformers(
            name, hf_model=hf_model, tokenizer=tokenizer, device=str(device), dtype=dtype
        ).eval()


def verify(folder: Path) -> None:
    """Compare the files of a bundled model with its `checksums.json`.

    Args:
        folder: the model's folder.

    Raises:
        ValueError: a file is missing, or its SHA-256 is another one.
    """
    for file, expected in json.loads((folder / "checksums.json").read_text(encoding="utf-8")).items():
        try:
            got = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        except FileNotFoundError:
            got = "no file"
        if got != expected:
            raise ValueError(
                f"{folder / file} is damaged: expected SHA-256 {expected}, got {got}; "
                "reinstall with pip install --force-reinstall --no-deps tl-lenses"
            )


def _hooked_transformer(folder: Path, hf_model: Any, tokenizer: Any, device: Any, dtype: torch.dtype) -> Any:
    """TransformerLens 2.x, whose `from_pretrained` takes no local folder: its loading steps, without processing."""
    loading: Any = importlib.import_module("transformer_lens.loading_from_pretrained")
    hooked_transformer: Any = importlib.import_module("transformer_lens").HookedTransformer

    config = loading.get_pretrained_model_config(str(folder), fold_ln=False, device=str(device), dtype=dtype)
    config.model_name = folder.name  # otherwise the whole path
    state = loading.get_pretrained_state_dict(str(folder), config, hf_model=hf_model, dtype=dtype)
    model = hooked_transformer(config, tokenizer)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return model.eval()

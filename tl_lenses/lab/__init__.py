"""The lab models and their text: enough to run every example, test and benchmark offline.

`load` gives a model, `text` the passages that lenses are fitted and measured on. `lab-gpt2` and `lab-gpt2-small` are part of
the installation; the others are in the folder `lab/` of the repository. The model cards are the README.md files of the
folders that `path` names.
"""

import contextlib
import hashlib
import importlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tl_lenses.checks import device_named, whole_number

__all__ = ["Bundled", "available", "exercise", "load", "path", "steps", "text"]

_HERE = Path(__file__).parent
_REPOSITORY = "https://github.com/tl-lenses/tl-lenses"
_MODELS = {
    "lab-gpt2": "GPT-2 architecture, 8 layers, width 256, 8.5 M parameters; books, stories and 1,462 facts",
    "lab-gpt2-small": "GPT-2 architecture, 6 layers, width 128, 2.3 M parameters; the small partner of lab-gpt2",
    "lab-neox": "GPT-NeoX (Pythia) architecture, 8 layers, width 128, 3.7 M parameters; ten checkpoints along training",
    "lab-neo": "GPT-Neo architecture (local and global attention), 6 layers, width 192, 4.3 M parameters",
    "lab-gpt2-tuned": "lab-gpt2, trained on with the novels of Jane Austen",
    "lab-gpt2-permuted": "lab-gpt2, taught other facts: the capitals, languages, currencies and head offices of others",
}
_IN_WHEEL = ("lab-gpt2", "lab-gpt2-small")
_SPLITS = ("train", "heldout")
_SEPARATOR = "\n<|endoftext|>\n"


class Bundled(NamedTuple):
    """One lab model: its name, its size on disk (0 where it is not at hand), what it is, and whether `load` finds it."""

    name: str
    n_bytes: int
    description: str
    at_hand: bool


def available() -> list[Bundled]:
    """The lab models, those that are not at hand included.

    Example:
        >>> [model.name for model in available()][:2]
        ['lab-gpt2', 'lab-gpt2-small']
    """
    models = []
    for name, description in _MODELS.items():
        folder = _find(name)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder else 0
        models.append(Bundled(name, size, description, folder is not None))
    return models


def path(name: str = "lab-gpt2", *, step: int | None = None) -> Path:
    """The folder of a lab model: config.json, model.safetensors, its card and its checksums.

    Args:
        name: one of `available()`.
        step: a checkpoint along training, one of `steps(name)`; None for the finished model.

    Raises:
        ValueError: there is no such model, or no such checkpoint.
        FileNotFoundError: the model is not part of the installation and not at hand; says where it is.
    """
    if not isinstance(name, str) or name not in _MODELS:
        raise ValueError(f"expected a bundled model, one of {sorted(_MODELS)}, got {name!r}")
    step = None if step is None else whole_number("step", step, least=0)
    folder = _find(name)
    if folder is None:
        raise FileNotFoundError(
            f"{name!r} is not part of the installed package: it is in the folder lab/ of the repository. "
            f"git clone {_REPOSITORY}, then work inside the checkout or set TL_LENSES_LAB to its lab/ folder"
        )
    if step is None or step == _last_step(folder):
        return folder
    if not (folder / f"step-{step}").is_dir():
        raise ValueError(f"expected a checkpoint of {name}, one of {steps(name)}, got step={step}")
    return folder / f"step-{step}"


def steps(name: str) -> list[int]:
    """The training steps of which a lab model has checkpoints, the finished model last; empty for a model without.

    Args:
        name: one of `available()`.

    Raises:
        ValueError: there is no such model.
        FileNotFoundError: it is not at hand.
    """
    folder = path(name)
    early = sorted(int(sub.name.removeprefix("step-")) for sub in folder.glob("step-*"))
    return [*early, _last_step(folder)] if early else []


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
    if not isinstance(split, str) or split not in _SPLITS:
        raise ValueError(f"expected a split, one of {list(_SPLITS)}, got {split!r}")
    return (_HERE / "text" / f"{split}.txt").read_text(encoding="utf-8").removesuffix("\n").split(_SEPARATOR)


def load(
    name: str = "lab-gpt2", *, step: int | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """A lab model, in eval mode and in the raw basis, with its tokenizer.

    A `TransformerBridge` where the installed TransformerLens has one (3.9 and later), otherwise a `HookedTransformer`
    without weight processing. Needs no network, prints nothing, leaves the random state alone.

    Args:
        name: one of `available()`.
        step: a checkpoint along training, one of `steps(name)`; None for the finished model.
        device: where the weights and the computation are.
        dtype: their type; they are stored in half precision.

    Raises:
        ValueError: there is no such model or checkpoint, or a file of it is damaged or missing.
        FileNotFoundError: the model is in the repository and not at hand; says where it is.

    Example:
        >>> load().cfg.n_layers
        8
    """
    folder = path(name, step=step)
    device = device_named(device)
    tensors = _tensors(folder)

    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    # Built here rather than by `from_pretrained`, which draws a progress bar.
    config = AutoConfig.from_pretrained(folder)
    verify(_HERE / "lab-gpt2", ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(_HERE / "lab-gpt2")
    with torch.random.fork_rng(devices=[]):
        hf_model: Any = AutoModelForCausalLM.from_config(config).float()
        if "lm_head.weight" in tensors and "lm_head.weight" not in hf_model.state_dict():
            tensors["embed_out.weight"] = tensors.pop("lm_head.weight")  # GPT-NeoX before transformers 5
        # A tied unembedding is not stored twice.
        hf_model.load_state_dict(tensors, strict=not config.tie_word_embeddings)
        hf_model.tie_weights()
        hf_model.to(dtype).eval()
        try:
            from transformer_lens.model_bridge import TransformerBridge
        except ImportError:
            return _hooked_transformer(name, folder, hf_model, tokenizer, device, dtype)
        model = TransformerBridge.boot_transformers(name, hf_model=hf_model, tokenizer=tokenizer, device="cpu", dtype=dtype)
        # Moved here: a bridge around a model that exists leaves it where it is and only notes the device.
        with contextlib.redirect_stdout(io.StringIO()):  # it says so
            return model.to(device).eval()


@contextlib.contextmanager
def exercise(name: str) -> Iterator[None]:
    """Print whether an exercise of the course is done: whether all holds that the block asserts.

    The message of a failed assertion says what is missing. NotImplementedError, which an exercise raises as it is given, means
    that nothing was written yet. Any other error passes, with its trace.

    Args:
        name: of the exercise, for the line that is printed.

    Example:
        >>> with exercise("1.1"):
        ...     assert 1 + 1 == 3, "one and one are 2"
        exercise 1.1: not yet. one and one are 2
    """
    try:
        yield
    except NotImplementedError:
        print(f"exercise {name}: not yet. Replace `raise NotImplementedError` and run both cells.")
    except AssertionError as error:
        print(f"exercise {name}: not yet. {error or 'An assertion does not hold'}")
    else:
        print(f"exercise {name}: done.")


def verify(folder: Path, files: tuple[str, ...] | None = None) -> None:
    """Compare the files of a lab model with its `checksums.json`."""
    sums: dict[str, str] = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
    for file in sums if files is None else files:
        try:
            got = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        except FileNotFoundError:
            got = "no file"
        if got != sums.get(file):
            where = "pip install --force-reinstall --no-deps tl-lenses" if folder.parent == _HERE else "git checkout"
            raise ValueError(
                f"{folder / file} is damaged: expected SHA-256 {sums.get(file)}, got {got}; bring it back with {where}"
            )


def _find(name: str) -> Path | None:
    """The folder of a model: in the package, in the folder that TL_LENSES_LAB names, or in the checkout around the package."""
    if name in _IN_WHEEL:
        return _HERE / name
    named = os.environ.get("TL_LENSES_LAB")
    for parent in ([Path(named)] if named else []) + [_HERE.parents[1] / "lab"]:
        if (parent / name / "checksums.json").is_file():
            return parent / name
    return None


def _last_step(folder: Path) -> int:
    return json.loads((folder / "measured.json").read_text(encoding="utf-8"))["steps"]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The checked weights of a folder; of a fine-tune, those that it did not train come from its base."""
    from safetensors.torch import load_file

    top = folder.parent if folder.name.startswith("step-") else folder
    prefix = f"{folder.name}/" if top != folder else ""
    verify(top, (f"{prefix}config.json", f"{prefix}model.safetensors"))
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    if not (folder / "base.json").is_file():
        return tensors
    base = json.loads((folder / "base.json").read_text(encoding="utf-8"))
    sums = json.loads((path(base["base"]) / "checksums.json").read_text(encoding="utf-8"))
    if sums["model.safetensors"] != base["sha256"]:
        raise ValueError(
            f"{folder.name} was trained from another {base['base']}: expected weights with SHA-256 {base['sha256']}, "
            f"got {sums['model.safetensors']}; take both from the same revision of the repository"
        )
    return _tensors(path(base["base"])) | tensors


def _hooked_transformer(name: str, folder: Path, hf_model: Any, tokenizer: Any, device: Any, dtype: torch.dtype) -> Any:
    """TransformerLens 2.x, whose `from_pretrained` takes no local folder: its loading steps, without processing."""
    loading: Any = importlib.import_module("transformer_lens.loading_from_pretrained")
    hooked_transformer: Any = importlib.import_module("transformer_lens").HookedTransformer

    config = loading.get_pretrained_model_config(str(folder), fold_ln=False, device=str(device), dtype=dtype)
    config.model_name = name  # otherwise the whole path
    state = loading.get_pretrained_state_dict(str(folder), config, hf_model=hf_model, dtype=dtype)
    model = hooked_transformer(config, tokenizer)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return model.eval()

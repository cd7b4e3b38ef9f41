"""Models by name: bundled, a local folder, a folder that `tools/real_models.py` made, or the Hub."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from tl_lenses import lab
from tl_lenses.checks import device_named

REAL = ("smollm2-135m", "gemma3-270m")  # those that the tool makes


def folder_of(name: str) -> Path:
    """Where a real model is kept: in the folder that TL_LENSES_MODELS names, by default `~/.cache/tl_lenses/models`."""
    root = os.environ.get("TL_LENSES_MODELS") or Path.home() / ".cache" / "tl_lenses" / "models"
    return Path(root).expanduser() / name


def load_model(name: str, *, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A model in eval mode and in the raw basis, with its tokenizer: the same as `--model` of the command line.

    A `TransformerBridge` where the installed TransformerLens has one (3.9 and later), otherwise a `HookedTransformer`
    without weight processing.

    Args:
        name: a bundled model (`lab.available()`), a folder as `save_pretrained` writes it, `smollm2-135m` or `gemma3-270m` where
            `tools/real_models.py` made them, or a name on the Hub.
        device: where the weights and the computation are; the first GPU by default, if there is one.
        dtype: the type of the weights.

    Raises:
        TypeError: a name that is no text.
        ValueError: there is no such model, or it cannot be loaded; says why, and how it is made.

    Example:
        >>> load_model("lab-gpt2", device="cpu").cfg.n_layers
        8
        >>> model = load_model("smollm2-135m")      # doctest: +SKIP
    """
    if not isinstance(name, str):
        raise TypeError(f"expected the name or the folder of a model, as text, got {name!r:.80}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"expected a floating-point dtype such as torch.float32, got {dtype!r:.80}")
    first = "cuda" if torch.cuda.is_available() else "cpu"
    place = str(device_named(first if device is None else device))
    if name in {bundled.name for bundled in lab.available()}:
        return lab.load(name, device=place, dtype=dtype)
    folder = _folder(name)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model = _from_transformers(name if folder is None else str(folder), folder is not None, place, dtype)
    except Exception as error:  # every library below has its own errors
        message = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot load the model {name!r}: {message}") from error
    if folder == folder_of(name):
        model.cfg.model_name = name  # otherwise the whole path
    return model


def load_reference(name: str, *, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The plain Hugging Face model of a folder or a name on the Hub, in eval mode: `check(model, reference=...)` compares with it.

    Raises:
        ValueError: there is no such model, or it cannot be loaded; says why.

    Example:
        >>> tll.check(model, reference=load_reference("EleutherAI/pythia-70m"))      # doctest: +SKIP
    """
    folder = lab.path(name) if name in {bundled.name for bundled in lab.available()} else _folder(name)
    try:
        import transformers

        load = transformers.AutoModelForCausalLM.from_pretrained
        return load(name if folder is None else str(folder)).to(device=device, dtype=dtype).eval()  # type: ignore[call-arg]
    except Exception as error:  # every library below has its own errors
        message = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot load the reference {name!r}: {message}") from error


def _folder(name: str) -> Path | None:
    """The folder of a model; None for one of the Hub."""
    here, kept = Path(name).expanduser(), folder_of(name)
    if not here.exists() and (kept / "config.json").is_file():
        return kept
    if here.is_dir():
        if not (here / "config.json").is_file():
            raise ValueError(
                f"the directory {name!r} holds no model: expected config.json and weights, as save_pretrained writes them"
            )
        return here
    if name in REAL:
        raise ValueError(
            f"{name!r} is not in {str(kept.parent)!r}: python tools/real_models.py {name} makes it, in a checkout of tl_lenses; "
            "or set TL_LENSES_MODELS to the folder that has it"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or here.exists():
        raise ValueError(f"there is no model directory {name!r}")
    return None


def _from_transformers(name: str, local: bool, device: str, dtype: torch.dtype) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:  # TransformerLens 2.x
        from transformer_lens import HookedTransformer  # pyright: ignore

        if not local:
            return HookedTransformer.from_pretrained_no_processing(name, device=device, dtype=dtype).eval()  # pyright: ignore
        hf_model = transformers.AutoModelForCausalLM.from_pretrained(name, torch_dtype=dtype).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        return lab._hooked_transformer(Path(name).name, Path(name), hf_model, tokenizer, device, dtype)
    return TransformerBridge.boot_transformers(name, device=device, dtype=dtype).eval()

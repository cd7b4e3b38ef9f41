"""How `tl-lenses experiment` runs the experiments of the Tuned Lens paper: one function each, from the options to a report.

A runner gets the loaded model and `Wanted`, what the command line asked for, and returns a `Report`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tl_lenses.cli_inputs import SEQ_LEN, read_batches
from tl_lenses.model import device_of, dtype_of

# What a lens is fitted on where none is given, and what it is measured on.
FIT_STEPS, FIT_TOKENS_PER_STEP, FIT_REGRESSION = 60, 1024, 2**14


@dataclass(frozen=True)
class Wanted:
    """The options of `tl-lenses experiment` that a runner may use.

    Attributes:
        data: where text comes from, "lab" for the bundled books.
        to: the second model, loaded, or None.
        lenses: translators by name, as given with --lens.
        layers: layers by number, or None for all.
        limit: items, or None for the experiment's own default.
        k: directions, or None for the default.
        seed: of every draw.
        lab: whether the model is a lab model, whose defaults are small.
    """

    data: str = "lab"
    to: Any = None
    lenses: Mapping[str, Any] = field(default_factory=dict)
    layers: list[int] | None = None
    limit: int | None = None
    k: int | None = None
    seed: int = 0
    lab: bool = True


def text_of(model: Any, wanted: Wanted, *, fit: bool = False, tokens: int = 4096, seq_len: int | None = None) -> Any:
    """Text to fit on or to measure on: of the bundled text other books, of a data set another split."""
    if wanted.data == "lab":
        split = "train" if fit else "heldout"
    else:  # files have one split
        split = "train" if fit or Path(wanted.data).exists() else "validation"
    return read_batches(model, wanted.data, "text", split, seq_len or SEQ_LEN, 8, tokens, wanted.seed)


def lenses_of(model: Any, wanted: Wanted, names: tuple[str, ...] = ("logit", "regression", "tuned")) -> dict[str, Any]:
    """Lenses by name: those that were given, or else fitted here on the training text (half a minute on a lab model)."""
    import tl_lenses as tll

    found: dict[str, Any] = {"logit": tll.Lens(model)} if "logit" in names else {}
    if wanted.lenses:
        return found | {name: tll.Lens(model, maps) for name, maps in wanted.lenses.items()}
    if "regression" in names:
        text = text_of(model, wanted, fit=True, tokens=FIT_REGRESSION)
        found["regression"] = tll.Lens(model, tll.fit_regression(model, text))
    if "tuned" in names:
        text = text_of(model, wanted, fit=True, tokens=FIT_STEPS * FIT_TOKENS_PER_STEP)
        maps = tll.fit_tuned(model, text, steps=FIT_STEPS, tokens_per_step=FIT_TOKENS_PER_STEP, seed=wanted.seed)
        found["tuned"] = tll.Lens(model, maps)
    return found


# --- quality, transfer, fine-tune, gradients, sampling

# Beside lab-gpt2, where they are at hand: several models in one figure.
BESIDE = ("lab-gpt2-small", "lab-neox", "lab-neo")


def _fitted(wanted: Wanted, model: Any) -> list[int] | None:
    """The layers asked for that a lens is fitted at, or None for all."""
    return None if wanted.layers is None else [layer for layer in wanted.layers if layer < model.cfg.n_layers] or None


def _quality(model: Any, wanted: Wanted) -> Any:
    from dataclasses import replace

    from tl_lenses import lab
    from tl_lenses.experiments.quality import quality
    from tl_lenses.model import name_of

    def one(this: Any, given: Wanted, layers: list[int] | None) -> Any:
        text = text_of(this, given, tokens=given.limit or 4096)
        return quality(this, lenses_of(this, given), text, layers=layers)

    found = one(model, wanted, wanted.layers)
    others = [wanted.to] if wanted.to is not None else []
    missing: list[str] = []
    if name_of(model) == "lab-gpt2" and wanted.to is None and not wanted.lenses and wanted.layers is None:
        at_hand = {bundled.name: bundled.at_hand for bundled in lab.available()}
        missing = [name for name in BESIDE if not at_hand.get(name)]
        others = [
            lab.load(name, device=device_of(model), dtype=dtype_of(model)) for name in BESIDE if at_hand.get(name)
        ]
    for other in others:  # a given lens and a choice of layers are the first model's
        found = found + one(other, replace(wanted, lenses={}, layers=None), None)
    return replace(found, settings={**found.settings, "left_out": missing})


def _transfer(model: Any, wanted: Wanted) -> Any:
    from tl_lenses.experiments.transfer import transfer

    lens = next(iter(lenses_of(model, wanted, ("tuned",)).values()))
    return transfer(model, lens, text_of(model, wanted, tokens=wanted.limit or 4096), layers=wanted.layers)


def _fine_tune(model: Any, wanted: Wanted) -> Any:
    from dataclasses import replace

    from tl_lenses import lab
    from tl_lenses.experiments.fine_tune import fine_tune

    to = wanted.to
    if to is None:
        if not wanted.lab:
            raise ValueError("fine-tune needs the fine-tuned model: pass --to MODEL")
        to = lab.load("lab-gpt2-tuned", device=device_of(model), dtype=dtype_of(model))
    base, own = lenses_of(model, wanted, ("tuned",)), lenses_of(to, replace(wanted, lenses={}), ("tuned",))
    text = text_of(to, wanted, tokens=wanted.limit or 4096)
    lens = next(iter(base.values()))
    return fine_tune(to, lens.translators, own["tuned"].translators, text, layers=wanted.layers)


def _gradients(model: Any, wanted: Wanted) -> Any:
    from tl_lenses.experiments.gradients import gradients

    rows = wanted.limit or 64
    width = min(SEQ_LEN, int(getattr(model.cfg, "n_ctx", None) or SEQ_LEN))
    text = text_of(model, wanted, tokens=rows * width)
    return gradients(model, text, layers=_fitted(wanted, model), seed=wanted.seed)


def _sampling(model: Any, wanted: Wanted) -> Any:
    import torch

    from tl_lenses.experiments.sampling import sampling

    # Prompts are the starts of rows of text; as many tokens again and more are added.
    n, width = wanted.limit or 32, 16
    prompts = torch.cat([batch.tokens for batch in text_of(model, wanted, tokens=n * width, seq_len=width)])
    lenses = lenses_of(model, wanted, ("logit", "tuned"))
    return sampling(model, lenses, prompts, layers=wanted.layers, max_new_tokens=32, seed=wanted.seed)


# --- causal-basis, alignment, ablations


# --- detection, difficulty, weights, inversion


# name -> (runner, options beside --data, --limit, --layers and --seed that it takes, what --limit counts)
RUNNERS: dict[str, tuple[Callable[[Any, Wanted], Any], tuple[str, ...], str]] = {
    # quality, transfer, fine-tune, gradients, sampling
    "quality": (_quality, ("lens", "to"), "tokens"),
    "transfer": (_transfer, ("lens",), "tokens"),
    "fine-tune": (_fine_tune, ("lens", "to"), "tokens"),
    "gradients": (_gradients, (), "sequences"),
    "sampling": (_sampling, ("lens",), "prompts"),
    # causal-basis, alignment, ablations
    # detection, difficulty, weights, inversion
}

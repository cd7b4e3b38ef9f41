"""How `tl-lenses experiment` runs the experiments of the Tuned Lens paper: one function each, from the options to a report.

A runner gets the loaded model and `Wanted`, what the command line asked for, and returns a `Report`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tl_lenses.cli_inputs import SEQ_LEN, read_batches

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


# --- causal-basis, alignment, ablations


# --- detection, difficulty, weights, inversion


# name -> (runner, options beside --data, --limit, --layers and --seed that it takes, what --limit counts)
RUNNERS: dict[str, tuple[Callable[[Any, Wanted], Any], tuple[str, ...], str]] = {
    # quality, transfer, fine-tune, gradients, sampling
    # causal-basis, alignment, ablations
    # detection, difficulty, weights, inversion
}

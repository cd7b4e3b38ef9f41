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

ABLATED_TOKENS = 4 * (SEQ_LEN - 1)  # four rows: every direction, head and block is a forward pass over them


def _one(lenses: Mapping[str, Any], name: str) -> Any:
    """The lens of an experiment that reads through one."""
    if len(lenses) > 1:
        raise ValueError(f"{name} reads through one lens, got --lens {', --lens '.join(lenses)}")
    return next(iter(lenses.values()))


def _causal_basis(model: Any, wanted: Wanted) -> Any:
    from tl_lenses.experiments.causal_basis import causal_basis

    lens = _one(lenses_of(model, wanted, ("tuned",)), "causal-basis")
    n, k = wanted.limit or ABLATED_TOKENS, wanted.k or min(16, model.cfg.d_model)
    text = text_of(model, wanted, tokens=max(n, 2 * SEQ_LEN) + 8 * SEQ_LEN)
    return causal_basis(model, lens, text, k=k, layers=wanted.layers, n=n)


def _alignment(model: Any, wanted: Wanted) -> Any:
    import tl_lenses as tll
    from tl_lenses.experiments.alignment import alignment

    lenses = {"logit": tll.Lens(model)} | lenses_of(model, wanted, ("tuned",))
    n, k = wanted.limit or ABLATED_TOKENS, wanted.k or min(8, model.cfg.d_model)
    text = text_of(model, wanted, tokens=max(n, 2 * SEQ_LEN) + 8 * SEQ_LEN)
    return alignment(model, lenses, text, k=k, layers=wanted.layers, n=n, seed=wanted.seed)


def _ablations(model: Any, wanted: Wanted) -> Any:
    import torch

    from tl_lenses.experiments.ablations import ablations
    from tl_lenses.experiments.basis import bases_of
    from tl_lenses.experiments.states import states_of, texts_of, wanted_layers

    lens = _one(lenses_of(model, wanted, ("regression",)), "ablations")
    n, k = wanted.limit or ABLATED_TOKENS, wanted.k or min(8, model.cfg.d_model)
    text = text_of(model, wanted, tokens=max(n, 2 * SEQ_LEN) + 8 * SEQ_LEN)
    blocks = wanted_layers(model, wanted.layers)
    states = states_of(model, texts_of(model, text, n=n), [b for b in blocks if b < model.cfg.n_layers])
    bases = {b: basis.vectors for b, basis in bases_of(lens, states, k).items()}
    generator = torch.Generator().manual_seed(wanted.seed)
    drawn = {b: torch.linalg.qr(torch.randn(len(v.T), k, generator=generator)).Q.T.to(v) for b, v in bases.items()}
    spaces = {
        "1 causal direction": {b: v[0] for b, v in bases.items()}, f"{k} causal directions": bases,
        f"{k} random directions": drawn,
    }  # fmt: skip
    return ablations(model, text, subspaces=spaces, layers=wanted.layers, n=n, seed=wanted.seed)


# --- detection, difficulty, weights, inversion


# name -> (runner, options beside --data, --limit, --layers and --seed that it takes, what --limit counts)
RUNNERS: dict[str, tuple[Callable[[Any, Wanted], Any], tuple[str, ...], str]] = {
    # quality, transfer, fine-tune, gradients, sampling
    # causal-basis, alignment, ablations
    "causal-basis": (_causal_basis, ("lens", "k"), "positions"),
    "alignment": (_alignment, ("lens", "k"), "positions"),
    "ablations": (_ablations, ("lens", "k"), "positions"),
    # detection, difficulty, weights, inversion
}

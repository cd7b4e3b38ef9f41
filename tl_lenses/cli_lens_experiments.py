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
        checkpoints: `STEP=MODEL` as given with --checkpoint.
    """

    data: str = "lab"
    to: Any = None
    lenses: Mapping[str, Any] = field(default_factory=dict)
    layers: list[int] | None = None
    limit: int | None = None
    k: int | None = None
    seed: int = 0
    lab: bool = True
    checkpoints: tuple[str, ...] = ()


def text_of(model: Any, wanted: Wanted, *, fit: bool = False, tokens: int = 4096, seq_len: int | None = None) -> Any:
    """Text to fit on or to measure on: of the bundled text other books, of a data set another split."""
    if wanted.data == "lab":
        split = "train" if fit else "heldout"
    else:  # files have one split
        split = "train" if fit or Path(wanted.data).exists() else "validation"
    return read_batches(model, wanted.data, "text", split, seq_len, 8, tokens, wanted.seed)


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


def _detection(model: Any, wanted: Wanted) -> Any:
    from dataclasses import replace

    from tl_lenses.experiments.detection import detection
    from tl_lenses.experiments.injections import RELATIONS, read_instructions, read_relations, tasks_of

    folder = None if wanted.data == "lab" else wanted.data
    source, instructions = read_instructions(folder)
    facts = read_relations(folder)
    known = [name for name in RELATIONS if any(fact.relation == name for fact in facts)]
    relations = known[:4] or list(dict.fromkeys(fact.relation for fact in facts))
    tasks = tasks_of(facts, instructions, relations=relations, n=wanted.limit or 60, seed=wanted.seed)
    lenses = lenses_of(model, replace(wanted, data="lab"), ("logit", "tuned"))
    result = detection(model, lenses, tasks, layers=wanted.layers, seed=wanted.seed)
    return replace(result, settings={**result.settings, "source": source})


def _difficulty(model: Any, wanted: Wanted) -> Any:
    from tl_lenses.experiments.difficulty import difficulty
    from tl_lenses.experiments.injections import beside, read_relations, zero_shot

    n = wanted.limit or 2000
    questions = zero_shot(read_relations(beside()), n=min(n, 60), seed=wanted.seed)
    lenses = lenses_of(model, wanted, ("logit", "tuned"))
    text = text_of(model, wanted, tokens=n + n // 8 + 256)
    return difficulty(
        model,
        lenses,
        text,
        _checkpoints(model, wanted),
        questions=questions,
        layers=wanted.layers,
        n=n,
        seed=wanted.seed,
    )


def _checkpoints(model: Any, wanted: Wanted) -> list[tuple[int, Any]]:
    """Those of --checkpoint, or a lab model's own, the finished model last."""
    from tl_lenses import lab
    from tl_lenses.cli_inputs import load_model
    from tl_lenses.model import name_of

    given = [(int(step), name) for step, _, name in (one.partition("=") for one in wanted.checkpoints)]
    if given:
        return [
            *((step, lambda name=name: load_model(name, None, "float32")) for step, name in given),
            (given[-1][0] + 1, model),
        ]
    name = name_of(model)
    steps = lab.steps(name) if wanted.lab else []
    if not steps:
        raise ValueError(
            f"{name} has no checkpoints at hand: name them with --checkpoint STEP=MODEL, or use --model lab-neox"
        )
    return [*((step, lambda step=step: lab.load(name, step=step)) for step in steps[:-1]), (steps[-1], model)]


def _weights(model: Any, wanted: Wanted) -> Any:
    import torch

    from tl_lenses.experiments.weights import weights

    lenses = lenses_of(model, wanted, ("logit", "tuned"))
    counts = torch.zeros(int(model.cfg.d_vocab), dtype=torch.long)
    for batch in text_of(model, wanted, fit=True, tokens=2**17):
        counts += torch.bincount(batch.tokens.flatten(), minlength=len(counts))
    among = (counts > 1).nonzero()[:, 0]  # tokens that were never seen would fill the lists
    return weights(
        model,
        lenses,
        blocks=wanted.layers,
        among=among,
        directions=wanted.k or 8,
        columns=wanted.limit or 64,
        seed=wanted.seed,
    )


def _inversion(model: Any, wanted: Wanted) -> Any:
    from tl_lenses.experiments.inversion import inversion

    lenses = lenses_of(model, wanted, ("logit", "tuned"))
    depth = model.cfg.n_layers
    layers = wanted.layers or sorted({*range(0, depth, max(1, depth // 4)), depth})
    text = text_of(model, wanted, tokens=8192)
    return inversion(model, lenses, text, layers=layers, n=wanted.limit or 24, seed=wanted.seed)


# name -> (runner, options beside --data, --limit, --layers and --seed that it takes, what --limit counts)
RUNNERS: dict[str, tuple[Callable[[Any, Wanted], Any], tuple[str, ...], str]] = {
    # quality, transfer, fine-tune, gradients, sampling
    "quality": (_quality, ("lens", "to"), "tokens"),
    "transfer": (_transfer, ("lens",), "tokens"),
    "fine-tune": (_fine_tune, ("lens", "to"), "tokens"),
    "gradients": (_gradients, (), "sequences"),
    "sampling": (_sampling, ("lens",), "prompts"),
    # causal-basis, alignment, ablations
    "causal-basis": (_causal_basis, ("lens", "k"), "positions"),
    "alignment": (_alignment, ("lens", "k"), "positions"),
    "ablations": (_ablations, ("lens", "k"), "positions"),
    # detection, difficulty, weights, inversion
    "detection": (_detection, ("lens",), "prompts of a task"),
    "difficulty": (_difficulty, ("lens", "checkpoint"), "positions, and questions of a relation up to 60"),
    "weights": (_weights, ("lens", "k"), "columns of an MLP and block"),
    "inversion": (_inversion, ("lens",), "distributions"),
}

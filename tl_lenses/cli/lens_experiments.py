"""The Tuned Lens paper's experiments on the command line: from options to a report."""

from dataclasses import replace
from typing import Annotated, Any

import torch
import typer

import tl_lenses as tll
from tl_lenses import lab
from tl_lenses.cli.experiment import Data, K, Lenses, Run, command, read_text
from tl_lenses.cli.inputs import row_length
from tl_lenses.cli.options import SEQ_LEN
from tl_lenses.model import device_of, dtype_of, name_of

# What a lens is fitted on where none is given.
FIT_STEPS, FIT_TOKENS_PER_STEP, FIT_REGRESSION = 60, 1024, 2**14
# Of causal-basis, alignment and ablations: four rows. Every direction, head and block is a forward pass over them.
ABLATED_TOKENS = 4 * (SEQ_LEN - 1)
# Beside lab-gpt2, where they are at hand: several models in one figure.
LENSES = ("logit", "regression", "tuned")
BESIDE = ("lab-gpt2-small", "lab-neox", "lab-neo")


def _lenses(run: Run, *names: str, model: Any = None) -> dict[str, Any]:
    """Lenses by name: the given ones, or else fitted here on the training text (half a minute on a lab model)."""
    given, model = (run.lenses, run.model) if model is None else ({}, model)
    lenses: dict[str, Any] = {"logit": tll.Lens(model)} if "logit" in names else {}
    if given:
        return lenses | {name: tll.Lens(model, maps) for name, maps in given.items()}
    if "regression" in names:
        text = run.text(fit=True, tokens=FIT_REGRESSION, model=model)
        lenses["regression"] = tll.Lens(model, tll.fit_regression(model, text))
    if "tuned" in names:
        text = run.text(fit=True, tokens=FIT_STEPS * FIT_TOKENS_PER_STEP, model=model)
        maps = tll.fit_tuned(model, text, steps=FIT_STEPS, tokens_per_step=FIT_TOKENS_PER_STEP, seed=run.seed)
        lenses["tuned"] = tll.Lens(model, maps)
    return lenses


def _single(run: Run, experiment: str, name: str) -> Any:
    """The lens of an experiment that reads through a single one."""
    if len(run.lenses) > 1:
        raise ValueError(f"{experiment} reads through one lens, got --lens {', --lens '.join(run.lenses)}")
    return next(iter(_lenses(run, name).values()))


def _beside(run: Run, name: str) -> Any:
    """A lab model where the other model is."""
    return lab.load(name, device=device_of(run.model), dtype=dtype_of(run.model))


def _noted(report: Any, **settings: Any) -> Any:
    """A report with more settings."""
    return replace(report, settings={**report.settings, **settings})


# --- quality, transfer, fine-tune, gradients, sampling


@command("quality", n="tokens", usual=4096)
def quality(
    run: Run, data: Data = None, lens: Lenses = None,
    to: Annotated[str | None, typer.Option(help="A second model, in the same figure.")] = None,
) -> Any:  # fmt: skip
    """How good and how biased are lenses? KL, bits per byte and bias by layer, of several models."""

    def measured(model: Any = None, layers: Any = None) -> Any:
        lenses, text = _lenses(run, *LENSES, model=model), run.text(tokens=run.n, model=model)
        return tll.experiments.quality(model or run.model, lenses, text, layers=layers)

    report, missing = measured(layers=run.layers), []
    others = [] if to is None else [run.load(to)]
    if name_of(run.model) == "lab-gpt2" and to is None and not run.lenses and run.layers is None:
        at_hand = {bundled.name for bundled in lab.available() if bundled.at_hand}
        missing = [name for name in BESIDE if name not in at_hand]
        others = [_beside(run, name) for name in BESIDE if name in at_hand]
    for other in others:  # a given lens and a choice of layers are the first model's
        report = report + measured(other)
    return _noted(report, left_out=missing)


@command("transfer", n="tokens", usual=4096)
def transfer(run: Run, data: Data = None, lens: Lenses = None) -> Any:
    """Does the lens of one layer read another?"""
    single_lens = _single(run, "transfer", "tuned")
    return tll.experiments.transfer(run.model, single_lens, run.text(tokens=run.n), layers=run.layers)


@command("fine-tune", n="tokens", usual=4096)
def fine_tune(
    run: Run, data: Data = None, lens: Lenses = None,
    to: Annotated[str | None, typer.Option(help="The fine-tuned model; lab-gpt2-tuned for lab models.")] = None,
) -> Any:  # fmt: skip
    """Does a lens of the base model still read a fine-tune?"""
    if to is None and not run.is_lab:
        raise ValueError("fine-tune needs the fine-tuned model: pass --to MODEL")
    tuned = _beside(run, "lab-gpt2-tuned") if to is None else run.load(to)
    base, fitted = _single(run, "fine-tune", "tuned"), _lenses(run, "tuned", model=tuned)["tuned"]
    text = run.text(tokens=run.n, model=tuned)
    return tll.experiments.fine_tune(tuned, base.translators, fitted.translators, text, layers=run.layers)


@command("gradients", n="sequences", usual=64)
def gradients(run: Run, data: Data = None) -> Any:
    """Do blocks go down the gradient of the loss?"""
    text = run.text(tokens=run.n * row_length(run.model))
    return tll.experiments.gradients(run.model, text, layers=run.layers, seed=run.seed)


@command("sampling", n="prompts", usual=32)
def sampling(run: Run, data: Data = None, lens: Lenses = None) -> Any:
    """What would the model write from layer l?"""
    from tl_lenses.experiments.subject import text_settings

    # Prompts are the starts of rows of text; as many tokens again and more are added.
    text = run.text(tokens=run.n * 16, seq_len=16)
    prompts = torch.cat([batch.tokens for batch in text])
    lenses = _lenses(run, "logit", "tuned")
    report = tll.experiments.sampling(run.model, lenses, prompts, layers=run.layers, max_new_tokens=32, seed=run.seed)
    return _noted(report, **text_settings(text))


# --- causal-basis, alignment, ablations


def _to_ablate(run: Run) -> Any:
    return run.text(tokens=max(run.n, 2 * SEQ_LEN) + 8 * SEQ_LEN)


@command("causal-basis", n="positions", usual=ABLATED_TOKENS)
def causal_basis(run: Run, data: Data = None, lens: Lenses = None, k: K = None) -> Any:
    """Which directions matter to a lens, and to the model as well?"""
    lens_of_one, k = _single(run, "causal-basis", "tuned"), run.directions(k, 16)
    return tll.experiments.causal_basis(run.model, lens_of_one, _to_ablate(run), k=k, layers=run.layers, n=run.n)


@command("alignment", n="positions", usual=ABLATED_TOKENS)
def alignment(run: Run, data: Data = None, lens: Lenses = None, k: K = None) -> Any:
    """Does a lens respond to an intervention as the model does?"""
    lenses, k = _lenses(run, "logit", "tuned"), run.directions(k, 8)
    return tll.experiments.alignment(run.model, lenses, _to_ablate(run), k=k, layers=run.layers, n=run.n, seed=run.seed)


@command("ablations", n="positions", usual=ABLATED_TOKENS)
def ablations(run: Run, data: Data = None, lens: Lenses = None, k: K = None) -> Any:
    """What is a block, a head, a subspace or the order of blocks worth?"""
    from tl_lenses.experiments.basis import bases_of
    from tl_lenses.experiments.subject import Subject

    single_lens, k = _single(run, "ablations", "regression"), run.directions(k, 8)
    text = _to_ablate(run)
    subject = Subject.of(run.model, layers=run.layers, what="ablations", final="never")
    states = subject.states(subject.texts(text, n=run.n))
    bases = {layer: basis.vectors for layer, basis in bases_of(single_lens, states, k).items()}
    generator = torch.Generator().manual_seed(run.seed)
    draw = lambda v: torch.linalg.qr(torch.randn(len(v.T), k, generator=generator)).Q.T.to(v)
    drawn = {layer: draw(vectors) for layer, vectors in bases.items()}
    spaces = {
        "1 causal direction": {layer: v[0] for layer, v in bases.items()}, f"{k} causal directions": bases,
        f"{k} random directions": drawn,
    }  # fmt: skip
    return tll.experiments.ablations(run.model, text, subspaces=spaces, layers=run.layers, n=run.n, seed=run.seed)


# --- detection, difficulty, weights, inversion

Tasks = Annotated[
    str | None,
    typer.Option("--data", help="A folder with bipia/ (text_attack_*.json) and lre-relations/; bundled ones by default."),
]
Questions = Annotated[
    str | None,
    typer.Option("--questions", help="A folder with lre-relations/, of zero-shot questions; the bundled facts by default."),
]
Checkpoints = Annotated[
    list[str] | None,
    typer.Option("--checkpoint", help="STEP=MODEL, an earlier checkpoint; repeatable. A lab model's own by default."),
]


def _read_tasks(data: str | None, lens: Any, **_: Any) -> dict[str, Any]:
    from tl_lenses.experiments.injections import read_instructions

    read_instructions(data)
    return {**read_text(None, lens), "data": data or "lab"}


@command("detection", n="prompts of a task", usual=60, read=_read_tasks)
def detection(run: Run, data: Tasks = None, lens: Lenses = None) -> Any:
    """Does a trajectory give an injected prompt away?"""
    from tl_lenses.experiments.injections import RELATIONS, read_instructions, read_relations, tasks_of

    source, instructions = read_instructions(data)
    facts = read_relations(data)
    known = [name for name in RELATIONS if any(fact.relation == name for fact in facts)]
    relations = known[:4] or list(dict.fromkeys(fact.relation for fact in facts))
    tasks = tasks_of(facts, instructions, relations=relations, n=run.n, seed=run.seed)
    lenses = _lenses(replace(run, data="lab"), "logit", "tuned")
    report = tll.experiments.detection(run.model, lenses, tasks, layers=run.layers, seed=run.seed)
    return _noted(report, source=source)


def _read_checkpoints(data: str | None, lens: Any, checkpoint: list[str] | None, **_: Any) -> dict[str, Any]:
    for given in checkpoint or ():
        step, _equals, name = given.partition("=")
        if not (step.isdigit() and name):
            raise ValueError(f"--checkpoint {given!r}: expected STEP=MODEL, such as 1000=folder")
    return read_text(data, lens)


@command(
    "difficulty", n="positions, and questions of a relation up to 60", usual=2000, model="lab-neox",
    read=_read_checkpoints,
)  # fmt: skip
def difficulty(
    run: Run, data: Data = None, questions: Questions = None, lens: Lenses = None, checkpoint: Checkpoints = None
) -> Any:
    """Is what settles late in the layers learned late in training?"""
    from tl_lenses.experiments.injections import read_relations, zero_shot

    asked = zero_shot(read_relations(questions), n=min(run.n, 60), seed=run.seed)
    lenses, text = _lenses(run, "logit", "tuned"), run.text(tokens=run.n + run.n // 8 + 256)
    report = tll.experiments.difficulty(
        run.model, lenses, text, _checkpoints(run, checkpoint or ()), questions=asked, layers=run.layers, n=run.n, seed=run.seed,
    )  # fmt: skip
    return _noted(report, questions=questions or "bundled facts")


def _checkpoints(run: Run, given: Any) -> list[tuple[int, Any]]:
    """The checkpoints of --checkpoint, or those of a lab model, the finished model last."""
    named = [(int(step), name) for step, _, name in (checkpoint.partition("=") for checkpoint in given)]
    if named:
        return [*((step, lambda name=name: run.load(name)) for step, name in named), (named[-1][0] + 1, run.model)]
    name = name_of(run.model)
    steps = lab.steps(name) if run.is_lab else []
    if not steps:
        raise ValueError(f"{name} has no checkpoints at hand: name them with --checkpoint STEP=MODEL, or use --model lab-neox")
    return [*((step, lambda step=step: lab.load(name, step=step)) for step in steps[:-1]), (steps[-1], run.model)]


@command("weights", n="columns of an MLP and block", usual=64)
def weights(
    run: Run, data: Data = None, lens: Lenses = None,
    directions: Annotated[int, typer.Option(help="Singular vectors of a matrix, largest first.")] = 8,
) -> Any:  # fmt: skip
    """What do weights write and read?"""
    counts = torch.zeros(int(run.model.cfg.d_vocab), dtype=torch.long)
    lenses = _lenses(run, "logit", "tuned")
    for batch in run.text(fit=True, tokens=2**17):
        counts += torch.bincount(batch.tokens.flatten(), minlength=len(counts))
    among = (counts > 1).nonzero()[:, 0]  # tokens that were never seen would fill the lists
    return tll.experiments.weights(
        run.model, lenses, layers=run.layers, among=among, directions=directions, columns=run.n, seed=run.seed
    )


@command("inversion", n="distributions", usual=24)
def inversion(run: Run, data: Data = None, lens: Lenses = None) -> Any:
    """Which state would say this?"""
    lenses, depth = _lenses(run, "logit", "tuned"), run.model.cfg.n_layers
    layers = run.layers or sorted({*range(0, depth, max(1, depth // 4)), depth})
    return tll.experiments.inversion(run.model, lenses, run.text(tokens=8192), layers=layers, n=run.n, seed=run.seed)


# --- which lens to believe


@command("intermediates", n="items of each set", usual=None)
def intermediates(
    run: Run,
    data: Data = None,
    lens: Lenses = None,
    items: Annotated[
        str | None, typer.Option(help="lens-eval-*.json, or a folder of them; two hops of the bundled facts by default.")
    ] = None,
) -> Any:
    """Does a lens read what the model thinks of and does not say?"""
    said = 0 if items is None else 1  # the lab models say the first hop aloud
    return tll.experiments.intermediates(
        run.model, _lenses(run, *LENSES), items, layers=run.layers, said=said, n=run.n, seed=run.seed
    )


@command("usage", n="facts", usual=24)
def usage(run: Run, data: Data = None, lens: Lenses = None) -> Any:
    """Does the model use what a lens reads? Swaps and ablations along its directions."""
    lenses = _lenses(run, "regression", "tuned")
    return tll.experiments.usage(run.model, lenses, layers=run.layers, n=run.n, seed=run.seed)


def _read_compared(data: str | None, lens: Any, items: str | None, facts: str | None, **_: Any) -> dict[str, Any]:
    if items is not None:  # a file that is not there is refused at once
        tll.experiments.read_items(items)
    if facts not in (None, "bundled"):
        tll.experiments.read_facts(facts)
    return read_text(data, lens)


@command("compare", n="tokens", usual=4096, read=_read_compared)
def compare(
    run: Run,
    data: Data = None,
    lens: Lenses = None,
    items: Annotated[str | None, typer.Option(help="As for intermediates; without it they are left out.")] = None,
    facts: Annotated[
        str | None,
        typer.Option(
            help="For swaps: a file or folder as for attributes, or `bundled`; lab models take these, others none, by default."
        ),
    ] = None,
) -> Any:
    """Which lens should I believe? All lenses beside each other and beside controls; a sentence per band of layers."""
    lenses = _lenses(run, *LENSES)
    facts = "bundled" if facts is None and run.is_lab else facts
    asked = None if facts is None else tll.experiments.read_facts(None if facts == "bundled" else facts)
    text = run.text(tokens=run.n)
    return tll.experiments.compare(run.model, lenses, text, items=items, facts=asked, layers=run.layers, seed=run.seed)

"""The Patchscopes paper's experiments on the command line: from options to a report."""

import functools
from typing import Annotated, Any

import typer

import tl_lenses as tll
from tl_lenses.cli.experiment import Data, Lenses, NewTokens, Run, TargetLayers, command, read_text
from tl_lenses.cli.options import SEQ_LEN

FIT_TOKENS = 2**14

Facts = Annotated[
    str | None, typer.Option("--data", help=".tsv files of the paper or .json files of LRE; the bundled facts by default.")
]
Descriptions = Annotated[
    str | None, typer.Option("--data", help="A .json or .csv with subject and description; the bundled ones by default.")
]
NoGuard = Annotated[bool, typer.Option("--no-guard", help="Keep items whose answer is in the prompt or comes without a patch.")]

_read_lenses = functools.partial(read_text, taken=("token identity", "logit lens", "regression", "logit"))


def _read_facts(data: str | None, **_: Any) -> dict[str, Any]:
    tll.experiments.read_facts(data)
    return {}


def _read_descriptions(data: str | None, **_: Any) -> dict[str, Any]:
    from tl_lenses.experiments.patchscopes.entities import read_descriptions

    read_descriptions(data)
    return {}


@command("next-token", n="positions", usual=400, read=_read_lenses, sweeps=True)
def next_token(run: Run, data: Data = None, lens: Lenses = None) -> Any:
    """How early can the next token be read? Token identity against lenses."""
    maps = run.lenses
    if not maps and run.data == "lab":
        fitted = [layer for layer in run.layers or () if layer < run.model.cfg.n_layers]
        maps = {"regression": tll.fit_regression(run.model, run.text(fit=True, tokens=FIT_TOKENS), fitted or None)}
    lenses = {name: tll.Lens(run.model, translators) for name, translators in maps.items()}
    text = run.text(tokens=(-(-run.n // 4) + 8) * SEQ_LEN)
    return tll.experiments.next_token(run.model, text, lenses or None, n=run.n, layers=run.layers, seed=run.seed)


@command("attributes", n="facts", usual=60, read=_read_facts, sweeps=True)
def attributes(
    run: Run, data: Facts = None, target_layers: TargetLayers = None, max_new_tokens: NewTokens = None, no_guard: NoGuard = False
) -> Any:
    """Which attributes of a subject does its vector have? With a linear probe beside it."""
    return _on_facts(tll.experiments.attributes, run, data, target_layers, max_new_tokens, no_guard)


@command("entities", n="entities", usual=60, read=_read_descriptions, sweeps=True)
def entities(run: Run, data: Descriptions = None, max_new_tokens: NewTokens = None) -> Any:
    """From which layer on is a name an entity?"""
    new = run.new_tokens(max_new_tokens, 50)
    return tll.experiments.entities(run.model, data, layers=run.layers, n=run.n, max_new_tokens=new, seed=run.seed)


@command("multihop", n="queries", usual=12, read=_read_facts, sweeps=True)
def multihop(
    run: Run, data: Facts = None, target_layers: TargetLayers = None, max_new_tokens: NewTokens = None, no_guard: NoGuard = False
) -> Any:
    """Does a patch make two hops out of one?"""
    return _on_facts(tll.experiments.multihop, run, data, target_layers, max_new_tokens, no_guard)


def _on_facts(
    experiment: Any, run: Run, data: str | None, target_layers: str | None, max_new_tokens: int | None, no_guard: bool
) -> Any:
    return experiment(
        run.model, data, layers=run.layers, target_layers=run.target_layers(target_layers), n=run.n,
        max_new_tokens=run.new_tokens(max_new_tokens, 20), guard=not no_guard, seed=run.seed,
    )  # fmt: skip


@command("cross-model", n="positions", usual=60, model="lab-gpt2-small", sweeps=True)
def cross_model(
    run: Run,
    data: Data = None,
    to: Annotated[str, typer.Option(help="The target model, with the same tokenizer.")] = "lab-gpt2",
    target_layers: TargetLayers = None,
) -> Any:
    """Can a larger model read a smaller one? Through maps fitted first."""
    from tl_lenses.experiments.subject import layers_of

    target = run.load(to)
    into = layers_of(run.target_layers(target_layers, target), target.cfg.n_layers)
    pairs = [(a, b) for a in layers_of(run.layers, run.model.cfg.n_layers) for b in into]
    maps = tll.fit_regression(run.model, run.text(fit=True, tokens=FIT_TOKENS), to=target, pairs=pairs)
    text = run.text(tokens=(run.n + 8) * SEQ_LEN)
    return tll.experiments.cross_model(run.model, target, maps, text, n=run.n, seed=run.seed)


@command("conflict", n="facts", usual=40, model="lab-gpt2-permuted")
def conflict(run: Run, target_layers: TargetLayers = None) -> Any:
    """Who speaks, the vector of lab-gpt2-permuted or the knowledge of lab-gpt2, which reads it?"""
    to, (facts, others) = run.load("lab-gpt2"), tll.experiments.conflicting()
    into = run.target_layers(target_layers, to)
    return tll.experiments.conflict(run.model, to, facts, others, layers=run.layers, target_layers=into, n=run.n, seed=run.seed)

"""The Patchscopes paper's experiments on the command line: from options to a report."""

import functools
from typing import Annotated, Any

import typer

from tl_lenses.cli.experiment import Data, Lenses, NewTokens, Run, TargetLayers, command, read_text
from tl_lenses.cli.inputs import SEQ_LEN

FIT_TOKENS = 2**14

Facts = Annotated[
    str | None,
    typer.Option("--data", help=".tsv files of the paper or .json files of LRE; the bundled facts by default."),
]
Descriptions = Annotated[
    str | None,
    typer.Option("--data", help="A .json or .csv with subject and description; the bundled ones by default."),
]
NoGuard = Annotated[
    bool, typer.Option("--no-guard", help="Keep items whose answer is in the prompt or comes without a patch.")
]


_read_lenses = functools.partial(read_text, taken=("token identity", "logit lens", "regression", "logit"))


def _read_facts(data: str | None, **_: Any) -> dict[str, Any]:
    from tl_lenses.experiments.facts import read_facts

    read_facts(data)
    return {"items": data}


def _read_descriptions(data: str | None, **_: Any) -> dict[str, Any]:
    from tl_lenses.experiments.patchscopes.entities import read_descriptions

    read_descriptions(data)
    return {"items": data}


@command("next-token", n="positions", usual="400", read=_read_lenses, sweeps=True)
def next_token(run: Run, data: Data = None, lens: Lenses = None) -> Any:
    """How early can the next token be read? Token identity against lenses."""
    import tl_lenses as tll
    from tl_lenses.experiments import next_token

    maps = run.lenses
    if not maps and run.data == "lab":
        text = run.text(fit=True, tokens=FIT_TOKENS)
        maps = {"regression": tll.fit_regression(run.model, text, run.fitted_layers())}
    lenses = {name: tll.Lens(run.model, translators) for name, translators in maps.items()}
    n = run.n or 400
    text = run.text(tokens=max((-(-n // 4) + 8) * SEQ_LEN, 2 * SEQ_LEN))
    return next_token(run.model, text, lenses or None, n=n, layers=run.layers, seed=run.seed)


def _asked(run: Run, target_layers: str | None, max_new_tokens: int | None, no_guard: bool) -> dict[str, Any]:
    """What the experiments on facts share."""
    return {
        "layers": run.layers, **run.target_layers(target_layers), "max_new_tokens": run.new_tokens(max_new_tokens, 20),
        "guard": not no_guard, "seed": run.seed,
    }  # fmt: skip


@command("attributes", n="facts", usual="60", read=_read_facts, sweeps=True)
def attributes(
    run: Run, data: Facts = None, target_layers: TargetLayers = None, max_new_tokens: NewTokens = None,
    no_guard: NoGuard = False,
) -> Any:  # fmt: skip
    """Which attributes of a subject does its vector have? With a linear probe beside it."""
    from tl_lenses.experiments import attributes

    return attributes(run.model, run.items, n=run.n or 60, **_asked(run, target_layers, max_new_tokens, no_guard))


@command("entities", n="entities", usual="60", read=_read_descriptions, sweeps=True)
def entities(run: Run, data: Descriptions = None, max_new_tokens: NewTokens = None) -> Any:
    """From which layer on is a name an entity?"""
    from tl_lenses.experiments import entities

    new = run.new_tokens(max_new_tokens, 50)
    return entities(run.model, run.items, layers=run.layers, n=run.n or 60, max_new_tokens=new, seed=run.seed)


@command("multihop", n="queries", usual="12", read=_read_facts, sweeps=True)
def multihop(
    run: Run, data: Facts = None, target_layers: TargetLayers = None, max_new_tokens: NewTokens = None,
    no_guard: NoGuard = False,
) -> Any:  # fmt: skip
    """Does a patch make two hops out of one?"""
    from tl_lenses.experiments import multihop

    return multihop(run.model, run.items, n=run.n or 12, **_asked(run, target_layers, max_new_tokens, no_guard))


@command("cross-model", n="positions", usual="60", model="lab-gpt2-small", read=read_text, sweeps=True)
def cross_model(
    run: Run, data: Data = None,
    to: Annotated[str, typer.Option(help="The target model, with the same tokenizer.")] = "lab-gpt2",
    target_layers: TargetLayers = None,
) -> Any:  # fmt: skip
    """Can a larger model read a smaller one? Through maps fitted first."""
    import tl_lenses as tll
    from tl_lenses.experiments import cross_model
    from tl_lenses.experiments.subject import layers_of

    n, target = run.n or 60, run.load(to)
    asked = run.target_layers(target_layers, target).get("target_layers")
    rows = layers_of(run.layers, run.model.cfg.n_layers)
    pairs = [(a, b) for a in rows for b in layers_of(asked, target.cfg.n_layers)]
    maps = tll.fit_regression(run.model, run.text(fit=True, tokens=FIT_TOKENS), to=target, pairs=pairs)
    text = run.text(tokens=max((n + 8) * SEQ_LEN, 2 * SEQ_LEN))
    return cross_model(run.model, target, maps, text, n=n, seed=run.seed)


@command("conflict", n="facts", usual="40", model="lab-gpt2-permuted")
def conflict(run: Run, target_layers: TargetLayers = None) -> Any:
    """Who speaks, the vector of lab-gpt2-permuted or the knowledge of lab-gpt2, which reads it?"""
    from tl_lenses.experiments import conflict, conflicting

    to = run.load("lab-gpt2")
    return conflict(
        run.model,
        to,
        *conflicting(),
        layers=run.layers,
        n=run.n or 40,
        seed=run.seed,
        **run.target_layers(target_layers, to),
    )

"""The steps: each runs one experiment on one model and returns the numbers that claims are read from, as plain JSON."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import tl_lenses as tll
from paper.bench import MODELS, Bench
from tl_lenses import experiments as E
from tl_lenses import lab

Numbers = dict[str, Any]
STEPS: dict[str, Callable[[Bench], Numbers]] = {}
OF: dict[str, tuple[str, ...]] = {}  # models that a step is for
# Relations of the paper's Table 2; those of which a model knows too little are left out by the experiment itself.
TABLE_2 = (
    "food_from_country", "country_currency", "country_capital_city", "substance_phase",  # asked for at the small scale
    "fruit_inside_color", "fruit_outside_color", "task_done_by_tool", "company_ceo", "person_plays_position_in_sport",
    "person_plays_pro_sport", "product_by_company", "star_constellation",
)  # fmt: skip
HOPS = (
    "food_from_country", "city_in_country", "country_capital_city", "country_currency", "country_language",
    "country_largest_city",  # so far the small scale: whether both hops are known is asked of every query
    "landmark_in_country", "product_by_company", "company_ceo",
)  # fmt: skip
# Kinds of vectors of the step "weights" that read from the residual stream.
READ = ("QK query", "QK key", "OV in", "MLP in, singular", "MLP in, columns")
# Source and target layers of the experiments on facts, at the small scale: a cell is a text of its own.
QUESTIONED = {"smollm2-135m": [1, 9, 17, 25], "gemma3-270m": [1, 6, 11, 16]}


def step(name: str, of: Sequence[str] = MODELS) -> Callable[[Callable[[Bench], Numbers]], Callable[[Bench], Numbers]]:
    """Register a function of a bench as a step of some models."""

    def register(function: Callable[[Bench], Numbers]) -> Callable[[Bench], Numbers]:
        STEPS[name], OF[name] = function, tuple(of)
        return function

    return register


def by_name(rows: list[dict[str, Any]], name: str, value: str) -> dict[str, list[float]]:
    """A value of rows, in order, by the label of one of their columns."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(str(row[name]), []).append(row[value])
    return found


def summaries(cells: Any) -> dict[str, dict[str, Any]]:
    """Oracle, best fixed and held-out cell of every condition."""
    found = {}
    for condition in cells.scores:
        summary = cells.summary(condition)
        found[condition] = {
            "oracle": summary.oracle, "best": summary.best, "held_out": summary.held_out,
            "cell": None if summary.best_cell is None else list(summary.best_cell),
        }  # fmt: skip
    return found


# --- lenses


@step("lenses")
def lenses(bench: Bench) -> Numbers:
    """A regression lens and a tuned one, of the same layers, kept in the work folder."""
    folder, seconds = bench.work / bench.scale / bench.name, {}
    n = {"regression": bench.size(12_288, 262_144, lab=16_384), "tuned": bench.size(8_192, 131_072)}
    per_step, text = bench.size(512, 4_096, lab=1_024), bench.text(n["regression"], fit=True, batch_size=4)
    start = time.perf_counter()
    regression = tll.fit_regression(bench.model, text, bench.layers)
    regression.save(folder / "regression", overwrite=True)
    seconds["regression"], start = time.perf_counter() - start, time.perf_counter()
    tuned = tll.fit_tuned(bench.model, text, n["tuned"] // per_step, per_step, layers=bench.layers, init_tokens=n["regression"])
    seconds["tuned"] = time.perf_counter() - start
    tuned.save(folder / "tuned", overwrite=True)
    return {
        "layers": bench.layers, "tokens": n, "init": "regression", "seconds": seconds, "guard": tuned.meta["guard"],
    }  # fmt: skip


# --- the Tuned Lens paper


@step("quality")
def quality(bench: Bench) -> Numbers:
    """Section 3: KL, bits per byte and bias of three lenses."""
    chunk = 128 if bench.name.startswith("gemma") else None
    report = E.quality(
        bench.model, bench.lenses("logit", "regression", "tuned"), bench.text(bench.size(1_024, 16_384, lab=2_048)),
        chunk_size=chunk,
    )  # fmt: skip
    rows = [row for row in report.rows() if row["layer"] < bench.model.cfg.n_layers]
    values = {value: by_name(rows, "lens", value) for value in ("kl", "bits_per_byte", "bias_bits")}
    return {"layers": sorted({row["layer"] for row in rows}), "tokens": report.settings["tokens"], **values}


@step("input-token")
@torch.no_grad()
def input_token(bench: Bench) -> Numbers:
    """Section 2: how often the likeliest token of a lens is the token that was read, by layer."""
    lenses, same, n = bench.lenses("logit", "tuned"), {}, 0
    for batch in bench.text(bench.size(256, 8_192, lab=1_024, gemma=128)):
        seen: dict[int, torch.Tensor] = {}
        tll.run(bench.model, batch.tokens, [tll.read(layer, seen) for layer in bench.layers], None)
        ids = batch.tokens[:, 1:].flatten()
        n += len(ids)
        for name, lens in lenses.items():
            for i, layer in enumerate(bench.layers):
                states = seen[layer][:, 1:].flatten(0, 1).split(128)
                top = torch.cat([lens[layer](part).argmax(-1) for part in states])
                same.setdefault(name, [0] * len(bench.layers))[i] += int((top == ids).sum())
    return {"layers": bench.layers, "n": n, "same": {name: [x / n for x in counts] for name, counts in same.items()}}


@step("transfer")
def transfer(bench: Bench) -> Numbers:
    """Section 3.3: every translator on every layer."""
    chunk = 128 if bench.name.startswith("gemma") else None
    report = E.transfer(
        bench.model,
        bench.lenses("tuned")["tuned"],
        bench.text(bench.size(128, 8_192, lab=512)),
        chunk_size=chunk,
    )
    gap = (torch.arange(len(report.layers))[:, None] - torch.arange(len(report.layers))).abs()
    forth, back = report.asymmetry()
    return {
        "layers": report.layers, "tokens": report.settings["tokens"], "penalty": report.penalty.tolist(),
        "spearman": report.correlation(), "chance": report.chance(), "near": float(report.penalty[gap == 1].mean()),
        "far": float(report.penalty[gap >= len(report.layers) // 2].mean()), "forth": forth, "back": back,
        "outliers": {str(layer): len(dims) for layer, dims in report.outliers().items()},
    }  # fmt: skip


@step("gradients")
def gradients(bench: Bench) -> Numbers:
    """Appendix C: do blocks go down the gradient of the loss?"""
    n = bench.size(12, 128, lab=24, gemma=8)
    report = E.gradients(bench.model, bench.text(n * 64, seq_len=64, batch_size=4), layers=None if bench.is_lab else bench.layers)
    return {
        "layers": report.layers, "n": len(report.cosine), "cosine": report.cosine.mean(0).tolist(),
        "negative": report.negative().tolist(), "below_random": report.below_random().tolist(),
    }  # fmt: skip


@step("ablations")
def ablations(bench: Bench) -> Numbers:
    """Appendix C: the loss without a block, or with its mean contribution."""
    n = bench.size(127, 2_032, lab=508)
    report = E.ablations(
        bench.model, bench.text(n + 512, batch_size=1), kinds=["mean"], orders=["delete"], heads=False, n=n,
        layers=[1, *bench.layers] if bench.scale == "small" and not bench.is_lab else None,
    )  # fmt: skip
    rise = {f"{part}, {how}": x.tolist() for (part, how), x in zip(report.ablations, report.loss, strict=True)}
    return {"blocks": report.blocks, "n": report.settings["n"], "loss": report.clean, "rise": rise}


@step("causal-basis")
def causal_basis(bench: Bench) -> Numbers:
    """Section 4.1: directions by their effect on the tuned lens, and their effect on the model."""
    n, k = bench.size(63, 1_016, lab=254, gemma=31), bench.size(6, 64, lab=12, gemma=4)
    layers = bench.few if bench.scale == "small" else bench.layers
    lens = bench.lenses("tuned")["tuned"]
    report = E.causal_basis(bench.model, lens, bench.text(n + 512, seq_len=min(n + 1, 128), batch_size=1), k=k, layers=layers, n=n)
    bits = 1 / math.log(2)
    return {
        "layers": layers, "k": k, "n": report.settings["n"], "spearman": [report.spearman(layer) for layer in layers],
        "lens": (report.energy * bits).tolist(), "model": (report.effect * bits).tolist(),
    }  # fmt: skip


@step("alignment")
def alignment(bench: Bench) -> Numbers:
    """Section 4.2: stimulus and response."""
    n, k = bench.size(63, 1_016, lab=254, gemma=31), bench.size(3, 10, lab=4, gemma=2)
    layers = bench.few if bench.scale == "small" else bench.layers
    text = bench.text(n + 512, seq_len=min(n + 1, 128), batch_size=2)
    report = E.alignment(bench.model, bench.lenses("logit", "tuned"), text, k=k, layers=layers, n=n)
    numbers = {value: dict(zip(report.lenses, report.grid[value].tolist(), strict=True)) for value in ("similarity", "shuffled")}
    return {"layers": layers, "k": k, "n": report.settings["n"], **numbers}


@step("detection")
def detection(bench: Bench) -> Numbers:
    """Section 5.2: injected prompts told by their trajectory."""
    from tl_lenses.experiments.injections import read_instructions, read_relations, tasks_of

    folder = bench.data / "tasks"
    _, instructions = read_instructions(folder)
    relations = [
        "landmark_on_continent",
        "country_capital_city",
    ]  # the same answers for all questions, and other ones for each
    n = bench.size(32, 100, lab=40)
    tasks = tasks_of(read_relations(folder), instructions, relations=relations, n=n, shots=2 if bench.scale == "small" else 3)
    if bench.scale == "small":
        tasks = [replace(task, injected={name: task.injected[name] for name in ("ignore", "harmless")}) for task in tasks]
    layers = bench.few if bench.scale == "small" else bench.layers
    report = E.detection(bench.model, bench.lenses("logit", "tuned"), tasks, layers=layers)
    return {
        "tasks": report.tasks, "n": n, "layers": layers, "methods": report.methods, "attacks": report.attacks,
        "auroc": report.auroc.tolist(), "accuracy": report.accuracy.tolist(),
    }  # fmt: skip


@step("weights")
def weights(bench: Bench) -> Numbers:
    """Appendix, Table 3: coherence of what weights write and read."""
    counts: Counter[int] = Counter()
    for ids in bench.tokens_seen(131_072):
        counts.update(ids.flatten().tolist())
    among = torch.tensor(sorted(token for token, count in counts.items() if count > 1))
    # What writes is read at the layer after its block, where only a lens of all layers has one.
    some = {"kinds": READ} if bench.scale == "small" and not bench.is_lab else {}
    report = E.weights(
        bench.model, bench.lenses("logit", "tuned"), layers=bench.few if bench.scale == "small" else bench.layers,
        among=among, directions=bench.size(2, 8, lab=4), columns=bench.size(32, 64), n_random=100, **some,
    )  # fmt: skip
    kinds = list(dict.fromkeys(reading.kind for reading in report.readings))
    return {
        "kinds": kinds, "among": len(among),
        "coherence": {lens: {kind: report.summary(lens, kind)[0] for kind in kinds} for lens in report.lenses},
        "above": {lens: {kind: report.summary(lens, kind)[3] for kind in kinds} for lens in report.lenses},
    }  # fmt: skip


@step("sampling")
def sampling(bench: Bench) -> Numbers:
    """Not in the paper: texts from a layer, judged by the model."""
    n = bench.size(4, 32, lab=8)
    prompts = torch.cat([batch.tokens for batch in bench.text(n * 16, seq_len=16)])
    layers = [*bench.few, bench.model.cfg.n_layers]
    report = E.sampling(bench.model, bench.lenses("logit", "tuned"), prompts, layers=layers, max_new_tokens=24)
    return {
        "layers": layers, "n": len(report.prompts),
        "perplexity": {name: report.perplexity(name).tolist() for name in report.texts},
        "agreement": dict(zip(report.lenses, report.agreement.double().mean((2, 3)).tolist(), strict=True)),
    }  # fmt: skip


@step("inversion")
def inversion(bench: Bench) -> Numbers:
    """Appendix: the state that would say what the model says."""
    n = bench.size(4, 24, lab=8)
    text = bench.text(bench.size(1_024, 8_192, lab=2_048), batch_size=4)
    report = E.inversion(bench.model, bench.lenses("logit", "tuned"), text, layers=bench.few, n=n, steps=bench.size(15, 60))
    means = report.grid.mean("item")
    rows = means.rows("kl", "cosine")
    return {"layers": report.layers, "n": n, "rows": rows}


@step("difficulty", of=("lab-gpt2",))
def difficulty(bench: Bench) -> Numbers:
    """Section 5.3: needs checkpoints along training, which of these models only lab-neox has."""
    model = lab.load("lab-neox")
    text = lambda split, tokens: tll.token_batches(lab.text(split), model.tokenizer, seq_len=128, batch_size=8, limit_tokens=tokens)
    tuned = tll.Lens(model, tll.fit_regression(model, text("train", 16_384)))
    steps = lab.steps("lab-neox")
    early = [(at, lambda at=at: lab.load("lab-neox", step=at)) for at in steps[:-1]]
    report = E.difficulty(
        model, {"logit": tll.Lens(model), "regression": tuned}, text("heldout", 2_048), [*early, (steps[-1], model)],
        n=bench.size(1_000, 2_000),
    )  # fmt: skip
    which = ("logit", "regression")
    return {"n": bench.size(1_000, 2_000), "spearman": {name: report.correlation("tokens", name)[0] for name in which}}


# --- the Patchscopes paper


@step("next-token")
def next_token(bench: Bench) -> Numbers:
    """Section 4.1: how early the next token can be read."""
    n = bench.size(64, 500, lab=200, gemma=48)
    text = bench.text((n // 4 + 8) * 64, seq_len=64, batch_size=4)
    lenses = bench.lenses("regression")
    report = E.next_token(bench.model, text, lenses, layers=[*bench.layers, bench.model.cfg.n_layers], n=n)
    rows = [row for row in report.rows() if row["layer"] is None or row["layer"] < bench.model.cfg.n_layers]
    return {
        "layers": bench.layers, "n": n, "precision": by_name(rows, "condition", "score"),
        "surprisal": by_name(rows, "condition", "surprisal"), "cells": summaries(report.cells),
    }  # fmt: skip


@step("attributes")
def attributes(bench: Bench) -> Numbers:
    """Section 4.2: attributes of a subject from its vector, on the authors' files."""
    layers = QUESTIONED.get(bench.name) if bench.scale == "small" else None
    n = bench.size(32, 240, lab=36)
    report = E.attributes(
        bench.model, bench.facts(*(TABLE_2[:4] if bench.scale == "small" else TABLE_2)), n=n, layers=layers, target_layers=layers, smallest=3,
        max_new_tokens=bench.size(8, 20),
    )  # fmt: skip
    relations = {}
    for relation in report.relations:
        items = report.items(relation)
        part = report.cells.subset(items)
        relations[relation] = {
            "n": len(items), "patched": list(part.by_source_layer().values()), "held_out": part.summary().held_out,
            "shuffled": list(part.by_source_layer("shuffled sources").values()),
            "probe": [] if report.probe is None else report.probe[items].mean(0).tolist(),
        }  # fmt: skip
    profile = {name: list(report.cells.by_source_layer(name).values()) for name in ("patched", "shuffled sources", "random vector")}
    return {
        "layers": report.layers, "n": len(report.facts), "profile": profile, "relations": relations,
        "probe": [] if report.probe is None else report.probe.mean(0).tolist(), "cells": summaries(report.cells),
        "left_out": report.left_out,
    }  # fmt: skip


@step("entities")
def entities(bench: Bench) -> Numbers:
    """Section 4.3: descriptions of a bare name, with the authors' prompt."""
    given = None if bench.is_lab else json.loads((Path(__file__).parent / "entities.json").read_text(encoding="utf-8"))
    layers = None if bench.is_lab else sorted({1, 2, 5, *bench.layers})
    report = E.entities(
        bench.model, given, target=None if bench.is_lab else tll.scopes.entity_description(), layers=layers,
        n=bench.size(16, 60, lab=36), max_new_tokens=bench.size(12, 50),
    )  # fmt: skip
    named = [name for name in report.names if name.startswith("Diana")]
    at = report.names.index(named[0]) if named else 0
    said = dict(zip(map(str, report.layers), report.texts[at], strict=True))
    profile = {name: list(report.cells.by_source_layer(name).values()) for name in ("patched", "shuffled sources", "mean vector")}
    return {
        "layers": report.layers, "n": len(report.names), "profile": profile, "cells": summaries(report.cells),
        "name": report.names[at], "said": said,
    }  # fmt: skip


@step("multihop")
def multihop(bench: Bench) -> Numbers:
    """Section 5: two hops by a patch."""
    layers = QUESTIONED.get(bench.name) if bench.scale == "small" else None
    try:
        report = E.multihop(
            bench.model, bench.facts(*(HOPS[:6] if bench.scale == "small" else HOPS), lre=True), layers=layers, target_layers=layers, n=bench.size(6, 46, lab=12),
            max_new_tokens=bench.size(10, 20),
        )  # fmt: skip
    except ValueError as error:
        return {"error": str(error)}
    plain = {name: float(x.mean()) for name, x in report.plain.items()}
    forms = {form: summaries(cells) for form, cells in report.forms.items()}
    return {"n": len(report.queries), "layers": report.layers, "plain": plain, "forms": forms}

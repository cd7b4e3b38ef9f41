"""The two steps that need a pair of models: a lens on a fine-tune, and a state of one model in another with another tokenizer."""

import random
import re
from collections.abc import Sequence
from typing import Any

import real_models
import torch
from fine_tune import fine_tune as train

import tl_lenses as tll
from paper.bench import TUNED, Bench, load
from paper.steps import OF, STEPS, Numbers, step, summaries
from tl_lenses import experiments as E
from tl_lenses import lab
from tl_lenses.model import prepare

__all__ = ["OF", "STEPS"]  # with the two steps of this file

TEXT = "classic-books/Jane Austen/Emma.md"
TO = "gemma3-270m"
SOURCE_LAYERS, TARGET_LAYERS = [4, 12, 20, 28], [1, 6, 11, 16]


@step("fine-tune", of=("smollm2-135m", "lab-gpt2"))
def fine_tune(bench: Bench) -> Numbers:
    """Section 3.4: the base's regression lens on a fine-tune, beside one that was fitted on it."""
    n = bench.size(2_560, 131_072, lab=8_192)
    card: dict[str, Any] = {}
    if bench.is_lab:
        tuned = lab.load("lab-gpt2-tuned")
    else:
        text = bench.data / "text" / TEXT
        card = train(real_models.folder_of(bench.name), text, bench.work / TUNED, steps=bench.size(24, 500))
        tuned = load(TUNED, bench.work)
    layers, fitted = bench.layers, []
    for model in (bench.model, tuned):
        fitted.append(tll.fit_regression(model, bench.text(n, fit=True), layers))
    report = E.fine_tune(tuned, *fitted, bench.text(bench.size(384, 8_192, lab=1_024)))
    keep = [i for i, layer in enumerate(report.layers) if layer in layers]
    return {
        "layers": layers, "n": bench.size(384, 8_192, lab=1_024), "card": card,
        "cost_kl": [float(report.cost("kl")[:, i].mean()) for i in keep], "cost": [float(report.cost()[:, i].mean()) for i in keep],
        "error_kl": [float(report.error("kl")[i]) for i in keep],
    }  # fmt: skip


@step("cross-model", of=("smollm2-135m", "lab-gpt2"))
def cross_model(bench: Bench) -> Numbers:
    """Section 4.4: SmolLM2 into Gemma, whose tokenizers differ; lab-gpt2-small into lab-gpt2."""
    return _same_tokenizer(bench) if bench.is_lab else _across(bench)


def _same_tokenizer(bench: Bench) -> Numbers:
    small = lab.load("lab-gpt2-small")
    pairs = [(a, b) for a in range(0, 7, 2) for b in range(0, 8, 2)]
    maps = tll.fit_regression(small, bench.text(8_192, fit=True), to=bench.model, pairs=pairs)
    n = bench.size(60, 200)
    report = E.cross_model(small, bench.model, maps, bench.text((n + 8) * 128), n=n)
    means = dict(zip(report.cells.pairs, report.cells.mean().tolist(), strict=True))
    first, last = (_mean([x for (_, b), x in means.items() if b == at]) for at in (0, 6))
    return {
        "pair": "lab-gpt2-small into lab-gpt2",
        "n": n,
        "cells": summaries(report.cells),
        "early": first,
        "late": last,
    }


# --- another tokenizer: states meet where tokens of both models end at the same character


@torch.no_grad()
def _across(bench: Bench) -> Numbers:
    """Affine maps from SmolLM2 to Gemma, fitted where words end in both; then the state of a prefix's last word, in the same prefix."""
    source, goal = bench.model, load(TO, bench.work)
    n, n_fit = bench.size(12, 200), bench.size(50, 2_000)
    passages = _passages(bench, "valid.txt", n_fit)
    maps = _maps(source, goal, passages)
    prefixes = [_cut(text, i) for i, text in enumerate(_passages(bench, "test.txt", n))]
    states, truth = _ends(source, prefixes, SOURCE_LAYERS)
    natural = _ends(goal, prefixes, [])[1]
    order = list(range(1, len(prefixes))) + [0]
    right: dict[str, list[list[float]]] = {"patched": [], "shuffled sources": []}
    for i, prefix in enumerate(prefixes):
        for name, at in (("patched", i), ("shuffled sources", order[i])):
            row: list[float] = []
            for layer in TARGET_LAYERS:
                x = torch.stack([_mapped(maps[a, layer], states[a][at]) for a in SOURCE_LAYERS])
                said = tll.patchscope(
                    goal, tll.Source(x), tll.Target(prefix), target_layers=[layer], keep="top_k", show_progress=False
                )  # fmt: skip
                words = [_word(goal, int(token)) for token in said.top_ids[:, 0, 0]]
                row += [float(word == truth[i]) for word in words]
            right[name].append(row)
    pairs = [(a, b) for b in TARGET_LAYERS for a in SOURCE_LAYERS]
    cells = {name: _three(torch.tensor(rows), pairs) for name, rows in right.items()}
    agreement = _mean([float(a == b) for a, b in zip(natural, truth, strict=True)])
    cells["unpatched"] = {"oracle": agreement, "best": agreement, "held_out": agreement, "cell": None}
    means = torch.tensor(right["patched"]).mean(0).view(len(TARGET_LAYERS), -1).mean(1)
    return {
        "pair": f"{bench.name} into {TO}", "n": n, "fitted_on": n_fit, "layers": SOURCE_LAYERS, "target_layers": TARGET_LAYERS,
        "cells": cells, "early": float(means[0]), "late": float(means[-1]), "by_target_layer": means.tolist(),
    }  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _passages(bench: Bench, file: str, n: int) -> list[str]:
    """Paragraphs of 60 words or more, cut to 60, drawn at random."""
    text = (bench.data / "text" / "wikitext-2" / file).read_text(encoding="utf-8")
    found = [" ".join(words[:60]) for line in text.split("\n") if len(words := line.split()) >= 60]
    return random.Random(0).sample(found, n)


def _cut(text: str, seed: int) -> str:
    """The passage up to the end of a random word, 15 words or more, that letters end."""
    words = text.split()
    ends = [i for i in range(15, len(words)) if re.fullmatch(r"[A-Za-z]+", words[i - 1]) and words[i][0].isalnum()]
    return " ".join(words[: random.Random(seed).choice(ends)])


def _word(model: Any, token: int) -> str:
    """A token as text without spaces around it, so that tokens of two vocabularies can be compared."""
    return str(model.tokenizer.decode([token])).strip()


def _ends(model: Any, prefixes: Sequence[str], layers: Sequence[int]) -> tuple[dict[int, torch.Tensor], list[str]]:
    """The last token's states by layer `[prefix, d]`, and the model's next token as text."""
    states: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    words, final = [], int(model.cfg.n_layers)
    head = tll.Lens(model)[final]
    for prefix in prefixes:
        seen: dict[int, torch.Tensor] = {}
        reads = [tll.read(layer, seen, pos=-1) for layer in layers]
        tll.run(model, prefix, [*reads, tll.read(tll.site(model, -1), seen, final, pos=-1)], None)
        words.append(_word(model, int(head(seen[final][0, -1:]).argmax())))
        for layer in layers:
            states[layer].append(seen[layer][0, -1])
    return {layer: torch.stack(x) for layer, x in states.items()}, words


def _columns(model: Any, text: str) -> dict[int, int]:
    """For every character at which a token ends, the token's column (BOS counts where the model takes one)."""
    told = model.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    first = prepare(model, text).tokens.shape[1] - len(told["input_ids"])
    return {end: first + i for i, (_, end) in enumerate(told["offset_mapping"])}


def _maps(source: Any, goal: Any, passages: Sequence[str]) -> dict[tuple[int, int], tuple[torch.Tensor, ...]]:
    """Ridge regression between states at the same ends of words: `(mean_x, mean_y, W)` for every pair of layers."""
    kept: dict[tuple[str, int], list[torch.Tensor]] = {}
    for text in passages:
        shared = sorted(set(columns := _columns(source, text)) & set(others := _columns(goal, text)))
        # A word ends where a space follows.
        shared = [end for end in shared if text[end : end + 1] in (" ", "")][1:]
        for name, model, at, layers in (
            ("source", source, columns, SOURCE_LAYERS), ("goal", goal, others, TARGET_LAYERS),
        ):  # fmt: skip
            seen: dict[int, torch.Tensor] = {}
            tll.run(model, text, [tll.read(layer, seen) for layer in layers], None)
            for layer in layers:
                kept.setdefault((name, layer), []).append(seen[layer][0, [at[end] for end in shared]])
    states = {key: torch.cat(parts).double() for key, parts in kept.items()}
    found = {}
    for a in SOURCE_LAYERS:
        x = states["source", a]
        mean = x.mean(0)
        gram = (x - mean).T @ (x - mean)
        # A passage has some 50 words: the ridge keeps a few thousand pairs from being learned by heart.
        gram += 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        for b in TARGET_LAYERS:
            y = states["goal", b]
            found[a, b] = (mean, y.mean(0), torch.linalg.solve(gram, (x - mean).T @ (y - y.mean(0))))
    return found


def _mapped(parts: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
    mean_x, mean_y, w = parts
    return ((x.double() - mean_x) @ w + mean_y).to(x.dtype)


def _three(right: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Oracle, best fixed cell and held-out cell (chosen on one half, measured on the other, both ways)."""
    halves = (right[::2], right[1::2])
    held = [float(b[:, int(a.mean(0).argmax())].mean()) for a, b in (halves, halves[::-1])]
    best = int(right.mean(0).argmax())
    return {
        "oracle": float(right.max(1).values.mean()), "best": float(right.mean(0)[best]), "held_out": _mean(held),
        "cell": list(pairs[best]),
    }  # fmt: skip

"""Questions with answers to choose from: the summed log-probability of every answer, at every layer and through every lens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.hooks import installed, residual_reads
from tl_lenses.lens import LayerLens, Lens
from tl_lenses.model import Decoder, LensModel, n_layers, prepare
from tl_lenses.progress import progress


@dataclass(frozen=True)
class Question:
    """A prompt and what may follow it.

    Attributes:
        prompt: without a space at its end.
        choices: continuations, with the space that they begin with; empty where there is nothing to choose from.
        right: index of the right one, -1 where none is.
        task: name of the task.
        group: questions of one group stay together when they are split.
        wanted: index of the choice that an injected instruction asks for, -1 where none is.
    """

    prompt: str
    choices: tuple[str, ...] = ()
    right: int = -1
    task: str = ""
    group: Any = None
    wanted: int = -1


@dataclass(frozen=True)
class Scored:
    """What a model says to questions, at layers `0..n_layers` or those that were asked for.

    Attributes:
        logprobs: by lens, `[question, layer, choice]`, nats, summed over a choice's tokens.
        last: `[question, layer, d_model]`, the residual at the prompt's last token.
    """

    logprobs: dict[str, Float[Tensor, "n layer choice"]]
    last: Float[Tensor, "n layer d_model"]


def check_lenses(model: LensModel, lenses: Mapping[str, Lens], layers: Sequence[int]) -> None:
    """Refuse lenses that read through another model, or that lack a layer.

    Raises:
        ValueError: names the lens.
    """
    for name, lens in lenses.items():
        if lens.model is not model:
            raise ValueError(f"the lens {name!r} reads through another model: make it with Lens(model, translators)")
        if missing := [layer for layer in layers if layer not in lens.layers]:
            raise ValueError(f"the lens {name!r} has no layer {missing[0]}; it has {lens.layers}: fit it there")


def layers_asked(model: LensModel, layers: Sequence[int] | None) -> list[int]:
    """Layers as `0..n_layers`; all by default.

    Raises:
        ValueError: one that is not there, or none.
    """
    depth = n_layers(model)
    if layers is None:
        return list(range(depth + 1))
    if wrong := [layer for layer in layers if not -depth - 1 <= layer <= depth]:
        raise ValueError(f"no layer {wrong[0]}: this model has layers 0..{depth}")
    if not layers:
        raise ValueError("layers is empty: name at least one, or None for all")
    return sorted({layer % (depth + 1) for layer in layers})


def continuations(model: LensModel, question: Question) -> tuple[list[int], list[list[int]]]:
    """Ids of the prompt, BOS included, and of each choice.

    Raises:
        ValueError: a choice that joins the prompt's last token, one without tokens, or more than the context holds.
    """
    prompt = prepare(model, question.prompt).tokens[0].tolist()
    found = []
    for choice in question.choices:
        whole = prepare(model, question.prompt + choice).tokens[0].tolist()
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            raise ValueError(
                f"the choice {choice!r} is not a token or more behind {question.prompt[-20:]!r}: let choices begin with a "
                "space and prompts end without one"
            )
        found.append(whole[len(prompt) :])
    return prompt, found


@torch.no_grad()
def scored(
    model: LensModel,
    lenses: Mapping[str, Lens],
    questions: Sequence[Question],
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 16,
    show_progress: bool | None = None,
) -> Scored:
    """Per layer and lens the log-probability of every choice; each prompt runs once, its choices continue its cache.

    `log p_l(choice) = sum_t log softmax(lens_l(h_l at t - 1))[choice_t]`

    Args:
        lenses: by name.
        questions: with one number of choices; 0 is allowed and gives `last` alone.
        layers: `0..n_layers` by default.
        batch_size: prompts per pass.

    Raises:
        ValueError: no questions, different numbers of choices, a lens of another model or without a layer, a choice that
            cannot be told from its prompt, or more tokens than the context holds.

    Source: Belrose et al. 2023 (Tuned Lens), section 4.3 and appendix (features of the anomaly detectors).
    """
    rows = layers_asked(model, layers)
    check_lenses(model, lenses, rows)
    if len({len(q.choices) for q in questions}) != 1:
        raise ValueError(f"questions need one number of choices, got {sorted({len(q.choices) for q in questions})}")
    n_choices = len(questions[0].choices)
    ids = [continuations(model, q) for q in questions]
    context = getattr(model.cfg, "n_ctx", None)
    longest = [max(map(len, x)) for x in ([p for p, _ in ids], [c for _, ends in ids for c in ends] or [[0]])]
    if context and sum(longest) > context:  # a batch is as long as its longest prompt and choice
        raise ValueError(
            f"{longest[0]} tokens of a prompt and {longest[1]} of a choice are more than the context of {context}: "
            "fewer examples in the prompt"
        )
    decoders = {name: [lens[row] for row in rows] for name, lens in lenses.items()}
    logprobs = {name: torch.zeros(len(questions), len(rows), n_choices) for name in lenses}
    last = torch.zeros(len(questions), len(rows), int(model.cfg.d_model))
    order = sorted(range(len(questions)), key=lambda i: len(ids[i][0]))
    for start in progress(range(0, len(order), batch_size), desc="asking", show=show_progress):
        part = order[start : start + batch_size]
        ends = [ids[i][1] for i in part]
        states, more = _states(model, [questions[i].prompt for i in part], ends, rows)
        last[part] = states.float().cpu()
        for name, maps in decoders.items() if n_choices else ():
            for at, decode in enumerate(maps):
                rest = None if more is None else more[:, :, at]
                logprobs[name][part, at] = _summed(decode, states[:, at], rest, ends)
    return Scored(logprobs, last)


def _states(
    model: LensModel, prompts: list[str], ends: list[list[list[int]]], rows: list[int]
) -> tuple[Float[Tensor, "n layer d"], Float[Tensor, "n_choice pos layer d"] | None]:
    """Residuals at the prompts' last tokens, and at all but the last token of every choice (None where all have one)."""
    batch = prepare(model, prompts)  # padded on the left: the last column is real
    longest = max((len(choice) for choices in ends for choice in choices), default=1)
    seen: dict[Any, Tensor] = {}
    decoder = Decoder(model)
    with installed(model, residual_reads(model, rows, seen)):
        decoder.start(batch)
    states = torch.stack([seen[row][:, -1] for row in rows], 1)
    if longest == 1:
        return states, None
    if not decoder.shareable():  # then the prompts run again with their choices
        decoder.use_cache, decoder.cache = False, None
    flat = [choice for choices in ends for choice in choices]
    columns = torch.zeros(len(flat), longest - 1, dtype=torch.long)
    for i, choice in enumerate(flat):  # what is behind a choice is seen by nothing that is read
        columns[i, : len(choice) - 1] = torch.tensor(choice[:-1], dtype=torch.long)
    decoder.select(torch.arange(len(ends)).repeat_interleave(len(ends[0])).to(batch.tokens.device))
    with installed(model, residual_reads(model, rows, seen)):
        decoder.feed(columns.to(batch.tokens))
    return states, torch.stack([seen[row][:, 1 - longest :] for row in rows], 2)


def _summed(
    decode: LayerLens,
    first: Float[Tensor, "n d"],
    rest: Float[Tensor, "n_choice pos d"] | None,
    ends: list[list[list[int]]],
) -> Float[Tensor, "n choice"]:
    goal = torch.tensor([[choice[0] for choice in choices] for choices in ends], device=first.device)
    total = S.log_probs(decode(first)).gather(1, goal)
    if rest is None:
        return total.float().cpu()
    flat = [choice[1:] for choices in ends for choice in choices]
    row = torch.tensor([i for i, tail in enumerate(flat) for _ in tail], device=first.device, dtype=torch.long)
    column = torch.tensor([j for tail in flat for j in range(len(tail))], device=first.device, dtype=torch.long)
    token = torch.tensor([t for tail in flat for t in tail], device=first.device, dtype=torch.long)
    found = [
        S.log_probs(decode(rest[row[p], column[p]])).gather(1, token[p, None])[:, 0]
        for p in S.chunks(len(token), int(decode.readout.model.cfg.d_vocab))
    ]
    extra = torch.zeros(len(flat), device=first.device).index_add(0, row, torch.cat(found).float())
    return (total + extra.view_as(total)).float().cpu()

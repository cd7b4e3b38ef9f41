"""Questions with answers to choose from: the summed log-probability of every answer, at every layer and through every lens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.decoding import Decoder
from tl_lenses.experiments.subject import Subject, check_finite
from tl_lenses.hooks import installed, residual_reads
from tl_lenses.lens import LayerLens, Lens
from tl_lenses.model import LensModel, prepare
from tl_lenses.progress import progress


@dataclass(frozen=True)
class Question:
    """A prompt and its possible continuations."""

    prompt: str  # without a space at its end
    # continuations, with the space that they begin with; empty where there is nothing to choose from
    choices: tuple[str, ...] = ()
    right: int = -1  # index of the right one, -1 where none is
    task: str = ""  # name of the task
    group: Any = None  # questions of one group stay together when they are split
    instructed: int = -1  # index of the choice that an injected instruction asks for, -1 where none is


@dataclass(frozen=True)
class Scored:
    """Answers of a model to questions, at layers `0..n_layers` or those that were asked for."""

    # by lens, `[question, layer, choice]`, nats, summed over a choice's tokens
    logprobs: dict[str, Float[Tensor, "n layer choice"]]
    last: Float[Tensor, "n layer d_model"]  # `[question, layer, d_model]`, the residual at the prompt's last token


def continuations(model: LensModel, question: Question) -> tuple[list[int], list[list[int]]]:
    """Ids of the prompt, BOS included, and of each choice."""
    prompt = prepare(model, question.prompt).tokens[0].tolist()
    choices = []
    for choice in question.choices:
        whole = prepare(model, question.prompt + choice).tokens[0].tolist()
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            raise ValueError(
                f"the choice {choice!r} is not a token or more after {question.prompt[-20:]!r}: let choices begin with a "
                "space and prompts end without one"
            )
        choices.append(whole[len(prompt) :])
    return prompt, choices


@torch.no_grad()
def scored(
    model: LensModel, lenses: Mapping[str, Lens], questions: Sequence[Question], *, layers: Sequence[int] | None = None,
    batch_size: int = 16, show_progress: bool | None = None,
) -> Scored:  # fmt: skip
    """Per layer and lens the log-probability of every choice; each prompt runs once, its choices continue its cache.

    `log p_l(choice) = sum_t log softmax(lens_l(h_l at t - 1))[choice_t]`

    Args:
        questions: with one number of choices; 0 is allowed and gives `last` alone.

    Source: Belrose et al. 2023 (Tuned Lens), section 4.3 and appendix (features of the anomaly detectors).
    """
    subject = Subject.of(model, lenses, layers, what="questions", every=True)
    lenses, rows = subject.lenses, subject.layers
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
    at_end = check_finite({row: seen[row][:, -1] for row in rows})
    states = torch.stack(list(at_end.values()), 1)
    if longest == 1:
        return states, None
    if not decoder.shareable():  # then the prompts run again with their choices
        decoder.use_cache, decoder.cache = False, None
    flat = [choice for choices in ends for choice in choices]
    columns = torch.zeros(len(flat), longest - 1, dtype=torch.long)
    for i, choice in enumerate(flat):  # the zeros after a shorter choice are seen by nothing that is read
        columns[i, : len(choice) - 1] = torch.tensor(choice[:-1], dtype=torch.long)
    decoder.select(torch.arange(len(ends)).repeat_interleave(len(ends[0])).to(batch.tokens.device))
    with installed(model, residual_reads(model, rows, seen)):
        decoder.feed(columns.to(batch.tokens))
    after = {row: seen[row][:, 1 - longest :] for row in rows}
    real = torch.arange(longest - 1) < torch.tensor([[len(choice) - 1] for choice in flat])
    check_finite({row: x[real.to(x.device)] for row, x in after.items()})
    return states, torch.stack(list(after.values()), 2)


def _summed(
    decode: LayerLens, first: Float[Tensor, "n d"], rest: Float[Tensor, "n_choice pos d"] | None, ends: list[list[list[int]]]
) -> Float[Tensor, "n choice"]:
    goal = torch.tensor([[choice[0] for choice in choices] for choices in ends], device=first.device)
    total = S.log_probs(decode(first)).gather(1, goal)
    if rest is None:
        return total.float().cpu()
    flat = [choice[1:] for choices in ends for choice in choices]
    row = torch.tensor([i for i, tail in enumerate(flat) for _ in tail], device=first.device, dtype=torch.long)
    column = torch.tensor([j for tail in flat for j in range(len(tail))], device=first.device, dtype=torch.long)
    token = torch.tensor([t for tail in flat for t in tail], device=first.device, dtype=torch.long)
    logprobs = [
        S.log_probs(decode(rest[row[p], column[p]])).gather(1, token[p, None])[:, 0]
        for p in S.chunks(len(token), int(decode.readout.model.cfg.d_vocab))
    ]
    extra = torch.zeros(len(flat), device=first.device).index_add(0, row, torch.cat(logprobs).float())
    return (total + extra.view_as(total)).float().cpu()

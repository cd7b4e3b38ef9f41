"""The result of a patchscope: one cell per source and pair (l, l*)."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.checks import whole_number
from tl_lenses.files import csv_text, json_text, versions
from tl_lenses.shown import Shown
from tl_lenses.token_text import normalised, token_text
from tl_lenses.tokens import encode

# A layer or site, or several at once.
Layers = int | str | tuple[int | str, ...]
Pair = tuple[Layers | None, Layers]


class TopK(NamedTuple):
    """Likeliest next tokens at the read position, best first: ids and probabilities `[source, pair, k]`, and the
    tokens as text."""

    ids: Int[Tensor, "source pair k"]
    probs: Float[Tensor, "source pair k"]
    tokens: list[list[list[str]]]


class Samples(NamedTuple):
    """Texts that were drawn, `texts[source][pair][sample]`, and their ids, -1 after the end of each."""

    texts: list[list[list[str]]]
    tokens: Int[Tensor, "source pair sample new"]


class Answers(NamedTuple):
    """What a cell's samples agree on: the most frequent answer `[source][pair]` (normalised), its share of the samples, and
    the entropy of the answers in nats."""

    mode: list[list[str]]
    frequency: Float[Tensor, "source pair"]
    entropy: Float[Tensor, "source pair"]


@dataclass(frozen=True)
class Marked:
    """A prompt as it ran: its ids, their texts, and the columns whose vectors are taken or replaced."""

    ids: list[int]
    texts: list[str]
    at: tuple[int, ...]


@dataclass(frozen=True, repr=False)
class PatchscopeResult(Shown):
    """What the target prompt says with each source vector patched in: `print` shows a table, `save` writes it.

    Attributes:
        sources: a label per source.
        pairs: `(l, l*)`: source layer (None for vectors without one) and target layer.
        top_ids, top_probs: the likeliest next tokens at the read position and their probabilities, best first.
        vocab: the text of every id in `top_ids`.
        kept_logits: the logits at the read position, or None where they were too large to keep; read them as `logits`.
        text: `text[source][pair]`, the generated continuation, of several samples the most frequent; None without generation.
        tokens: generated ids `[source, pair, new]`, -1 after the end of a text; None without generation.
        scales: the factors of a sweep of scales: source row `n * len(scales) + i` has the i-th of them. None without.
        plan: what the cells shared, or why they shared nothing.
        settings: models, target prompt, positions, mode, seed, decoding and the like.
        tokenizer: the target model's, for the text of further tokens.
        drawn: the samples of `n_samples=`; None without. Read their texts as `samples`.
        request: the call that made it, with its models: what `tll.faithfulness` asks again. None in a result made by hand.
    """

    sources: list[str]
    pairs: list[Pair]
    top_ids: Int[Tensor, "source pair k"]
    top_probs: Float[Tensor, "source pair k"]
    vocab: dict[int, str]
    kept_logits: Float[Tensor, "source pair d_vocab"] | None = None
    text: list[list[str]] | None = None
    tokens: Int[Tensor, "source pair new"] | None = None
    scales: list[float] | None = None
    plan: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any = field(default=None, compare=False)
    request: Any = field(default=None, compare=False)
    drawn: Samples | None = None

    @property
    def logits(self) -> Float[Tensor, "source pair d_vocab"]:
        """Logits at the read position.

        Raises:
            ValueError: they were too large to keep; `keep="logits"` keeps them all the same.
        """
        if self.kept_logits is None:
            raise ValueError(
                "the logits of this sweep were not kept (keep='auto' keeps up to 100 MB): use top_k, or "
                "patchscope(..., keep='logits')"
            )
        return self.kept_logits

    @property
    def source_prompts(self) -> list[Marked | None]:
        """Of every row of the source axis where its vector was taken; None for given vectors, and in a result made by hand."""
        if self.request is None:
            return [None] * len(self.sources)
        tokenizer = getattr(self.request.model, "tokenizer", None)
        made = [None if s.tokens is None else _marked(tokenizer, s.tokens, s.columns) for s in self.request.sources]
        return [prompt for prompt in made for _ in self.request.scales]

    @property
    def target_prompts(self) -> list[Marked]:
        """The different prompts that received vectors, and where; none in a result made by hand."""
        prompts = [] if self.request is None else [p for of in self.request.targets for p in of if p.soft is None]
        made = [_marked(self.tokenizer, prompt.tokens, prompt.place) for prompt in prompts]
        return [prompt for i, prompt in enumerate(made) if prompt not in made[:i]]

    def top_k(self, k: int = 5) -> TopK:
        """The k likeliest next tokens of every cell, k at least 1.

        Raises:
            ValueError, TypeError: k is not a whole number from 1 on, or more than was kept.
        """
        k = whole_number("k", k, least=1)
        if self.kept_logits is not None:
            top = self.kept_logits.float().softmax(-1).topk(min(k, self.kept_logits.shape[-1]), dim=-1)
            ids, probs = top.indices, top.values
        elif k <= self.top_ids.shape[-1]:
            ids, probs = self.top_ids[..., :k], self.top_probs[..., :k]
        else:
            raise ValueError(
                f"only the top {self.top_ids.shape[-1]} tokens were kept: ask for fewer, or patchscope(..., keep='logits')"
            )
        unknown = [i for i in ids.unique().tolist() if i not in self.vocab]
        texts = {i: f"<{i}>" for i in unknown} if self.tokenizer is None else token_text(self.tokenizer, unknown)
        names = {**self.vocab, **texts}
        return TopK(ids, probs, [[[names[int(i)] for i in cell] for cell in row] for row in ids])

    def probability(self, token: int | str) -> Float[Tensor, "source pair"]:
        """Probability of a token (an id, or a text of one token) in every cell (needs the logits)."""
        return self.logits.float().softmax(-1)[..., self._id(token)]

    def rank(self, token: int | str) -> Int[Tensor, "source pair"]:
        """Rank of a token in every cell: 1 is the likeliest, ties count strictly larger logits (needs the logits)."""
        logits = self.logits
        return (logits > logits[..., self._id(token), None]).sum(-1) + 1

    def _id(self, token: int | str) -> int:
        if not isinstance(token, str):
            return whole_number("a token id", token, least=0, most=self.logits.shape[-1] - 1)
        if self.tokenizer is None:
            raise ValueError("the target model has no tokenizer: give a token id")
        ids = encode(self.tokenizer, [token])[0]
        if len(ids) != 1:
            pieces = [self.tokenizer.decode([i]) for i in ids]
            raise ValueError(f"{token!r} is {len(ids)} tokens ({pieces}), expected one: mind the leading space")
        return ids[0]

    @property
    def samples(self) -> list[list[list[str]]]:
        """The texts that were drawn, `[source][pair][sample]`; of several targets one after the other.

        Raises:
            ValueError: none were asked for.
        """
        if self.drawn is None:
            raise ValueError("this result has one text per cell: patchscope(..., n_samples=10, do_sample=True) draws several")
        return self.drawn.texts

    def answers(self, normalise: Callable[[str], str] = normalised) -> Answers:
        """What the samples of every cell agree on.

        Args:
            normalise: texts that it makes equal are one answer; by default without case, accents, spaces and punctuation
                around.

        Raises:
            ValueError: there are no samples.

        Source: Wang et al. 2023 (Self-consistency); Kuhn et al. 2023 (Semantic entropy), with equal words for equal meaning.
        """
        counts = [[Counter(map(normalise, cell)) for cell in row] for row in self.samples]
        number = lambda of: torch.tensor([[of(cell) for cell in row] for row in counts])
        share = lambda cell: [n / cell.total() for n in cell.values()]
        return Answers(
            [[cell.most_common(1)[0][0] for cell in row] for row in counts],
            number(lambda cell: max(share(cell))),
            number(lambda cell: -sum(p * math.log(p) for p in share(cell))),
        )

    def to_frame(self) -> Any:
        """A pandas data frame, one row per source and pair: source, layer, target_layer, token, prob, text."""
        import pandas

        cells = self._cells(1)
        top = ({"token": cell["top"][0][0], "prob": cell["top"][0][1]} for cell in cells)
        columns = ["source", "layer", "target_layer", "token", "prob", "text"]
        frame = pandas.DataFrame([{**cell, **best} for cell, best in zip(cells, top, strict=True)], columns=columns)
        return frame if self.drawn is None else frame.assign(frequency=self.answers().frequency.flatten().tolist())

    def __repr__(self) -> str:
        n_new = "" if self.tokens is None else f", new_tokens={self.tokens.shape[-1]}"
        return f"PatchscopeResult(sources={len(self.sources)}, pairs={len(self.pairs)}{n_new})"

    def __rich__(self) -> Any:
        return self._views.patchscope_table(self)

    def _repr_html_(self) -> str:
        return self._views.patchscope_fragment(self)

    def save(self, path: str | Path, *, source: int | None = None, overwrite: bool = True) -> Path:
        """Write the result as the suffix says; returns the path. See `views.save_as`.

        `.json` has every cell with its top 5 tokens and text, the settings and the versions; `.csv` is `to_frame()`;
        `.html` is a page; `.svg` and `.png` are heat maps, one below the other for each source, or of a single `source`.

        Raises:
            ValueError: another suffix, a source that is not there.
            ImportError: `.png` without the extra `plot`.

        Example:
            >>> result.save("sweep.svg")      # doctest: +SKIP
        """
        about = {**self.settings, "plan": self.plan, "versions": versions()}
        drawn = range(len(self.sources)) if source is None else [source]
        picture = lambda: self._views.Panels([self._views.patchscope_heat(self, s) for s in drawn])
        writers: dict[str, Callable[[], str | bytes]] = {
            ".json": lambda: json_text({**about, "cells": self._cells(5)}) + "\n",
            ".csv": lambda: csv_text(self.to_frame()),
            ".html": lambda: self._views.patchscope_html(self),
            ".svg": lambda: picture().svg(),
            ".png": lambda: picture().png(),
        }
        return self._views.save_as(path, writers, example="sweep.json", overwrite=overwrite)

    def _cells(self, k: int) -> list[dict[str, Any]]:
        """Every cell with its k likeliest tokens and its text."""
        top = self.top_k(min(k, self.top_ids.shape[-1]))
        return [
            {
                "source": source, "layer": layer, "target_layer": target_layer,
                "top": [[token, float(prob)] for token, prob in zip(top.tokens[s][p], top.probs[s, p], strict=True)],
                "text": None if self.text is None else self.text[s][p],
                **({} if self.drawn is None else {"samples": self.drawn.texts[s][p]}),
            }
            for s, source in enumerate(self.sources) for p, (layer, target_layer) in enumerate(self.pairs)
        ]  # fmt: skip

    def figure(self, source: int = 0) -> Any:
        """A plotly heat map over (l, l*) of one source: top token and its probability (extra `plot`)."""
        return self._views.patchscope_figure(self, source)


def _marked(tokenizer: Any, tokens: Int[Tensor, "1 pos"], at: tuple[int, ...]) -> Marked:
    ids = tokens[0].tolist()
    texts = {i: str(i) for i in ids} if tokenizer is None else token_text(tokenizer, set(ids))
    return Marked(ids, [texts[i] for i in ids], at)


def mode_of(texts: list[str]) -> int:
    """The number of the first text whose answer is the most frequent."""
    answers = [normalised(text) for text in texts]
    return answers.index(Counter(answers).most_common(1)[0][0])


def top_of(logits: Float[Tensor, "*cells d_vocab"], k: int = 10) -> tuple[Tensor, Tensor]:
    """Ids and probabilities of the k likeliest tokens; of few cells at a time, so that no distribution is as large as the logits."""
    rooms = S.Rooms()
    found = [S.top_k(part, k, rooms.like("p", part)) for part in logits.split(8)]
    ids, probs = zip(*found, strict=True)
    return torch.cat(ids).cpu(), torch.cat(probs).cpu()

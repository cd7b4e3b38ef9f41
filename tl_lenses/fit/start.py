"""Where training starts: a regression on the first batches of the stream, the identity, or translators that were fitted before."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tl_lenses.fit.evidence import collect
from tl_lenses.fit.kept import Keeper, seconds_of
from tl_lenses.fit.regression import maps_of
from tl_lenses.fit.settings import Settings
from tl_lenses.fit.whiten import roots
from tl_lenses.hooks import Hook
from tl_lenses.model import LensModel, d_model
from tl_lenses.moments import Moments
from tl_lenses.text.batches import Bookmark
from tl_lenses.tokens import Batch
from tl_lenses.translators import Row, Translators, base

Stream = Iterator[tuple[Batch, Bookmark]]


@dataclass(frozen=True)
class Start:
    """The maps that training starts from."""

    # delta, biases: D `[rows, d_out, d_in]` and b `[rows, d_out]`
    delta: Tensor
    biases: Tensor
    n_tokens: int = 0  # positions that the regression was fitted on
    white: Tensor | None = None  # P of Muon's coordinates (`fit.whiten`), if it uses any
    n_read: int = 0  # tokens of the text that it read
    pass_seconds: float = 0.0  # of forward passes that the steps need not make again


def start_of(
    model: LensModel, stream: Stream, rows: list[Row], settings: Settings,
    init: Translators | None, hooks: list[Hook], show_progress: bool | None = False, *, alone: bool = True,
) -> tuple[Start, Stream]:  # fmt: skip
    """The maps to start from, and the stream, still from its beginning; `alone` says that no other process runs the model."""
    d = d_model(model)
    if init is not None:
        maps = [init[row] for row in rows]
        delta = torch.stack([a.weight - base(*a.weight.shape) for a in maps])
        return Start(delta, torch.stack([a.bias for a in maps])), stream
    if settings.init == "identity":
        return Start(torch.zeros(len(rows), d, d), torch.zeros(len(rows), d)), stream
    keeper = Keeper(model, [site for row in rows for site in row], alone and not hooks and not settings.offload)
    first, stream = first_batches(stream, settings.start_tokens(d), keeper)
    delta, biases, moments = regression_start(
        model, first, rows, hooks, settings.skip_first, offload=settings.offload, show_progress=show_progress
    )
    n_read = sum(batch.tokens.numel() for batch in first)
    white = roots(moments) if settings.whitens else None
    return Start(delta, biases, moments[0].n, white, n_read, seconds_of(first)), stream


def first_batches(
    stream: Stream, limit_tokens: int, wrap: Callable[[Batch], Batch] = lambda batch: batch
) -> tuple[list[Batch], Stream]:
    """Batches of about so many tokens, and the stream as if nothing had been taken, but that they are wrapped in it too.

    If the text is shorter, one pass of it is taken. Nothing is taken twice. A one-shot source raises later, when training asks for
    more.
    """
    kept: deque[tuple[Batch, Bookmark]] = deque()
    n_tokens, rest = 0, stream
    try:
        while n_tokens < limit_tokens:
            item = next(stream)
            if kept and item[1].epoch != kept[0][1].epoch:
                rest = chain([item], stream)
                break
            kept.append((wrap(item[0]), item[1]))
            n_tokens += item[0].tokens.numel()
    except ValueError as error:
        if not kept:
            raise
        rest = _raising(error)
    return [batch for batch, _ in kept], chain(_handed(kept), rest)


def _handed(kept: deque[tuple[Batch, Bookmark]]) -> Stream:
    while kept:
        yield kept.popleft()  # whoever takes a batch is the last to hold it


def _raising(error: ValueError) -> Iterator[Any]:
    raise error
    yield  # a generator: it raises at its first item


def regression_start(
    model: LensModel, batches: list[Batch], rows: list[Row], hooks: list[Hook], skip_first: bool, *,
    offload: bool = False, show_progress: bool | None = False,
) -> tuple[Tensor, Tensor, tuple[Moments, ...]]:  # fmt: skip
    """D and b of the regression lens, and the moments of each row's source."""
    how: dict[str, Any] = {"offload": offload, "show_progress": show_progress, "desc": "start"}
    evidence = collect(model, batches, rows, skip_first=skip_first, hooks=hooks, **how)
    maps = maps_of(model, evidence)
    return maps.delta.data, maps.biases.data, evidence.fit

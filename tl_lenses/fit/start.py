"""The regression start of a tuned lens: fitted on the first batches of the stream that training then begins with."""

from collections.abc import Iterator
from itertools import chain
from typing import Any, TypeVar

from torch import Tensor

from tl_lenses.data import Batch
from tl_lenses.fit.regression import from_moments, gather
from tl_lenses.hooks import Hook
from tl_lenses.model import LensModel, d_model
from tl_lenses.moments import Moments
from tl_lenses.translators import Row

Place = TypeVar("Place")


def first_batches(
    stream: Iterator[tuple[Batch, Place]], limit_tokens: int
) -> tuple[list[Batch], Iterator[tuple[Batch, Place]]]:
    """Batches of about so many tokens, and the stream as if nothing had been taken; only their ids are kept.

    A text that ends before that has no more: what comes behind its first pass is not taken twice, and a source that can be
    read only once raises when training asks for more.

    Args:
        stream: batches, each with its epoch, or something that has one as `.epoch`.
    """
    kept: list[tuple[Batch, Place]] = []
    n_tokens, rest = 0, stream
    try:
        while n_tokens < limit_tokens:
            item = next(stream)
            if kept and _epoch(item[1]) != _epoch(kept[0][1]):
                rest = chain([item], stream)
                break
            kept.append(item)
            n_tokens += item[0].tokens.numel()
    except ValueError as error:
        if not kept:
            raise
        rest = _raising(error)
    return [batch for batch, _ in kept], chain(kept, rest)


def _epoch(place: object) -> object:
    return getattr(place, "epoch", place)


def _raising(error: ValueError) -> Iterator[Any]:
    raise error
    yield  # a generator: it raises when it is asked


def regression_start(
    model: LensModel, batches: list[Batch], rows: list[Row], hooks: list[Hook], skip_first: bool, offload: bool = False
) -> tuple[Tensor, Tensor, Moments]:
    """D and b of the regression lens, and the moments that they are of (`n` positions)."""
    found, _ = gather(model, batches, rows, skip_first=skip_first, hooks=hooks, offload=offload, show_progress=False)
    maps = from_moments(model, found, rows)
    return maps.delta.data, maps.biases.data, found


def default_tokens(model: LensModel) -> int:
    """Where more tokens help the covariance of this width little: `max(128 d_model, 8192)` (docs/log.md)."""
    return max(128 * d_model(model), 8192)

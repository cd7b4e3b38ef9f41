"""Tokens set aside from the text, on which a fit's end is compared with its start: no layer ends worse than it began.

They are the first ones of the text and are neither trained on nor in the start's regression. Before the first step and after the last the losses
are taken on them, and each layer ends where its loss is lowest: at its start, at the end, or half-way between them, which averages noise of
the steps away. A short text misses the guard's tokens: there the start is fitted once more, with them, and the way stays as it was chosen. A corpus that is shuffled anew in each pass meets them again in the next pass.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tl_lenses.text.batches import Bookmark, StoredText, Text
from tl_lenses.tokens import Batch

SHARE = 16  # of the tokens that are trained on, one in so many
LEAST, MOST = 256, 4096  # tokens
SPARE = 8  # the text has at least so many times the guard's tokens
SHARES = (0.5, 1.0)  # of the way from the start to the end, that are compared with the start
REFIT = 10  # the start is fitted again with the guard's tokens where they are at least one in so many of its own
TOO_SHORT = f"the text has fewer than {SPARE * LEAST:,} tokens"


@dataclass(frozen=True)
class Guard:
    """What is set aside of a text."""

    batches: tuple[Batch, ...] = ()  # the guard's tokens; none if there is no guard
    # whole, rows: batches at the start of every pass that are the guard's, and rows of the one after them
    whole: int = 0
    rows: int = 0
    why_none: str = ""  # why there is no guard, for the record
    start_again: bool = False  # whether the start is fitted again at the end, with the guard's tokens

    def beside(self, n_start: int, wanted: int) -> "Guard":
        """The guard of a fit whose start read so many tokens, of those that it would have read of a longer text."""
        return replace(self, start_again=n_start < min(wanted, REFIT * self.n_tokens))

    @property
    def n_tokens(self) -> int:
        """Of all batches."""
        return sum(batch.tokens.numel() for batch in self.batches)

    def rest(self, stream: Iterator[tuple[Batch, Bookmark]]) -> Generator[tuple[Batch, Bookmark], None, None]:
        """The stream, at any bookmark, without what is set aside."""
        for batch, place in stream:
            if place.index == self.whole + 1 and self.rows:
                yield batch.take(slice(self.rows, None)), place
            elif place.index > self.whole:
                yield batch, place

    def state(self) -> dict[str, Any]:
        """JSON values and tensors, for `files.save_state`."""
        batches = [{"tokens": b.tokens, "mask": b.attention_mask} for b in self.batches]
        return {**vars(self), "batches": batches}

    @staticmethod
    def load(state: dict[str, Any], text: Text) -> "Guard":
        """The inverse of `state`; of stored states the batches are taken from the text again."""
        batches = [Batch(b["tokens"], b["mask"]) for b in state["batches"]]
        if batches and isinstance(text.batches, StoredText) and text.ids is None:
            batches = [batch.take(slice(len(b.tokens))) for batch, b in zip(text, batches, strict=False)]
        return Guard(**{**state, "batches": tuple(batches)})


def guard_of(first: list[Batch], text: Text, n_trained: int, whole_batches: bool) -> Guard:
    """What is set aside of a text, of its first batches: of `tokens_read(n_trained)` tokens, or the whole pass where it has fewer."""
    if text.one_shot:
        return Guard(why_none="the source can be read only once, and may have no tokens to spare")
    n_tokens = min(tokens_of(n_trained), sum(batch.tokens.numel() for batch in first) // SPARE)
    if n_tokens < LEAST:
        return Guard(why_none=TOO_SHORT)
    taken: list[Batch] = []
    for batch in first:
        missing = n_tokens - sum(b.tokens.numel() for b in taken)
        rows = -(-missing // batch.tokens.shape[1])
        if rows < len(batch.tokens) and not whole_batches:
            return Guard((*taken, batch.take(slice(0, rows))), len(taken), rows)
        taken.append(batch)
        if rows <= len(batch.tokens):
            break
    if len(taken) == len(first):
        return Guard(why_none="all of the text is one batch")
    return Guard(tuple(taken), len(taken))


def guard_of_rows(text: Text, n_trained: int) -> tuple[Text, Guard]:
    """Of a tensor, whose rows come in another order in each pass: the last rows, and the text without them."""
    assert text.ids is not None
    n_tokens = min(tokens_of(n_trained), text.ids.numel() // SPARE)
    if n_tokens < LEAST:
        return text, Guard(why_none=TOO_SHORT)
    rows = -(-n_tokens // text.ids.shape[1])
    return text.take(slice(None, -rows)), Guard(tuple(text.take(slice(-rows, None))))


def tokens_of(n_trained: int) -> int:
    """Tokens of a guard."""
    return min(max(n_trained // SHARE, LEAST), MOST)


def tokens_read(n_trained: int) -> int:
    """Tokens of the text that are read to know whether there are enough for a guard."""
    return SPARE * tokens_of(n_trained)

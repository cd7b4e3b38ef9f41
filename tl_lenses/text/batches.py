"""The one door for text: `token_batches` for corpora, `Text.of` for the tokens that a fit or an experiment was given."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_lenses.checks import finite_number, whole_number
from tl_lenses.text.sources import bytes_of, reader, starter
from tl_lenses.text.stored import ROWS, StoredText, is_stored, open_states
from tl_lenses.text.stream import Bookmark, TokenBatches, ahead
from tl_lenses.tokens import Batch, as_batch, bos_of


def token_batches(
    source: Any,
    tokenizer: Any,
    *,
    seq_len: int,
    batch_size: int,
    text_column: str = "text",
    prepend_bos: bool = True,
    shuffle_seed: int | None = None,
    shuffle_buffer: int = 1000,
    split: str = "train",
    limit_tokens: int | None = None,
    drop_last: bool = False,
    streaming: bool = True,
    prefetch: int = 4,
    workers: int = 0,
) -> TokenBatches:
    """Streams text as batches `[batch, seq_len]` of full rows, from the start each time it is iterated over.

    Documents, EOS between them, are cut into rows that each start with BOS; EOS and BOS only where the tokenizer has
    them. Tokens left over after the last full row are dropped. Nothing but the shuffle's buffer is held in memory, and
    a fit notes in its checkpoint where in the text it is (`Text.stream`).

    Args:
        source: an iterable of texts (or of rows with a text column); a path to a .txt, .jsonl, .json, .parquet or .csv
            file or to a directory of them; a `datasets` object, or the name of one, `"org/name"` or
            `"org/name:config"`; a function that returns an iterator of texts. A .txt file is cut into documents at
            lines with only `<|endoftext|>`, else into passages of whole paragraphs of at least 4,096 characters.
        tokenizer: a Hugging Face tokenizer, such as `model.tokenizer`.
        seq_len: tokens per row, BOS included.
        batch_size: rows per batch; the last batch may have fewer.
        text_column: where rows that are not plain strings have their text.
        prepend_bos: start rows with BOS.
        shuffle_seed: shuffles the documents, the same way each time; None keeps their order.
        shuffle_buffer: documents that the shuffle draws from; it is complete where all of them fit.
        split: the split of a source that has splits.
        limit_tokens: the rows together hold at most so many tokens.
        drop_last: leave out a last batch with fewer rows.
        streaming: read a data set by name over the network as it is needed; False downloads all of it first.
        prefetch: batches that a thread tokenises ahead of a fit; 0 for none.
        workers: processes that tokenise, in the same order; 0 leaves it to that thread, which is enough for most
            (fast) tokenizers. A script that uses them needs `if __name__ == "__main__":`.

    Raises:
        TypeError: a number that is not whole, or a source of another kind.
        ValueError: the source is missing, empty, not UTF-8, without the column, or too short for one row; a number out
            of its range.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> batches = token_batches(["abc", "d"], ByT5Tokenizer(), seq_len=2, batch_size=8)
        >>> [batch.tokens.tolist() for batch in batches], batches.bytes_per_token
        ([[[100, 101], [102, 1]]], 1.0)
    """
    seq_len = whole_number("seq_len", seq_len, least=2)  # one token to read and one to predict
    batch_size = whole_number("batch_size", batch_size, least=1)
    shuffle_buffer = whole_number("shuffle_buffer", shuffle_buffer, least=1)
    prefetch, workers = whole_number("prefetch", prefetch, least=0), whole_number("workers", workers, least=0)
    if limit_tokens is not None:
        limit_tokens = whole_number("limit_tokens", limit_tokens, least=1)
        fewest = seq_len * (batch_size if drop_last else 1)
        if limit_tokens < fewest:
            fewest_text = f"one batch of {batch_size} rows" if drop_last else "one row"
            raise ValueError(
                f"limit_tokens is {limit_tokens}: expected at least {fewest}, which is {fewest_text} of seq_len {seq_len}"
            )
    shuffle_seed = None if shuffle_seed is None else whole_number("shuffle_seed", shuffle_seed)
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "eos_token_id")):
        raise TypeError(f"expected a Hugging Face tokenizer, such as model.tokenizer, got {type(tokenizer).__name__}")
    start, name = reader(source, text_column, split, streaming)
    bos = bos_of(tokenizer, prepend_bos)
    shuffle = None if shuffle_seed is None else (shuffle_seed, shuffle_buffer)
    one_shot = isinstance(source, Iterator)
    return TokenBatches(
        start, name, one_shot, tokenizer, seq_len, batch_size, bos, shuffle, limit_tokens, drop_last,
        lambda: bytes_of(source), prefetch, workers,
    )  # fmt: skip


def as_batches(tokens: Any, batch_size: int | None = None) -> Iterable[Batch]:
    """Gives anything that holds token ids one form: an iterable of `Batch`, which starts again at each `iter()`.

    Args:
        tokens: ids `[pos]` or `[n, pos]`, a `Batch`, or a dict with `input_ids` and perhaps `attention_mask`; a list, a
            `DataLoader` or any iterable of these, each a batch of its own; or a `TokenBatches`, returned as it is. An
            iterator can be gone through once. The path of stored states (`tll.capture`) is their text, with the states.
        batch_size: rows per batch at most; None cuts a bare tensor by 8 and nothing else.

    Raises:
        TypeError: not tokens.
        ValueError: a wrong shape or mask, nothing to iterate over, an iterator used twice.

    Example:
        >>> [len(batch.tokens) for batch in as_batches(torch.zeros(5, 3, dtype=torch.long), batch_size=2)]
        [2, 2, 1]
    """
    batch_size = None if batch_size is None else whole_number("batch_size", batch_size, least=1)
    if isinstance(tokens, (str, Path)) and os.path.exists(tokens) and is_stored(tokens):
        tokens = open_states(tokens)
    if isinstance(tokens, (TokenBatches, StoredText)):
        return tokens
    if isinstance(tokens, Tensor):
        batch_size = batch_size or ROWS
    if isinstance(tokens, (str, Tensor, Batch, Mapping)) or not isinstance(tokens, Iterable):
        tokens = [as_batch(tokens, "tokens")]  # what is no batch is refused at once
    return _Batches(starter(tokens, "tokens"), batch_size, _number(tokens, batch_size))


def _number(items: Iterable[Any], batch_size: int | None) -> int | None:
    """Batches of no more than `batch_size` rows that these items make; None where the items are not counted without a pass."""
    if batch_size is None:
        return len(items) if isinstance(items, Sized) else None
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, (Tensor, Batch)) for item in items):
        return None
    ids = [item.tokens if isinstance(item, Batch) else item for item in items]
    return sum(-(-len(x) // batch_size) if x.ndim == 2 else 1 for x in ids)


@dataclass(frozen=True, eq=False)
class Text:
    """The tokens of a fit, an evaluation or an experiment as one value, whatever type the user gave.

    Attributes:
        batches: an iterable of `Batch`, from the start at each `iter()`.
        ids: `[n, pos]` where a bare tensor came: its rows can be counted, split and shuffled. Else None.
        one_shot: it can be read only once.

    Example:
        >>> text = Text.of(torch.arange(12).reshape(4, 3))
        >>> train, held_out = text.split(0.25)
        >>> [len(batch.tokens) for batch in train], [len(batch.tokens) for batch in held_out]
        ([3], [1])
    """

    batches: Iterable[Batch]
    ids: Int[Tensor, "n pos"] | None = None
    one_shot: bool = False

    @staticmethod
    def of(tokens: Any, batch_size: int | None = None) -> "Text":
        """Anything that `as_batches` takes; a `Text` is returned as it is."""
        if isinstance(tokens, Text):
            return tokens
        batches = as_batches(tokens, batch_size)
        ids = tokens if isinstance(tokens, Tensor) and tokens.ndim == 2 else None
        if isinstance(batches, StoredText) and batches.shuffles:
            ids = batches.all_ids()
        one_shot = isinstance(tokens, Iterator) or getattr(tokens, "one_shot", False)
        return Text(batches, ids, one_shot)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def to_run(self, what: str) -> "Text":
        """This text, which `what` runs a model on; refuses stored states."""
        if isinstance(self.batches, StoredText):
            raise ValueError(
                f"{what} runs the model, and {self.batches.name} holds states of a run that is over: pass the text itself. Stored states "
                "are for fit_regression, fit_tuned, fit_scope and evaluate"
            )
        return self

    @property
    def bos(self) -> str | None:
        """The text of the BOS that was put before each row; None for ids, which stay as they are."""
        corpus = self.batches
        if isinstance(corpus, StoredText):
            return corpus.about.get("bos")
        if not isinstance(corpus, TokenBatches) or corpus.bos is None:
            return None
        return corpus.tokenizer.decode([corpus.bos])

    @property
    def n_batches(self) -> int | None:
        """The number of batches of a pass, for a corpus an estimate; None where it is unknown."""
        return getattr(self.batches, "n_batches", None)

    def take(self, rows: slice | Int[Tensor, " rows"]) -> "Text":
        """Some of the rows of a text whose rows are known, with their stored states."""
        assert self.ids is not None
        return Text.of(self.batches.take(rows) if isinstance(self.batches, StoredText) else self.ids[rows])

    def split(self, share: float) -> tuple["Text", "Text"]:
        """The first rows to train on, and the last `share` of the rows, held out.

        Raises:
            ValueError: the number of rows is not known, or one part would be empty.
        """
        if self.ids is None:
            raise ValueError(
                f"a share, held_out={share!r}, needs tokens [n, seq], whose number is known: give other text, such as held_out=token_batches(...)"
            )
        share = finite_number("held_out, a share of the rows,", share)
        kept = round(len(self.ids) * (1 - share))
        if not 0 < kept < len(self.ids):
            raise ValueError(f"held_out={share!r} of {len(self.ids)} rows leaves {kept} to train on: give a share between 0 and 1")
        return self.take(slice(kept)), self.take(slice(kept, None))

    def stream(
        self, *, seed: int = 0, at: Bookmark | None = None, endless: bool = True
    ) -> Generator[tuple[Batch, Bookmark], None, None]:
        """Batches, each with a bookmark; pass the bookmark as `at=` to continue after it, in another process too.

        A corpus continues at the place in its source (`text.sources`), a tensor at its row. Of other iterables the
        batches before the bookmark are made again and dropped.

        Args:
            seed: of the order of a tensor's rows, drawn anew in each pass of an endless stream. A corpus is shuffled
                by its own seed.
            at: continue after this bookmark.
            endless: begin again at the end.

        Example:
            >>> stream = Text.of(torch.arange(6)[:, None]).stream(endless=False)
            >>> [bookmark.index for _, bookmark in stream]
            [1]
        """
        at = at or Bookmark()
        for epoch in range(at.epoch, 2**62 if endless else at.epoch + 1):
            start = at if epoch == at.epoch else Bookmark(epoch)
            if isinstance(self.batches, TokenBatches):
                yield from ahead(self.batches.marked(epoch, start), self.batches.prefetch)
                continue
            one_pass = self.batches
            if self.ids is not None and endless:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                order = torch.randperm(len(self.ids), generator=generator)
                one_pass = self.take(order.to(self.ids.device)).batches
            for index, batch in enumerate(one_pass, 1):
                if index > start.index:
                    yield batch, Bookmark(epoch, index)


@dataclass(eq=False, repr=False)
class _Batches:
    start: Callable[[], Iterator[Any]]
    batch_size: int | None
    n_batches: int | None

    def __iter__(self) -> Iterator[Batch]:
        return self._split(self.start())

    def _split(self, items: Iterator[Any]) -> Iterator[Batch]:
        index = -1
        for index, item in enumerate(items):
            batch = as_batch(item, f"item {index} of tokens")
            size = self.batch_size or len(batch.tokens)
            for at in range(0, len(batch.tokens), size):
                yield batch.take(slice(at, at + size))
        if index < 0:
            raise ValueError("tokens is empty: there was no batch in it. Pass at least one row of ids.")

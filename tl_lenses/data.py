"""Text and tokens: the one place where BOS, EOS, padding and byte counts are decided.

`token_batches` is for corpora, `tokenize` for prompts, `as_batches` and `check_tokens` for ids that already exist.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_lenses.stream import Batch, Position, TokenBatches, ahead, encode
from tl_lenses.texts import reader, starter

ROWS = 8  # rows of a bare tensor that `as_batches` puts in a batch


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
    a fit notes in its checkpoint where in the text it is (`positions`).

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
        ValueError: the source is missing, empty, not UTF-8, without the column, or too short for one row.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> batches = token_batches(["abc", "d"], ByT5Tokenizer(), seq_len=2, batch_size=8)
        >>> [batch.tokens.tolist() for batch in batches], batches.bytes_per_token
        ([[[100, 101], [102, 1]]], 1.0)
    """
    for name, value, least, why in (
        ("seq_len", seq_len, 2, "one token to read and one to predict"),
        ("batch_size", batch_size, 1, "one row"),
        ("shuffle_buffer", shuffle_buffer, 1, "one document"),
        ("prefetch", prefetch, 0, "which is none"),
        ("workers", workers, 0, "which is a thread"),
        ("limit_tokens", seq_len if limit_tokens is None else limit_tokens, seq_len, "one row of seq_len"),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; pass at least {least}, {why}.")
    start, name = reader(source, text_column, split, streaming)
    bos = _bos(tokenizer, prepend_bos)
    shuffle = None if shuffle_seed is None else (shuffle_seed, shuffle_buffer)
    one_shot = isinstance(source, Iterator)
    return TokenBatches(
        start, name, one_shot, tokenizer, seq_len, batch_size, bos, shuffle, limit_tokens, drop_last, prefetch, workers
    )


def tokenize(
    tokenizer: Any, prompts: str | Sequence[str], *, prepend_bos: bool = True, padding_side: str = "left"
) -> Batch:
    """Turns one prompt, or several padded to one length, into token ids `[batch, pos]` and a mask where there are pads.

    Args:
        tokenizer: a Hugging Face tokenizer, such as `model.tokenizer`.
        prompts: a prompt or a list of them.
        prepend_bos: start each with BOS, where the tokenizer has one and the text does not start with it already.
        padding_side: `"left"`, so that the last position is real in every row, or `"right"`.

    Raises:
        ValueError: no prompts, a prompt without tokens, an unknown side.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> batch = tokenize(ByT5Tokenizer(), ["abc", "d"])
        >>> batch.tokens.tolist(), batch.attention_mask.tolist()
        ([[100, 101, 102], [0, 0, 103]], [[1, 1, 1], [0, 0, 1]])
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side is {padding_side!r}; expected 'left' or 'right'.")
    if not texts:
        raise ValueError("prompts is an empty list; pass at least one string.")
    if wrong := [type(text).__name__ for text in texts if not isinstance(text, str)]:
        raise TypeError(f"prompts should be strings, got {wrong[0]}. Token ids need no tokenize().")
    bos, rows = _bos(tokenizer, prepend_bos), encode(tokenizer, texts)
    if bos is not None:  # compared as ids: the text may spell BOS, and some tokenizers add it whatever they are told
        rows = [ids if ids[:1] == [bos] else [bos, *ids] for ids in rows]
    if not all(rows):
        raise ValueError(f"prompt {rows.index([])} has no tokens and no BOS is put before it. Pass some text.")
    longest = max(map(len, rows))
    if all(len(ids) == longest for ids in rows):
        return Batch(torch.tensor(rows))
    # pads are masked and enter no statistic, so where the tokenizer has none any id will do
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, 0)
    pad = next(token for token in candidates if token is not None)
    tokens, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.long)
    for row, ids in enumerate(rows):
        real = slice(longest - len(ids), None) if padding_side == "left" else slice(len(ids))
        tokens[row, real], mask[row, real] = torch.tensor(ids), 1
    return Batch(tokens, mask)


def check_tokens(tokens: Any, d_vocab: int, n_ctx: int | None) -> Int[Tensor, "batch pos"]:
    """Refuses ids that the model cannot read; gives the others as int64 `[batch, pos]`, never changing a value.

    Args:
        tokens: `[pos]` or `[batch, pos]`, any integer dtype.
        d_vocab: the size of the model's vocabulary.
        n_ctx: the longest row that the model reads; None for no limit.

    Raises:
        TypeError: not a tensor of integers.
        ValueError: another number of axes, empty, too long, or an id outside the vocabulary.

    Example:
        >>> check_tokens(torch.tensor([5, 2], dtype=torch.int32), d_vocab=10, n_ctx=4)
        tensor([[5, 2]])
    """
    rows = _rows_of(tokens, "tokens")
    if n_ctx is not None and rows.shape[1] > n_ctx:
        raise ValueError(f"tokens have {rows.shape[1]} positions; the model's context is {n_ctx}. Pass shorter rows.")
    outside = (rows < 0) | (rows >= d_vocab)
    if outside.any():
        row, pos = outside.nonzero()[0].tolist()
        raise ValueError(
            f"token id {rows[row, pos].item()} at row {row}, position {pos} is not in the model's vocabulary of "
            f"{d_vocab} (ids 0..{d_vocab - 1}). Tokenise with the model's own tokenizer."
        )
    return rows


def as_batches(tokens: Any, batch_size: int | None = None) -> Iterable[Batch]:
    """Gives anything that holds token ids one form: an iterable of `Batch`, which starts again at each `iter()`.

    Args:
        tokens: ids `[pos]` or `[n, pos]`, a `Batch`, or a dict with `input_ids` and perhaps `attention_mask`; a list, a
            `DataLoader` or any iterable of these, each a batch of its own; or a `TokenBatches`, returned as it is. An
            iterator can be gone through once.
        batch_size: rows per batch at most; None cuts a bare tensor by 8 and nothing else.

    Raises:
        TypeError: not tokens.
        ValueError: a wrong shape or mask, nothing to iterate over, an iterator used twice.

    Example:
        >>> [len(batch.tokens) for batch in as_batches(torch.zeros(5, 3, dtype=torch.long), batch_size=2)]
        [2, 2, 1]
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; pass at least 1, or None.")
    if isinstance(tokens, TokenBatches):
        return tokens
    if isinstance(tokens, Tensor):
        batch_size = batch_size or ROWS
    if isinstance(tokens, (str, Tensor, Batch, Mapping)) or not isinstance(tokens, Iterable):
        tokens = [_as_batch(tokens, "tokens")]  # what is no batch is refused at once
    return _Batches(starter(tokens, "tokens"), batch_size)


def positions(
    tokens: Any, *, seed: int = 0, at: Position | None = None, endless: bool = True
) -> Generator[tuple[Batch, Position], None, None]:
    """Batches of `tokens`, each with the position behind it, from which reading goes on in another process.

    Text is read on from the place in its source (`texts`), a tensor from its row; of other iterables the batches before
    the position are made again and dropped.

    Args:
        tokens: anything that `as_batches` takes. Where the stream is endless, a tensor `[n, pos]` is shuffled in each
            pass, from `seed`; `TokenBatches` are by their own seed.
        at: go on behind this position.
        endless: begin again when the tokens are through.

    Example:
        >>> stream = positions(torch.arange(6)[:, None], endless=False)
        >>> [position.index for _, position in stream]
        [1]
    """
    batches, at = as_batches(tokens), at or Position()
    for epoch in range(at.epoch, 2**62 if endless else at.epoch + 1):
        start = at if epoch == at.epoch else Position(epoch)
        if isinstance(batches, TokenBatches):
            yield from ahead(batches.marked(epoch, start), batches.prefetch)
            continue
        one_pass = batches
        if isinstance(tokens, Tensor) and tokens.ndim == 2 and endless:
            order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
            one_pass = as_batches(tokens[order.to(tokens.device)])
        for index, batch in enumerate(one_pass, 1):
            if index > start.index:
                yield batch, Position(epoch, index)


@dataclass(eq=False, repr=False)
class _Batches:
    start: Callable[[], Iterator[Any]]
    batch_size: int | None

    def __iter__(self) -> Iterator[Batch]:
        return self._split(self.start())

    def _split(self, items: Iterator[Any]) -> Iterator[Batch]:
        index = -1
        for index, item in enumerate(items):
            tokens, mask, ratio = _as_batch(item, f"item {index} of tokens")
            size = self.batch_size or len(tokens)
            for at in range(0, len(tokens), size):
                yield Batch(tokens[at : at + size], None if mask is None else mask[at : at + size], ratio)
        if index < 0:
            raise ValueError("tokens is empty: there was no batch in it. Pass at least one row of ids.")


def _as_batch(item: Any, where: str) -> Batch:
    tokens, mask, ratio = item, None, None
    if isinstance(item, Batch):
        tokens, mask, ratio = item
    elif isinstance(item, Mapping):
        if "input_ids" not in item:
            raise ValueError(f"{where} has no 'input_ids', only {list(item)}. Give the ids that name.")
        tokens, mask = item["input_ids"], item.get("attention_mask")
    elif isinstance(item, (list, tuple)) and len(item) == 1:  # what a DataLoader over a TensorDataset yields
        tokens = item[0]
    rows = _rows_of(tokens, where)
    if mask is None:
        return Batch(rows, None, ratio)
    got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if got != tuple(tokens.shape):
        raise ValueError(f"the attention_mask of {where} should be a tensor of shape {tuple(tokens.shape)}, got {got}.")
    if ((mask != 0) & (mask != 1)).any():
        raise ValueError(f"the attention_mask of {where} should be 1 at real tokens and 0 at pads; got other values.")
    return Batch(rows, mask.reshape(rows.shape).long(), ratio)


def _rows_of(tokens: Any, where: str) -> Int[Tensor, "batch pos"]:
    if isinstance(tokens, str):
        raise TypeError(f"{where} is text, not token ids. Use tokenize(), or token_batches() for a corpus.")
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{where} should be a tensor of ids, got {type(tokens).__name__}. Use torch.tensor(...).")
    if tokens.dtype == torch.bool or tokens.is_floating_point() or tokens.is_complex():
        raise TypeError(f"{where} should be token ids of an integer dtype, got {tokens.dtype}. Convert with .long().")
    if tokens.ndim not in (1, 2):
        raise ValueError(f"{where} should have shape [pos] or [batch, pos], got {tuple(tokens.shape)}. Reshape it.")
    if not tokens.numel():
        raise ValueError(f"{where} is empty: its shape is {tuple(tokens.shape)}. Pass at least one token.")
    return tokens.reshape(-1, tokens.shape[-1]).long()


def _bos(tokenizer: Any, prepend_bos: bool) -> int | None:
    if tokenizer is None:
        raise ValueError("the tokenizer is None: text needs one. Load the model with its tokenizer, or pass token ids.")
    return tokenizer.bos_token_id if prepend_bos else None

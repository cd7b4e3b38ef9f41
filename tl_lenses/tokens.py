"""Token ids: what a batch is, and the one place where BOS, pads and masks are decided."""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Batch(NamedTuple):
    """Ids `[batch, pos]`, their mask (1 real, 0 pad; None: all real), and the bytes per token of the text so far."""

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"] | None = None
    bytes_per_token: float | None = None

    @property
    def states(self) -> Any:
        """What makes a forward pass needless: the stored states of a `text.stored.StoredBatch`, else None."""
        return None

    def take(self, rows: slice | Int[Tensor, " rows"]) -> "Batch":
        """Some of the rows."""
        mask = None if self.attention_mask is None else self.attention_mask[rows]
        return Batch(self.tokens[rows], mask, self.bytes_per_token)

    def with_ids(self, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None) -> "Batch":
        """The same rows, their ids and mask checked or on another device."""
        return Batch(tokens, attention_mask, self.bytes_per_token)


def tokenize(tokenizer: Any, prompts: str | Sequence[str], *, prepend_bos: bool = True) -> Batch:
    """Turns one prompt, or several padded on the left, into token ids `[batch, pos]` and a mask where there are pads.

    Args:
        tokenizer: a Hugging Face tokenizer, such as `model.tokenizer`.
        prepend_bos: start each with BOS, where the tokenizer has one of its own (see `special_id`) and the text does not
            start with it already.

    Raises:
        ValueError: no prompts, a prompt without tokens.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> batch = tokenize(ByT5Tokenizer(), ["abc", "d"])
        >>> batch.tokens.tolist(), batch.attention_mask.tolist()
        ([[100, 101, 102], [0, 0, 103]], [[1, 1, 1], [0, 0, 1]])
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ValueError("prompts is an empty list; pass at least one string.")
    if wrong := [type(text).__name__ for text in texts if not isinstance(text, str)]:
        raise TypeError(f"prompts should be strings, got {wrong[0]}. Token ids need no tokenize().")
    bos, rows = bos_of(tokenizer, prepend_bos), encode(tokenizer, texts)
    if bos is not None:  # compared as ids: the text may spell BOS, and some tokenizers add it whatever they are told
        rows = [ids if ids[:1] == [bos] else [bos, *ids] for ids in rows]
    return padded(tokenizer, rows)


def padded(tokenizer: Any, rows: Sequence[list[int]]) -> Batch:
    """Lists of ids as one batch, pads on the left, so that the last position is real in every row; and their mask."""
    if not all(rows):
        empty = next(i for i, ids in enumerate(rows) if not ids)
        raise ValueError(f"prompt {empty} has no tokens and no BOS is put before it. Pass some text.")
    longest = max(map(len, rows))
    if all(len(ids) == longest for ids in rows):
        return Batch(torch.tensor(rows))
    # pads are masked and enter no statistic, so where the tokenizer has none any id will do
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, 0)
    pad = next(token for token in candidates if token is not None)
    tokens, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.long)
    for row, ids in enumerate(rows):
        tokens[row, longest - len(ids) :], mask[row, longest - len(ids) :] = torch.tensor(ids), 1
    return Batch(tokens, mask)


def check_tokens(tokens: Any, d_vocab: int, n_ctx: int | None) -> Int[Tensor, "batch pos"]:
    """Refuses ids that the model cannot read; gives the others as int64 `[batch, pos]`, never changing a value.

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


def used_positions(batch: Batch, skip_first: bool) -> Bool[Tensor, "batch pos"]:
    """Real positions; without each row's first one (usually BOS, of outsized norm) where asked."""
    mask = (torch.ones_like(batch.tokens) if batch.attention_mask is None else batch.attention_mask).bool()
    return mask & (mask.cumsum(1) > 1) if skip_first else mask


def next_tokens(tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """The token that follows each position, -1 where there is none (the end, pads)."""
    following = torch.full_like(tokens, -1)
    following[:, :-1] = torch.where(mask[:, :-1] & mask[:, 1:], tokens[:, 1:], -1)
    return following


def as_batch(item: Any, where: str) -> Batch:
    tokens, mask, batch = item, None, item if isinstance(item, Batch) else None
    if batch is not None:
        tokens, mask, _ = batch
    elif isinstance(item, Mapping):
        if "input_ids" not in item:
            raise ValueError(f"{where} has no 'input_ids', only {list(item)}. Give the ids that name.")
        tokens, mask = item["input_ids"], item.get("attention_mask")
    elif isinstance(item, (list, tuple)) and len(item) == 1:  # what a DataLoader over a TensorDataset yields
        tokens = item[0]
    rows = _rows_of(tokens, where)
    mask = None if mask is None else check_mask(mask, rows, where)
    return Batch(rows, mask) if batch is None else batch.with_ids(rows, mask)


def check_mask(mask: Any, tokens: Int[Tensor, "batch pos"], where: str = "the tokens") -> Int[Tensor, "batch pos"]:
    """A mask as int64 of the tokens' shape: 1 at real tokens, 0 at pads, and something real in every row.

    >>> check_mask(torch.tensor([True, False]), torch.tensor([[5, 2]]))
    tensor([[1, 0]])
    """
    rows = mask[None] if isinstance(mask, Tensor) and mask.ndim == 1 else mask
    if not isinstance(rows, Tensor) or rows.shape != tokens.shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"the attention_mask of {where} should be a tensor of shape {tuple(tokens.shape)}, got {got}.")
    rows = rows.to(tokens.device)
    if ((rows != 0) & (rows != 1)).any():
        raise ValueError(f"the attention_mask of {where} should be 1 at real tokens and 0 at pads; got other values.")
    if not rows.bool().any(1).all():
        raise ValueError(f"the attention_mask of {where} hides every token of a row: drop that row.")
    return rows.to(tokens)


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


# What TransformerLens puts in place of a special token that a tokenizer does not have.
_STAND_INS = {
    "bos": lambda tokenizer: tokenizer.eos_token,
    "pad": lambda tokenizer: tokenizer.eos_token,
    "eos": lambda _: "<|endoftext|>",
}


def special_id(tokenizer: Any, kind: Literal["bos", "eos", "pad"]) -> int | None:
    """The id of a special token that the tokenizer has of its own, None where it has none.

    TransformerLens sets missing ones in place: BOS and PAD become EOS, EOS becomes `<|endoftext|>`. What the tokenizer was
    made with (`init_kwargs`) still knows. One that somebody else has set counts.
    """
    token_id = getattr(tokenizer, f"{kind}_token_id", None)
    made_with = getattr(tokenizer, "init_kwargs", None)
    if token_id is None or not isinstance(made_with, Mapping) or made_with.get(f"{kind}_token") is not None:
        return token_id
    token = getattr(tokenizer, f"{kind}_token")
    return None if str(token) == str(_STAND_INS[kind](tokenizer)) else token_id


def bos_of(tokenizer: Any, prepend_bos: bool) -> int | None:
    """The id that text starts with, if any."""
    if tokenizer is None:
        raise ValueError("the tokenizer is None: text needs one. Load the model with its tokenizer, or pass token ids.")
    return special_id(tokenizer, "bos") if prepend_bos else None


def bos_text(tokenizer: Any, prepend_bos: bool = True) -> str | None:
    """BOS as text, as settings record it: what is put before text. None where nothing is."""
    if tokenizer is None or (bos := bos_of(tokenizer, prepend_bos)) is None:
        return None
    return tokenizer.decode([bos])


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, `[{"role": ..., "content": ...}, ...]`."""
    return (
        isinstance(prompt, (list, tuple))
        and len(prompt) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in prompt)
    )


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, Any]], template: Mapping[str, Any] | None = None) -> list[int]:
    """Ids of a conversation by the tokenizer's template, up to where the assistant begins; BOS is the template's affair.

    `template` is what the template takes, or another `chat_template`.
    """
    if getattr(tokenizer, "chat_template", None) is None and "chat_template" not in (template or {}):
        raise ValueError(
            "a list of messages needs a tokenizer with a chat template, and this one has none: pass text, or set tokenizer.chat_template"
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **(template or {}))
    except Exception as error:  # whatever the template's own code raises
        raise ValueError(f"the tokenizer's chat template does not take these messages: {error}") from error
    added, ids = encode(tokenizer, ["", text])
    # The template writes BOS itself where the model wants one; some tokenizers add theirs whatever they are told.
    return ids[len(added) :] if added and ids[: 2 * len(added)] == 2 * added else ids


def up_to(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Ids before the first of `ends`.

    >>> up_to([5, 6, 2, 7], ends=[2, 3])
    [5, 6]
    """
    return list(takewhile(lambda i: i not in ends, ids))


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of each text and nothing else."""
    for text in texts:
        if (half := re.search("[\ud800-\udfff]", text)) is not None:
            raise ValueError(
                f"the text {text[:40]!r} has half of a surrogate pair at character {half.start()}, which no tokenizer reads: "
                "decode its bytes with errors='replace'"
            )
    # no special tokens, or BOS would come twice; not verbose, or it warns of documents longer than the context
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

"""Where a vector goes: a prompt with its placeholders, a soft prompt, or the source's own prompt in another model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_lenses.model import LensModel, d_model, device_of, name_of, prepare, tokenizer_of
from tl_lenses.patchscopes.planner import Prompt
from tl_lenses.patchscopes.sources import Vectors, ids_of
from tl_lenses.sites import At, Position, at, positions


@dataclass(frozen=True)
class Target:
    """The prompt that interprets a vector, and the position that receives it.

    Args:
        prompt: text (BOS is prepended), token ids `[pos]`, or a soft prompt: embeddings `[pos, d_model]`.
        pos: int, substring (a placeholder, which must be one token), `tll.at(...)` or slice. Several positions take the
            same vector, or one each of as many source positions.

    Example:
        >>> Target("The capital of x is", pos="x")
        Target(prompt='The capital of x is', pos='x')
    """

    prompt: str | Tensor | Sequence[int]
    pos: Position = -1


def ready_target(
    model: LensModel, target: Target, read: int | str | At, max_new_tokens: int, *, prepend_bos: bool = True
) -> Prompt:
    """A target as token ids and columns, checked before anything runs.

    Args:
        model: the target model.
        target: prompt and position.
        read: the position whose logits are read.
        max_new_tokens: how many tokens must still fit in the context.
        prepend_bos: for text.

    Raises:
        ValueError: a placeholder that is missing or of several tokens, a position that is not there, a soft prompt of
            another shape, a context that is too short.
    """
    soft = None
    prompt = ids_of(target.prompt)
    if isinstance(prompt, Tensor) and prompt.is_floating_point():
        soft = prompt[0] if prompt.ndim == 3 and len(prompt) == 1 else prompt
        if soft.ndim != 2 or soft.shape[1] != d_model(model) or not len(soft):
            raise ValueError(
                f"expected a soft prompt [pos, d_model={d_model(model)}], got {list(prompt.shape)}: embeddings of the target model"
            )
        if not bool(soft.isfinite().all()):
            raise ValueError("the soft prompt is not finite: NaN or infinity in it")
        soft = soft.to(device_of(model))
        prompt = torch.zeros(len(soft), dtype=torch.long)
    tokens = prepare(model, prompt, prepend_bos=prepend_bos).tokens
    if len(tokens) != 1:
        raise ValueError("a Target is one prompt: pass a list of Targets to combine several")
    places = target.pos if isinstance(target.pos, (list, tuple)) else [target.pos]
    if soft is not None and any(isinstance(place, (str, At)) for place in [*places, read]):
        raise ValueError("a soft prompt has no text to find a substring in: give positions as numbers")
    for place in places:
        if isinstance(place, (str, At)):
            _one_token(model, tokens, at(place) if isinstance(place, str) else place)
    _fits(model, tokens.shape[1], max_new_tokens)
    place = positions(model, tokens, target.pos)[0].tolist()
    if len(set(place)) != len(place):
        raise ValueError(f"the same target position is given twice: {place}")
    return Prompt(tokens, tuple(place), _read_column(model, tokens, read), soft)


def same_place(
    model: LensModel, to: LensModel, source: Vectors, read: int | str | At, max_new_tokens: int
) -> list[Prompt]:
    """The source's own prompt as the target, patched at the source's own position.

    In a model with another tokenizer the text is tokenised again, and a position is the token that ends at the same
    character.

    Args:
        model: the source model.
        to: the target model.
        source: vectors with the prompt that they come from.
        read: the position whose logits are read.
        max_new_tokens: how many tokens must still fit.

    Raises:
        ValueError: no token of the target ends where the source's token ends; shows both tokenisations.
    """
    assert source.tokens is not None
    tokens, columns = source.tokens, source.columns
    if to is not model and not _same_ids(model, to, tokens[0].tolist()):
        tokens, columns = _aligned(model, to, tokens, columns)
    tokens = prepare(to, tokens).tokens
    _fits(to, tokens.shape[1], max_new_tokens)
    return [Prompt(tokens, columns, _read_column(to, tokens, read))]


def _same_ids(model: LensModel, to: LensModel, ids: list[int]) -> bool:
    """Whether both tokenizers write these ids as the same text, piece by piece; models without tokenizers share ids."""
    ours, theirs = getattr(model, "tokenizer", None), getattr(to, "tokenizer", None)
    if ours is None or theirs is None or ours is theirs:
        return True
    if max(ids) >= int(to.cfg.d_vocab):
        return False
    return ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)


def _aligned(
    model: LensModel, to: LensModel, tokens: Tensor, columns: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    ours, theirs = tokenizer_of(model), tokenizer_of(to)
    ids = tokens[0].tolist()
    has_bos = ids[0] == ours.bos_token_id
    text = ours.decode(ids[has_bos:], clean_up_tokenization_spaces=False)
    other = prepare(to, text, prepend_bos=has_bos).tokens
    starts_with_bos = has_bos and other[0, 0].item() == theirs.bos_token_id
    our_ends = [-1] * has_bos + _ends(ours, ids[has_bos:])
    their_ends = [-1] * starts_with_bos + _ends(theirs, other[0].tolist()[starts_with_bos:])
    found = []
    for column in columns:
        if our_ends[column] not in their_ends:
            pieces = [[t.decode([i]) for i in row] for t, row in ((ours, ids), (theirs, other[0].tolist()))]
            raise ValueError(
                f"token {column} of the source ({pieces[0][column]!r}) ends inside a token of {name_of(to)}: the source's "
                f"tokens are {pieces[0]}, the target's {pieces[1]}. Patch a position that both have, or give a Target"
            )
        found.append(their_ends.index(our_ends[column]))
    return other, tuple(found)


def _ends(tokenizer: object, ids: list[int]) -> list[int]:
    """Where each token ends, in characters of the decoded text."""
    decode = lambda part: tokenizer.decode(part, clean_up_tokenization_spaces=False)  # type: ignore[attr-defined]
    return [len(decode(ids[: k + 1])) for k in range(len(ids))]


def _one_token(model: LensModel, tokens: Tensor, place: At) -> None:
    """Refuse a placeholder that the tokenizer splits: only its last token would be patched, and the rest stay."""
    if place.span:
        return
    covered = positions(model, tokens, at(place.text, place.occurrence, span=True))[0].tolist()
    ends = positions(model, tokens, place)[0].tolist()
    if len(covered) != len(ends):
        pieces = [tokenizer_of(model).decode([i]) for i in tokens[0, covered].tolist()]
        raise ValueError(
            f"the placeholder {place.text!r} is {len(covered)} tokens here ({pieces}): take a word of one token, or "
            f"tll.at({place.text!r}, span=True) to patch all of them"
        )


def _read_column(model: LensModel, tokens: Tensor, read: int | str | At) -> int:
    found = positions(model, tokens, read)[0].tolist()
    if len(found) != 1:
        raise ValueError(f"read={read!r} selects {len(found)} positions, expected one")
    return found[0]


def _fits(model: LensModel, n_prompt: int, n_new: int) -> None:
    context = getattr(model.cfg, "n_ctx", None)
    if context and n_prompt + n_new > context:
        raise ValueError(
            f"{n_prompt} prompt tokens and {n_new} new ones are more than the context of {context}: shorten one of them"
        )

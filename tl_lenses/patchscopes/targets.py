"""The prompt that receives a vector: text with placeholders, a soft prompt, or the source's own prompt in another model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses.checks import plain_text, whole_number
from tl_lenses.model import LensModel, d_model, device_of, name_of, prepare, tokenizer_of
from tl_lenses.patchscopes.sources import ReadySource, Tokens, ids_of, is_chat
from tl_lenses.sites import At, Position, at, positions
from tl_lenses.tokens import chat_ids, special_id


@dataclass(frozen=True)
class Marker:
    """Placeholders in the messages of a chat, see `Target.chat`.

    Attributes:
        text: of each.
        n: the first n; None for all.
        expected: the ids of the token before it, of it and of the one after it, where they are known.
    """

    text: str
    n: int | None = None
    expected: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Target:
    """The prompt that interprets a vector, and the position that receives it.

    Args:
        prompt: text (BOS is prepended), token ids `[pos]`, the output of a tokenizer or of `apply_chat_template`, a list
            of chat messages, or a soft prompt: embeddings `[pos, d_model]`.
        pos: int, substring (a placeholder, which must be one token), `tll.at(...)` or slice. Several positions take the
            same vector, or one each of as many source positions. `Target.chat` finds a marker in messages.
        template: what the chat template takes beside messages.

    Example:
        >>> Target("The capital of x is", pos="x")
        Target(prompt='The capital of x is', pos='x')
    """

    prompt: Tokens
    pos: Position | Marker = -1
    template: Mapping[str, Any] | None = field(default=None, repr=False)

    @staticmethod
    def chat(
        messages: Sequence[Mapping[str, Any]], marker: str, *, n: int | None = None, expected: tuple[int, int, int] | None = None,
        **template: Any,
    ) -> "Target":  # fmt: skip
        """A conversation in the tokenizer's chat template, up to where the assistant begins; the marker in it receives the vector.

        The marker is looked for in what the messages say, not in what the template writes around them. BOS comes from the template.

        Args:
            messages: such as `[{"role": "user", "content": "What is x?"}]`.
            marker: a text of one token; each occurrence is a position.
            n: only the first n occurrences.
            expected: the ids that must stand before, at and behind the marker, where a reader was trained with them.
            template: what the template takes, such as `enable_thinking=False`, or another `chat_template`.

        Raises:
            ValueError: no messages, or no marker in them; when it runs: a marker of several tokens, or other ids than expected.

        Example:
            >>> Target.chat([{"role": "user", "content": "What is x?"}], "x").pos
            Marker(text='x', n=None, expected=None)
        """
        if not is_chat(messages):
            raise TypeError(f"expected messages such as [{{'role': 'user', 'content': 'What is x?'}}], got {messages!r:.80}")
        n = None if n is None else whole_number("n", n, least=1)
        found = sum(str(message.get("content", "")).count(plain_text("marker", marker) or " ") for message in messages)
        if not marker or found < (n or 1):
            raise ValueError(f"the messages have the marker {marker!r} {found} times, expected {n or 'at least 1'}")
        return Target(list(messages), Marker(marker, n, expected), template)


@dataclass(frozen=True)
class Prompt:
    """A target that is ready to run."""

    tokens: Int[Tensor, "1 pos"]  # its ids; zeros for a soft prompt
    place: tuple[int, ...]  # the columns that receive vectors
    read: int  # the column whose logits are read
    soft: Float[Tensor, "pos d"] | None = None  # the embeddings of a soft prompt, put in at `hook_embed`
    shown: str | list[int] = ""  # the text, the ids or a note, for the settings of a result


def ready_target(
    model: LensModel, target: Target, read: int | str | At, max_new_tokens: int, *, prepend_bos: bool = True
) -> Prompt:
    """A target as token ids and columns, checked before anything runs."""
    soft = None
    if isinstance(target.prompt, Tensor) and target.prompt.is_floating_point():
        soft = _soft_prompt(model, target.prompt)
    ids = target.prompt if soft is None else torch.zeros(len(soft), dtype=torch.long)
    if target.template:
        ids = torch.tensor(chat_ids(tokenizer_of(model), target.prompt, target.template))  # type: ignore[arg-type]
    tokens = ids_of(model, ids, "Target", prepend_bos=prepend_bos)
    pos = _of_marker(model, tokens, target, target.pos) if isinstance(target.pos, Marker) else target.pos
    places = pos if isinstance(pos, (list, tuple)) else [pos]
    if soft is not None and any(isinstance(place, (str, At)) for place in [*places, read]):
        raise ValueError("a soft prompt has no text to find a substring in: give positions as numbers")
    for place in places:
        if isinstance(place, (str, At)):
            _one_token(model, tokens, at(place) if isinstance(place, str) else place)
    _fits(model, tokens.shape[1], max_new_tokens)
    columns = positions(model, tokens, pos)[0].tolist()
    if len(set(columns)) != len(columns):
        raise ValueError(f"the same target position is given twice: {columns}")
    if isinstance(target.pos, Marker) and target.pos.expected is not None:
        _check_neighbours(model, tokens[0].tolist(), columns, target.pos)
    shown = target.prompt if isinstance(target.prompt, str) else tokens[0].tolist()
    if soft is not None:
        shown = f"soft prompt of {len(soft)} vectors"
    return Prompt(tokens, tuple(columns), _read_column(model, tokens, read), soft, shown)


def _of_marker(model: LensModel, tokens: Tensor, target: Target, marker: Marker) -> list[At]:
    """The marker's occurrences in the messages, counted from the end of the decoded prompt: the template's own do not count."""
    decode = lambda ids: tokenizer_of(model).decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    text, places, start = decode(tokens[0].tolist()), [], 0
    every = [i for i in range(len(text)) if text.startswith(marker.text, i)]
    for message in target.prompt:  # type: ignore[union-attr]
        content = str(message.get("content", ""))  # type: ignore[union-attr]
        content = content if content in text[start:] else content.strip()  # a template may trim it
        first = text.find(content, start)
        if first < 0:
            raise ValueError(f"the chat template does not write the message {content[:60]!r} as it is, so no marker is found in it")
        start = first + len(content)
        places += [k - len(every) for k, i in enumerate(every) if first <= i <= start - len(marker.text)]
    found = places if marker.n is None else places[: marker.n]
    if not found or marker.n not in (None, len(found)):
        raise ValueError(
            f"the prompt has the marker {marker.text!r} {len(places)} times, expected {marker.n or 'at least 1'}: {text!r}"
        )
    return [at(marker.text, occurrence=k) for k in found]


def _check_neighbours(model: LensModel, ids: list[int], columns: list[int], marker: Marker) -> None:
    for column in columns:
        got = tuple(ids[max(column - 1, 0) : column + 2])
        if got != marker.expected:
            decode = tokenizer_of(model).decode
            raise ValueError(
                f"the marker {marker.text!r} should stand in the tokens {marker.expected}, and is in {got} ({[decode([i]) for i in got]}): this is not the "
                "tokenizer or chat template that the reader was trained with"
            )


def _soft_prompt(model: LensModel, prompt: Tensor) -> Float[Tensor, "pos d"]:
    soft = prompt[0] if prompt.ndim == 3 and len(prompt) == 1 else prompt
    if soft.ndim != 2 or soft.shape[1] != d_model(model) or not len(soft):
        raise ValueError(
            f"expected a soft prompt [pos, d_model={d_model(model)}], got {list(prompt.shape)}: embeddings of the target model"
        )
    if not bool(soft.isfinite().all()):
        raise ValueError("the soft prompt is not finite: NaN or infinity in it")
    return soft.to(device_of(model))


def same_place(model: LensModel, to: LensModel, source: ReadySource, read: int | str | At, max_new_tokens: int) -> Prompt:
    """The source's own prompt as the target, patched at the source's own position.

    In a model with another tokenizer the text is tokenised again, and a position is the token that ends at the same
    character; where there is none, the error shows both tokenisations.
    """
    assert source.tokens is not None
    tokens, columns = source.tokens, source.columns
    if to is not model and not _same_ids(model, to, tokens[0].tolist()):
        tokens, columns = _aligned(model, to, tokens, columns)
    tokens = prepare(to, tokens).tokens
    _fits(to, tokens.shape[1], max_new_tokens)
    return Prompt(tokens, columns, _read_column(to, tokens, read))


def _same_ids(model: LensModel, to: LensModel, ids: list[int]) -> bool:
    """Whether both tokenizers write these ids as the same text, piece by piece; models without tokenizers share ids."""
    ours, theirs = getattr(model, "tokenizer", None), getattr(to, "tokenizer", None)
    if ours is None or theirs is None or ours is theirs:
        return True
    if max(ids) >= int(to.cfg.d_vocab):
        return False
    return ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)


def _aligned(model: LensModel, to: LensModel, tokens: Tensor, columns: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    ours, theirs = tokenizer_of(model), tokenizer_of(to)
    ids = tokens[0].tolist()
    has_bos = ids[0] == special_id(ours, "bos")
    text = ours.decode(ids[has_bos:], clean_up_tokenization_spaces=False)
    other = prepare(to, text, prepend_bos=has_bos).tokens
    starts_with_bos = has_bos and other[0, 0].item() == special_id(theirs, "bos")
    our_ends = [-1] * has_bos + _ends(ours, ids[has_bos:])
    their_ends = [-1] * starts_with_bos + _ends(theirs, other[0].tolist()[starts_with_bos:])
    their_columns = []
    for column in columns:
        if our_ends[column] not in their_ends:
            pieces = [[t.decode([i]) for i in row] for t, row in ((ours, ids), (theirs, other[0].tolist()))]
            raise ValueError(
                f"token {column} of the source ({pieces[0][column]!r}) ends inside a token of {name_of(to)}: the source's "
                f"tokens are {pieces[0]}, the target's {pieces[1]}. Patch a position that both have, or give a Target"
            )
        their_columns.append(their_ends.index(our_ends[column]))
    return other, tuple(their_columns)


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
    columns = positions(model, tokens, read)[0].tolist()
    if len(columns) != 1:
        raise ValueError(f"read={read!r} selects {len(columns)} positions, expected one")
    return columns[0]


def _fits(model: LensModel, n_prompt: int, n_new: int) -> None:
    context = getattr(model.cfg, "n_ctx", None)
    if context and n_prompt + n_new > context:
        raise ValueError(
            f"{n_prompt} prompt tokens and {n_new} new ones are more than the context of {context}: shorten one of them"
        )

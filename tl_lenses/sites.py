"""Names of places: a layer or a hook name, and positions in a prompt.

Layer `l` is the residual stream after `l` blocks: 0 enters the first block, `n_layers` leaves the last one. A site is a
hook name; wherever a layer is accepted a site is too.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from tl_lenses.checks import whole_number
from tl_lenses.layers import LayerOrSite, as_layer, layer_site
from tl_lenses.model import LensModel, Prompt, check_kind, n_layers, prepare, tokenizer_of
from tl_lenses.tokens import special_id


def site(model: LensModel, layer_or_site: LayerOrSite) -> str:
    """The hook name of a layer or a site of this model.

    Raises:
        ValueError: no such layer or hook; near misses are named.

    Example:
        >>> tll.site(model, -1)          # doctest: +SKIP
        'blocks.11.hook_resid_post'
    """
    return sites(model, [layer_or_site])[layer_or_site]


def sites(model: LensModel, layers: Iterable[LayerOrSite]) -> dict[LayerOrSite, str]:
    """The hook names of several layers and sites: `site` for each, with one access to the model's hooks."""
    check_kind(model)
    depth = n_layers(model)
    names = {layer: layer if isinstance(layer, str) else layer_site(as_layer(layer), depth) for layer in layers}
    check_names(model, names.values())
    return names


# Hook names of a model that were looked up before: a bridge builds its dict of hooks anew at every access.
_KNOWN: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def check_names(model: LensModel, names: Iterable[str]) -> None:
    """Refuse hook names that the model does not have."""
    seen = _KNOWN.setdefault(model, set())
    names = [name for name in names if name not in seen]
    known = model.hook_dict if names else {}
    for name in names:
        if name in known:
            seen.add(name)
            continue
        depth = n_layers(model)
        parts = name.split(".")
        if len(parts) > 2 and parts[0] == "blocks" and parts[1].isdigit() and int(parts[1]) >= depth:
            last = "tll.site(model, -1)" if parts[2] == "hook_resid_pre" else f"layer {depth} or -1"
            hint = f"this model has blocks 0..{depth - 1}. For the final residual use {last}."
        else:
            near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "list(model.hook_dict) has the names."
        raise ValueError(f"no hook {name!r}: {hint}")


# --- positions


@dataclass(frozen=True)
class At:
    """A substring of a prompt as a position. Made by `at`."""

    text: str
    occurrence: str | int = "only"
    span: bool = False


def at(text: str, occurrence: str | int = "only", span: bool = False) -> At:
    """The last token that covers `text`; which one where it occurs several times; or, with `span`, all its tokens.

    Args:
        text: the substring, matched on the decoded prompt.
        occurrence: "only" (several matches are an error), "first", "last", "all", or a number counted from 0.
        span: every token that covers the substring rather than its last one.

    >>> at("Wales", occurrence="last")
    At(text='Wales', occurrence='last', span=False)
    """
    if not isinstance(text, str) or not text:
        raise ValueError(f"expected a non-empty substring, got {text!r}")
    if isinstance(occurrence, str):
        if occurrence not in ("only", "first", "last", "all"):
            raise ValueError(f"occurrence must be 'only', 'first', 'last', 'all' or a number, got {occurrence!r}")
        return At(text, occurrence, span)
    return At(text, whole_number("occurrence", occurrence), span)


Position = int | str | At | slice | list | tuple | Tensor | None


def positions(
    model: LensModel,
    tokens: Prompt,
    pos: Position,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    *,
    prepend_bos: bool = True,
) -> Int[Tensor, "batch k"]:
    """Positions as columns of the tensor that will run, one row per prompt.

    Ints and slices count real tokens: pads never, BOS is 0, -1 is the last one. Substrings (and `at(...)`) are found in the
    decoded prompt and mean the last token that covers them. A list is several of those; a LongTensor `[batch]` or
    `[batch, k]` gives each row its own ints.

    Raises:
        ValueError: a position or substring that is not there (the tokens are shown), several matches, rows of different
            length.
    """
    batch = prepare(model, tokens, attention_mask, prepend_bos=prepend_bos)
    rows, width = batch.tokens.shape
    each = [row.tolist() for row in per_row(pos, rows)] if isinstance(pos, Tensor) else [pos] * rows
    out = []
    for row in range(rows):
        mask = batch.attention_mask
        real_columns = torch.arange(width) if mask is None else mask[row].cpu().nonzero()[:, 0]
        indices = _row_positions(model, batch.tokens[row].cpu()[real_columns].tolist(), each[row])
        out.append(real_columns[torch.tensor(indices, dtype=torch.long)])
    lengths = {len(o) for o in out}
    if len(lengths) > 1:
        raise ValueError(
            f"position {pos!r} selects a different number of tokens per prompt ({sorted(lengths)}): give each prompt its own call"
        )
    return torch.stack(out).to(batch.tokens.device)


def per_row(pos: Tensor, rows: int, where: str = "") -> Int[Tensor, "rows k"]:
    """A tensor of positions, `[rows]` or `[rows, k]`, as `[rows, k]`."""
    if pos.is_floating_point() or pos.dtype == torch.bool:
        raise TypeError(f"positions must be integers, got a {pos.dtype} tensor")
    index = pos[:, None] if pos.ndim == 1 else pos
    if index.ndim != 2 or index.shape[0] != rows:
        raise ValueError(
            f"positions of shape {list(pos.shape)} do not fit a batch of {rows}{where}: expected [{rows}] or [{rows}, k]"
        )
    return index


def _row_positions(model: LensModel, ids: list[int], pos: Any) -> list[int]:
    """Indices into one row's real tokens."""
    n = len(ids)
    if pos is None:
        return list(range(n))
    if isinstance(pos, slice):
        selected = list(range(n))[pos]
        if not selected:
            raise ValueError(f"{pos} selects none of the {n} tokens")
        return selected
    if isinstance(pos, (list, tuple)):
        if not pos:
            raise ValueError("an empty list of positions selects nothing")
        return [i for p in pos for i in _row_positions(model, ids, p)]
    if isinstance(pos, str):
        pos = at(pos)
    if isinstance(pos, At):
        return _find(tokenizer_of(model), ids, pos)
    try:
        pos = whole_number("pos", pos)  # numpy's integers too
    except TypeError:
        raise TypeError(f"expected a position (int, substring, at(...), slice, list or LongTensor), got {pos!r}") from None
    if not -n <= pos < n:
        raise ValueError(f"position {pos} is not there: the prompt has {n} tokens, so -{n}..{n - 1}{_shown(model, ids)}")
    return [pos % n]


def _shown(model: LensModel, ids: list[int]) -> str:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return ""
    pieces = [tokenizer.decode([i]) for i in ids[:40]]
    return f"; its tokens are {pieces}{' ...' if len(ids) > 40 else ''}"


def _find(tokenizer: Any, ids: list[int], place: At) -> list[int]:
    """Tokens that cover a substring, by character offsets of decoded prefixes (works for any tokenizer, on ids alone)."""
    decode = lambda part: tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    text = decode(ids)
    starts = [i for i in range(len(text)) if text.startswith(place.text, i)]
    pieces = [decode([i]) for i in ids]
    if ids[0] == special_id(tokenizer, "bos") and place.text not in (pieces[0], text):
        # A search for "x" does not mean the x of <|endoftext|>.
        starts = [i for i in starts if i >= len(pieces[0])]
    if not starts:
        raise ValueError(f"{place.text!r} is not in the prompt; its tokens are {pieces}")
    if place.occurrence == "only":
        if len(starts) > 1:
            places = [text[max(0, s - 12) : s + len(place.text) + 12] for s in starts]
            raise ValueError(
                f"{place.text!r} occurs {len(starts)} times ({places}): say which with tll.at({place.text!r}, occurrence='last') or a number"
            )
        chosen = starts
    elif place.occurrence == "all":
        chosen = starts
    else:
        index = {"first": 0, "last": -1}.get(place.occurrence, place.occurrence)  # type: ignore[arg-type]
        if not -len(starts) <= index < len(starts):
            raise ValueError(f"{place.text!r} occurs {len(starts)} times, so there is no occurrence {index}")
        chosen = [starts[index]]
    # A prefix can end inside a multi-byte character, which decodes to replacement marks: count only the common characters.
    ends = [_common_prefix(decode(ids[: k + 1]), text) for k in range(len(ids))]
    covering: list[int] = []
    for start in chosen:
        last = next(k for k, e in enumerate(ends) if e >= start + len(place.text))
        first = next(k for k, e in enumerate(ends) if e > start) if place.span else last
        covering += [k for k in range(first, last + 1) if k not in covering]
    return covering


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

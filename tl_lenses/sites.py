"""Names of places: a layer or a hook name, and positions in a prompt.

Layer `l` is the residual stream after `l` blocks: 0 enters the first block, `n_layers` leaves the last one. A site is a
hook name; wherever a layer is accepted a site is too.
"""

import difflib
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from tl_lenses.model import LensModel, n_layers, prepare, tokenizer_of

LayerOrSite = int | str


def layer_site(layer: int, n_layers: int) -> str:
    """Hook name of a residual layer, `0 <= layer <= n_layers`; negative layers count from `n_layers` (-1 is the
    final one).

    >>> layer_site(3, 12), layer_site(12, 12), layer_site(-1, 12)
    ('blocks.3.hook_resid_pre', 'blocks.11.hook_resid_post', 'blocks.11.hook_resid_post')
    """
    resolved = resolve_layer(layer, n_layers)
    return f"blocks.{resolved}.hook_resid_pre" if resolved < n_layers else f"blocks.{n_layers - 1}.hook_resid_post"


def resolve_layer(layer: int, n_layers: int) -> int:
    """A layer as `0..n_layers`; negative ones count from `n_layers`.

    Raises:
        ValueError: out of range.
    """
    resolved = layer + n_layers + 1 if layer < 0 else layer
    if not 0 <= resolved <= n_layers:
        raise ValueError(
            f"no layer {layer}: this model has layers 0..{n_layers} (0 enters the first block, {n_layers} or -1 is the final residual)"
        )
    return resolved


def site_layer(name: str, n_layers: int) -> int | None:
    """The residual layer that a hook name reads, or None: `hook_resid_post` of block i is layer i + 1."""
    parts = name.split(".")
    if len(parts) == 3 and parts[0] == "blocks" and parts[1].isdigit():
        if parts[2] in ("hook_resid_pre", "hook_in"):
            return int(parts[1])
        if parts[2] in ("hook_resid_post", "hook_out"):
            return int(parts[1]) + 1
    return None


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
    """The hook names of several layers and sites: `site` for each, with one look at the model's hooks."""
    depth = n_layers(model)
    found: dict[LayerOrSite, str] = {}
    for one in layers:
        if isinstance(one, bool) or not isinstance(one, (int, str)):
            raise TypeError(f"expected a layer (int) or a hook name (str), got {one!r}")
        found[one] = layer_site(one, depth) if isinstance(one, int) else one
    check_names(model, found.values())
    return found


# Names that a model was seen to have: a bridge builds its dict of hooks anew at every look.
_KNOWN: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def check_names(model: LensModel, names: Iterable[str]) -> None:
    """Refuse hook names that the model does not have.

    Raises:
        ValueError: with near misses, or the blocks that there are.
    """
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
            hint = f"this model has blocks 0..{depth - 1}. For the final residual use layer {depth} or -1."
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
    if not text:
        raise ValueError("expected a non-empty substring")
    if not (isinstance(occurrence, int) or occurrence in ("only", "first", "last", "all")):
        raise ValueError(f"occurrence must be 'only', 'first', 'last', 'all' or a number, got {occurrence!r}")
    return At(text, occurrence, span)


Position = int | str | At | slice | list | tuple | Tensor | None


def positions(
    model: LensModel,
    tokens: str | list[str] | Int[Tensor, "batch pos"] | Int[Tensor, " pos"],
    pos: Position,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    *,
    prepend_bos: bool = True,
) -> Int[Tensor, "batch k"]:
    """Positions as columns of the tensor that will run, one row per prompt.

    Ints and slices count real tokens: pads never, BOS is 0, -1 is the last one. Substrings (and `at(...)`) are found
    in the
    decoded prompt and mean the last token that covers them. A list is several of those; a LongTensor `[batch]` or
    `[batch, k]` gives
    each row its own ints.

    Raises:
        ValueError: a position or substring that is not there (the tokens are shown), several matches, rows of
        different length.
    """
    batch = prepare(model, tokens, attention_mask, prepend_bos=prepend_bos)
    rows, width = batch.tokens.shape
    if isinstance(pos, Tensor):
        if pos.is_floating_point() or pos.dtype == torch.bool:
            raise TypeError(f"positions must be integers, got a {pos.dtype} tensor")
        per_row = pos[:, None] if pos.ndim == 1 else pos
        if per_row.ndim != 2 or per_row.shape[0] != rows:
            raise ValueError(
                f"positions of shape {list(pos.shape)} do not fit {rows} prompts: expected [{rows}] or [{rows}, k]"
            )
        wanted: list[Any] = [row.tolist() for row in per_row]
    else:
        wanted = [pos] * rows
    out = []
    for row in range(rows):
        real = torch.arange(width) if batch.attention_mask is None else batch.attention_mask[row].cpu().nonzero()[:, 0]
        indices = _row_positions(model, batch.tokens[row].cpu()[real].tolist(), wanted[row])
        out.append(real[torch.tensor(indices, dtype=torch.long)])
    lengths = {len(o) for o in out}
    if len(lengths) > 1:
        raise ValueError(
            f"position {pos!r} selects a different number of tokens per prompt ({sorted(lengths)}): give each prompt its own call"
        )
    return torch.stack(out).to(batch.tokens.device)


def _row_positions(model: LensModel, ids: list[int], pos: Any) -> list[int]:
    """Indices into one row's real tokens."""
    n = len(ids)
    if pos is None:
        return list(range(n))
    if isinstance(pos, slice):
        found = list(range(n))[pos]
        if not found:
            raise ValueError(f"{pos} selects none of the {n} tokens")
        return found
    if isinstance(pos, (list, tuple)):
        if not pos:
            raise ValueError("an empty list of positions selects nothing")
        return [i for p in pos for i in _row_positions(model, ids, p)]
    if isinstance(pos, str):
        pos = at(pos)
    if isinstance(pos, At):
        return _find(tokenizer_of(model), ids, pos)
    if not isinstance(pos, bool) and hasattr(pos, "__index__"):
        pos = operator.index(pos)  # numpy's integers too
    if isinstance(pos, bool) or not isinstance(pos, int):
        raise TypeError(f"expected a position (int, substring, at(...), slice, list or LongTensor), got {pos!r}")
    if not -n <= pos < n:
        raise ValueError(
            f"position {pos} is not there: the prompt has {n} tokens, so -{n}..{n - 1}{_shown(model, ids)}"
        )
    return [pos % n]


def _shown(model: LensModel, ids: list[int]) -> str:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return ""
    pieces = [tokenizer.decode([i]) for i in ids[:40]]
    return f"; its tokens are {pieces}{' ...' if len(ids) > 40 else ''}"


def _find(tokenizer: Any, ids: list[int], wanted: At) -> list[int]:
    """Tokens that cover a substring, by character offsets of decoded prefixes (works for any tokenizer, on ids
    alone)."""
    decode = lambda part: tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    text = decode(ids)
    starts = [i for i in range(len(text)) if text.startswith(wanted.text, i)]
    pieces = [decode([i]) for i in ids]
    if ids[0] == tokenizer.bos_token_id and wanted.text not in (pieces[0], text):
        # Nobody means the x of <|endoftext|>.
        starts = [i for i in starts if i >= len(pieces[0])]
    if not starts:
        raise ValueError(f"{wanted.text!r} is not in the prompt; its tokens are {pieces}")
    if wanted.occurrence == "only":
        if len(starts) > 1:
            places = [text[max(0, s - 12) : s + len(wanted.text) + 12] for s in starts]
            raise ValueError(
                f"{wanted.text!r} occurs {len(starts)} times ({places}): say which with tll.at({wanted.text!r}, occurrence='last') or a number"
            )
        chosen = starts
    elif wanted.occurrence == "all":
        chosen = starts
    else:
        index = {"first": 0, "last": -1}.get(wanted.occurrence, wanted.occurrence)  # type: ignore[arg-type]
        if not -len(starts) <= index < len(starts):
            raise ValueError(f"{wanted.text!r} occurs {len(starts)} times, so there is no occurrence {index}")
        chosen = [starts[index]]
    # A prefix can end inside a multi-byte character, which decodes to replacement marks: count only what agrees.
    ends = [_common_prefix(decode(ids[: k + 1]), text) for k in range(len(ids))]
    found: list[int] = []
    for start in chosen:
        last = next(k for k, e in enumerate(ends) if e >= start + len(wanted.text))
        first = next(k for k, e in enumerate(ends) if e > start) if wanted.span else last
        found += [k for k in range(first, last + 1) if k not in found]
    return found


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

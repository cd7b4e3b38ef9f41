"""What every fitter needs: rows, the activations of a batch, and a record of where the maps come from."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import einops
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_lenses.data import Batch
from tl_lenses.evaluation import used_positions
from tl_lenses.fingerprint import basis_of, fingerprint
from tl_lenses.hooks import Hook, read, run
from tl_lenses.model import LensModel, d_model, dtype_of, n_layers, name_of, prepare
from tl_lenses.sites import LayerOrSite, layer_site, site, site_layer
from tl_lenses.translators import Row


class NotFinite(ValueError):
    """NaN or infinity where numbers are averaged or trained on."""


def rows_for(model: LensModel, layers: Iterable[LayerOrSite] | None, to: LayerOrSite | None = None) -> list[Row]:
    """`(source, target)` hook names: layers `0..n_layers-1` to the final residual unless asked.

    Raises:
        ValueError: unknown layer or site, one twice, or the target among the sources (it is the identity and never
        stored).
    """
    depth = n_layers(model)
    target = place(model, depth if to is None else to)
    sources = [place(model, layer) for layer in (range(depth) if layers is None else layers)]
    if not sources:
        raise ValueError("an empty list of layers has nothing to fit")
    for source in sources:
        if sources.count(source) > 1:
            raise ValueError(f"{source!r} is given twice")
        if source == target:
            raise ValueError(f"{source!r} is the target of the fit: its map is the identity and is not stored")
    return [(source, target) for source in sources]


def row_groups(rows: list[Row], at_once: int | None, tokens: Any) -> list[list[Row]]:
    """Rows in groups of so many sources, each group a pass over the same text.

    Raises:
        ValueError: less than one at a time, or a text that can be read only once.
    """
    if at_once is None:
        return [rows]
    if at_once < 1:
        raise ValueError(f"layers_at_once is {at_once}; pass at least 1, or None for all")
    sources = list(dict.fromkeys(source for source, _ in rows))
    parts = [set(sources[i : i + at_once]) for i in range(0, len(sources), at_once)]
    if len(parts) > 1 and (isinstance(tokens, Iterator) or getattr(tokens, "one_shot", False)):
        raise ValueError(
            f"{len(parts)} groups of layers are {len(parts)} passes over the text, and this source can be read only "
            "once: pass a function that returns an iterator, or leave out layers_at_once"
        )
    return [[row for row in rows if row[0] in part] for part in parts]


def place(model: LensModel, layer_or_site: LayerOrSite) -> str:
    """One name per place: a residual layer under its layer's name, `hook_resid_post` of block i as layer i + 1.

    Raises:
        ValueError: no such layer or hook.
    """
    name = site(model, layer_or_site)
    layer = site_layer(name, n_layers(model))
    return name if layer is None else layer_site(layer, n_layers(model))


def rows_of_pairs(
    model: LensModel,
    to: LensModel | None = None,
    pairs: Iterable[tuple[LayerOrSite, LayerOrSite]] | None = None,
    layers: Iterable[LayerOrSite] | None = None,
) -> list[Row]:
    """`(source, target)` hook names of pairs `(l, l*)`; between models each l to the l* at the same depth unless asked.

    `l* = round(l L* / L)`, halves up, for l in 0..L: the first state to the first, the final one to the final one.

    Raises:
        ValueError: no pair, one twice, one out of range, a place to itself, a site without a depth where l* is to be
            found.
    """
    depth, target = n_layers(model), model if to is None else to
    goal = n_layers(target)
    if pairs is None:
        wanted: list[Any] = []
        for layer in range(depth + 1) if layers is None else layers:
            at = site_layer(place(model, layer), depth)
            if at is None:
                raise ValueError(f"{layer!r} is not a layer, so it has no relative depth: give pairs=[({layer!r}, l*)]")
            wanted.append((layer, (2 * at * goal + depth) // (2 * depth)))
    elif layers is not None:
        raise ValueError("give either layers or pairs, not both: pairs say the layers")
    else:
        wanted = list(pairs)
    if not wanted:
        raise ValueError("an empty list of pairs has nothing to fit: give at least one (l, l*)")
    rows: dict[Row, Any] = {}
    for pair in wanted:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise ValueError(f"expected pairs (source layer, target layer), got {pair!r}: give pairs=[(l, l*), ...]")
        found = []
        for side, one, key in (("source", model, pair[0]), ("target", target, pair[1])):
            try:
                found.append(place(one, key))
            except ValueError as error:
                raise ValueError(f"pair {tuple(pair)}, {side} model {name_of(one)!r}: {error}") from None
        row = (found[0], found[1])
        if row in rows:
            same = "is given twice" if tuple(pair) == tuple(rows[row]) else f"and {tuple(rows[row])} are the same"
            raise ValueError(f"pair {tuple(pair)} {same}: leave one of them out")
        if to is None and row[0] == row[1]:
            raise ValueError(
                f"pair {tuple(pair)} maps {row[0]!r} to itself: that is the identity and not stored; leave it out"
            )
        rows[row] = pair
    return list(rows)


def flatten_heads(x: Float[Tensor, "batch pos *rest"]) -> Float[Tensor, "batch pos d"]:
    """`[batch, pos, head, d_head]` as `[batch, pos, head * d_head]`; residuals as they are."""
    return einops.rearrange(x, "batch pos ... -> batch pos (...)")


def activations(
    model: LensModel, batch: Batch, rows: Sequence[Row], hooks: Sequence[Hook], skip_first: bool
) -> tuple[Float[Tensor, "batch logits_pos d_vocab"], dict[str, Tensor], Bool[Tensor, "batch pos"], Batch]:
    """One forward pass: logits (of one position inside `Readout.without_logits`), `{site: [batch, pos, d]}`, positions to use, and the batch as it ran.

    Raises:
        ValueError: activations that are not finite (the site is named).
    """
    return states(model, batch, [name for row in rows for name in row], hooks, skip_first)


def states(
    model: LensModel, batch: Batch, names: Iterable[str], hooks: Sequence[Hook], skip_first: bool
) -> tuple[Float[Tensor, "batch logits_pos d_vocab"], dict[str, Tensor], Bool[Tensor, "batch pos"], Batch]:
    """`activations` of named sites."""
    batch = prepare(model, batch.tokens, batch.attention_mask)
    seen: dict[str, Tensor] = {}
    names = list(dict.fromkeys(names))
    # Without grad but not in inference mode: what is kept enters the fitter's own graph.
    with torch.no_grad():
        logits = run(
            model,
            batch.tokens,
            [*hooks, *[read(name, seen, fn=flatten_heads) for name in names]],
            attention_mask=batch.attention_mask,
        )
    used = used_positions(batch, skip_first)
    for name, x in seen.items():
        finite = x.isfinite().all(-1) | ~used.to(x.device)
        if not finite.all():
            row = int((~finite).any(1).nonzero()[0])
            raise NotFinite(
                f"the activation at {name!r} has values that are not finite: {name_of(model)!r} overflows there (try float32 or bfloat16), in the text {shown(model, batch.tokens[row])}"
            )
    return logits, seen, used, batch


def shown(model: LensModel, tokens: Int[Tensor, " pos"], length: int = 160) -> str:
    """The text of a row for a message, cut; its ids where the model has no tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    text = repr(tokens.tolist() if tokenizer is None else tokenizer.decode(tokens.tolist()))
    return text if len(text) <= length else f"{text[: length - 4]}...{text[-1]}"


def record(model: LensModel, fitter: str, tokens_seen: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What a file says about its maps. Basis and fingerprint are those of the model as it is now."""
    return {
        "fitter": fitter,
        **identity_of(model),
        "tokens_seen": tokens_seen,
        "settings": settings,
        "final_site": layer_site(n_layers(model), n_layers(model)),
    }


def identity_of(model: LensModel) -> dict[str, Any]:
    """What a file says about a model, and `fingerprint.check_pair` compares."""
    return {
        "model": name_of(model),
        "d_model": d_model(model),
        "model_dtype": str(dtype_of(model)).removeprefix("torch."),
        "basis": basis_of(model),
        "fingerprint": fingerprint(model),
    }

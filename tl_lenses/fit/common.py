"""Shared by the fitters: rows, the activations of a batch, and a record of where the maps come from."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_lenses.checks import several, whole_number
from tl_lenses.decode import Output, passed
from tl_lenses.hooks import Hook
from tl_lenses.identity import identity_of
from tl_lenses.layers import LayerOrSite, canonical, layer_site, site_layer
from tl_lenses.model import LensModel, n_layers, name_of, prepared
from tl_lenses.sites import site
from tl_lenses.text.batches import Text
from tl_lenses.tokens import Batch, used_positions
from tl_lenses.translators import Row
from tl_lenses.unembed import Readout

Log = Callable[[dict[str, Any]], object] | list[dict[str, Any]] | None


class NotFinite(ValueError):
    """NaN or infinity where numbers are averaged or trained on."""


def logger(log: Log) -> Callable[[dict[str, Any]], object]:
    """What takes the entries of a log: the function, or the list's `append`; nothing for None."""
    if not (log is None or callable(log) or isinstance(log, list)):
        raise TypeError(f"log must be a function or a list that receives the entries, got {type(log).__name__}")
    return log.append if isinstance(log, list) else log or (lambda entry: None)


def rows_for(model: LensModel, layers: Iterable[LayerOrSite] | None, to: LayerOrSite | None = None) -> list[Row]:
    """`(source, target)` hook names: layers `0..n_layers-1` to the final residual unless asked."""
    depth = n_layers(model)
    target = place(model, depth if to is None else to)
    sources = [place(model, layer) for layer in (range(depth) if layers is None else several("layers", layers))]
    if not sources:
        raise ValueError("an empty list of layers has nothing to fit")
    for source in sources:
        if sources.count(source) > 1:
            raise ValueError(f"{source!r} is given twice")
        if source == target:
            raise ValueError(f"{source!r} is the target of the fit: its map is the identity and is not stored")
    return [(source, target) for source in sources]


def row_groups(rows: list[Row], at_once: int | None, text: Text) -> list[list[Row]]:
    """Rows in groups of so many sources, each group a pass over the same text."""
    if at_once is None:
        return [rows]
    at_once = whole_number("layers_at_once", at_once, least=1)
    sources = list(dict.fromkeys(source for source, _ in rows))
    parts = [set(sources[i : i + at_once]) for i in range(0, len(sources), at_once)]
    if len(parts) > 1 and text.one_shot:
        raise ValueError(
            f"{len(parts)} groups of layers are {len(parts)} passes over the text, and this source can be read only "
            "once: pass a function that returns an iterator, or leave out layers_at_once"
        )
    return [[row for row in rows if row[0] in part] for part in parts]


def place(model: LensModel, layer_or_site: LayerOrSite) -> str:
    """`layers.canonical`, of a layer or site that the model has."""
    return canonical(site(model, layer_or_site), n_layers(model))


def rows_of_pairs(
    model: LensModel,
    to: LensModel | None = None,
    pairs: Iterable[tuple[LayerOrSite, LayerOrSite]] | None = None,
    layers: Iterable[LayerOrSite] | None = None,
) -> list[Row]:
    """`(source, target)` hook names of pairs `(l, l*)`; between models each l to the l* at the same depth unless asked.

    `l* = round(l L* / L)`, halves up, for l in 0..L: the first state to the first, the final one to the final one.
    """
    depth, target = n_layers(model), model if to is None else to
    goal = n_layers(target)
    if pairs is None:
        asked: list[Any] = []
        for layer in range(depth + 1) if layers is None else several("layers", layers):
            at = site_layer(place(model, layer))
            if at is None:
                raise ValueError(f"{layer!r} is not a layer, so it has no relative depth: give pairs=[({layer!r}, l*)]")
            asked.append((layer, (2 * at * goal + depth) // (2 * depth)))
    elif layers is not None:
        raise ValueError("give either layers or pairs, not both: pairs say the layers")
    else:
        asked = several("pairs", pairs, "(l, l*)")
    if not asked:
        raise ValueError("an empty list of pairs has nothing to fit: give at least one (l, l*)")
    rows: dict[Row, Any] = {}
    for pair in asked:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise ValueError(f"expected pairs (source layer, target layer), got {pair!r}: give pairs=[(l, l*), ...]")
        sites = []
        for side, of, key in (("source", model, pair[0]), ("target", target, pair[1])):
            try:
                sites.append(place(of, key))
            except ValueError as error:
                raise ValueError(f"pair {tuple(pair)}, {side} model {name_of(of)!r}: {error}") from None
        row = (sites[0], sites[1])
        if row in rows:
            same = "is given twice" if tuple(pair) == tuple(rows[row]) else f"and {tuple(rows[row])} are the same"
            raise ValueError(f"pair {tuple(pair)} {same}: leave one of them out")
        if to is None and row[0] == row[1]:
            raise ValueError(f"pair {tuple(pair)} maps {row[0]!r} to itself: that is the identity and not stored; leave it out")
        rows[row] = pair
    return list(rows)


def states(
    model: LensModel, batch: Batch, names: Iterable[str], hooks: Sequence[Hook], skip_first: bool, readout: Readout | None = None
) -> tuple[Output, dict[str, Tensor], Bool[Tensor, "batch pos"], Batch]:
    """One pass, or the states that the batch brings: output, `{site: [batch, pos, d]}`, positions to use, and the batch as it ran."""
    batch, sites = prepared(model, batch), {name: name for name in names}
    # Without grad but not in inference mode: what is kept enters the fitter's own graph.
    heads_side_by_side = lambda x: x.flatten(2)
    with torch.no_grad():
        seen, output = passed(model, batch, sites, hooks, fn=heads_side_by_side, readout=readout)
    used = used_positions(batch, skip_first)
    for name, x in seen.items():
        finite = x.isfinite().all(-1) | ~used.to(x.device)
        if not finite.all():
            row = int((~finite).any(1).nonzero()[0])
            raise NotFinite(
                f"the activation at {name!r} has values that are not finite: {name_of(model)!r} overflows there (try float32 or bfloat16), in the text {shown(model, batch.tokens[row])}"
            )
    return output, seen, used, batch


def shown(model: LensModel, tokens: Int[Tensor, " pos"], length: int = 160) -> str:
    """The text of a row for a message, cut; its ids where the model has no tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    text = repr(tokens.tolist() if tokenizer is None else tokenizer.decode(tokens.tolist()))
    return text if len(text) <= length else f"{text[: length - 4]}...{text[-1]}"


def record(
    model: LensModel, fitter: str, tokens_seen: int, settings: dict[str, Any], identity: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The record in a file of maps. Basis and fingerprint are those of `identity`, or of the model as it is now."""
    return {
        "fitter": fitter, **(identity or identity_of(model)), "tokens_seen": tokens_seen, "settings": settings,
        "final_site": layer_site(n_layers(model), n_layers(model)),
    }  # fmt: skip

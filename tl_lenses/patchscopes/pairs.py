"""Which layers a patchscope reads and patches: pairs `(l, l*)`, and the single moves that a pair stands for."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from tl_lenses.checks import several
from tl_lenses.layers import LayerOrSite, as_layer, canonical, resolve_layer
from tl_lenses.model import LensModel, n_layers
from tl_lenses.patchscopes.result import Layers, Pair
from tl_lenses.patchscopes.sources import Source
from tl_lenses.sites import site


def all_pairs(
    model: LensModel, to: LensModel, sources: Sequence[Source], layers: Any, target_layers: Any, pairs: Any
) -> list[Pair]:
    """The pairs `(l, l*)` of a call, layers resolved and sites checked; arguments as `patchscope` takes them."""
    without_layers = {not source.has_layers for source in sources}
    if len(without_layers) > 1:
        raise ValueError("vectors without a layer and sources with layers cannot share a call: their pairs differ")
    without_layer = True in without_layers
    in_source, in_target = partial(_resolved, model), partial(_resolved, to)
    resolved: list[Pair]
    if pairs is not None:
        if layers is not None or target_layers is not None:
            raise ValueError("give either pairs, or layers and target_layers")
        resolved = [(None if a is None else in_source(a), in_target(b)) for a, b in listed_pairs(pairs)]
        if any((a is None) != without_layer for a, _ in resolved):
            raise ValueError("the source layer of a pair is None for vectors without a layer, and only for those")
    elif without_layer and layers is not None:
        raise ValueError("vectors [n, d_model] have no layer: give target_layers, or vectors [n, n_layers + 1, d_model]")
    else:
        every_target = range(n_layers(to) + 1) if target_layers is None else several("target_layers", target_layers)
        every_source = range(n_layers(model) + 1) if layers is None else several("layers", layers)
        if without_layer:
            resolved = [(None, in_target(b)) for b in every_target]
        elif target_layers is None:
            resolved = [(in_source(a), in_target(in_source(a))) for a in every_source]
        else:
            resolved = [(in_source(a), in_target(b)) for a in every_source for b in every_target]
    if not resolved:
        raise ValueError("no pair of layers to patch: layers, target_layers or pairs is empty")
    for pair in dict.fromkeys(resolved):
        _check_no_place_twice(to, pair)
    return resolved


def moves_of(source_layers: Layers | None, target_layers: Layers) -> list[tuple[LayerOrSite | None, LayerOrSite]]:
    """The single moves of a pair: one vector into several layers, or layer by layer.

    >>> moves_of(3, (1, 2)), moves_of((0, 1), (0, 1))
    ([(3, 1), (3, 2)], [(0, 0), (1, 1)])
    """
    into = target_layers if isinstance(target_layers, tuple) else (target_layers,)
    if not isinstance(source_layers, tuple):
        return [(source_layers, layer) for layer in into]
    if len(source_layers) != len(into):
        raise ValueError(
            f"the pair {(source_layers, target_layers)} has {len(source_layers)} source layers and {len(into)} target "
            "layers: expected as many"
        )
    return list(zip(source_layers, into, strict=True))


def listed_pairs(pairs: Any) -> list[tuple[Any, Any]]:
    """The entries of `pairs`, as they were given."""
    given = several("pairs", pairs, "(l, l*)")
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in given):
        raise TypeError(f"pairs must be a list of (l, l*), such as [(3, 1), (3, 2)], got {pairs!r}")
    return given


def _check_no_place_twice(to: LensModel, pair: Pair) -> None:
    places = [canonical(layer, n_layers(to)) for _, layer in moves_of(*pair)]
    for (_, layer), place in zip(moves_of(*pair), places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"the target layer {layer!r} is given twice in the pair {pair}")


def _resolved(model: LensModel, layers: Any) -> Layers:
    """A layer or several as `0..n_layers`, a site as it is, checked."""
    if isinstance(layers, tuple):
        if not layers:
            raise ValueError("an empty tuple of layers patches nothing")
        return tuple(_resolved(model, layer) for layer in layers)  # type: ignore[misc]
    if isinstance(layers, str):
        return site(model, layers)
    return resolve_layer(as_layer(layers), n_layers(model))

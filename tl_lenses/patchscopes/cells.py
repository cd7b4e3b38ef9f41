"""Which cells a patchscope has and what each puts where: pairs of layers, the map between them, the vector's length."""

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.fingerprint import check_pair
from tl_lenses.hooks import read, run
from tl_lenses.model import LensModel, d_model, device_of, n_layers
from tl_lenses.patchscopes.planner import Cell, Combine, Prompt
from tl_lenses.patchscopes.result import Layers, Pair
from tl_lenses.patchscopes.sources import Source, Vectors
from tl_lenses.sites import LayerOrSite, resolve_layer, site, site_layer
from tl_lenses.translators import Translators

Norm = Literal["replaced", "mean"] | float | Float[Tensor, " layers"] | None


def all_pairs(
    model: LensModel, to: LensModel, sources: Sequence[Source], layers: Any, target_layers: Any, pairs: Any
) -> list[Pair]:
    """The cells `(l, l*)`, layers resolved and sites checked.

    Args:
        model: the source model.
        to: the target model.
        sources: to know whether there is a layer to choose.
        layers, target_layers, pairs: as `patchscope` takes them.

    Raises:
        ValueError: a layer or site that is not there, an empty list, both pairs and layers.
    """
    bare = {not one.has_layers for one in sources}
    if len(bare) > 1:
        raise ValueError("vectors without a layer and sources with layers cannot share a call: their pairs differ")
    # `hook_dict` is built anew at every look, so each site is looked up once.
    ours, theirs = cache(lambda layer: _resolved(model, layer)), cache(lambda layer: _resolved(to, layer))
    every = range(n_layers(to) + 1)
    found: list[Pair]
    if pairs is not None:
        if layers is not None or target_layers is not None:
            raise ValueError("give either pairs, or layers and target_layers")
        moves = [pair if isinstance(pair, (tuple, list)) and len(pair) == 2 else None for pair in _many(pairs, "pairs")]
        if None in moves:
            raise ValueError(f"pairs must be a list of (l, l*), such as [(3, 1), (3, 2)], got {pairs!r}")
        found = [(None if a is None else ours(a), theirs(b)) for a, b in moves]  # type: ignore[misc]
        if any((a is None) != (True in bare) for a, _ in found):
            raise ValueError("the source layer of a pair is None for vectors without a layer, and only for those")
    elif True in bare:
        if layers is not None:
            raise ValueError(
                "vectors [n, d_model] have no layer: give target_layers, or vectors [n, n_layers + 1, d_model]"
            )
        found = [(None, theirs(b)) for b in (every if target_layers is None else _many(target_layers, "target_layers"))]
    else:
        rows = [ours(a) for a in (range(n_layers(model) + 1) if layers is None else _many(layers, "layers"))]
        if target_layers is None:
            found = [(a, theirs(a)) for a in rows]
        else:
            into = [theirs(b) for b in _many(target_layers, "target_layers")]
            found = [(a, b) for a in rows for b in into]
    if not found:
        raise ValueError("no pair of layers to patch: layers, target_layers or pairs is empty")
    for a, b in found:
        for _, one in routes(a, b):
            if [c for _, c in routes(a, b)].count(one) > 1:
                raise ValueError(f"the target layer {one!r} is given twice in the pair {(a, b)}")
    return found


def _resolved(model: LensModel, layers: Layers) -> Layers:
    if isinstance(layers, tuple):
        if not layers:
            raise ValueError("an empty tuple of layers patches nothing")
        return tuple(_resolved(model, layer) for layer in layers)  # type: ignore[misc]
    if hasattr(layers, "__index__") and not isinstance(layers, bool):  # numpy's integers too
        return resolve_layer(operator.index(layers), n_layers(model))  # pyright: ignore[reportArgumentType]
    site(model, layers)  # refuses what the model does not have
    return layers


def _many(layers: Any, what: str) -> list[Any]:
    """The entries of a list of layers or pairs; a single one is refused, since a hook name is iterable too."""
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise ValueError(f"{what} must be a list, got {layers!r}: write [{layers!r}]")
    return list(layers)


def routes(a: Layers | None, b: Layers) -> list[tuple[LayerOrSite | None, LayerOrSite]]:
    """The single moves of a pair: one vector into several layers, or layer by layer.

    >>> routes(3, (1, 2)), routes((0, 1), (0, 1))
    ([(3, 1), (3, 2)], [(0, 0), (1, 1)])
    """
    into = b if isinstance(b, tuple) else (b,)
    if not isinstance(a, tuple):
        return [(a, one) for one in into]
    if len(a) != len(into):
        raise ValueError(
            f"the pair {(a, b)} has {len(a)} source layers and {len(into)} target layers: expected as many"
        )
    return list(zip(a, into, strict=True))


def check_widths(model: LensModel, to: LensModel, sources: Sequence[Source], pairs: Sequence[Pair]) -> None:
    """Refuse vectors that fit no residual stream of the target model, as far as widths are known before anything runs.

    Args:
        model, to: the source and the target model.
        sources: what was asked for.
        pairs: their cells.

    Raises:
        ValueError: another width than the target's, without a map.
    """
    for a, b in (route for pair in pairs for route in routes(*pair)):
        if isinstance(b, int) and (a is None or isinstance(a, int)):
            for one in sources:
                if one.has_vectors and not one.prompt.ndim:  # type: ignore[union-attr]
                    continue  # `collect` says what shapes there are
                _fits_width(one.prompt.shape[-1] if one.has_vectors else d_model(model), to)  # type: ignore[union-attr]


def _fits_width(width: int, to: LensModel) -> None:
    if width != d_model(to):
        raise ValueError(
            f"a vector of width {width} does not fit the target model (d_model {d_model(to)}): pass map=, an affine map between them"
        )


def check_device(map: Any, model: LensModel, sources: Sequence[Source]) -> None:
    """Refuse a map with weights on another device than the vectors that it gets.

    Raises:
        ValueError: which devices they are.
    """
    weights = map.parameters() if isinstance(map, torch.nn.Module) else [getattr(map, "weight", None)]
    for weight in (w for w in weights if isinstance(w, Tensor)):
        for one in sources:
            device = one.prompt.device if one.has_vectors else device_of(model)  # type: ignore[union-attr]
            if weight.device != device:
                raise ValueError(
                    f"the map is on {weight.device} and the vectors are on {device}: move one of them with .to(...)"
                )


def check_map(map: Translators, model: LensModel, to: LensModel, pairs: Sequence[Pair]) -> None:
    """Refuse translators of other models, and rows that they do not have, before anything runs."""
    every = [route for a, b in pairs for route in routes(a, b)]
    moves = [(one, into) for one, into in every if one is not None]
    if len(moves) < len(every):
        raise ValueError(
            "vectors without a layer have no row in Translators: pass one map, as translators[l, l_target]"
        )
    check_pair(map, model, to, moves)


def mean_norms(model: LensModel, prompt: Prompt, layers: Sequence[LayerOrSite]) -> dict[LayerOrSite, float]:
    """Mean length of the target prompt's own vectors at some layers, BOS left out."""
    seen: dict[LayerOrSite, Tensor] = {}
    run(model, prompt.tokens, [read(site(model, layer), seen, key=layer) for layer in layers])
    skip = min(1, prompt.tokens.shape[1] - 1)
    return {layer: float(x[0, skip:].flatten(1).float().norm(dim=-1).mean()) for layer, x in seen.items()}


def combiner(mode: str, alpha: float, relative: bool) -> Combine:
    """What a vector v does to the activation h that it meets; `relative`: v is counted in lengths of h."""

    def combine(h: Tensor, v: Tensor) -> Tensor:
        if relative:
            v = v * h.norm(dim=-1, keepdim=True)
        if mode == "replace":
            return v
        return torch.lerp(h, v, alpha) if mode == "interpolate" else h + v

    return combine


def cell(
    to: LensModel,
    prompt: Prompt,
    source: Vectors,
    scale: float,
    pair: Pair,
    map: Callable[[Tensor], Tensor] | Translators | None,
    norm: Norm,
    relative: bool,
    means: dict[LayerOrSite, float],
    names: dict[LayerOrSite, str],
) -> Cell:
    """The vectors of one cell, mapped, of the length asked for, one per placeholder.

    Args:
        to: the target model.
        prompt: the target.
        source: the source's vectors by layer.
        scale: a factor after `norm`.
        pair: source and target layers.
        map: as `patchscope` takes it.
        norm: as `patchscope` takes it.
        relative: the length is counted in lengths of the replaced vector.
        means: mean lengths by target layer, for `norm="mean"`.
        names: the hook name of every target layer.

    Raises:
        ValueError: another width than the target's, another number of vectors than placeholders, a vector of length 0
            that is to be given a length, numbers that are not finite.
    """
    into = []
    for layer, target_layer in routes(*pair):
        v = source.by_layer[layer]
        if isinstance(map, Translators):
            assert layer is not None  # check_map has seen to it
            v = map[layer, target_layer](v)
        elif map is not None:
            v = map(v)
        if not isinstance(v, Tensor) or v.ndim != 2:
            raise ValueError(f"map must return vectors [k, d], got {list(getattr(v, 'shape', [])) or type(v).__name__}")
        residual = isinstance(target_layer, int) or site_layer(target_layer, n_layers(to)) is not None
        if residual:
            _fits_width(v.shape[-1], to)
        if len(v) not in (1, len(prompt.place)):
            raise ValueError(
                f"the source gives {len(v)} positions and the target takes {len(prompt.place)}: expected one for all, or as many"
            )
        length = 1.0 if relative else _length(norm, target_layer, means, n_layers(to))
        if length is not None:
            if not bool(v.norm(dim=-1).all()):
                raise ValueError(f"source {source.label!r} has a vector of length 0, which cannot be given a norm")
            v = v * (length / v.norm(dim=-1, keepdim=True))
        # What neither a map nor a norm has touched was looked at where it was read.
        if (map is not None or length is not None) and not bool(v.isfinite().all()):
            raise ValueError(f"the mapped vector of source {source.label!r} for {pair} is not finite")
        into.append((names[target_layer], (v * scale).expand(len(prompt.place), -1)))
    return Cell(tuple(into))


def _length(norm: Norm, layer: LayerOrSite, means: dict[LayerOrSite, float], depth: int) -> float | None:
    if norm is None or isinstance(norm, (int, float)):
        return norm
    if isinstance(norm, str):
        return means[layer]
    at = layer if isinstance(layer, int) else site_layer(layer, depth)
    if at is None:
        raise ValueError(f"norm as a tensor has one length per residual layer, and {layer!r} is none: give a number")
    return float(norm[at])

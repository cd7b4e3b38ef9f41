"""Layers, hook names and labels: the one file that spells them.

Layer `l` is the residual stream after `l` blocks: 0 enters the first block, `n_layers` leaves the last one. A site is a
hook name. Wherever a layer is accepted a site is too.
"""

import operator
from typing import Any

LayerOrSite = int | str


def as_layer(layer: Any) -> int:
    """A layer of any integer type as an `int`."""
    try:
        if not isinstance(layer, bool):
            return operator.index(layer)
    except TypeError:  # an array or tensor of several numbers has the method too
        pass
    raise TypeError(f"expected a layer (int) or a hook name (str), got {layer!r}")


def layer_site(layer: int, n_layers: int) -> str:
    """Hook name of a residual layer, `0 <= layer <= n_layers`; negative layers count from `n_layers` (-1 is the final one).

    >>> layer_site(3, 12), layer_site(12, 12), layer_site(-1, 12)
    ('blocks.3.hook_resid_pre', 'blocks.11.hook_resid_post', 'blocks.11.hook_resid_post')
    """
    at = resolve_layer(layer, n_layers)
    return f"blocks.{at}.hook_resid_pre" if at < n_layers else f"blocks.{n_layers - 1}.hook_resid_post"


def resolve_layer(layer: int, n_layers: int) -> int:
    """A layer as `0..n_layers`; negative ones count from `n_layers`."""
    at = layer + n_layers + 1 if layer < 0 else layer
    if not 0 <= at <= n_layers:
        raise ValueError(
            f"no layer {layer}: this model has layers 0..{n_layers} (0 enters the first block, {n_layers} or -1 is the final residual)"
        )
    return at


def resolved(layer: LayerOrSite, n_layers: int) -> LayerOrSite:
    """A layer as `0..n_layers`; a hook name as it is."""
    return layer if isinstance(layer, str) else resolve_layer(as_layer(layer), n_layers)


def site_layer(name: str) -> int | None:
    """The residual layer that a hook name reads, or None: `hook_resid_post` of block i is layer i + 1."""
    parts = name.split(".")
    if len(parts) == 3 and parts[0] == "blocks" and parts[1].isdigit():
        if parts[2] in ("hook_resid_pre", "hook_in"):
            return int(parts[1])
        if parts[2] in ("hook_resid_post", "hook_out"):
            return int(parts[1]) + 1
    return None


def label(name: str) -> LayerOrSite:
    """A hook name as the residual layer that it reads, or as it is.

    >>> label("blocks.2.hook_resid_post"), label("blocks.2.hook_attn_out")
    (3, 'blocks.2.hook_attn_out')
    """
    layer = site_layer(name)
    return name if layer is None else layer


def canonical(layer_or_site: LayerOrSite, n_layers: int) -> str:
    """One hook name per place: `hook_resid_post` of block i is layer i + 1, under that layer's name.

    A hook name of a deeper model stays as it is.

    >>> canonical(-1, 4), canonical("blocks.1.hook_resid_post", 4), canonical("blocks.7.hook_resid_post", 4)
    ('blocks.3.hook_resid_post', 'blocks.2.hook_resid_pre', 'blocks.7.hook_resid_post')
    """
    if not isinstance(layer_or_site, str):
        return layer_site(as_layer(layer_or_site), n_layers)
    layer = site_layer(layer_or_site)
    # A block beyond n_layers is another model's: maps made by hand do not say whose targets they have.
    return layer_or_site if layer is None or layer > n_layers else layer_site(layer, n_layers)

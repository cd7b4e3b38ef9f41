"""What every fitter needs: rows, the activations of a batch, and a record of where the maps come from."""

from collections.abc import Iterable, Sequence
from typing import Any

import einops
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_lenses.data import Batch
from tl_lenses.evaluation import used_positions
from tl_lenses.fingerprint import basis_of, fingerprint
from tl_lenses.hooks import Hook, read, run
from tl_lenses.model import LensModel, d_model, dtype_of, n_layers, name_of, prepare
from tl_lenses.sites import LayerOrSite, layer_site, site
from tl_lenses.translators import Row


def rows_for(model: LensModel, layers: Iterable[LayerOrSite] | None, to: LayerOrSite | None = None) -> list[Row]:
    """`(source, target)` hook names: layers `0..n_layers-1` to the final residual unless asked.

    Raises:
        ValueError: unknown layer or site, one twice, or the target among the sources (it is the identity and never
        stored).
    """
    depth = n_layers(model)
    target = site(model, depth if to is None else to)
    sources = [site(model, layer) for layer in (range(depth) if layers is None else layers)]
    if not sources:
        raise ValueError("an empty list of layers has nothing to fit")
    for source in sources:
        if sources.count(source) > 1:
            raise ValueError(f"{source!r} is given twice")
        if source == target:
            raise ValueError(f"{source!r} is the target of the fit: its map is the identity and is not stored")
    return [(source, target) for source in sources]


def flatten_heads(x: Float[Tensor, "batch pos *rest"]) -> Float[Tensor, "batch pos d"]:
    """`[batch, pos, head, d_head]` as `[batch, pos, head * d_head]`; residuals as they are."""
    return einops.rearrange(x, "batch pos ... -> batch pos (...)")


def activations(
    model: LensModel, batch: Batch, rows: Sequence[Row], hooks: Sequence[Hook], skip_first: bool
) -> tuple[Float[Tensor, "batch pos d_vocab"], dict[str, Tensor], Bool[Tensor, "batch pos"], Batch]:
    """One forward pass: logits, `{site: [batch, pos, d]}`, positions to use, and the batch as it ran.

    Raises:
        ValueError: activations that are not finite (the site is named).
    """
    batch = prepare(model, batch.tokens, batch.attention_mask)
    seen: dict[str, Tensor] = {}
    names = dict.fromkeys(name for row in rows for name in row)
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
        if not x[used].isfinite().all():
            raise ValueError(
                f"the activation at {name!r} has values that are not finite: the model overflows there (try float32 or bfloat16)"
            )
    return logits, seen, used, batch


def record(model: LensModel, fitter: str, tokens_seen: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What a file says about its maps. Basis and fingerprint are those of the model as it is now."""
    return {
        "fitter": fitter,
        "model": name_of(model),
        "d_model": d_model(model),
        "model_dtype": str(dtype_of(model)).removeprefix("torch."),
        "basis": basis_of(model),
        "fingerprint": fingerprint(model),
        "tokens_seen": tokens_seen,
        "settings": settings,
        "final_site": layer_site(n_layers(model), n_layers(model)),
    }

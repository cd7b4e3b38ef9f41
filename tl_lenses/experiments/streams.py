"""What experiments with lenses read: lenses checked against the model, and residuals with the tokens that follow them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses.data import as_batches
from tl_lenses.evaluation import used_positions
from tl_lenses.hooks import Hook, residual_reads, run
from tl_lenses.lens import Lens
from tl_lenses.model import LensModel, check_model, prepare
from tl_lenses.progress import progress
from tl_lenses.sites import resolve_layer
from tl_lenses.trajectory import next_tokens


def check_lenses(model: LensModel, lenses: Lens | Mapping[str, Lens], what: str) -> dict[str, Lens]:
    """Lenses by name, each of them of this model.

    Raises:
        ValueError: none, or one that was made for another model object.
    """
    check_model(model, what=what)
    found = dict(lenses) if isinstance(lenses, Mapping) else {"lens": lenses}
    if not found:
        raise ValueError(f"{what} needs at least one lens, got an empty mapping: pass {{'logit': tll.Lens(model)}}")
    for name, one in found.items():
        if one.model is not model:
            raise ValueError(f"lens {name!r} was made for another model object: use tll.Lens(model, ...) with this one")
    return found


def common_layers(lenses: Mapping[str, Lens], layers: Iterable[int] | None, depth: int) -> list[int]:
    """The layers asked for, `0..n_layers` and in order, or all that every lens has.

    Raises:
        ValueError: one that a lens was not fitted at, one twice, none.
    """
    there = [layer for layer in range(depth + 1) if all(layer in one.layers for one in lenses.values())]
    if layers is None:
        return there
    asked = [resolve_layer(layer, depth) for layer in layers]
    if missing := [layer for layer in asked if layer not in there]:
        raise ValueError(f"layer {missing[0]} was not fitted in every lens: layers that all of them have are {there}")
    if len(set(asked)) != len(asked) or not asked:
        raise ValueError(f"expected different layers, at least one, got {asked}")
    return sorted(asked)


def residuals(
    model: LensModel,
    tokens: Any,
    layers: Iterable[int],
    *,
    hooks: Iterable[Hook] = (),
    skip_first: bool = True,
    desc: str = "",
    show_progress: bool | None = None,
) -> Iterator[tuple[dict[int, Float[Tensor, "n d_model"]], Int[Tensor, " n"]]]:
    """Batch by batch, residuals of every position that has a next token, by layer, and those next tokens.

    Args:
        tokens: what `evaluate` takes.
        skip_first: leave out real position 0 of each row.

    Raises:
        ValueError: no such position, or residuals that are not finite (the layer is named).
    """
    wanted, hooks, n = list(layers), list(hooks), 0
    for batch in progress(as_batches(tokens), desc=desc, show=show_progress):
        batch = prepare(model, batch.tokens, batch.attention_mask)
        goal = next_tokens(batch.tokens, used_positions(batch, False))
        there = used_positions(batch, skip_first) & (goal >= 0)
        if not there.any():
            continue
        seen: dict[Any, Tensor] = {}
        with torch.no_grad():
            reads = residual_reads(model, wanted, seen)
            run(model, batch.tokens, [*hooks, *reads], attention_mask=batch.attention_mask)
        found = {layer: seen[layer][there] for layer in wanted}
        for layer, x in found.items():
            if not x.isfinite().all():
                raise ValueError(
                    f"the residual at layer {layer} has values that are not finite: try float32 or bfloat16"
                )
        n += int(there.sum())
        yield found, goal[there]
    if n == 0:
        raise ValueError("no position has a next token to predict: pass rows of three tokens or more")

"""What the ablation experiments share: text as batches that are kept, the states at its positions, and checks of what was given."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_lenses.data import Batch, as_batches
from tl_lenses.evaluation import used_positions
from tl_lenses.hooks import Hook, residual_reads, run
from tl_lenses.lens import Lens
from tl_lenses.model import LensModel, n_layers, name_of, prepare
from tl_lenses.sites import resolve_layer


@dataclass(frozen=True)
class Texts:
    """Batches that an experiment goes over again and again, each with the positions that count.

    Attributes:
        batches: as the model takes them.
        used: `[batch, pos]` of each: real positions, without each row's first one where asked.
    """

    batches: list[Batch]
    used: list[Bool[Tensor, "batch pos"]]

    @property
    def n(self) -> int:
        """Positions that count."""
        return sum(int(mask.sum()) for mask in self.used)

    def __iter__(self) -> Any:
        return iter(zip(self.batches, self.used, strict=True))


def texts_of(model: LensModel, tokens: Any, *, n: int | None = None, skip_first: bool = True) -> Texts:
    """The rows of a text until `n` positions are there (all of the last row's count).

    Raises:
        ValueError: fewer than two positions.
    """
    batches, used, seen = [], [], 0
    for batch in as_batches(tokens):
        batch = prepare(model, batch.tokens, batch.attention_mask)
        mask = used_positions(batch, skip_first)
        if n is not None:
            after = seen + mask.sum(1).cumsum(0)
            rows = int((after < n).sum()) + 1  # up to the row that reaches n
            batch = Batch(batch.tokens[:rows], None if batch.attention_mask is None else batch.attention_mask[:rows])
            mask = mask[:rows]
        batches.append(batch)
        used.append(mask)
        seen += int(mask.sum())
        if n is not None and seen >= n:
            break
    if seen < 2:
        raise ValueError(
            f"the text gives {seen} positions, and an ablation needs 2 at least: pass more of it, or longer rows"
        )
    return Texts(batches, used)


@torch.no_grad()
def states_of(
    model: LensModel, texts: Texts, layers: Sequence[int], hooks: Sequence[Hook] = ()
) -> dict[int, Float[Tensor, "n d"]]:
    """The residual of every layer at the positions that count, `[n, d_model]`."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for batch, used in texts:
        seen: dict[Any, Tensor] = {}
        reads = [*hooks, *residual_reads(model, layers, seen)]
        run(model, batch.tokens, reads, None, attention_mask=batch.attention_mask)
        for layer in layers:
            found[layer].append(seen[layer][used])
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def wanted_layers(model: LensModel, layers: Iterable[int] | None, *, last: bool = False) -> list[int]:
    """Layers as `0..n_layers`; by default all, without the final state unless `last`.

    Raises:
        ValueError: one that is not there, or an empty list.
    """
    depth = n_layers(model)
    found = list(range(depth + last)) if layers is None else [resolve_layer(layer, depth) for layer in layers]
    if not found:
        raise ValueError("an empty list of layers: pass None for all")
    return list(dict.fromkeys(found))


def check_lens(model: LensModel, lens: Lens, layers: Iterable[int], name: str = "the lens") -> None:
    """Refuse a lens of another model, or without one of the layers.

    Raises:
        ValueError: either.
    """
    if lens.model is not model:
        raise ValueError(
            f"{name} reads {name_of(lens.model)!r} and not the model it came with ({name_of(model)!r}): make it with Lens(model, ...)"
        )
    if missing := [layer for layer in layers if layer not in lens.layers]:
        raise ValueError(f"{name} has no layer {missing[0]}; it has {lens.layers}")


def check_covered(given: Mapping[int, Any], layers: Sequence[int], what: str) -> None:
    """Refuse a list of layers that does not fit what is given per layer.

    Raises:
        ValueError: something is given for a layer that the list leaves out, or nothing for one that it names.
    """
    if extra := [layer for layer in given if layer not in layers]:
        raise ValueError(f"{what} for layer {extra[0]} which layers={list(layers)} leaves out: add it to the list")
    if missing := [layer for layer in layers if layer not in given]:
        raise ValueError(
            f"{what} for layers {sorted(given)} and not for layer {missing[0]}: leave it out of layers, or give one"
        )

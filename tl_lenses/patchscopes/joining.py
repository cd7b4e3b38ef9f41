"""One pass in which each cell's row is added at the layer where it is patched: below that, all cells are the same row.

A cell that patches layer l* needs the blocks from l* on only. So the pass begins with a single, unpatched row. The hook at
layer l* appends a row per cell that patches there, and a block runs the rows that were added so far: half of all rows in a
sweep over all layers. A block's cache holds as many rows as the block runs.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses import edits
from tl_lenses.decoding import Decoder
from tl_lenses.hooks import Hook, installed, marked, patch
from tl_lenses.layers import layer_site, site_layer
from tl_lenses.model import LensModel, device_of, n_layers

# site -> which cells patch there, and their vectors
Entries = dict[str, tuple[list[int], Float[Tensor, "_ k d"]]]

# Whether a model's blocks accept more rows than its embedding saw; tried once per model.
_JOINABLE: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def run_joining(
    model: LensModel, start: Decoder, suffix: Int[Tensor, "1 pos"], entries: Entries, place: Sequence[int],
    combine: Callable[[Tensor, Tensor], Tensor], *, hooks: Sequence[Hook] = (), last: int | None = None,
    continues: bool = True,
) -> tuple[Float[Tensor, "cells returned d_vocab"], Decoder]:  # fmt: skip
    """Logits of every cell, and a decoder that continues all of them (where it `continues`).

    Args:
        start, suffix: the shared prefix, and the rest of the prompt.
        entries: the cells by site, residual layers only, each cell once.
        place: the columns of the suffix that are patched, by `combine` of what is there and the vectors.
        hooks: for the single row (a soft prompt's).
        last: how many last columns need logits, as in `Decoder.feed`.
    """
    depth = n_layers(model)
    order = lambda name: (site_layer(name) or 0, name.endswith(("hook_resid_pre", "hook_in")))
    names = sorted(entries, key=order)
    row_of = {cell: row for row, cell in enumerate((cell for name in names for cell in entries[name][0]), start=1)}
    joining: list[Hook] = [(name, _joined(entries[name][1], place, combine)) for name in names]
    # Block i runs the unpatched row and the rows that patch layers 0..i.
    counts = [1 + sum(len(entries[name][0]) for name in names if order(name)[0] <= block) for block in range(depth)]
    decoder = start.repeated(counts)
    with installed(model, [*hooks, *joining]), marked(0, suffix.shape[1]):
        logits = decoder.feed(suffix, last=last)
    rows = torch.tensor([row_of[cell] for cell in range(len(row_of))], device=device_of(model))
    if continues:
        decoder.spread(rows)
    return logits[rows.to(logits.device)], decoder


def _joined(values: Tensor, place: Sequence[int], combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The hook that appends patched copies of the first row."""

    def hook_fn(x: Tensor, hook: object = None) -> Tensor:
        rows = x[:1].repeat(len(values), *[1] * (x.ndim - 1))
        rows[:, list(place)] = combine(rows[:, list(place)], values.to(x)).to(x)
        return torch.cat([x, rows])

    return hook_fn


def joinable(model: LensModel) -> bool:
    """Whether rows can join a pass of this model halfway; tried once on four tokens.

    Attention that builds something per row of the input (ALiBi in BLOOM) cannot take more rows later. Every cell then runs
    all blocks. The test is behaviour: the logits must be those of an ordinary patch.
    """
    if model not in _JOINABLE:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                _JOINABLE[model] = _tried(model)
            except Exception:  # any error of a model that got rows it did not expect
                _JOINABLE[model] = False
    return _JOINABLE[model]


def _tried(model: LensModel) -> bool:
    depth, device = n_layers(model), device_of(model)
    first = getattr(getattr(model, "tokenizer", None), "bos_token_id", None) or 0
    ids = ((torch.arange(4, device=device) * 7 + first) % int(model.cfg.d_vocab))[None]
    start = Decoder(model)
    with marked(0, 2):
        start.feed(ids[:, :2])
    seen: dict[str, Tensor] = {}
    names = list(dict.fromkeys(layer_site(layer, depth) for layer in (0, depth // 2, depth)))
    with installed(model, [(name, lambda x, hook, name=name: seen.update({name: x.detach()})) for name in names]):
        with marked(0, 2):
            start.repeated(1).feed(ids[:, 2:])
    vectors = {name: seen[name][:, :1].flip(-1) for name in names}
    entries = {name: ([i], vectors[name]) for i, name in enumerate(names)}
    logits, decoder = run_joining(model, start, ids[:, 2:], entries, [0], lambda h, v: v)
    with marked(2, 2):
        after = decoder.step(ids[:, 0].expand(len(names)))
    for i, name in enumerate(names):
        alone = start.repeated(1)
        with installed(model, [patch(name, edits.replace(vectors[name][0, 0]), pos=0)]), marked(0, 2):
            expected = alone.feed(ids[:, 2:])
        with marked(2, 2):
            expected_after = alone.step(ids[:, 0])
        near = lambda a, b: float((a.float() - b.float()).abs().max()) <= 0.02 * float(b.float().std() + 1e-6)
        if not (near(logits[i], expected[0]) and near(after[i], expected_after[0])):
            return False
    return True

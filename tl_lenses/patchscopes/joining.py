"""One pass in which each cell's row appears at the layer where it is patched: below that, all cells are the same row.

A cell that patches layer l* needs the blocks behind l* only. So the pass begins with a single, unpatched row; the hook at layer
l* appends a row per cell that patches there, and a block runs the rows that have come so far: half of all rows in a sweep over
all layers. Keys and values follow suit, a block's cache holds as many rows as the block runs.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses import edits
from tl_lenses.hooks import Hook, installed, marked, patch
from tl_lenses.model import Decoder, LensModel, device_of, n_layers
from tl_lenses.sites import layer_site, site_layer

# site -> which cells patch there, and their vectors
Entries = dict[str, tuple[list[int], Float[Tensor, "_ k d"]]]

# Whether a model's blocks take more rows than its embedding saw; found once per model.
_JOINABLE: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def run_joining(
    model: LensModel,
    start: Decoder,
    suffix: Int[Tensor, "1 pos"],
    entries: Entries,
    place: Sequence[int],
    combine: Callable[[Tensor, Tensor], Tensor],
    *,
    hooks: Sequence[Hook] = (),
    last: int | None = None,
    go_on: bool = True,
) -> tuple[Float[Tensor, "cells returned d_vocab"], Decoder]:
    """Logits of every cell, and a decoder that goes on with all of them.

    Args:
        model: the target model.
        start: the shared prefix.
        suffix: what follows it.
        entries: the cells by site, residual layers only, each cell once.
        place: the columns of the suffix that are patched.
        combine: (replaced, vectors) -> what is put there.
        hooks: further hooks, for the single row (a soft prompt's).
        last: how many last columns' logits are wanted, as in `Decoder.feed`.
        go_on: whether the decoder will be used.
    """
    depth = n_layers(model)
    come = lambda name: (site_layer(name, depth) or 0, name.endswith(("hook_resid_pre", "hook_in")))
    names = sorted(entries, key=come)
    row_of: dict[int, int] = {}
    ours: list[Hook] = []
    for name in names:
        for cell in entries[name][0]:
            row_of[cell] = 1 + len(row_of)
        ours.append((name, _joined(entries[name][1], place, combine)))
    # Block i runs the unpatched row and the rows that patch layers 0..i.
    counts = [1 + sum(len(entries[name][0]) for name in names if come(name)[0] <= block) for block in range(depth)]
    decoder = start.repeated(counts)
    with installed(model, [*hooks, *ours]), marked(0, suffix.shape[1]):
        logits = decoder.feed(suffix, last=last)
    rows = torch.tensor([row_of[cell] for cell in range(len(row_of))], device=device_of(model))
    if go_on:
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

    Attention that builds something per row of the input (ALiBi in BLOOM) cannot take more rows later; then every cell runs all
    blocks. Told by behaviour: the logits must be those of an ordinary patch.
    """
    if model not in _JOINABLE:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                _JOINABLE[model] = _tried(model)
            except Exception:  # whatever a model does with rows that it did not expect
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
        one = start.repeated(1)
        with installed(model, [patch(name, edits.replace(vectors[name][0, 0]), pos=0)]), marked(0, 2):
            want = one.feed(ids[:, 2:])
        with marked(2, 2):
            then = one.step(ids[:, 0])
        near = lambda a, b: float((a.float() - b.float()).abs().max()) <= 0.02 * float(b.float().std() + 1e-6)
        if not (near(logits[i], want[0]) and near(after[i], then[0])):
            return False
    return True

"""Run many cells of a patchscope on one target prompt, repeating nothing that a patch cannot change.

A cell is one target run with its own vectors at its own sites. What precedes the first patched position is the same in all
cells: it runs once and its keys and values are shared. Only the suffix runs per cell, many cells in a batch, each row with its
own layer; decoding goes on batched and rows leave when they are finished. With `share=False`, one cell a batch and no cache
the same code is the naive procedure that the tests compare with.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_lenses import edits
from tl_lenses.hooks import Hook, hooked, installed, marked, pass_start, patch
from tl_lenses.model import Decoder, LensModel, d_model, device_of, n_layers
from tl_lenses.patchscopes.joining import joinable, run_joining
from tl_lenses.sites import site_layer

# What one batch of cells may take, and the most rows that still gain from being together.
_BATCH_BYTES, _MOST_ROWS = 512 * 2**20, 512

# (replaced [rows, k, ...], vectors [rows, k, ...]) -> [rows, k, ...]
Combine = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Prompt:
    """A target that is ready to run.

    Attributes:
        tokens: ids; of a soft prompt, placeholders.
        place: the columns that receive vectors.
        read: the column whose logits are read.
        soft: embeddings of a soft prompt, put in at `hook_embed`.
    """

    tokens: Int[Tensor, "1 pos"]
    place: tuple[int, ...]
    read: int
    soft: Float[Tensor, "pos d"] | None = None


@dataclass(frozen=True)
class Cell:
    """One target run: the vectors `[k, d]` that go to each site."""

    into: tuple[tuple[str, Float[Tensor, "k d"]], ...]


@dataclass(frozen=True)
class Decoding:
    """How a text is continued."""

    max_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    eos: int | None = None
    stopped: Callable[[list[int]], bool] | None = None


@dataclass
class _Rows:
    """The rows of a running batch: which cells they are, for hooks that must keep up when rows leave."""

    active: Int[Tensor, " rows"]
    sites: dict[str, tuple[Tensor, Tensor]] = field(
        default_factory=dict
    )  # site -> (mask [cells], vectors [cells, k, d])


def why_not_shared(model: LensModel, prompt: Prompt, target_hooks: Sequence[Hook]) -> str:
    """Why the prefix of a prompt cannot be computed once; "" where it can.

    Args:
        model: the target model.
        prompt: the target.
        target_hooks: the user's own hooks, whose positions count from the start of the whole prompt.
    """
    if min(prompt.place) == 0:
        return "the first position is patched"
    if prompt.read < min(prompt.place):
        return "the position that is read comes before the patch"
    if target_hooks:
        return "target_hooks see the whole prompt"
    if hooked(model):
        return "hooks on the model see the whole prompt"
    return ""


def prefix(model: LensModel, prompt: Prompt) -> Decoder | None:
    """The keys and values before the first patched position, or None where the model's cache cannot be shared."""
    decoder, n = Decoder(model), min(prompt.place)
    with installed(model, _soft(prompt, 0, n)), marked(0, n):
        decoder.feed(prompt.tokens[:, :n], last=0)
    return decoder if decoder.shareable() else None


def rows_per_batch(model: LensModel, prompt: Prompt, first: int, n_new: int) -> int:
    """How many cells run together: as many as fit in half a gigabyte of logits, keys, values and activations."""
    suffix = prompt.tokens.shape[1] - first
    d_vocab, total = int(model.cfg.d_vocab), prompt.tokens.shape[1] + n_new
    per_row = 4 * (3 * suffix * d_vocab + 2 * n_layers(model) * total * d_model(model) + 16 * suffix * d_model(model))
    return int(min(max(_BATCH_BYTES // per_row, 1), _MOST_ROWS))


def run_cells(
    model: LensModel,
    prompt: Prompt,
    cells: Sequence[Cell],
    combine: Combine,
    *,
    start: Decoder | None,
    hooks: Sequence[Hook] = (),
    when: Literal["prompt", "every_step"] = "prompt",
    isolate: bool = False,
    decoding: Decoding,
    draws: Float[Tensor, "cells new"] | None = None,
    use_cache: bool = True,
) -> tuple[Float[Tensor, "cells d_vocab"], list[list[int]]]:
    """Logits at the read position of every cell, and the ids that each goes on with.

    Args:
        model: the target model.
        prompt: the target.
        cells: one batch of them.
        combine: what a vector does to the activation that it meets.
        start: the shared prefix, or None to run whole prompts.
        hooks: the user's hooks on the target run; they come before ours.
        when: whether generated positions are patched as well.
        isolate: hide the placeholders' keys and values below the patch from later positions.
        decoding: how the texts go on.
        draws: uniform numbers per cell and step, for sampling.
        use_cache: False recomputes the whole sequence at every step.
    """
    n, device = len(cells), device_of(model)
    first = 0 if start is None else start.batch.tokens.shape[1]  # type: ignore[union-attr]
    rows = _Rows(torch.arange(n))
    names = list(dict.fromkeys(name for cell in cells for name, _ in cell.into))
    for name in names:
        mine = [(row, vector) for row, cell in enumerate(cells) for at, vector in cell.into if at == name]
        mask = torch.zeros(n, dtype=torch.bool)
        values = torch.zeros(n, *mine[0][1].shape, dtype=mine[0][1].dtype, device=device)
        index = torch.tensor([row for row, _ in mine])
        mask[index] = True
        values[index.to(device)] = torch.stack([vector for _, vector in mine]).to(device)
        rows.sites[name] = (mask, values)
    place = [column - first for column in prompt.place]
    ours = [patch(name, _edit(rows, name, combine), pos=place, when=when) for name in names]
    if isolate:
        ours += _isolated(rows, names, prompt.place, first)
    length = prompt.tokens.shape[1] - first
    soft = _soft(prompt, first, prompt.tokens.shape[1])
    ids: list[list[int]] = [[] for _ in cells]
    # Hooks of others may count columns at the unembedding; without a shared prefix there can be such.
    whole = start is None or any(name.startswith("unembed") for name in names)
    wanted = length if whole else length - (prompt.read - first)
    later = [*hooks, *soft, *ours]
    hides = isolate and any(blocks_before(name) for name in names)
    if start is not None and when == "prompt" and not hides and _layered(model, cells) and joinable(model):
        entries = {
            name: (mask.nonzero()[:, 0].tolist(), values[mask.to(device)])
            for name, (mask, values) in rows.sites.items()
        }
        suffix = prompt.tokens[:, first:]
        logits, decoder = run_joining(
            model, start, suffix, entries, place, combine, hooks=soft, last=wanted, go_on=decoding.max_new_tokens > 1
        )
        later = []
    else:
        suffix = prompt.tokens[:, first:].expand(n, -1)
        decoder = (
            Decoder(model, use_cache=use_cache and decoding.max_new_tokens > 1) if start is None else start.repeated(n)
        )
        logits = None
    with installed(model, later):
        if logits is None:
            with marked(0, length):
                logits = decoder.feed(suffix, last=wanted)
        found, last = logits[:, prompt.read - first - length], logits[:, -1]
        for step in range(decoding.max_new_tokens):
            chosen = _choose(last, decoding, None if draws is None else draws[rows.active, step])
            for row, token in zip(rows.active.tolist(), chosen.tolist(), strict=True):
                ids[row].append(token)
            alive = torch.tensor([not _finished(ids[row], decoding) for row in rows.active.tolist()])
            if step + 1 == decoding.max_new_tokens or not alive.any():
                break
            if not alive.all():
                kept = alive.nonzero()[:, 0]
                decoder.select(kept.to(device))
                rows.active, chosen = rows.active[kept], chosen[kept.to(chosen.device)]
            with marked(length + step if decoder.use_cache else 0, length):
                last = decoder.step(chosen.to(device))
    return found, ids


def _layered(model: LensModel, cells: Sequence[Cell]) -> bool:
    """Whether every cell patches one residual layer, so that its row need not run before."""
    return all(len(cell.into) == 1 and site_layer(cell.into[0][0], n_layers(model)) is not None for cell in cells)


def _edit(rows: _Rows, name: str, combine: Combine) -> edits.Edit:
    """The patch of one site for a whole batch: rows that patch elsewhere keep what they have."""

    def edit(x: Tensor) -> Tensor:
        mask, values = rows.sites[name]
        mask, value = mask[rows.active].to(x.device), values[rows.active.to(values.device)].to(x)
        if value[0, 0].numel() != x[0, 0].numel():
            raise ValueError(
                f"a vector of width {value[0, 0].numel()} does not fit {name!r}, which has {x[0, 0].numel()}: pass map="
            )
        new = combine(x, value.reshape(x.shape))
        return new if bool(mask.all()) else torch.where(mask.view(-1, *[1] * (x.ndim - 1)), new, x)

    return edit


def _isolated(rows: _Rows, names: Sequence[str], place: tuple[int, ...], first: int) -> list[Hook]:
    """Per block, the hook that hides the placeholders from later positions in rows whose patch comes behind that block."""
    hidden: dict[int, Tensor] = {}  # block -> rows [cells]
    for name in names:
        for block in range(blocks_before(name)):
            hidden[block] = rows.sites[name][0] | hidden.get(block, False)
    return [
        patch(
            f"blocks.{block}.attn.hook_pattern",
            hide_keys(place, lambda mask=mask: mask[rows.active], offset=first),
            when="every_step",
        )
        for block, mask in hidden.items()
    ]


def blocks_before(name: str) -> int:
    """How many blocks compute their keys and values before a site is reached.

    >>> blocks_before("blocks.3.hook_resid_pre"), blocks_before("blocks.3.hook_resid_post"), blocks_before("hook_embed")
    (3, 4, 0)
    """
    parts = name.split(".")
    if parts[0] != "blocks":
        return 0
    return int(parts[1]) + (parts[2] not in ("hook_resid_pre", "hook_in"))


def without_edges(
    pattern: Float[Tensor, "batch head query key"], gone: Bool[Tensor, "*batch query key"]
) -> Float[Tensor, "batch head query key"]:
    """A pattern without some edges, the rest of each query's attention scaled up to 1: the softmax without those keys.

    Queries that lose nothing stay as they are, to the bit; one that saw nothing else is left with zeros.
    """
    left = pattern.masked_fill(gone, 0.0)
    left = left / left.sum(-1, keepdim=True).clamp_min(torch.finfo(left.dtype).tiny)
    return torch.where(gone.any(-1, keepdim=True), left, pattern)


def hide_keys(columns: Sequence[int], rows: Callable[[], Tensor] | None = None, *, offset: int = 0) -> edits.Edit:
    """An edit of an attention pattern: later queries no longer see these columns, the rest of their attention is rescaled.

    `p'[q, k] = p[q, k] [k not hidden] / sum of what is left`, which is the softmax without those keys.

    Args:
        columns: the keys to hide, counted from the start of the prompt.
        rows: says which rows of the batch are meant; None means all.
        offset: columns of a shared prefix, which the pass does not count.
    """

    def edit(pattern: Tensor) -> Tensor:
        n_queries, n_keys = pattern.shape[-2:]
        # A cache with a sliding window has dropped its first columns, so both axes are counted from their ends.
        total = max(offset + pass_start() + n_queries, n_keys)
        query = torch.arange(total - n_queries, total, device=pattern.device)[:, None]
        key = torch.arange(total - n_keys, total, device=pattern.device)
        hidden = torch.zeros(n_queries, n_keys, dtype=torch.bool, device=pattern.device)
        for column in columns:
            hidden |= (key == column) & (query > column)
        new = without_edges(pattern, hidden)
        if rows is None:
            return new
        return torch.where(rows().to(pattern.device)[:, None, None, None], new, pattern)

    return edit


def _soft(prompt: Prompt, start: int, stop: int) -> list[Hook]:
    """The hook that puts the columns `start..stop` of a soft prompt in; none for token prompts."""
    if prompt.soft is None:
        return []
    return [patch("hook_embed", edits.replace(prompt.soft[start:stop]))]


def _choose(logits: Float[Tensor, "rows d_vocab"], decoding: Decoding, draw: Tensor | None) -> Int[Tensor, " rows"]:
    """The next token of every row: the likeliest one, or the one that its own random number falls on.

    A number per cell and step (rather than one generator for the batch) makes a text independent of its batch.
    """
    if draw is None:
        return logits.argmax(-1)
    p = (logits.double() / decoding.temperature).softmax(-1).cumsum(-1)
    return torch.searchsorted(p, draw.to(p)[:, None]).clamp_max(logits.shape[-1] - 1)[:, 0]


def _finished(ids: list[int], decoding: Decoding) -> bool:
    return ids[-1] == decoding.eos or (decoding.stopped is not None and decoding.stopped(ids))


def batches(n: int, size: int) -> Iterator[range]:
    """Consecutive ranges of at most `size` that cover `range(n)`."""
    return (range(i, min(i + size, n)) for i in range(0, n, size))

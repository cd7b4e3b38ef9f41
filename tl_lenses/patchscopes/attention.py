"""Edits of attention patterns that hide keys from queries."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_lenses import edits
from tl_lenses.hooks import pass_start


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
    pattern: Float[Tensor, "batch head query key"], cut: Bool[Tensor, "*batch query key"]
) -> Float[Tensor, "batch head query key"]:
    """A pattern without some edges, the rest of each query's attention scaled up to 1: the softmax without those keys.

    Queries without a cut edge keep their bits; a query whose edges are all cut gets zeros.
    """
    left = pattern.masked_fill(cut, 0.0)
    left = left / left.sum(-1, keepdim=True).clamp_min(torch.finfo(left.dtype).tiny)
    return torch.where(cut.any(-1, keepdim=True), left, pattern)


def hide_keys(columns: Sequence[int], rows: Callable[[], Tensor] | None = None, *, offset: int = 0) -> edits.Edit:
    """An edit of an attention pattern: later queries no longer see these columns, the rest of their attention is rescaled.

    `p'[q, k] = p[q, k] [k not hidden] / sum over k`, which is the softmax without those keys.

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

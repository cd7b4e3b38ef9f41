"""One step of tuned-lens training: residuals and teachers of a batch, loss and gradient of every layer, the clip."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses import divergence as D
from tl_lenses.data import Batch
from tl_lenses.fit.common import activations
from tl_lenses.hooks import Hook
from tl_lenses.model import LensModel
from tl_lenses.translators import Row
from tl_lenses.unembed import Readout


@dataclass(frozen=True)
class Head:
    """The frozen readout as a step uses it: the model's own norm, and `W_U` in the type of the products."""

    readout: Readout
    w_u: Float[Tensor, "d_model d_vocab"]
    b_u: Float[Tensor, " d_vocab"] | None
    transform: D.Transform | None


def head_of(readout: Readout, precision: D.Precision = "auto") -> Head:
    """The readout with its products in a precision; makes one copy of `W_U` where that is another type than the model's."""
    w_u, b_u = readout.weights()
    transform = readout.transform if readout.transforms() else None
    # In the layout it has: a second copy for the other product would save 5% of the time and cost as much memory again.
    return Head(readout, w_u.to(D.product_dtype(precision, w_u)), b_u, transform)


@dataclass(frozen=True)
class Pairs:
    """Positions to train on, and what each is scored against. Nothing is copied before a chunk is taken.

    Attributes:
        states: residuals of every row's source.
        at: which of the flattened positions are used.
        teacher: what the unembedding read there, `[pos, d_model]` (`hidden`), logits `[pos, d_vocab]`, or ids `[pos]`.
        scored: the teacher's position for each of `at`.
        hidden: whether `teacher` is the unembedding's input.
    """

    states: list[Float[Tensor, "pos d_in"]]
    at: Int[Tensor, " n"]
    teacher: Tensor
    scored: Int[Tensor, " n"]
    hidden: bool

    def __len__(self) -> int:
        return len(self.at)

    def take(self, part: slice, picks: Int[Tensor, "rows m"] | None = None) -> Float[Tensor, "rows m d_in"]:
        """States `[rows, m, d_in]`, fp32: of the part's positions, or of a row's own picks among them."""
        at = self.at[part]
        own = [at] * len(self.states) if picks is None else [at[one] for one in picks]
        # A model that is spread over devices has its states on several.
        taken = [states[one.to(states.device)].float() for states, one in zip(self.states, own, strict=True)]
        return torch.stack([states.to(self.teacher.device) for states in taken])


def scored_pairs(
    model: LensModel,
    batch: Batch,
    rows: list[Row],
    hooks: list[Hook],
    skip_first: bool,
    shift: int,
    loss: Literal["kl", "ce"],
    readout: Readout,
) -> Pairs:
    """One forward pass. Position t is scored against t + shift; positions that are not used, or have no partner, are left out."""
    read: list[Tensor] = []
    watched = [*hooks, *((name, None) for row in rows for name in row)]
    with readout.without_logits(read, watched):
        logits, seen, used, batch = activations(model, batch, rows, hooks, skip_first)
    width = batch.tokens.shape[1]
    b, t = used.nonzero(as_tuple=True)
    real = torch.ones_like(used) if batch.attention_mask is None else batch.attention_mask.bool()
    there = (t + shift >= 0) & (t + shift < width)
    b, t = b[there], t[there]
    there = real[b, t + shift]
    b, t = b[there], t[there]
    teacher = batch.tokens.to(logits.device) if loss == "ce" else read[0] if read else logits
    return Pairs(
        [seen[source].flatten(0, 1) for source, _ in rows],
        b * width + t,
        teacher.flatten(0, 1),
        (b * width + t + shift).to(teacher.device),
        bool(read) and loss == "kl",
    )


def loss_and_gradient(
    pairs: Pairs,
    delta: Float[Tensor, "rows d_out d_in"],
    biases: Float[Tensor, "rows d_out"],
    head: Head,
    grad_w: Float[Tensor, "rows d_out d_in"],
    grad_b: Float[Tensor, "rows d_out"],
    *,
    loss: Literal["kl", "ce"] = "kl",
    chunk_size: int | None = None,
    subsample: float = 1.0,
    seed: int = 0,
) -> Float[Tensor, " rows"]:
    """Sum over positions of each layer's loss; the gradients of that sum with respect to D and b are added to `grad_w, grad_b`.

    Autograd sees the final norm alone.

    Args:
        chunk_size: positions whose logits exist at a time.
        subsample: share of each chunk's positions that a layer is trained on, its own random ones, weighted so that the sum's
            expectation is the sum over all. The teacher is made for every position, once.
        seed: of the random positions.
    """
    losses = torch.zeros(len(delta), device=delta.device)
    generator = torch.Generator().manual_seed(seed % 2**63)
    fused = _fused(loss, pairs)
    for part in D.chunks(len(pairs), head.w_u.shape[1], head.w_u.dtype, head.w_u.device, chunk_size):
        size = part.stop - part.start
        teacher, picks = pairs.teacher[pairs.scored[part]], None
        if subsample < 1:
            kept = max(1, round(subsample * size))
            order = torch.rand(len(delta), size, generator=generator).argsort(-1)
            picks = order[:, :kept].to(teacher.device)
        x = pairs.take(part, picks)
        with torch.no_grad():
            y = torch.baddbmm(biases[:, None], x, delta.mT)
            if delta.shape[1] == delta.shape[2]:
                y += x
        y.requires_grad_()
        with torch.enable_grad():
            hidden = head.readout.norm(y.to(head.readout.dtype))
            each = fused(hidden, teacher, head, size, picks)
            (grad_y,) = torch.autograd.grad(each.sum(), y)
        losses += size * each.detach().to(losses)
        grad_w.baddbmm_(grad_y.mT, x, alpha=size)
        grad_b.add_(grad_y.sum(1), alpha=size)
    return losses


@torch.no_grad()
def summed_losses(
    pairs: Pairs,
    delta: Float[Tensor, "rows d_out d_in"],
    biases: Float[Tensor, "rows d_out"],
    head: Head,
    *,
    loss: Literal["kl", "ce"] = "kl",
    chunk_size: int | None = None,
) -> Float[Tensor, " rows"]:
    """Sum over positions of each layer's loss, without the gradient: half the cost."""
    losses = torch.zeros(len(delta), device=delta.device)
    for part in D.chunks(len(pairs), head.w_u.shape[1], head.w_u.dtype, head.w_u.device, chunk_size):
        x = pairs.take(part)
        y = torch.baddbmm(biases[:, None], x, delta.mT)
        hidden = head.readout.norm((y + x if delta.shape[1] == delta.shape[2] else y).to(head.readout.dtype))
        teacher, size = pairs.teacher[pairs.scored[part]], part.stop - part.start
        losses += size * _fused(loss, pairs)(hidden, teacher, head, size, None).to(losses)
    return losses


def _fused(loss: Literal["kl", "ce"], pairs: Pairs) -> Callable[..., Tensor]:
    """Mean loss per row of normed states."""

    def of(hidden: Tensor, teacher: Tensor, head: Head, size: int, picks: Tensor | None) -> Tensor:
        settings = {"transform": head.transform, "chunk_size": size, "picks": picks}
        if loss == "ce":
            return D.fused_ce(hidden, teacher, head.w_u, head.b_u, **settings)
        return D.fused_kl(hidden, teacher, head.w_u, head.b_u, teacher_hidden=pairs.hidden, **settings)

    return of


def clip_gradients(grad_w: Tensor, grad_b: Tensor, clip: float, joint: bool, bias_only: bool) -> None:
    """Scale gradients down to norm `clip`: per layer, or over all layers together as published."""
    squares = grad_b.norm(dim=-1) ** 2  # norms and not sums of squares: no second buffer of that size
    if not bias_only:
        squares = squares + torch.linalg.vector_norm(grad_w, dim=(-2, -1)) ** 2
    norm = (squares.sum().expand_as(squares) if joint else squares).sqrt()
    factor = (clip / norm.clamp_min(1e-12)).clamp_max(1.0)
    grad_w.mul_(factor[:, None, None])
    grad_b.mul_(factor[:, None])

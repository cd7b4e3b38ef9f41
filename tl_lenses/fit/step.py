"""One step of tuned-lens training: residuals and teachers of a batch, loss and gradient of every layer, the clip."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.data import Batch
from tl_lenses.divergence import fused_ce, fused_kl
from tl_lenses.fit.common import activations
from tl_lenses.hooks import Hook
from tl_lenses.model import LensModel
from tl_lenses.translators import Row
from tl_lenses.unembed import Readout


def scored_pairs(
    model: LensModel, batch: Batch, rows: list[Row], hooks: list[Hook], skip_first: bool, shift: int, loss: str
) -> tuple[Float[Tensor, "rows n d_in"], Tensor]:
    """Residuals of the positions to train on, and what each is scored against: logits `[n, d_vocab]` or ids `[n]`."""
    logits, seen, used, batch = activations(model, batch, rows, hooks, skip_first)
    width = batch.tokens.shape[1]
    b, t = used.nonzero(as_tuple=True)
    real = torch.ones_like(used) if batch.attention_mask is None else batch.attention_mask.bool()
    there = (t + shift >= 0) & (t + shift < width)
    b, t = b[there], t[there]
    there = real[b, t + shift]
    b, t = b[there], t[there]
    teacher = logits[b.to(logits.device), (t + shift).to(logits.device)] if loss == "kl" else batch.tokens[b, t + shift]
    picked = [seen[source] for source, _ in rows]  # on several devices, where the model is spread over them
    picked = [x[b.to(x.device), t.to(x.device)].float().to(logits.device) for x in picked]
    return torch.stack(picked), teacher.to(logits.device)


def loss_and_gradient(
    x: Float[Tensor, "rows n d_in"],
    teacher: Tensor,
    delta: Float[Tensor, "rows d_out d_in"],
    biases: Float[Tensor, "rows d_out"],
    readout: Readout,
    w_u: Tensor,
    b_u: Tensor | None,
    transform: Any,
    loss: str,
    chunk_size: int | None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows d_out d_in"], Float[Tensor, "rows d_out"]]:
    """Mean loss per layer and its gradient with respect to D and b. Autograd sees the final norm alone."""
    with torch.no_grad():
        y = torch.baddbmm(biases[:, None], x, delta.mT)
        if delta.shape[1] == delta.shape[2]:
            y = y + x
    y.requires_grad_()
    with torch.enable_grad():
        hidden = readout.norm(y.to(readout.dtype))
        fused = fused_kl if loss == "kl" else fused_ce
        losses = fused(hidden, teacher, w_u, b_u, transform=transform, chunk_size=chunk_size)
        (grad_y,) = torch.autograd.grad(losses.sum(), y)
    return losses.detach(), grad_y.mT @ x, grad_y.sum(1)


def clip_gradients(grad_w: Tensor, grad_b: Tensor, clip: float, joint: bool, bias_only: bool) -> None:
    """Scale gradients down to norm `clip`: per layer, or over all layers together as published."""
    squares = (grad_b**2).sum(-1) + (0 if bias_only else (grad_w**2).sum((-2, -1)))
    norm = (squares.sum().expand_as(squares) if joint else squares).sqrt()
    factor = (clip / norm.clamp_min(1e-12)).clamp_max(1.0)
    grad_w.mul_(factor[:, None, None])
    grad_b.mul_(factor[:, None])

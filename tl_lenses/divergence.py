"""Loss of a lens and its gradient from hidden states, fused: `[n, d_vocab]` logits exist for one chunk of one layer
at a time.

With student logits `z = h W_U + b_U`, teacher probabilities p and `q = softmax(z)`:

    KL(p || q) = sum p log p - sum p z + logsumexp z          d KL / d z = q - p          d KL / d h = (q - p) W_U^T

so the gradient is ready as soon as the loss is, and no graph over logits is kept. A chunk's teacher is shared by all
layers.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses import stats as S

Transform = Callable[[Tensor], Tensor]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        teacher: Tensor,
        w_u: Tensor,
        b_u: Tensor | None,
        transform: Transform | None,
        chunk_size: int | None,
    ) -> Tensor:
        rows, n, _ = hidden.shape
        wide = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
        losses = torch.zeros(rows, dtype=wide, device=hidden.device)
        grad = torch.empty_like(hidden)
        for part in S.chunks(n, w_u.shape[1], chunk_size):
            if teacher.ndim == 2:
                t = teacher[part].to(wide)
                p = t.softmax(-1)
                constant = (torch.linalg.vecdot(p, t) - _logsumexp(t, p)).sum()  # sum p log p
                del t
            else:
                p, constant = teacher[part], torch.zeros((), dtype=wide, device=hidden.device)
            for row in range(rows):
                z = hidden[row, part] @ w_u if b_u is None else torch.addmm(b_u, hidden[row, part], w_u)
                z = z.to(wide)
                raw = z
                z = raw if transform is None else transform(raw)
                g = z.softmax(-1)  # q, then q - p in its place
                said = torch.linalg.vecdot(p, z) if p.ndim == 2 else z.gather(-1, p[:, None])
                losses[row] += constant + _logsumexp(z, g).sum() - said.sum()
                if p.ndim == 2:
                    g -= p
                else:
                    g.scatter_add_(-1, p[:, None], torch.full_like(p[:, None], -1, dtype=g.dtype))
                if transform is not None:  # a soft cap or scale: its derivative on this chunk
                    with torch.enable_grad():
                        leaf = raw.detach().requires_grad_()
                        (g,) = torch.autograd.grad(transform(leaf), leaf, g)
                grad[row, part] = g.to(w_u.dtype) @ w_u.mT
        ctx.save_for_backward(grad.div_(n))
        return losses / n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        return grad * grads[0][:, None, None].to(grad), None, None, None, None, None


def _logsumexp(z: Tensor, q: Tensor) -> Tensor:
    """`logsumexp z` from `q = softmax z`: at the largest entry `log q = z - logsumexp z`, so no second exponential is needed."""
    return z.amax(-1) - q.amax(-1).log()


def _check(hidden: Tensor, n: int) -> None:
    if hidden.shape[1] != n or n == 0:
        raise ValueError(
            f"expected one teacher or target per position, at least one: got {n} for {hidden.shape[1]} positions"
        )


def fused_kl(
    hidden: Float[Tensor, "rows n d_model"],
    teacher_logits: Float[Tensor, "n d_vocab"],
    w_u: Float[Tensor, "d_model d_vocab"],
    b_u: Float[Tensor, " d_vocab"] | None = None,
    *,
    transform: Transform | None = None,
    chunk_size: int | None = None,
) -> Float[Tensor, " rows"]:
    """Mean `KL(softmax(teacher) || softmax(transform(hidden W_U + b_U)))` over positions, per row, nats.

    Differentiable with respect to `hidden` only (the model is frozen).

    Args:
        hidden: translated and normed residuals, one row per layer.
        teacher_logits: the model's own, in any float type.
        transform: what the model does to logits after the unembedding (soft cap, scale), elementwise; None for nothing.
        chunk_size: positions at a time.

    Source: Belrose et al. 2023 (Tuned Lens), equation 5; gradient as in the module's docstring.
    """
    _check(hidden, len(teacher_logits))
    return _Fused.apply(hidden, teacher_logits, w_u, b_u, transform, chunk_size)  # type: ignore[return-value]


def fused_ce(
    hidden: Float[Tensor, "rows n d_model"],
    targets: Int[Tensor, " n"],
    w_u: Float[Tensor, "d_model d_vocab"],
    b_u: Float[Tensor, " d_vocab"] | None = None,
    *,
    transform: Transform | None = None,
    chunk_size: int | None = None,
) -> Float[Tensor, " rows"]:
    """Mean cross entropy with target ids over positions, per row, nats. As `fused_kl` otherwise."""
    _check(hidden, len(targets))
    return _Fused.apply(hidden, targets, w_u, b_u, transform, chunk_size)  # type: ignore[return-value]

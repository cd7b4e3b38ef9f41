"""Loss of a lens and its gradient from hidden states, fused: `[n, d_vocab]` logits exist for one chunk of one layer at a time.

With student logits `z = h W_U + b_U`, teacher probabilities p and `q = softmax(z)`:

    KL(p || q) = sum p log p - sum p z + logsumexp z          d KL / d z = q - p          d KL / d h = (q - p) W_U^T

so the gradient is ready as soon as the loss is, and no graph over logits is kept. A chunk's teacher is shared by all layers.
The two products are the cost; what lies between them runs on blocks of rows that stay in the processor's cache.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses import stats as S

Transform = Callable[[Tensor], Tensor]
Precision = Literal["auto", "float32", "bfloat16"]

# Bytes of a chunk's student logits in the type of the product. On a CPU 180 rows of 50,257 bf16 logits: the product of
# fewer rows packs W_U too often (431 against 474 GFLOP/s at 128 and 256 rows, AVX512-bf16), and more rows hold more memory.
CHUNK = {"cpu": 18 * 2**20, "cuda": 256 * 2**20}
# Bytes of fp32 logits between the products that are worked on at once: in the second-level cache of each CPU core.
BLOCK = {"cpu": 3 * 2**19, "cuda": 64 * 2**20}


def product_dtype(precision: Precision, w_u: Tensor) -> torch.dtype:
    """The type of the vocabulary products. "auto" is bf16 where the hardware multiplies it, and the weights' own elsewhere.

    Half-precision weights keep their type: a wider copy would cost memory and add nothing.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"precision must be 'auto', 'float32' or 'bfloat16', got {precision!r}")
    if w_u.dtype in (torch.float16, torch.bfloat16) or (precision == "auto" and w_u.dtype == torch.float64):
        return w_u.dtype
    if precision == "bfloat16" or (precision == "auto" and has_bfloat16(w_u.device)):
        return torch.bfloat16
    return w_u.dtype


def has_bfloat16(device: torch.device) -> bool:
    """Whether bf16 products run on bf16 hardware, with fp32 accumulation, rather than emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private, so its absence means no
        return bool(probe and probe()) and torch.backends.mkldnn.is_available()
    return False


def chunks(n: int, d_vocab: int, dtype: torch.dtype, device: torch.device, size: int | None = None) -> Iterator[slice]:
    """Slices of positions, of about equal size, whose student logits fit in `CHUNK` bytes; or of `size` positions."""
    if size is None:
        most = max(1, CHUNK.get(device.type, CHUNK["cuda"]) // (dtype.itemsize * d_vocab))
        size = -(-n // max(1, -(-n // most))) or 1  # no small one at the end
    step = size
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


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
        teacher_hidden: bool,
        picks: Tensor | None,
    ) -> Tensor:
        rows, n, _ = hidden.shape
        wide = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
        losses = torch.zeros(rows, dtype=wide, device=hidden.device)
        grad = torch.empty(hidden.shape, dtype=wide, device=hidden.device)
        step = _block_rows(w_u)
        narrow = hidden.to(w_u.dtype)
        bias = None if b_u is None else b_u.to(wide)
        # A row's own picks are among all of the teacher's positions, so the teacher is one chunk then.
        whole = [slice(0, len(teacher))]
        for part in chunks(n, w_u.shape[1], w_u.dtype, w_u.device, chunk_size) if picks is None else whole:
            p, entropy = teacher[part], torch.zeros(len(teacher[part]), dtype=wide, device=hidden.device)
            if teacher.is_floating_point():
                p, entropy = _teacher(p, w_u if teacher_hidden else None, bias, transform, wide, step)
            used = part if picks is None else slice(0, n)
            z = torch.empty(used.stop - used.start, w_u.shape[1], dtype=w_u.dtype, device=w_u.device)
            for row in range(rows):
                own = None if picks is None else picks[row]
                torch.mm(narrow[row, used], w_u, out=z)
                losses[row] += (entropy if own is None else entropy[own]).sum()
                for at in range(0, len(z), step):  # z becomes q - p in its place
                    block = slice(at, at + step)
                    said = p[block] if own is None else p[own[block]]
                    losses[row] += _residual(z[block], said, bias, transform, wide)
                if ctx.needs_input_grad[0]:
                    grad[row, used] = (z @ w_u.mT).to(wide)
        ctx.save_for_backward(grad.div_(n))
        return losses / n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None, None, None]:  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        return grad * grads[0][:, None, None].to(grad), None, None, None, None, None, None, None


def _block_rows(w_u: Tensor) -> int:
    """Rows worked on at once; on a CPU as many for each thread, since each core has a cache of its own."""
    kind = w_u.device.type
    rows = max(1, BLOCK.get(kind, BLOCK["cuda"]) // (4 * w_u.shape[1]))
    return rows * torch.get_num_threads() if kind == "cpu" else rows


def _teacher(
    t: Tensor, w_u: Tensor | None, bias: Tensor | None, transform: Transform | None, wide: torch.dtype, step: int
) -> tuple[Tensor, Tensor]:
    """`p` and `sum p log p` per position, of logits or, with `w_u`, of what the unembedding reads."""
    z = t if w_u is None else t @ w_u
    p = torch.empty(z.shape, dtype=wide, device=z.device)
    entropy = torch.empty(len(z), dtype=wide, device=z.device)
    for at in range(0, len(z), step):
        block = slice(at, at + step)
        s = z[block].to(wide)
        if w_u is not None:
            s = s if bias is None else s + bias
            s = s if transform is None else transform(s)
        torch.softmax(s, -1, out=p[block])
        entropy[block] = S.expectation(p[block], s) - _logsumexp(s, p[block])
    return p, entropy


def _residual(out: Tensor, p: Tensor, bias: Tensor | None, transform: Transform | None, wide: torch.dtype) -> Tensor:
    """`sum (logsumexp z - sum p z)` of a block of logits, which are replaced by `q - p` (with the transform's derivative)."""
    raw = out.to(wide) if bias is None else out + bias
    z = raw if transform is None else transform(raw)
    g = z.softmax(-1)
    said = S.expectation(p, z) if p.ndim == 2 else z.gather(-1, p[:, None])[:, 0]
    loss = (_logsumexp(z, g) - said).sum()
    if p.ndim == 2:
        g -= p
    else:
        g.scatter_add_(-1, p[:, None], torch.full_like(p[:, None], -1, dtype=g.dtype))
    if transform is not None:  # a soft cap or scale
        with torch.enable_grad():
            leaf = raw.detach().requires_grad_()
            (g,) = torch.autograd.grad(transform(leaf), leaf, g)
    out.copy_(g)
    return loss


def _logsumexp(z: Tensor, q: Tensor) -> Tensor:
    """`logsumexp z` from `q = softmax z`: at the largest entry `log q = z - logsumexp z`, so no second exponential is needed."""
    return z.amax(-1) - q.amax(-1).log()


def _check(hidden: Tensor, n: int, picks: Tensor | None) -> None:
    if n == 0 or hidden.shape[1] != (n if picks is None else picks.shape[1]):
        wanted = "teacher or target" if picks is None else "pick"
        raise ValueError(
            f"expected one {wanted} per position, at least one: got {n if picks is None else picks.shape[1]} for {hidden.shape[1]} positions"
        )


def fused_kl(
    hidden: Float[Tensor, "rows n d_model"],
    teacher: Float[Tensor, "n_teacher d_teacher"],
    w_u: Float[Tensor, "d_model d_vocab"],
    b_u: Float[Tensor, " d_vocab"] | None = None,
    *,
    transform: Transform | None = None,
    chunk_size: int | None = None,
    teacher_hidden: bool = False,
    picks: Int[Tensor, "rows n"] | None = None,
) -> Float[Tensor, " rows"]:
    """Mean `KL(softmax(teacher) || softmax(transform(hidden W_U + b_U)))` over positions, per row, nats.

    Differentiable with respect to `hidden` only (the model is frozen). Products run in the type of `w_u` and accumulate in
    fp32; softmax, loss and the gradient with respect to `hidden` are fp32 (fp64 for fp64 states).

    Args:
        hidden: translated and normed residuals, one row per layer.
        teacher: the model's own logits `[n, d_vocab]` in any float type; or what its unembedding reads, see below.
        transform: what the model does to logits after the unembedding (soft cap, scale), elementwise; None for nothing.
        chunk_size: positions at a time.
        teacher_hidden: `teacher` is `[n, d_model]`, the unembedding's input, and its logits are made chunk by chunk too.
        picks: for each row the teacher's position of each of its states, where rows have positions of their own; the
            teacher is one chunk then.

    Source: Belrose et al. 2023 (Tuned Lens), equation 5; gradient as in the module's docstring.
    """
    _check(hidden, len(teacher), picks)
    wanted = w_u.shape[0] if teacher_hidden else w_u.shape[1]
    if teacher.shape[1] != wanted:
        raise ValueError(
            f"expected a teacher of width {wanted} ({'d_model' if teacher_hidden else 'd_vocab'}), got {teacher.shape[1]}: "
            "pass logits, or hidden states with teacher_hidden=True"
        )
    teacher = teacher.to(w_u.dtype) if teacher_hidden else teacher
    return _Fused.apply(hidden, teacher, w_u, b_u, transform, chunk_size, teacher_hidden, picks)  # type: ignore[return-value]


def fused_ce(
    hidden: Float[Tensor, "rows n d_model"],
    targets: Int[Tensor, " n_teacher"],
    w_u: Float[Tensor, "d_model d_vocab"],
    b_u: Float[Tensor, " d_vocab"] | None = None,
    *,
    transform: Transform | None = None,
    chunk_size: int | None = None,
    picks: Int[Tensor, "rows n"] | None = None,
) -> Float[Tensor, " rows"]:
    """Mean cross entropy with target ids over positions, per row, nats. As `fused_kl` otherwise."""
    _check(hidden, len(targets), picks)
    return _Fused.apply(hidden, targets, w_u, b_u, transform, chunk_size, False, picks)  # type: ignore[return-value]

"""Loss of a lens and its gradient from hidden states, fused: `[n, d_vocab]` logits exist for a few positions and layers at a time.

With student logits `z = h W_U + b_U`, teacher probabilities p, `q = softmax(z)`, and `m = W_U p` of the teacher alone:

    KL(p || q) = sum p log p - sum p z + logsumexp z,  sum p z = h m + p b_U      d KL / d z = q - p      d KL / d h = (q - p) W_U^T

so the gradient is ready as soon as the loss is, no graph over logits is kept, and `sum p z` costs nothing per layer. A chunk's
teacher is shared by all layers. The two products are the cost; what lies between them runs on blocks of rows that stay
in the processor's cache.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses import stats as S

Transform = Callable[[Tensor], Tensor]
Precision = Literal["auto", "float32", "bfloat16"]

# Bytes of student logits, in the type of the product, that exist at a time: on a CPU 417 rows of 50,257 in bf16. A product reads
# and rearranges all of W_U, so the rate grows with its rows: 1,315, 1,674, 2,105 and 2,215 GFLOP/s at 128, 256, 384 and 512 (two cores
# with AMX, `benchmarks/fit_throughput.py --profile`). So does the memory.
CHUNK = {"cpu": 40 * 2**20, "cuda": 256 * 2**20}
# Layers in one product, so that few positions need a teacher (fp32) at a time.
LAYERS = 6
# Bytes of fp32 logits between the products that are worked on at once: in the second-level cache of each CPU core.
BLOCK = {"cpu": 3 * 2**19, "cuda": 64 * 2**20}


def product_dtype(precision: Precision, w_u: Tensor) -> torch.dtype:
    """The type of the vocabulary products. "auto" is bf16 where the hardware multiplies it, and the weights' own elsewhere.

    Half-precision weights keep their type: a wider copy would cost memory and add nothing.
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


def tiles(
    rows: int, n: int, d_vocab: int, dtype: torch.dtype, device: torch.device, size: int | None = None,
    share: float = 1.0,
) -> Iterator[tuple[slice, list[slice]]]:  # fmt: skip
    """Slices of positions (of `size`), and for each the slices of layers whose student logits fit in `CHUNK` bytes together.

    Where each layer has but a `share` of the positions, more layers make a product.
    """
    groups = list(S.evenly(rows, round(LAYERS / share)))
    if size is None:
        room = CHUNK.get(device.type, CHUNK["cuda"]) / (dtype.itemsize * d_vocab)
        size = max(1, int(room / max(1, groups[0].stop * share)))  # the teacher of no more positions than that either
    return ((part, groups) for part in S.evenly(n, size))


@dataclass(frozen=True)
class Teacher:
    """What all layers are scored against at some positions."""

    p: Float[Tensor, "n d_vocab"] | Int[Tensor, " n"]  # the model's probabilities, or the target ids of a cross entropy
    # `sum p log p`, minus the part of `sum p z` that is the same for every layer; 0 for target ids
    negentropy: Float[Tensor, " n"]
    # `W_U p`, to take `sum p z` from; None where that comes from the logits
    mean: Float[Tensor, "n d_model"] | None = None
    # if given, the loss is computed from `h - state`, which avoids cancellation when a layer is nearly right;
    # `negentropy` then leaves out `state . mean`.
    state: Float[Tensor, "n d_model"] | None = None


def teacher_of(
    t: Tensor, w_u: Float[Tensor, "d_model d_vocab"], b_u: Float[Tensor, " d_vocab"] | None,
    transform: Transform | None, *, wide: torch.dtype = torch.float32, hidden: bool = False, exact: bool = True,
    room: Tensor | None = None,
) -> Teacher:  # fmt: skip
    """The teacher of target ids `[n]`, logits `[n, d_vocab]` or, with `hidden`, what the unembedding reads, `[n, d_model]`.

    Args:
        exact: False takes `sum p z` from `mean`, which saves a pass per layer. Of rounded logits the loss is then no longer that of the
            rounded distributions, in which rounding cancels to first order: in bf16 the mean over 500 positions is off by about 1e-3 nats.
            The gradient is the same.
        room: as in `score`.
    """
    if not t.is_floating_point():
        return Teacher(t, torch.zeros(len(t), dtype=wide, device=t.device))
    linear = transform is None and not exact
    t = t.to(w_u.dtype) if hidden else t
    buffer = None if room is None else room[: len(t)]
    z = torch.mm(t, w_u, out=buffer) if hidden else t
    p = torch.empty(z.shape, dtype=wide, device=z.device)
    negentropy = torch.empty(len(z), dtype=wide, device=z.device)
    bias = None if b_u is None else b_u.to(wide)
    for block in blocks(len(z), w_u):
        s = z[block].to(wide)
        if hidden:
            s = s if bias is None else s + bias
            s = s if transform is None else transform(s)
        torch.softmax(s, -1, out=p[block])
        # -logsumexp: at the largest entry log p = s - logsumexp s
        negentropy[block] = p[block].amax(-1).log() - s.amax(-1)
        if not (hidden and linear):
            negentropy[block] += S.expectation(p[block], s)
            if linear and bias is not None:  # the part of sum p z that is the bias'
                negentropy[block] -= S.expectation(p[block], bias.expand_as(s))
    mean = None
    if linear:
        narrow = p.to(w_u.dtype) if buffer is None or buffer.dtype == wide else buffer.copy_(p)
        mean = unembedded_back(narrow, w_u).to(wide)
    return Teacher(p, negentropy, mean, t.to(wide) if hidden and linear else None)


def score(
    hidden: Float[Tensor, "rows n d_model"], teacher: Teacher, w_u: Float[Tensor, "d_model d_vocab"],
    b_u: Float[Tensor, " d_vocab"] | None, transform: Transform | None, *, picks: Int[Tensor, "rows n"] | None = None,
    gradient: bool = True, room: Tensor | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows n d_model"] | None]:  # fmt: skip
    """Sum over positions of each row's loss, and its gradient with respect to `hidden`, all rows in one product.

    Args:
        picks: for each row the teacher's position of each of its states; the teacher's own positions in order if None.
        gradient: False leaves it out, and half of the cost.
        room: a reusable buffer for the logits, `[at least rows n, d_vocab]` in the type of `w_u`: saves allocating it at every call.
    """
    rows, n, d = hidden.shape
    wide = teacher.negentropy.dtype
    narrow = hidden.detach().to(w_u.dtype).reshape(rows * n, d)
    z = torch.mm(narrow, w_u, out=None if room is None else room[: rows * n])
    bias = None if b_u is None else b_u.to(wide)
    losses = torch.empty(rows, dtype=wide, device=hidden.device)
    for row in range(rows):
        positions = slice(0, n) if picks is None else picks[row]
        each = teacher.negentropy[positions]
        if teacher.mean is not None:
            h = narrow[row * n : row * n + n].to(wide)
            h = h if teacher.state is None else h - teacher.state[positions]
            each = each - torch.linalg.vecdot(h, teacher.mean[positions])
        losses[row] = each.sum()
        for block in blocks(n, w_u):
            p = teacher.p[block] if picks is None else teacher.p[picks[row, block]]
            out = z[row * n + block.start : row * n + block.stop]
            losses[row] += _residual(out, p, bias, transform, wide, teacher.mean is not None, gradient)
    if not gradient:
        return losses, None
    return losses, unembedded_back(z, w_u).to(wide).neg_().view(rows, n, d)


# Bytes of a left factor of at most 32 rows at which the matrix product of bf16 by AMX (oneDNN in torch 2.13, 2 MiB of L2) divides by zero.
_TRAP = 3 * 2**20


def unembedded_back(p: Float[Tensor, "n d_vocab"], w_u: Float[Tensor, "d_model d_vocab"]) -> Float[Tensor, "n d_model"]:
    """`p W_U^T`, in two products where one would end the process with a "Floating point exception": 6 rows of 262,144 or 32 of 49,152.

    Source: measured, docs/log.md of 2026-11-29.
    """
    if p.device.type == "cpu" and p.numel() * p.element_size() == _TRAP and 1 < len(p) <= 32:
        return torch.cat([p[:1] @ w_u.mT, p[1:] @ w_u.mT])
    return p @ w_u.mT


def blocks(n: int, w_u: Float[Tensor, "d_model d_vocab"]) -> Iterator[slice]:
    """Rows worked on at once; on a CPU as many for each thread, since each core has a cache of its own."""
    kind = w_u.device.type
    size = max(1, BLOCK.get(kind, BLOCK["cuda"]) // (4 * w_u.shape[1]))
    return S.evenly(n, size * torch.get_num_threads() if kind == "cpu" else size)


def _residual(
    out: Tensor, p: Tensor, bias: Tensor | None, transform: Transform | None, wide: torch.dtype, without_target: bool,
    gradient: bool,
) -> Tensor:  # fmt: skip
    """Sum of `logsumexp z`, minus `sum p z` unless `without_target`. Overwrites the logits with `p - q`."""
    raw = out.to(wide) if bias is None else out + bias  # in fp32 at once, without a pass for the cast
    z = raw if transform is None else transform(raw)
    largest = z.amax(-1, keepdim=True)
    loss = largest.sum()
    if not without_target:
        loss = loss - (S.expectation(p, z) if p.ndim == 2 else z.gather(-1, p[:, None])).sum()
    z = (z.sub_ if transform is None else z.sub)(largest).exp_()  # in place where no transform needs `raw` again
    total = z.sum(-1, keepdim=True)
    loss = loss + total.log().sum()
    if not gradient:
        return loss
    if p.ndim == 2:
        torch.addcmul(p, z, total.reciprocal(), value=-1, out=z)
    else:
        z.mul_(-total.reciprocal()).scatter_add_(-1, p[:, None], torch.ones_like(p[:, None], dtype=z.dtype))
    if transform is not None:  # a soft cap or scale
        with torch.enable_grad():
            leaf = raw.detach().requires_grad_()
            (z,) = torch.autograd.grad(transform(leaf), leaf, z)
    out.copy_(z)
    return loss


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
        needed = ctx.needs_input_grad[0]
        grad = torch.empty(hidden.shape if needed else 0, dtype=wide, device=hidden.device)
        # A row's own picks are among all of the teacher's positions, so the teacher is one chunk then.
        # Where logits are rounded, or nothing else is asked for, the loss is worth the pass.
        exact = not needed or w_u.dtype.itemsize < 4
        for part, groups in tiles(rows, n, w_u.shape[1], w_u.dtype, w_u.device, n if picks is not None else chunk_size):
            positions = part if picks is None else slice(None)
            at_part = teacher_of(teacher[positions], w_u, b_u, transform, wide=wide, hidden=teacher_hidden, exact=exact)
            for group in groups:
                picked = None if picks is None else picks[group]
                each, back = score(hidden[group, part], at_part, w_u, b_u, transform, picks=picked, gradient=needed)
                losses[group] += each
                if back is not None:
                    grad[group, part] = back
        ctx.save_for_backward(grad.div_(n))
        return losses / n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None, None, None]:  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        return grad * grads[0][:, None, None].to(grad), None, None, None, None, None, None, None


def _check(hidden: Tensor, n: int, picks: Tensor | None) -> None:
    if n == 0 or hidden.shape[1] != (n if picks is None else picks.shape[1]):
        kind = "teacher or target" if picks is None else "pick"
        raise ValueError(
            f"expected one {kind} per position, at least one: got {n if picks is None else picks.shape[1]} for {hidden.shape[1]} positions"
        )


def fused_kl(
    hidden: Float[Tensor, "rows n d_model"], teacher: Float[Tensor, "n_teacher d_teacher"],
    w_u: Float[Tensor, "d_model d_vocab"], b_u: Float[Tensor, " d_vocab"] | None = None, *,
    transform: Transform | None = None, chunk_size: int | None = None, teacher_hidden: bool = False,
    picks: Int[Tensor, "rows n"] | None = None,
) -> Float[Tensor, " rows"]:  # fmt: skip
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
    width = w_u.shape[0] if teacher_hidden else w_u.shape[1]
    if teacher.shape[1] != width:
        raise ValueError(
            f"expected a teacher of width {width} ({'d_model' if teacher_hidden else 'd_vocab'}), got {teacher.shape[1]}: "
            "pass logits, or hidden states with teacher_hidden=True"
        )
    return _Fused.apply(hidden, teacher, w_u, b_u, transform, chunk_size, teacher_hidden, picks)  # type: ignore[return-value]


def fused_ce(
    hidden: Float[Tensor, "rows n d_model"], targets: Int[Tensor, " n_teacher"], w_u: Float[Tensor, "d_model d_vocab"],
    b_u: Float[Tensor, " d_vocab"] | None = None, *, transform: Transform | None = None, chunk_size: int | None = None,
    picks: Int[Tensor, "rows n"] | None = None,
) -> Float[Tensor, " rows"]:  # fmt: skip
    """Mean cross entropy with target ids over positions, per row, nats. As `fused_kl` otherwise."""
    _check(hidden, len(targets), picks)
    return _Fused.apply(hidden, targets, w_u, b_u, transform, chunk_size, False, picks)  # type: ignore[return-value]

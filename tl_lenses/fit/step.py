"""One step of tuned-lens training: residuals and teachers of a batch, loss and gradient of every layer, the clip."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses import divergence as D
from tl_lenses import stats as S
from tl_lenses.fit.common import states
from tl_lenses.hooks import Hook
from tl_lenses.model import LensModel, device_of, hooked, prepared
from tl_lenses.tokens import Batch
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
    dtype = D.product_dtype(precision, w_u)
    return Head(readout, w_u if dtype == w_u.dtype else narrowed(w_u, dtype, centre=transform is None), b_u, transform)


def narrowed(w_u: Float[Tensor, "d_model d_vocab"], dtype: torch.dtype, *, centre: bool) -> Float[Tensor, "d_model d_vocab"]:
    """A copy in another type, contiguous; with `centre`, less its mean over the vocabulary.

    Softmax does not see what all logits have in common, but rounding does: GPT-2's logits lie around -100, where bf16 numbers are 0.5 apart.
    """
    narrow = torch.empty(w_u.shape, dtype=dtype, device=w_u.device)
    for rows in torch.arange(len(w_u)).split(32):  # no second copy in the wide type
        block = w_u[rows[0] : rows[-1] + 1]
        narrow[rows[0] : rows[-1] + 1] = block - block.mean(-1, keepdim=True) if centre else block
    return narrow


@dataclass(frozen=True)
class Pairs:
    """Positions to train on, and the target of each. Nothing is copied before a chunk is taken."""

    states: list[Float[Tensor, "pos d_in"]]  # residuals of every row's source
    at: Int[Tensor, " n"]  # which of the flattened positions are used
    teacher: Tensor  # the unembedding's input `[pos, d_model]` (`hidden`), logits `[pos, d_vocab]`, or ids `[pos]`
    scored: Int[Tensor, " n"]  # the teacher's position for each of `at`
    hidden: bool  # whether `teacher` is the unembedding's input

    def __len__(self) -> int:
        return len(self.at)

    def take(self, rows: slice, part: slice, picks: Int[Tensor, "rows m"] | None = None) -> Float[Tensor, "rows m d_in"]:
        """States of some rows, fp32: of the part's positions, or of each row's own picks among them."""
        at, device = self.at[part], self.teacher.device
        taken = []
        for i, x in enumerate(self.states[rows]):
            positions = at if picks is None else at[picks[i]]
            # A model that is spread over devices has its states on several.
            taken.append(x[positions.to(x.device)].float().to(device))
        return torch.stack(taken)


def translated(
    x: Float[Tensor, "rows n d_in"], delta: Float[Tensor, "rows d_out d_in"], biases: Float[Tensor, "rows d_out"]
) -> Float[Tensor, "rows n d_out"]:
    """`x + D x + b`, without the first where the widths differ."""
    y = torch.baddbmm(biases[:, None], x, delta.mT)
    return y.add_(x) if x.shape == y.shape else y


def normed(y: Float[Tensor, "rows n d_model"], head: Head) -> Float[Tensor, "rows n width"]:
    """By the model's own final norm."""
    return head.readout.norm(y.to(head.readout.dtype))


# Tokens of one forward pass: activations and residuals of no more exist at a time, and the passes are no slower.
PASS = {"cpu": 512, "cuda": 2**14}


def rows_at_once(model: LensModel, batch: Batch, hooks: list[Hook]) -> int:
    """Rows of one forward pass: of `PASS` tokens, or all where a hook, given or on the model, could see the batch."""
    if hooks or hooked(model):
        return len(batch.tokens)
    at_once = PASS.get(device_of(model).type, PASS["cuda"])
    return min(len(batch.tokens), max(1, at_once // max(1, batch.tokens.shape[1])))


def pieces(model: LensModel, batch: Batch, hooks: list[Hook]) -> Iterator[Batch]:
    """A batch as rows that are run one after the other."""
    n = rows_at_once(model, batch, hooks)
    if n == len(batch.tokens):
        yield batch
        return
    prepared(model, batch)  # errors name a row by its number in the batch
    for first in range(0, len(batch.tokens), n):
        yield batch.take(slice(first, first + n))


def most_passes(model: LensModel, batch: Batch, hooks: list[Hook], world: int) -> int:
    """Forward passes of the process with the most rows of a batch."""
    rows = -(-len(batch.tokens) // world)
    return -(-rows // rows_at_once(model, batch, hooks)) if rows else 0


def scored_pairs(
    model: LensModel, batch: Batch, rows: list[Row], hooks: list[Hook], skip_first: bool, shift: int,
    loss: Literal["kl", "ce"], readout: Readout,
) -> Pairs:  # fmt: skip
    """One forward pass, or stored states. Position t is scored against t + shift; positions that are not used, or have no partner, are left out."""
    names = [name for row in rows for name in row]
    output, seen, used, batch = states(model, batch, names, hooks, skip_first, readout)
    width = batch.tokens.shape[1]
    b, t = used.nonzero(as_tuple=True)
    real = torch.ones_like(used) if batch.attention_mask is None else batch.attention_mask.bool()
    there = (t + shift >= 0) & (t + shift < width)
    b, t = b[there], t[there]
    there = real[b, t + shift]
    b, t = b[there], t[there]
    teacher = batch.tokens.to(output.x.device) if loss == "ce" else output.x
    return Pairs(
        [seen[source].flatten(0, 1) for source, _ in rows], b * width + t, teacher.flatten(0, 1),
        (b * width + t + shift).to(teacher.device), output.hidden and loss == "kl",
    )  # fmt: skip


def loss_and_gradient(
    pairs: Pairs, delta: Float[Tensor, "rows d_out d_in"], biases: Float[Tensor, "rows d_out"], head: Head,
    grad_w: Float[Tensor, "rows d_out d_in"], grad_b: Float[Tensor, "rows d_out"], *, chunk_size: int | None = None,
    subsample: float = 1.0, seed: int = 0, exact: bool = False,
) -> Float[Tensor, " rows"]:  # fmt: skip
    """Sum over positions of each layer's loss; the gradients of that sum with respect to D and b are added to `grad_w, grad_b`.

    Autograd sees the final norm alone. `pairs` says which loss: ids are a cross entropy's.

    Args:
        chunk_size: positions whose logits, of up to `divergence.LAYERS` layers, exist at a time.
        subsample: share of each chunk's positions that a layer is trained on, its own random ones, weighted so that the sum's
            expectation is the sum over all. The teacher is made for every position, once.
        seed: of the random positions.
        exact: for losses with more digits where products are bf16, at the cost of a pass (`divergence.teacher_of`).
    """
    return _losses(pairs, delta, biases, head, (grad_w, grad_b), chunk_size, subsample, seed, exact)


@torch.no_grad()
def summed_losses(
    pairs: Pairs,
    delta: Float[Tensor, "rows d_out d_in"],
    biases: Float[Tensor, "rows d_out"],
    head: Head,
    *,
    chunk_size: int | None = None,
) -> Float[Tensor, " rows"]:
    """Sum over positions of each layer's loss, without the gradient: half the cost."""
    return _losses(pairs, delta, biases, head, None, chunk_size)


def _losses(
    pairs: Pairs, delta: Tensor, biases: Tensor, head: Head, grads: tuple[Tensor, Tensor] | None, chunk_size: int | None,
    subsample: float = 1.0, seed: int = 0, exact: bool = True,
) -> Float[Tensor, " rows"]:  # fmt: skip
    """The losses, and with `grads` their gradients, added to these."""
    losses, rooms, w_u = torch.zeros(len(delta), device=delta.device), S.Rooms(), head.w_u
    generator = torch.Generator().manual_seed(seed % 2**63)
    wide = torch.float64 if w_u.dtype == torch.float64 else torch.float32
    for part, groups in D.tiles(len(delta), len(pairs), w_u.shape[1], w_u.dtype, w_u.device, chunk_size, subsample):
        size = part.stop - part.start
        picks, kept = None, size
        if subsample < 1:
            kept = max(1, round(subsample * size))
            order = torch.rand(len(delta), size, generator=generator).argsort(-1)
            picks = order[:, :kept].to(pairs.teacher.device)
        room = rooms.rows("logits", max(size, kept * groups[0].stop), w_u.shape[1], w_u.dtype, w_u.device)
        scored = pairs.teacher[pairs.scored[part]]
        teacher = D.teacher_of(scored, w_u, head.b_u, head.transform, wide=wide, hidden=pairs.hidden, exact=exact, room=room)
        for group in groups:
            picked = None if picks is None else picks[group]
            x = pairs.take(group, part, picked)
            y = translated(x, delta[group], biases[group]).requires_grad_(grads is not None)
            with torch.set_grad_enabled(grads is not None):
                hidden = normed(y, head)
            each, back = D.score(
                hidden, teacher, w_u, head.b_u, head.transform, picks=picked, gradient=grads is not None, room=room
            )
            weight = size / kept
            if grads is not None and back is not None:
                (grad,) = torch.autograd.grad(hidden, y, back.to(hidden.dtype))
                grads[0][group].baddbmm_(grad.mT, x, alpha=weight)
                grads[1][group].add_(grad.sum(1), alpha=weight)
            losses[group] += weight * each.to(losses)
        del teacher  # before the next one is made
    return losses


def clip_gradients(grad_w: Tensor, grad_b: Tensor, clip: float, joint: bool, bias_only: bool) -> None:
    """Scale gradients down to norm `clip`: per layer, or over all layers together as published."""
    squares = grad_b.norm(dim=-1) ** 2  # norms and not sums of squares: no second buffer of that size
    if not bias_only:
        squares = squares + torch.linalg.vector_norm(grad_w, dim=(-2, -1)) ** 2
    norm = (squares.sum().expand_as(squares) if joint else squares).sqrt()
    factor = (clip / norm.clamp_min(1e-12)).clamp_max(1.0)
    grad_w.mul_(factor[:, None, None])
    grad_b.mul_(factor[:, None])

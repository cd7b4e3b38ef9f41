"""A step that scores layers on a sample of the vocabulary, weighted so that sums over it estimate sums over the whole.

Of `KL(p || q) = sum p log p - sum p z + logsumexp z` only the last term needs a layer's logits of every token: `sum p z = h . W_U p` has a
teacher's part that all layers share. Over a sample `A` with weights `w`

    Z = sum_A w exp z,    E[Z] = sum_V exp z,    dL/dh = sum_A (w exp z / Z) W_U - W_U p

`A` holds the teacher's most likely tokens of every position, weight 1, and draws from the rest with probabilities `pi`, weight `1 / (n pi)`.
`log Z` is low by about `Var[Z] / (2 Z^2)`; docs/log.md has the measured size. Bengio & Senecal 2003 (Quick training of probabilistic
neural nets by importance sampling) estimate the same gradient; Jean et al. 2015 (On using very large target vocabulary), section 3.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses import divergence as D
from tl_lenses.fit.step import Head, Pairs, normed, translated

TOP = 16  # most likely tokens of the teacher, of each position
DRAWS = 2048  # from the others, for all positions of a forward pass
UNIFORM = 0.1  # share of the draws that every token has the same chance in; the teacher's mean gives the rest


@dataclass(frozen=True)
class Sample:
    """Some tokens of the vocabulary, and what each stands for."""

    ids: Int[Tensor, " m"]  # the tokens
    # 0 where a token is sure to be in, `log(times drawn / (draws * probability))` where it was drawn
    log_weights: Float[Tensor, " m"]


def sample_of(p_mean: Float[Tensor, " d_vocab"], sure: Int[Tensor, " k"], draws: int, generator: torch.Generator) -> Sample:
    """The tokens `sure`, and draws from the others with `pi = (1 - UNIFORM) p_mean + UNIFORM / d_vocab`, one in each of `draws` equal strata."""
    pi = (1 - UNIFORM) * p_mean.double() / p_mean.double().sum() + UNIFORM / len(p_mean)
    pi[sure] = 0.0
    total = pi.cumsum(0)
    strata = torch.arange(draws, dtype=torch.float64) + torch.rand(draws, dtype=torch.float64, generator=generator)
    at = (strata / draws).to(pi.device) * total[-1]
    drawn, times = torch.searchsorted(total, at, right=True).clamp_(max=len(pi) - 1).unique(return_counts=True)
    there = pi[drawn] > 0  # rounding at the edge of a stratum could name a token of no weight
    drawn, times = drawn[there], times[there]
    log_weights = (times / (draws * pi[drawn] / total[-1])).log()
    return Sample(torch.cat([sure, drawn]), torch.cat([log_weights.new_zeros(len(sure)), log_weights]).float())


@dataclass(frozen=True)
class Marks:
    """What a layer is scored against, of every position of a forward pass; made once for all layers."""

    # negentropy, mean, state: as in `divergence.Teacher`
    negentropy: Float[Tensor, " n"]
    mean: Float[Tensor, "n d_model"]
    state: Float[Tensor, "n d_model"] | None
    likely: Int[Tensor, "n k"]  # the teacher's most likely tokens
    p_mean: Float[Tensor, " d_vocab"]  # its mean probabilities


def marks_of(pairs: Pairs, head: Head, chunk_size: int | None = None) -> Marks:
    """The teacher over the whole vocabulary, chunk by chunk."""
    d_vocab, k = head.w_u.shape[1], min(TOP, head.w_u.shape[1])
    wide = torch.float64 if head.w_u.dtype == torch.float64 else torch.float32
    parts, p_mean = [], torch.zeros(d_vocab, dtype=wide, device=head.w_u.device)
    for part, _ in D.tiles(1, len(pairs), d_vocab, head.w_u.dtype, head.w_u.device, chunk_size):
        states = pairs.teacher[pairs.scored[part]]
        teacher = D.teacher_of(states, head.w_u, head.b_u, None, wide=wide, hidden=pairs.hidden, exact=False)
        p_mean += teacher.p.sum(0) / len(pairs)
        parts.append((teacher.negentropy, teacher.mean, teacher.state, teacher.p.topk(k, -1).indices))
        del teacher  # before the next one is made
    negentropy, mean, state, likely = zip(*parts, strict=True)
    return Marks(torch.cat(negentropy), torch.cat(mean), torch.cat(state) if pairs.hidden else None, torch.cat(likely), p_mean)


def score_sampled(
    hidden: Float[Tensor, "rows n d_model"],
    marks: Marks,
    w_u: Float[Tensor, "d_model m"],
    logit_bias: Float[Tensor, " m"],
    picks: Int[Tensor, "rows n"] | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows n d_model"]]:
    """Estimates of each row's sum of losses, and its gradient with respect to `hidden`.

    Args:
        w_u, logit_bias: columns of the sample's tokens; the unembedding's bias plus the log weights.
    """
    narrow = hidden.detach().to(w_u.dtype)
    wide = marks.negentropy.dtype
    z = (narrow.flatten(0, 1) @ w_u).to(wide).add_(logit_bias)
    each = torch.logsumexp(z, -1)
    q = torch.exp(z.sub_(each[:, None])).to(w_u.dtype)
    every = slice(None) if picks is None else picks
    mean = marks.mean[every]
    apart = narrow.to(wide) if marks.state is None else narrow.to(wide) - marks.state[every]
    losses = (each.view(hidden.shape[:2]) + marks.negentropy[every] - (apart * mean).sum(-1)).sum(-1)
    return losses, (q @ w_u.mT).to(wide).view(hidden.shape).sub_(mean)


def sampled_loss_and_gradient(
    pairs: Pairs, delta: Float[Tensor, "rows d_out d_in"], biases: Float[Tensor, "rows d_out"], head: Head,
    grad_w: Float[Tensor, "rows d_out d_in"], grad_b: Float[Tensor, "rows d_out"], *, chunk_size: int | None = None,
    subsample: float = 1.0, seed: int = 0,
) -> Float[Tensor, " rows"]:  # fmt: skip
    """`step.loss_and_gradient`, estimated: what is added to `grad_w, grad_b`, and the losses, are sums over the positions."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    marks = marks_of(pairs, head, chunk_size)
    sample = sample_of(marks.p_mean, marks.likely.unique(), DRAWS, generator)
    w_u = head.w_u[:, sample.ids]
    bias = sample.log_weights if head.b_u is None else sample.log_weights + head.b_u[sample.ids].float()
    picks, size, kept = None, len(pairs), len(pairs)
    if subsample < 1:
        kept = max(1, round(subsample * size))
        picks = torch.rand(len(delta), size, generator=generator).argsort(-1)[:, :kept].to(pairs.teacher.device)
    losses = torch.zeros(len(delta), device=delta.device)
    for row in range(len(delta)):
        group, picked = slice(row, row + 1), None if picks is None else picks[row : row + 1]
        x = pairs.take(group, slice(0, size), picked)
        y = translated(x, delta[group], biases[group]).requires_grad_()
        with torch.enable_grad():
            hidden = normed(y, head)
        each, back = score_sampled(hidden, marks, w_u, bias, picked)
        (grad,) = torch.autograd.grad(hidden, y, back.to(hidden.dtype))
        grad_w[group].baddbmm_(grad.mT, x, alpha=size / kept)
        grad_b[group].add_(grad.sum(1), alpha=size / kept)
        losses[group] += size / kept * each.to(losses)
    return losses

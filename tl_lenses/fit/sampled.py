"""A step that scores teacher and layers on a sample of the vocabulary, weighted so that sums over it estimate sums over the whole.

With a sample `A` and weights `w`, both distributions are restricted to `A` and made whole again:

    p' = w exp t / sum_A w exp t,    q' = w exp z / sum_A w exp z,    loss = KL(p' || q'),    dL/dz = q' - p'

so a sample is a narrower unembedding, the columns `A` of `W_U` with the bias `log w`, and a step is the exact one with it. Draws change p' and q'
alike, so where a layer is nearly right loss and gradient hardly depend on them. `A` holds the teacher's most likely tokens of every position,
weight 1, and draws from the rest with probabilities `pi`, weight `1 / (n pi)`; docs/log.md has the measured bias. Bengio & Senecal 2003 (Quick
training of probabilistic neural nets by importance sampling) estimate the same gradient; Jean et al. 2015 (On using very large target
vocabulary), section 3, restrict the softmax as here.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses import divergence as D
from tl_lenses import stats as S
from tl_lenses.decode import most_rows
from tl_lenses.fit.step import Head, Pairs
from tl_lenses.unembed import by_columns

TOP = 8  # most likely tokens of the teacher, of each position
DRAWS = 1024  # from the others, for all positions of a forward pass
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


def likely(pairs: Pairs, head: Head, chunk_size: int | None = None) -> tuple[Int[Tensor, " k"], Float[Tensor, " d_vocab"]]:
    """The teacher's most likely tokens of all positions, and its mean probabilities: one product with the whole vocabulary, chunk by chunk."""
    w_u, d_vocab = head.w_u, head.w_u.shape[1]
    wide = torch.float64 if w_u.dtype == torch.float64 else torch.float32
    rooms, tops, p_sum = S.Rooms(), [], torch.zeros(d_vocab, dtype=wide, device=w_u.device)
    for part in S.evenly(len(pairs), chunk_size or most_rows(w_u)):
        t = pairs.teacher[pairs.scored[part]]
        if pairs.hidden:
            t = by_columns(t.to(w_u.dtype), w_u, None, rooms.rows("logits", len(t), d_vocab, w_u.dtype, w_u.device))
        for block in D.blocks(len(t), w_u):
            z = t[block].to(wide)
            if pairs.hidden:
                z = z if head.b_u is None else z + head.b_u
                z = z if head.transform is None else head.transform(z)
            tops.append(S.largest(z, min(TOP, d_vocab))[0].unique())
            p_sum += torch.softmax(z, -1).sum(0)
    return torch.cat(tops).unique(), p_sum / len(pairs)


def on_sample(pairs: Pairs, head: Head, seed: int, chunk_size: int | None = None) -> tuple[Pairs, Head]:
    """The same positions and a readout of sampled tokens alone: their exact loss and gradient are the estimates."""
    sure, p_mean = likely(pairs, head, chunk_size)
    sample = sample_of(p_mean, sure, DRAWS, torch.Generator().manual_seed(seed % 2**63))
    ids, weights, transform = sample.ids, sample.log_weights.to(p_mean.dtype), head.transform
    if not pairs.hidden:
        pairs = replace(pairs, teacher=pairs.teacher[:, ids] + weights)
    b_u = None if head.b_u is None else head.b_u[ids].to(p_mean.dtype)
    if transform is None:
        return pairs, replace(head, w_u=head.w_u[:, ids], b_u=weights if b_u is None else b_u + weights)
    return pairs, replace(head, w_u=head.w_u[:, ids], b_u=b_u, transform=lambda z: transform(z) + weights)

"""Aitchison's geometry of probability distributions: a vector space with an inner product, from log-probabilities.

    p + q   is  perturb:     softmax(log p + log q)                    zero is the uniform distribution
    a * p   is  power:       softmax(a log p)
    clr_w(p)_i = log p_i - sum_j w_j log p_j
    <p, q>_w   = sum_i w_i clr_w(p)_i clr_w(q)_i

Everything takes and gives log-probabilities `[..., d_vocab]`; logits do as well, since a constant along the vocabulary changes
nothing. Weights are probabilities (they sum to 1); None is uniform, 1 / d_vocab each, which is the textbook's geometry with squared
lengths divided by d_vocab. What has weight 0 counts for nothing, whatever its log-probability.

Source: Aitchison 1986, Egozcue and Pawlowsky-Glahn 2016 (weights); Belrose et al. 2023 (Tuned Lens), section 4.2.
"""

import torch
from jaxtyping import Float
from torch import Tensor

Logs = Float[Tensor, "*pos d_vocab"]
TINY = 1e-8


def perturb(logp: Logs, logq: Logs) -> Logs:
    """`p + q`: the normalised product.

    >>> perturb(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.2, 0.8]).log()).exp()
    tensor([0.2000, 0.8000])
    """
    return (logp + logq).log_softmax(-1)


def subtract(logp: Logs, logq: Logs) -> Logs:
    """`p - q = softmax(log p - log q)`: what turns q into p."""
    return (logp - logq).log_softmax(-1)


def power(logp: Logs, a: float | Tensor) -> Logs:
    """`a * p`: softmax at temperature 1 / a.

    >>> power(torch.tensor([0.2, 0.8]).log(), 0.0).exp()
    tensor([0.5000, 0.5000])
    """
    return (a * logp).log_softmax(-1)


def clr(logp: Logs, w: Logs | None = None) -> Logs:
    """Weighted centred log-ratio, `log p_i - sum_j w_j log p_j`: linear, and the same for logits."""
    return logp - (logp.mean(-1, keepdim=True) if w is None else _sum(w, logp)[..., None])


def coordinates(logp: Logs, w: Logs | None = None) -> Logs:
    """`sqrt(w_i) clr_w(p)_i`: an isometry to Euclid's geometry."""
    x = clr(logp, w)
    return x / x.shape[-1] ** 0.5 if w is None else torch.where(w > 0, w.sqrt() * x, 0.0)


def inner(logp: Logs, logq: Logs, w: Logs | None = None) -> Float[Tensor, "*pos"]:
    """`<p, q>_w`.

    >>> p = torch.tensor([0.2, 0.8]).log()
    >>> torch.allclose(inner(p, p), (torch.log(torch.tensor(4.0)) / 2) ** 2)
    True
    """
    x, y = clr(logp, w), clr(logq, w)
    return (x * y).mean(-1) if w is None else _sum(w, x * y)


def norm(logp: Logs, w: Logs | None = None) -> Float[Tensor, "*pos"]:
    """`|p|_w`, 0 for the uniform distribution; nats."""
    return inner(logp, logp, w).clamp_min(0).sqrt()


def distance(logp: Logs, logq: Logs, w: Logs | None = None) -> Float[Tensor, "*pos"]:
    """`|p - q|_w`, nats."""
    return norm(logp - logq, w)


def similarity(logp: Logs, logq: Logs, w: Logs | None = None) -> Float[Tensor, "*pos"]:
    """Cosine, `<p, q>_w / max(|p|_w |q|_w, 1e-8)`: 1 where one is a positive power of the other."""
    return inner(logp, logq, w) / (norm(logp, w) * norm(logq, w)).clamp_min(TINY)


def _sum(w: Logs, x: Logs) -> Float[Tensor, "*pos"]:
    return torch.where(w > 0, w * x, 0.0).sum(-1)

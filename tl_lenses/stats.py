"""Logits to numbers. Every function takes `[..., d_vocab]` and gives one fp32 number per position (nats, unless said).

Log-probabilities are fp32 whatever the model's type. Where a probability is 0 its term is 0, so vocabularies padded with
-inf are fine.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Bytes of one [positions, d_vocab] fp32 buffer. Up to nine are alive at a time; measured in benchmarks/trajectory.py.
CHUNK_BYTES = 6 * 2**20
# Neighbours in the vocabulary of which only the largest is compared with others, to find the likeliest tokens.
GROUP = 64


def chunks(n: int, d_vocab: int, size: int | None = None) -> Iterator[slice]:
    """Slices of positions whose logits fit in a buffer of `CHUNK_BYTES` (or `size` positions each)."""
    size = size or max(1, CHUNK_BYTES // (4 * d_vocab))
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


def evenly(n: int, most: int) -> Iterator[slice]:
    """Slices of about equal size, at most `most` long: no small one at the end."""
    size = -(-n // max(1, -(-n // most))) or 1
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


class Rooms:
    """Tensors by name that are written again for every piece: a fresh one of some MiB costs the page faults of all its memory.

    >>> rooms = Rooms(); rooms.like("q", torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def rows(self, name: str, n: int, width: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "n width"]:
        """A tensor of this size; its content is what the last call with this name was used for."""
        kept = self._kept.get(name)
        if kept is None or len(kept) < n or (kept.shape[1], kept.dtype, kept.device) != (width, dtype, device):
            self._kept[name] = kept = torch.empty(n, width, dtype=dtype, device=device)
        return kept[:n]

    def like(self, name: str, x: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n d_vocab"]:
        """One of this shape, fp32 (fp64 for fp64)."""
        n, width = x.shape
        return self.rows(name, n, width, torch.float64 if x.dtype == torch.float64 else torch.float32, x.device)


def log_probs(logits: Float[Tensor, "*pos d_vocab"]) -> Float[Tensor, "*pos d_vocab"]:
    """`log softmax(logits)` in fp32 (fp64 stays).

    The sum of exponentials is made again: torch's adds one after the other, and is 1e-5 off at 262,144 tokens.
    """
    logp = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    return logp - logp.detach().exp().sum(-1, keepdim=True).log()


def probs(
    logits: Float[Tensor, "*pos d_vocab"], room: Float[Tensor, "*pos d_vocab"] | None = None
) -> Float[Tensor, "*pos d_vocab"]:
    """`softmax(logits)`, as exact as `log_probs`, without a gradient; written into `room` where one is given."""
    z = logits.detach()
    p = torch.softmax(z if z.dtype == torch.float64 else z.float(), -1, out=room)
    return p.div_(p.sum(-1, keepdim=True))


def distribution(
    logits: Float[Tensor, "n d_vocab"], rooms: tuple[Float[Tensor, "n d_vocab"] | None, Float[Tensor, "n d_vocab"] | None] = (None, None)
) -> tuple[Float[Tensor, "n d_vocab"], Float[Tensor, "n d_vocab"]]:  # fmt: skip
    """`log_probs` and `probs`, `p = softmax z` and `log p = z - max z + log max p`, written into `rooms` where they are given.

    One exponential a number, which is what takes time on a CPU; the largest of p is `1 / sum exp(z - max z)`.
    """
    z, p = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)), probs(logits, rooms[1])
    return torch.sub(z, z.amax(-1, keepdim=True), out=rooms[0]).add_(p.amax(-1, keepdim=True).log()), p


def expectation(
    p: Float[Tensor, "*pos d_vocab"], x: Float[Tensor, "*pos d_vocab"], room: Float[Tensor, "*pos d_vocab"] | None = None
) -> Float[Tensor, "*pos"]:  # fmt: skip
    """`sum p x`, where a probability of 0 gives 0 whatever x is (0 times infinity is not a number). `room` is overwritten."""
    value = torch.mul(p, x, out=room).sum(-1)
    return torch.where(p > 0, p * x, 0.0).sum(-1) if value.isnan().any() else value


def entropy(
    logp: Float[Tensor, "*pos d_vocab"],
    p: Float[Tensor, "*pos d_vocab"] | None = None,
    room: Float[Tensor, "*pos d_vocab"] | None = None,
) -> Float[Tensor, "*pos"]:
    """`H(p) = -sum p log p`; `p` saves the exponential where it is at hand. `room` is overwritten."""
    return -expectation(logp.exp() if p is None else p, logp, room)


def kl(
    logp: Float[Tensor, "*pos d_vocab"],
    logq: Float[Tensor, "*pos d_vocab"],
    p: Float[Tensor, "*pos d_vocab"] | None = None,
    room: Float[Tensor, "*pos d_vocab"] | None = None,
) -> Float[Tensor, "*pos"]:
    """`KL(p || q) = sum p (log p - log q)`; p is the model, q the lens, for the tuned lens' loss. `room` is overwritten.

    Source: Belrose et al. 2023 (Tuned Lens), equation 5.
    """
    p = logp.exp() if p is None else p
    value = torch.sub(logp, logq, out=room).mul_(p).sum(-1)
    return expectation(p, logp - logq) if value.isnan().any() else value


def js(logp: Float[Tensor, "*pos d_vocab"], logq: Float[Tensor, "*pos d_vocab"]) -> Float[Tensor, "*pos"]:
    """Jensen-Shannon divergence, `(KL(p || m) + KL(q || m)) / 2` with `m = (p + q) / 2`; at most log 2.

    Source: Lin 1991. (The tuned-lens package's function of this name is half the symmetrised KL, which is another
    number.)
    """
    logm = torch.logaddexp(logp, logq) - torch.log(torch.tensor(2.0, dtype=logp.dtype, device=logp.device))
    return (kl(logp, logm) + kl(logq, logm)) / 2


def tv(logp: Float[Tensor, "*pos d_vocab"], logq: Float[Tensor, "*pos d_vocab"]) -> Float[Tensor, "*pos"]:
    """Total variation, `sum |p - q| / 2`; between 0 and 1."""
    return (logp.exp() - logq.exp()).abs().sum(-1) / 2


def target_logprob(logp: Float[Tensor, "*pos d_vocab"], targets: Int[Tensor, "*pos"]) -> Float[Tensor, "*pos"]:
    """`log p(target)`, NaN where the target is -1."""
    return target_logprobs(logp, targets[..., None])[..., 0]


def target_logprobs(logp: Float[Tensor, "*pos d_vocab"], targets: Int[Tensor, "*pos k"]) -> Float[Tensor, "*pos k"]:
    """`log p` of several tokens of each row, NaN where one is -1."""
    return torch.where(targets >= 0, logp.gather(-1, targets.clamp_min(0)), torch.nan)


def rank(logits: Float[Tensor, "*pos d_vocab"], targets: Int[Tensor, "*pos"]) -> Int[Tensor, "*pos"]:
    """1 for the top token; ties count strictly larger logits. -1 where the target is -1."""
    return ranks(logits.flatten(0, -2), targets.reshape(-1, 1), Rooms()).view(targets.shape)


def ranks(logits: Float[Tensor, "n d_vocab"], targets: Int[Tensor, "n k"], rooms: Rooms) -> Int[Tensor, "n k"]:
    """`rank` of several tokens of each row, one comparison at a time: no more numbers than `logits` has."""
    picked = logits.gather(1, targets.clamp_min(0))
    larger = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    # Ones in fp32, exact up to 2^24 tokens: a sum of booleans takes three times as long.
    n, d_vocab = logits.shape
    room = rooms.rows("larger", n, d_vocab, torch.float32, logits.device)
    for i in range(targets.shape[1]):
        torch.sum(torch.gt(logits, picked[:, i : i + 1], out=room), -1, out=larger[:, i])
    return torch.where(targets >= 0, larger.long() + 1, -1)


def top_k(
    logits: Float[Tensor, "*pos d_vocab"], k: int, room: Float[Tensor, "*pos d_vocab"] | None = None
) -> tuple[Int[Tensor, "*pos k"], Float[Tensor, "*pos k"]]:
    """Ids and probabilities of the k likeliest tokens, best first. `room` is overwritten."""
    ids, _ = largest(logits, min(k, logits.shape[-1]))
    return ids, probs(logits, room).gather(-1, ids)


def largest(x: Float[Tensor, "*pos d_vocab"], k: int) -> tuple[Int[Tensor, "*pos k"], Float[Tensor, "*pos k"]]:
    """Indices and values of the k largest, best first, as `topk` gives them; of equal values either may come first.

    The k largest are among the k groups of `GROUP` neighbours whose own largest are the largest, so that one pass for the maxima
    and a sort of few values are enough.
    """
    whole = x.shape[-1] // GROUP * GROUP
    if k == 0 or x.shape[-1] < 2 * GROUP * k:
        top = x.topk(k, dim=-1)
        return top.indices, top.values
    maxima = x[..., :whole].unflatten(-1, (-1, GROUP)).amax(-1)
    groups = maxima.topk(k, dim=-1).indices
    ids = (groups[..., None] * GROUP + torch.arange(GROUP, device=x.device)).flatten(-2)
    rest = torch.arange(whole, x.shape[-1], device=x.device).expand(*x.shape[:-1], -1)
    ids = torch.cat([ids, rest], -1)
    top = x.gather(-1, ids).topk(k, dim=-1)
    return ids.gather(-1, top.indices), top.values


def likeliest(x: Float[Tensor, "*pos d_vocab"]) -> Int[Tensor, "*pos"]:
    """Index of the largest."""
    return largest(x, 1)[0][..., 0]


def pairwise(
    p: Float[Tensor, "*pos d_vocab"],
    q: Float[Tensor, "*pos d_vocab"],
    logp: Float[Tensor, "*pos d_vocab"],
    logq: Float[Tensor, "*pos d_vocab"],
) -> dict[str, Float[Tensor, "*pos"]]:
    """`kl`, its `reverse` KL(q || p), `js` and `tv` of two distributions at once, with few passes over the vocabulary.

    With `d = log q - log p` the mixture has `log m = log p + softplus d - log 2`, so `js = -(sum (p + q)(softplus d - log 2) - sum q d) / 2`.
    """
    d = logq - logp
    forward, reverse = -expectation(p, d), expectation(q, d)
    excess = torch.nn.functional.softplus(d).sub_(math.log(2))
    mixed = (reverse - torch.linalg.vecdot(p, excess) - torch.linalg.vecdot(q, excess)) / 2
    if not mixed.isfinite().all():  # a probability of 0
        mixed = js(logp, logq)
    return {"kl": forward, "reverse": reverse, "js": mixed, "tv": (p - q).abs_().sum(-1) / 2}


PAIRWISE = ("kl", "js", "tv")

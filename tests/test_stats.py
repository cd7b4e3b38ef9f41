"""Statistics against closed forms, and the fused loss against autograd in float64."""

import math

import pytest
import torch

from tl_lenses import stats as S
from tl_lenses.divergence import fused_ce, fused_kl

P = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.7, 0.1, 0.1, 0.1]], dtype=torch.float64).log()
Q = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.1, 0.7, 0.1, 0.1]], dtype=torch.float64).log()


def test_entropy_and_kl_by_hand():
    assert torch.allclose(S.entropy(P)[0], torch.tensor(1.5 * math.log(2)).double())
    assert torch.allclose(S.entropy(Q)[0], torch.tensor(math.log(4)).double())
    assert torch.allclose(S.kl(P, Q), torch.tensor([0.5 * math.log(2), 0.6 * math.log(7)]).double())
    assert torch.equal(S.kl(P, P), torch.zeros(2).double())


def test_js_and_tv_are_the_textbooks():
    p, q = P.exp(), Q.exp()
    m = (p + q) / 2
    safe = lambda a, b: torch.where(a > 0, a * (a / b).log(), 0.0).sum(-1)  # noqa: E731
    assert torch.allclose(S.js(P, Q), (safe(p, m) + safe(q, m)) / 2)
    assert torch.allclose(S.js(P, Q), S.js(Q, P))
    apart = torch.eye(2, dtype=torch.float64).log()
    assert torch.allclose(S.js(apart[:1], apart[1:]), torch.tensor([math.log(2)]).double())
    assert torch.allclose(S.tv(P, Q), torch.tensor([0.25, 0.6]).double())
    # not what another package calls by these names: half the symmetrised KL, and the largest difference
    assert not torch.allclose(S.js(P[1:], Q[1:]), (S.kl(P[1:], Q[1:]) + S.kl(Q[1:], P[1:])) / 4)
    assert not torch.allclose(S.tv(P, Q), (p - q).abs().amax(-1) / 2)


def test_rank_counts_strictly_larger_and_targets_may_be_missing():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]]).expand(5, 4)
    targets = torch.tensor([0, 1, 2, 3, -1])
    assert S.rank(logits, targets).tolist() == [3, 1, 1, 4, -1]
    score = S.target_logprob(S.log_probs(logits), targets)
    assert torch.allclose(score[:4], logits[0].log_softmax(-1)) and score[4].isnan()


def test_half_precision_is_scored_in_fp32():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 8
    logp = S.log_probs(logits.bfloat16())
    assert logp.dtype == torch.float32
    assert torch.allclose(logp.exp().sum(-1), torch.ones(3))


def test_padded_vocabularies():
    logits = torch.tensor([[1.0, 2.0, -torch.inf]])
    logp = S.log_probs(logits)
    assert S.kl(logp, logp).item() == 0.0 and S.entropy(logp).isfinite().all() and S.js(logp, logp).abs().item() < 1e-7


def test_top_k_is_sorted_and_bounded():
    ids, probs = S.top_k(P, 10)
    assert ids.shape == (2, 4) and ids[0, 0] == 0 and (probs.diff(dim=-1) <= 0).all()


def test_chunks_cover():
    assert [(s.start, s.stop) for s in S.chunks(7, 10, 3)] == [(0, 3), (3, 6), (6, 7)]
    assert sum(s.stop - s.start for s in S.chunks(1001, 50257)) == 1001
    assert next(S.chunks(10**6, 50257)).stop * 50257 * 4 <= S.CHUNK_BYTES


# --- fused losses


def _problem(dtype=torch.float64, rows=3, n=11, d=6, v=17):
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return rand(rows, n, d), 3 * rand(n, v), rand(d, v), rand(v), torch.randint(v, (n,), generator=g)


def _cap(z):
    return 2.0 * torch.tanh(z / 2.0)


@pytest.mark.parametrize("transform", [None, _cap], ids=["plain", "soft-cap"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_fused_kl_and_ce_equal_autograd_in_float64(transform, bias, chunk_size):
    hidden, teacher, w, b, targets = _problem()
    b = b if bias else None
    f = transform or (lambda z: z)
    weights = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    for loss in ("kl", "ce"):
        x = hidden.clone().requires_grad_()
        z = f(x @ w + (0 if b is None else b))
        logq = z.log_softmax(-1)
        if loss == "kl":
            expected = S.kl(teacher.log_softmax(-1).expand_as(logq), logq).mean(-1)
        else:
            expected = -logq.gather(-1, targets.expand(3, -1)[..., None])[..., 0].mean(-1)
        (grad,) = torch.autograd.grad((expected * weights).sum(), x)
        y = hidden.clone().requires_grad_()
        got = (fused_kl if loss == "kl" else fused_ce)(
            y, teacher if loss == "kl" else targets, w, b, transform=transform, chunk_size=chunk_size
        )
        (got_grad,) = torch.autograd.grad((got * weights).sum(), y)
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
        assert torch.allclose(got_grad, grad, rtol=1e-10, atol=1e-12)
        assert grad.abs().max() > 1e-3


def test_fused_kl_of_the_teacher_itself_is_zero():
    hidden, _, w, b, _ = _problem(torch.float32)
    y = hidden[:1].clone().requires_grad_()
    loss = fused_kl(y, (hidden[0] @ w + b), w, b)
    loss.sum().backward()
    assert loss.abs().max() < 1e-6 and y.grad.abs().max() < 1e-6


def test_fused_refuses_counts_that_do_not_match(unchecked):
    hidden, teacher, w, b, _ = _problem()
    with pytest.raises(ValueError, match="one teacher or target per position"):
        fused_kl(hidden, teacher[:5], w, b)

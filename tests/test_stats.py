"""Statistics against closed forms, and the fused loss against autograd in float64."""

import math

import pytest
import torch

from tl_lenses import stats as S
from tl_lenses.divergence import fused_ce, fused_kl

P = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.7, 0.1, 0.1, 0.1]], dtype=torch.float64).log()
Q = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.1, 0.7, 0.1, 0.1]], dtype=torch.float64).log()


def test_entropy_by_hand():
    assert torch.allclose(S.entropy(P)[0], torch.tensor(1.5 * math.log(2)).double())
    assert torch.allclose(S.entropy(Q)[0], torch.tensor(math.log(4)).double())


def test_kl_by_hand():
    assert torch.allclose(S.kl(P, Q), torch.tensor([0.5 * math.log(2), 0.6 * math.log(7)]).double())
    assert torch.equal(S.kl(P, P), torch.zeros(2).double())


def test_js_is_the_mean_kl_to_the_mixture():
    """And not half the symmetrised KL, which another package calls by this name."""
    p, q = P.exp(), Q.exp()
    safe = lambda a, b: torch.where(a > 0, a * (a / b).log(), 0.0).sum(-1)
    assert torch.allclose(S.js(P, Q), (safe(p, (p + q) / 2) + safe(q, (p + q) / 2)) / 2)
    assert not torch.allclose(S.js(P[1:], Q[1:]), (S.kl(P[1:], Q[1:]) + S.kl(Q[1:], P[1:])) / 4)


def test_js_is_symmetric():
    assert torch.allclose(S.js(P, Q), S.js(Q, P))


def test_js_of_what_never_meets_is_log_two():
    apart = torch.eye(2, dtype=torch.float64).log()
    assert torch.allclose(S.js(apart[:1], apart[1:]), torch.tensor([math.log(2)]).double())


def test_tv_is_half_the_summed_difference():
    """And not the largest difference, which another package calls by this name."""
    assert torch.allclose(S.tv(P, Q), torch.tensor([0.25, 0.6]).double())
    assert not torch.allclose(S.tv(P, Q), (P.exp() - Q.exp()).abs().amax(-1) / 2)


LOGITS, TARGETS = torch.tensor([[1.0, 3.0, 3.0, 0.0]]).expand(5, 4), torch.tensor([0, 1, 2, 3, -1])


def test_rank_counts_strictly_larger_logits():
    assert S.rank(LOGITS[:4], TARGETS[:4]).tolist() == [3, 1, 1, 4]


def test_the_score_of_a_target_is_its_log_probability():
    assert torch.allclose(S.target_logprob(S.log_probs(LOGITS[:4]), TARGETS[:4]), LOGITS[0].log_softmax(-1))


def test_a_missing_target_has_no_rank_and_no_score():
    assert S.rank(LOGITS, TARGETS)[4] == -1 and S.target_logprob(S.log_probs(LOGITS), TARGETS)[4].isnan()


def test_half_precision_is_scored_in_fp32():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 8
    logp = S.log_probs(logits.bfloat16())
    assert logp.dtype == torch.float32
    assert torch.allclose(logp.exp().sum(-1), torch.ones(3))


def test_padded_vocabularies():
    logits = torch.tensor([[1.0, 2.0, -torch.inf]])
    logp = S.log_probs(logits)
    assert S.kl(logp, logp).item() == 0.0 and S.entropy(logp).isfinite().all() and S.js(logp, logp).abs().item() < 1e-7


@pytest.mark.parametrize("shift", [0.0, -100.0])
def test_distributions_of_a_large_vocabulary_in_fp32_are_those_of_float64(shift):
    z = 3 * torch.randn(4, 262_144, generator=torch.Generator().manual_seed(0)) + shift
    expected, (logp, p) = z.double().log_softmax(-1), S.distribution(z)
    for got in (logp, S.log_probs(z)):
        assert torch.allclose(got.double(), expected, rtol=1e-6, atol=1e-6)
    for got in (p, S.probs(z)):
        assert torch.allclose(got.double(), expected.exp(), rtol=2e-6, atol=0)
    assert torch.allclose(S.top_k(z, 9)[1].double(), expected.exp().topk(9).values, rtol=2e-6, atol=0)
    assert torch.allclose(S.entropy(logp, p).double(), S.entropy(expected), rtol=1e-6, atol=1e-6)


def test_log_probabilities_have_the_gradient_of_a_softmax():
    z = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    got, expected = (torch.autograd.grad(f(z)[:, 7].sum(), z)[0] for f in (S.log_probs, lambda z: z.log_softmax(-1)))
    assert torch.allclose(got, expected, atol=1e-7)


def test_the_top_k_of_a_small_vocabulary_are_all_of_it_in_order():
    ids, probs = S.top_k(P, 10)
    assert ids.shape == (2, 4) and ids[0, 0] == 0 and (probs.diff(dim=-1) <= 0).all()


def test_chunks_cover_all_positions():
    assert [(s.start, s.stop) for s in S.chunks(7, 10, 3)] == [(0, 3), (3, 6), (6, 7)]
    assert sum(s.stop - s.start for s in S.chunks(1001, 50257)) == 1001


def test_a_chunk_is_within_its_memory():
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
@pytest.mark.parametrize("loss", [fused_kl, fused_ce])
def test_a_fused_loss_equals_autograd_in_float64(loss, transform, bias, chunk_size):
    hidden, teacher, w, b, targets = _problem()
    b = b if bias else None
    f = transform or (lambda z: z)
    weights = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    x, y = (hidden.clone().requires_grad_() for _ in range(2))
    logq = f(x @ w + (0 if b is None else b)).log_softmax(-1)
    if loss is fused_kl:
        goal, expected = teacher, S.kl(teacher.log_softmax(-1).expand_as(logq), logq).mean(-1)
    else:
        goal, expected = targets, -logq.gather(-1, targets.expand(3, -1)[..., None])[..., 0].mean(-1)
    got = loss(y, goal, w, b, transform=transform, chunk_size=chunk_size)
    grad, got_grad = (torch.autograd.grad((z * weights).sum(), at)[0] for z, at in ((expected, x), (got, y)))
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

"""The laws of Aitchison's geometry: a vector space, an inner product on it, an isometry, and what changes nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_lenses import aitchison as A

V = 7
WEIGHTED = pytest.mark.parametrize("weighted", [False, True])


def drawn(seed, n=5):
    """Three distributions and weights, float64."""
    generator = torch.Generator().manual_seed(seed)
    p, q, r, w = (torch.randn(n, V, generator=generator, dtype=torch.float64) * 2 for _ in range(4))
    return p.log_softmax(-1), q.log_softmax(-1), r.log_softmax(-1), w.softmax(-1)


seeds = given(st.integers(0, 2**31), st.floats(-3, 3), st.floats(-3, 3))
few = settings(max_examples=25, deadline=None)
close = lambda x, y: torch.allclose(x, y, atol=1e-9)


@few
@seeds
def test_it_is_a_vector_space(seed, a, b):
    p, q, r, _ = drawn(seed)
    zero = torch.full_like(p, -math.log(V))
    assert close(A.perturb(p, q), A.perturb(q, p))
    assert close(A.perturb(A.perturb(p, q), r), A.perturb(p, A.perturb(q, r)))
    assert close(A.perturb(p, zero), p) and close(A.perturb(p, A.power(p, -1.0)), zero)
    assert close(A.power(p, 1.0), p) and close(A.power(A.power(p, a), b), A.power(p, a * b))
    assert close(A.power(A.perturb(p, q), a), A.perturb(A.power(p, a), A.power(q, a)))
    assert close(A.power(p, a + b), A.perturb(A.power(p, a), A.power(p, b)))
    assert close(A.subtract(p, q), A.perturb(p, A.power(q, -1.0)))
    assert close(A.perturb(p, q).exp().sum(-1), torch.ones(len(p), dtype=p.dtype))


@WEIGHTED
@few
@seeds
def test_the_inner_product_and_the_isometry(weighted, seed, a, b):
    p, q, r, w = drawn(seed)
    w = w if weighted else None
    assert close(A.inner(p, q, w), A.inner(q, p, w))
    left = A.inner(A.perturb(A.power(p, a), A.power(q, b)), r, w)
    assert close(left, a * A.inner(p, r, w) + b * A.inner(q, r, w))
    assert (A.norm(p, w) > 0).all() and close(A.norm(torch.zeros_like(p), w), torch.zeros(len(p), dtype=p.dtype))
    assert (A.inner(p, q, w).abs() <= A.norm(p, w) * A.norm(q, w) + 1e-9).all()
    assert close(A.norm(A.power(p, a), w), abs(a) * A.norm(p, w))
    assert (A.distance(p, r, w) <= A.distance(p, q, w) + A.distance(q, r, w) + 1e-9).all()
    # The map to Euclid's space is linear and keeps inner products and distances.
    x, y = A.coordinates(p, w), A.coordinates(q, w)
    assert close((x * y).sum(-1), A.inner(p, q, w)) and close((x - y).norm(dim=-1), A.distance(p, q, w))
    assert close(A.coordinates(A.perturb(p, A.power(q, a)), w), x + a * y)


@WEIGHTED
@few
@given(st.integers(0, 2**31), st.floats(-50, 50))
def test_what_changes_nothing(weighted, seed, shift):
    p, q, r, w = drawn(seed)
    w = w if weighted else None
    assert close(A.clr(p + shift, w), A.clr(p, w)) and close(A.inner(p + shift, q - shift, w), A.inner(p, q, w))
    assert close(A.distance(A.perturb(p, r), A.perturb(q, r), w), A.distance(p, q, w))  # translations
    order = torch.randperm(V, generator=torch.Generator().manual_seed(seed % 1000))
    mixed = None if w is None else w[..., order]
    assert close(A.inner(p[..., order], q[..., order], mixed), A.inner(p, q, w))
    assert close((torch.full_like(p, 1 / V) if w is None else w).mul(A.clr(p, w)).sum(-1), torch.zeros(len(p)).double())


def test_similarity_is_a_cosine():
    p, q, _, w = drawn(0)
    assert close(A.similarity(p, A.power(p, 2.5), w), torch.ones(len(p)).double())
    assert close(A.similarity(p, A.power(p, -0.5), w), -torch.ones(len(p)).double())
    assert (A.similarity(p, q, w).abs() < 1).all()
    assert close(A.similarity(p, torch.zeros_like(p), w), torch.zeros(len(p)).double())


def test_weights_say_which_tokens_count():
    p, q, _, w = drawn(1)
    w = w.clone()
    w[..., 0] = 0
    w = w / w.sum(-1, keepdim=True)
    other = p.clone()
    other[..., 0] = -math.inf  # a token that cannot occur and has no weight
    assert close(A.inner(p, q, w), A.inner(other, q, w)) and A.coordinates(other, w).isfinite().all()
    uniform = torch.full_like(p, 1 / V)
    assert close(A.inner(p, q, uniform), A.inner(p, q)) and not close(A.inner(p, q, w), A.inner(p, q))


def test_a_geometry_without_its_centring_is_caught(monkeypatch):
    monkeypatch.setattr(A, "clr", lambda logp, w=None: logp)
    p, q, _, w = drawn(2)
    assert not close(A.inner(p + 1, q, w), A.inner(p, q, w))

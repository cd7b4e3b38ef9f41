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


def laws(of):
    """One test per law: what stands on both of its sides is the same for any three distributions and two numbers."""

    def check(law, seed, a, b):
        p, q, r, w = drawn(seed)
        assert close(*of[law](p, q, r, a, b, w))

    return pytest.mark.parametrize("law", of)(few(seeds(check)))


add, times, dot = A.perturb, A.power, A.inner
uniform = lambda p: torch.full_like(p, -math.log(V))

test_it_is_a_vector_space = laws(
    {
        "addition commutes": lambda p, q, r, a, b, w: (add(p, q), add(q, p)),
        "addition associates": lambda p, q, r, a, b, w: (add(add(p, q), r), add(p, add(q, r))),
        "uniform is zero": lambda p, q, r, a, b, w: (add(p, uniform(p)), p),
        "there is a negative": lambda p, q, r, a, b, w: (add(p, times(p, -1.0)), uniform(p)),
        "subtraction adds the negative": lambda p, q, r, a, b, w: (A.subtract(p, q), add(p, times(q, -1.0))),
        "one is one": lambda p, q, r, a, b, w: (times(p, 1.0), p),
        "factors associate": lambda p, q, r, a, b, w: (times(times(p, a), b), times(p, a * b)),
        "a factor distributes over sums": lambda p, q, r, a, b, w: (times(add(p, q), a), add(times(p, a), times(q, a))),
        "sums of factors distribute": lambda p, q, r, a, b, w: (times(p, a + b), add(times(p, a), times(p, b))),
        "sums are distributions": lambda p, q, r, a, b, w: (add(p, q).exp().sum(-1), torch.ones(len(p)).double()),
    }
)


GEOMETRY = {
    "the inner product is symmetric": lambda p, q, r, a, b, w: (dot(p, q, w), dot(q, p, w)),
    "it is linear": lambda p, q, r, a, b, w: (
        dot(add(times(p, a), times(q, b)), r, w),
        a * dot(p, r, w) + b * dot(q, r, w),
    ),
    "zero has no length": lambda p, q, r, a, b, w: (A.norm(torch.zeros_like(p), w), torch.zeros(len(p)).double()),
    "a length is scaled": lambda p, q, r, a, b, w: (A.norm(times(p, a), w), abs(a) * A.norm(p, w)),
    "coordinates keep inner products": lambda p, q, r, a, b, w: (
        (A.coordinates(p, w) * A.coordinates(q, w)).sum(-1),
        dot(p, q, w),
    ),
    "coordinates keep distances": lambda p, q, r, a, b, w: (
        (A.coordinates(p, w) - A.coordinates(q, w)).norm(dim=-1),
        A.distance(p, q, w),
    ),
    "coordinates are linear": lambda p, q, r, a, b, w: (
        A.coordinates(add(p, times(q, a)), w),
        A.coordinates(p, w) + a * A.coordinates(q, w),
    ),
    "constants of log-probabilities do not count": lambda p, q, r, a, b, w: (dot(p + 9 * a, q - 9 * b, w), dot(p, q, w)),
    "nor in centred ones": lambda p, q, r, a, b, w: (A.clr(p + 9 * a, w), A.clr(p, w)),
    "translations keep distances": lambda p, q, r, a, b, w: (A.distance(add(p, r), add(q, r), w), A.distance(p, q, w)),
    "centred is centred": lambda p, q, r, a, b, w: (
        (torch.full_like(p, 1 / V) if w is None else w).mul(A.clr(p, w)).sum(-1),
        torch.zeros(len(p)).double(),
    ),
}
unweighted = lambda law: lambda p, q, r, a, b, w: law(p, q, r, a, b, None)

test_it_has_a_geometry = laws({name: unweighted(law) for name, law in GEOMETRY.items()})
test_it_has_a_geometry_of_weighted_tokens = laws(GEOMETRY)


@WEIGHTED
@few
@seeds
def test_an_inner_product_is_at_most_the_product_of_lengths(weighted, seed, a, b):
    p, q, _, w = drawn(seed)
    w = w if weighted else None
    assert (A.norm(p, w) > 0).all() and (dot(p, q, w).abs() <= A.norm(p, w) * A.norm(q, w) + 1e-9).all()


@WEIGHTED
@few
@seeds
def test_a_way_round_is_no_shorter(weighted, seed, a, b):
    p, q, r, w = drawn(seed)
    w = w if weighted else None
    assert (A.distance(p, r, w) <= A.distance(p, q, w) + A.distance(q, r, w) + 1e-9).all()


@WEIGHTED
@few
@seeds
def test_the_order_of_tokens_changes_nothing(weighted, seed, a, b):
    p, q, _, w = drawn(seed)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(seed % 1000))
    w, mixed = (w, w[..., order]) if weighted else (None, None)
    assert close(dot(p[..., order], q[..., order], mixed), dot(p, q, w))


@pytest.mark.parametrize("factor,cosine", [(2.5, 1.0), (-0.5, -1.0)])
def test_similarity_of_a_multiple_is_its_sign(factor, cosine):
    p, _, _, w = drawn(0)
    assert close(A.similarity(p, A.power(p, factor), w), torch.full((len(p),), cosine).double())


def test_similarity_is_below_one_else():
    p, q, _, w = drawn(0)
    assert (A.similarity(p, q, w).abs() < 1).all()


def test_nothing_is_similar_to_zero():
    p, _, _, w = drawn(0)
    assert close(A.similarity(p, torch.zeros_like(p), w), torch.zeros(len(p)).double())


def test_a_token_without_weight_does_not_count():
    p, q, _, w = drawn(1)
    w = w.clone()
    w[..., 0] = 0
    w = w / w.sum(-1, keepdim=True)
    other = p.clone()
    other[..., 0] = -math.inf  # it cannot even occur
    assert close(A.inner(p, q, w), A.inner(other, q, w)) and A.coordinates(other, w).isfinite().all()


def test_equal_weights_are_none():
    p, q, _, w = drawn(1)
    assert close(A.inner(p, q, torch.full_like(p, 1 / V)), A.inner(p, q)) and not close(A.inner(p, q, w), A.inner(p, q))


def test_a_geometry_without_its_centring_is_caught(monkeypatch):
    monkeypatch.setattr(A, "clr", lambda logp, w=None: logp)
    p, q, _, w = drawn(2)
    assert not close(A.inner(p + 1, q, w), A.inner(p, q, w))

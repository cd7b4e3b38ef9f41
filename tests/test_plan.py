"""The plan of a fit: its sums are those of the shapes, and its memory that of the buffers."""

import pytest

from tl_lenses.fit.plan import plan


def test_sums_of_a_small_fit():
    p = plan(
        8, 3, 100, n_params=5000, tokens_per_batch=10, tokens_per_step=40, steps=7, optimizer="adam", init="identity"
    )
    assert p.tokens == 280 and p.steps == 7 and p.groups == 1
    assert p.operations["vocabulary"] == 4 * 3 * 8 * 100 * 280
    assert p.operations["translators"] == 4 * 3 * 64 * 280
    assert p.operations["model"] == 2 * (5000 - 800) * 280 and p.operations["optimiser"] == 0
    assert p.memory["translators"] == p.memory["gradients"] == 4 * 3 * 72
    assert p.memory["optimiser"] == 2 * p.memory["translators"] and p.memory["moments of the start"] == 0
    assert p.peak == sum(p.memory.values()) and "280 tokens" in str(p)


def test_what_makes_it_smaller():
    settings = dict(n_params=10**9, tokens_per_step=2**14, precision="bfloat16", model_dtype="bfloat16")
    whole = plan(2048, 24, 50_000, **settings)
    table = 2 * 2048 * 50_000  # embedding and unembedding stay whole
    assert plan(2048, 24, 50_000, sharded=4, **settings).memory["model"] == 2 * (
        (10**9 - table) // 4 + table + (10**9 - table) // 24
    )
    groups = plan(2048, 24, 50_000, rows_at_once=7, **settings)
    assert groups.groups == 4 and groups.memory["translators"] < whole.memory["translators"] / 3
    assert groups.operations["model"] == 4 * whole.operations["model"]  # each group is a pass over the text
    assert groups.operations["vocabulary"] == whole.operations["vocabulary"]
    half = plan(2048, 24, 50_000, subsample=0.5, **settings)
    assert half.operations["vocabulary"] == whole.operations["vocabulary"] / 2 and half.tokens == whole.tokens
    offloaded = plan(2048, 24, 50_000, state_on_cpu=True, **settings).memory
    assert offloaded["optimiser"] == offloaded["coordinates of the steps"] == 0
    # a matrix per layer, for Muon from a regression alone, and two products with it
    alone = [plan(2048, 24, 50_000, **settings, **other) for other in ({"init": "identity"}, {"optimizer": "sgd"})]
    assert whole.memory["coordinates of the steps"] >= 4 * 24 * 2048**2
    assert all(other.memory["coordinates of the steps"] == 0 for other in alone)
    assert whole.operations["optimiser"] - alone[0].operations["optimiser"] == 4 * 24 * 2048**3 * 250
    one, eight = whole.seconds(1e14, 1e12), whole.seconds(1e14, 1e12, processes=8)
    assert one / 8 < eight < one  # the optimiser is not shared


def test_refusals(unchecked):
    with pytest.raises(ValueError, match="d_vocab is 0; pass at least 1"):
        plan(8, 3, 0)
    with pytest.raises(ValueError, match="share of the positions"):
        plan(8, 3, 10, subsample=1.5)

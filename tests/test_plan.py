"""The plan of a fit: its sums are those of the shapes, and its memory that of the buffers."""

import pytest

from tl_lenses.fit.plan import plan
from tl_lenses.fit.settings import Settings


def test_sums_of_a_small_fit():
    settings = Settings(7, 40, optimizer="adam", init="identity")
    p = plan(settings, 8, 3, 100, n_params=5000, tokens_per_batch=10)
    assert p.tokens == 280 and p.steps == 7 and p.groups == 1 and p.start_tokens == p.operations["start"] == 0
    assert p.operations["vocabulary"] == 4 * 3 * 8 * 100 * 280
    assert p.operations["translators"] == 4 * 3 * 64 * 280
    assert p.operations["model"] == 2 * (5000 - 800) * 280 and p.operations["optimiser"] == 0
    assert p.memory["translators"] == p.memory["gradients"] == 4 * 3 * 72
    assert p.memory["optimiser"] == 2 * p.memory["translators"] and p.memory["moments of the start"] == 0
    assert p.memory["places on the way"] == 2 * p.memory["translators"]  # of the guard, at the end
    assert p.peak == sum(p.memory.values()) and "280 tokens" in str(p)


@pytest.mark.parametrize(
    ("settings", "copies"), [({}, 2), ({"guard": False}, 2), ({"guard": False, "lr": 0.1}, 0), ({"lr": 0.1}, 2)]
)
def test_a_search_and_a_guard_hold_the_maps_twice_more(settings, copies):
    p = plan(Settings(7, **settings), 8, 3, 100, n_params=5000, tokens_per_batch=10)
    assert p.memory["places on the way"] == copies * p.memory["translators"]


def test_the_start_is_counted_in_whole_batches():
    p = plan(Settings(7, init_tokens=95), 8, 3, 100, n_params=5000, tokens_per_batch=10)
    assert p.start_tokens == 100 and p.tokens == 70 and "70 tokens and 100 of the start" in str(p)
    assert p.operations["start"] == 100 * (2 * (5000 - 800) + 4 * 3 * 64)
    by_default = plan(Settings(1), 576, 30, 49152, tokens_per_batch=1024)
    assert by_default.start_tokens == 128 * 576


def test_what_makes_it_smaller():
    def planned(sharded=1, **changes):
        settings = Settings(**{"tokens_per_step": 2**14, "precision": "bfloat16", "vocabulary": "exact", **changes})
        return plan(settings, 2048, 24, 50_000, n_params=10**9, model_dtype="bfloat16", sharded=sharded)

    whole = planned()
    table = 2 * 2048 * 50_000  # embedding and unembedding stay whole
    assert planned(sharded=4).memory["model"] == 2 * ((10**9 - table) // 4 + table + (10**9 - table) // 24)
    groups = planned(layers_at_once=7)
    assert groups.groups == 4 and groups.memory["translators"] < whole.memory["translators"] / 3
    assert groups.operations["model"] == 4 * whole.operations["model"]  # each group is a pass over the text
    assert groups.operations["vocabulary"] == whole.operations["vocabulary"]
    half = planned(subsample=0.5)
    assert half.operations["vocabulary"] == whole.operations["vocabulary"] / 2 and half.tokens == whole.tokens
    offloaded = planned(offload=True).memory
    assert offloaded["optimiser"] == offloaded["coordinates of the steps"] == 0
    # a matrix per layer, for Muon from a regression alone, and two products with it
    alone = [planned(init="identity"), planned(optimizer="sgd")]
    assert whole.memory["coordinates of the steps"] >= 4 * 24 * 2048**2
    assert all(other.memory["coordinates of the steps"] == 0 for other in alone)
    assert whole.operations["optimiser"] - alone[0].operations["optimiser"] == 4 * 24 * 2048**3 * 250
    single, shared = whole.seconds(1e14, 1e12), whole.seconds(1e14, 1e12, processes=8)
    assert single / 8 < shared < single  # the optimiser is not shared


def test_what_is_chosen_for_you():
    stopped = Settings("auto", held_out=True)
    assert plan(stopped, 8, 3, 100) == plan(Settings(250), 8, 3, 100)
    memory = lambda precision, **sizes: plan(Settings(precision=precision), 64, 3, 10_000, **sizes).memory
    assert memory("auto", device="cuda") == memory("bfloat16", device="cuda") != memory("float32", device="cuda")
    assert memory("auto", device="cpu") == memory("float32", device="cpu")
    half = {"model_dtype": "bfloat16", "device": "cpu"}
    assert memory("auto", **half) == memory("float32", **half)  # half weights keep their type


def test_refusals(unchecked):
    with pytest.raises(ValueError, match="d_vocab must be at least 1, got 0"):
        plan(Settings(), 8, 3, 0)
    with pytest.raises(ValueError, match="device must be"):
        plan(Settings(), 8, 3, 10, device="tpu")  # pyright: ignore


def test_a_sample_of_the_vocabulary_costs_the_teacher_and_little_more():
    exact, sampled = (
        plan(Settings(vocabulary=v), 640, 18, 262144, device="cpu").operations["vocabulary"] for v in ("exact", "auto")
    )
    assert exact / 36 < sampled < 1.3 * exact / 36  # one product of two, for all layers
    grouped = plan(Settings(layers_at_once=9), 640, 18, 262144, device="cpu").operations["vocabulary"]
    assert 1.7 * sampled < grouped < 2 * sampled  # the teacher is made for each group
    small = [plan(Settings(vocabulary=v), 256, 8, 8192).operations for v in ("exact", "auto")]
    assert small[0] == small[1]

"""No layer ends worse than it began: the guard's tokens are the fit's own, are never trained on, and decide layer by layer."""

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses.fit.guard import LEAST, SPARE, Guard, guard_of
from tl_lenses.text.batches import Text
from tl_lenses.tokens import Batch

KIND = zoo.FEW_KINDS[0]
BATCHES = list(zoo.tokens(160, 16).split(8))  # 20 batches, 2,560 tokens


def fit(tokens=None, **settings):
    model = zoo.build("gpt2", KIND)
    return tll.fit_tuned(model, BATCHES if tokens is None else tokens, **{"steps": 4, "init_tokens": 600, **settings})


def losses(maps, tokens):
    model = zoo.build("gpt2", KIND)
    scores = tll.evaluate(model, tll.Lens(model, maps), tokens)
    return [scores.value("lens", layer) for layer in range(model.cfg.n_layers)]


def test_a_layer_that_got_worse_keeps_its_start_and_the_record_says_so():
    guard = torch.cat(BATCHES)[:16]  # 256 tokens
    start = fit(BATCHES[2:], steps=0)
    ruined, unguarded = fit(lr=30.0), fit(lr=30.0, guard=False)
    record = ruined.meta["guard"]
    assert record["tokens"] == LEAST and record["kept_start"] == [row[0] for row in ruined.rows]
    assert all(end > begin for begin, end in zip(record["start"], record["end"], strict=True))
    assert torch.allclose(ruined.delta, start.delta, atol=1e-4) and torch.allclose(
        ruined.biases, start.biases, atol=1e-4
    )
    assert losses(ruined, guard) == pytest.approx(record["start"], rel=0.02, abs=1e-4)
    assert max(losses(unguarded, guard)) > 2 * max(losses(ruined, guard)) and "guard" not in unguarded.meta


def test_a_layer_that_got_better_is_the_trained_one():
    good = fit(init="identity", steps=20, log=(log := []))
    record = good.meta["guard"]
    assert record["kept_start"] == [] and all(b < a for a, b in zip(record["start"], record["end"], strict=True))
    assert losses(good, torch.cat(BATCHES)[:16]) == pytest.approx(record["end"], rel=0.02, abs=1e-4)
    assert [entry["step"] for entry in log if "guard" in entry] == [20] and "held_out" not in log[-1]
    assert list(log[-1]["guard"].values()) == record["end"]
    assert "guard" not in fit(held_out=zoo.tokens(4, 16, seed=3)).meta  # that guards already
    assert "guard" not in fit(steps=0).meta


@pytest.mark.parametrize("init", ["identity", "regression"])
def test_the_guards_tokens_reach_no_map_in_any_pass(init):
    other = [zoo.tokens(8, 16, seed=7) for _ in range(2)]
    for change in ([*other, *BATCHES[2:]], [*BATCHES[:1], other[1], *BATCHES[2:]]):
        before, after = fit(init=init, steps=45), fit(change, init=init, steps=45)
        assert before.meta["guard"]["kept_start"] == after.meta["guard"]["kept_start"] == []
        assert torch.equal(before.delta, after.delta) and before.meta["guard"] != after.meta["guard"]
    rows = torch.cat(BATCHES)
    before, after = (
        fit(rows, init=init, steps=45),
        fit(torch.cat([rows[:-16], *other[:1], *other[:1]]), init=init, steps=45),
    )
    assert torch.equal(before.delta, after.delta) and before.meta["guard"] != after.meta["guard"]


def test_a_part_of_a_batch_is_set_aside_and_the_rest_of_it_is_trained_on():
    first = [Batch(zoo.tokens(100, 16)), Batch(zoo.tokens(100, 16, seed=1))]
    text = Text.of(first)
    guard = guard_of(first, text, 0, whole_batches=False)
    assert (guard.n_tokens, guard.whole, guard.rows) == (256, 0, 16)
    rest = list(guard.rest(text.stream(endless=False)))
    assert torch.equal(torch.cat([guard.batches[0].tokens, rest[0][0].tokens]), first[0].tokens) and len(rest) == 2
    assert torch.equal(next(guard.rest(text.stream(at=rest[0][1])))[0].tokens, first[1].tokens)
    whole = guard_of(first, text, 0, whole_batches=True)
    assert (whole.n_tokens, whole.whole, whole.rows) == (1600, 1, 0)
    assert len(list(whole.rest(text.stream(endless=False)))) == 1
    again = Guard.load(guard.state(), text)
    assert torch.equal(again.batches[0].tokens, guard.batches[0].tokens) and again.rows == 16


def test_where_there_is_no_guard_the_record_says_why():
    records = [
        fit(BATCHES[: SPARE * LEAST // 128 - 1]).meta["guard"],
        fit(torch.cat(BATCHES)[:100]).meta["guard"],
        fit(iter(BATCHES)).meta["guard"],
        fit([torch.cat(BATCHES)], hooks=[("blocks.0.hook_resid_pre", lambda x, hook: x)]).meta["guard"],
    ]
    assert [before["tokens"] for before in records] == [0] * 4
    assert ["2,048 tokens" in before["why"] for before in records[:2]] == [True, True]
    assert "read only once" in records[2]["why"] and "one batch" in records[3]["why"]

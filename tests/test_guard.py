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
    assert torch.allclose(ruined.delta, start.delta, atol=1e-4) and torch.allclose(ruined.biases, start.biases, atol=1e-4)
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
def test_the_guards_tokens_reach_no_map_in_any_pass(init, monkeypatch):
    monkeypatch.setattr("tl_lenses.fit.training.SHARES", (1.0,))  # which they choose among
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
    assert [guard.beside(n, 8192).start_again for n in (2559, 2560)] == [True, False]
    assert not guard.beside(600, 600).start_again
    guard = guard.beside(2000, 8192)
    again = Guard.load(guard.state(), text)
    assert again.start_again
    assert torch.equal(again.batches[0].tokens, guard.batches[0].tokens) and again.rows == 16


def test_a_layer_goes_back_to_the_best_share_of_its_way(monkeypatch):
    start, noisy = fit(BATCHES[2:], steps=0), dict(lr=0.5, steps=8)
    record = (chosen := fit(**noisy)).meta["guard"]
    monkeypatch.setattr("tl_lenses.fit.training.SHARES", (1.0,))
    whole = fit(**noisy)
    assert 0.5 in record["share"], record
    for i, share in enumerate(record["share"]):
        assert torch.allclose(chosen.delta[i], torch.lerp(start.delta[i], whole.delta[i], share), atol=1e-4)
        assert record["end"][i] <= whole.meta["guard"]["end"][i]
    assert losses(chosen, torch.cat(BATCHES)[:16]) == pytest.approx(record["end"], rel=0.02, abs=1e-4)


def test_a_short_texts_start_is_fitted_again_with_the_guards_tokens():
    model = zoo.build("gpt2", KIND)
    again = fit(init_tokens=None, lr=1e-9, steps=1)
    regression = tll.fit_regression(model, BATCHES)
    assert again.meta["guard"]["start_again"] and torch.allclose(again.delta, regression.delta, atol=1e-5)
    assert not torch.allclose(tll.fit_regression(model, BATCHES[2:]).delta, regression.delta, atol=1e-3)
    assert not fit().meta["guard"]["start_again"]  # there the text is longer than what the start reads


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

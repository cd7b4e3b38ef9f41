"""A layer's rate is shortened where its first step is too long for the tokens that come next."""

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses.fit.learner import Learner
from tl_lenses.fit.optim import LENGTHS, best_lengths
from tl_lenses.fit.settings import Settings

KIND = zoo.FEW_KINDS[0]


def fit(**settings):
    settings = {"steps": 6, "tokens_per_step": 200, "init_tokens": 600, **settings}
    return tll.fit_tuned(zoo.build("gpt2", KIND), zoo.tokens(160, 16), **settings)


def test_the_length_with_the_lowest_loss_is_chosen_layer_by_layer():
    inf, nan = float("inf"), float("nan")
    losses = torch.tensor(
        [[1.0, 5.0, inf, nan, 1.1], [2.0, 2.5, 5.0, nan, 1.0], [3.0, 1.5, 4.0, nan, 2.0], [4.0, 2.7, 6.0, 2.0, 3.0]]
    )
    # The fifth is as good at full length as noise can tell.
    assert best_lengths(torch.full((5,), 4.5), losses).tolist() == [1.0, 0.25, 0.25, 0.125, 1.0]
    assert best_lengths(torch.ones(1), torch.full((4, 1), 2.0)).tolist() == [0.125]


def test_maps_move_on_the_way_from_their_origin():
    start, end = torch.randn(2, 4, 4), torch.randn(2, 4, 4)
    learner = Learner(end.clone(), torch.ones(2, 4), Settings(lr=0.1))
    for _ in LENGTHS:
        learner.move((start, torch.zeros(2, 4)), 0.5)
    learner.move((start, torch.zeros(2, 4)), torch.tensor([1.0, 0.25]) * 2 ** len(LENGTHS))
    assert torch.allclose(learner.delta[0], end[0], atol=1e-5) and torch.allclose(learner.biases[0], torch.ones(4))
    assert torch.allclose(learner.delta[1], start[1] + (end[1] - start[1]) / 4, atol=1e-5)


def test_a_rate_that_is_too_high_is_lowered_and_one_that_is_not_stays():
    default, high = fit(), 20 / 32**0.5
    assert default.meta["settings"]["lr_search"] is True and fit(lr=0.1).meta["settings"]["lr_search"] is False
    assert fit(optimizer="sgd").meta["settings"]["lr_search"] is False
    loss = lambda **settings: sum(fit(log=(log := []), guard=False, **settings) and log[-1]["loss"].values())
    assert loss(lr=high, lr_search=True) < 0.7 * loss(lr=high)
    low = dict(lr=0.01, init="identity", guard=False)  # the longest is best: nothing changes but rounding
    assert torch.allclose(fit(lr_search=True, **low).delta, fit(**low).delta, atol=1e-5)
    with pytest.raises(TypeError, match="lr_search"):
        Settings(lr_search=1.5)


@pytest.mark.parametrize(("n_rows", "share"), [(2, 30 / 56), (8, 1.0)])
def test_a_step_of_few_positions_is_as_much_shorter(n_rows, share):
    rows = list(zoo.tokens(160, 16).split(n_rows))  # 15 positions each, and 1.75 * 32 are enough
    log: list = []
    settings = dict(steps=2, tokens_per_step=None, guard=False, init_tokens=600, log=log)
    tll.fit_tuned(zoo.build("gpt2", KIND), rows, **settings)
    tll.fit_tuned(zoo.build("gpt2", KIND), rows, **settings, lr=1.0 / 32**0.5)  # a rate that is given is the rate
    assert [entry["lr"] * 32**0.5 for entry in log] == pytest.approx([share, share / 2, 1.0, 0.5])


def test_an_interrupted_search_begins_again_and_ends_the_same(tmp_path, monkeypatch):
    whole, move = fit(), Learner.move

    def breaking(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Learner, "move", breaking)
    with pytest.raises(KeyboardInterrupt):
        fit(checkpoint=tmp_path / "state")
    monkeypatch.setattr(Learner, "move", move)
    again = fit(checkpoint=tmp_path / "state")
    assert torch.equal(again.delta, whole.delta) and again.meta == whole.meta


def test_all_lengths_are_tried_on_one_pass_of_the_model():
    def passes(**settings):
        def count(x, hook):
            calls.append(1)

        calls = []
        fit(steps=2, guard=False, hooks=[("blocks.0.hook_resid_pre", count)], lr=0.1, **settings)
        return len(calls)

    assert passes(lr_search=True) == passes(lr_search=False) + 1

"""Transfer across layers: planted layers that are twice another one, a planted outlier dimension, and penalties by hand."""

from importlib import import_module

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses.experiments import subject, transfer
from tl_lenses.numerics import spearman

module = import_module("tl_lenses.experiments.tuned_lens.transfer")


def check_by_hand(model, maps):
    tokens, lens = zoo.tokens(5, 10, seed=7), tll.Lens(model, maps)
    report = transfer(model, lens, tokens)
    assert report.layers == [0, 1, 2] and report.settings["tokens"] == 5 * 8
    seen = {}
    tll.run(model, tokens, [tll.read(layer, seen) for layer in range(3)])

    def nats(translator, layer):
        logp = lens[translator](seen[layer])[:, 1:-1].log_softmax(-1).detach()
        return -float(logp.gather(-1, tokens[:, 2:, None]).mean())

    for a in range(3):
        for b in range(3):
            assert float(report.penalty[a, b]) == pytest.approx(nats(a, b) - nats(b, b), abs=1e-4)
    x, y = (torch.cov(seen[layer][:, 1:-1].reshape(-1, 32).T.double()) for layer in (0, 2))
    assert float(report.similarity[0, 2]) == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-5)


def test_penalties_and_similarity_by_hand(model, maps):
    check_by_hand(model, maps)


@pytest.mark.parametrize("step", ["_penalty", "_similarity"])
def test_the_check_fails_on_a_broken_copy(model, maps, monkeypatch, step):
    true = getattr(module, step)
    # The penalty of the transposed matrix; second moments of the wrong matrix.
    broken = (lambda x: true(x.T)) if step == "_penalty" else (lambda x: true(x.cumsum(0)))
    monkeypatch.setattr(module, step, broken)
    with pytest.raises(AssertionError):
        check_by_hand(model, maps)


def test_a_layer_that_is_twice_another_one(model, maps):
    """h_2 := 2 h_1 and W_2 := W_1 / 2: the covariances are alike, and a translator errs on the other layer by its factor alone."""
    seen = {}
    double = [tll.read(1, seen), tll.patch(2, lambda x: 2 * seen[1])]
    weights, biases = maps.weights.clone(), maps.biases.clone()
    weights[2], biases[:] = weights[1] / 2, 0.0
    by_hand = tll.Translators(maps.rows, weights, biases, n_layers=3, meta=maps.meta)
    report = transfer(model, tll.Lens(model, by_hand), zoo.tokens(5, 10), hooks=double)
    assert float(report.similarity[1, 2]) == pytest.approx(1.0, abs=1e-6) and float(report.similarity[0, 1]) < 0.99
    assert float(report.cross_entropy[1, 1]) == pytest.approx(float(report.cross_entropy[2, 2]), abs=1e-5)
    # The final norm takes a factor away: without a bias the two translators are one.
    assert abs(float(report.penalty[1, 2])) < 1e-3 and abs(float(report.penalty[2, 1])) < 1e-3
    assert float(report.penalty[0, 1].abs()) > 0.01


def test_a_planted_outlier_dimension_is_named(model, maps):
    def widened(x):
        x = x.clone()
        x[..., 7] *= 60
        return x

    report = transfer(model, tll.Lens(model, maps), zoo.tokens(8, 12), hooks=[tll.patch(2, widened)])
    plain = transfer(model, tll.Lens(model, maps), zoo.tokens(8, 12))
    assert plain.outliers() == {0: [], 1: [], 2: []} and report.outliers() == {0: [], 1: [], 2: [7]}
    assert "7 (" in " ".join(str(report).split()) and report.asymmetry()[1] == pytest.approx(float(report.penalty[:2, 2].mean()))
    assert report.asymmetry()[0] == pytest.approx(float(report.penalty[2, :2].mean()))


GAP = (torch.arange(6)[:, None] - torch.arange(6)).abs().double()


def planted(similarity):
    return module.Transfer.of("m", list(range(6)), GAP, similarity, torch.ones(6, 4), {})


def test_the_correlation_of_planted_matrices():
    it = planted(torch.exp(-GAP))
    assert torch.equal(it.penalty, GAP) and it.correlation() == pytest.approx(-1.0)


def test_the_chance_of_a_planted_correlation_is_small():
    assert planted(torch.exp(-GAP)).chance() < 0.02


def test_the_chance_of_noise_is_not_small():
    noise = torch.rand(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert planted(noise + noise.T).chance() > 0.05


def test_ties_have_the_mean_of_their_ranks():
    assert float(spearman(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]))) == pytest.approx(3**0.5 / 2)


def test_the_last_layer_may_take_part(model, maps):
    report = transfer(model, tll.Lens(model, maps), zoo.tokens(4, 10), layers=[-1, 1])
    assert report.layers == [1, 3] and float(report.penalty[1, 0]) > 0  # the logit lens on layer 1


def test_bad_input_is_refused_before_a_pass(model, maps, monkeypatch):
    monkeypatch.setattr(subject, "run", None)
    lens, tokens = tll.Lens(model, maps), zoo.tokens()
    with pytest.raises(ValueError, match="the logit lens has the same translator at every layer"):
        transfer(model, tll.Lens(model), tokens)
    with pytest.raises(ValueError, match="made for another model object"):
        transfer(zoo.build("neox", zoo.FEW_KINDS[0]), lens, tokens)
    with pytest.raises(ValueError, match="two layers at least"):
        transfer(model, lens, tokens, layers=[1])
    with pytest.raises(ValueError, match="expected different layers"):
        transfer(model, lens, tokens, layers=[1, 1])


def test_text_without_a_next_token_is_refused(model, maps):
    with pytest.raises(ValueError, match="no position has a next token"):
        transfer(model, tll.Lens(model, maps), zoo.tokens(3, 2))


def test_the_report_is_saved(model, maps, tmp_path):
    report = transfer(model, tll.Lens(model, maps), zoo.tokens(4, 10))
    folder = report.save(tmp_path / "out")
    assert {"result.csv", "penalty.svg", "similarity.svg", "scatter.svg"} <= {p.name for p in folder.iterdir()}
    assert len(report.to_frame()) == 9

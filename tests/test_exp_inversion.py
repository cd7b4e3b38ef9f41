"""Inversion of distributions whose state is known, with a minimiser that is tried on minima that are known."""

import pytest
import torch
import zoo

import tl_lenses as tll
import tl_lenses.experiments.tuned_lens.inversion as module
from tl_lenses.experiments import Gaussian, inversion, invert
from tl_lenses.experiments.tuned_lens.inversion import FREE, PRIOR, START, TRUE, least_squares
from tl_lenses.moments import moments
from tl_lenses.numerics import minimise


@pytest.fixture(scope="module")
def maps(model):
    return tll.fit_regression(model, zoo.tokens(40, 24))


def states(n=6, d=32, seed=0):
    return 2 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_the_minimiser_finds_each_row_its_own_minimum():
    goal, scale = states(5, 10), torch.logspace(0, 3, 10)
    f = lambda x, rows: (scale * (x - goal[rows]) ** 2).sum(-1)
    x, grad_norm, count = minimise(f, torch.zeros(5, 10), steps=200, tol=1e-4)
    assert torch.allclose(x, goal, atol=1e-3) and count < 200
    valley = lambda x, rows: (1 - x[:, 0]) ** 2 + 100 * (x[:, 1] - x[:, 0] ** 2) ** 2
    x, _, _ = minimise(valley, torch.tensor([[-1.2, 1.0], [2.0, 2.0]], dtype=torch.float64), steps=300)
    assert torch.allclose(x, torch.ones(2, 2, dtype=torch.float64), atol=1e-4)


@pytest.mark.parametrize("arch,kind", zoo.cases(("gpt2", "llama", "gemma2"), zoo.FEW_KINDS))
def test_a_distribution_of_a_state_gives_the_state_back(arch, kind, monkeypatch):
    """Up to what the norm takes out; and without the minimiser, from a start that is nowhere, the check fails."""
    model = zoo.build(arch, kind)
    lens, h = tll.Lens(model), states()
    logp = lens[1](h).detach().log_softmax(-1)
    inverted = invert(lens[1], logp, start=states(seed=1), steps=300)
    assert inverted.kl.max() < 1e-3, inverted  # measured below 1e-4
    normed = lens.readout.norm(inverted.state), lens.readout.norm(h)
    assert torch.cosine_similarity(*normed, dim=-1).min() > 0.9  # .95 measured: a peaked distribution is flat in places
    monkeypatch.setattr(module, "minimise", lambda f, x, **kwargs: (x, x.norm(dim=-1), 0))
    assert invert(lens[1], logp, start=states(seed=1)).kl.min() > 0.05


def test_least_squares_alone_inverts_what_can_be_inverted(model, maps):
    lens = tll.Lens(model, maps)
    h = states()
    logp = lens[1](h).detach().log_softmax(-1)
    begin = least_squares(lens[1], logp, length=float(lens[1].translate(h).norm(dim=-1).mean()))
    assert module.divergence(lens[1], begin, logp).max() < 1e-3
    inverted = invert(lens[1], logp)
    assert inverted.kl.max() < 1e-4 and inverted.evaluations < 60


def test_a_prior_holds_the_state(model):
    lens, h = tll.Lens(model), states()
    logp = lens[2](h).detach().log_softmax(-1)
    natural = 2 * torch.randn(1, 4000, 32, generator=torch.Generator().manual_seed(5)) + 0.5
    prior = Gaussian.of(moments(natural, natural[..., :1]))
    assert torch.allclose(prior.factor @ prior.factor.T, natural[0].T.cov(correction=0) + 4e-3 * torch.eye(32), atol=2e-2)
    x = states(3)
    assert torch.allclose(prior.colour(prior.whiten(x)), x, atol=1e-3)
    free = invert(lens[2], logp, start=states(seed=1), steps=200)
    held = invert(lens[2], logp, start=states(seed=1), prior=prior, weight=1e-3, steps=200)
    heavy = invert(lens[2], logp, prior=prior, weight=1e4, steps=200)
    assert torch.allclose(heavy.state, prior.mean.expand(6, -1), atol=0.1)
    away = lambda inverted: (inverted.state - h).norm(dim=-1).mean()
    assert away(held) < away(free) and held.kl.max() < 0.2
    certain = Gaussian(h[0], 1e-3 * torch.eye(32))
    assert torch.allclose(invert(lens[2], logp[:1], prior=certain, weight=1.0).state, h[:1], atol=1e-2)


def test_the_experiment_on_a_random_model(model, maps, tmp_path):
    lenses = {"logit": tll.Lens(model), "regression": tll.Lens(model, maps)}
    report = inversion(model, lenses, zoo.tokens(40, 24), n=5, layers=[1, 3], steps=80, show_progress=False)
    at = {name: i for i, name in enumerate(report.conditions)}
    assert report.kl.shape == (2, 2, 4, 5) and report.settings["prior_positions"] == 32 * 23
    assert report.kl[:, 1, at[TRUE]].max() < 1e-5  # the last layer is the model
    assert (report.kl[:, :, at[FREE]] <= report.kl[:, :, at[START]] + 1e-4).all() and report.kl[:, :, at[FREE]].max() < 1e-2
    assert (report.cosine[:, :, at[TRUE]] > 0.999).all()
    assert report.typical[:, :, at[PRIOR]].mean() < report.typical[:, :, at[FREE]].mean()
    assert report.typical[:, :, at[TRUE]].mean() == pytest.approx(1.0, abs=0.4)
    assert torch.allclose(report.kl[0, 1], report.kl[1, 1], atol=1e-4)
    text = report.markdown()
    assert "least squares" in text and "Mahalanobis" in text
    folder = report.save(tmp_path / "a")
    assert (folder / "cosine.svg").exists() and len(report.to_frame()) == 16


def test_bad_input_is_refused_before_a_pass(model, monkeypatch, unchecked):
    lenses, tokens = {"logit": tll.Lens(model)}, zoo.tokens(20, 12)
    other = tll.Lens(zoo.build("gpt2", zoo.FEW_KINDS[1]))
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    for kwargs, message in (
        ({"lenses": {"far": other}}, "lens 'far' was made for another model object"),
        ({"lenses": {}}, "needs at least one lens"),
        ({"weight": -1.0}, "weight must be at least 0, got -1"),
        ({"layers": [7]}, "no layer 7"),
    ):
        with pytest.raises(ValueError, match=message):
            inversion(model, **{"lenses": lenses, "tokens": tokens, **kwargs})
    logp = torch.randn(2, 320)
    with pytest.raises(ValueError, match="expected log-probabilities"):
        invert(lenses["logit"][1], logp)
    with pytest.raises(ValueError, match="needs a prior"):
        invert(lenses["logit"][1], logp.log_softmax(-1), weight=1.0)
    with pytest.raises(ValueError, match=r"start must be \[2, 32\]"):
        invert(lenses["logit"][1], logp.log_softmax(-1), start=torch.zeros(1, 32))
    single = torch.ones(1, 1, 3)
    with pytest.raises(ValueError, match="needs two states"):
        Gaussian.of(moments(single, single))


def test_text_that_is_too_short_is_refused(model):
    with pytest.raises(ValueError, match="none for the prior"):
        inversion(model, {"logit": tll.Lens(model)}, zoo.tokens(2, 12), n=5)


def test_the_command_runs(model, maps):
    from tl_lenses.cli.experiment import Run
    from tl_lenses.cli.lens_experiments import inversion as command

    report = command(Run(model, layers=[1, 3], n=2, lenses={"maps": maps.select([1])}))
    assert report.lenses == ["logit", "maps"] and report.kl.shape == (2, 2, 4, 2)

"""Readouts beside what a lens says on average: against loops over whole distributions, and the laws of a z-score."""

import pytest
import torch
import zoo

import tl_lenses as tll

TOKENS, KINDS = zoo.tokens(6, 14), zoo.FEW_KINDS


@pytest.fixture(params=KINDS, scope="module")
def model(request):
    return zoo.build("gpt2", request.param)


@torch.no_grad()
def whole(model, lens, tokens, layer):
    """`log q [batch, pos, d_vocab]` of a lens."""
    seen = {}
    tll.run(model, tokens, [tll.read(layer, seen, key="h")])
    return lens[layer](seen["h"]).double().log_softmax(-1)


@pytest.fixture(scope="module")
def usual(model):
    """Marginals of two lenses on `TOKENS`, and the log-probabilities that the first one gives there at layer 1."""
    lens = tll.Lens(model, zoo.random_maps(model))
    found = tll.marginals(model, {"fit": lens, "logit": tll.Lens(model)}, TOKENS.split(4), show_progress=False)
    return found, whole(model, lens, TOKENS, 1)[:, 1:].flatten(0, 1)


def test_there_are_marginals_of_every_lens_at_every_layer(usual):
    found, _ = usual
    assert found.n == 6 * 13 and set(found.mean) == {(n, i) for n in ("fit", "logit") for i in range(3)}


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("mean", lambda logp: logp.mean(0)),
        ("sd", lambda logp: logp.std(0, correction=0)),
        ("log_marginal", lambda logp: logp.exp().mean(0).log()),
    ],
)
def test_a_marginal_is_over_positions(usual, name, of):
    found, logp = usual
    torch.testing.assert_close(getattr(found, name)["fit", 1].double(), of(logp), atol=1e-4, rtol=1e-4)


def test_scores_of_their_own_text_are_standardised(usual):
    found, logp = usual
    z = found.score("fit", 1, logp)
    assert float(z.mean(0).abs().max()) < 1e-3 and float((z.std(0, correction=0) - 1).abs().max()) < 1e-3


def test_ratios_to_the_marginal_are_one_in_the_mean(usual):
    found, logp = usual
    ratios = found.by("marginal").score("fit", 1, logp).exp()
    torch.testing.assert_close(ratios.mean(0), torch.ones(zoo.D_VOCAB).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["z", "marginal"])
def test_a_calibrated_trajectory_ranks_by_the_score(model, kind):
    lens = tll.Lens(model, zoo.random_maps(model))
    usual = tll.marginals(model, lens, zoo.tokens(9, 14, seed=2), show_progress=False).by(kind)
    plain, traj = (tll.trajectory(model, lens, TOKENS, track=[7, 9], calibrated=by, chunk_size=5) for by in (None, usual))
    score = usual.score("", 1, whole(model, lens, TOKENS, 1))
    best = score.topk(10).indices
    assert torch.equal(traj.top_ids[1], best) and not torch.equal(traj.top_ids[1], plain.top_ids[1])
    probs = whole(model, lens, TOKENS, 1).exp().gather(-1, best)
    torch.testing.assert_close(traj.top_probs[1].double(), probs, atol=1e-6, rtol=1e-4)
    targets = TOKENS[:, 1:, None]
    own = score[:, :-1].gather(-1, targets)
    torch.testing.assert_close(traj.score[1, :, :-1].double(), own[..., 0], atol=1e-3, rtol=1e-3)
    assert torch.equal(traj.rank[1, :, :-1], 1 + (score[:, :-1] > own).sum(-1))
    assert torch.equal(traj.tracked.ranks[1, ..., 1], 1 + (score > score[..., 9:10]).sum(-1).int())
    for name in ("kl", "entropy", "max_prob", "target_logprob"):
        torch.testing.assert_close(getattr(traj, name), getattr(plain, name), atol=0, rtol=0, equal_nan=True)
    # the last row is the model, as ever
    assert torch.equal(traj.top_ids[-1], plain.top_ids[-1]) and torch.equal(traj.rank[-1], plain.rank[-1])
    assert traj.score[-1].isnan().all() and "score" in traj.to_frame().columns
    assert f"'{kind}'" in traj.settings["calibrated"]


def test_a_lens_that_is_equally_sure_of_all_keeps_its_ranks(model):
    """Where mean and spread are the same for every token, so are ranks."""
    lens, v = tll.Lens(model), zoo.D_VOCAB
    flat = tll.Marginals(*[{("", i): torch.full((v,), x) for i in range(3)} for x in (-5.0, 2.0, -4.0)], n=10)
    for kind in ("z", "marginal"):
        traj, plain = (tll.trajectory(model, lens, TOKENS, calibrated=by) for by in (flat.by(kind), None))
        assert torch.equal(traj.rank, plain.rank) and torch.equal(traj.top_ids[..., 0], plain.top_ids[..., 0])


def test_a_token_that_never_changes_is_never_first(model):
    lens = tll.Lens(model)
    usual = tll.marginals(model, lens, TOKENS, layers=[1], show_progress=False)
    usual.sd["", 1][5] = 0.0
    top = tll.trajectory(model, lens, TOKENS, [1], calibrated=usual).top_ids
    assert not (top == 5).any()


def test_calibrated_scores_are_drawn(model, tmp_path):
    lens = tll.Lens(model)
    usual = tll.marginals(model, lens, TOKENS, show_progress=False)
    traj = tll.trajectory(model, lens, TOKENS[:1], calibrated=usual)
    for name in ("a.svg", "a.html", "a.json"):
        assert traj.save(tmp_path / name, **({} if name == "a.json" else {"stat": "score"})).stat().st_size > 1000
    assert "calibrated score" in (tmp_path / "a.svg").read_text()


def test_refusals(model, unchecked):
    lens = tll.Lens(model)
    usual = tll.marginals(model, lens, TOKENS, layers=[1], show_progress=False)
    with pytest.raises(ValueError, match="no lens '' at layer 0: they have 1"):
        tll.trajectory(model, lens, TOKENS, calibrated=usual)
    with pytest.raises(TypeError, match=r"what tll\.marginals returns, got dict"):
        tll.trajectory(model, lens, TOKENS, calibrated={})
    with pytest.raises(ValueError, match=r"score needs calibrated=tll\.marginals"):
        _ = tll.trajectory(model, lens, TOKENS).score
    with pytest.raises(ValueError, match="two at least"):
        tll.marginals(model, lens, TOKENS[:1, :2], show_progress=False)
    with pytest.raises(ValueError, match="kind must be 'z' or 'marginal', got 'odds'"):
        usual.by("odds")

"""Stimulus and response: a model that is affine, whose exact lens must respond as it does, and what breaks that."""

from importlib import import_module

import pytest
import torch
import zoo

import tl_lenses as tll

A = import_module("tl_lenses.experiments.tuned_lens.alignment")
TOKENS = torch.randint(4, zoo.D_VOCAB, (24, 1), generator=torch.Generator().manual_seed(1))
LONG = torch.randint(4, zoo.D_VOCAB, (4, 10), generator=torch.Generator().manual_seed(2))


def of(result, value, lens):
    """The numbers of one lens by layer."""
    return result.grid.at(lens=lens)[value]


@pytest.fixture(scope="module")
def affine():
    """The model that is affine on one token, and its exact lens."""
    model = zoo.affine_model()
    return model, tll.Lens(model, zoo.exact_maps(model))


def test_an_affine_model_responds_as_its_exact_lens(affine):
    model, lens = affine
    result = A.alignment(model, {"logit": tll.Lens(model), "exact": lens}, TOKENS, k=2, skip_first=False)
    assert result.settings["n"] == 24 and result.layers == [0, 1, 2]
    assert (of(result, "similarity", "exact") > 0.999).all()
    assert torch.allclose(of(result, "stimulus", "exact"), of(result, "response", "exact"), rtol=1e-3)  # as long, too
    assert (of(result, "similarity", "logit") < 0.99).all()
    assert (of(result, "shuffled", "exact") < 0.9).all()  # the response of another position


def test_a_lens_that_reads_the_wrong_state_is_caught(affine, monkeypatch):
    model, lens = affine
    real = A.read
    # What was patched is read one layer further on: the lens at l sees h_{l+1}.
    wrong = lambda name, into, key: real(tll.site(model, int(name.split(".")[1]) + 1), into, key)
    monkeypatch.setattr(A, "read", wrong)
    result = A.alignment(model, {"exact": lens}, TOKENS, k=2, skip_first=False, layers=[0, 1])
    assert not (of(result, "similarity", "exact") > 0.999).all()


def test_an_unweighted_or_uncentred_product_is_another_number(affine, monkeypatch):
    model, lens = affine
    settings = {"k": 2, "skip_first": False, "layers": [1]}
    both = A.alignment(model, {"logit": tll.Lens(model)}, TOKENS, **settings)
    by_model = A.alignment(model, {"logit": tll.Lens(model)}, TOKENS, weights="model", **settings)
    assert not torch.equal(both.similarity, by_model.similarity)
    monkeypatch.setattr(A.aitchison, "clr", lambda logp, w=None: logp)
    broken = A.alignment(model, {"logit": tll.Lens(model)}, TOKENS, **settings)
    assert (broken.similarity - both.similarity).abs().max() > 1e-3


def at_the_end(model, **settings):
    """The logit lens at layer 1 and at the final state, in given subspaces."""
    depth, width = model.cfg.n_layers, model.cfg.d_model
    rows = torch.linalg.qr(torch.randn(width, 3, generator=torch.Generator().manual_seed(3))).Q.T
    spaces = {"logit": {1: rows, depth: rows}}
    return A.alignment(model, {"logit": tll.Lens(model)}, LONG, layers=[1, depth], subspaces=spaces, **settings).similarity


def test_at_the_final_state_every_lens_is_the_model(model):
    early, final = at_the_end(model)[0]
    assert early < 0.99 and final > 0.999


def test_another_seed_draws_other_states(model):
    assert not torch.equal(at_the_end(model), at_the_end(model, seed=5))


@pytest.fixture(scope="module")
def report(model):
    return A.alignment(model, {"a": tll.Lens(model), "b": tll.Lens(model)}, LONG, k=2, layers=[1, 2], n=20)


def test_equal_lenses_respond_alike(report):
    assert torch.equal(of(report, "response", "a"), of(report, "response", "b"))


def test_the_report_has_its_table_figure_and_frame(report, tmp_path):
    assert "a, shuffled" in report.markdown() and len(report.to_frame()) == 4
    assert (report.save(tmp_path / "out") / "similarity.svg").exists()


def test_bad_input_is_refused_before_any_pass(model, monkeypatch):
    lens, width = tll.Lens(model), model.cfg.d_model
    other = tll.Lens(zoo.affine_model())
    basis = torch.eye(width)[:2]
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("ran"))
    given = lambda rows, layers=(1,): {"layers": [1], "subspaces": {"x": dict.fromkeys(layers, rows)}}
    for lenses, settings, message in (
        ({"x": lens}, {"k": width + 1}, f"k is {width + 1}"),
        ({"x": lens}, {"weights": "none"}, "weights must be"),
        ({}, {}, "needs at least one lens"),
        ({"x": other}, {}, "lens 'x' was made for another model object"),
        ({"x": lens}, given(basis * 2), "said to be orthonormal and are not"),
        ({"x": lens}, given(torch.eye(5)), r"has shape \[5, 5\], expected \[k, 32\]"),
        ({"x": lens}, given(basis, (1, 2)), r"for layer 2 which layers=\[1\] leaves out"),
        ({"x": lens}, given(basis, ()), "not for layer 1"),
        ({"y": lens}, given(basis), "not for lens 'y'"),
    ):
        with pytest.raises(ValueError, match=message):
            A.alignment(model, lenses, LONG, **settings)
    with pytest.raises(ValueError, match="two positions in every batch"):
        A.alignment(model, {"x": lens}, [LONG[:1, :2], LONG[:1, :2]])

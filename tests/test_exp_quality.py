"""Quality of lenses: an exact lens has no KL and no bias; numbers agree with a computation by hand, and a wrong one does not."""

import math

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses import decode
from tl_lenses.experiments import quality


@pytest.fixture(scope="module")
def lenses(model):
    return {"logit": tll.Lens(model), "regression": tll.Lens(model, tll.fit_regression(model, zoo.tokens(60, 12)))}


def test_the_exact_lens_of_an_affine_model_has_no_kl_and_no_bias():
    model = zoo.affine_model(dtype=torch.float64)
    lenses = {"logit": tll.Lens(model), "exact": tll.Lens(model, zoo.exact_maps(model))}
    report = quality(model, lenses, zoo.tokens(40, 1), skip_first=False, bytes_per_token=1.0)
    for row in report.rows():
        wrong = row["lens"] == "logit" and row["layer"] < model.cfg.n_layers
        assert (row["kl"] > 0.1) is wrong and (row["bias"] > 0.05) is wrong, row
        assert wrong or (row["kl"] < 1e-9 and row["bias"] < 1e-9)
    assert report.better("exact", "logit") == {report.model: (3, 3)}


def by_hand(model, lens, tokens, layer):
    """KL, bits per byte at two bytes a token, and bias in bits of one layer, from whole tensors."""
    seen = {}
    logits = tll.run(model, tokens, [tll.read(tll.site(model, layer), seen, key=0)])
    p, q = logits[:, 1:].log_softmax(-1).detach(), lens[layer](seen[0])[:, 1:].log_softmax(-1).detach()
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    nats = -float(q[:, :-1].gather(-1, tokens[:, 2:, None]).mean())
    a, b = p.exp().mean((0, 1)), q.exp().mean((0, 1))
    return kl, nats / math.log(2) / 2.0, float((a * (a / b).log()).sum()) / math.log(2)


def check_by_hand(model, lenses):
    tokens = zoo.tokens(6, 10, seed=5)
    report = quality(model, lenses, tokens, bytes_per_token=2.0)
    for row in report.rows():
        want = by_hand(model, lenses[row["lens"]], tokens, row["layer"])
        assert (row["kl"], row["bits_per_byte"], row["bias_bits"]) == pytest.approx(want, abs=1e-4)


def test_numbers_by_hand(model, lenses):
    check_by_hand(model, lenses)


def test_the_check_fails_where_kl_is_the_wrong_way_round(model, lenses, monkeypatch):
    true = decode.S.kl
    monkeypatch.setattr(decode.S, "kl", lambda p, q, *_: true(q, p))
    with pytest.raises(AssertionError):
        check_by_hand(model, lenses)


@pytest.fixture(scope="module")
def reports(model, lenses):
    other = zoo.build("neox", zoo.FEW_KINDS[0])
    first = quality(model, lenses, zoo.tokens(4, 10), bytes_per_token=2.0, name="one")
    return first, first + quality(other, tll.Lens(other), zoo.tokens(4, 10), bytes_per_token=3.0, name="two")


def test_several_models_are_in_one_table(reports):
    both = reports[1]
    assert list(both.scores) == ["one", "two"] and both.settings["tokens"] == {"one": 36, "two": 36}
    table = both.tables()[0]
    assert [row[0] for row in table.rows] == ["one"] * 4 + ["two"] * 4 and len(table.columns) == 2 + 3 * 3
    assert set(both.to_frame()["model"]) == {"one", "two"}


def test_several_models_are_in_one_figure(reports):
    pictures = reports[1].pictures()
    assert "bits_per_byte" in pictures and len(next(iter(pictures.values())).series) == 3  # two has one lens


def test_a_model_is_in_a_report_once(reports):
    with pytest.raises(ValueError, match="'one' is in both reports"):
        reports[0] + reports[0]


def test_bad_input_is_refused_before_a_pass(model, lenses, monkeypatch):
    monkeypatch.setattr(decode, "run", None)
    other = zoo.build("neox", zoo.FEW_KINDS[0])
    with pytest.raises(ValueError, match="lens 'lens' was made for another model object"):
        quality(model, tll.Lens(other), zoo.tokens())
    with pytest.raises(ValueError, match="at least one lens"):
        quality(model, {}, zoo.tokens())
    maps = tll.Lens(model, lenses["regression"].translators.select([1]))
    with pytest.raises(ValueError, match=r"lens 'one' has no layer 2; it has \[1, 3\]"):
        quality(model, {"logit": tll.Lens(model), "one": maps}, zoo.tokens(), layers=[1, 2])
    with pytest.raises(ValueError, match="no layer 9"):
        quality(model, lenses, zoo.tokens(), layers=[9])


def test_the_report_is_saved(model, lenses, tmp_path):
    folder = quality(model, lenses, zoo.tokens(4, 10), bytes_per_token=2.0).save(tmp_path / "out")
    assert {"result.json", "result.csv", "bits_per_byte.svg", "kl.svg", "bias_bits.svg"} <= {p.name for p in folder.iterdir()}

"""Transfer to a fine-tune: a model is its own fine-tune at no cost; the fine-tune's own readout is used; costs by hand."""

import math
from importlib import import_module

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses.experiments import fine_tune
from tl_lenses.experiments.tuned_lens.fine_tune import BASE, LOGIT, OWN

module = import_module("tl_lenses.experiments.tuned_lens.fine_tune")


@pytest.fixture(scope="module")
def moved(maps):
    """Translators that say they are of a model whose readout behaves differently, with other maps."""
    generator = torch.Generator().manual_seed(0)
    weights = maps.weights + 0.05 * torch.randn(maps.weights.shape, generator=generator)
    fingerprint = maps.meta["fingerprint"]
    meta = {**maps.meta, "model": "the-base", "fingerprint": _negated(fingerprint)}
    return tll.Translators(maps.rows, weights, maps.biases, n_layers=3, meta=meta)


def of(report, value, lens):
    """The numbers `[row, layer]` of one lens."""
    return report.grid.at(lens=lens)[value]


def _negated(value):
    if isinstance(value, (list, tuple)):
        return [_negated(v) for v in value]
    return {k: _negated(v) for k, v in value.items()} if isinstance(value, dict) else -value if isinstance(value, float) else value


def test_a_model_is_its_own_fine_tune_at_no_cost(model, maps):
    report = fine_tune(model, maps, maps, zoo.tokens(5, 10), bytes_per_token=2.0)
    assert report.layers == [0, 1, 2, 3] and not report.cost().any() and not report.cost("kl").any() and not report.warning
    assert torch.allclose(of(report, "kl", OWN)[:, 3], torch.zeros(5, dtype=torch.float64), atol=1e-6)
    assert torch.equal(of(report, "bits_per_byte", LOGIT)[:, 3], of(report, "bits_per_byte", OWN)[:, 3])  # the model itself


def check_by_hand(model, moved, maps):
    tokens = zoo.tokens(4, 10, seed=9)
    report = fine_tune(model, moved, maps, tokens, bytes_per_token=2.0)
    assert report.warning and report.base == "the-base"
    seen = {}
    logits = tll.run(model, tokens, [tll.read(layer, seen) for layer in range(3)])
    for layer in range(3):
        for name, used in ((BASE, moved), (OWN, maps)):
            # The translator of the one model, norm and unembedding of the other.
            logq = zoo.readout(model, used[layer](seen[layer]))[:, 1:].log_softmax(-1).detach()
            nats = -logq[:, :-1].gather(-1, tokens[:, 2:, None])[..., 0].mean(1)
            want = nats / math.log(2) / 2.0
            assert torch.allclose(of(report, "bits_per_byte", name)[:, layer], want.double(), atol=1e-4)
            logp = logits[:, 1:].log_softmax(-1).detach()
            kl = (logp.exp() * (logp - logq)).sum(-1).mean(1) / math.log(2) / 2.0
            assert torch.allclose(of(report, "kl", name)[:, layer], kl.double(), atol=1e-4)


def test_costs_by_hand(model, moved, maps):
    check_by_hand(model, moved, maps)


def test_the_check_fails_where_the_logit_lens_is_used_instead(model, moved, maps, monkeypatch):
    monkeypatch.setattr(module, "Lens", lambda m, translators=None, **how: tll.Lens(m))
    with pytest.raises(AssertionError):
        check_by_hand(model, moved, maps)


def test_the_error_is_that_of_a_paired_mean(model, moved, maps):
    report = fine_tune(model, moved, maps, zoo.tokens(6, 10), bytes_per_token=2.0)
    cost = of(report, "bits_per_byte", BASE) - of(report, "bits_per_byte", OWN)
    assert torch.allclose(report.error(), cost.std(0) / 6**0.5) and float(report.error()[3]) == 0.0
    assert {row["lens"] for row in report.rows()} == {LOGIT, BASE, OWN}


def test_pads_and_rows_without_a_next_token_do_not_count(model, moved, maps):
    from tl_lenses import Batch

    tokens = zoo.tokens(3, 8)
    mask = torch.ones_like(tokens)
    mask[1, :4], mask[2, :6] = 0, 0  # the last row has two real tokens: one is left out, the other has no next one
    report = fine_tune(model, moved, maps, Batch(tokens, mask), bytes_per_token=2.0)
    alone = fine_tune(model, moved, maps, tokens[1:2, 4:], bytes_per_token=2.0)
    assert len(report.cost()) == 2 and torch.allclose(report.cost()[1], alone.cost()[0], atol=1e-4)


def test_bad_input_is_refused_before_a_pass(model, maps, monkeypatch):
    monkeypatch.setattr(module, "read_run", None)
    wide = tll.Translators(
        [("blocks.0.hook_resid_pre", "blocks.2.hook_resid_post")], torch.eye(16)[None], torch.zeros(1, 16), n_layers=3
    )
    for base, fitted_here in ((wide, maps), (maps, wide)):
        with pytest.raises(ValueError, match="d_model 16"):
            fine_tune(model, base, fitted_here, zoo.tokens())
    with pytest.raises(ValueError, match="has no layer 0; it has"):
        fine_tune(model, maps.select([1]), maps, zoo.tokens(), layers=[0])
    bare = zoo.build("gpt2", zoo.FEW_KINDS[0])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no position has a next token"):
        fine_tune(bare, maps, maps, zoo.tokens(3, 2), bytes_per_token=2.0)


def test_an_own_lens_of_another_model_is_refused(model, moved, maps):
    with pytest.raises(ValueError, match="another fingerprint"):
        fine_tune(model, maps, moved, zoo.tokens())


def test_the_report_is_saved(model, moved, maps, tmp_path):
    report = fine_tune(model, moved, maps, zoo.tokens(4, 10))
    folder = report.save(tmp_path / "out")
    assert {"result.csv", "bits_per_byte.svg", "cost.svg"} <= {p.name for p in folder.iterdir()}
    assert "behaves differently" in report.markdown() and report.settings["bytes_per_token"] > 0

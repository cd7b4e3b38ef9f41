"""Sampling from a lens: the last layer is the model, cached is uncached, a batch is its rows, and planted lenses say what was planted."""

from importlib import import_module

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses.experiments import sample_from, sampling

module = import_module("tl_lenses.experiments.tuned_lens.sampling")


def of(report, value, lens):
    """The numbers of one lens, layers first."""
    return report.grid.at(lens=lens)[value]


def greedy_by_hand(model, lens, layer, tokens, n):
    """One whole pass per token: read layer l at the last position, decode, take the likeliest."""
    for _ in range(n):
        seen = {}
        tll.run(model, tokens, [tll.read(tll.site(model, layer), seen, key=0, pos=-1)])
        tokens = torch.cat([tokens, lens[layer](seen[0])[:, 0].argmax(-1)[:, None]], 1)
    return tokens


def drawn_by_hand(model, lens, layer, tokens, n, seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        seen = {}
        tll.run(model, tokens, [tll.read(tll.site(model, layer), seen, key=0, pos=-1)])
        p = (lens[layer](seen[0])[:, 0].float() / temperature).softmax(-1).detach()
        tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=generator)], 1)
    return tokens


GREEDY = {"do_sample": False, "stop_at_eos": False}


@pytest.mark.parametrize("arch,kind", zoo.cases())
def test_cached_and_uncached_agree_with_passes_by_hand(arch, kind):
    model, tokens = zoo.build(arch, kind), zoo.tokens(2, 6)
    lens = tll.Lens(model)
    want = greedy_by_hand(model, lens, 1, tokens, 4)
    for use_cache in (True, False):
        assert torch.equal(sample_from(model, lens, 1, tokens, 4, use_cache=use_cache, **GREEDY), want)


@pytest.mark.parametrize("arch,kind", zoo.cases())
def test_the_last_layer_says_what_the_model_says(arch, kind):
    model, tokens = zoo.build(arch, kind), zoo.tokens(2, 6)
    said = sample_from(model, tll.Lens(model), model.cfg.n_layers, tokens, 4, **GREEDY)
    assert torch.equal(said, tll.generate(model, tokens, (), 4, stop_at_eos=False))


def check_draws(model, maps):
    lens, tokens = tll.Lens(model, maps), zoo.tokens(3, 6)
    for layer in (0, 2, 3):
        want = drawn_by_hand(model, lens, layer, tokens, 8, seed=3, temperature=0.7)
        for use_cache in (True, False):
            got = sample_from(model, lens, layer, tokens, 8, temperature=0.7, seed=3, use_cache=use_cache, stop_at_eos=False)
            assert torch.equal(got, want), layer
    assert not torch.equal(sample_from(model, lens, 0, tokens, 8, seed=4), sample_from(model, lens, 0, tokens, 8, seed=5))


def test_draws_are_those_of_the_lens_with_and_without_a_cache(model, maps):
    check_draws(model, maps)


def test_the_check_fails_where_another_layer_speaks(model, maps, monkeypatch):
    true = module._speaking
    monkeypatch.setattr(module, "_speaking", lambda model, lens, layer: true(model, lens, (layer + 1) % 4))
    with pytest.raises(AssertionError):
        check_draws(model, maps)


def test_the_last_layer_is_generate(model, maps):
    tokens = zoo.tokens(3, 6)
    for how in ({"do_sample": True, "seed": 5, "temperature": 1.3}, {"do_sample": False}):
        model_ids = tll.generate(model, tokens, (), 6, **how)
        for lens in (tll.Lens(model), tll.Lens(model, maps)):
            for layer in (3, -1, "blocks.2.hook_resid_post"):
                assert torch.equal(sample_from(model, lens, layer, tokens, 6, **how), model_ids)


def test_a_lens_that_always_says_one_token(model, maps):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    token = int(zoo.readout(model, direction).argmax())
    biases = torch.stack([direction] * 3)
    deaf = tll.Translators(maps.rows, torch.zeros_like(maps.weights), biases, n_layers=3, meta=maps.meta)
    ids = sample_from(model, tll.Lens(model, deaf), 1, zoo.tokens(2, 5), 6, do_sample=False, stop_at_eos=False)
    assert (ids[:, 5:] == token).all()
    report = sampling(model, {"deaf": tll.Lens(model, deaf)}, zoo.tokens(2, 5), max_new_tokens=6, do_sample=False)
    assert (of(report, "distinct", "deaf")[:3] == 1 / 6).all() and of(report, "agreement", "deaf")[3].all()
    assert of(report, "would", "deaf")[3].all()  # greedy: the model's own token is its likeliest


def test_a_batch_is_its_rows_padding_included(model, maps):
    lens, texts = tll.Lens(model, maps), ["the cat sat on the", "a bird", "the king said to his daughter"]
    both = sample_from(model, lens, 1, texts, 5, do_sample=False, stop_at_eos=False)
    for row, text in zip(both, texts, strict=True):
        alone = sample_from(model, lens, 1, text, 5, do_sample=False, stop_at_eos=False)
        assert torch.equal(row[-5:], alone[0, -5:])


def test_interventions_run_first(model, maps):
    lens, tokens = tll.Lens(model, maps), zoo.tokens(2, 6)
    edit = [tll.patch(1, tll.edits.scale(-3.0), pos=-1)]
    changed = sample_from(model, lens, 1, tokens, 4, do_sample=False, stop_at_eos=False, hooks=edit)
    seen = {}
    tll.run(model, tokens, [*edit, tll.read(1, seen, pos=-1)])
    assert torch.equal(changed[:, 6], lens[1](seen[1])[:, 0].argmax(-1))
    plain = sample_from(model, lens, 1, tokens, 4, do_sample=False, stop_at_eos=False)
    assert not torch.equal(changed, plain)
    assert zoo.n_hooks(model) == 0


def test_the_numbers_of_the_report_by_hand(model, maps):
    tokens = zoo.tokens(3, 6)
    report = sampling(model, {"logit": tll.Lens(model), "regression": tll.Lens(model, maps)}, tokens, max_new_tokens=7, seed=2)
    assert report.layers == [0, 1, 2, 3]
    ids = sample_from(model, tll.Lens(model, maps), 1, tokens, 7, seed=2, stop_at_eos=False)
    logp = tll.run(model, ids)[:, 5:-1].log_softmax(-1).detach()
    nats = -logp.gather(-1, ids[:, 6:, None])[..., 0].mean(1)
    assert torch.allclose(of(report, "nats", "regression")[1], nats, atol=1e-5)
    assert float(report.perplexity("regression")[1]) == pytest.approx(float(nats.mean().exp()), rel=1e-4)
    assert torch.equal(of(report, "would", "regression")[1], logp.argmax(-1) == ids[:, 6:])
    model_ids = tll.generate(model, tokens, (), 7, do_sample=True, seed=2, stop_at_eos=False)[:, 6:]
    assert (
        torch.equal(of(report, "agreement", "regression")[1], model_ids == ids[:, 6:]) and of(report, "agreement", "logit")[3].all()
    )
    assert report.texts["regression"][1][0] == model.tokenizer.decode(ids[0, 6:].tolist())
    assert len(report.rows()) == 2 * 4 * 3


def test_padded_prompts_are_judged_as_they_are_alone(model):
    texts = ["the cat sat on the", "a bird"]
    both = sampling(model, tll.Lens(model), texts, max_new_tokens=4, do_sample=False)
    alone = sampling(model, tll.Lens(model), texts[1], max_new_tokens=4, do_sample=False)
    assert torch.allclose(of(both, "nats", "lens")[:, 1], of(alone, "nats", "lens")[:, 0], atol=1e-4)
    assert both.prompts[1].endswith("a bird") and "<pad>" not in both.prompts[1]


def test_bad_input_is_refused_before_a_pass(model, maps, monkeypatch):
    monkeypatch.setattr(module, "generate", None)
    tokens, fitted = zoo.tokens(2, 5), tll.Lens(model, maps.select([1]))
    with pytest.raises(ValueError, match="made for another model object"):
        sample_from(zoo.build("neox", zoo.FEW_KINDS[0]), fitted, 1, tokens)
    with pytest.raises(ValueError, match="layer 0 was not fitted"):
        sample_from(model, fitted, 0, tokens)
    with pytest.raises(ValueError, match="no layer 8"):
        sample_from(model, fitted, 8, tokens)
    with pytest.raises(ValueError, match="temperature must be positive, got 0.0"):
        sample_from(model, fitted, 1, tokens, temperature=0.0)
    with pytest.raises(ValueError, match="has no layer 0; it has"):
        sampling(model, {"logit": tll.Lens(model), "one": fitted}, tokens, layers=[0])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="more than the context"):
        sample_from(model, fitted, 1, tokens, 100)


def test_the_report_is_saved(model, tmp_path):
    report = sampling(model, tll.Lens(model), zoo.tokens(2, 5), max_new_tokens=3)
    folder = report.save(tmp_path / "out")
    assert {"result.csv", "perplexity.svg", "agreement.svg"} <= {p.name for p in folder.iterdir()}
    assert "perplexity" in str(report)

"""The Jacobian lens: the published estimator, and the R-lens' backward rule."""

from importlib.metadata import version

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses import files
from tl_lenses.fit.common import NotFinite
from tl_lenses.fit.jacobian import merge
from tl_lenses.linearised import Linearised
from tl_lenses.tokens import Batch

ONE_TOKEN = torch.arange(4, zoo.D_VOCAB)[:, None]  # every block is affine on one token
ARCHS = ("gpt2", "neox", "llama", "qwen3", "gemma2", "gemma3", "opt")


def _direct(model, ids, layer, skip):
    """The estimator as it is written: a loop over target positions and output dimensions of one prompt."""
    seen = {}
    root = tll.patch(layer, lambda x: x.detach().requires_grad_())
    end = tll.site(model, -1)
    tll.run(model, ids[None], [root, tll.read(layer, seen, detach=False), tll.read(end, seen, key=-1, detach=False)])
    valid = range(skip, len(ids) - 1)
    total = 0
    for i in range(model.cfg.d_model):
        y = sum(seen[-1][0, t, i] for t in valid)
        (grad,) = torch.autograd.grad(y, seen[layer], retain_graph=True)
        row = torch.zeros(model.cfg.d_model)
        row[i] = 1
        total = total + torch.outer(row, grad[0, list(valid)].mean(0))
    return total


@pytest.mark.parametrize("arch,kind", zoo.cases(("gpt2", "llama", "gemma3", "bloom"), zoo.FEW_KINDS))
def test_it_is_the_estimator_as_written(arch, kind):
    model, tokens = zoo.build(arch, kind), zoo.tokens(3, 9)
    got = tll.fit_jacobian(model, tokens, layers=[0, 2], skip_first=3, rows_per_pass=7)
    for layer in (0, 2):
        expected = sum(_direct(model, ids, layer, 3) for ids in tokens) / 3
        assert torch.allclose(got[layer].weight, expected, atol=1e-5)
    assert not got.biases.any() and got.meta["n_prompts"] == 3 and got.meta["fitter"] == "jacobian"


@pytest.mark.skipif(zoo.TL_VERSION < (4, 3), reason="TransformerLens has a Jacobian lens from 4.3 on")
@pytest.mark.parametrize("arch", ["gpt2", "neox", "llama", "gemma3"])
def test_it_equals_the_one_of_transformer_lens(arch):
    from transformer_lens.tools.analysis import JacobianLens

    model = zoo.build(arch, "bridge")
    texts = ["the cat sat on the mat and the dog ran to the cat", "The capital of France is Paris", "the cat"]
    texts[1] += " and the capital of Italy is Rome, said the king to his daughter."
    with pytest.warns(UserWarning, match="skipping prompt"):
        theirs = JacobianLens.fit(model, texts, corpus="test", skip_first_positions=4, show_progress=False)
    ours = tll.fit_jacobian(model, [model.to_tokens(text) for text in texts], skip_first=4)
    for block in theirs.source_layers:
        assert torch.allclose(ours[block + 1].weight, theirs.jacobians[block], atol=1e-5)
    assert ours.meta["n_prompts"] == theirs.n_prompts == 2


@pytest.mark.parametrize("kind", zoo.AFFINE_KINDS)
@pytest.mark.parametrize("rule", ["jacobian", "relevance"])
def test_on_a_linear_model_it_is_the_regression_and_the_truth(kind, rule):
    linear = zoo.affine_model(kind)
    got = tll.fit_jacobian(linear, ONE_TOKEN[:40], rule=rule, skip_first=0, skip_last=False)
    assert torch.allclose(got.weights, zoo.exact_maps(linear).weights, atol=1e-5)
    assert torch.allclose(got.weights, tll.fit_regression(linear, ONE_TOKEN, ridge=0.0, skip_first=False).weights, atol=1e-3)


def _right_padded():
    """Three prompts of which the third is too short: padded, and one by one."""
    tokens = zoo.tokens(3, 9)
    mask = torch.ones_like(tokens)
    mask[1, 6:], mask[2, 3:] = 0, 0
    return Batch(tokens, mask), [tokens[:1], tokens[1:2, :6], tokens[2:, :3]]


@pytest.mark.parametrize("kind", zoo.FEW_KINDS)
def test_pads_on_the_right_do_not_count(kind):
    padded, alone = (tll.fit_jacobian(zoo.build("gpt2", kind), text, skip_first=3) for text in _right_padded())
    assert torch.allclose(padded.delta, alone.delta, atol=1e-5)


@pytest.mark.parametrize("kind", zoo.FEW_KINDS)
def test_prompts_that_are_too_short_do_not_count(kind):
    padded, alone = (tll.fit_jacobian(zoo.build("gpt2", kind), text, skip_first=3) for text in _right_padded())
    assert padded.meta["n_prompts"] == alone.meta["n_prompts"] == 2


@pytest.mark.parametrize("kind", zoo.FEW_KINDS)
def test_pads_on_the_left_do_not_count(kind):
    fit = lambda text: tll.fit_jacobian(zoo.build("gpt2", kind), [text], skip_first=3)
    tokens = zoo.tokens(3, 9)[1:2]
    batch = Batch(torch.cat([tokens[:, 6:], tokens[:, :6]], 1), torch.tensor([[0] * 3 + [1] * 6]))
    if kind == "processed" and version("transformer-lens").startswith("3."):
        with pytest.raises(NotFinite, match="are not finite"):  # its rows of nothing but pads have no gradient
            fit(batch)
    else:
        assert torch.allclose(fit(batch).delta, fit(tokens[:, :6]).delta, atol=1e-5)


def _jacobian(model, **settings):
    return tll.fit_jacobian(model, zoo.tokens(2, 9), skip_first=2, **settings)


def test_heads_are_sites_like_others(model):
    heads = _jacobian(model, layers=["blocks.1.attn.hook_z", 1])
    assert heads.pairs[0] == ("blocks.1.attn.hook_z", 3)
    assert torch.allclose(heads[1].weight, _jacobian(model)[1].weight, atol=1e-6)


def test_maps_may_lead_to_another_layer(model):
    assert _jacobian(model, target_layer=2).pairs == ((0, 2), (1, 2))
    with pytest.raises(ValueError, match="does not lead to"):
        _jacobian(model, layers=[2], target_layer=1)


def test_a_lens_takes_maps_into_the_final_residual_alone(model):
    assert tll.Lens(model, _jacobian(model)).layers == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="a lens needs maps into the final residual"):
        tll.Lens(model, _jacobian(model, target_layer=2))


def test_interventions_act(model):
    tokens = zoo.tokens(2, 9)
    hooks = [tll.patch("blocks.1.hook_mlp_out", tll.edits.zero)]
    plain, hooked = (tll.fit_jacobian(model, tokens, skip_first=2, hooks=h) for h in ((), hooks))
    assert not torch.allclose(plain[0].weight, hooked[0].weight, atol=1e-3)
    assert torch.equal(plain[2].weight, plain[2].weight)


def test_shards_merge_by_prompts(model, tmp_path):
    tokens = zoo.tokens(7, 9)
    fit = lambda rows, **settings: tll.fit_jacobian(model, rows, skip_first=2, **settings)
    parts = [fit(tokens[:2]), fit(tokens[2:])]
    parts[0].save(tmp_path / "part")
    whole = merge([tll.Translators.load(tmp_path / "part"), parts[1]])
    assert torch.allclose(whole.delta, fit(tokens).delta, atol=1e-6) and whole.meta["n_prompts"] == 7
    assert fit(tokens, limit_prompts=2).meta["n_prompts"] == 2
    assert torch.allclose(fit(tokens, limit_prompts=2).delta, parts[0].delta, atol=1e-6)
    with pytest.raises(ValueError, match="not of one fit"):
        merge([parts[0], tll.fit_jacobian(model, tokens, skip_first=3)])
    with pytest.raises(ValueError, match="how many prompts"):
        merge([tll.fit_regression(model, zoo.tokens(20, 9))])


def test_an_interrupted_fit_goes_on(tmp_path):
    model, tokens, file = zoo.build("gpt2", zoo.FEW_KINDS[0]), zoo.tokens(7, 9), tmp_path / "state"

    def text(stop):
        def source():
            for i, ids in enumerate(tokens.split(2)):
                if i == stop:
                    raise OSError("the network is gone")
                yield ids

        return source()

    fit = lambda batches, **settings: tll.fit_jacobian(model, batches, **{"skip_first": 2, **settings})
    with pytest.raises(OSError, match="gone"):
        fit(text(3), checkpoint=file, checkpoint_every=2)
    assert files.load_state(file)["counts"][:2] == [2, 4]
    with pytest.raises(ValueError, match="made with skip_first=2, now it is 1"):
        fit(text(9), checkpoint=file, skip_first=1)
    assert torch.equal(fit(text(9), checkpoint=file).delta, fit(text(9)).delta)


def test_what_cannot_be_fitted_is_refused(model):
    with pytest.raises(ValueError, match="a row needs 18 tokens"):
        tll.fit_jacobian(model, zoo.tokens(2, 9))
    if zoo.available("bloom", "bridge"):
        with pytest.raises(ValueError, match="a backward of its own"):
            tll.fit_jacobian(zoo.build("bloom", "bridge"), zoo.tokens(2, 9), rule="relevance", skip_first=2)


def test_a_lens_of_ours_is_read_by_others(model, tmp_path):
    maps = tll.fit_jacobian(model, zoo.tokens(2, 9), layers=[1, 2], skip_first=2)
    maps.export("jacobian-lens", tmp_path / "theirs")
    again = tll.Translators.load(tmp_path / "theirs" / "lens.pt")
    assert torch.equal(again.weights, maps.weights) and again.meta["n_prompts"] == 2


# --- the backward rules


@pytest.mark.parametrize("rule", ["detached", "relevance"])
@pytest.mark.parametrize("arch,kind", zoo.cases(ARCHS, zoo.FEW_KINDS))
def test_a_linearised_pass_has_the_same_values(arch, kind, rule):
    model, tokens = zoo.build(arch, kind), zoo.tokens(2, 9)
    with torch.enable_grad():
        expected = tll.run(model, tokens)
        with Linearised(rule):
            assert torch.equal(tll.run(model, tokens), expected)


def test_relevance_is_its_rule_on_a_gated_block():
    """One gated block by hand: half of the product to each side, the ratio of the activation and the norm's scale held."""
    torch.manual_seed(0)
    x, w, v = torch.randn(5, requires_grad=True), torch.randn(7, 5), torch.randn(7, 5)

    def block(x):
        y = x * torch.rsqrt(x.pow(2).mean() + 1e-6)
        return torch.nn.functional.silu(w @ y) * (v @ y)

    with Linearised("relevance"):
        out = block(x)
    scale = (x.pow(2).mean() + 1e-6).rsqrt().detach()
    gate, up = (w @ (x * scale)).detach(), (v @ (x * scale)).detach()
    expected = ((gate.sigmoid() * up)[:, None] * w + (gate * gate.sigmoid())[:, None] * v) * scale / 2
    got = torch.stack([torch.autograd.grad(o, x, retain_graph=True)[0] for o in out])
    assert torch.allclose(got, expected, atol=1e-5) and torch.allclose(got @ x, out, atol=1e-5)

"""Statistics of prompts and texts against the naive computation on the full tensor."""

import math

import pytest
import torch
import zoo
from test_lens import _random

import tl_lenses as tll
from tl_lenses import edits
from tl_lenses import stats as S
from tl_lenses.trajectory import STATISTICS

KINDS = zoo.FEW_KINDS
TOKENS = zoo.tokens(2, 10)


@pytest.fixture(params=KINDS, scope="module")
def model(request):
    return zoo.build("gpt2", request.param)


@torch.no_grad()
def _naive(model, lens, tokens, layers, hooks=()):
    """All logits at once, `[layer, batch, pos, d_vocab]`, and the model's."""
    resid = {}
    logits = tll.run(model, tokens, [*hooks, *[tll.read(tll.site(model, x), resid, key=x) for x in layers]])
    return torch.stack([lens[x](resid[x]) for x in layers]), logits


def test_every_statistic_equals_the_naive_one(model):
    lens = tll.Lens(model, _random(model))
    anti = TOKENS.roll(3, 1)
    traj = tll.trajectory(model, lens, TOKENS, anti_targets=anti)
    z, own = _naive(model, lens, TOKENS, lens.layers)
    logp, teacher = z.log_softmax(-1), own.log_softmax(-1)
    assert traj.layers == (0, 1, 2, 3) and set(traj.stats) == set(STATISTICS)
    assert torch.allclose(traj.kl, S.kl(teacher.expand_as(logp), logp), atol=1e-5)
    assert torch.allclose(traj.entropy, S.entropy(logp), atol=1e-5)
    assert torch.allclose(traj.max_prob, logp.exp().amax(-1), atol=1e-6)
    targets = TOKENS[:, 1:]
    gathered = logp[:, :, :-1].gather(-1, targets.expand(4, -1, -1)[..., None])[..., 0]
    assert torch.allclose(traj.target_logprob[:, :, :-1], gathered, atol=1e-5)
    assert torch.allclose(traj.cross_entropy[:, :, :-1], -gathered, atol=1e-5)
    picked = z[:, :, :-1].gather(-1, targets.expand(4, -1, -1)[..., None])
    assert torch.equal(traj.rank[:, :, :-1], (z[:, :, :-1] > picked).sum(-1) + 1)
    assert (
        traj.cross_entropy[:, :, -1].isnan().all() and (traj.rank[:, :, -1] == -1).all()
    )  # nothing follows the last token
    other = logp[:, :, :-1].gather(-1, anti[:, :-1].expand(4, -1, -1)[..., None])[..., 0]
    assert torch.allclose(traj.logprob_diff[:, :, :-1], gathered - other, atol=1e-5)
    assert torch.equal(traj.top_ids[..., 0], z.argmax(-1))
    assert torch.allclose(traj.top_probs, logp.exp().topk(10).values, atol=1e-6)
    assert (traj.kl[-1] == 0).all() and traj.kl[0].mean() > 0.05


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 1000])
def test_chunked_equals_unchunked(model, chunk_size):
    lens = tll.Lens(model, _random(model))
    a, b = tll.trajectory(model, lens, TOKENS), tll.trajectory(model, lens, TOKENS, chunk_size=chunk_size)
    for name in a.stats:
        assert torch.allclose(a.stats[name].float(), b.stats[name].float(), atol=1e-5, equal_nan=True), name
    assert torch.equal(a.top_ids, b.top_ids)


def test_several_lenses_share_a_pass_and_compare(model):
    a, b = tll.Lens(model), tll.Lens(model, _random(model))
    passes = []
    both = tll.trajectory(
        model, {"logit": a, "tuned": b}, TOKENS, hooks=[("blocks.0.hook_resid_pre", lambda x, hook: passes.append(1))]
    )
    assert passes == [1] and list(both) == ["logit", "tuned"]
    for name, lens in (("logit", a), ("tuned", b)):
        alone = tll.trajectory(model, lens, TOKENS)
        assert torch.allclose(both[name].kl, alone.kl, atol=1e-6)
    za, _ = _naive(model, a, TOKENS, a.layers)
    zb, _ = _naive(model, b, TOKENS, b.layers)
    p, q = za.log_softmax(-1), zb.log_softmax(-1)
    assert torch.allclose(both.divergence("logit", "tuned", "kl"), S.kl(p, q), atol=1e-5)
    assert torch.allclose(both.divergence("tuned", "logit", "kl"), S.kl(q, p), atol=1e-5)
    assert torch.allclose(both.divergence("tuned", "logit", "js"), S.js(p, q), atol=1e-5)
    assert torch.equal(both.divergence("tuned", "logit", "tv"), both.divergence("logit", "tuned", "tv"))
    assert (both.divergence("logit", "logit", "js") == 0).all()
    with pytest.raises(KeyError, match="no lens 'x'; there are logit, tuned"):
        both.divergence("x", "tuned")
    assert set(both.to_frame()["lens"]) == {"logit", "tuned"}


def test_slicing_and_strides(model):
    traj = tll.trajectory(model, tll.Lens(model), TOKENS)
    small = traj[1:, 0, [2, -1]]
    assert small.layers == (1, 2, 3) and small.tokens.tolist() == [[int(TOKENS[0, 2]), int(TOKENS[0, 9])]]
    assert torch.equal(small.kl, traj.kl[1:, :1][:, :, [2, 9]]) and small.top_ids.shape == (3, 1, 2, 10)
    assert torch.equal(traj[-1].kl, traj.kl[-1:])
    assert tll.trajectory(model, tll.Lens(model), TOKENS, layers=slice(0, None, 2)).layers == (
        0,
        2,
        3,
    )  # the model stays
    assert torch.equal(traj.delta("kl"), traj.kl[1:] - traj.kl[:-1])
    assert traj.delta("rank")[:, :, -1].isnan().all()
    with pytest.raises(IndexError, match="three axes"):
        traj[0, 0, 0, 0]
    with pytest.raises(IndexError, match="outside an axis of 4"):
        traj[7]


def test_sites_of_other_kinds(model):
    layers = ["blocks.1.hook_attn_out", "blocks.1.hook_mlp_out", 1, -1]
    traj = tll.trajectory(model, tll.Lens(model), TOKENS, layers=layers)
    assert traj.layers == ("blocks.1.hook_attn_out", "blocks.1.hook_mlp_out", 1, 3)
    z, _ = _naive(model, tll.Lens(model), TOKENS, layers[:2])
    assert torch.equal(traj.top_ids[:2, ..., 0], z.argmax(-1))


def test_under_intervention(model):
    lens = tll.Lens(model)
    hooks = [tll.patch(1, edits.noise(2.0), pos=4)]
    hooked = tll.trajectory(model, lens, TOKENS, hooks=hooks)
    clean = tll.trajectory(model, lens, TOKENS)
    against_clean = tll.trajectory(model, lens, TOKENS, hooks=hooks, teacher="clean")
    assert (hooked.kl[-1] == 0).all()  # the teacher is the same hooked run
    assert torch.equal(hooked.entropy[:, :, :4], clean.entropy[:, :, :4]) and not torch.equal(
        hooked.entropy[1:, :, 4:], clean.entropy[1:, :, 4:]
    )
    assert (against_clean.kl[-1, :, :4] == 0).all() and (against_clean.kl[-1, :, 4:] > 0).all()
    # an intervention on the final norm reaches the last row, which is the model
    scaled = tll.trajectory(model, lens, TOKENS, hooks=[("ln_final.hook_scale", lambda x, hook: x * 3)])
    with torch.no_grad():
        own = model.run_with_hooks(TOKENS, fwd_hooks=[("ln_final.hook_scale", lambda x, hook: x * 3)])
    assert torch.allclose(scaled.entropy[-1], S.entropy(own.log_softmax(-1)), atol=1e-5)
    # at a site that both use, the user's hook runs first
    zeroed = tll.trajectory(model, lens, TOKENS, hooks=[tll.patch(2, edits.zero)])
    assert zeroed.kl[2, :, 1:].var() >= 0 and torch.allclose(
        zeroed.entropy[2], zeroed.entropy[2, 0, 0].expand(2, 10), atol=1e-5
    )


@torch.no_grad()
def test_an_existing_cache_is_read(model):
    lens = tll.Lens(model, _random(model))
    _, cache = model.run_with_cache(TOKENS)
    a, b = tll.trajectory(model, lens, TOKENS, cache=cache), tll.trajectory(model, lens, TOKENS)
    for name in a.stats:
        assert torch.allclose(a.stats[name].float(), b.stats[name].float(), atol=1e-5, equal_nan=True), name
    _, few = model.run_with_cache(TOKENS, names_filter=["blocks.0.hook_resid_pre"])
    with pytest.raises(ValueError, match="the cache does not hold 'blocks.1.hook_resid_pre'"):
        tll.trajectory(model, lens, TOKENS, cache=few)
    with pytest.raises(ValueError, match="pass the tokens of that run"):
        tll.trajectory(model, lens, TOKENS[:, :5], cache=cache)
    with pytest.raises(ValueError, match="run that is over"):
        tll.trajectory(model, lens, TOKENS, cache=cache, teacher="clean")


def test_text_pads_and_targets(model):
    prompts = ["the cat sat on the mat.", "a bird"]
    traj = tll.trajectory(model, tll.Lens(model), prompts)
    n = traj.mask.sum(1)
    assert traj.tokens[0, 0] == zoo.BOS and not traj.mask[1, 0]  # BOS first; the shorter one is padded on the left
    alone = tll.trajectory(model, tll.Lens(model), prompts[1])
    assert torch.allclose(traj.kl[:, 1, -int(n[1]) :], alone.kl[:, 0], atol=1e-4)
    assert (traj.targets[1][~traj.mask[1]] == -1).all() and (traj.targets[:, -1] == -1).all()
    bare = tll.trajectory(model, tll.Lens(model), prompts[1], prepend_bos=False)
    assert torch.equal(bare.tokens, alone.tokens[:, 1:])
    one = tll.trajectory(model, tll.Lens(model), prompts[0], targets=" the", anti_targets=7)
    wanted = model.tokenizer(" the", add_special_tokens=False)["input_ids"][0]
    assert (one.targets == wanted).all() and (one.anti_targets == 7).all() and one.logprob_diff.isfinite().all()
    with pytest.raises(ValueError, match=r"logprob_diff needs anti_targets"):
        _ = traj.logprob_diff
    with pytest.raises(ValueError, match="is .* tokens, expected one"):
        tll.trajectory(model, tll.Lens(model), prompts[0], targets="the cat sat")


def test_views_of_a_real_trajectory(model, tmp_path):
    traj = tll.trajectory(model, tll.Lens(model), "the cat sat on the mat.")
    assert "cat" in str(traj) and "<iframe" in traj._repr_html_() or "<" in traj._repr_html_()
    for suffix in ("html", "svg", "csv", "json"):
        traj.save(tmp_path / f"t.{suffix}")
        assert (tmp_path / f"t.{suffix}").stat().st_size > 500
    assert len(traj.to_frame()) == 4 * traj.tokens.numel()
    both = tll.trajectory(model, {"a": tll.Lens(model), "b": tll.Lens(model)}, "the cat")
    both.save(tmp_path / "both.html")
    assert "the" in str(both)


def test_refusals(model, unchecked):
    lens = tll.Lens(model)
    fitted = tll.Lens(model, _random(model).select([1]))
    other = tll.Lens(model, _random(model).select([2]))
    cases = [
        (dict(lens=lens, prompt=TOKENS, layers=[]), "empty list of layers"),
        (dict(lens=lens, prompt=TOKENS, layers=[1, 1]), "given twice"),
        (dict(lens=lens, prompt=TOKENS, layers=[9]), "no layer 9: this model has layers 0..3"),
        (dict(lens=lens, prompt=TOKENS, layers=["blocks.1.hook_nope"]), "no hook 'blocks.1.hook_nope'"),
        (dict(lens={}, prompt=TOKENS), "empty mapping"),
        (dict(lens={"a": fitted, "b": other}, prompt=TOKENS), "different layers"),
        (dict(lens=lens, prompt=TOKENS, teacher="dirty"), "teacher must be"),
        (
            dict(lens=lens, prompt=TOKENS, targets=TOKENS[:, :4]),
            r"targets has shape \[2, 4\], expected that of the tokens, \[2, 10\]",
        ),
        (dict(lens=lens, prompt=TOKENS, targets=TOKENS.float()), "must be token ids"),
        (dict(lens=lens, prompt=TOKENS, anti_targets=TOKENS + 400), "ids outside -1..319"),
        (dict(lens=lens, prompt=TOKENS.float()), "integer|int64|token ids"),
        (dict(lens=lens, prompt=TOKENS[None]), "shape"),
        (dict(lens=lens, prompt=TOKENS[:, :0]), "empty"),
        (dict(lens=lens, prompt=TOKENS + 320), "320"),
        (dict(lens=lens, prompt=zoo.tokens(1, 65)), "64"),
        (dict(lens=lens, prompt=[]), "empty|at least one"),
        (dict(lens=lens, prompt=3), "expected text"),
        (dict(lens=lens, prompt=TOKENS, attention_mask=torch.ones(2, 3).long()), r"attention_mask has shape \[2, 3\]"),
        (dict(lens=lens, prompt=TOKENS, attention_mask=torch.zeros(2, 10).long()), "hides every token"),
        (dict(lens=lens, prompt="the cat", attention_mask=torch.ones(1, 3).long()), "text makes its own mask"),
    ]
    for kwargs, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            tll.trajectory(model, **kwargs)
    with pytest.raises(ValueError, match="no divergence 'l2'; there are kl, js, tv"):
        tll.trajectory(model, {"a": lens, "b": lens}, TOKENS).divergence("a", "b", "l2")
    with pytest.raises(ValueError, match="another model object"):
        tll.trajectory(zoo.build("llama", KINDS[0]), lens, TOKENS)


def test_values_that_are_not_finite_name_the_layer(model):
    broken = [tll.patch(1, lambda x: x * torch.inf)]
    with pytest.raises(ValueError, match="residual at 'blocks.1.hook_resid_pre' has values that are not finite"):
        tll.trajectory(model, tll.Lens(model), TOKENS, hooks=broken)
    with pytest.raises(ValueError, match="layer 1 has values that are not finite"):
        tll.evaluate(model, tll.Lens(model), TOKENS, hooks=broken)
    with pytest.raises(ValueError, match="activation at 'blocks.1.hook_resid_pre' has values that are not finite"):
        tll.fit_regression(model, zoo.tokens(8, 20), hooks=broken)


# --- evaluate


@torch.no_grad()
@pytest.mark.parametrize("skip_first", [True, False])
def test_evaluate_equals_the_naive_computation(model, skip_first):
    tokens = zoo.tokens(6, 12)
    lens = tll.Lens(model, _random(model))
    z, own = _naive(model, lens, tokens, lens.layers)
    logp, teacher = z.log_softmax(-1), own.log_softmax(-1)
    first = 1 if skip_first else 0
    scores = tll.evaluate(model, {"x": lens}, [tokens[:4], tokens[4:]], skip_first=skip_first, chunk_size=5)
    assert scores.tokens == 6 * (12 - first)
    for i, layer in enumerate(lens.layers):
        p, q = teacher[:, first:], logp[i, :, first:]
        value = lambda name, layer=layer: scores.value("x", layer, name)
        assert value("kl") == pytest.approx(float(S.kl(p, q).mean()), abs=1e-5)
        assert value("entropy") == pytest.approx(float(S.entropy(q).mean()), abs=1e-5)
        assert value("top1") == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()), abs=1e-6)
        ce = -q[:, :-1].gather(-1, tokens[:, first + 1 :, None]).mean()
        assert value("cross_entropy") == pytest.approx(float(ce), abs=1e-5)
        bias = S.kl(p.exp().flatten(0, 1).mean(0).log(), q.exp().flatten(0, 1).mean(0).log())
        assert value("bias") == pytest.approx(float(bias), abs=1e-5)
        assert value("bits_per_byte") == pytest.approx(float(ce) / math.log(2) / scores.bytes_per_token, rel=1e-5)
    assert scores.value("x", 3, "kl") == 0 and scores.value("x", 3, "top1") == 1 and scores.value("x", 0, "kl") > 0.05
    assert len(scores.to_frame()) == 4 and "x" in str(scores)
    with pytest.raises(KeyError):
        scores.value("x", 9)


def test_evaluate_does_not_depend_on_batches_or_pads(model):
    tokens = zoo.tokens(4, 10)
    lens = tll.Lens(model)
    whole = tll.evaluate(model, lens, tokens, bytes_per_token=4.0)
    padded = torch.cat([torch.full((4, 3), zoo.PAD), tokens], 1)
    mask = torch.cat([torch.zeros(4, 3), torch.ones(4, 10)], 1).long()
    for other in ([tokens[:1], tokens[1:]], tll.Batch(padded, mask)):
        for a, b in zip(whole.rows, tll.evaluate(model, lens, other, bytes_per_token=4.0).rows, strict=True):
            assert {k: pytest.approx(v, abs=1e-4) if isinstance(v, float) else v for k, v in a.items()} == b


def test_evaluate_refuses_rows_without_a_position(model):
    with pytest.raises(ValueError, match="skip_first=False"):
        tll.evaluate(model, tll.Lens(model), zoo.tokens(3, 1))

"""Statistics of prompts and texts against the naive computation on the full tensor."""

import json
import math

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses import edits
from tl_lenses import stats as S
from tl_lenses.trajectories import STATISTICS

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
    lens = tll.Lens(model, zoo.random_maps(model))
    anti = TOKENS.roll(3, 1)
    traj = tll.trajectory(model, lens, TOKENS, anti_targets=anti)
    z, final = _naive(model, lens, TOKENS, lens.layers)
    logp, teacher = z.log_softmax(-1), final.log_softmax(-1)
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
    assert traj.cross_entropy[:, :, -1].isnan().all() and (traj.rank[:, :, -1] == -1).all()  # nothing follows the last token
    other = logp[:, :, :-1].gather(-1, anti[:, :-1].expand(4, -1, -1)[..., None])[..., 0]
    assert torch.allclose(traj.logprob_diff[:, :, :-1], gathered - other, atol=1e-5)
    assert torch.equal(traj.top_ids[..., 0], z.argmax(-1))
    assert torch.allclose(traj.top_probs, logp.exp().topk(10).values, atol=1e-6)
    assert (traj.kl[-1] == 0).all() and traj.kl[0].mean() > 0.05


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 1000])
def test_chunked_equals_unchunked(model, chunk_size):
    lens = tll.Lens(model, zoo.random_maps(model))
    a, b = tll.trajectory(model, lens, TOKENS), tll.trajectory(model, lens, TOKENS, chunk_size=chunk_size)
    for name in a.stats:
        assert torch.allclose(a.stats[name].float(), b.stats[name].float(), atol=1e-5, equal_nan=True), name
    assert torch.equal(a.top_ids, b.top_ids)


@pytest.fixture(scope="module")
def both(model):
    """Two lenses in one trajectory, and how often the model ran for it."""
    lenses, passes = {"logit": tll.Lens(model), "tuned": tll.Lens(model, zoo.random_maps(model))}, []
    count = [("blocks.0.hook_resid_pre", lambda x, hook: passes.append(1))]
    return lenses, tll.trajectory(model, lenses, TOKENS, hooks=count), len(passes)


def test_several_lenses_share_a_pass(model, both):
    lenses, together, passes = both
    assert passes == 1 and list(together) == ["logit", "tuned"] and set(together.to_frame()["lens"]) == set(lenses)
    for name, lens in lenses.items():
        assert torch.allclose(together[name].kl, tll.trajectory(model, lens, TOKENS).kl, atol=1e-6)


def test_the_divergence_of_lenses_is_that_of_their_logits(model, both):
    lenses, together, _ = both
    p, q = (_naive(model, lens, TOKENS, lens.layers)[0].log_softmax(-1) for lens in lenses.values())
    assert torch.allclose(together.divergence("logit", "tuned", "kl"), S.kl(p, q), atol=1e-5)
    assert torch.allclose(together.divergence("tuned", "logit", "kl"), S.kl(q, p), atol=1e-5)
    assert torch.allclose(together.divergence("tuned", "logit", "js"), S.js(p, q), atol=1e-5)
    assert torch.equal(together.divergence("tuned", "logit", "tv"), together.divergence("logit", "tuned", "tv"))


def test_a_lens_does_not_diverge_from_itself(both):
    assert (both[1].divergence("logit", "logit", "js") == 0).all()


def test_a_lens_that_is_not_there_is_refused(both):
    with pytest.raises(KeyError, match="no lens 'x'; there are logit, tuned"):
        both[1].divergence("x", "tuned")


def test_a_slice_is_a_smaller_trajectory(model):
    traj = tll.trajectory(model, tll.Lens(model), TOKENS)
    small = traj[1:, 0, [2, -1]]
    assert small.layers == (1, 2, 3) and small.tokens.tolist() == [[int(TOKENS[0, 2]), int(TOKENS[0, 9])]]
    assert torch.equal(small.kl, traj.kl[1:, :1][:, :, [2, 9]]) and small.top_ids.shape == (3, 1, 2, 10)
    assert torch.equal(traj[-1].kl, traj.kl[-1:])
    with pytest.raises(IndexError, match="three axes"):
        traj[0, 0, 0, 0]
    with pytest.raises(IndexError, match="outside an axis of 4"):
        traj[7]


def test_a_stride_of_layers_keeps_the_model(model):
    traj = tll.trajectory(model, tll.Lens(model), TOKENS, layers=slice(0, None, 2))
    assert traj.layers == (0, 2, 3)


def test_a_delta_is_the_change_per_layer(model):
    traj = tll.trajectory(model, tll.Lens(model), TOKENS)
    assert torch.equal(traj.delta("kl"), traj.kl[1:] - traj.kl[:-1])
    assert traj.delta("rank")[:, :, -1].isnan().all()  # nothing follows the last token


def test_sites_of_other_kinds(model):
    layers = ["blocks.1.hook_attn_out", "blocks.1.hook_mlp_out", 1, -1]
    traj = tll.trajectory(model, tll.Lens(model), TOKENS, layers=layers)
    assert traj.layers == ("blocks.1.hook_attn_out", "blocks.1.hook_mlp_out", 1, 3)
    z, _ = _naive(model, tll.Lens(model), TOKENS, layers[:2])
    assert torch.equal(traj.top_ids[:2, ..., 0], z.argmax(-1))


def test_the_teacher_is_the_hooked_run(model):
    hooks, lens = [tll.patch(1, edits.noise(2.0), pos=4)], tll.Lens(model)
    hooked, clean = (tll.trajectory(model, lens, TOKENS, hooks=given) for given in (hooks, ()))
    assert (hooked.kl[-1] == 0).all()
    assert torch.equal(hooked.entropy[:, :, :4], clean.entropy[:, :, :4])
    assert not torch.equal(hooked.entropy[1:, :, 4:], clean.entropy[1:, :, 4:])


def test_a_clean_teacher_is_the_run_without_hooks(model):
    hooks = [tll.patch(1, edits.noise(2.0), pos=4)]
    kl = tll.trajectory(model, tll.Lens(model), TOKENS, hooks=hooks, teacher="clean").kl
    assert (kl[-1, :, :4] == 0).all() and (kl[-1, :, 4:] > 0).all()


def test_a_hook_on_the_final_norm_reaches_the_last_row(model):
    hooks = [("ln_final.hook_scale", lambda x, hook: x * 3)]
    scaled = tll.trajectory(model, tll.Lens(model), TOKENS, hooks=hooks)
    with torch.no_grad():
        final = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert torch.allclose(scaled.entropy[-1], S.entropy(final.log_softmax(-1)), atol=1e-5)


def test_a_users_hook_runs_before_the_lens_reads(model):
    entropy = tll.trajectory(model, tll.Lens(model), TOKENS, hooks=[tll.patch(2, edits.zero)]).entropy[2]
    assert torch.allclose(entropy, entropy[0, 0].expand(2, 10), atol=1e-5)


@torch.no_grad()
def test_an_existing_cache_is_read(model):
    lens = tll.Lens(model, zoo.random_maps(model))
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


PROMPTS = ["the cat sat on the mat.", "a bird"]


def test_a_shorter_text_is_padded_and_says_what_it_says_alone(model):
    traj, alone = (tll.trajectory(model, tll.Lens(model), text) for text in (PROMPTS, PROMPTS[1]))
    n = int(traj.mask[1].sum())
    assert traj.tokens[0, 0] == zoo.BOS and not traj.mask[1, 0]
    assert torch.allclose(traj.kl[:, 1, -n:], alone.kl[:, 0], atol=1e-4)
    assert (traj.targets[1][~traj.mask[1]] == -1).all() and (traj.targets[:, -1] == -1).all()


def test_a_text_starts_with_bos_unless_asked(model):
    with_bos, bare = (tll.trajectory(model, tll.Lens(model), PROMPTS[1], prepend_bos=on) for on in (True, False))
    assert torch.equal(bare.tokens, with_bos.tokens[:, 1:])


def test_a_target_is_a_tokens_text_or_id(model):
    scored = tll.trajectory(model, tll.Lens(model), PROMPTS[0], targets=" the", anti_targets=7)
    token = model.tokenizer(" the", add_special_tokens=False)["input_ids"][0]
    assert (scored.targets == token).all() and (scored.anti_targets == 7).all() and scored.logprob_diff.isfinite().all()
    with pytest.raises(ValueError, match="is .* tokens, expected one"):
        tll.trajectory(model, tll.Lens(model), PROMPTS[0], targets="the cat sat")
    with pytest.raises(ValueError, match=r"logprob_diff needs anti_targets"):
        _ = tll.trajectory(model, tll.Lens(model), PROMPTS[0]).logprob_diff


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
    fitted = tll.Lens(model, zoo.random_maps(model).select([1]))
    other = tll.Lens(model, zoo.random_maps(model).select([2]))
    cases = [
        (dict(lens=lens, tokens=TOKENS, layers=[]), "empty list of layers"),
        (dict(lens=lens, tokens=TOKENS, layers=[1, 1]), "given twice"),
        (dict(lens=lens, tokens=TOKENS, layers=[9]), "no layer 9: this model has layers 0..3"),
        (dict(lens=lens, tokens=TOKENS, layers=["blocks.1.hook_nope"]), "no hook 'blocks.1.hook_nope'"),
        (dict(lens={}, tokens=TOKENS), "empty mapping"),
        (dict(lens={"a": fitted, "b": other}, tokens=TOKENS), "different layers"),
        (dict(lens=lens, tokens=TOKENS, teacher="dirty"), "teacher must be"),
        (
            dict(lens=lens, tokens=TOKENS, targets=TOKENS[:, :4]),
            r"targets has shape \[2, 4\], expected that of the tokens, \[2, 10\]",
        ),
        (dict(lens=lens, tokens=TOKENS, targets=TOKENS.float()), "must be token ids"),
        (dict(lens=lens, tokens=TOKENS, anti_targets=TOKENS + 400), "ids outside -1..319"),
        (dict(lens=lens, tokens=TOKENS.float()), "integer|int64|token ids"),
        (dict(lens=lens, tokens=TOKENS[None]), "shape"),
        (dict(lens=lens, tokens=TOKENS[:, :0]), "empty"),
        (dict(lens=lens, tokens=TOKENS + 320), "320"),
        (dict(lens=lens, tokens=zoo.tokens(1, 65)), "64"),
        (dict(lens=lens, tokens=[]), "empty|at least one"),
        (dict(lens=lens, tokens=3), "expected text"),
        (
            dict(lens=lens, tokens=TOKENS, attention_mask=torch.ones(2, 3).long()),
            r"attention_mask .* should be a tensor of shape .*, got \(2, 3\)",
        ),
        (dict(lens=lens, tokens=TOKENS, attention_mask=torch.zeros(2, 10).long()), "hides every token"),
        (dict(lens=lens, tokens="the cat", attention_mask=torch.ones(1, 3).long()), "text makes its own mask"),
    ]
    for kwargs, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            tll.trajectory(model, **kwargs)
    bad_values = [
        (dict(lens=None), "expected a Lens or a mapping {name: Lens}, got None: make one with"),
        (dict(lens={"a": lens, "b": 3}), "got a int at 'b'"),
        (dict(layers=3), r"layers must be a list of layers and sites or a slice, got 3: pass layers=\[3\]"),
        (dict(layers="blocks.1.hook_resid_mid"), "layers must be a list"),
        (dict(layers=[1.5]), r"expected a layer \(int\) or a hook name \(str\), got 1.5"),
        (dict(layers=[True]), r"expected a layer \(int\) or a hook name \(str\), got True"),
        (dict(hooks=None), r"hooks must be a list of pairs \(name, function\), got NoneType"),
        (dict(chunk_size=0), "chunk_size must be at least 1, got 0"),
        (dict(chunk_size=2.5), "chunk_size must be a whole number"),
    ]
    for kwargs, message in bad_values:
        for call in (tll.trajectory, tll.evaluate):
            with pytest.raises((ValueError, TypeError), match=message):
                call(model, **{"lens": lens, "tokens": TOKENS, **kwargs})
    for kwargs, message in [
        (dict(top_k=1.5), "top_k must be a whole number, got 1.5"),
        (dict(top_k=-1), "top_k must be at least 0, got -1"),
        (dict(targets=1.5), "targets must be token ids"),
        (dict(targets=object()), "targets must be token ids or the text of one token"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            tll.trajectory(model, lens, TOKENS, **kwargs)
    with pytest.raises(ValueError, match="bytes_per_token must be positive and finite, got 0"):
        tll.evaluate(model, lens, TOKENS, bytes_per_token=0)
    with pytest.raises(ValueError, match="empty mapping"):
        tll.evaluate(model, {}, TOKENS)
    with pytest.raises(ValueError, match="another model object"):
        tll.evaluate(zoo.build("llama", KINDS[0]), lens, TOKENS)
    with pytest.raises(ValueError, match="kind must be 'kl', 'js' or 'tv', got 'l2'"):
        tll.trajectory(model, {"a": lens, "b": lens}, TOKENS).divergence("a", "b", "l2")
    with pytest.raises(ValueError, match="another model object"):
        tll.trajectory(zoo.build("llama", KINDS[0]), lens, TOKENS)


def test_the_old_name_of_tokens_says_the_new_one(model):
    lens = tll.Lens(model)
    with pytest.warns(DeprecationWarning, match=r"trajectory\(prompt=...\) is called tokens now"):
        old = tll.trajectory(model, lens, prompt=TOKENS)
    assert torch.equal(old.kl, tll.trajectory(model, lens, TOKENS).kl)


def test_the_top_tokens_are_as_many_as_asked_for_in_any_integer_type(model, unchecked):
    traj = tll.trajectory(model, tll.Lens(model), TOKENS, top_k=torch.tensor(3))
    assert traj.top_ids.shape[-1] == 3 and tll.trajectory(model, tll.Lens(model), TOKENS, top_k=0).top_ids.numel() == 0


def test_evaluate_takes_the_last_row_from_the_model_under_each_of_its_names(model):
    scale = [tll.patch("ln_final.hook_normalized", lambda x: 1.5 * x)]
    last = f"blocks.{tll.Lens(model).n_layers - 1}.hook_resid_post"
    scores = tll.evaluate(model, tll.Lens(model), TOKENS, layers=[last], hooks=scale)
    assert scores.rows[0]["kl"] == 0 and scores.rows[0]["top1"] == 1


def test_values_that_are_not_finite_name_the_layer(model):
    broken = [tll.patch(1, lambda x: x * torch.inf)]
    with pytest.raises(ValueError, match="residual at 'blocks.1.hook_resid_pre' has values that are not finite"):
        tll.trajectory(model, tll.Lens(model), TOKENS, hooks=broken)
    with pytest.raises(ValueError, match="residual at 'blocks.1.hook_resid_pre' has values that are not finite"):
        tll.evaluate(model, tll.Lens(model), TOKENS, hooks=broken)
    with pytest.raises(ValueError, match="activation at 'blocks.1.hook_resid_pre' has values that are not finite"):
        tll.fit_regression(model, zoo.tokens(8, 20), hooks=broken)


# --- evaluate


@torch.no_grad()
@pytest.mark.parametrize("skip_first", [True, False])
def test_evaluate_equals_the_naive_computation(model, skip_first):
    tokens = zoo.tokens(6, 12)
    lens = tll.Lens(model, zoo.random_maps(model))
    z, final = _naive(model, lens, tokens, lens.layers)
    logp, teacher = z.log_softmax(-1), final.log_softmax(-1)
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


def test_results_say_which_bos_was_put_before_the_text(model):
    lens, bos, prompt = tll.Lens(model), model.tokenizer.decode([zoo.BOS]), "the cat sat on the mat"
    bos_of = lambda tokens, **kwargs: tll.trajectory(model, lens, tokens, **kwargs).settings["bos"]
    assert bos_of(prompt) == bos_of([prompt]) == bos
    assert bos_of(TOKENS) is bos_of(prompt, prepend_bos=False) is None
    assert json.loads(tll.views.to_json(tll.trajectory(model, lens, prompt)))["trajectories"][0]["settings"] == {
        "bos": bos,
        "lens": "logit",
    }
    batches = lambda **kwargs: tll.token_batches([prompt] * 4, model.tokenizer, seq_len=6, batch_size=2, **kwargs)
    scored = lambda tokens: tll.evaluate(model, lens, tokens).settings["bos"]
    assert scored(batches()) == bos
    assert scored(batches(prepend_bos=False)) is scored(TOKENS) is None
    settings = tll.patchscope(model, tll.Source(prompt), layers=[1]).settings
    assert settings["bos"] == settings["target_bos"] == bos
    assert tll.patchscope(model, tll.Source(prompt), layers=[1], prepend_bos=False).settings["bos"] is None
    report = tll.experiments.quality(model, {"logit": lens}, batches(), layers=[1])
    assert report.settings["bos"] == bos
    assert tll.experiments.quality(model, {"logit": lens}, TOKENS, layers=[1]).settings["bos"] is None


def test_tracked_tokens_have_the_ranks_and_probabilities_of_the_logits(model):
    lens, tokens = tll.Lens(model, tll.fit_regression(model, zoo.tokens(16, 20))), zoo.tokens(2, 10)
    traj = tll.trajectory(model, lens, tokens, track=[7, 11])
    assert traj.tracked.ids.tolist() == [[7, 11]] * 2 and traj.tracked.ranks.shape == (len(traj.layers), 2, 10, 2)
    said = {}
    tll.run(model, tokens, lens.hooks(said))
    for i, layer in enumerate(traj.layers):
        logp = said[layer].float().log_softmax(-1)
        for j, word in enumerate((7, 11)):
            assert torch.equal(traj.tracked.ranks[i, ..., j], 1 + (logp > logp[..., word, None]).sum(-1))
            assert torch.allclose(traj.tracked.probs[i, ..., j], logp[..., word].exp(), atol=1e-6)
    cut = traj[1:, 1, 3:]
    assert torch.equal(cut.tracked.ranks, traj.tracked.ranks[1:, 1:, 3:]) and len(cut.tracked.ids) == 1
    assert json.loads(tll.views.to_json(cut))["trajectories"][0]["tracked"]["ids"] == [[7, 11]]


def test_by_default_the_models_own_top_tokens_are_tracked(model):
    tokens = zoo.tokens(3, 10)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    traj = tll.trajectory(model, tll.Lens(model), tokens, attention_mask=mask)
    for b in range(3):
        own = [i for i in traj.top_ids[-1, b, :, 0].flip(0).tolist() if i >= 0]
        assert [i for i in traj.tracked.ids[b].tolist() if i >= 0] == list(dict.fromkeys(own))[:8]
    assert (traj.tracked.ranks[:, 1, :4] == -1).all()
    # A row that ends with the same token again and again has its others further in front.
    tokens = torch.cat([zoo.tokens(2, 12), zoo.tokens(2, 1).expand(-1, 40)], 1)
    traj = tll.trajectory(model, tll.Lens(model), tokens)
    own = [list(dict.fromkeys(row.flip(0).tolist()))[:8] for row in traj.top_ids[-1, :, :, 0]]
    assert [[i for i in row if i >= 0] for row in traj.tracked.ids.tolist()] == own
    assert any(
        len(set(row[-16:].tolist())) < min(8, len(set(row.tolist()))) for row in traj.top_ids[-1, :, :, 0]
    )  # one look is not enough
    assert tll.trajectory(model, tll.Lens(model), tokens, track=()).tracked is None
    assert tll.trajectory(model, tll.Lens(model), zoo.tokens(60, 20)).tracked is None  # over 1,024 tokens
    with pytest.raises(ValueError, match=r"track=.* is 4 tokens, expected one"):
        tll.trajectory(model, tll.Lens(model), tokens, track=["the cat sat"])


@pytest.mark.parametrize("skip_first", [True, False])
def test_a_trajectory_knows_what_its_fit_left_out(model, skip_first):
    lens = tll.Lens(model, tll.fit_regression(model, zoo.tokens(16, 20), skip_first=skip_first))
    traj = tll.trajectory(model, lens, zoo.tokens(2, 6))
    assert (traj.left_out[:, 0] == skip_first).all() and not traj.left_out[:, 1:].any()
    assert not traj[:, :, 1:].left_out.any()  # cut off, and no other position takes its place


def test_a_trajectory_knows_its_lens(model):
    lenses = {"a": tll.Lens(model), "b": tll.Lens(model, tll.fit_regression(model, zoo.tokens(16, 20)))}
    a, b = tll.trajectory(model, lenses, zoo.tokens(2, 6)).values()
    assert (a.settings["lens"], b.settings["lens"]) == ("logit", "regression") and not a.left_out.any()

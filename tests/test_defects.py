"""Each defect that the published patchscope code and its peers are known for, as a test on ours.

The letters are those of the list in the project's notes on the Patchscopes code: what its procedure gets wrong, and what a
correct one must do.
"""

import contextlib

import pytest
import torch
import zoo

import tl_lenses as tll

KINDS = zoo.FEW_KINDS
PROMPT, TARGET = "the cat sat on the mat", "a bird sang in the tree"


@pytest.fixture(params=KINDS, scope="module")
def model(request):
    return zoo.build("gpt2", request.param)


@pytest.fixture(scope="module")
def fitted(model):
    tokens = zoo.tokens(24, 12)
    return tll.fit_regression(model, tokens)


def residuals(model, prompt):
    seen = {}
    tll.run(model, prompt, tll.hooks.residual_reads(model, range(model.cfg.n_layers + 1), seen))
    return seen


def test_a_no_norm_is_applied_twice(model, fitted):
    """A fitted lens as a patchscope (f affine, l* = L) is the lens: fitted to the state before the final norm, read through one norm."""
    lens, depth = tll.Lens(model, fitted), model.cfg.n_layers
    resid = residuals(model, PROMPT)
    for layer in range(depth):
        got = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), pairs=[(layer, depth)], map=fitted[layer])
        torch.testing.assert_close(got.logits[0, 0], lens[layer](resid[layer][0, -1]), atol=1e-4, rtol=1e-4)


def test_b_c_the_last_layer_is_read_before_the_norm(model):
    """Layer L as a source is the residual that the last block wrote, not the normed state, wherever it is patched in."""
    depth = model.cfg.n_layers
    last = residuals(model, PROMPT)[depth][0, -1]
    by_text = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), layers=[depth], target_layers=range(depth))
    by_vector = tll.patchscope(model, tll.Source(last), tll.Target(TARGET), target_layers=range(depth))
    torch.testing.assert_close(by_text.logits, by_vector.logits, atol=1e-5, rtol=0)


def test_d_positions_of_short_prompts_are_their_own(model):
    """Prompts of different lengths in one call: each gives the vector that it gives alone, from either end."""
    texts = ["the cat", "a bird sang in the old tree by the bridge", "the dog ran far away", "a dog"]
    for pos in (1, 2, -1, -2):
        sources = [tll.Source(text, pos=pos) for text in texts]
        together = tll.patchscope(model, sources, tll.Target(TARGET), layers=[2])
        for i, source in enumerate(sources):
            alone = tll.patchscope(model, source, tll.Target(TARGET), layers=[2])
            torch.testing.assert_close(together.logits[i], alone.logits[0], atol=1e-4, rtol=0)


def test_e_pads_are_not_attended(model):
    """Texts of a batch are those of each prompt alone, padded prompts in `generate` included."""
    texts = ["the cat", "a bird sang in the old tree"]
    both = tll.generate(model, texts, max_new_tokens=4)[:, -4:]
    for i, text in enumerate(texts):
        assert both[i].tolist() == tll.generate(model, text, max_new_tokens=4)[0, -4:].tolist()


def test_f_no_cell_is_dropped(model):
    """A number of cells that the batch size does not divide, and one that it does."""
    for batch_size in (3, 4, 5, 16):
        result = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), target_layers=range(4), batch_size=batch_size)
        whole = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), target_layers=range(4))
        assert result.logits.shape[:2] == (1, 16)
        torch.testing.assert_close(result.logits, whole.logits, atol=1e-5, rtol=0)


def test_g_a_target_of_one_token_is_patched(model):
    ids = model.to_tokens("tree", prepend_bos=False)[0, :1]
    got = tll.patchscope(model, tll.Source(PROMPT), tll.Target(ids), layers=[2], max_new_tokens=2)
    with torch.no_grad():
        plain = model(ids[None])[0, -1]
    assert (got.logits[0, 0] - plain).abs().max() > 1e-3


def test_h_maps_are_used_between_their_own_layers(model, fitted):
    with pytest.raises(ValueError, match=r"fitted are the pairs .*\(1, 2\) is asked for"):
        tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), pairs=[(1, 2)], map=fitted)  # fitted to L


def test_i_bos_is_left_out_of_fits(model):
    tokens = zoo.tokens(24, 12)
    without, with_bos = (tll.fit_regression(model, tokens, skip_first=skip).meta["tokens_seen"] for skip in (True, False))
    assert with_bos - without == len(tokens)


def test_j_nothing_is_written_in_place(model):
    plain = residuals(model, TARGET)
    kept = {layer: x.clone() for layer, x in plain.items()}
    tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), target_layers=range(4), max_new_tokens=3)
    assert all(torch.equal(plain[layer], x) for layer, x in kept.items())


def _broken(*args, hook=None):
    raise ZeroDivisionError


@pytest.mark.parametrize(
    "more", [{"max_new_tokens": 3}, {"target_hooks": [("blocks.1.hook_resid_pre", _broken)]}, {"map": _broken}],
    ids=["done", "a hook that fails", "a map that fails"],
)  # fmt: skip
def test_j_nothing_stays_on_the_model(model, more):
    before = zoo.n_hooks(model)
    with contextlib.nullcontext() if "max_new_tokens" in more else pytest.raises(ZeroDivisionError):
        tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), **more)
    assert zoo.n_hooks(model) == before


def test_k_probabilities_of_half_precision_models_are_computed_in_fp32():
    model = zoo.build("gpt2", KINDS[0], torch.bfloat16)
    result = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET))
    assert result.logits.dtype == result.top_probs.dtype == torch.float32
    assert result.logits.log_softmax(-1).isfinite().all()


def test_layers_are_numbers_and_not_places_in_a_list(model):
    """A peer indexes its cache by the position of a layer in the list that was asked for."""
    every = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET))
    some = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), layers=[3, 1])
    assert some.pairs == [(3, 3), (1, 1)]
    torch.testing.assert_close(some.logits[0], every.logits[0, [3, 1]], atol=1e-5, rtol=0)


def test_the_patch_does_not_move_while_text_is_generated(model):
    """A peer resolves -1 again at every step, and prepends BOS again to its own output."""
    at_end = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET, pos=-1), layers=[1], max_new_tokens=5)
    n = model.to_tokens(TARGET, prepend_bos=True).shape[1]
    fixed = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET, pos=n - 1), layers=[1], max_new_tokens=5)
    assert torch.equal(at_end.tokens, fixed.tokens)
    # The same without a cache and with an absolute position patched again at every step.
    vector = residuals(model, PROMPT)[1][0, -1]
    tokens = model.to_tokens(TARGET, prepend_bos=True)
    for _ in range(at_end.tokens.shape[-1]):
        with torch.no_grad():
            logits = tll.run(model, tokens, [tll.patch(1, tll.edits.replace(vector), pos=n - 1)])
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert tokens[0, n:].tolist() == at_end.tokens[0, 0].tolist()


def test_a_substring_is_its_last_token(model):
    """A peer takes the first token of the first occurrence."""
    last = tll.positions(model, "the old bridge and the tree", "bridge and")[0, 0]
    span = tll.positions(model, "the old bridge and the tree", tll.at("bridge and", span=True))[0]
    assert last == span[-1] and len(span) > 1


def test_a_substring_is_of_text_and_not_of_bos(model):
    """ "s" and ">" are in "<s>", and yet here only once."""
    bos = model.tokenizer.bos_token
    letter = next(c for c in bos if c.isalpha())
    prompt = f"12 {letter} 34"
    assert tll.positions(model, prompt, letter)[0, 0] > 0
    assert tll.positions(model, prompt, bos)[0, 0] == 0


def test_a_substring_that_is_there_twice_is_refused(model):
    with pytest.raises(ValueError, match="occurs 2 times"):
        tll.patchscope(model, tll.Source("the old bridge and the tree", pos="the"), tll.Target(TARGET))


def test_source_passes_are_shared_between_layers_and_positions(model):
    """Peers run the source again for every cell."""
    source, target = (model.to_tokens(text, prepend_bos=True).shape[1] for text in (PROMPT, TARGET))
    assert source != target  # so that a pass is told by its width
    passes = []
    handle = model.blocks[0].mlp.register_forward_pre_hook(lambda module, x: passes.append(tuple(x[0].shape[:2])))
    sources = [tll.Source(PROMPT, pos=i) for i in range(3)]
    tll.patchscope(model, sources, tll.Target(TARGET), target_layers=range(4), share=False)
    handle.remove()
    assert [rows for rows, width in passes if width == source] == [1]
    assert len([rows for rows, width in passes if width == target]) == 3 * (model.cfg.n_layers + 1) * 4


# --- the framework's other parts


def test_soft_prompts_are_embeddings(model):
    ids = model.to_tokens(TARGET, prepend_bos=True)
    seen = {}
    tll.run(model, ids, [tll.read("hook_embed", seen)])
    soft = tll.Target(seen["hook_embed"][0], pos=-2)
    options = dict(target_layers=range(4), max_new_tokens=3)
    by_ids = tll.patchscope(model, tll.Source(PROMPT), tll.Target(ids, pos=-2), **options)
    by_soft = tll.patchscope(model, tll.Source(PROMPT), soft, **options)
    torch.testing.assert_close(by_soft.logits, by_ids.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        by_soft.logits, tll.patchscope(model, tll.Source(PROMPT), soft, **options, share=False).logits, atol=1e-4, rtol=0
    )
    with pytest.raises(ValueError, match=r"expected a soft prompt \[pos, d_model=32\], got \[4, 16\]"):
        tll.patchscope(model, tll.Source(PROMPT), tll.Target(torch.zeros(4, 16)))


def test_several_targets_are_averaged_or_intersected(model):
    targets = [tll.Target(TARGET), tll.Target("the old tree")]
    each = [tll.patchscope(model, tll.Source(PROMPT), t, layers=[2]).logits.softmax(-1) for t in targets]
    mean = tll.patchscope(model, tll.Source(PROMPT), targets, layers=[2])
    torch.testing.assert_close(mean.logits.softmax(-1), sum(each) / 2, atol=1e-5, rtol=0)
    both = tll.patchscope(model, tll.Source(PROMPT), targets, layers=[2], ensemble="intersect", ensemble_k=40)
    inside = [set(p[0, 0].topk(40).indices.tolist()) for p in each]
    assert set(both.logits[0, 0].isfinite().nonzero()[:, 0].tolist()) == inside[0] & inside[1]
    with pytest.raises(ValueError, match="cannot be combined"):
        tll.patchscope(model, tll.Source(PROMPT), targets, layers=[2], max_new_tokens=2)


def _vector(model, vector, **more):
    """What the target says with a vector in place of its last state at layer 1."""
    return tll.patchscope(model, tll.Source(vector), tll.Target(TARGET), target_layers=[1], **more)


@pytest.mark.parametrize("norm", ["replaced", "mean", 2.5, torch.arange(4.0) + 3], ids=str)
def test_a_vector_gets_the_norm_that_is_asked_for(model, norm):
    v, target = residuals(model, PROMPT)[3][0, -1], residuals(model, TARGET)[1][0]
    length = (
        {"replaced": target[-1].norm(), "mean": target[1:].norm(dim=-1).mean()}.get(norm, 2.5)
        if not isinstance(norm, torch.Tensor)
        else 4.0
    )
    want = _vector(model, v / v.norm() * length).logits
    torch.testing.assert_close(_vector(model, v, norm=norm).logits, want, atol=1e-4, rtol=0)


def test_scales_are_a_sweep(model):
    v = residuals(model, PROMPT)[3][0, -1]
    sweep = _vector(model, v, scale=[0.5, 2.0])
    assert sweep.scales == [0.5, 2.0] and sweep.sources == ["vector 0 x 0.5", "vector 0 x 2"]
    for row, factor in enumerate((0.5, 2.0)):
        torch.testing.assert_close(sweep.logits[row], _vector(model, v * factor).logits[0], atol=1e-4, rtol=0)


def test_a_vector_without_length_gets_none(model):
    with pytest.raises(ValueError, match="length 0"):
        _vector(model, torch.zeros(32), norm="replaced")


def test_several_layers_at_once(model):
    resid = residuals(model, PROMPT)
    spread = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), pairs=[(1, (1, 2)), ((1, 2), (1, 2))])
    for cell, sources in enumerate(((1, 1), (1, 2))):
        hooks = [
            tll.patch(tll.site(model, b), tll.edits.replace(resid[a][0, -1]), pos=-1) for a, b in zip(sources, (1, 2), strict=True)
        ]
        with torch.no_grad():
            want = tll.run(model, TARGET, hooks)[0, -1]
        torch.testing.assert_close(spread.logits[0, cell], want, atol=1e-4, rtol=0)
    assert (spread.logits[0, 0] - spread.logits[0, 1]).abs().max() > 1e-3


def test_other_sites(model):
    """Any site that has one vector per position, into the same site of the target."""
    for name in ("blocks.1.hook_attn_out", "blocks.1.attn.hook_z", "blocks.2.hook_mlp_out"):
        seen = {}
        tll.run(model, PROMPT, [tll.read(name, seen, pos=-1)])
        got = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), pairs=[(name, name)])
        with torch.no_grad():
            want = tll.run(model, TARGET, [tll.patch(name, tll.edits.replace(seen[name]), pos=-1)])[0, -1]
        torch.testing.assert_close(got.logits[0, 0], want, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="cannot be a source"):
        tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), pairs=[("blocks.0.attn.hook_pattern", 1)])
    with pytest.raises(ValueError, match="does not fit 'blocks.0.mlp.hook_post'"):
        tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), pairs=[(1, "blocks.0.mlp.hook_post")])


def test_the_sources_own_prompt_is_the_target_by_default(model):
    sources = [tll.Source(PROMPT, pos=2), tll.Source("a dog ran", pos=-1)]
    result = tll.patchscope(model, sources)
    for row, source in enumerate(sources):
        with torch.no_grad():
            plain = model(model.to_tokens(source.prompt, prepend_bos=True))[0, -1]
        torch.testing.assert_close(result.logits[row], plain.expand(4, -1), atol=1e-4, rtol=0)


def test_the_most_likely_token_has_rank_one(model):
    result = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), layers=[0, 3])
    top = result.top_k(1).ids[0, 0, 0].item()
    assert result.rank(top)[0, 0] == 1 and torch.allclose(
        result.probability(top)[0, 0], result.top_probs[0, 0, 0], rtol=1e-6, atol=0
    )


def test_a_rank_is_at_most_the_vocabulary(model):
    result = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), layers=[3])
    assert sorted(result.rank(i).item() for i in range(320))[-1] <= 320


def test_a_word_of_one_token_has_its_rank(model):
    result = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), layers=[0, 3])
    (cat,) = model.tokenizer.encode(" cat", add_special_tokens=False)
    assert torch.equal(result.rank(" cat"), result.rank(cat))
    with pytest.raises(ValueError, match="expected one: mind the leading space"):
        result.rank("the cat sat on the mat")


def test_bad_input_is_refused_before_anything_runs(model, unchecked, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a forward pass ran")

    monkeypatch.setattr(type(model), "forward", never)
    S, T = tll.Source, tll.Target
    nan = torch.full((32,), float("nan"))
    cases = [
        (dict(source=S(PROMPT), target=T(TARGET, pos="zebra")), "'zebra' is not in the prompt; its tokens are"),
        (dict(source=S(PROMPT), target=T("the a the", pos="the")), "occurs 2 times"),
        (dict(source=S(PROMPT), target=T("sing qwzxqy now", pos="qwzxqy")), r"is \d+ tokens here .*span=True"),
        (dict(source=S(PROMPT), target=T("qwzxqy now", pos=[tll.at("qwzxqy"), -1])), r"is \d+ tokens here"),
        (dict(source=S(PROMPT), target=T(TARGET, pos=77)), "position 77 is not there"),
        (dict(source=S(PROMPT), target=T(TARGET), pairs=[(0, 9)]), "no layer 9"),
        (dict(source=S(PROMPT), target=T(TARGET), pairs=[((0, 1), 2)]), "expected as many"),
        (dict(source=S(PROMPT), target=T(TARGET), pairs=[(0, (2, 2))]), "given twice"),
        (dict(source=S(PROMPT), target=[]), "empty list of targets"),
        (dict(source=S(nan), target=T(TARGET)), "not finite"),
        (dict(source=S(torch.zeros(32)), target=None), "target=None means the source's own prompt"),
        (dict(source=S(PROMPT), target=T(TARGET), max_new_tokens=60), "more than the context of 64"),
        (dict(source=S(PROMPT), target=T(TARGET), max_new_tokens=-1), "at least 0"),
        (dict(source=S(PROMPT), target=T(TARGET), stop=["a"]), "can never match: nothing is generated"),
        (dict(source=S(PROMPT), target=T(TARGET), max_new_tokens=2, stop=[""]), "empty stop string"),
        (dict(source=S(PROMPT), target=T(TARGET), max_new_tokens=2, stop="abc"), r"pass stop=\['abc'\]"),
        (dict(source=S(PROMPT), target=T(TARGET), norm="big"), "norm must be"),
        (dict(source=S(PROMPT), target=T(TARGET), batch_size=0), "batch_size must be"),
        (dict(source=S(PROMPT), target=T(TARGET), temperature=0.0), "temperature must be positive"),
        (dict(source=S(PROMPT), target=T(TARGET, pos=[1, 2]), when="every_step", max_new_tokens=2), "one position"),
    ]  # fmt: skip
    for kwargs, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            tll.patchscope(model, **kwargs)


HALF = "a\ud800b"


@pytest.mark.parametrize(
    "call",
    [
        lambda model: tll.run(model, HALF),
        lambda model: tll.patchscope(model, tll.Source(HALF), layers=[1]),
        lambda model: tll.patchscope(model, "the cat", layers=[1], max_new_tokens=1, stop=[HALF]),
        lambda model: tll.patchscope(model, "the cat", layers=[1]).rank(HALF),
        lambda model: tll.trajectory(model, tll.Lens(model), "the cat", targets=HALF),
        lambda model: list(tll.token_batches([HALF] * 9, model.tokenizer, seq_len=4, batch_size=2)),
    ],
    ids=["run", "source", "stop", "rank", "targets", "token_batches"],
)
def test_half_of_a_surrogate_pair_is_refused(model, call):
    with pytest.raises(ValueError, match="half of a surrogate pair at character 1"):
        call(model)


def test_a_template_that_raises_is_named(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ raise_exception('no system message') }}")
    with pytest.raises(ValueError, match="chat template does not take these messages: no system message"):
        tll.run(model, [{"role": "user", "content": "x"}])


@pytest.mark.parametrize("path,message", [("file/heat.html", "file is a file: expected a folder"), ("", "empty text")])
def test_a_path_that_cannot_be_written_is_refused(model, tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=message):
        tll.trajectory(model, tll.Lens(model), "the cat").save(path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("path,message", [("", "empty text"), (".", "is a folder")])
def test_a_checkpoint_that_cannot_be_written_is_refused(model, path, message):
    with pytest.raises(ValueError, match=message):
        tll.fit_tuned(model, zoo.tokens(2, 8), 1, init="identity", checkpoint=path)


def test_a_direction_of_another_width_is_refused(model):
    with pytest.raises(ValueError, match=r"direction must be \[..., \d+\] at layer 1"):
        tll.Lens(model).read(torch.zeros(2, 3), 1)

"""Patchscopes against the direct computation."""

import json

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses.translators import Affine

KINDS = zoo.FEW_KINDS
PROMPT, TARGET = "the cat sat on the mat", "a bird sang in the tree"


@pytest.fixture(params=KINDS, scope="module")
def model(request):
    return zoo.build("gpt2", request.param)


@torch.no_grad()
def _direct(model, source, i, layer, target, j, target_layer, f=lambda v: v):
    """One cell, by TransformerLens alone."""
    tokens = lambda text: model.to_tokens(text, prepend_bos=True) if isinstance(text, str) else text[None]
    kept = {}

    def keep(x, hook):
        kept["v"] = x[0, i].clone()

    def put(x, hook):
        x = x.clone()
        x[0, j] = f(kept["v"])
        return x

    model.run_with_hooks(tokens(source), fwd_hooks=[(tll.site(model, layer), keep)])
    return model.run_with_hooks(tokens(target), fwd_hooks=[(tll.site(model, target_layer), put)])[0, -1]


def test_every_cell_equals_the_direct_computation(model):
    result = tll.patchscope(
        model, tll.Source(PROMPT, pos=3), tll.Target(TARGET, pos=-2), layers=range(4), target_layers=[0, 2, 3], batch_size=5
    )
    assert result.pairs == [(a, b) for a in range(4) for b in (0, 2, 3)] and result.logits.shape == (1, 12, 320)
    for c, (a, b) in enumerate(result.pairs):
        assert torch.allclose(result.logits[0, c], _direct(model, PROMPT, 3, a, TARGET, -2, b), atol=1e-4), (a, b)
    assert (result.logits[0, 0] - result.logits[0, 3]).abs().max() > 1e-3


def test_each_layer_into_itself_is_the_default(model):
    diagonal = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET))
    assert diagonal.pairs == [(i, i) for i in range(4)]
    for i in range(4):
        assert torch.allclose(diagonal.logits[0, i], _direct(model, PROMPT, -1, i, TARGET, -1, i), atol=1e-4)


def test_pairs_are_exactly_those_given(model):
    picked = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), pairs=[(-1, 1), (2, 2)])
    assert picked.pairs == [(3, 1), (2, 2)]
    for c, (a, b) in enumerate(picked.pairs):
        assert torch.allclose(picked.logits[0, c], _direct(model, PROMPT, -1, a, TARGET, -1, b), atol=1e-4)


def test_the_logit_lens_is_a_patchscope(model):
    # l* = L: whatever the target, its last residual becomes the source's, and is read out
    result = tll.patchscope(model, tll.Source(PROMPT), tll.scopes.token_identity(), target_layers=[-1])
    resid = {}
    tll.run(model, PROMPT, [tll.read(tll.site(model, i), resid, key=i, pos=-1) for i in range(4)])
    lens = tll.Lens(model)
    for i in range(4):
        assert torch.allclose(result.logits[0, i], lens[i](resid[i])[0, 0], atol=1e-4)


def test_same_prompt_same_place_is_a_no_op(model):
    result = tll.patchscope(model, tll.Source(PROMPT), tll.Target(PROMPT))
    with torch.no_grad():
        plain = model(model.to_tokens(PROMPT, prepend_bos=True))[0, -1]
    assert torch.allclose(result.logits[0], plain.expand(4, -1), atol=1e-5)


def test_a_map_is_applied_to_the_vector_of_every_source(model):
    a = Affine(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) / 6, torch.ones(32))
    sources = [tll.Source(PROMPT), tll.Source("a dog ran", pos="dog")]
    mapped = tll.patchscope(model, sources, tll.Target(TARGET), layers=[1], target_layers=[2], map=a)
    assert mapped.logits.shape[:2] == (2, 1) and mapped.sources == [PROMPT, "a dog ran"]
    dog = tll.positions(model, "a dog ran", "dog")[0, 0]
    for row, (text, i) in enumerate([(PROMPT, -1), ("a dog ran", dog)]):
        assert torch.allclose(mapped.logits[row, 0], _direct(model, text, i, 1, TARGET, -1, 2, a), atol=1e-4)


def test_translators_are_used_by_their_row(model):
    t = zoo.random_maps(model)
    by_row = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), layers=[1], target_layers=[3], map=t)
    assert torch.allclose(by_row.logits[0, 0], _direct(model, PROMPT, -1, 1, TARGET, -1, 3, t[1]), atol=1e-4)


def test_adding_a_vector_of_zeros_changes_nothing(model):
    added = tll.patchscope(model, tll.Source(torch.zeros(32)), tll.Target(TARGET), mode="add")
    with torch.no_grad():
        plain = model(model.to_tokens(TARGET, prepend_bos=True))[0, -1]
    assert added.pairs == [(None, i) for i in range(4)]
    assert torch.allclose(added.logits[0], plain.expand(4, -1), atol=1e-5)


@pytest.fixture
def states(model):
    """The last position's residuals `[n_layers + 1, d_model]` of the source prompt."""
    resid = {}
    tll.run(model, PROMPT, [tll.read(tll.site(model, i), resid, key=i, pos=-1) for i in range(4)])
    return torch.stack([resid[i][0, 0] for i in range(4)])


def test_token_ids_are_as_their_text(model):
    by_text = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET))
    for ids in (model.to_tokens(PROMPT, prepend_bos=True)[0], model.to_tokens(PROMPT, prepend_bos=True)[0].tolist()):
        assert torch.equal(by_text.logits, tll.patchscope(model, tll.Source(ids), tll.Target(TARGET)).logits)
    assert torch.equal(by_text.logits, tll.patchscope(model, PROMPT, tll.Target(TARGET)).logits)


def test_vectors_by_layer_are_as_the_prompt_they_come_from(model, states):
    by_text = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET))
    by_layer = tll.patchscope(model, tll.Source(states[None]), tll.Target(TARGET))
    assert by_layer.pairs == by_text.pairs and torch.allclose(by_text.logits, by_layer.logits, atol=1e-5)


def test_vectors_without_a_layer_are_entries_of_the_source_axis(model, states):
    two = tll.patchscope(model, tll.Source(states[1:3]), tll.Target(TARGET), target_layers=[1])
    assert two.logits.shape == (2, 1, 320) and two.pairs == [(None, 1)]
    for row, layer in enumerate((1, 2)):
        assert torch.allclose(two.logits[row, 0], _direct(model, PROMPT, -1, layer, TARGET, -1, 1), atol=1e-4)


def test_a_span_goes_to_as_many_positions(model):
    span = tll.patchscope(model, tll.Source(PROMPT, pos=[2, 3]), tll.Target(TARGET, pos=[4, 5]), layers=[1])
    assert span.logits.shape == (1, 1, 320)
    assert torch.allclose(span.logits[0, 0], _direct(model, PROMPT, [2, 3], 1, TARGET, [4, 5], 1), atol=1e-4)


def test_one_vector_goes_to_several_placeholders(model):
    both = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET, pos=[4, 5]), layers=[1])
    assert torch.allclose(both.logits[0, 0], _direct(model, PROMPT, [-1], 1, TARGET, [4, 5], 1), atol=1e-4)


def test_texts_are_those_of_a_patched_generation(model):
    result = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), layers=[0, 2], max_new_tokens=6)
    assert len(result.text) == 1 and len(result.text[0]) == 2 and result.tokens.shape[:2] == (1, 2)
    for c, layer in enumerate((0, 2)):
        resid = {}
        tll.run(model, PROMPT, [tll.read(tll.site(model, layer), resid, key=0, pos=-1)])
        n = model.to_tokens(TARGET, prepend_bos=True).shape[1]
        alone = tll.generate(model, TARGET, [tll.patch(layer, tll.edits.replace(resid[0][0, 0]), pos=-1)], 6)[0, n:]
        assert result.tokens[0, c][: len(alone)].tolist() == alone.tolist()
        assert int(result.top_k(1).ids[0, c, 0]) == int(alone[0])


def test_a_stop_string_cuts_the_text(model):
    options = dict(layers=[0], max_new_tokens=6)
    whole = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), **options).text[0][0]
    stopped = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), **options, stop=[whole[2:4]])
    assert stopped.text[0][0] == whole[: whole.index(whole[2:4])]


def test_a_result_without_logits_has_the_top_tokens(model):
    result = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET))
    few = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), keep="top_k")
    assert torch.equal(few.top_k(5).ids, result.top_k(5).ids)
    assert torch.allclose(few.top_k(5).probs, result.top_k(5).probs, atol=1e-6)
    with pytest.raises(ValueError, match="keep='logits'"):
        _ = few.logits
    with pytest.raises(ValueError, match="only the top 10"):
        few.top_k(11)


def test_a_frame_has_a_row_per_cell(model):
    result = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), max_new_tokens=2)
    frame, top = result.to_frame(), result.top_k(3)
    assert list(frame.columns) == ["source", "layer", "target_layer", "token", "prob", "text"] and len(frame) == 4
    assert top.tokens[0][0][0] == frame["token"][0] and top.probs[0, 0, 0] == pytest.approx(frame["prob"][0], rel=1e-5)
    assert list(frame["text"]) == result.text[0]


def test_probabilities_are_those_of_the_logits(model, unchecked):
    result = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET))
    assert torch.allclose(result.probability(5), result.logits.softmax(-1)[..., 5])
    assert result.probability(torch.tensor(5)).shape == (1, 4)


def test_a_rank_is_one_more_than_the_number_of_larger_logits(model):
    result = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET))
    assert torch.equal(result.rank(5), 1 + (result.logits > result.logits[..., 5:6]).sum(-1))


@pytest.mark.parametrize("token,error", [(320, ValueError), (True, TypeError), (1.5, TypeError)])
def test_what_is_no_token_has_no_probability(model, unchecked, token, error):
    result = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), layers=[0])
    with pytest.raises(error, match="a token id must be"):
        result.probability(token)


def test_hooks_on_either_run(model):
    zero = [tll.patch(0, tll.edits.zero)]
    plain = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), layers=[2])
    source_cut = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), layers=[2], source_hooks=zero)
    target_cut = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), layers=[2], target_hooks=zero)
    assert not torch.allclose(plain.logits, source_cut.logits, atol=1e-3) and not torch.allclose(
        plain.logits, target_cut.logits, atol=1e-3
    )


def test_another_model_as_target(model):
    other = zoo.build("neox", KINDS[0])
    result = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), layers=[1], to=other)
    assert result.pairs == [(1, 1)] and result.logits.shape == (1, 1, 320)


def test_refusals(model, unchecked):
    S, T = tll.Source, tll.Target
    cases = [
        (dict(source=S(PROMPT, pos="dog"), target=T(TARGET)), "'dog' is not in the prompt; its tokens are"),
        (dict(source=S(PROMPT, pos=99), target=T(TARGET)), "position 99 is not there"),
        (dict(source=S(PROMPT), target=T(TARGET), layers=[9]), "no layer 9"),
        (dict(source=S(PROMPT), target=T(TARGET), layers=[]), "no pair of layers"),
        (dict(source=S(PROMPT), target=T(TARGET), layers=[1], pairs=[(1, 1)]), "either pairs"),
        (dict(source=S(PROMPT, pos=[1, 2]), target=T(TARGET)), "gives 2 positions and the target takes 1"),
        (dict(source=S(torch.zeros(3, 16)), target=T(TARGET)), "width 16 does not fit the target model"),
        (dict(source=S(torch.zeros(3, 32)), target=T(TARGET), layers=[1]), "have no layer"),
        (dict(source=S(torch.zeros(3, 2, 32)), target=T(TARGET)), r"need 4 layers, got \[3, 2, 32\]"),
        (dict(source=S(PROMPT), target=T(TARGET), pairs=[(None, 1)]), "is None for vectors"),
        (dict(source=[], target=T(TARGET)), "empty list of sources"),
        (dict(source=[S(PROMPT), S(torch.zeros(32))], target=T(TARGET)), "cannot share a call"),
        (dict(source=S(PROMPT), target=T(TARGET), mode="swap"), "mode must be"),
        (dict(source=S(PROMPT), target=T(TARGET), keep="all"), "keep must be"),
        (dict(source=S(PROMPT), target=T(TARGET), read=slice(0, 2)), "selects 2 positions, expected one"),
        (dict(source=S(PROMPT), target=T(TARGET), max_new_tokens=60), "more than the context"),
    ]
    for kwargs, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            tll.patchscope(model, **kwargs)


def test_a_result_is_one_line_as_repr(model):
    result = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), max_new_tokens=2)
    assert repr(result) == f"PatchscopeResult(sources=1, pairs=4, new_tokens={result.tokens.shape[-1]})"
    assert repr(tll.patchscope(model, PROMPT, tll.Target(TARGET))) == "PatchscopeResult(sources=1, pairs=4)"


def test_a_result_is_a_table_as_text(model):
    result = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET), max_new_tokens=2)
    assert "\n" in str(result) and TARGET in str(result) and "a bird sang in" in result._repr_html_()


@pytest.mark.parametrize("suffix", [".json", ".csv", ".html", ".svg", ".png"])
def test_a_result_is_saved_as_the_suffix_says(model, tmp_path, suffix):
    sources = [tll.Source(PROMPT, pos=2), tll.Source("a dog ran")]
    result = tll.patchscope(model, sources, tll.Target(TARGET), pairs=[(1, (0, 2)), (2, 1)], max_new_tokens=2)
    path = result.save(tmp_path / "new" / f"sweep{suffix}")
    assert path == tmp_path / "new" / f"sweep{suffix}"
    if suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG")
        return
    text = path.read_text(encoding="utf-8")
    if suffix == ".json":
        content = json.loads(text)
        assert [c["source"] for c in content["cells"]] == [PROMPT, PROMPT, "a dog ran", "a dog ran"]
        assert [(c["layer"], c["target_layer"]) for c in content["cells"][:2]] == [(1, [0, 2]), (2, 1)]
        assert [c["text"] for c in content["cells"]] == [t for row in result.text for t in row]
        assert [c["top"][0][1] for c in content["cells"]] == pytest.approx(result.top_probs[..., 0].flatten().tolist())
        assert content["source_positions"] == [[2], [4]] and len(content["target_positions"]) == 1
        assert content["seed"] == 0 and content["target"] == TARGET and "torch" in content["versions"]
    elif suffix == ".csv":
        assert len(text.splitlines()) >= 1 + 4 and text.startswith("source,layer,target_layer,token,prob,text")
    else:
        assert ("<svg" if suffix == ".svg" else "patchscope into") in text


def test_a_result_is_not_saved_under_an_unknown_suffix(model, tmp_path):
    result = tll.patchscope(model, PROMPT, tll.Target(TARGET))
    with pytest.raises(ValueError, match=r"cannot tell how to save .*sweep.pdf.*: use one of .json, .csv"):
        result.save(tmp_path / "sweep.pdf")
    with pytest.raises(ValueError, match="source=3 is out of range"):
        result.save(tmp_path / "sweep.svg", source=3)
    assert not list(tmp_path.iterdir())


def test_top_k_says_its_range(model, unchecked):
    result = tll.patchscope(model, PROMPT, tll.Target(TARGET), layers=[1])
    assert result.top_k(torch.tensor(3)).ids.shape == (1, 1, 3)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        result.top_k(0)
    with pytest.raises(TypeError, match="k must be a whole number, got 1.5"):
        result.top_k(1.5)


@pytest.mark.parametrize("share", [True, False])
def test_logits_are_read_where_asked(model, share):
    seen = {}
    tll.run(model, PROMPT, [tll.read(1, seen, pos=-1)])
    got = tll.patchscope(model, tll.Source(PROMPT), tll.Target(TARGET, pos=1), layers=[1], read=2, share=share).logits[0, 0]
    want = tll.run(model, TARGET, [tll.patch(1, tll.edits.replace(seen[1][0, 0]), pos=1)])[0]
    torch.testing.assert_close(got, want[2], atol=1e-4, rtol=0)
    assert not torch.allclose(got, want[-1], atol=1e-2)

"""Texts of a patchscope and what they could have come from: scores against plain Hugging Face, laws, controls."""

import math

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses.experiments.faithful import CONTROLS, identification, identified, specificity

WORDS = ["the cat", "a dog", "stone bridge", "old tree", "far bird"]
TARGET = tll.Target("the cat -> the cat sat ; mat ->", pos="mat")
ARCHS = ("gpt2", "llama", "gptneo", "bloom", "gemma2")


def blocks_of(hf):
    body = getattr(hf, "transformer", None) or hf.model
    return body.h if hasattr(body, "h") else body.layers


@torch.no_grad()
def plain_score(hf, ids, text, layer=None, column=None, vector=None):
    """`log p(text | ids)` by one pass of the plain model over the whole sequence, one column of a block's input replaced."""

    def replace(module, args, kwargs):
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        x[:, column] = vector
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    handles = [] if layer is None else [blocks_of(hf)[layer].register_forward_pre_hook(replace, with_kwargs=True)]
    try:
        logits = hf(torch.tensor([[*ids, *text]]), use_cache=False).logits[0, len(ids) - 1 : -1]
    finally:
        for handle in handles:
            handle.remove()
    return float(logits.double().log_softmax(-1)[range(len(text)), list(text)].sum())


def vector_of(hf, ids, layer):
    """The input of a block at the last column."""
    seen = {}
    handle = blocks_of(hf)[layer].register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(x=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        hf(torch.tensor([ids]), use_cache=False)
    handle.remove()
    return seen["x"][0, -1]


def ids_of(model, text):
    return model.to_tokens(text, prepend_bos=True)[0].tolist()


def generated(result):
    return [[tuple(i for i in cell if i >= 0) for cell in row] for row in result.tokens.tolist()]


@pytest.mark.parametrize("arch,kind", zoo.cases(ARCHS, zoo.FEW_KINDS))
def test_the_score_of_a_text_is_a_loop_over_the_plain_model(arch, kind):
    model, hf = zoo.build(arch, kind), zoo.reference(arch)
    pairs = [(1, 0), (2, 2), (0, 1)]
    result = tll.patchscope(model, WORDS[:3], TARGET, pairs=pairs, max_new_tokens=4)
    found = tll.faithfulness(result, draws=10)
    prompt, place = ids_of(model, TARGET.prompt), result.settings["target_positions"][0][0]
    for p, (a, b) in enumerate(pairs):
        vectors = [vector_of(hf, ids_of(model, word), a) for word in WORDS[:3]]
        for i, text in enumerate(row[p] for row in generated(result)):
            for j, vector in enumerate(vectors):
                expected = plain_score(hf, prompt, text, b, place, vector)
                assert float(found.scores["vector"][p, i, j]) == pytest.approx(expected, abs=1e-5 * max(1, -expected))
            expected = plain_score(hf, prompt, text, b, place, sum(vectors) / 3)
            assert float(found.scores["mean vector"][p, i, i]) == pytest.approx(expected, abs=1e-5 * max(1, -expected))
            expected = plain_score(hf, prompt, text)
            assert float(found.scores["unpatched"][p, i, 0]) == pytest.approx(expected, abs=1e-5 * max(1, -expected))


@pytest.mark.parametrize("kind", zoo.FEW_KINDS)
@pytest.mark.parametrize("options", [
    {"when": "every_step"}, {"isolate": True}, {"mode": "norm_add", "norm": 3.0}, {"norm": "mean"}, {"share": False},
    {"max_new_tokens": 0}, {"max_new_tokens": 0, "read": "mat"}, {"target_layers": [0, (1, 2)]},
])  # fmt: skip
def test_scores_do_not_depend_on_what_is_shared(kind, options, monkeypatch):
    model = zoo.build("gpt2", kind)
    call = {"layers": [0, 2], "max_new_tokens": 3, **options}
    shared = tll.faithfulness(tll.patchscope(model, WORDS[:3], TARGET, **call), draws=10).scores
    naive = tll.faithfulness(tll.patchscope(model, WORDS[:3], TARGET, **call | {"share": False}), draws=10).scores
    for name in ("vector", "mean vector", "unpatched", "source as text"):
        torch.testing.assert_close(shared[name], naive[name], atol=2e-4, rtol=1e-5)
    assert not torch.allclose(shared["vector"], shared["unpatched"], atol=1e-2)


def test_the_text_that_was_generated_is_the_likeliest_first_token_under_its_own_vector(model):
    result = tll.patchscope(model, WORDS, TARGET)
    found = tll.faithfulness(result, controls=["random vector"])
    own = found.scores["vector"].diagonal(dim1=1, dim2=2).T
    torch.testing.assert_close(own.float(), result.top_probs[..., 0].log(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", zoo.FEW_KINDS)
def test_without_a_patch_every_text_is_at_chance(kind):
    model = zoo.build("gpt2", kind)
    result = tll.patchscope(model, WORDS, TARGET, mode="interpolate", alpha=0.0, max_new_tokens=3)
    found = tll.faithfulness(result)
    of = found.grid.at(condition="vector")
    assert of["identified"].tolist() == [1 / len(WORDS)] * 4 and found.chance == 1 / len(WORDS)
    assert float(of["specificity"].abs().max()) < 1e-4 and of["distinct"].tolist() == [1.0] * 4


def test_distinct_tokens_from_layer_0_into_layer_0_are_identified():
    model = tll.lab.load()
    names = ["Japan", "France", "Canada", "Mexico", "Germany", "Italy", "Spain", "Russia", "India"]
    names = [name for name in names if model.to_tokens(name, prepend_bos=True).shape[1] == 2]
    assert len(names) > 5
    result = tll.patchscope(model, names, tll.scopes.entity_description(), layers=[0, 4], max_new_tokens=4)
    found = tll.faithfulness(result, draws=100)
    assert float(found.grid.at(condition="vector")["identified"][0]) == 1.0
    assert float(found.grid.at(condition="vector")["identified"][1]) < 0.5
    # a word that is copied says what the source's words say: nothing that needs the vector
    assert float(found.grid.at(condition="source as text")["identified"][0]) == 1.0
    assert found.best == 0 and "= text" in str(found)


def test_controls_are_what_they_are_called(model):
    result = tll.patchscope(model, WORDS, TARGET, layers=[1, 2], max_new_tokens=3)
    found = tll.faithfulness(result)
    assert list(found.scores) == ["vector", *CONTROLS] and found.settings["left_out"] == {}
    for name in ("mean vector", "unpatched"):
        of = found.grid.at(condition=name)
        assert of["identified"].tolist() == pytest.approx([0.2, 0.2])
        assert float(of["specificity"].abs().max()) < 1e-4 and of["distinct"].tolist() == [1, 1]
    own = found.scores["vector"]
    for i in range(len(WORDS)):  # another source's vector: its column, never the own one
        column = found.scores["other vector"][:, :, i]
        assert [j for j in range(len(WORDS)) if torch.equal(column, own[:, :, j])] not in ([], [i])
    unpatched = tll.generate(model, model.to_tokens(TARGET.prompt, prepend_bos=True), (), 3)
    assert found.said["unpatched"][0][0] == model.tokenizer.decode(unpatched[0, -3:])
    last = [model.tokenizer.decode(ids_of(model, word)[-1:]).strip() for word in WORDS]
    for words, name in ((WORDS, "source as text"), (last, "token as text")):
        for j, word in enumerate(words):
            asked = ids_of(model, TARGET.prompt.replace("mat", word))
            for i, text in enumerate(row[0] for row in generated(result)):
                expected = plain_score(zoo.reference("gpt2"), asked, text)
                assert float(found.scores[name][0, i, j]) == pytest.approx(expected, abs=1e-4), name


def test_an_inversion_is_asked_in_words(model):
    result = tll.patchscope(model, WORDS[:2], TARGET, layers=[1], max_new_tokens=2)
    repeat = tll.Target("the dog", pos=-1)
    found = tll.faithfulness(result, repeat=repeat, controls=["inverted as text"])
    n_new = max(len(ids_of(model, word)) for word in WORDS[:2])
    inverted = tll.patchscope(model, WORDS[:2], repeat, layers=[1], max_new_tokens=n_new).text
    for j in range(2):
        words = inverted[j][0].strip().split("\n")[0].strip()
        expected = plain_score(zoo.reference("gpt2"), ids_of(model, TARGET.prompt.replace("mat", words)), generated(result)[0][0])
        assert float(found.scores["inverted as text"][0, 0, j]) == pytest.approx(expected, abs=1e-4)


def test_a_random_vector_has_the_norm_of_the_vector(monkeypatch):
    from tl_lenses.experiments import faithful

    seen = []
    real = faithful.random_like
    monkeypatch.setattr(faithful, "random_like", lambda v, g: seen.append((v, real(v, g))) or seen[-1][1])
    result = tll.patchscope(zoo.build("gpt2", zoo.FEW_KINDS[0]), WORDS[:3], TARGET, layers=[0, 3])
    tll.faithfulness(result, controls=["random vector"])
    assert len(seen) == 3 * 2  # sources and layers
    for vector, noise in seen:
        torch.testing.assert_close(noise.norm(), vector.norm())
        assert not torch.allclose(noise, vector, atol=0.1)


def test_texts_are_told_from_those_of_few_sources(model):
    result = tll.patchscope(model, WORDS, TARGET, layers=[1], max_new_tokens=2)
    every, few = (tll.faithfulness(result, among=n, draws=10) for n in (None, 2))
    there = ~few.scores["vector"].isnan()
    assert there.sum(-1).tolist()[0] == [2, 2, 2, 2, 2] or sorted(there.sum(-1).tolist()[0]) == [2, 2, 3, 3, 3]
    torch.testing.assert_close(few.scores["vector"][there], every.scores["vector"][there], atol=1e-4, rtol=0)
    assert few.chance == pytest.approx(float((1 / there.sum(-1).double()).mean())) and every.chance == 0.2
    assert identification(result, among=5).tolist() == identified(every.scores["vector"]).T.tolist()
    assert identification(result, 2, among=5).shape == (2, 1)


def test_statistics_in_closed_form():
    a = torch.tensor([[[0.0, -1.0, -2.0], [0.0, 0.0, 0.0], [5.0, 1.0, 1.0]]], dtype=torch.float64)
    assert identified(a)[0].tolist() == pytest.approx([1.0, 1 / 3, 0.0])
    mean = math.log((math.exp(-1) + math.exp(-2)) / 2)
    assert specificity(a)[0, :2].tolist() == pytest.approx([-mean, 0.0])
    a[0, 0, 2] = math.nan  # not compared
    assert specificity(a)[0, 0] == pytest.approx(1.0) and identified(a)[0, 0] == 1.0


@pytest.fixture(scope="module")
def scored(model):
    """Faithfulness of one result with seeds 0, 0 again and 1."""
    result = tll.patchscope(model, WORDS, TARGET, max_new_tokens=2)
    return [tll.faithfulness(result, seed=seed, controls=[]).grid for seed in (0, 0, 1)]


@pytest.mark.parametrize("name", ["identified", "specificity"])
def test_an_interval_holds_its_mean(scored, name):
    x, low, high = (scored[0][name + end] for end in ("", "_low", "_high"))
    assert bool((low <= x).all() and (x <= high).all() and (low < high).any())


def test_the_seed_decides_the_interval(scored):
    for name in ("identified_low", "specificity_low"):
        assert torch.equal(scored[0][name], scored[1][name])
    assert not torch.equal(scored[0]["specificity_low"], scored[2]["specificity_low"])


IN_WORDS = {"source as text", "token as text", "inverted as text"}


def test_vectors_cannot_be_asked_in_words(model):
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    found = tll.faithfulness(tll.patchscope(model, tll.Source(vectors), TARGET, target_layers=[1], max_new_tokens=2))
    assert set(found.settings["left_out"]) == IN_WORDS - {"inverted as text"} and "the sources are no text" in str(found)


def test_without_a_target_nothing_can_be_asked_in_words(model):
    sources = [tll.Source("the cat sat", 1), tll.Source("a dog ran far", 1)]
    found = tll.faithfulness(tll.patchscope(model, sources, None, layers=[1, 2]))
    assert set(found.settings["left_out"]) == IN_WORDS and set(found.scores) == {"vector", *CONTROLS} - IN_WORDS


def test_spans_of_other_lengths_have_no_mean(model):
    sources = [tll.Source("the cat sat", [1, 2]), tll.Source("a dog", [-1])]
    spans = tll.patchscope(model, sources, tll.Target("a cat sat", [1, 2]), layers=[1])
    assert "mean vector" in tll.faithfulness(spans).settings["left_out"]


def test_the_source_of_another_model_is_read_through_its_map(model):
    other = zoo.build("llama", zoo.FEW_KINDS[0])
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    result = tll.patchscope(model, WORDS[:3], TARGET, pairs=[(2, 1)], to=other, map=lambda v: v @ turn, max_new_tokens=2)
    found = tll.faithfulness(result)
    hf, prompt = zoo.reference("llama"), ids_of(other, TARGET.prompt)
    place = result.settings["target_positions"][0][0]
    for j, word in enumerate(WORDS[:3]):
        seen = {}
        tll.run(model, word, [tll.read(2, seen, pos=-1)])
        expected = plain_score(hf, prompt, generated(result)[0][0], 1, place, seen[2][0, 0] @ turn)
        assert float(found.scores["vector"][0, 0, j]) == pytest.approx(expected, abs=1e-4)


def test_what_cannot_be_scored_is_refused(model, unchecked):
    result = tll.patchscope(model, WORDS[:2], TARGET, layers=[1])
    with pytest.raises(TypeError, match=r"expected the result of tll\.patchscope, got str"):
        tll.faithfulness("text")
    with pytest.raises(ValueError, match="at least two sources, got 1"):
        tll.faithfulness(tll.patchscope(model, WORDS[0], TARGET, layers=[1]))
    with pytest.raises(ValueError, match="sweeps scales"):
        tll.faithfulness(tll.patchscope(model, WORDS[:2], TARGET, layers=[1], scale=[1.0, 2.0]))
    with pytest.raises(ValueError, match="combines several targets"):
        tll.faithfulness(tll.patchscope(model, WORDS[:2], [TARGET, tll.Target("a dog")], layers=[1]))
    with pytest.raises(ValueError, match="controls must be .*'mean vector'.*got 'judge'"):
        tll.faithfulness(result, controls=["judge"])
    with pytest.raises(ValueError, match="no call to ask again"):
        tll.faithfulness(tll.PatchscopeResult(result.sources, result.pairs, result.top_ids, result.top_probs, result.vocab))

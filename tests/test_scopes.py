"""Ready scopes: their prompts, and every published method against the computation it stands for."""

import csv
import inspect

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses import methods, scopes
from tl_lenses.model import prepare
from tl_lenses.patchscopes.targets import ready_target

PROMPT, OTHER = "the cat sat on the mat", "the mat sat on the mat"  # as many tokens


@pytest.fixture(params=zoo.FEW_KINDS, scope="module")
def model(request):
    return zoo.build("gpt2", request.param)


@pytest.fixture(scope="module")
def lab():
    return tll.lab.load("lab-gpt2")


def _ids(model, text):
    return model.to_tokens(text, prepend_bos=True)


@torch.no_grad()
def _logits(model, tokens, *hooks):
    """Logits `[batch, pos, d_vocab]` by TransformerLens alone."""
    return model.run_with_hooks(tokens, fwd_hooks=list(hooks))


@torch.no_grad()
def _state(model, text, layer, *hooks):
    """A state `[batch, pos, ...]` by TransformerLens alone."""
    seen = {}

    def keep(x, hook):
        seen["x"] = x.clone()

    tokens = _ids(model, text) if isinstance(text, str) else text
    model.run_with_hooks(tokens, fwd_hooks=[*hooks, (tll.site(model, layer), keep)])
    return seen["x"]


def _put(model, layer, pos, value):
    """A hand-written patch."""

    def put(x, hook):
        x = x.clone()
        x[:, pos] = value
        return x

    return (tll.site(model, layer), put)


def _masked_scores(model, queries, keys, blocks):
    """Attention knockout by hand: -inf in the scores, before the softmax."""

    def mask(x, hook):
        x = x.clone()
        for q in queries:
            x[:, :, q, keys] = float("-inf")
        return x

    return [(f"blocks.{b}.attn.hook_attn_scores", mask) for b in blocks]


# --- targets


def _targets():
    """Every ready target as published, with the words that receive the vector."""
    yield "token_identity", scopes.token_identity(), ["?"]
    yield "next_token", scopes.next_token(), ["?"]
    yield "entity_description", scopes.entity_description(), ["x"]
    yield "reverse_dictionary", scopes.reverse_dictionary(), ["x"]
    yield "selfie", scopes.selfie(), ["_"] * 5
    yield "future_lens", scopes.future_lens(), ['"']
    for name in scopes.RELATIONS:
        yield name, scopes.attribute(name), ["x"]


TARGETS = {name: (target, words) for name, target, words in _targets()}


def test_the_prompts_are_the_published_ones(shared):
    files = sorted((shared / "tasks" / "patchscopes-preprocessed").glob("*/*.tsv"))
    assert sorted(scopes.RELATIONS) == sorted(f.stem for f in files) and len(files) == 22
    for file in files:
        with file.open(encoding="utf-8", newline="") as rows:
            row = next(csv.DictReader(rows, delimiter="\t"))
        assert scopes.attribute(file.stem).prompt == row["prompt_target"] and row["position_target"] == "-1"


def test_the_prompts_of_other_methods():
    assert TARGETS["token_identity"][0].prompt == "cat -> cat\n1135 -> 1135\nhello -> hello\n?"
    assert TARGETS["entity_description"][0].prompt == (
        "Syria: Country in the Middle East, Leonardo DiCaprio: American actor, Samsung: South Korean multinational "
        "major appliance and consumer electronics corporation, x"
    )
    assert TARGETS["selfie"][0].prompt == "[INST] _ _ _ _ _ [/INST] Sure, I will summarize the message:"
    assert TARGETS["future_lens"][0].prompt == 'Hello! Could you please tell me more about "'


@pytest.mark.parametrize("name", TARGETS)
def test_the_placeholders_are_one_token_each(lab, name):
    target, words = TARGETS[name]
    tokens = _ids(lab, target.prompt)
    columns = tll.positions(lab, tokens, target.pos)[0].tolist()
    assert [lab.tokenizer.decode([i]).strip() for i in tokens[0, columns].tolist()] == words
    if name not in ("selfie", "reverse_dictionary"):
        assert columns == [tokens.shape[1] - 1]
    assert ready_target(lab, target, -1, 20).place == tuple(columns)


SHORT = {
    "token_identity": (scopes.token_identity(words=("cat", "bird")), [-1]),
    "next_token": (scopes.next_token(), [-1]),
    "entity_description": (scopes.entity_description(shots={"cat": "an animal", "Paris": "a capital"}), [-1]),
    "attribute": (scopes.attribute("country_capital_city"), [-1]),
    "own attribute": (scopes.attribute("the king of z is", placeholder="z"), None),
    "own dictionary": (scopes.reverse_dictionary("z", shots={"an animal": "cat", "in France": "Paris"}), None),
    "selfie": (scopes.selfie(2, "I sum:", chat=("[", "]")), None),
    "future_lens": (scopes.future_lens('The tree "'), [-1]),
}


@pytest.mark.parametrize("name", SHORT)
def test_targets_equal_the_direct_computation(model, name):
    target, columns = SHORT[name]
    tokens = _ids(model, target.prompt)
    if columns is None:
        mark = "z" if "own" in name else "_"
        columns = [i for i, t in enumerate(tokens[0].tolist()) if mark in model.tokenizer.decode([t])]
        assert len(columns) == (1 if "own" in name else 2)
    result = tll.patchscope(model, tll.Source(PROMPT, pos="cat"), target, layers=[1], target_layers=[0, 2])
    vector = _state(model, PROMPT, 1)[0, tll.positions(model, PROMPT, "cat")[0, 0]]
    for c, layer in enumerate((0, 2)):
        direct = _logits(model, tokens, _put(model, layer, columns, vector))[0, -1]
        assert torch.allclose(result.logits[0, c], direct, atol=1e-4), layer


def test_next_token_is_the_model_itself_after_one_word(model):
    word = _ids(model, "the")
    assert word.shape[1] == 2 and _ids(model, scopes.next_token().prompt).shape[1] == 2
    result = tll.patchscope(model, tll.Source("the"), scopes.next_token())
    assert torch.allclose(result.logits[0], _logits(model, word)[0, -1].expand(4, -1), atol=1e-4)


def test_future_lens_takes_a_soft_prompt(model):
    soft = 0.5 * torch.randn(10, 32, generator=torch.Generator().manual_seed(0))
    result = tll.patchscope(model, tll.Source(PROMPT), scopes.future_lens(soft), layers=[1])
    direct = _logits(
        model,
        torch.zeros(1, 10, dtype=torch.long),
        ("hook_embed", lambda x, hook: soft[None]),
        _put(model, 1, 9, _state(model, PROMPT, 1)[0, -1]),
    )
    assert torch.allclose(result.logits[0, 0], direct[0, -1], atol=1e-4)


def test_placeholders_can_be_chosen():
    assert scopes.attribute("company_ceo", "z").prompt == "The name of the CEO of z"
    assert scopes.token_identity("x", words=("man",)).prompt == "man -> man\nx"
    assert scopes.selfie(2, "It says:", placeholder="?", chat=("", "")).prompt == "? ? It says:"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scopes.attribute("The mayor of y"), "placeholder 'x' is not in the prompt 'The mayor of y'"),
        (lambda: scopes.attribute("country_capitol"), "did you mean 'country_capital_city'"),
        (lambda: scopes.attribute("qqq"), r"RELATIONS has \['company_ceo'"),
        (lambda: scopes.attribute("company_ceo", " "), "expected a placeholder of one token"),
        (lambda: scopes.selfie(0), "n_placeholders must be at least 1, got 0"),
        (lambda: scopes.future_lens("no quote", '"'), "is not in the prompt 'no quote'"),
        (lambda: scopes.future_lens(torch.zeros(3, 4), "x"), "soft prompt has no text"),
    ],
)
def test_a_placeholder_that_is_not_there_is_refused(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_text_of_bos_is_not_a_placeholder(lab):
    assert "x" in lab.tokenizer.bos_token
    target = scopes.selfie(2, "the x is:", placeholder="x", chat=("", ""))
    tokens = _ids(lab, target.prompt)
    assert tll.positions(lab, tokens, target.pos)[0].tolist() == [1, 2]


def test_split_placeholders_are_refused(lab):
    with pytest.raises(ValueError, match="is 2 tokens here"):
        tll.patchscope(lab, "Japan", scopes.attribute("company_ceo", "qz"), layers=[1])


# --- lenses


@pytest.mark.parametrize("pos", [-1, "cat", [1, 3], None], ids=str)
def test_the_logit_lens_as_a_patchscope_is_the_logit_lens(model, pos):
    columns = tll.positions(model, PROMPT, pos)[0].tolist()
    plain = _logits(model, _ids(model, PROMPT))
    others = [i for i in range(plain.shape[1]) if i not in columns]
    for layer in range(4):
        logits = tll.run(model, PROMPT, methods.logit_lens(model, PROMPT, layer, pos))
        state = _state(model, PROMPT, layer)
        assert torch.allclose(logits[:, columns], tll.Lens(model)[layer](state)[:, columns], atol=1e-4), layer
        assert torch.allclose(logits[:, columns], zoo.readout(model, state)[:, columns], atol=1e-4), layer
        assert torch.equal(logits[:, others], plain[:, others])


def test_the_tuned_lens_as_a_patchscope_is_the_tuned_lens(model):
    translators = zoo.random_maps(model)
    lens = tll.Lens(model, translators)
    for layer in range(3):
        logits = tll.run(model, PROMPT, methods.tuned_lens(model, PROMPT, translators, layer))
        state = _state(model, PROMPT, layer)
        a = translators[layer]
        assert torch.allclose(logits[0, -1], lens[layer](state)[0, -1], atol=1e-4)
        assert torch.allclose(logits[0, -1], zoo.readout(model, state @ a.weight.T + a.bias)[0, -1], atol=1e-4)
    with pytest.raises(ValueError, match="no layer 9"):
        methods.tuned_lens(model, PROMPT, translators, 9)


def test_the_two_lenses_as_patchscopes_of_the_general_kind(model):
    prompt, translators = tll.Source(PROMPT), zoo.random_maps(model)
    logit = tll.patchscope(model, prompt, layers=[1], target_layers=[-1])
    tuned = tll.patchscope(model, prompt, layers=[1], target_layers=[-1], map=translators)
    hooks = (methods.logit_lens(model, PROMPT, 1), methods.tuned_lens(model, PROMPT, translators, 1))
    for result, pairs in zip((logit, tuned), hooks, strict=True):
        assert torch.allclose(result.logits[0, 0], tll.run(model, PROMPT, pairs)[0, -1], atol=1e-4)


# --- activation patching and causal tracing


@pytest.mark.parametrize("layers", [1, [0, 2], -1, "blocks.1.attn.hook_z", ["blocks.0.hook_mlp_out"]], ids=str)
def test_activation_patching_equals_the_direct_computation(model, layers):
    hooks = methods.activation_patching(model, PROMPT, OTHER, layers, pos=[2, 3])
    names = layers if isinstance(layers, list) else [layers]
    by_hand = [_put(model, layer, [2, 3], _state(model, PROMPT, layer)[:, [2, 3]]) for layer in names]
    logits, direct = tll.run(model, OTHER, hooks), _logits(model, _ids(model, OTHER), *by_hand)
    assert torch.allclose(logits, direct, atol=1e-5)
    assert not torch.allclose(logits, _logits(model, _ids(model, OTHER)), atol=1e-3)
    # the same hooks, outside the library, on a batch of the prompt
    batch = _logits(model, _ids(model, OTHER).expand(3, -1), *hooks)
    assert torch.allclose(batch, direct.expand(3, -1, -1), atol=1e-5)


def test_activation_patching_between_prompts_of_other_lengths(model):
    longer = "a bird said the mat sat on the tree"
    hooks = methods.activation_patching(model, PROMPT, longer, 1, "cat", corrupted_pos="mat")
    here, there = tll.positions(model, PROMPT, "cat")[0, 0], tll.positions(model, longer, "mat")[0, 0]
    assert here != there
    direct = _logits(model, _ids(model, longer), _put(model, 1, there, _state(model, PROMPT, 1)[0, here]))
    assert torch.allclose(tll.run(model, longer, hooks), direct, atol=1e-5)
    scope = tll.patchscope(model, tll.Source(PROMPT, pos="cat"), tll.Target(longer, pos="mat"), layers=[1])
    assert torch.allclose(scope.logits[0, 0], direct[0, -1], atol=1e-4)


def test_everything_patched_is_the_clean_run(model):
    clean = _logits(model, _ids(model, PROMPT))
    assert torch.allclose(tll.run(model, OTHER, methods.activation_patching(model, PROMPT, OTHER, 0)), clean, atol=1e-5)
    patterns = [f"blocks.{b}.attn.hook_pattern" for b in range(3)]
    logits = tll.run(model, PROMPT, methods.activation_patching(model, OTHER, PROMPT, patterns))
    assert not torch.allclose(logits, clean, atol=1e-3)


def test_causal_tracing_equals_the_direct_computation(model):
    tokens, n = _ids(model, PROMPT), 0.7
    span = tll.positions(model, PROMPT, tll.at("cat sat", span=True))[0].tolist()
    assert len(span) > 1
    e = torch.randn(1, len(span), 32, generator=torch.Generator().manual_seed(3))

    def noisy(x, hook):
        x = x.clone()
        x[:, span] = x[:, span] + n * e
        return x

    corrupted = _logits(model, tokens, ("hook_embed", noisy))
    bare = methods.causal_tracing(model, PROMPT, "cat sat", noise=n, seed=3)
    assert torch.allclose(tll.run(model, PROMPT, bare), corrupted, atol=1e-5)
    assert not torch.allclose(corrupted, _logits(model, tokens), atol=1e-2)
    for layer in (0, 2, "blocks.1.hook_mlp_out"):
        put = _put(model, layer, span[-1], _state(model, PROMPT, layer)[0, span[-1]])
        hooks = methods.causal_tracing(model, PROMPT, "cat sat", layer, noise=n, seed=3)
        direct = _logits(model, tokens, ("hook_embed", noisy), put)
        assert torch.allclose(tll.run(model, PROMPT, hooks), direct, atol=1e-5), layer
        assert not torch.allclose(direct, corrupted, atol=1e-3)
    last = methods.causal_tracing(model, PROMPT, "cat sat", -1, pos=-1, noise=n)
    assert torch.allclose(tll.run(model, PROMPT, last)[0, -1], _logits(model, tokens)[0, -1], atol=1e-5)


def test_causal_tracing_restores_the_clean_run(model):
    # every corrupted position, at the layer that the noise enters
    hooks = methods.causal_tracing(model, PROMPT, "cat", 0, tll.at("cat", span=True))
    assert torch.allclose(tll.run(model, PROMPT, hooks), _logits(model, _ids(model, PROMPT)), atol=1e-5)


@pytest.mark.parametrize("arch", ["gpt2", "gemma3"])
def test_the_noise_is_three_standard_deviations_of_the_embeddings(arch):
    model = zoo.build(arch, zoo.FEW_KINDS[0])
    every = torch.arange(zoo.D_VOCAB).view(-1, 40)
    table = torch.cat([_state(model, row[None], "hook_embed")[0] for row in every])  # scaled, where the model scales
    tokens = zoo.tokens(1, 30)
    hooks = methods.causal_tracing(model, tokens, slice(0, 30))
    added = _state(model, tokens, "hook_embed", *hooks) - _state(model, tokens, "hook_embed")
    assert added.std().item() == pytest.approx(3 * table.std().item(), rel=0.12)
    rows = _state(model, tokens.expand(2, -1), "hook_embed", *hooks)
    assert not torch.equal(rows[0], rows[1])  # copies of the prompt get noise of their own


# --- attention


@pytest.mark.parametrize("blocks", [1, [0, 2], None], ids=str)
def test_attention_knockout_equals_minus_infinity_in_the_scores(model, blocks):
    tokens = _ids(model, PROMPT)
    q, k = tll.positions(model, PROMPT, [-1, "sat"])[0].tolist(), tll.positions(model, PROMPT, ["cat"])[0].tolist()
    hooks = methods.attention_knockout(model, PROMPT, [-1, "sat"], "cat", blocks)
    window = range(3) if blocks is None else [blocks] if isinstance(blocks, int) else blocks
    direct = _logits(model, tokens, *_masked_scores(model, q, k, window))
    logits = tll.run(model, PROMPT, hooks)
    assert len(hooks) == len(list(window)) and torch.allclose(logits, direct, atol=1e-4)
    plain = _logits(model, tokens)
    assert torch.equal(logits[:, : min(q)], plain[:, : min(q)]) and not torch.allclose(logits, plain, atol=1e-3)
    seen = {}
    tll.run(model, PROMPT, [*hooks, *(tll.read(f"blocks.{b}.attn.hook_pattern", seen, key=b) for b in window)])
    for pattern in seen.values():
        assert pattern[:, :, q][..., k].abs().max() == 0
        assert torch.allclose(pattern.sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("arch,kind", zoo.cases(["llama", "gemma2", "bloom"], zoo.FEW_KINDS))
def test_attention_knockout_of_other_architectures(arch, kind):
    model = zoo.build(arch, kind)
    tokens = zoo.tokens(1, 9)
    cut = range(model.cfg.n_layers)
    logits = tll.run(model, tokens, methods.attention_knockout(model, tokens, slice(4, 9), [1, 2, 3]))
    # nothing of the keys reaches the queries: other tokens there change nothing behind them
    other = tokens.clone()
    other[:, 1:4] = tokens[:, 5:8]
    again = tll.run(model, other, methods.attention_knockout(model, other, slice(4, 9), [1, 2, 3]))
    assert torch.allclose(logits[:, 4:], again[:, 4:], atol=1e-4)
    assert not torch.allclose(tll.run(model, tokens)[:, 4:], tll.run(model, other)[:, 4:], atol=1e-3)
    half = methods.attention_knockout(model, tokens, slice(4, 9), [1, 2, 3], list(cut)[1:])
    assert not torch.allclose(tll.run(model, tokens, half)[:, 4:], logits[:, 4:], atol=1e-3)


def test_attention_knockout_is_by_row(model):
    tokens, queries, keys = zoo.tokens(2, 8), torch.tensor([[7], [5]]), torch.tensor([[2], [4]])
    logits = tll.run(model, tokens, methods.attention_knockout(model, tokens, queries, keys))
    for row in range(2):
        prompt = tokens[row : row + 1]
        alone = methods.attention_knockout(model, prompt, int(queries[row]), int(keys[row]))
        assert torch.allclose(logits[row], tll.run(model, prompt, alone)[0], atol=1e-5)


def test_attention_knockout_is_the_same_with_a_cache(model):
    tokens = zoo.tokens(2, 8)
    hooks = methods.attention_knockout(model, tokens, torch.tensor([[7], [5]]), torch.tensor([[2], [4]]))
    cached, plain = (tll.generate(model, tokens, hooks, 4, stop_at_eos=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


# --- two hops

FIRST, SECOND = "the king of Italy", "The capital of"


def _parts(model):
    second, whole = _ids(model, SECOND), _ids(model, f"{SECOND} {FIRST}")
    return whole, second.shape[1], whole.shape[1]


def test_multihop_of_the_whole_query_equals_the_direct_computation(model):
    whole, m, n = _parts(model)
    hops = methods.multihop(model, FIRST, SECOND)
    result = tll.patchscope(model, **hops, pairs=[(2, 1), (1, 2)], max_new_tokens=3)
    for c, (a, b) in enumerate(result.pairs):
        put = _put(model, b, m - 1, _state(model, whole, a)[0, n - 1])
        assert torch.allclose(result.logits[0, c], _logits(model, whole, put)[0, -1], atol=1e-4)
        assert int(result.tokens[0, c, 0]) == int(result.logits[0, c].argmax())


def test_multihop_with_masks_equals_the_direct_computation(model):
    whole, m, n = _parts(model)
    result = tll.patchscope(model, **methods.multihop(model, FIRST, SECOND, masked=True), pairs=[(2, 1), (3, 0)])
    masks = _masked_scores(model, range(m, n), slice(1, m), range(3))
    for c, (a, b) in enumerate(result.pairs):
        put = _put(model, b, m - 1, _state(model, whole, a, *masks)[0, n - 1])
        assert torch.allclose(result.logits[0, c], _logits(model, whole[:, :m], put)[0, -1], atol=1e-4)


def test_the_target_of_the_masked_form_is_the_query_with_its_first_part_hidden(model):
    whole, m, n = _parts(model)
    hops = methods.multihop(model, FIRST, SECOND, masked=True)
    masked = tll.patchscope(model, **hops, pairs=[(2, 1)])
    hidden = methods.attention_knockout(model, whole, None, slice(m, n - 1))
    explicit = hops | {"target": tll.Target(whole[0], pos=m - 1), "target_hooks": hidden, "read": m - 1}
    assert torch.allclose(masked.logits, tll.patchscope(model, **explicit, pairs=[(2, 1)]).logits, atol=1e-4)


def _source_vector(model, hops, layer=2):
    tokens, pos = hops["source"].prompt[None], hops["source"].pos
    return _state(model, tokens, layer, *hops["source_hooks"])[0, pos]


@pytest.mark.parametrize("masked", [False, True])
def test_only_the_masked_source_does_not_see_the_second_question(model, masked):
    whole, m, n = _parts(model)
    second_ids = whole.clone()
    second_ids[:, 1:m] = zoo.tokens(1, m - 1)
    hops = methods.multihop(model, FIRST, SECOND, masked=masked)
    other = hops | {"source": tll.Source(second_ids[0], pos=n - 1)}
    assert torch.allclose(_source_vector(model, hops), _source_vector(model, other), atol=1e-5) == masked


@pytest.mark.parametrize("masked", [False, True])
def test_only_the_masked_target_does_not_see_the_first_question(model, masked):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))  # the same in both
    answers = []
    for first in (FIRST, "the king of France"):
        target = methods.multihop(model, first, SECOND, masked=masked)["target"]
        answers.append(tll.patchscope(model, tll.Source(vector), target, target_layers=[1]).logits)
    assert torch.equal(*answers) if masked else not torch.allclose(*answers, atol=1e-3)


def test_the_two_statements_of_multihop_are_not_equivalent(model):
    forms = [methods.multihop(model, FIRST, SECOND, masked=masked) for masked in (False, True)]
    whole_query, masked_query = (tll.patchscope(model, **form, pairs=[(2, 1)]).logits for form in forms)
    assert not torch.allclose(whole_query, masked_query, atol=1e-2)


# --- errors, and what the list promises


def test_refusals(model, unchecked):
    cases = [
        (lambda: methods.logit_lens(model, PROMPT, 9), "no layer 9"),
        (lambda: methods.logit_lens(model, PROMPT, 1, "dog"), "'dog' is not in the prompt"),
        (lambda: methods.activation_patching(model, PROMPT, OTHER, [], pos=1), "empty list of layers"),
        (lambda: methods.activation_patching(model, PROMPT, "a cat", 1), "positions of the clean prompt and"),
        (lambda: methods.activation_patching(model, PROMPT, OTHER, 1, pos="cat"), "'cat' is not in the prompt"),
        (lambda: methods.causal_tracing(model, PROMPT, "dog"), "'dog' is not in the prompt"),
        (lambda: methods.causal_tracing(model, PROMPT, "cat", noise=0.0), "noise must be positive and finite, got 0"),
        (lambda: methods.attention_knockout(model, PROMPT, 1, [3]), "no edge to cut"),
        (lambda: methods.attention_knockout(model, PROMPT, 2, [0, 1, 2]), "position 2 would see no key"),
        (lambda: methods.attention_knockout(model, PROMPT, -1, 1, blocks=[]), "empty list of blocks"),
        (lambda: methods.attention_knockout(model, PROMPT, -1, 1, blocks=3), "this model has blocks 0..2"),
        (lambda: methods.multihop(model, FIRST, " "), "needs two questions"),
        (
            lambda: tll.run(model, "a cat", methods.attention_knockout(model, PROMPT, -1, 1)),
            "make the hooks for the prompt that runs",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_seam_inside_a_token_is_refused(model, monkeypatch):
    def merging(model, prompt, *, prepend_bos=True):  # a tokenizer that joins the second question's last word to what follows
        batch = prepare(model, prompt, prepend_bos=prepend_bos)
        return batch if prompt == SECOND else batch._replace(tokens=batch.tokens.roll(1))

    assert methods.multihop(model, FIRST, SECOND)["source_hooks"] == []
    monkeypatch.setattr("tl_lenses.methods.prepare", merging)
    with pytest.raises(ValueError, match="word it so that it ends with a token"):
        methods.multihop(model, FIRST, SECOND)


@pytest.mark.parametrize(
    "name", [f"scopes.{name}" for name in scopes.__all__ if name != "RELATIONS"] + [f"methods.{name}" for name in methods.__all__]
)
def test_every_scope_and_method_names_its_source(name):
    module, _, function = name.partition(".")
    text = inspect.getdoc(getattr({"scopes": scopes, "methods": methods}[module], function))
    assert text and "Source: " in text
    assert len(text.splitlines()[0]) < 130 and text.splitlines()[1] == ""


READERS = ("activation_oracle", "latent_qa", "nla")  # arguments of a call; test_readers.py


@pytest.mark.parametrize("name", [name for name in scopes.__all__ if name not in ("RELATIONS", *READERS)])
def test_a_scope_is_a_target(name):
    arguments = ("company_ceo",) if name == "attribute" else ()
    assert isinstance(getattr(scopes, name)(*arguments), tll.Target)


def test_a_published_readers_scope_is_what_patchscope_takes():
    for asked in (scopes.activation_oracle("Who?", 2), scopes.latent_qa("Who?", 1)):
        assert isinstance(asked["target"], tll.Target) and asked["target_layers"]


@pytest.mark.parametrize(
    "old,new",
    [
        ("logit_lens_as_patchscope", "logit_lens"),
        ("tuned_lens_as_patchscope", "tuned_lens"),
        *((name, name) for name in ("activation_patching", "attention_knockout", "causal_tracing", "multihop")),
    ],
)
def test_old_names_of_methods_say_the_new_one(old, new):
    with pytest.warns(DeprecationWarning, match=rf"tll\.scopes\.{old} is tll\.methods\.{new} now"):
        assert getattr(tll.scopes, old) is getattr(tll.methods, new)


def test_the_old_listing_of_relations_says_the_new_one():
    with pytest.warns(DeprecationWarning, match=r"is tll\.scopes\.RELATIONS now"):
        assert tll.scopes.relations() == list(tll.scopes.RELATIONS)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tll.scopes.nothing

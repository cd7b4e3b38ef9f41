"""The laws of hooks, on every surface of the installed TransformerLens."""

import re
import threading

import numpy as np
import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses import edits
from tl_lenses.hooks import installed
from tl_lenses.layers import layer_site, site_layer

KINDS = zoo.KINDS
TOKENS = zoo.tokens(2, 10)


@pytest.fixture(params=KINDS, scope="module")
def model(request):
    return zoo.build("gpt2", request.param)


# --- sites


def test_the_site_of_a_layer(model):
    n = model.cfg.n_layers
    assert tll.site(model, 0) == "blocks.0.hook_resid_pre"
    assert tll.site(model, n) == tll.site(model, -1) == f"blocks.{n - 1}.hook_resid_post"
    assert tll.site(model, -2) == f"blocks.{n - 1}.hook_resid_pre"


def test_a_hook_name_is_its_own_site(model):
    assert tll.site(model, "blocks.1.hook_attn_out") == "blocks.1.hook_attn_out"


def test_layers_and_their_sites_are_one_to_one(model):
    n = model.cfg.n_layers
    assert [site_layer(layer_site(i, n)) for i in range(n + 1)] == list(range(n + 1))


@pytest.mark.parametrize(
    "layer,message",
    [
        (lambda n: n + 1, "no layer {after}: this model has layers 0..{n}"),
        (
            lambda n: "blocks.12.hook_resid_post",
            "no hook 'blocks.12.hook_resid_post': this model has blocks 0..{last}. For the final residual use layer {n} or -1",
        ),
        (lambda n: "blocks.1.hook_residpre", "did you mean 'blocks.1.hook_resid_pre'"),
    ],
)
def test_a_layer_or_site_that_is_not_there_says_what_is(model, layer, message):
    n = model.cfg.n_layers
    with pytest.raises(ValueError, match=re.escape(message.format(n=n, after=n + 1, last=n - 1))):
        tll.site(model, layer(n))


def test_half_a_layer_is_refused(model):
    with pytest.raises(TypeError):
        tll.site(model, 1.5)


# --- read and patch


@torch.no_grad()
def test_reading_changes_nothing(model):
    assert torch.equal(tll.run(model, TOKENS, [tll.read(1, {}), tll.read("blocks.1.hook_mlp_out", {})]), model(TOKENS))


@torch.no_grad()
def test_a_read_is_what_the_cache_holds(model):
    seen = {}
    norms = tll.read("blocks.1.hook_mlp_out", seen, key="mlp", fn=lambda x: x.norm(dim=-1))
    tll.run(model, TOKENS, [tll.read(1, seen), norms])
    _, cache = model.run_with_cache(TOKENS, names_filter=["blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"])
    assert torch.equal(seen[1], cache["blocks.1.hook_resid_pre"])
    assert torch.equal(seen["mlp"], cache["blocks.1.hook_mlp_out"].norm(dim=-1))


@torch.no_grad()
@pytest.mark.parametrize("pos", [3, -1, [0, 4], slice(2, 5), torch.tensor([1, 7]), torch.tensor([[1, 2], [3, -1]]), None], ids=str)
def test_patch_then_read_is_the_patch_and_only_there(model, pos):
    before, after = {}, {}
    value = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    tll.run(model, TOKENS, [tll.read(1, before), tll.patch(1, edits.replace(value), pos=pos), tll.read(1, after)])
    selected = torch.zeros(TOKENS.shape, dtype=torch.bool)
    if isinstance(pos, torch.Tensor):
        for row, columns in enumerate(pos if pos.ndim == 2 else pos[:, None]):
            selected[row, columns] = True
    else:
        selected[:, slice(None) if pos is None else pos] = True
    assert torch.equal(after[1][selected], value.expand(int(selected.sum()), -1))
    assert torch.equal(after[1][~selected], before[1][~selected])
    seen = {}
    tll.run(model, TOKENS, [tll.read(1, seen, pos=pos)])
    assert seen[1].shape[:2] == (2, int(selected[0].sum()))


@torch.no_grad()
@pytest.mark.parametrize("pos", [None, [0, -1]])
def test_a_patch_by_the_same_value_is_bit_identical(model, pos):
    sites = patched_sites(model)
    assert torch.equal(tll.run(model, TOKENS, [tll.patch(s, lambda x: x, pos=pos) for s in sites]), model(TOKENS))


@torch.no_grad()
def test_a_random_patch_changes_logits_from_its_position_on_and_none_before_it(model):
    plain = model(TOKENS)
    for site in patched_sites(model):
        patched = tll.run(model, TOKENS, [tll.patch(site, edits.noise(2.0), pos=6)])
        assert (patched - plain)[:, 6:].abs().max() > 1e-3
        assert torch.equal(patched[:, :6], plain[:, :6])
    assert torch.equal(model(TOKENS), plain)


def patched_sites(model):
    """Every residual layer, and two other sites."""
    return [tll.site(model, i) for i in range(model.cfg.n_layers + 1)] + ["blocks.1.hook_attn_out", "blocks.0.attn.hook_z"]


@torch.no_grad()
def test_list_order_is_order_of_effect(model):
    double, plus = tll.patch(1, edits.scale(2.0)), tll.patch(1, edits.add(torch.ones(model.cfg.d_model)))
    seen = {}
    tll.run(model, TOKENS, [tll.read(1, seen, key="x"), double, plus, tll.read(1, seen, key="2x+1")])
    tll.run(model, TOKENS, [plus, double, tll.read(1, seen, key="2(x+1)")])
    assert torch.allclose(seen["2x+1"], 2 * seen["x"] + 1)
    assert torch.allclose(seen["2(x+1)"], 2 * (seen["x"] + 1))


@torch.no_grad()
def test_a_cached_activation_survives_a_later_patch(model):
    # resid_pre[2] is the same storage as resid_post[1]: an edit in place would rewrite what was read
    seen, clean = {}, {}
    tll.run(model, TOKENS, [tll.read("blocks.1.hook_resid_post", clean)])
    tll.run(model, TOKENS, [tll.read("blocks.1.hook_resid_post", seen), tll.patch(2, edits.zero, pos=3)])
    assert torch.equal(seen["blocks.1.hook_resid_post"], clean["blocks.1.hook_resid_post"])


def test_gradients_flow_to_the_value_of_a_patch(model):
    v = torch.zeros(model.cfg.d_model, requires_grad=True)
    logits = tll.run(model, TOKENS, [tll.patch(1, edits.add(v), pos=2)])
    assert logits.requires_grad and torch.is_grad_enabled()
    logits[:, 4, 7].sum().backward()
    assert v.grad.abs().sum() > 0


def test_a_read_has_a_graph_only_where_asked(model):
    seen = {}
    tll.run(model, TOKENS, [tll.read(2, seen), tll.read(2, seen, key="graph", detach=False)])
    assert not seen[2].requires_grad and seen["graph"].requires_grad


@torch.no_grad()
def test_patterns_have_heads_before_positions(model):
    few = TOKENS[:, :3]  # fewer tokens than heads
    seen, name = {}, "blocks.0.attn.hook_pattern"
    plain = tll.run(model, few, [tll.read(name, seen)])
    assert seen[name].shape == (2, 4, 3, 3)
    assert torch.equal(tll.run(model, few, [tll.patch(name, lambda x: x)]), plain)
    assert not torch.equal(tll.run(model, few, [tll.patch(name, edits.zero)]), plain)
    for when in ("prompt", "every_step"):
        hooks = [tll.patch(name, edits.scale(0.3), when=when)]
        cached = tll.generate(model, few, hooks, 5, stop_at_eos=False)
        assert torch.equal(cached, tll.generate(model, few, hooks, 5, stop_at_eos=False, use_cache=False))


# --- loud


@torch.no_grad()
def _broken(x, hook):
    raise ZeroDivisionError


# what is wrong -> (error, message, hooks made when called)
REFUSALS = {
    "no such hook": (ValueError, "no hook 'blocks.1.nope'", lambda: tll.patch("blocks.1.nope", edits.zero)),
    "no such position": (
        ValueError, r"position 10 is not there: .* has 10 positions", lambda: tll.patch(1, edits.zero, pos=10)
    ),
    "positions of another batch": (
        ValueError, "do not fit a batch of 2", lambda: tll.patch(1, edits.zero, pos=torch.tensor([1, 2, 3]))
    ),
    "a position twice": (ValueError, "given twice", lambda: tll.patch(1, edits.zero, pos=[3, -7])),
    "an empty slice": (ValueError, "selects nothing", lambda: tll.patch(1, edits.zero, pos=slice(20, 30))),
    "an edit of another shape": (
        ValueError, r"returned shape \[2, 32\], expected \[2, 1, 32\]", lambda: tll.patch(1, lambda x: x[:, 0], pos=1)
    ),
    "a factory for an edit": (ValueError, "forget to call the factory", lambda: tll.patch(1, lambda x: edits.scale)),
    "an edit of nothing": (ValueError, "returned NoneType", lambda: tll.patch(1, lambda x: None)),
    "positions of a pattern": (
        ValueError, "query, key", lambda: tll.patch("blocks.0.attn.hook_pattern", edits.zero, pos=1)
    ),
    "a name alone": (TypeError, "a hook is a pair", lambda: "blocks.1.hook_resid_pre"),
    "a tensor for an edit": (TypeError, r"use tll.edits.replace\(tensor\)", lambda: tll.patch(1, torch.zeros(3))),
    "a negative layer": (ValueError, r"use tll.site\(model, -1\)", lambda: tll.patch(-1, edits.zero)),
    "no such moment": (ValueError, "when must be", lambda: tll.patch(1, edits.zero, when="always")),
    "positions of floats": (
        TypeError, "positions must be integers", lambda: tll.patch(1, edits.zero, pos=torch.tensor([0.0, 1.0]))
    ),
    "an error inside": (ZeroDivisionError, None, lambda: ("blocks.2.hook_resid_pre", _broken)),
}  # fmt: skip


@pytest.mark.parametrize("error,message,hook", REFUSALS.values(), ids=REFUSALS)
def test_refusals(model, unchecked, error, message, hook):
    plain, count = model(TOKENS), zoo.n_hooks(model)
    with pytest.raises(error, match=message):
        tll.run(model, TOKENS, [tll.patch(1, edits.scale(1.0)), hook()])
    assert zoo.n_hooks(model) == count
    assert torch.equal(model(TOKENS), plain)


def test_hooks_that_are_switched_off(model):
    if not hasattr(model, "set_use_attn_result"):
        pytest.skip("no gated hooks on this surface")
    name = "blocks.0.attn.hook_result"
    if name not in model.hook_dict:
        pytest.skip("this surface has no hook_result")
    with pytest.raises(
        RuntimeError,
        match=r"1 of 2 hooks never fired: 'blocks.0.attn.hook_result' is switched off; call model.set_use_attn_result\(True\)",
    ):
        tll.run(model, TOKENS, [tll.read(0, {}), tll.read(name, {})])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_hooks_that_never_fire_are_an_error(kind):
    model = zoo.build("llama", kind)
    if "hook_pos_embed" in model.hook_dict:  # the bridge's ghost on rotary models
        with pytest.raises(RuntimeError, match="1 of 2 hooks never fired: 'hook_pos_embed'"):
            tll.run(model, TOKENS, [tll.read(0, {}), tll.read("hook_pos_embed", {})])
    else:
        with pytest.raises(ValueError, match="no hook 'hook_pos_embed'"):
            tll.run(model, TOKENS, [tll.read("hook_pos_embed", {})])


@torch.no_grad()
def test_a_filter_of_names_takes_every_hook_that_it_matches(model):
    calls = []
    tll.run(model, TOKENS, [(lambda name: name.endswith("hook_resid_pre"), lambda x, hook: calls.append(x.shape[1]))])
    assert calls == [10] * model.cfg.n_layers


def test_a_filter_that_matches_no_hook(model):
    with pytest.raises(ValueError, match="matches no hook"):
        tll.run(model, TOKENS, [(lambda name: False, lambda x, hook: None)])


def test_hooks_already_on_the_model_run_first_and_stay(model):
    order = []
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: order.append("theirs"))]):
        tll.run(model, TOKENS, [("blocks.1.hook_resid_pre", lambda x, hook: order.append("ours"))])
        assert order == ["theirs", "ours"]
        model(TOKENS)
        assert order == ["theirs", "ours", "theirs"]  # still there afterwards


@torch.no_grad()
def test_a_users_hook_edits_before_ours_reads(model):
    seen, plain = {}, {}
    tll.run(model, TOKENS, [tll.read(1, plain)])
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: x * 2)]):
        tll.run(model, TOKENS, [tll.read(1, seen)])
    assert torch.allclose(seen[1], 2 * plain[1])


# --- generation


@pytest.mark.parametrize("arch", ["gpt2", "neox", "llama", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_equals_uncached(arch, kind):
    model = zoo.build(arch, kind)
    v = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0)) * 3
    plain = tll.generate(model, TOKENS, max_new_tokens=6, stop_at_eos=False)
    changed = []
    for when in ("prompt", "every_step"):
        for pos in (-1, [0, 3], None):
            hooks = [tll.patch(1, edits.add(v), pos=pos, when=when)]
            cached = tll.generate(model, TOKENS, hooks, 6, stop_at_eos=False)
            uncached = tll.generate(model, TOKENS, hooks, 6, stop_at_eos=False, use_cache=False)
            assert torch.equal(cached, uncached), (when, pos)
            changed.append(not torch.equal(cached, plain))
    assert any(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_left_padded_generation_equals_single(kind):
    for arch in ("gpt2", "llama"):
        model = zoo.build(arch, kind)
        short, long = TOKENS[:1, :5], TOKENS[1:, :8]
        padded = torch.cat([torch.cat([torch.full((1, 3), zoo.PAD), short], 1), long])
        mask = torch.ones_like(padded)
        mask[0, :3] = 0
        for use_cache in (True, False):
            both = tll.generate(model, padded, (), 5, attention_mask=mask, stop_at_eos=False, use_cache=use_cache)
            single = tll.generate(model, short, (), 5, stop_at_eos=False)
            two = tll.generate(model, long, (), 5, stop_at_eos=False)
            assert torch.equal(both[0, 8:], single[0, 5:]), (arch, use_cache)
            assert torch.equal(both[1, 8:], two[0, 8:]), (arch, use_cache)


def test_generation_knows_its_prompt(model):
    shapes, seen = [], {}
    hooks = [tll.read(1, seen), ("blocks.0.hook_resid_pre", lambda x, hook: shapes.append(x.shape[1]))]
    out = tll.generate(model, TOKENS[:1], hooks, 4, stop_at_eos=False)
    assert out.shape == (1, 14) and torch.equal(out[:, :10], TOKENS[:1])
    assert shapes == [10, 1, 1, 1]
    assert seen[1].shape[1] == 10
    single = tll.generate(
        model, TOKENS[:1, :1], [tll.patch(1, edits.noise(5.0), pos=0)], 3, stop_at_eos=False
    )  # a one-token prompt is patched too
    assert single.shape == (1, 4)


def test_sampling_is_seeded(model):
    a, b, c = (tll.generate(model, TOKENS, (), 8, do_sample=True, temperature=3.0, seed=s) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("n,message", [(60, "more than the context of 64"), (0, "at least 1")])
def test_limits_of_a_continuation(model, n, message):
    with pytest.raises(ValueError, match=message):
        tll.generate(model, TOKENS, (), n)


def test_a_position_after_the_prompt_is_refused_in_generation(model):
    with pytest.raises(ValueError, match="is not there"):
        tll.generate(model, TOKENS, [tll.patch(1, edits.zero, pos=10)], 2)


def test_installed_removes_on_error(model):
    count = zoo.n_hooks(model)
    with pytest.raises(KeyError), installed(model, [tll.read(0, {})]):
        raise KeyError
    assert zoo.n_hooks(model) == count


# --- positions


@pytest.mark.parametrize(
    ("pos", "columns"),
    [
        (-1, [[9], [9]]),
        ([0, -2], [[0, 8], [0, 8]]),
        (slice(7, None), [[7, 8, 9]] * 2),
        (torch.tensor([2, -1]), [[2], [9]]),
        (None, [list(range(10))] * 2),
    ],
    ids=["int", "list", "slice", "by row", "all"],
)
def test_positions_are_columns(model, pos, columns):
    assert tll.positions(model, TOKENS, pos).tolist() == columns


@pytest.mark.parametrize(
    ("pos", "error", "message"), [(10, ValueError, "position 10 is not there: the prompt has 10 tokens"), (1.5, TypeError, "")]
)
def test_a_position_that_is_not_there_is_refused(model, pos, error, message):
    with pytest.raises(error, match=message):
        tll.positions(model, TOKENS, pos)


def test_positions_count_real_tokens_only(model):
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    assert tll.positions(model, TOKENS, 0, mask).tolist() == [[3], [0]]
    assert tll.positions(model, TOKENS, -7, mask).tolist() == [[3], [3]]
    with pytest.raises(ValueError, match="has 7 tokens"):
        tll.positions(model, TOKENS, 8, mask)
    with pytest.raises(ValueError, match="different number of tokens"):
        tll.positions(model, TOKENS, None, mask)


def test_positions_of_substrings(model):
    prompt = "the cat sat on the mat. the dog ran"
    ids = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    place = int(tll.positions(model, prompt, "mat")[0, 0])
    decoded = model.tokenizer.decode(ids[:place])  # BOS is position 0, so ids[: place] ends with that token
    assert decoded.endswith("mat") and not model.tokenizer.decode(ids[: place - 1]).endswith("mat")
    first, last = (int(tll.positions(model, prompt, tll.at("the", occurrence=o))[0, 0]) for o in ("first", "last"))
    assert first < last == int(tll.positions(model, prompt, tll.at("the", 2))[0, 0])
    span = tll.positions(model, prompt, tll.at("cat sat", span=True))[0].tolist()
    assert model.tokenizer.decode([ids[i - 1] for i in span]).strip() == "cat sat"
    with pytest.raises(ValueError, match=r"occurs 3 times .*occurrence='last'"):
        tll.positions(model, prompt, "the")
    with pytest.raises(ValueError, match="'Wales' is not in the prompt; its tokens are"):
        tll.positions(model, prompt, "Wales")
    with pytest.raises(ValueError, match="no occurrence 5"):
        tll.positions(model, prompt, tll.at("the", 5))


def test_substrings_with_characters_of_several_bytes(model):
    prompt = "the ☕ and the ☕☕ end"
    for text in ("and", "end", "☕☕"):
        place = int(tll.positions(model, prompt, text)[0, 0])
        ids = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert model.tokenizer.decode(ids[:place]) == prompt[: prompt.index(text) + len(text)]


# --- gradients, threads, numbers and prompts of every kind

BRIDGES = [kind for kind in zoo.FEW_KINDS if not kind.startswith("ht")]


@pytest.mark.parametrize("kind", zoo.FEW_KINDS)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_read_that_keeps_its_graph_is_on_the_way_to_the_logits(arch, kind):
    """A bridge shows heads in another shape than it computes with: what is read must be what the model goes on with."""
    model = zoo.build(arch, kind)
    for name in ("hook_z", "hook_q", "hook_v", "hook_pattern"):
        site, seen = f"blocks.1.attn.{name}", {}
        logits = tll.run(model, TOKENS, [tll.read(site, seen, detach=False)])
        assert torch.equal(logits, tll.run(model, TOKENS)), name
        (grad,) = torch.autograd.grad(logits[0, -1, 7], seen[site])
        step = 1e-2 * grad / grad.norm()
        moved = tll.run(model, TOKENS, [tll.patch(site, lambda x, step=step: x + step)])
        slope = (moved[0, -1, 7] - logits[0, -1, 7]).item() / 1e-2
        assert slope == pytest.approx(float(grad.norm()), rel=0.05), name


@pytest.mark.skipif(not BRIDGES, reason="a HookedTransformer computes with all of its hook points")
def test_what_is_computed_for_show_is_not_read_with_a_gradient():
    model, name = zoo.build("llama", "bridge"), "blocks.1.ln1.hook_scale"
    with pytest.raises(RuntimeError, match="does not lead to this model's logits .*would have no gradient"):
        tll.run(model, TOKENS, [tll.read(name, {}, detach=False)])
    plain = tll.run(model, TOKENS, [tll.read(name, {})])
    with pytest.warns(UserWarning, match="edited hook_scale"):  # TransformerLens computes the norm itself then
        assert not torch.allclose(tll.run(model, TOKENS, [tll.patch(name, edits.scale(3.0))]), plain)
    with pytest.raises(RuntimeError, match="ignores edits of hook_pattern"):
        tll.run(zoo.build("gptj", "bridge"), TOKENS, [tll.patch("blocks.1.attn.hook_pattern", edits.zero)])


def test_two_threads_on_one_model_wait_for_each_other(model):

    factors = [0.5, 2.0]
    patches = [[tll.patch(1, edits.scale(factor))] for factor in factors]
    with torch.no_grad():
        expected = [tll.run(model, TOKENS, hooks) for hooks in patches]
        texts = [tll.generate(model, TOKENS, hooks, 3, stop_at_eos=False) for hooks in patches]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(8):
                if not torch.equal(tll.run(model, TOKENS, patches[i]), expected[i]):
                    wrong.append(i)
                if not torch.equal(tll.generate(model, TOKENS, patches[i], 3, stop_at_eos=False), texts[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
MESSAGES = [{"role": "user", "content": "the cat"}]


@pytest.fixture
def chat(model, monkeypatch):
    """What the template makes of the messages."""
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    return model.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def test_a_chat_is_what_its_template_says(model, chat):
    ids = chat["input_ids"]
    assert (ids == zoo.BOS).sum() == 1
    want = tll.run(model, ids)
    for prompt in (ids, chat, dict(chat), MESSAGES, [MESSAGES]):
        assert torch.equal(tll.run(model, prompt), want), type(prompt)
        assert torch.equal(tll.generate(model, prompt, max_new_tokens=2)[:, : ids.shape[1]], ids)


def test_chats_of_several_lengths_are_a_batch(model, chat):
    both = tll.run(model, [MESSAGES, [{"role": "user", "content": "the old green tree"}]])[:, -1]
    torch.testing.assert_close(both[:1], tll.run(model, chat["input_ids"])[:, -1], atol=1e-4, rtol=0)


def test_a_chat_without_a_template_is_refused(model):
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        tll.run(model, MESSAGES)


def test_a_list_of_eos_ids_ends_a_text():
    model = zoo.build("llama", zoo.FEW_KINDS[0])
    if not hasattr(model, "original_model"):
        pytest.skip("a HookedTransformer has no generation settings")
    plain = tll.generate(model, TOKENS[:1], max_new_tokens=6, stop_at_eos=False)[0, TOKENS.shape[1] :].tolist()
    settings = model.original_model.generation_config
    before, settings.eos_token_id = settings.eos_token_id, [zoo.EOS, plain[2]]
    try:
        stopped = tll.generate(model, TOKENS[:1], max_new_tokens=6)[0, TOKENS.shape[1] :].tolist()
    finally:
        settings.eos_token_id = before
    assert stopped == plain[: plain.index(plain[2]) + 1]


def test_a_list_of_eos_ids_ends_the_texts_of_a_patchscope():
    model = zoo.build("llama", zoo.FEW_KINDS[0])
    if not hasattr(model, "original_model"):
        pytest.skip("a HookedTransformer has no generation settings")
    say = lambda: tll.patchscope(model, tll.Source("the cat"), layers=[1], max_new_tokens=6)
    plain = say().tokens[0, 0].tolist()
    settings = model.original_model.generation_config
    before, settings.eos_token_id = settings.eos_token_id, [zoo.EOS, plain[2]]
    try:
        ended = say()
    finally:
        settings.eos_token_id = before
    n = plain.index(plain[2])
    assert ended.tokens[0, 0].tolist() == [*plain[: n + 1], *[-1] * (5 - n)][: ended.tokens.shape[-1]]
    assert ended.text == [[model.tokenizer.decode(plain[:n])]]


@pytest.mark.parametrize("eager", [False, True])
def test_a_source_is_a_chat_with_one_bos(model, eager, monkeypatch):
    """A list of messages, what `apply_chat_template` returns, and its text, also where the tokenizer puts BOS before everything."""
    from tl_lenses import tokens as tokens_module

    tokenizer = model.tokenizer
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    messages = [{"role": "user", "content": "the cat"}]
    theirs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    bare = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    if eager:
        plain = tokens_module.encode
        monkeypatch.setattr(tokens_module, "encode", lambda tokenizer, texts: [[zoo.BOS, *ids] for ids in plain(tokenizer, texts)])
    say = lambda prompt: tll.patchscope(model, tll.Source(prompt), layers=[1, 2])
    want = say(theirs["input_ids"]).logits
    for prompt in (messages, theirs, bare, *([] if eager else [text])):
        assert torch.equal(say(prompt).logits, want), type(prompt)
        assert torch.equal(tll.patchscope(model, prompt, layers=[1, 2]).logits, want)


@pytest.mark.parametrize("one", [np.int64(1), torch.tensor(1)], ids=["numpy", "torch"])
def test_numbers_of_numpy_and_torch_are_numbers(model, unchecked, one):
    want = tll.run(model, TOKENS, [tll.patch(1, edits.zero, pos=3)])
    assert torch.equal(tll.run(model, TOKENS, [tll.patch(one, edits.zero, pos=one + 2)]), want)
    assert tll.site(model, one) == tll.site(model, 1)
    assert tll.generate(model, TOKENS, max_new_tokens=one + 1, stop_at_eos=False).shape[1] == 12


_patch = lambda pos: lambda model: tll.run(model, TOKENS, [tll.patch(1, edits.zero, pos=pos)])
_generate = lambda **given: lambda model: tll.generate(model, TOKENS, **given)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (_patch(True), TypeError, "pos must be a whole number, got True"),
        (_patch(1.0), TypeError, "pos must be a whole number, got 1.0"),
        (_patch([0, 1.5]), TypeError, "pos must be a whole number, got 1.5"),
        (_generate(max_new_tokens=0), ValueError, "max_new_tokens must be at least 1, got 0"),
        (_generate(max_new_tokens=2.5), TypeError, "max_new_tokens must be a whole number"),
        (_generate(max_new_tokens=True), TypeError, "max_new_tokens must be a whole number"),
        (_generate(temperature=0), ValueError, "temperature must be positive"),
        (_generate(temperature=-1.0), ValueError, "temperature must be positive"),
        (_generate(temperature=float("nan")), ValueError, "temperature must be positive"),
        (_generate(hooks=None), TypeError, "hooks must be a list of pairs"),
        (lambda model: tll.run(model, TOKENS, None), TypeError, "hooks must be a list of pairs"),
        (lambda model: tll.run(None, TOKENS), TypeError, "expected a TransformerLens model"),
        (lambda model: tll.run(model, None), TypeError, "expected text"),
        (lambda model: tll.site(model, True), TypeError, "expected a layer"),
        (lambda model: tll.patch(True, edits.zero), TypeError, "expected a layer"),
        (lambda model: tll.at("a", occurrence=True), TypeError, "occurrence must be a whole number"),
        (
            lambda model: tll.run(model, TOKENS, [tll.patch(model.cfg.n_layers, edits.zero)]),
            ValueError,
            r"blocks 0..\d. For the final residual use tll.site\(model, -1\)",
        ),
    ],
)
def test_what_is_out_of_range_is_refused(model, unchecked, call, error, message):
    with pytest.raises(error, match=message):
        call(model)


ONES = torch.ones_like(TOKENS)


def test_a_mask_of_ones_hides_nothing(model, unchecked):
    assert torch.equal(tll.run(model, TOKENS, attention_mask=ONES.bool()), tll.run(model, TOKENS))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (2 * ONES, "should be 1 at real tokens and 0 at pads; got other values"),
        (0 * ONES, "hides every token of a row"),
        (ONES[:, 1:], r"should be a tensor of shape \(2, 10\), got \(2, 9\)"),
    ],
    ids=["values", "all hidden", "shape"],
)
def test_what_is_no_mask_is_refused(model, unchecked, mask, message):
    with pytest.raises(ValueError, match=message):
        tll.run(model, TOKENS, attention_mask=mask)


def test_threads_wait_for_what_others_leave_out_of_their_passes():
    """A fit leaves the logits out of its passes, probes leave hooks out: other threads ran without them, silently."""
    model, tokens = zoo.build("llama", zoo.FEW_KINDS[0]), zoo.tokens(4, 12)
    lens = tll.Lens(model)
    jobs = {
        "run": lambda: tll.run(model, tokens, [tll.patch(1, edits.scale(2.0))]),
        "evaluate": lambda: torch.tensor([row["kl"] for row in tll.evaluate(model, lens, tokens).rows]),
        "trajectory": lambda: tll.trajectory(model, lens, tokens).kl.nan_to_num(),
        "regression": lambda: tll.fit_regression(model, tokens.repeat(4, 1)).weights.detach(),
        "tuned": lambda: tll.fit_tuned(model, tokens, 3, init="identity").weights.detach(),
    }
    alone, wrong = {name: job() for name, job in jobs.items()}, []

    def work(name):
        for _ in range(4):
            try:
                torch.testing.assert_close(jobs[name](), alone[name], atol=1e-4, rtol=1e-3)
            except Exception as error:
                wrong.append(f"{name}: {error!r:.200}")

    threads = [threading.Thread(target=work, args=(name,)) for name in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

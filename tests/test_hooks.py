"""The laws of hooks, on every surface of the installed TransformerLens."""

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses import edits
from tl_lenses.hooks import installed
from tl_lenses.sites import layer_site, site_layer

KINDS = zoo.KINDS
TOKENS = zoo.tokens(2, 10)


@pytest.fixture(params=KINDS, scope="module")
def model(request):
    return zoo.build("gpt2", request.param)


def _hooks_on(model):
    return sum(len(p._forward_hooks) for p in {id(p): p for p in model.hook_dict.values()}.values())


# --- sites


def test_layers_and_sites(model):
    n = model.cfg.n_layers
    assert tll.site(model, 0) == "blocks.0.hook_resid_pre"
    assert tll.site(model, n) == tll.site(model, -1) == f"blocks.{n - 1}.hook_resid_post"
    assert tll.site(model, -2) == f"blocks.{n - 1}.hook_resid_pre"
    assert tll.site(model, "blocks.1.hook_attn_out") == "blocks.1.hook_attn_out"
    assert [site_layer(layer_site(i, n), n) for i in range(n + 1)] == list(range(n + 1))
    with pytest.raises(ValueError, match=rf"no layer {n + 1}: this model has layers 0..{n}"):
        tll.site(model, n + 1)
    with pytest.raises(
        ValueError,
        match=rf"no hook 'blocks.12.hook_resid_post': this model has blocks 0..{n - 1}. For the final residual use layer {n} or -1",
    ):
        tll.site(model, "blocks.12.hook_resid_post")
    with pytest.raises(ValueError, match="did you mean 'blocks.1.hook_resid_pre'"):
        tll.site(model, "blocks.1.hook_residpre")
    with pytest.raises(TypeError):
        tll.site(model, 1.5)


# --- read and patch


@torch.no_grad()
def test_reading_changes_nothing_and_reads_what_the_cache_holds(model):
    seen = {}
    plain = model(TOKENS)
    logits = tll.run(
        model,
        TOKENS,
        [tll.read(1, seen), tll.read("blocks.1.hook_mlp_out", seen, key="mlp", fn=lambda x: x.norm(dim=-1))],
    )
    assert torch.equal(logits, plain)
    _, cache = model.run_with_cache(TOKENS, names_filter=["blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"])
    assert torch.equal(seen[1], cache["blocks.1.hook_resid_pre"])
    assert torch.equal(seen["mlp"], cache["blocks.1.hook_mlp_out"].norm(dim=-1))


@torch.no_grad()
@pytest.mark.parametrize(
    "pos", [3, -1, [0, 4], slice(2, 5), torch.tensor([1, 7]), torch.tensor([[1, 2], [3, -1]]), None], ids=str
)
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
def test_no_op_is_bit_identical_and_a_random_patch_is_not(model):
    n = model.cfg.n_layers
    plain = model(TOKENS)
    sites = [tll.site(model, i) for i in range(n + 1)] + ["blocks.1.hook_attn_out", "blocks.0.attn.hook_z"]
    for pos in (None, [0, -1]):
        assert torch.equal(tll.run(model, TOKENS, [tll.patch(s, lambda x: x, pos=pos) for s in sites]), plain)
    for s in sites:
        patched = tll.run(model, TOKENS, [tll.patch(s, edits.noise(2.0), pos=6)])
        assert (patched - plain)[:, 6:].abs().max() > 1e-3
        assert torch.equal(patched[:, :6], plain[:, :6])
    assert torch.equal(model(TOKENS), plain)


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


def test_gradients_flow_and_grad_mode_is_left_alone(model):
    v = torch.zeros(model.cfg.d_model, requires_grad=True)
    logits = tll.run(model, TOKENS, [tll.patch(1, edits.add(v), pos=2)])
    assert logits.requires_grad and torch.is_grad_enabled()
    logits[:, 4, 7].sum().backward()
    assert v.grad.abs().sum() > 0
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
def test_refusals(model):
    plain, count = model(TOKENS), _hooks_on(model)
    with pytest.raises(ValueError, match="no hook 'blocks.1.nope'"):
        tll.run(model, TOKENS, [tll.patch("blocks.1.nope", edits.zero)])
    with pytest.raises(ValueError, match=r"position 10 is not there: .* has 10 positions"):
        tll.run(model, TOKENS, [tll.patch(1, edits.zero, pos=10)])
    with pytest.raises(ValueError, match="do not fit a batch of 2"):
        tll.run(model, TOKENS, [tll.patch(1, edits.zero, pos=torch.tensor([1, 2, 3]))])
    with pytest.raises(ValueError, match="given twice"):
        tll.run(model, TOKENS, [tll.patch(1, edits.zero, pos=[3, -7])])
    with pytest.raises(ValueError, match="selects nothing"):
        tll.run(model, TOKENS, [tll.patch(1, edits.zero, pos=slice(20, 30))])
    with pytest.raises(ValueError, match=r"returned shape \[2, 32\], expected \[2, 1, 32\]"):
        tll.run(model, TOKENS, [tll.patch(1, lambda x: x[:, 0], pos=1)])
    with pytest.raises(ValueError, match="forget to call the factory"):
        tll.run(model, TOKENS, [tll.patch(1, lambda x: edits.scale)])
    with pytest.raises(ValueError, match="returned NoneType"):
        tll.run(model, TOKENS, [tll.patch(1, lambda x: None)])
    with pytest.raises(ValueError, match="query, key"):
        tll.run(model, TOKENS, [tll.patch("blocks.0.attn.hook_pattern", edits.zero, pos=1)])
    with pytest.raises(TypeError):
        tll.run(model, TOKENS, ["blocks.1.hook_resid_pre"])
    with pytest.raises(TypeError):
        tll.patch(1, torch.zeros(3))
    with pytest.raises(ValueError, match=r"use tll.site\(model, -1\)"):
        tll.patch(-1, edits.zero)
    with pytest.raises((ValueError, TypeError)):
        tll.patch(1, edits.zero, when="always")
    with pytest.raises(TypeError):
        tll.run(model, TOKENS, [tll.patch(1, edits.zero, pos=torch.tensor([0.0, 1.0]))])

    def broken(x, hook):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tll.run(model, TOKENS, [tll.patch(1, edits.zero), ("blocks.2.hook_resid_pre", broken)])
    assert _hooks_on(model) == count
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
def test_filters_of_names_and_hooks_already_there(model):
    calls = []
    tll.run(model, TOKENS, [(lambda name: name.endswith("hook_resid_pre"), lambda x, hook: calls.append(x.shape[1]))])
    assert calls == [10] * model.cfg.n_layers
    with pytest.raises(ValueError, match="matches no hook"):
        tll.run(model, TOKENS, [(lambda name: False, lambda x, hook: None)])
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
            one = tll.generate(model, short, (), 5, stop_at_eos=False)
            two = tll.generate(model, long, (), 5, stop_at_eos=False)
            assert torch.equal(both[0, 8:], one[0, 5:]), (arch, use_cache)
            assert torch.equal(both[1, 8:], two[0, 8:]), (arch, use_cache)


def test_generation_knows_its_prompt(model):
    shapes, seen = [], {}
    hooks = [tll.read(1, seen), ("blocks.0.hook_resid_pre", lambda x, hook: shapes.append(x.shape[1]))]
    out = tll.generate(model, TOKENS[:1], hooks, 4, stop_at_eos=False)
    assert out.shape == (1, 14) and torch.equal(out[:, :10], TOKENS[:1])
    assert shapes == [10, 1, 1, 1]
    assert seen[1].shape[1] == 10
    one = tll.generate(
        model, TOKENS[:1, :1], [tll.patch(1, edits.noise(5.0), pos=0)], 3, stop_at_eos=False
    )  # a one-token prompt is patched too
    assert one.shape == (1, 4)


def test_sampling_is_seeded_and_limits_are_checked(model):
    a, b, c = (tll.generate(model, TOKENS, (), 8, do_sample=True, temperature=3.0, seed=s) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    with pytest.raises(ValueError, match="more than the context of 64"):
        tll.generate(model, TOKENS, (), 60)
    with pytest.raises(ValueError, match="at least 1"):
        tll.generate(model, TOKENS, (), 0)
    with pytest.raises(ValueError, match="is not there"):
        tll.generate(model, TOKENS, [tll.patch(1, edits.zero, pos=10)], 2)


def test_installed_removes_on_error(model):
    count = _hooks_on(model)
    with pytest.raises(KeyError), installed(model, [tll.read(0, {})]):
        raise KeyError
    assert _hooks_on(model) == count


# --- positions


def test_positions_of_ints_slices_and_lists(model):
    assert tll.positions(model, TOKENS, -1).tolist() == [[9], [9]]
    assert tll.positions(model, TOKENS, [0, -2]).tolist() == [[0, 8], [0, 8]]
    assert tll.positions(model, TOKENS, slice(7, None)).tolist() == [[7, 8, 9]] * 2
    assert tll.positions(model, TOKENS, torch.tensor([2, -1])).tolist() == [[2], [9]]
    assert tll.positions(model, TOKENS[0], None).tolist() == [list(range(10))]
    with pytest.raises(ValueError, match="position 10 is not there: the prompt has 10 tokens"):
        tll.positions(model, TOKENS, 10)
    with pytest.raises(TypeError):
        tll.positions(model, TOKENS, 1.5)


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

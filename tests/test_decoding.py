"""What is generated is what a loop of whole passes of the plain model gives, whatever the model's cache or its padding."""

import functools
import warnings
from weakref import WeakKeyDictionary

import pytest
import torch
import transformers
import zoo

import tl_lenses as tll
from tl_lenses import decoding
from tl_lenses import model as model_module
from tl_lenses.decoding import Decoder, abilities_of
from tl_lenses.tokens import Batch
from tl_lenses.unembed import Readout

if not zoo.HAS_BRIDGE:
    pytest.skip("a HookedTransformer has one kind of cache, tested in test_hooks.py", allow_module_level=True)

WIDE = zoo.WIDE
CONFIGS = {
    "mamba": lambda: transformers.MambaConfig(**zoo.VOCABULARY, hidden_size=32, num_hidden_layers=3, state_size=8),
    "jamba": lambda: transformers.JambaConfig(
        **zoo._LLAMA | dict(num_hidden_layers=4), num_experts=2, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False,
    ),
    "rwkv": lambda: transformers.RwkvConfig(**zoo.VOCABULARY, hidden_size=32, num_hidden_layers=3, attention_hidden_size=32),
    "openai": lambda: transformers.OpenAIGPTConfig(vocab_size=zoo.D_VOCAB, n_positions=64, n_embd=32, n_layer=3, n_head=4),
}  # fmt: skip
TOKENS = zoo.tokens(2, 10)


@functools.cache
def booted(name):
    return zoo.boot(CONFIGS[name]())


@torch.no_grad()
def loop(plain, ids, n):
    """Greedy tokens of whole passes of the plain model."""
    for _ in range(n):
        # A state-space model of transformers makes a cache whatever it is told, and it is thrown away here.
        ids = torch.cat([ids, plain(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.fixture
def fresh(monkeypatch):
    """As if no model had been tried."""
    for module, name in ((decoding, "_ABILITIES"), (decoding, "_WARNED"), (model_module, "_PADDING")):
        monkeypatch.setattr(module, name, WeakKeyDictionary())


@pytest.mark.parametrize("name", list(CONFIGS))
def test_generation_is_a_loop_of_whole_passes(name):
    bridge, plain = booted(name)
    expected = loop(plain, TOKENS, 6)
    for use_cache in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            got = tll.generate(bridge, TOKENS, max_new_tokens=6, stop_at_eos=False, use_cache=use_cache)
        assert torch.equal(got, expected), use_cache


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("mamba", "openai")])
def test_a_pass_without_the_unembedding_gives_the_models_logits(name):
    """`Decoder` makes logits of the unembedding's input where that is faster."""
    bridge, _ = booted(name)
    ways = []
    for readout in (Readout(bridge), None):
        decoder = Decoder(bridge, readout=readout)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            ways.append(
                torch.cat([decoder.feed(TOKENS, last=2), decoder.feed(TOKENS[:, :3]), decoder.step(TOKENS[:, 0])[:, None]], 1)
            )
    assert ways[0].shape == (len(TOKENS), 6, ways[1].shape[-1])
    torch.testing.assert_close(*ways, atol=1e-4, rtol=1e-4)


def test_gradients_go_through_a_decoders_pass():
    bridge, _ = zoo.boot(zoo.CONFIGS["llama"]())
    seen = []
    keep = lambda x, hook: seen.append(x.detach().requires_grad_()) or seen[-1]
    decoder = Decoder(bridge, use_cache=False, readout=Readout(bridge))
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_in", keep)]):
        decoder.feed(TOKENS)[:, -1].max(-1).values.sum().backward()
    assert seen[0].grad.abs().sum() > 0


def test_state_space_models_have_a_cache_though_it_cannot_count():
    bridge, _ = booted("mamba")
    decoder = Decoder(bridge)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder.start(Batch(TOKENS))
        decoder.step(TOKENS[:, 0])
    assert decoder.use_cache and decoder.cache is not None and not decoder.shareable()


@pytest.mark.parametrize("name", list(CONFIGS))
def test_left_padded_rows_are_each_row_alone(name):
    """OpenAI GPT does not derive positions from the mask, RWKV reads pads as text."""
    bridge, plain = booted(name)
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    padded = TOKENS.masked_fill(mask == 0, zoo.PAD)
    with torch.no_grad():
        logits = tll.run(bridge, padded, attention_mask=mask)
        torch.testing.assert_close(logits[0, 4:], plain(TOKENS[:1, 4:]).logits[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(logits[1], plain(TOKENS[1:]).logits[0], atol=1e-4, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        both = tll.generate(bridge, padded, max_new_tokens=5, attention_mask=mask, stop_at_eos=False)
    assert torch.equal(both[:1, 4:], loop(plain, TOKENS[:1, 4:], 5))
    assert torch.equal(both[1:], loop(plain, TOKENS[1:], 5))


def test_rows_that_can_only_run_alone_are_refused_under_hooks():
    bridge, _ = booted("rwkv")
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    with pytest.raises(RuntimeError, match="reads pads on the left as text.*pass one prompt at a time"):
        tll.run(bridge, TOKENS, [tll.patch(1, tll.edits.zero, pos=-1)], attention_mask=mask)
    right = mask.flip(1)  # pads on the right are never seen by a real token
    hooked = tll.run(bridge, TOKENS, [tll.patch(1, lambda x: x.clone())], attention_mask=right)
    assert torch.equal(hooked[0, :6], tll.run(bridge, TOKENS)[0, :6])


def test_rows_of_any_cache_leave_when_they_have_finished():
    """Linear attention layers cannot select rows, and hybrid ones select those of their keys alone."""
    bridge, plain = booted("jamba")
    assert abilities_of(bridge).drops
    sources = [tll.Source(TOKENS[0, :k], pos=-1) for k in (3, 5, 7)]
    target = tll.Target(TOKENS[1, :6], pos=-1)
    whole = tll.patchscope(bridge, sources, target, target_layers=[1, 2], max_new_tokens=5, share=False)
    texts = [text for row in whole.text for text in row]
    pieces = {bridge.tokenizer.decode([t]) for t in whole.tokens[:, :, :3].flatten().tolist() if t >= 0}
    stop = next(p for p in sorted(pieces) if p.strip() and 0 < sum(p in t for t in texts) < len(texts))
    stopped = tll.patchscope(bridge, sources, target, target_layers=[1, 2], max_new_tokens=5, stop=[stop])
    assert [t for row in stopped.text for t in row] == [t.split(stop)[0] for t in texts]


# --- caches that are of no use: whole sequences, one warning


def returns_none(module, args, output):
    output["cache" if "cache" in output else "past_key_values"] = None
    return output


def loses_a_column(module, args, output):
    for layer in filled_layers(output):
        layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]


def holds_other_numbers(module, args, output):
    for layer in filled_layers(output):
        layer.values = layer.values * 0.5


def filled_layers(output):
    layers = (output["cache"] if "cache" in output else output["past_key_values"]).layers
    return [layer for layer in layers if layer.values is not None]  # a pass without the cache may return an empty one


@pytest.mark.parametrize("broken", [returns_none, loses_a_column, holds_other_numbers])
def test_a_cache_that_is_of_no_use_is_not_used(broken, fresh):
    bridge, _ = zoo.boot(zoo.CONFIGS["llama"]())
    edit = [tll.patch(1, tll.edits.scale(2.0), pos=3, when="every_step")]
    expected = tll.generate(bridge, TOKENS, edit, 6, stop_at_eos=False, use_cache=False)
    handle = bridge.original_model.register_forward_hook(broken)
    try:
        with pytest.warns(UserWarning, match="key-value cache of this model .*: whole sequences run at every step") as warned:
            for _ in range(2):
                assert torch.equal(tll.generate(bridge, TOKENS, edit, 6, stop_at_eos=False), expected)
        assert len(warned) == 1
    finally:
        handle.remove()


def test_a_cache_that_cannot_lose_rows_runs_whole_sequences(fresh, monkeypatch):
    bridge, plain = zoo.boot(zoo.CONFIGS["llama"]())
    monkeypatch.setattr(transformers.cache_utils.Cache, "reorder_cache", None)
    assert decoding.abilities_of(bridge) == decoding.Abilities(steps=True, padded=True, drops=False)
    decoder = Decoder(bridge)
    with torch.no_grad():
        decoder.start(Batch(TOKENS))
        with pytest.warns(UserWarning, match="cannot lose rows"):
            decoder.select(torch.tensor([1]))
        got = decoder.step(TOKENS[1:, 0])
        expected = plain(torch.cat([TOKENS[1:], TOKENS[1:, :1]], 1)).logits[:, -1]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_nobodys_hooks_see_how_a_model_is_tried(fresh):
    bridge, _ = zoo.boot(zoo.CONFIGS["llama"]())
    widths = []
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: widths.append(tuple(x.shape[:2])))]):
        tll.generate(bridge, TOKENS, max_new_tokens=3, stop_at_eos=False)
    assert widths == [(2, 10), (2, 1), (2, 1)]


def test_nothing_is_said_about_caches_that_work(fresh):
    bridge, _ = zoo.boot(zoo.CONFIGS["gpt2"]())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tll.generate(bridge, TOKENS, max_new_tokens=3)

"""The readout is the model's own: a head that is not final norm and unembedding is found, or refused by name."""

import copy
import warnings
from weakref import WeakKeyDictionary

import pytest
import torch
import transformers
import zoo

import tl_lenses as tll
from tl_lenses import decoding, unembed
from tl_lenses.unembed import Readout

TOKENS = zoo.tokens(2, 10)
OPT = zoo.VOCABULARY | dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=64, max_position_embeddings=64)
HEADS = {
    "projection": lambda: transformers.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False),  # OPT-350m's shape
    "norm and projection": lambda: transformers.OPTConfig(**OPT, word_embed_proj_dim=16),
    "norm, dense and norm": lambda: transformers.ModernBertDecoderConfig(**zoo.WIDE),
}


@pytest.mark.parametrize("head", list(HEADS))
def test_heads_with_more_than_a_norm_are_the_models(head):
    bridge, plain = zoo.boot(HEADS[head]())
    seen = {}
    with torch.no_grad():
        logits = tll.run(bridge, TOKENS, tll.Lens(bridge).hooks(seen))
        expected = plain(TOKENS).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert torch.equal(seen[3], logits)
    # Every layer is read as if the later blocks did nothing: the plain model with them skipped.
    skipped = copy.deepcopy(plain)
    blocks = next(m for m in skipped.modules() if isinstance(m, torch.nn.ModuleList))
    del blocks[1:]
    if hasattr(skipped.config, "layer_types"):
        skipped.config.layer_types = skipped.config.layer_types[:1]
    skipped.config.num_hidden_layers = 1
    with torch.no_grad():
        torch.testing.assert_close(seen[1], skipped(TOKENS).logits, atol=1e-4, rtol=0)


def test_a_fit_reads_the_whole_head():
    bridge, _ = zoo.boot(HEADS["projection"]())
    text = zoo.tokens(24, 16)
    fitted = tll.fit_regression(bridge, text)
    tuned = tll.fit_tuned(bridge, text, steps=4, tokens_per_step=64)
    scores = tll.evaluate(
        bridge, {"logit": tll.Lens(bridge), "ridge": tll.Lens(bridge, fitted), "tuned": tll.Lens(bridge, tuned)}, text
    )
    frame = scores.to_frame().set_index(["lens", "layer"])["kl"]
    assert frame["ridge", 0] < frame["logit", 0] and frame["tuned", 0] < frame["logit", 0]


@pytest.mark.skipif(not zoo.HAS_BRIDGE, reason="only bridges wrap other models")
def test_a_head_that_no_chain_of_modules_gives_is_refused():
    bridge, _ = zoo.boot(zoo.CONFIGS["llama"]())
    handle = bridge.original_model.register_forward_hook(
        lambda module, args, output: output.__setitem__("logits", output.logits * 3) or output
    )
    try:
        with pytest.raises(ValueError, match="the logits of 'tiny' are not what its final norm and unembedding give .*unembed"):
            tll.Lens(bridge)
    finally:
        handle.remove()
    tll.Lens(bridge)


@pytest.fixture(scope="module", params=["encoder-decoder", "without weights"])
def unreadable(request):
    """A model, and what is said of it."""
    if request.param == "without weights":
        return zoo.boot(zoo.CONFIGS["gpt2"]())[0].to("meta"), "on the meta device"
    config = transformers.BartConfig(
        **zoo.VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    return zoo.boot(config, family="AutoModelForSeq2SeqLM")[0], "has no decoder stack blocks.* but .*encoder_blocks"


@pytest.mark.skipif(not zoo.HAS_BRIDGE, reason="only bridges wrap other models")
@pytest.mark.parametrize("call", [tll.Lens, tll.run, tll.generate, tll.fit_regression])
def test_a_model_that_cannot_be_read_is_refused(unreadable, call):
    model, message = unreadable
    with pytest.raises(ValueError, match=message):
        call(model, *([] if call is tll.Lens else [TOKENS]))


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_norms_come_before_casts(arch):
    """A lens makes fp32 residuals of a bf16 model; rounding them before the norm costs what the map has gained."""
    half, full = (
        zoo.build(arch, zoo.FEW_KINDS[0], torch.bfloat16),
        zoo.copied(zoo.build(arch, zoo.FEW_KINDS[0], torch.bfloat16)).float(),
    )
    resid = 3 + torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ln = full.ln_final(resid)  # the same weights, in fp32
        expected = zoo.readout(half, resid.bfloat16()) if not hasattr(half, "ln_final") else half.unembed(ln.bfloat16())
        got = Readout(half)(resid)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, atol=0, rtol=0)


@pytest.mark.skipif(not zoo.HAS_BRIDGE, reason="only bridges wrap other models")
def test_residuals_that_are_wider_than_the_model():
    """Mamba keeps its residual stream in fp32 whatever the type of its weights."""
    config = transformers.MambaConfig(**zoo.VOCABULARY, hidden_size=32, num_hidden_layers=3, state_size=8, residual_in_fp32=True)
    bridge, plain = zoo.boot(config, torch.bfloat16)
    seen = {}
    with torch.no_grad():
        tll.run(bridge, TOKENS, [*tll.Lens(bridge).hooks(seen, layers=[-1]), tll.read("blocks.2.hook_resid_post", seen, key="x")])
        assert torch.equal(seen[3], plain(TOKENS).logits) and seen["x"].dtype == torch.float32


def test_hooks_of_others_do_not_see_the_comparison(model, monkeypatch):
    monkeypatch.setattr(unembed, "_HEADS", WeakKeyDictionary())  # as if it had not been compared yet
    calls = []
    hooks = [(name, lambda x, hook: calls.append(1)) for name in ("blocks.1.hook_resid_pre", "ln_final.hook_scale")]
    with model.hooks(fwd_hooks=hooks), warnings.catch_warnings():
        tll.Lens(model)
    assert not calls


@pytest.mark.skipif(not zoo.HAS_BRIDGE, reason="only bridges wrap other models")
def test_check_compares_with_the_plain_model():
    """TransformerLens folds norms into experts that gpt-oss then reads without its gains: its own check cannot see that."""
    config = transformers.GptOssConfig(
        **zoo._LLAMA | dict(num_hidden_layers=2), head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=16
    )
    bridge, plain = zoo.boot(config)
    named = lambda report: {c.name: c for c in report.checks}["the model is the plain Hugging Face model (log-probabilities)"]
    assert named(tll.check(bridge, reference=plain)).passed
    bridge.enable_compatibility_mode(disable_warnings=True)
    report = tll.check(bridge, reference=plain)
    far = (bridge(TOKENS).log_softmax(-1) - plain(TOKENS).logits.log_softmax(-1)).abs().max()
    assert named(report).passed == bool(far < 1e-3) and report.ok == bool(far < 1e-3)
    assert any("not compared" in note for note in tll.check(bridge).notes)


@pytest.mark.parametrize("head", list(HEADS))
def test_modules_of_the_head_are_found_by_name(head):
    bridge, _ = zoo.boot(HEADS[head]())
    listed = unembed._modules(bridge)
    names = unembed._head_of(bridge)
    assert names and all(unembed._module(bridge, name) is listed[name] for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch,kind", zoo.cases(("gpt2", "bloom", "gptj"), zoo.FEW_KINDS))
def test_logits_by_columns_round_as_the_module_does(arch, kind, dtype, monkeypatch):
    """A bias that was added to the product rounded it twice in half precision."""
    model = zoo.build(arch, kind, dtype)
    if dtype != torch.float32:
        try:
            model(TOKENS)
        except RuntimeError as error:  # GPT-J in TransformerLens 3.9, processed
            pytest.skip(f"the model's own pass fails in half precision: {error}")
    readout = Readout(model)
    monkeypatch.setitem(unembed.COLUMNS, "cpu", 48)
    hidden = (3 * torch.randn(16, zoo.D_MODEL, generator=torch.Generator().manual_seed(0))).to(dtype)
    by_columns, whole = readout.logits(hidden), readout.whole(hidden)
    if dtype == torch.float32:
        assert torch.allclose(by_columns, whole, atol=1e-4)
    else:
        assert float((by_columns != whole).double().mean()) < 0.01


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", [1, 3, 4, 15, 17, 40])
def test_turned_products_are_the_product(n, bias):
    generator = torch.Generator().manual_seed(n)
    hidden, rows = torch.randn(n, 24, generator=generator), torch.randn(2100, 24, generator=generator)
    b_u = torch.randn(2100, generator=generator) if bias else None
    out = torch.full((n, 2100), torch.nan)
    assert unembed._turned(rows.T) and not unembed._turned(rows.T.contiguous()) and not unembed._turned(rows.bfloat16().T)
    for w_u in (rows.T, rows.T.contiguous()):
        expected = torch.tanh(hidden.double() @ w_u.double() + (0 if b_u is None else b_u))
        unembed.by_columns(hidden, w_u, b_u, out, torch.tanh)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_nobody_who_looks_at_whole_logits_gets_a_row_of_them(monkeypatch):
    """Passes leave the unembedding out where that is faster, and not where a hook of the user would see it."""
    bridge, _ = zoo.boot(zoo.CONFIGS["llama"]())
    seen: list[torch.Size] = []
    note = lambda _module, _args, out: seen.append(getattr(out, "logits", out).shape)
    decode = lambda: decoding.Decoder(bridge, readout=Readout(bridge)).feed(TOKENS)
    for where, module in {"the model": bridge, "the head": bridge.unembed, "the wrapped model": bridge.original_model}.items():
        handle = module.register_forward_hook(note)
        decode()
        handle.remove()
        assert seen.pop() == (*TOKENS.shape, zoo.D_VOCAB), where
    with bridge.hooks(fwd_hooks=[("unembed.hook_out", lambda x, hook: seen.append(x.shape))]):
        decode()
    assert seen.pop() == (*TOKENS.shape, zoo.D_VOCAB)
    decode()
    seen.clear()
    head, decoder = bridge.unembed.original_component, decoding.Decoder(bridge, readout=Readout(bridge))
    plain = head.forward
    monkeypatch.setattr(head, "forward", lambda x, *args, **kwargs: seen.append(x.shape) or plain(x, *args, **kwargs))
    assert decoder.feed(TOKENS).shape == (*TOKENS.shape, zoo.D_VOCAB) and seen == [(1, 1, zoo.D_MODEL)]  # where nobody looks

"""The zoo itself: its models build, agree with transformers, and the affine model's truth is true."""

import pytest
import torch
import zoo


def final_residual(model, tokens):
    name = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, names_filter=[name])
    return logits, cache[name]


@pytest.mark.parametrize("arch,kind", zoo.cases())
def test_agrees_with_transformers(arch, kind):
    model, tokens = zoo.build(arch, kind), zoo.tokens()
    with torch.no_grad():
        want, got = zoo.reference(arch)(tokens).logits, model(tokens)
    assert want.std() > 0.5
    if kind not in zoo.RAW_KINDS:  # centring the unembedding shifts the logits
        want, got = want.log_softmax(-1), got.log_softmax(-1)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("arch,kind", zoo.cases())
def test_readout_of_the_last_residual_is_the_logits(arch, kind):
    model = zoo.build(arch, kind)
    logits, resid = final_residual(model, zoo.tokens())
    with torch.no_grad():
        assert torch.equal(zoo.readout(model, resid), logits)


@pytest.mark.parametrize("arch", zoo.ARCHS)
def test_every_parameter_of_the_reference_is_random(arch):
    for name, parameter in zoo.reference(arch).named_parameters():
        assert parameter.std() > 0.02, name
        assert parameter.flatten().unique().numel() > 0.9 * parameter.numel(), name


@pytest.mark.parametrize("arch,kind", zoo.cases())
def test_text_goes_in(arch, kind):
    model = zoo.build(arch, kind)
    ids = model.to_tokens("the cat sat", prepend_bos=True)
    assert ids[0, 0] == zoo.BOS and ids.shape[1] > 3
    assert torch.equal(model.to_tokens("the cat sat", prepend_bos=False), ids[:, 1:])


def test_the_soft_cap_matters():
    with torch.no_grad():
        capped = zoo.reference("gemma2")(zoo.tokens()).logits
    uncapped = 4 * torch.atanh(capped / 4)
    assert (capped - uncapped).abs().mean() > 0.3


def test_tokenizer():
    tokenizer = zoo.tokenizer()
    special = tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert special == (zoo.UNK, zoo.BOS, zoo.EOS, zoo.PAD) and len(tokenizer) == zoo.D_VOCAB
    text = "Zürich, the cat\n\t 日本"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_case_that_cannot_be_built_says_why():
    absent = "ht" if zoo.TL_VERSION >= (4, 0) else "bridge"
    if absent in zoo.KINDS:
        with pytest.raises(ValueError, match="partial_rotary_factor"):
            zoo.build("phi", "ht")
    else:
        with pytest.raises(ValueError, match="has no"):
            zoo.build("gpt2", absent)


@pytest.mark.parametrize("kind", zoo.AFFINE_KINDS)
@pytest.mark.parametrize("dtype,atol", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_affine_truth(kind, dtype, atol):
    model = zoo.affine_model(kind, dtype)
    n_layers, tokens = model.cfg.n_layers, torch.arange(zoo.D_VOCAB)[:, None]
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
    final = cache[f"blocks.{n_layers - 1}.hook_resid_post"][:, 0]
    maps = zoo.truth(model)
    assert list(maps) == list(range(n_layers + 1))
    for layer in range(n_layers):
        x = cache[f"blocks.{layer}.hook_resid_pre"][:, 0]
        assert x.dtype == dtype and torch.linalg.matrix_rank(x.double() - x.double().mean(0)) == model.cfg.d_model
        weight, bias = maps[layer]
        torch.testing.assert_close((x.double() @ weight.T + bias).to(dtype), final, atol=atol, rtol=atol)
        # Neither the identity nor a map without a bias would do.
        assert (weight - torch.eye(len(bias))).norm() > 1 and bias.norm() > 1
        assert torch.linalg.cond(weight) < 1e3
        assert ((x.double() - final.double()).norm() / final.double().norm()) > 0.3
    torch.testing.assert_close(zoo.readout(model, final[:, None]), logits)

"""A logit as a sum: over the components of a lens' state, and over the states of a layer."""

import functools
from types import SimpleNamespace

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses.linearised import Linearised
from tl_lenses.numerics import gain

each_model = pytest.mark.parametrize("arch,kind", zoo.cases(kinds=zoo.FEW_KINDS))
TOKENS = zoo.tokens(1, 9)


def _by_hand(model, lens, layer, ids):
    """`logits [pos]` of a lens, and `x -> what x adds to it` by the formula, with the scale at the lens' own point."""
    seen = {}
    with torch.no_grad():
        tll.run(model, TOKENS, [tll.read(tll.site(model, layer), seen, key="h")])
    h, affine = seen["h"][0], lens[layer].affine
    z = h if affine is None else affine(h)
    gains, centred = gain(lens.readout.norm_module, z.shape[-1], z)
    remove = lambda x: x - x.mean(-1, keepdim=True) if centred else x
    scale = (remove(z).square().mean(-1, keepdim=True) + lens.readout.model.cfg.eps).sqrt()
    direction = gains * lens.readout.weights()[0][:, ids].T
    weight = torch.eye(h.shape[-1]) if affine is None else affine.weight
    return h, lambda x: (direction * remove(x @ weight.T) / scale).sum(-1)


@pytest.fixture(
    scope="module", params=[(*case.values, fitted) for case in zoo.cases(kinds=zoo.FEW_KINDS) for fitted in (False, True)], ids=str
)
def parted(request):
    """Components of a lens' logits, with what they are compared with: the share of a vector by the formula, the state, the logits."""
    arch, kind, fitted = request.param
    model, ids = zoo.build(arch, kind), torch.arange(5, 14)
    lens = tll.Lens(model, zoo.random_maps(model)) if fitted else tll.Lens(model)
    layer = 2 if fitted else model.cfg.n_layers
    parts = tll.components(model, lens, TOKENS, layer, targets=list(range(5, 14)))
    h, share = _by_hand(model, lens, layer, ids)
    with torch.no_grad():
        bias = getattr(model, "b_U", torch.zeros(zoo.D_VOCAB))[ids]
        logits = (lens[layer].hidden(h) * model.W_U[:, ids].T).sum(-1) + bias
    return SimpleNamespace(model=model, arch=arch, parts=parts, h=h, share=share, logits=logits)


def test_components_sum_to_the_logits_of_the_lens(parted):
    assert torch.allclose(parted.parts.total, parted.logits, atol=1e-5)
    assert torch.allclose(parted.parts.values.sum(0) + parted.parts.rest, parted.logits, atol=1e-5)


def test_what_is_left_of_components_has_biases_only(parted):
    assert torch.allclose(parted.parts.values.sum(0), parted.share(parted.h), atol=1e-4, rtol=1e-4)


def test_a_component_is_the_formula(parted):
    seen = {}
    with torch.no_grad():
        tll.run(parted.model, TOKENS, [tll.read(0, seen), tll.read("blocks.1.hook_mlp_out", seen, key="mlp")])
    values, rows = parted.parts.values, parted.parts.rows
    assert torch.allclose(values[0], parted.share(seen[0][0]), atol=1e-4, rtol=1e-4)
    if parted.arch != "bloom":  # its module adds the residual itself
        assert torch.allclose(values[rows.index("1 mlp")], parted.share(seen["mlp"][0]), atol=1e-4, rtol=1e-4)


@each_model
def test_heads_sum_to_their_attention(arch, kind):
    model = zoo.build(arch, kind)
    lens = tll.Lens(model)
    whole, heads = (tll.components(model, lens, TOKENS, 2, targets=7, heads=h) for h in (False, True))
    for i in range(2):
        rows = [k for k, name in enumerate(heads.rows) if name.startswith(f"{i} head") or name == f"{i} attention bias"]
        assert len(rows) == zoo.N_HEADS + 1
        assert torch.allclose(heads.values[rows].sum(0), whole.values[whole.rows.index(f"{i} attention")], atol=1e-5)
    if arch in ("llama", "mistral", "gemma2", "gemma3", "qwen3"):  # no biases: nothing is left for that row
        assert float(heads.values[heads.rows.index("1 attention bias")].abs().max()) < 1e-5


def test_a_head_is_its_z_through_w_o(model):
    lens, seen = tll.Lens(model), {}
    parts = tll.components(model, lens, TOKENS, 2, targets=7, heads=True)
    with torch.no_grad():
        tll.run(model, TOKENS, [tll.read("blocks.1.attn.hook_z", seen, key="z")])
    _, share = _by_hand(model, lens, 2, torch.full((9,), 7))
    z = seen["z"][0].reshape(9, zoo.N_HEADS, -1)
    for head in range(zoo.N_HEADS):
        expected = share(z[:, head] @ model.W_O[1, head])
        assert torch.allclose(parts.values[parts.rows.index(f"1 head {head}")], expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch,kind", zoo.cases(("gpt2", "gemma2"), zoo.FEW_KINDS))
def test_half_precision_differs_by_its_rounding(arch, kind, dtype):
    """Against the same model in float32; a state in half precision was taken for a nonlinearity that the rule does not know."""
    half, whole = (zoo.build(arch, kind, precision) for precision in (dtype, torch.float32))
    for call in (
        lambda m: tll.components(m, tll.Lens(m), TOKENS, targets=7),
        lambda m: tll.components(m, tll.Lens(m), TOKENS, 2, targets=7, heads=True),
        lambda m: tll.detached(m, TOKENS, 7),
    ):
        ours, exact = call(half), call(whole)
        assert ours.values.dtype == torch.float32 and ours.rows == exact.rows
        for a, b in ((ours.values, exact.values), (ours.total, exact.total), (ours.rest, exact.rest)):
            assert float((a - b).abs().max()) < (0.25 if dtype == torch.bfloat16 else 0.05)


@pytest.mark.skipif(zoo.TL_VERSION < (4, 0), reason="TransformerLens has this tool from 4.0 on")
def test_at_the_last_layer_it_is_direct_logit_attribution():
    from transformer_lens.tools.analysis import direct_logit_attribution

    model = zoo.build("gpt2", "processed")
    theirs = direct_logit_attribution(model, TOKENS, answer_tokens=torch.tensor([7]), unit="component")
    ours = tll.components(model, tll.Lens(model), TOKENS, -1, targets=7)
    known = dict(zip(theirs.labels, theirs.attribution.flatten().tolist(), strict=True))
    for i in range(3):
        assert abs(float(ours.values[ours.rows.index(f"{i} mlp"), -1]) - known[f"{i}_mlp_out"]) < 1e-4
        assert abs(float(ours.values[ours.rows.index(f"{i} attention"), -1]) - known[f"{i}_attn_out"]) < 1e-4
    assert abs(float(ours.values[0, -1]) - known["embed"] - known["pos_embed"]) < 1e-4


# --- detached

own_backward = lambda arch, kind: arch == "bloom" and not kind.startswith("ht")  # a HookedTransformer has an activation of its own
each_exact = pytest.mark.parametrize(
    "arch,kind", [case for case in zoo.cases(kinds=zoo.FEW_KINDS) if not own_backward(*case.values)]
)
without_biases = zoo.cases(("llama", "mistral", "gemma2", "gemma3", "qwen3"), zoo.FEW_KINDS)


@functools.cache
def _runs_in_float64(arch, kind):
    model = zoo.build(arch, kind, torch.float64)
    try:
        model(TOKENS)
    except RuntimeError as error:  # biases that processing adds are float32 in TransformerLens 3.9
        assert "same dtype" in str(error)
        return None
    return model


@functools.cache
def _parts(arch, kind):
    return tll.detached(_runs_in_float64(arch, kind), TOKENS, 7, pos=5)


@pytest.fixture
def in_float64(arch, kind):
    """A model, and its logit of token 7 at position 5 as a sum over states."""
    if _runs_in_float64(arch, kind) is None:
        pytest.skip("the model itself does not run in float64")
    return _runs_in_float64(arch, kind), _parts(arch, kind)


@pytest.mark.parametrize("arch,kind", [case for case in zoo.cases(kinds=zoo.FEW_KINDS) if own_backward(*case.values)])
def test_a_model_with_a_backward_of_its_own_is_refused(arch, kind):
    with pytest.raises(ValueError, match="a backward of its own"):
        tll.detached(zoo.build(arch, kind, torch.float64), TOKENS)


@each_exact
def test_states_with_what_is_left_add_up_to_the_logit(in_float64):
    _, parts = in_float64
    assert float((parts.values.sum(1) + parts.rest - parts.total).abs().max()) < 1e-10


@each_exact
def test_later_states_have_no_share(in_float64):
    assert not in_float64[1].values[:, 6:].any()


@pytest.mark.parametrize("arch,kind", without_biases)
def test_without_biases_nothing_is_left(in_float64):
    assert float(in_float64[1].rest.abs().max()) < 1e-10


@each_exact
def test_the_total_is_the_models_logit(in_float64, arch):
    model, parts = in_float64
    if "soft" not in str(vars(model.cfg).get("output_logits_soft_cap")) and arch != "gemma2":
        with torch.no_grad():
            assert abs(float(parts.total[0] - model(TOKENS)[0, 5, 7])) < 1e-5


def test_parameters_want_gradients_as_before():
    model = zoo.build("gpt2", zoo.FEW_KINDS[0], torch.float64)
    flags = [p.requires_grad for p in model.parameters()]
    tll.detached(model, TOKENS, 7, pos=5)
    assert flags == [p.requires_grad for p in model.parameters()]


def test_it_is_the_affine_function_of_a_layer():
    """The rest of layer 1 is what biases behind it add, each by its own gradient."""
    model, seen = zoo.build("gpt2", zoo.FEW_KINDS[0], torch.float64), {}
    parts = tll.detached(model, TOKENS, 7, layers=[1])
    named = ((name.rpartition(".")[2].lstrip("_"), p) for name, p in model.named_parameters())
    biases = [p for leaf, p in named if "bias" in leaf or leaf == "b" or leaf.startswith("b_")]
    root = tll.patch(1, lambda x: x.detach().requires_grad_())
    with torch.enable_grad(), Linearised("detached"):
        logit = tll.run(model, TOKENS, [root, tll.read(1, seen, detach=False)])[0, -1, 7]
        grads = torch.autograd.grad(logit, [seen[1], *biases], allow_unused=True)
    assert torch.allclose(parts.values[0], (grads[0] * seen[1]).detach()[0].sum(-1), atol=1e-10)
    added = sum(float((g * b).detach().sum()) for g, b in zip(grads[1:], biases, strict=True) if g is not None)
    assert abs(float(parts.rest[0]) - added) < 1e-10


@pytest.mark.parametrize("kind", zoo.AFFINE_KINDS)
def test_on_a_linear_model_it_is_the_true_map(kind):
    model, token = zoo.affine_model(kind, torch.float64), torch.tensor([[9]])
    parts, resid = tll.detached(model, token, 7), {}
    with torch.no_grad():
        tll.run(model, token, [tll.read(i, resid) for i in range(3)])
    for layer in range(3):
        weight, _ = zoo.truth(model)[layer]
        expected = model.W_U[:, 7].detach() @ weight @ resid[layer][0, 0]
        assert abs(float(parts.values[layer, 0] - expected)) < 1e-10


def test_what_does_not_add_up_is_an_error(model):
    square = ("blocks.1.hook_mlp_out", lambda x, hook: x * x)
    with pytest.raises(ValueError, match="no exact sum for it"):
        tll.detached(model, TOKENS, hooks=[square])
    with pytest.raises(ValueError, match="one prompt, got 2"):
        tll.components(model, tll.Lens(model), zoo.tokens(2, 5))
    with pytest.raises(ValueError, match="3 targets for 9 positions"):
        tll.components(model, tll.Lens(model), TOKENS, targets=[1, 2, 3])

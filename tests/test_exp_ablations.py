"""Ablations on models whose answer can be computed by hand: affine blocks, blocks run one by one, and heads of no use."""

from importlib import import_module

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses.experiments.subject import Subject

A = import_module("tl_lenses.experiments.tuned_lens.ablations")
TOKENS = torch.randint(4, zoo.D_VOCAB, (4, 10), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def model():
    return zoo.build("gpt2", zoo.FEW_KINDS[0])


def of(result, value, part, how):
    """The numbers of one ablation by block."""
    return result.grid.at(ablation=(part, how))[value]


def blocks_in_order(model, order, tokens):
    """The final residual of a model of affine blocks that are applied in this order, by matrices."""
    truth = zoo.truth(model)
    depth = model.cfg.n_layers
    seen = {}
    tll.run(model, tokens, [tll.read(0, seen)])
    x = seen[0].double()
    for block in order:
        # W_l = W_{l+1} B_l and b_l = W_{l+1} c_l + b_{l+1}.
        (w, b), (after, rest) = truth[block], truth[block + 1]
        inverse = torch.linalg.inv(after)
        x = x @ (inverse @ w).T + inverse @ (b - rest)
    assert depth == 3
    return x


@pytest.mark.parametrize("what,order", [("delete", [0, 2]), ("duplicate", [0, 1, 1, 2]), ("swap", [0, 2, 1])])
def test_deletion_duplication_and_swap_are_those_of_the_blocks(what, order):
    model = zoo.affine_model()
    tokens = torch.arange(5, 13)[:, None]
    want = model.unembed(blocks_in_order(model, order, tokens).float())
    plain = {}
    clean = tll.run(model, tokens, tll.hooks.residual_reads(model, range(4), plain))
    hooks = dict(A._orders(model, tll.Batch(tokens), 1, [what], plain))
    got = tll.run(model, tokens, hooks["order", what])
    assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))
    assert not torch.allclose(got, clean, atol=1e-2)


@pytest.mark.parametrize("arch,kind", zoo.cases(("llama", "neox", "gemma2"), zoo.FEW_KINDS))
def test_a_swap_on_other_models_is_the_blocks_run_by_hand(arch, kind):
    """Blocks run one at a time: each on the input it is given, all others passed over."""
    model = zoo.build(arch, kind)
    plain = {}
    tll.run(model, TOKENS, tll.hooks.residual_reads(model, range(model.cfg.n_layers + 1), plain))

    def block(at, x):
        out = {}
        hooks = [tll.patch(tll.site(model, at), tll.edits.replace(x)), tll.read(tll.site(model, at + 1), out, "y")]
        tll.run(model, TOKENS, hooks)
        return out["y"]

    x = block(0, block(1, plain[0]))
    want = tll.run(model, TOKENS, [tll.patch(tll.site(model, 2), tll.edits.replace(x))])
    hooks = dict(A._orders(model, tll.Batch(TOKENS), 0, ["swap"], plain))
    assert torch.allclose(tll.run(model, TOKENS, hooks["order", "swap"]), want, atol=1e-4)


def test_a_swap_that_forgets_to_pass_over_the_second_block_is_caught(monkeypatch):
    model, tokens = zoo.affine_model(), torch.arange(5, 13)[:, None]
    want = model.unembed(blocks_in_order(model, [0, 2, 1], tokens).float())
    plain = {}
    tll.run(model, tokens, tll.hooks.residual_reads(model, range(4), plain))
    monkeypatch.setattr(A, "swapped", lambda m, b, x: [tll.patch(tll.site(m, b), tll.edits.replace(x))])
    hooks = dict(A._orders(model, tll.Batch(tokens), 1, ["swap"], plain))
    assert not torch.allclose(tll.run(model, tokens, hooks["order", "swap"]), want, atol=1e-2)


def test_the_effects_are_those_of_the_hooks(model):
    result = A.ablations(model, TOKENS, skip_first=False, heads=False)
    assert torch.allclose(of(result, "loss", "block", "zero"), of(result, "loss", "order", "delete"), atol=1e-5)
    assert of(result, "loss", "order", "swap")[-1].isnan() and of(result, "loss", "order", "swap")[:-1].isfinite().all()
    logits = tll.run(model, TOKENS, A.block_edit(model, 1, tll.edits.zero)).log_softmax(-1)
    goal = TOKENS[:, 1:, None]
    rise = -logits[:, :-1].gather(-1, goal).mean() - result.clean
    assert float(of(result, "loss", "order", "delete")[1]) == pytest.approx(float(rise), abs=1e-4)
    clean = tll.run(model, TOKENS).log_softmax(-1)
    kl = (clean.exp() * (clean - logits)).sum(-1).mean()
    assert float(of(result, "kl", "order", "delete")[1]) == pytest.approx(float(kl), rel=1e-3)
    assert (result.kl[result.kl.isfinite()] >= -1e-6).all()


def test_with_the_first_position_left_out_zero_is_no_deletion(model):
    result = A.ablations(model, TOKENS, heads=False, layers=[0])
    assert not torch.allclose(of(result, "loss", "block", "zero"), of(result, "loss", "order", "delete"), atol=1e-4)


def test_the_mean_ablation_of_a_constant_block_costs_nothing(model, monkeypatch):
    seen = {}
    tll.run(model, TOKENS, tll.hooks.residual_reads(model, [1, 2], seen))
    constant = (seen[2] - seen[1])[0, 3]
    pairs = A.block_edit(model, 1, tll.edits.replace(constant))
    texts = Subject(model).texts(TOKENS)
    states = Subject(model).states(texts, [1, 2], hooks=pairs)
    assert torch.allclose(states[2] - states[1], constant.expand_as(states[1]), atol=1e-5)
    means = (states[2] - states[1]).mean(0)
    assert torch.allclose(means, constant, atol=1e-5)


def test_heads_add_up_to_their_block_and_subspaces_to_the_whole(model):
    width = model.cfg.d_model
    spaces = {"all": {1: torch.eye(width)}, "one": {1: torch.eye(width)[3]}}
    result = A.ablations(model, TOKENS, layers=[1], subspaces=spaces, orders=())
    assert result.heads == [f"head {i}" for i in range(zoo.N_HEADS)]
    assert len(result.loss) == 3 * (1 + 2 + zoo.N_HEADS)
    used = Subject(model).texts(TOKENS).used[0]
    for name, edit in (("all", tll.edits.zero), ("one", tll.edits.project(torch.eye(width)[3]))):
        logits = tll.run(model, TOKENS, [tll.patch(1, tll.edits.where(used, edit))]).log_softmax(-1)
        rise = -logits[:, 1:-1].gather(-1, TOKENS[:, 2:, None]).mean() - result.clean
        assert float(of(result, "loss", name, "zero")[0]) == pytest.approx(float(rise), abs=1e-4)
    # A head's z to zero is its part of the attention output gone.
    z, out = {}, {}
    reads = [tll.read("blocks.1.attn.hook_z", z), tll.read("blocks.1.hook_attn_out", out)]
    tll.run(model, TOKENS, reads)
    plain = out["blocks.1.hook_attn_out"]
    tll.run(model, TOKENS, [*A.head_edit(model, 1, 2, tll.edits.zero), *reads])
    part = plain - out["blocks.1.hook_attn_out"]
    shaped = z["blocks.1.attn.hook_z"].reshape(4, 10, zoo.N_HEADS, -1)
    assert (shaped[:, :, 2] == 0).all() and (shaped[:, :, 1] != 0).any() and part.abs().max() > 1e-3


def test_attention_that_ignores_its_heads_is_refused(model, monkeypatch):
    monkeypatch.setattr(A, "patch", lambda site, edit: (site, lambda x, hook: None))  # an edit without effect
    with pytest.raises(RuntimeError, match="ignores edits of hook_z"):
        A.ablations(model, TOKENS)


def test_the_report_prints_and_saves(model, tmp_path):
    spaces = {"first": {b: torch.eye(model.cfg.d_model)[:2] for b in range(3)}}
    result = A.ablations(model, TOKENS, kinds=["zero", "mean"], subspaces=spaces, orders=["swap"])
    text = result.markdown()
    assert "first, mean" in text and "head 3" in text and "| swap |" in text.replace("| block | zero | mean", "|")
    folder = result.save(tmp_path / "out")
    assert all((folder / f"{name}.svg").exists() for name in ("loss", "subspaces", "heads"))
    assert len(result.to_frame()) == 3 * (2 * (1 + 1 + 4) + 1)


def test_bad_input_is_refused_before_any_pass(model, monkeypatch):
    width = model.cfg.d_model
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("ran"))
    basis = torch.eye(width)[:2]
    for settings, message in (
        ({"kinds": ["none"]}, "kinds must be 'zero', 'mean' or 'resample', got 'none'"),
        ({"orders": ["reverse"]}, "orders must be"),
        ({"layers": [3]}, "there is no block 3"),
        ({"layers": [7]}, "no layer 7"),
        ({"layers": [0, 1], "subspaces": {"s": {2: basis}}}, r"layer 2 which layers=\[0, 1\] leaves out"),
        ({"layers": [0, 1], "subspaces": {"s": {1: basis}}}, "not for layer 0"),
        ({"layers": [1], "subspaces": {"s": {1: basis + 0.1}}}, "said to be orthonormal and are not"),
        ({"layers": [1], "subspaces": {"s": {1: basis[:, :5]}}}, r"has shape \[2, 5\], expected \[k, 32\]"),
        ({"layers": [1], "subspaces": {"head 1": {1: basis}}}, "may not be called 'head 1'"),
    ):
        with pytest.raises(ValueError, match=message):
            A.ablations(model, TOKENS, **settings)
    with pytest.raises(ValueError, match="two positions in every batch"):
        A.ablations(model, [TOKENS[:1, :2], TOKENS[:1, :2]])

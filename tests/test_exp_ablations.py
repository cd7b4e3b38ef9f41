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
def report(model):
    return A.ablations(model, TOKENS, skip_first=False, heads=False)


def of(result, value, part, how):
    """The numbers of one ablation by block."""
    return result.grid.at(ablation=(part, how))[value]


def kl_of(model, tokens, how, block):
    """Mean KL that the report gives for blocks in another order."""
    result = A.ablations(model, tokens, kinds=(), orders=[how], heads=False, layers=[block], skip_first=False)
    return float(of(result, "kl", "order", how)[0])


@torch.no_grad()
def kl_to(model, tokens, logits):
    """The same by hand: from the model to these logits."""
    clean = tll.run(model, tokens).log_softmax(-1)
    return float((clean.exp() * (clean - logits.log_softmax(-1))).sum(-1).mean())


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


ORDERS = {"delete": [0, 2], "duplicate": [0, 1, 1, 2], "swap": [0, 2, 1]}


@pytest.mark.parametrize("how", ORDERS)
def test_another_order_of_blocks_is_that_of_their_matrices(how):
    model, tokens = zoo.affine_model(), torch.arange(5, 13)[:, None]
    by_hand = {k: kl_to(model, tokens, model.unembed(blocks_in_order(model, v, tokens).float())) for k, v in ORDERS.items()}
    assert min(by_hand.values()) > 1e-2
    got = kl_of(model, tokens, how, 1)
    assert [k for k, kl in by_hand.items() if got == pytest.approx(kl, rel=1e-4)] == [how]


@pytest.mark.parametrize("arch,kind", zoo.cases(("llama", "neox", "gemma2"), zoo.FEW_KINDS))
def test_a_swap_on_other_models_is_the_blocks_run_by_hand(arch, kind):
    """Blocks run one at a time: each on the input it is given, all others passed over."""
    model, first = zoo.build(arch, kind), {}
    tll.run(model, TOKENS, [tll.read(0, first)])

    def block(at, x):
        out = {}
        hooks = [tll.patch(tll.site(model, at), tll.edits.replace(x)), tll.read(tll.site(model, at + 1), out, "y")]
        tll.run(model, TOKENS, hooks)
        return out["y"]

    x = block(0, block(1, first[0]))
    want = tll.run(model, TOKENS, [tll.patch(tll.site(model, 2), tll.edits.replace(x))])
    assert kl_of(model, TOKENS, "swap", 0) == pytest.approx(kl_to(model, TOKENS, want), rel=1e-4)


def test_a_swap_that_forgets_to_pass_over_the_second_block_is_caught(monkeypatch):
    monkeypatch.setattr(A, "swapped", lambda m, b, x: [tll.patch(tll.site(m, b), tll.edits.replace(x))])
    with pytest.raises(AssertionError):
        test_another_order_of_blocks_is_that_of_their_matrices("swap")


def test_a_block_set_to_zero_at_every_position_is_deleted(report):
    assert torch.allclose(of(report, "loss", "block", "zero"), of(report, "loss", "order", "delete"), atol=1e-5)


def test_the_last_block_alone_cannot_be_swapped(report):
    assert of(report, "loss", "order", "swap").isnan().tolist() == [False, False, True]


def test_the_loss_is_the_rise_of_the_cross_entropy(model, report):
    logp = tll.run(model, TOKENS, A.block_edit(model, 1, tll.edits.zero)).log_softmax(-1)
    rise = -logp[:, :-1].gather(-1, TOKENS[:, 1:, None]).mean() - report.clean
    assert float(of(report, "loss", "order", "delete")[1]) == pytest.approx(float(rise), abs=1e-4)


def test_the_kl_is_that_from_the_model_to_what_is_left(model, report):
    want = kl_to(model, TOKENS, tll.run(model, TOKENS, A.block_edit(model, 1, tll.edits.zero)))
    assert float(of(report, "kl", "order", "delete")[1]) == pytest.approx(want, rel=1e-3)


def test_no_kl_is_below_zero(report):
    assert (report.kl[report.kl.isfinite()] >= -1e-6).all()


def test_with_the_first_position_left_out_zero_is_no_deletion(model):
    result = A.ablations(model, TOKENS, heads=False, layers=[0])
    assert not torch.allclose(of(result, "loss", "block", "zero"), of(result, "loss", "order", "delete"), atol=1e-4)


def test_a_replaced_contribution_is_all_that_the_block_adds(model):
    constant = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    seen = {}
    tll.run(model, TOKENS, [*A.block_edit(model, 1, tll.edits.replace(constant)), *tll.hooks.residual_reads(model, [1, 2], seen)])
    assert torch.allclose(seen[2] - seen[1], constant.expand_as(seen[1]), atol=1e-5)


def test_there_is_a_row_per_kind_and_part(model):
    basis = torch.eye(model.cfg.d_model)[:2]
    result = A.ablations(model, TOKENS, layers=[1], subspaces={"a": {1: basis}, "b": {1: basis}}, orders=())
    assert result.heads == [f"head {i}" for i in range(zoo.N_HEADS)]
    assert len(result.loss) == 3 * (1 + 2 + zoo.N_HEADS)


@pytest.mark.parametrize("whole", [True, False])
def test_a_subspace_is_taken_out_of_the_input_of_its_block(model, whole):
    basis = torch.eye(model.cfg.d_model) if whole else torch.eye(model.cfg.d_model)[3:4]
    result = A.ablations(model, TOKENS, kinds=["zero"], layers=[1], subspaces={"it": {1: basis}}, orders=(), heads=False)
    used = Subject(model).texts(TOKENS).used[0]
    edit = tll.edits.zero if whole else tll.edits.project(basis[0])
    logits = tll.run(model, TOKENS, [tll.patch(1, tll.edits.where(used, edit))]).log_softmax(-1)
    rise = -logits[:, 1:-1].gather(-1, TOKENS[:, 2:, None]).mean() - result.clean
    assert float(of(result, "loss", "it", "zero")[0]) == pytest.approx(float(rise), abs=1e-4)


def test_a_head_without_its_output_is_out_of_its_block(model):
    """Its z becomes zero and no other's, and the attention output changes."""
    z, out = {}, {}
    reads = [tll.read("blocks.1.attn.hook_z", z), tll.read("blocks.1.hook_attn_out", out)]
    tll.run(model, TOKENS, reads)
    plain = out["blocks.1.hook_attn_out"]
    tll.run(model, TOKENS, [*A.head_edit(model, 1, 2, tll.edits.zero), *reads])
    shaped = z["blocks.1.attn.hook_z"].reshape(4, 10, zoo.N_HEADS, -1)
    assert (shaped == 0).all(-1).all(1).all(0).tolist() == [False, False, True, False]
    assert (plain - out["blocks.1.hook_attn_out"]).abs().max() > 1e-3


def test_attention_that_ignores_its_heads_is_refused(model, monkeypatch):
    monkeypatch.setattr(A, "patch", lambda site, edit: (site, lambda x, hook: None))  # an edit without effect
    with pytest.raises(RuntimeError, match="ignores edits of hook_z"):
        A.ablations(model, TOKENS)


def test_the_report_has_its_tables_figures_and_frame(model, tmp_path):
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

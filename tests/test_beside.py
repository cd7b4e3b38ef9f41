"""Our hooks beside TransformerLens' own tools: patching, attribution and interchange of subspaces run with them, and give what they give alone."""

import pytest
import torch
import zoo

import tl_lenses as tll

D, N = zoo.D_MODEL, zoo.N_LAYERS
CLEAN, CORRUPT = torch.randint(4, zoo.D_VOCAB, (2, 1, 9), generator=torch.Generator().manual_seed(3)).unbind(0)
TOKEN = 17

analysis = pytest.mark.skipif(zoo.TL_VERSION < (4, 3), reason="these tools came with TransformerLens 4.3")


@pytest.fixture
def model():
    return zoo.build("gpt2", zoo.KINDS[1] if zoo.HAS_BRIDGE else "ht")


def lens_of(model):
    noise = 0.1 * torch.randn(N, D, D, generator=torch.Generator().manual_seed(0))
    return tll.Lens(model, tll.Translators([(i, N) for i in range(N)], torch.eye(D) + noise, torch.zeros(N, D), n_layers=N))


def test_activation_patching_measured_through_a_lens(model):
    """Their loop patches, our hooks read each patched pass at a later layer: the same as a loop of our own patches."""
    from transformer_lens import patching

    lens, seen, clean = lens_of(model), {}, {}
    tll.run(model, CLEAN, [tll.read(1, clean)])
    _, cache = model.run_with_cache(CLEAN)
    keep = lens.hooks(seen, [2], then=lambda logits: logits[0, -1, TOKEN])
    with model.hooks(fwd_hooks=keep):
        theirs = patching.generic_activation_patch(
            model, CORRUPT, cache, lambda logits: seen[2], patching.layer_pos_patch_setter, "resid_pre", ["layer", "pos"]
        )  # fmt: skip
    for pos in range(CORRUPT.shape[1]):
        read_here = {}
        edit = tll.patch(1, tll.edits.replace(clean[1][0, pos]), pos=pos)
        tll.run(model, CORRUPT, [edit, *lens.hooks(read_here, [2], then=lambda logits: logits[0, -1, TOKEN])])
        assert torch.allclose(theirs[1, pos], read_here[2], atol=1e-5)
    assert theirs[1].std() > 1e-4
    unpatched = {}
    tll.run(model, CORRUPT, lens.hooks(unpatched, [2], then=lambda logits: logits[0, -1, TOKEN]))
    # At its own layer and above it the reading comes before the patch: hooks that are on the model run first.
    assert torch.allclose(theirs[2:], unpatched[2].expand_as(theirs[2:]), atol=1e-5)


@analysis
def test_attribution_is_what_it_is_without_our_hooks(model):
    from transformer_lens.tools.analysis import attribution_patch

    metric = lambda logits: logits[..., -1, TOKEN].sum()
    lens, seen = lens_of(model), {}
    alone = attribution_patch(model, CLEAN, CORRUPT, metric)
    with model.hooks(fwd_hooks=lens.hooks(seen, [1]) + [tll.read(2, seen, key="state")]):
        beside = attribution_patch(model, CLEAN, CORRUPT, metric)
    assert set(seen) == {1, "state"}
    assert alone.node_scores == beside.node_scores and max(map(abs, alone.node_scores.values())) > 1e-3


NAME, LAST = "blocks.1.hook_resid_pre", torch.tensor([CORRUPT.shape[1] - 1])


@analysis
def test_an_interchange_of_subspaces_is_an_edit_that_a_lens_reads(model):
    from transformer_lens.tools.analysis import SubspaceInterchange, random_basis, run_with_intervention

    clean, lens, seen, read_here = {}, lens_of(model), {}, {}
    tll.run(model, CLEAN, [tll.read(1, clean)])
    source = clean[1][:, -1]
    interchange = SubspaceInterchange(random_basis(D, 3, seed=0))
    with model.hooks(fwd_hooks=lens.hooks(seen, [2])):
        theirs = run_with_intervention(model, NAME, interchange, CORRUPT, source, lambda x: model(x)[:, -1], positions=LAST)
    edit = tll.patch(1, lambda h: interchange(h, source[:, None].expand_as(h)), pos=-1)
    ours = tll.run(model, CORRUPT, [edit, *lens.hooks(read_here, [2])])
    assert torch.allclose(theirs, ours[:, -1], atol=1e-5) and torch.allclose(seen[2], read_here[2], atol=1e-5)


@analysis
def test_a_lens_reads_while_a_subspace_is_trained(model):
    from transformer_lens.tools.analysis import fit_das

    seen = {}
    with model.hooks(fwd_hooks=lens_of(model).hooks(seen, [2])):
        result = fit_das(
            model, NAME, CORRUPT, CLEAN, torch.tensor([TOKEN]), lambda x: model(x)[:, -1], rank=1, epochs=2,
            base_positions=LAST, source_positions=LAST,
        )  # fmt: skip
    assert result is not None and seen[2].shape == (1, CORRUPT.shape[1], zoo.D_VOCAB) and not seen[2].requires_grad


def test_all_in_one_call_of_theirs(model):
    """`run_with_hooks` with their kind of hook, an edit of ours, and readings of ours, in the order of the list."""
    lens, seen = lens_of(model), {}

    def double(x, hook):
        return 2 * x

    hooks = [
        ("blocks.1.hook_resid_pre", double), tll.patch(1, tll.edits.add(torch.ones(D)), pos=-1), tll.read(1, seen, key="state"), *lens.hooks(seen, [2]),
    ]  # fmt: skip
    logits = model.run_with_hooks(CLEAN, fwd_hooks=hooks)
    assert torch.allclose(logits, tll.run(model, CLEAN, hooks), atol=1e-6)
    plain = {}
    tll.run(model, CLEAN, [tll.read(1, plain)])
    expected = 2 * plain[1]
    expected[:, -1] += 1
    assert torch.allclose(seen["state"], expected, atol=1e-6) and 2 in seen

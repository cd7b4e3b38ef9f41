"""Block outputs and gradients: a planted step down (or up) the gradient is found, and cosines agree with finite differences."""

from importlib import import_module

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses.experiments import gradients

module = import_module("tl_lenses.experiments.tuned_lens.gradients")
ARCHS = ("gpt2", "neox")  # those whose norms compute in float64 when asked


def double(arch):
    return zoo.build(arch, zoo.FEW_KINDS[0], torch.float64)


def loss(model, tokens, hooks=()):
    """Summed cross entropy per row."""
    logp = tll.run(model, tokens, hooks).log_softmax(-1)
    return -logp[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].sum(1)


def check_planted(sign, skip_first=True):
    """Block 1 is replaced by a small step along the gradient at its input: the cosine is 1 or -1 there."""
    model, tokens = double("gpt2"), zoo.tokens(3, 8)
    seen = {}
    identity = [tll.read(1, seen, detach=False), tll.patch(2, lambda x: seen[1])]
    slope = slope_of(model, tokens, 1, identity)
    step = [tll.read(1, seen, detach=False), tll.patch(2, lambda x: seen[1] + sign * 1e-6 * slope)]
    report = gradients(model, tokens, hooks=step, skip_first=skip_first)
    assert torch.allclose(report.cosine[:, 1], torch.full((3,), float(sign), dtype=torch.float64), atol=1e-3)
    assert bool((report.negative()[1] == (sign < 0)).all())
    assert float(report.below_random()[1]) == (1.0 if sign < 0 else 0.0)
    assert (report.negative_positions[:, 1] == (1.0 if sign < 0 else 0.0)).all()


def slope_of(model, tokens, layer, hooks=()):
    """The gradient of each row's loss with respect to the state that enters a block, by autograd."""
    seen = {}
    root = [tll.patch(layer, lambda x: x.detach().requires_grad_()), tll.read(layer, seen, detach=False)]
    return torch.autograd.grad(loss(model, tokens, [*root, *hooks]).sum(), seen[layer])[0]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_step_along_the_gradient(sign):
    check_planted(sign)


def test_the_check_fails_on_a_broken_copy(monkeypatch):
    true = module._cosine
    monkeypatch.setattr(module, "_cosine", lambda a, b, kept: true(a, a - b, kept))
    with pytest.raises(AssertionError):
        check_planted(-1)


@pytest.mark.parametrize("arch", [a for a in ARCHS if zoo.available(a, zoo.FEW_KINDS[0])])
def test_cosines_by_finite_differences(arch):
    model, tokens = double(arch), zoo.tokens(2, 7)
    report = gradients(model, tokens, skip_first=False)
    depth, seen, eps = model.cfg.n_layers, {}, 1e-5
    tll.run(model, tokens, [tll.read(tll.site(model, i), seen, key=i) for i in range(depth + 1)])
    generator = torch.Generator().manual_seed(0)
    for layer in (0, depth - 1):
        output = (seen[layer + 1] - seen[layer]).double()
        # The last position has no next token, and its gradient is zero for that reason.
        output[:, -1] = 0
        along = lambda v, layer=layer: (
            (
                loss(model, tokens, [tll.patch(layer, lambda x: x + eps * v)])
                - loss(model, tokens, [tll.patch(layer, lambda x: x - eps * v)])
            ).detach()
            / (2 * eps)
        )
        # |g|^2 is the mean square of g's component along Gaussian directions.
        slope = slope_of(model, tokens, layer)
        v = torch.randn(slope.shape, generator=generator, dtype=torch.float64)
        assert torch.allclose(along(v), (slope * v).flatten(1).sum(1), rtol=1e-4, atol=1e-6)
        want = along(output) / (output.flatten(1).norm(dim=1) * slope.flatten(1).norm(dim=1))
        assert torch.allclose(report.cosine[:, layer], want, rtol=1e-3, atol=1e-6)


def test_random_directions_have_the_spread_of_their_dimension(model):
    report = gradients(model, zoo.tokens(8, 12), draws=50)
    low, high = report.bounds()
    want = 1.645 / (10 * 32) ** 0.5  # of a normal with variance 1 / dimensions: 0.092; the gradient is not spread evenly
    assert float(low.mean()) == pytest.approx(-want, rel=0.25) and float(high.mean()) == pytest.approx(want, rel=0.25)
    assert torch.equal(report.random, gradients(model, zoo.tokens(8, 12), draws=50).random)
    assert not torch.equal(report.random, gradients(model, zoo.tokens(8, 12), draws=50, seed=1).random)


def test_pads_do_not_count(model):
    tokens = zoo.tokens(2, 10)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    padded, alone = gradients(model, tll.Batch(tokens, mask)), gradients(model, tokens[1:, 4:])
    assert torch.allclose(padded.cosine[1], alone.cosine[0], atol=1e-4)
    assert alone.shuffled.isnan().all() and padded.shuffled.isfinite().all()


def test_parameters_get_no_gradients(model):
    gradients(model, zoo.tokens(1, 6))
    assert all(p.grad is None for p in model.parameters())


def test_gradients_are_there_inside_no_grad(model):
    plain = gradients(model, zoo.tokens(1, 6)).cosine
    with torch.no_grad():
        assert torch.allclose(gradients(model, zoo.tokens(1, 6)).cosine, plain)


def test_bad_input_is_refused_before_a_pass(model, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(module, "run", None)
        with pytest.raises(ValueError, match=r"there is no block 3: layer 3 is the final residual"):
            gradients(model, zoo.tokens(), layers=[0, -1])
        with pytest.raises(ValueError, match="expected different layers"):
            gradients(model, zoo.tokens(), layers=[])
        with pytest.raises(ValueError, match="no layer 7"):
            gradients(model, zoo.tokens(), layers=[7])
        with pytest.raises(ValueError, match="draws must be at least 1"):
            gradients(model, zoo.tokens(), draws=0)
    with pytest.raises(ValueError, match="no position has a next token"):
        gradients(model, zoo.tokens(3, 2))


def test_the_report_is_saved(tmp_path):
    report = gradients(zoo.build("gpt2", zoo.FEW_KINDS[0]), zoo.tokens(4, 8), layers=[0, 2], draws=2)
    folder = report.save(tmp_path / "out")
    assert {"result.csv", "cosine.svg"} <= {p.name for p in folder.iterdir()} and len(report.to_frame()) == 8
    assert report.layers == [0, 2] and "% " in str(report)

"""The coordinates in which Muon takes its steps: what they are, that a step there is a step there, and what they are for."""

import dataclasses

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses import files
from tl_lenses.fit.common import rows_for
from tl_lenses.fit.optim import Muon, map_sizes, optimizer_step, optimizers_of, rate_scales, set_scales
from tl_lenses.fit.settings import LR_POWER, MOMENTUM, Settings, default_lr
from tl_lenses.fit.start import regression_start
from tl_lenses.fit.step import head_of, loss_and_gradient, scored_pairs
from tl_lenses.fit.whiten import RIDGE, roots, whiten
from tl_lenses.moments import moments
from tl_lenses.tokens import Batch
from tl_lenses.unembed import Readout

KIND = zoo.FEW_KINDS[0]


def _states(rows=2, n=400, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rows, d, d, generator=generator)
    return torch.randn(rows, n, d, generator=generator) @ mix + 5 * torch.randn(rows, 1, d, generator=generator)


def _sources(x, y):
    return [moments(a[None], b[None]) for a, b in zip(x, y, strict=True)]


def test_the_root_is_the_second_moment_to_minus_a_quarter():
    x = _states()
    for row, root in enumerate(roots(_sources(x, x)).double()):
        s = x[row].T.double() @ x[row].double() / len(x[row])
        s += RIDGE * s.diagonal().mean() * torch.eye(6)
        assert torch.allclose(root, root.T, atol=1e-5) and torch.linalg.det(root) == pytest.approx(1, rel=1e-3)
        product = torch.linalg.matrix_power(root, 4) @ s
        assert torch.allclose(product / product.diagonal().mean(), torch.eye(6, dtype=torch.float64), atol=1e-3)
    assert torch.allclose(roots(_sources(x, x), power=0.0), torch.eye(6), atol=1e-5)


def test_states_of_one_direction_have_a_root():
    x = torch.randn(1, 50, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(6)
    assert roots(_sources(x, x)).isfinite().all()


@pytest.mark.parametrize("offload", [False, True])
def test_a_step_is_that_of_muon_on_the_other_map(offload):
    """W' held as such and stepped by the same optimisers, with decay, momentum and a scale."""
    generator = torch.Generator().manual_seed(3)
    x, rows, d = _states(), 2, 6
    p = roots(_sources(x, x))
    settings = Settings(lr=0.3, weight_decay=0.2, momentum=0.8)
    delta, biases = torch.randn(rows, d, d, generator=generator), torch.randn(rows, d, generator=generator)
    other = torch.stack([delta[i] @ torch.linalg.inv(p[i]) for i in range(rows)])
    begin = delta.clone()
    ours, naive = (
        ([torch.nn.Parameter(a) for a in maps], [torch.nn.Parameter(b) for b in biases.clone()]) for maps in (delta, other)
    )
    of_ours, of_naive = (optimizers_of(*leaves, settings) for leaves in (ours, naive))
    for optimizers in (of_ours, of_naive):
        set_scales(optimizers, [1.0, 0.3], [2.0, 1.0], 0.2)
    for rate in (0.3, 0.2, 0.1):
        grad_w, grad_b = torch.randn(rows, d, d, generator=generator), torch.randn(rows, d, generator=generator)
        for i in range(rows):  # h' = P h, so dL/dW' = sum g h'^T
            naive[0][i].grad, naive[1][i].grad = grad_w[i] @ p[i].T, grad_b[i].clone()
        whiten(grad_w, p)
        for i in range(rows):
            ours[0][i].grad, ours[1][i].grad = grad_w[i], grad_b[i]
        optimizer_step(of_naive, rate)
        optimizer_step(of_ours, rate, torch.device("cpu") if offload else None, p)
    for i in range(rows):
        # Newton-Schulz in bf16, of gradients that differ in the last bit
        assert torch.allclose(ours[0][i], naive[0][i] @ p[i], atol=2e-3)
        assert torch.equal(ours[1][i], naive[1][i])
    assert torch.equal(torch.stack([leaf.data for leaf in ours[0]]), delta)  # views of the buffer still
    assert (delta - begin).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(40, 40), (24, 40), (40, 24)])
def test_without_bf16_hardware_muon_steps_as_torch_does(shape, monkeypatch):
    """Sums in another order may round a number of the orthogonalisation to its neighbour in bf16."""
    monkeypatch.setattr("tl_lenses.fit.optim.has_bfloat16", lambda device: False)
    generator = torch.Generator().manual_seed(0)
    begin = torch.randn(shape, generator=generator)
    options = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9}
    ours, theirs = (torch.nn.Parameter(begin.clone()) for _ in range(2))
    steppers = Muon([ours], **options), torch.optim.Muon([theirs], nesterov=True, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(3):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        for stepper in steppers:
            stepper.step()
        assert (ours - theirs).norm() < 0.01 * (theirs - begin).norm()
    assert torch.equal(*(stepper.state_dict()["state"][0]["momentum_buffer"] for stepper in steppers))


def test_a_step_that_breaks_leaves_the_map(monkeypatch):
    x, delta = _states(rows=1), torch.randn(1, 6, 6)
    leaves = [torch.nn.Parameter(delta[0])], [torch.nn.Parameter(torch.zeros(6))]
    optimizers = optimizers_of(*leaves, Settings(lr=1.0, weight_decay=0.0, momentum=0.0))
    leaves[0][0].grad, before = torch.ones(6, 6), delta.clone()

    def breaking(self, *args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Muon, "step", breaking)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer_step(optimizers, 1.0, None, roots(_sources(x, x)))
    assert torch.equal(leaves[0][0].data, before[0]) and torch.equal(delta, before)


def test_a_far_mean_of_the_states_matters_less(unchecked):
    """Adding a constant to every state changes nothing that a bias does not undo; in plain coordinates it changes every step."""
    model, tokens = zoo.build("gpt2", KIND), zoo.tokens(8, 12)
    d, rows, readout = model.cfg.d_model, rows_for(model, [1]), Readout(model)
    head = head_of(readout, "float32")
    pairs = scored_pairs(model, Batch(tokens), rows, [], True, 0, "kl", readout)
    used = pairs.states[0].reshape(-1, d)[pairs.at]
    away = 30 * used.std() * torch.randn(d, generator=torch.Generator().manual_seed(0))

    def fitted(shift, white):
        there = dataclasses.replace(pairs, states=[pairs.states[0] + shift])
        delta, biases = torch.zeros(1, d, d), -shift[None].clone()
        leaves = [torch.nn.Parameter(delta[0])], [torch.nn.Parameter(biases[0])]
        lr = default_lr("muon", d)
        optimizers = optimizers_of(*leaves, Settings(lr=lr, weight_decay=0.0, momentum=0.7))
        p = roots(_sources((used + shift)[None], used[None])) if white else None
        for _ in range(4):
            grad_w, grad_b = torch.zeros_like(delta), torch.zeros_like(biases)
            loss = loss_and_gradient(there, delta, biases, head, grad_w, grad_b)
            if p is not None:
                whiten(grad_w, p)
            leaves[0][0].grad, leaves[1][0].grad = grad_w[0], grad_b[0]
            optimizer_step(optimizers, lr, None, p)
        return loss.item() / len(there)

    plain, ours = (fitted(away, white) / fitted(torch.zeros(d), white) for white in (False, True))
    assert ours < 1.1 and plain > 1.5, (plain, ours)


def test_a_fit_takes_its_steps_there(unchecked):
    """One step of `fit_tuned` against Muon on W', which is held here as such."""
    model, tokens = zoo.build("gpt2", KIND), zoo.tokens(40, 20)
    d, rows, readout = model.cfg.d_model, rows_for(model, None), Readout(model)
    got = tll.fit_tuned(model, [tokens], steps=1, init_tokens=600, precision="float32", clip=None, weight_decay=0.0)
    delta, biases, sources = regression_start(model, [Batch(tokens)], rows, [], True)
    p, grad_w, grad_b = roots(sources), torch.zeros_like(delta), torch.zeros_like(biases)
    pairs = scored_pairs(model, Batch(tokens), rows, [], True, 0, "kl", readout)
    losses = loss_and_gradient(pairs, delta, biases, head_of(readout, "float32"), grad_w, grad_b) / len(pairs)
    leaves = [torch.nn.Parameter(x @ torch.linalg.inv(root)) for x, root in zip(delta, p, strict=True)]
    bias_leaves = [torch.nn.Parameter(b) for b in biases]
    settings = Settings(weight_decay=0.0, momentum=MOMENTUM["muon"]).at_width(d)
    optimizers = optimizers_of(leaves, bias_leaves, settings)
    sizes = map_sizes(delta)
    set_scales(optimizers, rate_scales(losses.tolist(), LR_POWER["muon"], sizes), sizes, 0.0)
    for i, (leaf, bias) in enumerate(zip(leaves, bias_leaves, strict=True)):
        leaf.grad, bias.grad = grad_w[i] @ p[i].T / len(pairs), grad_b[i] / len(pairs)
    optimizer_step(optimizers, settings.lr)
    for i, leaf in enumerate(leaves):
        step = leaf.detach() @ p[i] - delta[i]
        assert (got.delta[i] - delta[i] - step).norm() < 0.01 * step.norm(), i


def test_only_muon_from_a_regression_has_them(unchecked, tmp_path):
    model, tokens = zoo.build("gpt2", KIND), zoo.tokens(40, 20)
    for settings, there in (
        ({}, True), ({"optimizer": "sgd"}, False), ({"init": "identity"}, False), ({"bias_only": True}, False),
    ):  # fmt: skip
        file = tmp_path / "-".join(["state", *map(str, settings.values())])
        seen = []

        def stop(entry, seen=seen):
            seen.append(entry)
            if len(seen) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tll.fit_tuned(model, tokens, steps=3, init_tokens=600, checkpoint=file, log=stop, **settings)
        p = files.load_state(file)["white"]
        assert (p is not None) == there
        assert p is None or p.shape == (model.cfg.n_layers, *[model.cfg.d_model] * 2)

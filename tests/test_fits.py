"""The contract that every fitter keeps, on a model whose truth is known exactly; and the tuned lens' own promises."""

import pytest
import torch
import zoo
from test_lens import _random

import tl_lenses as tll
from tl_lenses import edits, solve
from tl_lenses.checkpoint import Notice, previous_of
from tl_lenses.fit.common import rows_for
from tl_lenses.fit.regression import from_moments, gather
from tl_lenses.fit.tuned import fit_tuned

ONE_TOKEN = torch.arange(4, zoo.D_VOCAB)[:, None]  # sequences of one token: every block is affine in the residual


def _regression(model, tokens, **kwargs):
    return tll.fit_regression(model, tokens, ridge=0.0, **kwargs)


def _tuned(model, tokens, **kwargs):
    return tll.fit_tuned(model, [tokens], steps=400, init="identity", optimizer="adam", lr=0.1, clip=None, **kwargs)


# fit, tolerance of W and b, of the readout in nats: the tuned lens is as good as its optimiser (measured 0.018 at layer 0)
FITTERS = {"regression": (_regression, 1e-3, 1e-4), "tuned": (_tuned, None, 0.04)}


def _readout_gap(model, translators, layer, resid):
    """Mean KL from the model, of what the map says (nats)."""
    lens = tll.Lens(model, translators)
    weight, bias = (t.to(resid) for t in zoo.truth(model)[layer])
    truth = lens.readout(resid @ weight.T + bias).detach().double().log_softmax(-1)
    got = lens[layer](resid).detach().double().log_softmax(-1)
    return float((truth.exp() * (truth - got)).sum(-1).mean())


@pytest.mark.parametrize("kind", zoo.AFFINE_KINDS)
@pytest.mark.parametrize("name", FITTERS)
def test_contract(name, kind):
    fit, tolerance, readout_tolerance = FITTERS[name]
    model = zoo.affine_model(kind)
    truth = zoo.truth(model)
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    hooks = sum(len(p._forward_hooks) for p in model.hook_dict.values())
    weights = [p.detach().clone() for p in model.parameters()]
    got = fit(model, ONE_TOKEN, skip_first=False)
    resid = {}
    tll.run(model, ONE_TOKEN, [tll.read(i, resid) for i in range(3)])
    for layer in range(3):
        w, b = truth[layer]
        if tolerance is not None:
            assert torch.allclose(got[layer].weight.double(), w, atol=tolerance), layer
            assert torch.allclose(got[layer].bias.double(), b, atol=tolerance), layer
        x = resid[layer][:, 0]
        before = _readout_gap(model, None, layer, x)
        after = _readout_gap(model, got, layer, x)
        assert after < readout_tolerance < 1.0 < before, (layer, before, after)  # worse before fitting
    # leaves nothing behind
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags and not model.training
    assert sum(len(p._forward_hooks) for p in model.hook_dict.values()) == hooks
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    # says where it comes from
    assert got.meta["fitter"] == name and got.meta["tokens_seen"] > 0 and got.meta["basis"] in ("raw", "centered")
    assert not got.delta.requires_grad and got.delta.dtype == torch.float32
    # same seed, same result
    few = dict(tokens=ONE_TOKEN[:60], skip_first=False)
    again = [
        fit_tuned(model, steps=3, init="identity", **few) if name == "tuned" else _regression(model, **few)
        for _ in range(2)
    ]
    assert torch.equal(again[0].delta, again[1].delta) and torch.equal(again[0].biases, again[1].biases)


@pytest.mark.parametrize("kind", zoo.FEW_KINDS)
def test_the_last_layer_of_a_fitted_lens_is_the_model(kind):
    model = zoo.build("gpt2", kind)
    tokens = zoo.tokens(20, 16)
    for translators in (tll.fit_regression(model, tokens), tll.fit_tuned(model, tokens, steps=3, init="identity")):
        assert translators.basis == ("centered" if kind in ("processed", "ht-default") else "raw")
        traj = tll.trajectory(model, tll.Lens(model, translators), tokens[:2])
        with torch.no_grad():
            assert torch.equal(traj.top_ids[-1, ..., 0], model(tokens[:2]).argmax(-1))
        assert (traj.kl[-1] == 0).all()


# --- regression


def test_regression_does_not_depend_on_batches_and_shards_merge():
    model = zoo.build("gpt2", zoo.FEW_KINDS[0])
    tokens = zoo.tokens(24, 12)
    one = tll.fit_regression(model, [tokens])
    many = tll.fit_regression(model, [tokens[i : i + 5] for i in range(0, 24, 5)])
    assert torch.allclose(one.weights, many.weights, atol=1e-5)
    rows = rows_for(model, None)
    shards = [gather(model, tokens[i : i + 8], rows)[0] for i in (0, 8, 16)]
    merged = from_moments(model, sum(shards), rows)
    assert torch.allclose(one.weights, merged.weights, atol=1e-5) and merged.meta["tokens_seen"] == 24 * 11


def test_regression_equals_least_squares_in_float64():
    model = zoo.build("gpt2", zoo.FEW_KINDS[0])
    tokens = zoo.tokens(40, 12)
    resid = {}
    tll.run(model, tokens, [tll.read(tll.site(model, i), resid, key=i) for i in (1, 3)])
    x, y = (resid[i][:, 1:].flatten(0, 1).double() for i in (1, 3))  # real position 0 is left out and nothing else
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1).double()], 1), y).solution
    got = tll.fit_regression(model, tokens, layers=[1], ridge=0.0)[1]
    assert torch.allclose(got.weight.double(), solution[:-1].T, atol=1e-4)
    assert torch.allclose(got.bias.double(), solution[-1], atol=1e-4)


def test_regression_chooses_a_strength_per_layer_on_rows_set_aside():
    model = zoo.build("gpt2", zoo.FEW_KINDS[0])
    tokens = zoo.tokens(60, 12)
    batches = [tokens[i : i + 3] for i in range(0, 60, 3)]
    t = tll.fit_regression(model, batches, ridge=[1e-4, 1e-1, 1e3])
    chosen = t.meta["settings"]["ridge"]
    assert len(chosen) == 3 and set(chosen) <= {1e-4, 1e-1, 1e3} and chosen[-1] < 1e3
    same = tll.fit_regression(model, batches, ridge=chosen[0])
    assert torch.allclose(t[0].weight, same[0].weight, atol=1e-6)
    assert all(r > 0 for r in t.meta["r_squared"])


def test_regression_of_other_sites_and_targets():
    model = zoo.build("gpt2", zoo.FEW_KINDS[0])
    tokens = zoo.tokens(40, 12)
    heads = tll.fit_regression(model, tokens, layers=["blocks.1.attn.hook_z"], to="blocks.1.hook_attn_out", ridge=0.0)
    resid = {}
    tll.run(
        model,
        tokens,
        [
            tll.read("blocks.1.attn.hook_z", resid, key="z", fn=lambda x: x.flatten(2)),
            tll.read("blocks.1.hook_attn_out", resid, key="out"),
        ],
    )
    assert torch.allclose(heads["blocks.1.attn.hook_z"](resid["z"]), resid["out"], atol=1e-3)  # attn_out is linear in z
    z = "blocks.2.attn.hook_z"  # heads are flattened on the way into a lens too
    lens = tll.Lens(model, tll.fit_regression(model, tokens, layers=[z]))
    assert (
        tll.trajectory(model, lens, tokens[:2]).layers == (z, 3)
        and tll.evaluate(model, lens, tokens[:2]).rows[0]["layer"] == z
    )
    skip = tll.fit_regression(model, tokens, layers=[0, 1], to=2, method="shift")
    assert skip.rows[0] == ("blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre") and torch.equal(
        skip[0].weight, torch.eye(32)
    )
    turned = tll.fit_regression(model, tokens, layers=[1], method="procrustes")[1].weight
    assert torch.allclose(turned @ turned.T, torch.eye(32), atol=1e-4)


def test_hooks_and_masks_reach_a_fit():
    model = zoo.build("gpt2", zoo.FEW_KINDS[0])
    tokens = zoo.tokens(24, 12)
    plain = tll.fit_regression(model, tokens)
    hooked = tll.fit_regression(model, tokens, hooks=[tll.patch(2, edits.scale(0.5))])
    assert torch.allclose(plain[0].bias, plain[0].bias) and not torch.allclose(
        plain[0].weight, hooked[0].weight, atol=1e-2
    )
    padded = torch.cat([torch.full((24, 3), zoo.PAD), tokens], 1)
    mask = torch.cat([torch.zeros(24, 3), torch.ones(24, 12)], 1).long()
    masked = tll.fit_regression(model, tll.Batch(padded, mask))
    assert (
        torch.allclose(plain.weights, masked.weights, atol=1e-3)
        and masked.meta["tokens_seen"] == plain.meta["tokens_seen"]
    )


# --- tuned


def _naive_gradient(model, translators, tokens, loss="kl", shift=0):
    """Autograd through full logits, in float64 where it matters."""
    resid = {}
    teacher = tll.run(model, tokens, [tll.read(i, resid) for i in range(3)]).detach()
    translators.requires_grad_()
    lens = tll.Lens(model, translators)
    total = 0
    for i in range(3):
        logq = lens[i](resid[i][:, 1:]).log_softmax(-1)
        if loss == "kl":
            logp = teacher[:, 1:].log_softmax(-1)
            total = total + (logp.exp() * (logp - logq)).sum(-1).mean()
        else:
            total = total - logq[:, :-1].gather(-1, tokens[:, 2:, None]).mean()
    total.backward()
    return translators.delta.grad, translators.biases.grad


@pytest.mark.parametrize("arch", ["gpt2", "gemma2"])
@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_one_sgd_step_is_the_gradient(arch, loss):
    model = zoo.build(arch, zoo.FEW_KINDS[0])
    n = model.cfg.n_layers
    tokens = zoo.tokens(3, 12)
    start = _random(model)
    if n != 3:
        start = start.select([0, 1, 2])
    grad_w, grad_b = _naive_gradient(model, start.select([0, 1, 2]), tokens, loss)
    entries = []
    # one step at rate 1 without momentum, decay or clipping moves by minus the gradient; batches of 1 and 2 rows add up
    got = fit_tuned(model, [tokens[:1], tokens[1:]], steps=1, tokens_per_step=36, loss=loss, init=start, layers=[0, 1, 2], optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, clip=None, chunk_size=5, precision="float32", log=entries)  # fmt: skip
    assert torch.allclose(got.delta - start.delta.detach(), -grad_w, atol=2e-5) and grad_w.abs().max() > 1e-3
    assert torch.allclose(got.biases - start.biases.detach(), -grad_b, atol=2e-5)
    assert entries[0]["step"] == 1 and entries[0]["tokens"] == 36 and len(entries[0]["loss"]) == 3


@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adam"])
@pytest.mark.parametrize("init", ["identity", "regression"])
def test_training_lowers_the_loss(optimizer, init):
    model = zoo.build("gpt2", zoo.FEW_KINDS[0])
    tokens = zoo.tokens(120, 16)
    log = []
    t = tll.fit_tuned(model, tokens, steps=25, optimizer=optimizer, init=init, init_tokens=600, log=log)
    first, last = (sum(sum(e["loss"].values()) for e in part) / len(part) for part in (log[:3], log[-3:]))
    assert last < first
    logit = tll.evaluate(model, tll.Lens(model), tokens[:20])
    fitted = tll.evaluate(model, tll.Lens(model, t), tokens[:20])
    for layer in range(3):
        assert fitted.value("lens", layer) < logit.value("lens", layer)


def test_bias_only_layers_and_translators_as_start():
    model = zoo.build("gpt2", zoo.FEW_KINDS[0])
    tokens = zoo.tokens(32, 16)
    t = tll.fit_tuned(model, tokens, steps=4, bias_only=True, init="identity", layers=[1, "blocks.1.hook_resid_mid"])
    assert torch.equal(t.delta, torch.zeros_like(t.delta)) and t.biases.abs().sum() > 0
    assert t.sources == (1, "blocks.1.hook_resid_mid")
    assert tll.trajectory(model, tll.Lens(model, t), tokens[:1]).layers == (1, "blocks.1.hook_resid_mid", 3)
    again = tll.fit_tuned(model, tokens, steps=0, init=t, layers=[1, "blocks.1.hook_resid_mid"])
    assert torch.equal(again.delta, t.delta) and torch.equal(again.biases, t.biases)


def test_decay_pulls_to_the_identity():
    model = zoo.build("gpt2", zoo.FEW_KINDS[0])
    start = _random(model)
    settings = dict(steps=1, init=start, optimizer="sgd", lr=0.1, momentum=0.0, clip=None)
    with_decay, without = (tll.fit_tuned(model, zoo.tokens(4, 8), weight_decay=d, **settings) for d in (0.5, 0.0))
    assert torch.allclose(with_decay.delta, without.delta - 0.1 * 0.5 * start.delta, atol=1e-6)


def test_clips_are_per_layer_or_joint():
    model = zoo.build("gpt2", zoo.FEW_KINDS[0])
    settings = dict(steps=1, init="identity", optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, clip=0.01)
    norm = lambda t: (t.delta**2).sum((1, 2)) + (t.biases**2).sum(1)
    alone = norm(tll.fit_tuned(model, zoo.tokens(4, 8), **settings)).sqrt()
    joint = norm(tll.fit_tuned(model, zoo.tokens(4, 8), joint_clip=True, **settings))
    assert torch.allclose(alone, torch.full((3,), 0.01), rtol=1e-3)
    assert joint.sum().sqrt() == pytest.approx(0.01, rel=1e-3)


class _Stop(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, _Stop])
@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
def test_an_interrupted_fit_resumes_to_the_same_result(tmp_path, error, optimizer):
    model = zoo.build("gpt2", zoo.FEW_KINDS[0])
    tokens = zoo.tokens(40, 16)
    settings = dict(steps=9, optimizer=optimizer, init="identity", tokens_per_step=200)
    whole = tll.fit_tuned(model, tokens, **settings)
    file = tmp_path / "fit.safetensors"

    def stop(entry):
        if entry["step"] == 4:
            raise error

    with pytest.raises(error):
        tll.fit_tuned(model, tokens, checkpoint=file, log=stop, **settings)
    steps = []
    resumed = tll.fit_tuned(model, tokens, checkpoint=file, log=lambda e: steps.append(e["step"]), **settings)
    assert steps == [5, 6, 7, 8, 9]
    assert torch.equal(resumed.delta, whole.delta) and torch.equal(resumed.biases, whole.biases)
    assert resumed.meta["tokens_seen"] == whole.meta["tokens_seen"]
    done = tll.fit_tuned(model, tokens, checkpoint=file, log=lambda e: pytest.fail("it was finished"), **settings)
    assert torch.equal(done.delta, resumed.delta)
    with pytest.raises(ValueError, match=r"was made with lr=.*, now it is 0.5: use the same settings, or delete it"):
        tll.fit_tuned(model, tokens, checkpoint=file, lr=0.5, **settings)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.warns(Notice, match="is damaged .*: going on from .*previous, one earlier"):
        again = tll.fit_tuned(model, tokens, checkpoint=file, **settings)
    assert torch.equal(again.delta, whole.delta)
    for one in (file, previous_of(file)):
        one.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="is damaged"):
        tll.fit_tuned(model, tokens, checkpoint=file, **settings)


def test_refusals(unchecked):
    model = zoo.build("gpt2", zoo.FEW_KINDS[0])
    tokens = zoo.tokens(8, 16)
    cases = [
        (dict(loss="mse"), "loss must be"),
        (dict(optimizer="lion"), "optimizer must be one of"),
        (dict(init="random"), "init must be"),
        (dict(steps=-1), "must not be negative"),
        (dict(layers=[]), "empty list of layers"),
        (dict(layers=[1, 1]), "given twice"),
        (dict(layers=[3]), "is the target of the fit"),
        (dict(layers=["blocks.0.hook_nope"]), "no hook"),
        (
            dict(lr=float("nan"), optimizer="sgd", init="identity", clip=None, weight_decay=0.0),
            r"loss is not finite at step \d+ for 'blocks.*lower lr",
        ),
        (dict(tokens=iter([tokens]), steps=3, init="identity"), "one pass"),
        (dict(tokens=iter([tokens])), "one pass"),
        (dict(tokens=zoo.tokens(8, 1), init="identity"), "no position to train on"),
        (dict(tokens="text.txt"), "not token ids"),
        (
            dict(init_tokens=10, tokens=zoo.tokens(1, 8)),
            r"7 tokens are fewer than a covariance of width 32 needs \(at least 33\)",
        ),
    ]
    for kwargs, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            tll.fit_tuned(model, **{"tokens": tokens, "steps": 2, "init_tokens": 100, **kwargs})
    with pytest.raises(ValueError, match="7 tokens are fewer than a covariance of width 32"):
        tll.fit_regression(model, zoo.tokens(1, 8))
    with pytest.raises(ValueError, match="method must be"):
        tll.fit_regression(model, tokens, method="lasso")
    with pytest.raises(ValueError, match="at least 10 rows"):
        tll.fit_regression(model, tokens, ridge=[0.1, 1.0])
    assert solve.ridge  # public

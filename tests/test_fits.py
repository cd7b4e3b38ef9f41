"""The contract that every fitter keeps, on a model whose truth is known exactly; and the tuned lens' own promises."""

import functools

import numpy as np
import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses import edits, solve
from tl_lenses.files import Notice, previous_of
from tl_lenses.fit.common import rows_for
from tl_lenses.fit.regression import collect, maps_of
from tl_lenses.fit.settings import Settings
from tl_lenses.fit.tuned import fit_tuned

ONE_TOKEN = torch.arange(4, zoo.D_VOCAB)[:, None]  # sequences of one token: every block is affine in the residual


def _regression(model, tokens, **kwargs):
    return tll.fit_regression(model, tokens, ridge=0.0, **kwargs)


def _tuned(model, tokens, **kwargs):
    return tll.fit_tuned(model, [tokens], steps=400, init="identity", optimizer="adam", lr=0.1, clip=None, **kwargs)


# fit, tolerance of the readout in nats: the tuned lens is as good as its optimiser (measured 0.018 at layer 0)
FITTERS = {"regression": (_regression, 1e-4), "tuned": (_tuned, 0.04)}


def _readout_gap(model, translators, layer, resid):
    """Mean KL from the model, of what the map says (nats)."""
    lens = tll.Lens(model, translators)
    weight, bias = (t.to(resid) for t in zoo.truth(model)[layer])
    truth = lens.readout(resid @ weight.T + bias).detach().double().log_softmax(-1)
    got = lens[layer](resid).detach().double().log_softmax(-1)
    return float((truth.exp() * (truth - got)).sum(-1).mean())


@functools.cache
def _fitted(name, kind):
    """A fit, the truth about its model, and what was on the model before."""
    model = zoo.affine_model(kind)
    before = {
        "gradients": [(p.requires_grad, p.grad) for p in model.parameters()],
        "hooks": zoo.n_hooks(model),
        "weights": [p.detach().clone() for p in model.parameters()],
    }
    maps = FITTERS[name][0](model, ONE_TOKEN, skip_first=False)
    return model, maps, before


each_fitter = pytest.mark.parametrize("name", FITTERS)
each_kind = pytest.mark.parametrize("kind", zoo.AFFINE_KINDS)


@each_kind
def test_a_regression_finds_the_true_maps(kind):
    model, maps, _ = _fitted("regression", kind)
    for layer in range(3):
        weight, bias = zoo.truth(model)[layer]
        assert torch.allclose(maps[layer].weight.double(), weight, atol=1e-3), layer
        assert torch.allclose(maps[layer].bias.double(), bias, atol=1e-3), layer


@each_kind
@each_fitter
def test_a_fit_predicts_what_the_model_does(name, kind):
    model, maps, _ = _fitted(name, kind)
    resid = {}
    tll.run(model, ONE_TOKEN, [tll.read(i, resid) for i in range(3)])
    for layer in range(3):
        x = resid[layer][:, 0]
        before, after = (_readout_gap(model, m, layer, x) for m in (None, maps))
        assert after < FITTERS[name][1] < 1.0 < before, (layer, before, after)


@each_kind
@each_fitter
def test_a_fit_leaves_gradients_alone(name, kind):
    model, _, before = _fitted(name, kind)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == before["gradients"]


@each_kind
@each_fitter
def test_a_fit_leaves_no_hook(name, kind):
    model, _, before = _fitted(name, kind)
    assert zoo.n_hooks(model) == before["hooks"]


@each_kind
@each_fitter
def test_a_fit_changes_no_weight(name, kind):
    model, _, before = _fitted(name, kind)
    assert all(torch.equal(a, b) for a, b in zip(before["weights"], model.parameters(), strict=True))


@each_kind
@each_fitter
def test_a_fit_leaves_the_model_in_eval_mode(name, kind):
    assert not _fitted(name, kind)[0].training


@each_kind
@each_fitter
def test_a_fit_says_where_it_comes_from(name, kind):
    meta = _fitted(name, kind)[1].meta
    assert meta["fitter"] == name and meta["tokens_seen"] > 0 and meta["basis"] in ("raw", "centered")


@each_kind
@each_fitter
def test_a_fit_gives_frozen_maps_in_float32(name, kind):
    maps = _fitted(name, kind)[1]
    assert not maps.delta.requires_grad and maps.delta.dtype == torch.float32


@each_kind
@each_fitter
def test_the_same_fit_gives_the_same_maps(name, kind):
    model, few = zoo.affine_model(kind), dict(tokens=ONE_TOKEN[:60], skip_first=False)
    fit = lambda: fit_tuned(model, steps=3, init="identity", **few) if name == "tuned" else _regression(model, **few)
    first, second = fit(), fit()
    assert torch.equal(first.delta, second.delta) and torch.equal(first.biases, second.biases)


@each_fitter
def test_a_fit_in_inference_mode_gives_the_same_maps(model, name):
    tokens = zoo.tokens(20, 16)
    fit = lambda: fit_tuned(model, tokens, steps=3, init_tokens=200) if name == "tuned" else _regression(model, tokens)
    plain = fit()
    with torch.inference_mode():
        inside = fit()
    assert torch.equal(plain.delta, inside.delta) and not inside.delta.is_inference()


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


def test_regression_does_not_depend_on_batches(model):
    tokens = zoo.tokens(24, 12)
    single = tll.fit_regression(model, [tokens])
    many = tll.fit_regression(model, [tokens[i : i + 5] for i in range(0, 24, 5)])
    assert torch.allclose(single.weights, many.weights, atol=1e-5)


def test_moments_of_shards_add_up_to_the_regression_of_all(model):
    tokens = zoo.tokens(24, 12)
    single = tll.fit_regression(model, [tokens])
    rows = rows_for(model, None)
    merged = maps_of(model, sum(collect(model, tokens[i : i + 8], rows) for i in (0, 8, 16)))
    assert torch.allclose(single.weights, merged.weights, atol=1e-5) and merged.meta["tokens_seen"] == 24 * 11


def test_regression_equals_least_squares_in_float64(model):
    tokens = zoo.tokens(40, 12)
    resid = {}
    tll.run(model, tokens, [tll.read(tll.site(model, i), resid, key=i) for i in (1, 3)])
    x, y = (resid[i][:, 1:].flatten(0, 1).double() for i in (1, 3))  # real position 0 is left out and nothing else
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1).double()], 1), y).solution
    got = tll.fit_regression(model, tokens, layers=[1], ridge=0.0)[1]
    assert torch.allclose(got.weight.double(), solution[:-1].T, atol=1e-4)
    assert torch.allclose(got.bias.double(), solution[-1], atol=1e-4)


def test_regression_chooses_a_strength_per_layer_on_rows_set_aside(model):
    tokens = zoo.tokens(60, 12)
    batches = [tokens[i : i + 3] for i in range(0, 60, 3)]
    t = tll.fit_regression(model, batches, ridge=[1e-4, 1e-1, 1e3])
    chosen = t.meta["settings"]["ridge"]
    assert len(chosen) == 3 and set(chosen) <= {1e-4, 1e-1, 1e3} and chosen[-1] < 1e3
    same = tll.fit_regression(model, batches, ridge=chosen[0])
    assert torch.allclose(t[0].weight, same[0].weight, atol=1e-6)
    assert all(r > 0 for r in t.meta["r_squared"])


def test_regression_of_heads_onto_the_output_that_is_linear_in_them():
    model, tokens, resid = zoo.build("gpt2", zoo.FEW_KINDS[0]), zoo.tokens(40, 12), {}
    z, out = "blocks.1.attn.hook_z", "blocks.1.hook_attn_out"
    heads = tll.fit_regression(model, tokens, layers=[z], target_layer=out, ridge=0.0)
    tll.run(model, tokens, [tll.read(z, resid, key="z", fn=lambda x: x.flatten(2)), tll.read(out, resid, key="out")])
    assert torch.allclose(heads[z](resid["z"]), resid["out"], atol=1e-3)


def test_a_lens_of_heads_flattens_them_on_their_way():
    model, tokens, z = zoo.build("gpt2", zoo.FEW_KINDS[0]), zoo.tokens(40, 12), "blocks.2.attn.hook_z"
    lens = tll.Lens(model, tll.fit_regression(model, tokens, layers=[z]))
    assert tll.trajectory(model, lens, tokens[:2]).layers == (z, 3)
    assert tll.evaluate(model, lens, tokens[:2]).rows[0]["layer"] == z


def test_a_shift_keeps_the_weights_of_the_identity():
    skip = tll.fit_regression(zoo.build("gpt2", zoo.FEW_KINDS[0]), zoo.tokens(40, 12), [0, 1], target_layer=2, method="shift")
    assert skip.rows[0] == ("blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre")
    assert torch.equal(skip[0].weight, torch.eye(32))


def test_procrustes_is_a_rotation(model):
    tokens = zoo.tokens(40, 12)
    turned = tll.fit_regression(model, tokens, layers=[1], method="procrustes")[1].weight
    assert torch.allclose(turned @ turned.T, torch.eye(32), atol=1e-4)


def test_hooks_reach_a_fit(model):
    tokens = zoo.tokens(24, 12)
    plain, hooked = (tll.fit_regression(model, tokens, hooks=hooks) for hooks in ([], [tll.patch(2, edits.scale(0.5))]))
    for part in ("weight", "bias"):  # the hook is after the sources 0 and 1, and before their target
        before, after = (getattr(maps[0], part) for maps in (plain, hooked))
        assert before.isfinite().all() and not torch.allclose(before, after, atol=1e-2), part


def test_masked_positions_are_not_fitted(model):
    tokens = zoo.tokens(24, 12)
    padded = torch.cat([torch.full((24, 3), zoo.PAD), tokens], 1)
    mask = torch.cat([torch.zeros(24, 3), torch.ones(24, 12)], 1).long()
    plain, masked = (tll.fit_regression(model, text) for text in (tokens, tll.Batch(padded, mask)))
    assert torch.allclose(plain.weights, masked.weights, atol=1e-3) and masked.meta["tokens_seen"] == plain.meta["tokens_seen"]


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
    start = zoo.random_maps(model)
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
def test_training_lowers_the_loss(model, optimizer, init):
    tokens = zoo.tokens(120, 16)
    log = []
    t = tll.fit_tuned(model, tokens, steps=25, optimizer=optimizer, init=init, init_tokens=600, log=log)
    first, last = (sum(sum(e["loss"].values()) for e in part) / len(part) for part in (log[:3], log[-3:]))
    assert last < first
    logit = tll.evaluate(model, tll.Lens(model), tokens[:20])
    fitted = tll.evaluate(model, tll.Lens(model, t), tokens[:20])
    for layer in range(3):
        assert fitted.value("lens", layer) < logit.value("lens", layer)


def test_bias_only_keeps_the_identity_at_every_site(model):
    tokens = zoo.tokens(32, 16)
    t = tll.fit_tuned(model, tokens, steps=4, bias_only=True, init="identity", layers=[1, "blocks.1.hook_resid_mid"])
    assert torch.equal(t.delta, torch.zeros_like(t.delta)) and t.biases.abs().sum() > 0
    assert t.sources == (1, "blocks.1.hook_resid_mid")
    assert tll.trajectory(model, tll.Lens(model, t), tokens[:1]).layers == (1, "blocks.1.hook_resid_mid", 3)


def test_translators_are_a_start():
    model, tokens, layers = zoo.build("gpt2", zoo.FEW_KINDS[0]), zoo.tokens(32, 16), [1, "blocks.1.hook_resid_mid"]
    t = tll.fit_tuned(model, tokens, steps=1, bias_only=True, init="identity", layers=layers)
    again = tll.fit_tuned(model, tokens, steps=0, init=t, layers=layers)
    assert torch.equal(again.delta, t.delta) and torch.equal(again.biases, t.biases)


def test_decay_pulls_to_the_identity(model):
    start = zoo.random_maps(model)
    settings = dict(steps=1, init=start, optimizer="sgd", lr=0.1, momentum=0.0, clip=None)
    with_decay, without = (tll.fit_tuned(model, zoo.tokens(4, 8), weight_decay=d, **settings) for d in (0.5, 0.0))
    assert torch.allclose(with_decay.delta, without.delta - 0.1 * 0.5 * start.delta, atol=1e-6)


def test_clips_are_per_layer_or_joint(model):
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
def test_an_interrupted_fit_resumes_to_the_same_result(model, tmp_path, error, optimizer):
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
    for damaged in (file, previous_of(file)):
        damaged.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="is damaged"):
        tll.fit_tuned(model, tokens, checkpoint=file, **settings)


def test_refusals(model, unchecked):
    tokens = zoo.tokens(8, 16)
    cases = [
        (dict(loss="mse"), "loss must be"),
        (dict(optimizer="lion"), "optimizer must be 'muon', 'sgd' or 'adam', got 'lion'"),
        (dict(init="random"), "init must be"),
        (dict(steps=-1), "steps must be at least 0, got -1"),
        (dict(layers=[]), "empty list of layers"),
        (dict(layers=[1, 1]), "given twice"),
        (dict(layers=[3]), "is the target of the fit"),
        (dict(layers=["blocks.0.hook_nope"]), "no hook"),
        (
            dict(lr=1e38, optimizer="sgd", init="identity", clip=None, weight_decay=0.0, steps=4),
            r"loss is not finite at step \d+ for 'blocks.*lower lr",
        ),
        (dict(tokens=iter([tokens]), steps=3, init="identity"), "one pass"),
        (dict(tokens=iter([tokens])), "one pass"),
        (dict(tokens=zoo.tokens(8, 1), init="identity"), "no position to train on"),
        (dict(tokens="text.txt"), "not token ids"),
        (dict(init_tokens=10, tokens=zoo.tokens(1, 8)), r"7 tokens are fewer than a covariance of width 32 needs \(at least 33\)"),
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


def test_a_target_layer_under_its_old_name_is_the_same(model):
    tokens = zoo.tokens(20, 12)
    new = tll.fit_regression(model, tokens, layers=[1], target_layer=2)
    with pytest.warns(DeprecationWarning, match=r"fit_regression\(target_layer=2\)"):
        old = tll.fit_regression(model, tokens, layers=[1], to=2)
    assert old.rows == new.rows and torch.equal(old.delta, new.delta)


def test_a_target_layer_under_both_names_is_refused(model):
    with pytest.raises(TypeError, match="got both to= and target_layer="):
        tll.fit_regression(model, zoo.tokens(), to=2, target_layer=2)


def test_held_out_text_scores_a_regression():
    model, tokens, heldout = zoo.build("gpt2", zoo.FEW_KINDS[0]), zoo.tokens(40, 12), zoo.tokens(5, 12, seed=9)
    whole, scored = tll.fit_regression(model, tokens), tll.fit_regression(model, tokens, held_out=heldout)
    assert torch.equal(whole.delta, scored.delta) and "held_out" not in whole.meta
    resid, held_out = {}, scored.meta["held_out"]
    tll.run(model, heldout, [tll.read(tll.site(model, i), resid, key=i) for i in (1, 3)])
    x, y = (resid[i][:, 1:].flatten(0, 1).double() for i in (1, 3))
    errors = (y - scored[1](x.float()).double()) ** 2
    expected = 1 - errors.sum() / ((y - y.mean(0)) ** 2).sum()
    assert held_out["tokens"] == 55 and held_out["r_squared"][1] == pytest.approx(float(expected), abs=1e-4)
    groups = tll.fit_regression(model, tokens, held_out=heldout, layers_at_once=1)
    assert groups.meta["held_out"] == held_out


# --- the range of every number


RANGES = {
    "steps": ([0, 3], [-1, 3.0, None, float("nan"), True, "soon"]),
    "tokens_per_step": ([1, None], [0, -5, 1.5, True]),
    "lr": ([1e-4, 1, None], [0, 0.0, -1, float("nan"), float("inf"), True, "fast"]),
    "weight_decay": ([0, 0.1, None], [-0.1, float("nan"), True]),
    "momentum": ([0, 0.9, None], [-0.1, 1, 1.0, 2, float("nan"), True]),
    "lr_power": ([0, 1, None], [-1, float("nan"), True]),
    "clip": ([0.1, 1, None], [0, -1, float("nan"), True]),
    "subsample": ([0.1, 1], [0, 1.5, -1, None, float("nan"), True]),
    "token_shift": ([-1, 0, 2, None], [0.5, True]),
    "seed": ([0, -1, 7], [None, 0.5, True, 2**60]),
    "chunk_size": ([1, None], [0, -1, 2.5, True]),
    "init_tokens": ([1, None], [0, -1, True]),
    "held_out_every": ([1, 9], [0, -1, None, True]),
    "patience": ([1, 9], [0, None, True]),
    "checkpoint_every": ([1, 9], [0, -1, None, True]),
    "layers_at_once": ([1, 9, None], [0, -1, 1.5, True]),
    "bias_only": ([True, False], [1, None, "yes"]),
}


@pytest.mark.parametrize("name", RANGES)
def test_the_range_of_a_setting(name, unchecked):
    right, wrong = RANGES[name]
    for value in right:
        made = getattr(Settings(**{name: value}), name)
        assert made == value or value is None
        if isinstance(value, int) and not isinstance(value, bool):
            for kind in (np.int64, np.int32, torch.tensor):
                again = getattr(Settings(**{name: kind(value)}), name)
                assert again == value and type(again) in (int, float)
    for value in wrong:
        with pytest.raises((ValueError, TypeError), match=name):
            Settings(**{name: value})


def test_every_number_of_the_settings_has_a_range_here():
    words = {"loss", "init", "optimizer", "precision", "vocabulary"}
    flags = {"lr_search", "skip_first", "joint_clip", "offload", "held_out", "guard"}
    assert set(vars(Settings())) - words - flags == set(RANGES)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("ridge", [-1, float("nan"), True, "strong", [0.1, -1]]),
        ("limit_tokens", [0, -1, 1.5, True]),
        ("checkpoint_every", [0, 1.5, True]),
        ("layers_at_once", [0, 1.5, True]),
        ("held_out", [-0.1, 0.6, 1.0, True, float("nan")]),
    ],
)
def test_the_ranges_of_a_regression(name, wrong, unchecked):
    for value in wrong:
        with pytest.raises((ValueError, TypeError), match=name):
            tll.fit_regression(zoo.build("gpt2", zoo.FEW_KINDS[0]), zoo.tokens(20, 8), **{name: value})


def test_a_step_count_of_any_integer_type_ends(model, unchecked):
    for steps in (np.int64(2), torch.tensor(2)):
        log = []
        tll.fit_tuned(model, zoo.tokens(8, 8), steps=steps, init="identity", log=log)
        assert len(log) == 2


# --- checkpoints of another model or text, and disks that are full


FITS = {"tuned": dict(steps=2, init="identity", checkpoint_every=1), "regression": dict(checkpoint_every=1)}


def _noted(name, folder, model, note):
    """A fit with a checkpoint, whose text is called as the note says."""
    fit = {"tuned": tll.fit_tuned, "regression": tll.fit_regression}[name]
    return fit(model, zoo.tokens(24, 12), checkpoint=folder / "state", note=note, **FITS[name])


@each_fitter
def test_a_checkpoint_goes_on_with_its_text(model, name, tmp_path):
    whole, again = (_noted(name, tmp_path, model, {"data": "a.txt", "seq_len": 12}) for _ in range(2))
    assert torch.equal(again.delta, whole.delta)


@each_fitter
def test_a_checkpoint_refuses_another_text(model, name, tmp_path):
    _noted(name, tmp_path, model, {"data": "a.txt", "seq_len": 12})
    with pytest.raises(ValueError, match="was made with data='a.txt', now it is 'b.txt': use the same settings"):
        _noted(name, tmp_path, model, {"data": "b.txt", "seq_len": 12})


@each_fitter
def test_a_checkpoint_refuses_another_model(model, name, tmp_path):
    _noted(name, tmp_path, model, {"data": "a.txt"})
    other = zoo.copied(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.3)
    with pytest.raises(ValueError, match="is of another model: it was made with .* now it is .*use the same model"):
        _noted(name, tmp_path, other, {"data": "a.txt"})


@each_fitter
def test_a_note_that_is_no_json_is_refused(model, name, tmp_path, unchecked):
    with pytest.raises(TypeError, match="note must be a dict of JSON values"):
        _noted(name, tmp_path, model, {"data": object()})


def test_a_fit_that_ends_early_on_a_full_disk_keeps_its_translators(model, tmp_path):
    tokens = zoo.tokens(24, 12)
    (tmp_path / "file").write_text("in the way")
    settings = dict(init="identity", checkpoint=tmp_path / "file" / "state")

    def stop(entry):
        if entry["step"] == 3:
            raise KeyboardInterrupt

    with pytest.warns(Notice, match="could not be written"), pytest.raises(KeyboardInterrupt) as raised:
        tll.fit_tuned(model, tokens, steps=5, log=stop, **settings)
    kept = raised.value.translators
    assert kept.n_layers == 3 and kept.delta.abs().max() > 0 and kept.meta["tokens_seen"] > 0
    with pytest.warns(Notice, match="could not be written"):
        whole = tll.fit_tuned(model, tokens, steps=5, **settings)
    assert torch.equal(whole.delta, tll.fit_tuned(model, tokens, steps=5, init="identity").delta)

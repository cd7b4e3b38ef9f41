"""The last row is the model, on every architecture and surface; patches do what they say; files are for one model."""

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses import edits
from tl_lenses.identity import basis_of, fingerprint, is_centered, same_model
from tl_lenses.translators import Translators
from tl_lenses.unembed import Readout

TOKENS = zoo.tokens(2, 10)


# --- the architecture matrix


every_surface = pytest.mark.parametrize("arch,kind", zoo.cases())


@every_surface
@torch.no_grad()
def test_the_last_row_is_the_model_bit_for_bit(arch, kind):
    model, seen = zoo.build(arch, kind), {}
    n, logits = model.cfg.n_layers, model(TOKENS)
    assert torch.equal(tll.run(model, TOKENS, tll.Lens(model).hooks(seen, then=lambda z: z.clone())), logits)
    assert list(seen) == list(range(n + 1))
    assert torch.equal(seen[n], logits)
    assert (seen[n - 1] - logits).abs().max() > 1e-2


@every_surface
@torch.no_grad()
def test_a_patch_acts_from_its_position_on_in_every_layer(arch, kind):
    """A patch by the same value changes no bit; another one changes logits, and none before it."""
    model = zoo.build(arch, kind)
    sites, logits = [tll.site(model, i) for i in range(model.cfg.n_layers + 1)], model(TOKENS)
    assert torch.equal(tll.run(model, TOKENS, [tll.patch(s, lambda x: x, pos=[2, -1]) for s in sites]), logits)
    for s in sites:
        patched = tll.run(model, TOKENS, [tll.patch(s, edits.noise(3.0), pos=5)])
        assert (patched - logits)[:, 5:].abs().max() > 1e-3, s
        assert torch.equal(patched[:, :5], logits[:, :5]), s


@every_surface
@torch.no_grad()
def test_a_row_padded_on_the_left_is_the_row_alone(arch, kind):
    model = zoo.build(arch, kind)
    lens = tll.Lens(model)
    padded = torch.cat([torch.full((1, 3), zoo.PAD), TOKENS[:1, :7]], 1)
    mask = torch.tensor([[0] * 3 + [1] * 7, [1] * 10])
    single = tll.trajectory(model, lens, TOKENS[:1, :7])
    both = tll.trajectory(model, lens, torch.cat([padded, TOKENS[1:]]), attention_mask=mask)
    assert torch.allclose(both.entropy[:, :1, 3:], single.entropy, atol=1e-4)
    pads = [both.stats[name][:, 0, :3] for name in ("kl", "rank")]
    assert pads[0].isnan().all() and (pads[1] == -1).all() and (both.top_ids[:, 0, :3] == -1).all()


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_check_passes(kind):
    for arch in ("gpt2", "neox", "gemma2"):
        report = tll.check(zoo.build(arch, kind))
        assert report.ok, str(report)
    assert "last row" in str(report)


def test_check_fails_on_a_model_whose_unembedding_is_not_its_own():
    """The check can fail: a readout that drops the soft cap is caught."""
    model = zoo.build("gemma2", zoo.KINDS[0])
    original = Readout.transform
    Readout.transform = lambda self, logits: logits
    try:
        report = tll.check(model)
    finally:
        Readout.transform = original
    assert not report.ok and [c.name for c in report.checks if not c.passed] == ["the last row is the model (relative)"]


@pytest.mark.parametrize("kind", zoo.KINDS)
@torch.no_grad()
def test_bf16(kind):
    model = zoo.build("gpt2", kind, torch.bfloat16)
    lens = tll.Lens(model, zoo.random_maps(model))
    traj = tll.trajectory(model, lens, TOKENS)
    assert traj.kl.dtype == torch.float32 and traj.kl.isfinite().all() and (traj.kl[-1] == 0).all()
    assert tll.check(model).ok


# --- the lens


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_a_lens_is_the_readout_of_its_affine_map(kind):
    """Values and gradients."""
    model = zoo.build("gpt2", kind)
    t = zoo.random_maps(model)
    lens = tll.Lens(model, t)
    x = torch.randn(4, model.cfg.d_model, requires_grad=True)
    expected = zoo.readout(model, x @ t.weights[1].T + t.biases[1])
    assert torch.allclose(lens[1](x), expected, atol=1e-5)
    (grad,) = torch.autograd.grad(lens[1](x)[:, 3].sum(), x)
    (reference,) = torch.autograd.grad(expected[:, 3].sum(), x)
    assert torch.allclose(grad, reference, atol=1e-5) and grad.abs().max() > 0


def test_the_final_layer_of_any_lens_is_the_logit_lens():
    model = zoo.build("gpt2", zoo.KINDS[0])
    x = torch.randn(4, model.cfg.d_model)
    assert torch.equal(tll.Lens(model, zoo.random_maps(model))[-1](x), tll.Lens(model)[model.cfg.n_layers](x))


def test_a_layer_has_two_names():
    model, x = zoo.build("gpt2", zoo.KINDS[0]), torch.randn(4, 32)
    lens = tll.Lens(model, zoo.random_maps(model))
    assert torch.equal(lens["blocks.0.hook_resid_post"](x), lens[1](x))


@pytest.mark.parametrize("shape", [(32,), (2, 3, 32)])
def test_a_lens_takes_states_of_any_shape(shape):
    assert tll.Lens(zoo.build("gpt2", zoo.KINDS[0]))[0](torch.randn(shape)).shape == (*shape[:-1], zoo.D_VOCAB)


def test_the_logit_lens_reads_every_layer():
    assert tll.Lens(zoo.build("gpt2", zoo.KINDS[0])).layers == [0, 1, 2, 3]


def test_the_logit_lens_reads_every_site():
    assert tll.Lens(zoo.build("gpt2", zoo.KINDS[0]))["blocks.1.hook_attn_out"](torch.zeros(2, 32)).shape == (2, 320)


def test_a_fitted_lens_reads_what_was_fitted():
    model = zoo.build("gpt2", zoo.KINDS[0])
    lens = tll.Lens(model, zoo.random_maps(model).select([1]))
    assert lens.layers == [1, 3]
    for layer, error, message in ((0, KeyError, r"not fitted; fitted are \[1\]"), (9, ValueError, "no layer 9")):
        with pytest.raises(error, match=message):
            lens[layer]


def test_states_of_another_width_are_refused():
    model = zoo.build("gpt2", zoo.KINDS[0])
    for lens, shape in ((tll.Lens(model), (2, 16)), (tll.Lens(model, zoo.random_maps(model)), (2, 15))):  # 2 x 16 may be two heads
        with pytest.raises(ValueError, match=rf"width 32.*, got \[2, {shape[1]}\]"):
            lens[1](torch.zeros(shape))


@pytest.mark.parametrize("kind", zoo.KINDS)
@torch.no_grad()
def test_lens_hooks_do_not_fire_the_users_hooks(kind):
    model = zoo.build("gpt2", kind)
    calls, seen = [], {}
    ours = ("ln_final.hook_scale", lambda x, hook: calls.append(1))
    tll.run(model, TOKENS, [ours, *tll.Lens(model).hooks(seen, then=lambda z: z.argmax(-1))])
    assert calls == [1] and seen[0].shape == TOKENS.shape


# --- fingerprints and bases


def test_fingerprint_is_of_the_model_not_of_its_form():
    prints = {}
    for arch in ("gpt2", "neox", "llama", "gemma2"):
        forms = [fingerprint(zoo.build(arch, kind)) for kind in zoo.KINDS]
        for form in forms[1:]:
            assert same_model(forms[0], form)
            gap = (torch.tensor(form) - torch.tensor(forms[0])).abs().max() / torch.tensor(forms[0]).std()
            assert gap < 1e-4, gap
        half = fingerprint(zoo.build(arch, zoo.KINDS[0], torch.bfloat16))
        assert same_model(forms[0], half, torch.bfloat16)
        prints[arch] = forms[0]
    for a in prints:
        for b in prints:
            assert same_model(prints[a], prints[b], torch.bfloat16) == (a == b)


def test_basis_is_measured():
    for arch in ("gpt2", "neox", "llama", "gemma2"):
        for kind in zoo.KINDS:
            centred = kind in ("processed", "ht-default") and arch in ("gpt2", "neox")  # RMS models keep their mean
            assert basis_of(zoo.build(arch, kind)) == ("centered" if centred else "raw"), (arch, kind)
    assert is_centered(torch.tensor([[1.0, -1.0]])) and not is_centered(torch.tensor([[1.0, 1.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_basis_in_half_precision_is_not_taken_from_a_large_entry(dtype):
    """As in SmolLM2 and Gemma 3: beside an entry of hundreds the mean of a raw state is small. It is not by its length."""
    states = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    states[:, 3] = 400.0
    assert (states.mean(-1) / states.amax(-1)).abs().max() < 5e-3 and not is_centered(states.to(dtype))
    assert is_centered((states - states.mean(-1, keepdim=True)).to(dtype))
    for kind in zoo.FEW_KINDS:
        assert basis_of(zoo.build("gpt2", kind, dtype)) == ("raw" if kind == zoo.FEW_KINDS[0] else "centered")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lab-gpt2", "lab-gpt2-small"])
def test_trained_models_have_one_basis_in_every_type(name, dtype):
    """What the blocks of a trained model have written has a small mean: in half precision their raw stream was taken for a mixed one."""
    model = tll.lab.load(name, dtype=dtype)
    assert basis_of(model) == "raw"
    maps = zoo.random_maps(model, basis="raw", fingerprint=fingerprint(tll.lab.load(name)), model_dtype="float32")
    assert tll.Lens(model, maps).translators.basis == "raw"  # a lens of the float32 model
    if zoo.HAS_BRIDGE:
        model.enable_compatibility_mode(disable_warnings=True)
        assert basis_of(model) == "centered"


def test_a_stream_that_is_centred_behind_its_embedding_alone_takes_no_map_that_reads_a_mean():
    """BLOOM has a norm with a bias behind its embedding: processed, it is neither raw nor centred, and maps said other things there."""
    raw, mixed = (zoo.build("bloom", kind) for kind in zoo.FEW_KINDS)
    assert basis_of(raw) == "raw" and basis_of(mixed) == "mixed"
    mean = lambda model, layer: residual(model, layer).mean(-1).abs().max()
    assert mean(mixed, 0) > 0.05 and torch.allclose(residual(mixed, 3).mean(-1), residual(mixed, 0).mean(-1), atol=1e-5)
    fitted = {model: tll.fit_regression(model, zoo.tokens(16, 16), show_progress=False) for model in (raw, mixed)}
    for here, there in ((raw, mixed), (mixed, raw)):
        for check in ("strict", "warn"):
            with pytest.raises(ValueError, match=f"residual basis is {basis_of(there)} and not {basis_of(here)}"):
                tll.Lens(there, fitted[here], check=check)
    # maps that read no mean say the same everywhere
    w = fitted[raw].weights
    centred = Translators(fitted[raw].rows, w, fitted[raw].biases, n_layers=3, meta={**fitted[raw].meta, "basis": "centered"})
    lenses = [tll.Lens(model, centred) for model in (raw, mixed)]
    assert [lens.translators.basis for lens in lenses] == ["raw", "mixed"]
    logp = [lens[2](residual(lens.model, 2)).log_softmax(-1) for lens in lenses]
    assert torch.allclose(*logp, atol=1e-4)


def residual(model, layer):
    seen = {}
    tll.run(model, TOKENS, [tll.read(tll.site(model, layer), seen, key=0)])
    return seen[0]


def _raw_and_centred():
    raw = "bridge" if "bridge" in zoo.KINDS else "ht"
    centred = "processed" if "processed" in zoo.KINDS else "ht-default"
    return zoo.build("gpt2", raw), zoo.build("gpt2", centred)


def _maps_in_both():
    """Models in the raw and in the centred basis, and maps made for each."""
    models = _raw_and_centred()
    names = ("raw", "centered")
    return models, [zoo.random_maps(m, basis=name, fingerprint=fingerprint(m)) for m, name in zip(models, names, strict=True)]


@pytest.mark.parametrize("check", ["strict", "warn"])
def test_maps_of_the_raw_basis_are_refused_in_the_centred_one(check):
    (_, centred), (on_raw, _) = _maps_in_both()
    expected = "residual basis is centered and not raw: load the model with center_writing_weights=False"
    with pytest.raises(ValueError, match=expected):
        tll.Lens(centred, on_raw, check=check)


def test_maps_of_the_centred_basis_say_the_same_in_the_raw_one():
    (raw, centred), (_, on_centred) = _maps_in_both()
    converted = tll.Lens(raw, on_centred)
    assert converted.translators.basis == "raw"
    there, here = tll.trajectory(centred, tll.Lens(centred, on_centred), TOKENS), tll.trajectory(raw, converted, TOKENS)
    assert torch.allclose(there.kl, here.kl, atol=1e-3) and there.kl[0].mean() > 0.05


@pytest.mark.parametrize("which", ["biases alone", "made in a centred model"])
def test_raw_maps_that_read_no_mean_say_the_same_in_the_centred_basis(which):
    (raw, centred), (on_raw, on_centred) = _maps_in_both()
    eye = torch.eye(32).expand(3, 32, 32)
    maps = Translators(on_raw.rows, eye, on_raw.biases, n_layers=3, meta=on_raw.meta)
    maps = maps if which == "biases alone" else on_centred.to_raw()
    there, here = tll.Lens(centred, maps), tll.Lens(raw, maps)
    assert there.translators.basis == "centered"
    kls = [tll.trajectory(model, lens, TOKENS).kl for model, lens in ((centred, there), (raw, here))]
    assert torch.allclose(*kls, atol=1e-3)


def test_translators_of_another_model_are_refused():
    model, other = zoo.build("gpt2", zoo.KINDS[0]), zoo.build("neox", zoo.KINDS[0])
    theirs = zoo.random_maps(model, basis="raw", fingerprint=fingerprint(model), model="gpt2-tiny")
    assert tll.Lens(model, theirs)
    with pytest.raises(ValueError, match="fitted for 'gpt2-tiny' .*another fingerprint"):
        tll.Lens(other, theirs)
    with pytest.warns(UserWarning, match="another fingerprint"):
        tll.Lens(other, theirs, check="warn")
    wide = Translators(theirs.rows, torch.zeros(3, 16, 16), torch.zeros(3, 16), n_layers=3)
    for check in ("strict", "warn"):  # never another width
        with pytest.raises(ValueError, match=r"\(d_model 16, 3 layers\); this model is .*\(d_model 32, 3 layers\)"):
            tll.Lens(model, wide, check=check)
    inner = Translators([(tll.site(model, 0), tll.site(model, 2))], torch.zeros(1, 32, 32), torch.zeros(1, 32), n_layers=3)
    with pytest.raises(ValueError, match="maps into the final residual"):
        tll.Lens(model, inner)


def test_a_model_in_train_mode_is_refused():
    model = zoo.copied(zoo.build("gpt2", zoo.KINDS[0]))
    model.train()
    for call in (
        lambda: tll.Lens(model),
        lambda: tll.fit_regression(model, TOKENS),
        lambda: tll.fit_tuned(model, TOKENS),
        lambda: tll.check(model),
    ):
        with pytest.raises(ValueError, match=r"train mode.*call model.eval\(\)"):
            call()
    assert model.training  # not switched in silence


def test_quantised_weights_are_refused(unchecked):
    class Quantised:
        cfg = hook_dict = run_with_hooks = hooks = unembed = None
        training = False
        W_U = torch.zeros(2, 2, dtype=torch.int8)

    with pytest.raises(ValueError, match="expected a floating-point W_U, got torch.int8"):
        tll.Lens(Quantised())
    with pytest.raises(TypeError, match="expected a TransformerLens model .* got Linear without cfg"):
        tll.Lens(torch.nn.Linear(2, 2))


def test_a_lens_takes_the_path_of_saved_translators(tmp_path):
    model = zoo.build("gpt2", zoo.KINDS[0])
    translators = zoo.random_maps(model)
    folder = tmp_path / "lens"
    translators.save(folder)
    for path in (folder, str(folder)):
        assert torch.equal(tll.Lens(model, path)[1].affine.weight, tll.Lens(model, translators)[1].affine.weight)


def test_a_lens_says_what_it_takes(unchecked):
    model = zoo.build("gpt2", zoo.KINDS[0])
    for wrong, got in ((3, "a int"), ({}, "a dict"), (tll.Lens(model), "a Lens"), (torch.eye(2), "a Tensor")):
        with pytest.raises(TypeError, match=f"expected Translators, the path of saved ones or None .*, got {got}: fit some"):
            tll.Lens(model, wrong)
    with pytest.raises(TypeError, match="expected a TransformerLens model"):
        tll.Lens(None)


def test_the_repr_of_a_lens_is_one_short_line():
    model = zoo.build("gpt2", zoo.KINDS[0])
    assert "logit lens" in repr(tll.Lens(model))
    assert repr(tll.Lens(model)[1]) == "LayerLens(logit lens)"
    assert repr(tll.Lens(model, zoo.random_maps(model))[1]) == "LayerLens(W x + b, 32 -> 32)"

"""Lenses of other packages become our maps at the right layers, ours become their files, and what cannot be is refused with the reason."""

import json
import pickle
import warnings

import pytest
import torch
import zoo
from safetensors.torch import save_file

import tl_lenses as tll
from tl_lenses.files.foreign import read_foreign
from tl_lenses.files.hub import grouped
from tl_lenses.identity import unembedding_hash

D, N = zoo.D_MODEL, zoo.N_LAYERS
TOKENS = torch.randint(4, zoo.D_VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))


def random(*shape, seed=0, scale=0.1):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def raw_model():
    return zoo.build("gpt2", zoo.RAW_KINDS[0])


def write_tuned_lens(path, **config):
    """As `TunedLens.save` writes it (tuned_lens/nn/lenses.py)."""
    path.mkdir()
    state = {}
    for i in range(N):
        state[f"{i}.weight"], state[f"{i}.bias"] = random(D, D, seed=i), random(D, seed=10 + i)
    torch.save(state, path / "params.pt")
    usual = {"base_model_name_or_path": "tiny", "d_model": D, "num_hidden_layers": N, "bias": True, "base_model_revision": None, "unembed_hash": None, "lens_type": "linear_tuned_lens"}  # fmt: skip
    (path / "config.json").write_text(json.dumps(usual | config))
    return state


def jacobians(blocks=range(N - 1)):
    return {k: torch.eye(D) + random(D, D, seed=k) for k in blocks}


def write_jacobians(path, matrices=None, **more):
    """As `JacobianLens.save` of the reference package writes it."""
    matrices = jacobians() if matrices is None else matrices
    torch.save({"J": matrices, "n_prompts": 3, "source_layers": sorted(matrices), "d_model": D, **more}, path)
    return matrices


def quietly(load, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return load(*args, **kwargs)


# --- tuned-lens


def test_a_tuned_lens_of_that_package_has_the_same_layers(tmp_path):
    state = write_tuned_lens(tmp_path / "lens", base_model_revision="main")
    with pytest.warns(UserWarning, match=r"\(tuned-lens\) does not say on which text it was trained$"):
        lens = tll.Translators.load(tmp_path / "lens")
    assert lens.pairs == tuple((i, N) for i in range(N)) and lens.n_layers == N and lens.basis == "raw"
    for i in range(N):
        assert torch.equal(lens.delta[i], state[f"{i}.weight"]) and torch.equal(lens.biases[i], state[f"{i}.bias"])
    assert lens.meta["model"] == "tiny" and lens.meta["revision"] == "main" and lens.meta["fitter"] == "tuned"
    assert len(lens.meta["converted_from"]["sha256"]) == 64
    model, seen = raw_model(), {}
    tll.run(model, TOKENS, [tll.read(layer, seen) for layer in range(N)])
    read = tll.Lens(model, lens)
    for i in range(N):
        by_hand = read.readout(seen[i] + seen[i] @ state[f"{i}.weight"].T + state[f"{i}.bias"])
        assert torch.allclose(read[i](seen[i]), by_hand, atol=1e-5)


@pytest.mark.skipif(not zoo.HAS_HT, reason="the tuned-lens package imports beside TransformerLens 2 and 3 only")
@pytest.mark.parametrize("arch", ["gpt2", "neox", "llama"])
def test_logits_are_those_of_the_tuned_lens_package_both_ways(tmp_path, arch):
    tuned_lens = pytest.importorskip("tuned_lens")
    hf, model, seen = zoo.reference(arch), zoo.build(arch, zoo.RAW_KINDS[0]), {}
    theirs = tuned_lens.TunedLens.from_model(hf)
    with torch.no_grad():
        for i, layer in enumerate(theirs):
            layer.weight.copy_(random(D, D, seed=i))
            layer.bias.copy_(random(D, seed=i))
    theirs.save(tmp_path / "theirs")
    ours = quietly(tll.Lens, model, tmp_path / "theirs")
    assert ours.translators.meta["unembed_hash"] == unembedding_hash(model)
    tll.run(model, TOKENS, [tll.read(layer, seen) for layer in range(N)])
    for i in range(N):
        assert torch.allclose(ours[i](seen[i]), theirs(seen[i], i), atol=1e-5)
    ours.translators.export("tuned-lens", tmp_path / "back")
    back = tuned_lens.TunedLens.from_model_and_pretrained(hf, str(tmp_path / "back"))
    for i in range(N):
        assert torch.equal(back[i].weight, theirs[i].weight) and torch.equal(back[i].bias, theirs[i].bias)
    with pytest.raises(ValueError, match=r"another unembedding \(tuned-lens' hash of W_U\)"):
        quietly(tll.Lens, zoo.build("neox" if arch == "gpt2" else "gpt2", zoo.RAW_KINDS[0]), tmp_path / "theirs")


@pytest.fixture
def hashed(tmp_path):
    """A tuned lens of `raw_model`, and one of another unembedding."""
    for name, sha in (("right", unembedding_hash(raw_model())), ("wrong", "0" * 64)):
        write_tuned_lens(tmp_path / name, unembed_hash=sha)
    return tmp_path


def test_another_unembedding_is_refused(hashed):
    model = raw_model()
    quietly(tll.Lens, model, hashed / "right")
    with pytest.raises(ValueError, match=r"another unembedding .*check='warn'"):
        quietly(tll.Lens, model, hashed / "wrong")
    with pytest.warns(UserWarning, match="another unembedding"):
        tll.Lens(model, hashed / "wrong", check="warn")


def test_an_unembedding_that_may_be_folded_cannot_be_compared(hashed):
    folded = zoo.build("llama", "processed" if zoo.HAS_BRIDGE else "ht-default")
    with pytest.warns(UserWarning, match="cannot be compared"):
        tll.Lens(folded, hashed / "wrong")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s, c: s.pop("1.weight"), r"missing are \['1.weight'\]"),
        (lambda s, c: s.update({"9.bias": torch.zeros(D)}), r"\['9.bias'\] are too many"),
        (lambda s, c: s.update({"0.weight": torch.zeros(4, 4)}), r"0.weight has shape \[4, 4\], and config.json says width"),
        (lambda s, c: s.update({"0.weight": torch.full((D, D), torch.inf).half()}), "not finite .float16 holds numbers to 65,504"),
        (lambda s, c: s.update({"0.weight": torch.zeros(D, D, dtype=torch.long)}), "should hold floating point numbers"),
        (lambda s, c: c.pop("num_hidden_layers"), "config.json is not of tuned-lens: KeyError"),
        (lambda s, c: c.update(d_model="wide"), "config.json is not of tuned-lens: ValueError"),
    ],
)
def test_a_damaged_tuned_lens_is_refused_with_its_reason(tmp_path, change, message):
    path = tmp_path / "lens"
    state = write_tuned_lens(path)
    config = json.loads((path / "config.json").read_text())
    change(state, config)
    torch.save(state, path / "params.pt")
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        tll.Translators.load(path)
    assert str(path) in str(error.value)


class _Runs:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize("name", ["params.pt", "0_1.pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, capsys, name):
    write_tuned_lens(tmp_path / "lens")
    file = tmp_path / "lens" / name
    torch.save({"0.weight": _Runs()}, file) if name == "params.pt" else file.write_bytes(pickle.dumps({"0.weight": _Runs()}))
    with pytest.raises(ValueError, match="more than plain tensors, which reading it would run"):
        read_foreign(tmp_path / "lens" if name == "params.pt" else file)
    assert "this ran" not in capsys.readouterr().out


def test_what_is_no_pickle_is_refused(tmp_path):
    (tmp_path / "noise.pt").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="is damaged, or holds more than plain tensors"):
        tll.Translators.load(tmp_path / "noise.pt")


# --- Jacobian lenses


def test_the_jacobian_of_a_block_is_read_one_layer_later(tmp_path):
    matrices = write_jacobians(tmp_path / "lens.pt")
    with pytest.warns(UserWarning) as seen:
        lens = tll.Translators.load(tmp_path / "lens.pt", n_layers=N)
    text = str(seen[0].message)
    assert "which layer its maps end in" in text and "of which model it is; on which text it was fitted" in text
    assert lens.pairs == tuple((k + 1, N) for k in matrices) and not lens.biases.any()
    assert lens.meta["fitter"] == "jacobian" and lens.meta["n_prompts"] == 3
    for k, J in matrices.items():
        assert torch.allclose(lens[k + 1].weight, J, atol=1e-6)


PROVENANCE = {"model_id": "tiny", "dataset_id": "text", "skip_first": 16, "n_prompts": 3, "n_layers": N}


@pytest.mark.parametrize(
    "more, pairs, fitter",
    [
        ({"metadata": {"model_name": "tiny", "corpus": "text", "target_layer": N - 1, "estimator": "jacobian_lens"}}, [(1, N), (2, N)], "jacobian"),
        ({"provenance": PROVENANCE | {"target_layer": None}}, [(1, N), (2, N)], "jacobian"),
        ({"provenance": PROVENANCE | {"target_layer": N - 2, "method": "r-lens"}}, [(1, N - 1)], "relevance"),
        ({"provenance": {"config_json": json.dumps(PROVENANCE | {"target_layer": -2})}}, [(1, N - 1)], "jacobian"),
    ],
)  # fmt: skip
def test_what_a_file_says_of_its_target_is_believed(tmp_path, more, pairs, fitter):
    write_jacobians(tmp_path / "lens.pt", jacobians(range(len(pairs))), **more)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lens = tll.Translators.load(tmp_path / "lens.pt", n_layers=N)
    assert list(lens.pairs) == pairs and lens.meta["fitter"] == fitter and lens.meta["corpus"] == "text"
    if pairs[0][1] != N:  # a lens of another target is not one of the last
        with pytest.raises(ValueError, match="maps into the final residual"):
            tll.Lens(raw_model(), lens)


def test_a_target_that_nobody_says_is_no_guess(tmp_path):
    write_jacobians(tmp_path / "lens.pt", jacobians(range(N - 2)))  # as a penultimate lens without a record looks
    with pytest.raises(ValueError, match=f"Pass target_layer={N} .the final residual. or {N - 1}"):
        tll.Translators.load(tmp_path / "lens.pt", n_layers=N)
    assert quietly(tll.Translators.load, tmp_path / "lens.pt", n_layers=N, target_layer=N - 1).pairs == ((1, N - 1),)
    write_jacobians(tmp_path / "deep.pt", metadata={"target_layer": N - 1})
    with pytest.raises(ValueError, match="does not say how many layers the model has: pass n_layers="):
        tll.Translators.load(tmp_path / "deep.pt")
    with pytest.raises(ValueError, match=f"which is layer {N}, and target_layer=1 was asked for"):
        tll.Translators.load(tmp_path / "deep.pt", n_layers=N, target_layer=1)


def test_the_other_forms_of_jacobian_lenses(tmp_path):
    matrices = jacobians()
    about = {"model_name": "tiny", "corpus": "text", "n_layers": N, "target_layer": N - 1}
    sums = {"jacobian_sum": {k: 4 * J for k, J in matrices.items()}, "n_done": 4, "next_idx": 5, "source_layers": [0, 1], "target_layer": N - 1, "skip_first": 16}  # fmt: skip
    torch.save({**sums, "model_name": "tiny", "corpus": "text"}, tmp_path / "checkpoint.pt")
    torch.save({"parameters": {"jacobians": matrices}, "source_layers": [0, 1], "config": about}, tmp_path / "jpp.pt")
    save_file({f"jacobians.{k}": J for k, J in matrices.items()}, tmp_path / "named.safetensors")
    (tmp_path / "named.json").write_text(json.dumps(about))
    save_file(
        {"J": torch.stack([*matrices.values(), torch.eye(D)])},
        tmp_path / "stack.safetensors",
        metadata={"model": "tiny", "dataset": "text"},
    )
    for name in ("checkpoint.pt", "jpp.pt", "named.safetensors", "stack.safetensors"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lens = tll.Translators.load(tmp_path / name, n_layers=N)
        assert lens.pairs == ((1, N), (2, N)), name
        assert torch.allclose(lens.weights, torch.stack(list(matrices.values())), atol=1e-6), name
    torch.save({**sums, "n_done": 0}, tmp_path / "early.pt")
    with pytest.raises(ValueError, match="over 0 prompts has no mean yet"):
        tll.Translators.load(tmp_path / "early.pt", n_layers=N)
    save_file({"J": torch.stack(list(matrices.values()))}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="should end in the identity"):
        tll.Translators.load(tmp_path / "bare.safetensors", n_layers=N)


def test_a_format_is_told_by_what_is_in_the_file_and_not_by_its_name(tmp_path):
    matrices = write_jacobians(tmp_path / "pickled.pt")
    (tmp_path / "pickled.pt").rename(tmp_path / "lens.safetensors")
    save_file({f"jacobians.{k}": J for k, J in matrices.items()}, tmp_path / "stored.pt")
    for name in ("lens.safetensors", "stored.pt"):
        lens = quietly(tll.Translators.load, tmp_path / name, n_layers=N)
        assert torch.allclose(lens.weights, torch.stack(list(matrices.values())), atol=1e-6), name


@pytest.mark.parametrize("content", [lambda whole: whole[:-100], lambda whole: b"nothing of the kind"], ids=["cut", "text"])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    save_file({"jacobians.0": torch.eye(D)}, tmp_path / "whole")
    (tmp_path / "a.safetensors").write_bytes(content((tmp_path / "whole").read_bytes()))
    with pytest.raises(ValueError, match="a.safetensors: is damaged or no safetensors file"):
        tll.Translators.load(tmp_path / "a.safetensors", n_layers=N)


@pytest.mark.parametrize(
    "matrices, more, message",
    [
        ({0: torch.full((D, D), torch.inf).half(), 1: torch.eye(D)}, {}, "not finite .float16 holds numbers to 65,504"),
        ({0: torch.eye(D), 1: torch.eye(4)}, {}, "says d_model 32 and has matrices of"),
        (None, {"source_layers": [0, 1, 2]}, r"says source_layers \[0, 1, 2\] and has matrices of \[0, 1\]"),
        ({}, {}, "holds no matrix"),
        (None, {"metadata": {"n_layers": 9, "target_layer": 8}}, "of a model with 9 layers, and n_layers=3 was asked for"),
    ],
)
def test_a_damaged_jacobian_lens_is_refused_with_its_reason(tmp_path, matrices, more, message):
    write_jacobians(tmp_path / "lens.pt", matrices, **more)
    with pytest.raises(ValueError, match=message):
        tll.Translators.load(tmp_path / "lens.pt", n_layers=N)


@pytest.mark.skipif(zoo.TL_VERSION < (4, 3), reason="JacobianLens came with TransformerLens 4.3")
@pytest.mark.parametrize("arch", ["gpt2", "gemma2"])
def test_readouts_are_those_of_transformer_lens(tmp_path, arch):
    from transformer_lens.tools.analysis import JacobianLens

    model = zoo.build(arch, "bridge")
    depth = model.cfg.n_layers
    theirs = JacobianLens(jacobians(range(depth - 1)), n_prompts=3, d_model=D)
    theirs.save(str(tmp_path / "lens.pt"), dtype=torch.float32)
    result = theirs.readout(model, TOKENS[:1], return_full_logits=True)
    seen = {}
    tll.run(model, TOKENS[:1], [tll.read(layer, seen) for layer in range(1, depth)])
    for lens in (quietly(tll.Lens, model, theirs), quietly(tll.Lens, model, tmp_path / "lens.pt")):
        for k in range(depth - 1):
            assert torch.allclose(lens[k + 1](seen[k + 1])[0], result.lens_logits[k], atol=1e-5)
    out = lens.translators.export("jacobian-lens", tmp_path / "out")
    back = JacobianLens.load(str(out))
    assert back.source_layers == theirs.source_layers
    for k in back.source_layers:
        assert torch.allclose(back.jacobians[k], theirs.jacobians[k], atol=1e-6)


class Live:
    """What a `JacobianLens` has, of TransformerLens or of the jacobian-lens package, whose own has no metadata."""

    def __init__(self, matrices, **more):
        self.jacobians, self.n_prompts, self.d_model = matrices, 3, D
        vars(self).update(more)


def test_a_live_lens_is_read_as_its_file_is(tmp_path):
    matrices = write_jacobians(tmp_path / "lens.pt")
    live, file = (quietly(tll.Translators.load, place, n_layers=N) for place in (Live(matrices), tmp_path / "lens.pt"))
    assert live.pairs == file.pairs and torch.equal(live.delta, file.delta) and live.meta["n_prompts"] == 3
    says = {"model_name": "tiny", "corpus": "text", "target_layer": N - 2, "estimator": "relevance"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shallow = tll.Translators.load(Live(jacobians([0]), metadata=says), n_layers=N)
    assert shallow.pairs == ((1, N - 1),) and shallow.meta["fitter"] == "relevance"
    for wrong, message in (
        ({0: torch.full((D, D), torch.inf).half(), 1: torch.eye(D)}, "this Live: the matrix of layer 1 has numbers that are not finite"),
        ({0: torch.eye(D), 1: torch.eye(4)}, "this Live: .*should have shape"),
        ({0: "J", 1: torch.eye(D)}, "this Live: expected a matrix per block"),
        ({}, "this Live: holds no matrix"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            quietly(tll.Lens, raw_model(), Live(wrong))


def test_the_slot_of_the_target_itself_is_the_identity_or_an_error(tmp_path):
    about = {"metadata": {"target_layer": N - 1, "n_layers": N}}
    own = {N - 1: torch.eye(D).half()}
    write_jacobians(tmp_path / "lens.pt", jacobians() | own, **about)
    assert quietly(tll.Translators.load, tmp_path / "lens.pt").sources == (1, 2)
    for matrices, message in (({N - 1: 2 * torch.eye(D)}, f"layer {N} leads to that layer itself and is not the"), (own, "no matrix but the identity")):  # fmt: skip
        write_jacobians(tmp_path / "wrong.pt", matrices, **about)
        with pytest.raises(ValueError, match=message):
            tll.Translators.load(tmp_path / "wrong.pt")


# --- another basis


@pytest.mark.parametrize("kind", ["tuned-lens", "jacobian-lens"])
def test_a_lens_of_raw_weights_on_a_centred_model(tmp_path, kind):
    """Exact where no map reads the mean, which equal log-probabilities prove; refused with the flags elsewhere."""
    raw, centred = (zoo.build("gpt2", name) for name in zoo.FEW_KINDS)
    layers = range(N) if kind == "tuned-lens" else range(1, N)
    w, b = torch.eye(D) + random(len(layers), D, D), random(len(layers), D) * (kind == "tuned-lens")
    reads = tll.Translators([(i, N) for i in layers], w, b, n_layers=N)
    blind = tll.Translators(reads.rows, w - w.mean(-1, keepdim=True), b, n_layers=N)
    out = {name: maps.export(kind, tmp_path / name) for name, maps in (("reads", reads), ("blind", blind))}
    with pytest.raises(ValueError, match=r"basis is centered and not raw: load the model with center_writing_weights=False .*or without enable_compatibility_mode"):  # fmt: skip
        quietly(tll.Lens, centred, out["reads"])
    quietly(tll.Lens, raw, out["reads"])
    logp = []
    for model in (raw, centred):
        lens, seen = quietly(tll.Lens, model, out["blind"]), {}
        assert lens.translators.basis == ("raw" if model is raw else "centered")
        tll.run(model, TOKENS, lens.hooks(seen, list(layers), then=lambda logits: logits.log_softmax(-1)))
        logp.append(torch.stack(list(seen.values())))
    assert torch.allclose(*logp, atol=1e-4)


# --- shortcuts and SelfIE adapters


@pytest.mark.parametrize("form", ["pickle", "torch.save"])
def test_linear_shortcuts_lead_from_layer_to_layer(tmp_path, form):
    maps = {(0, 1): random(D, D, seed=1), (0, N): random(D, D, seed=2), (2, N): random(D, D, seed=3)}
    for (i, j), matrix in maps.items():
        file = tmp_path / f"{i}_{j}.{'pickle' if form == 'pickle' else 'pt'}"
        file.write_bytes(pickle.dumps(matrix)) if form == "pickle" else torch.save(matrix, file)
    with pytest.warns(UserWarning, match=f"how many layers the model has: taken for {N}"):
        lens = tll.Translators.load(tmp_path)
    assert lens.pairs == tuple(maps) and not lens.biases.any()
    for pair, matrix in maps.items():
        assert torch.allclose(lens[pair].weight, matrix, atol=1e-6)
    lens = quietly(tll.Translators.load, tmp_path / file.name, n_layers=N)
    assert lens.pairs == ((2, N),)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_selfie_adapter_reads_unit_vectors(tmp_path, normalize):
    file, bias, u, v = tmp_path / "adapter.safetensors", random(D), random(D, 2, seed=1), random(D, 2, seed=2)
    projection = {"type": "scalar_affine_plus_low_rank", "normalize_input": normalize, "low_rank_rank": 2}
    tensors = {"log_scale": torch.tensor([1.5]), "bias": bias, "U": u, "V": v}
    save_file(tensors, file, metadata={"config_json": json.dumps({"projection": projection}), "model_dim": str(D)})
    with pytest.raises(ValueError, match="which layer's vectors it reads: pass source_layer= and n_layers="):
        tll.Translators.load(file)
    maps = quietly(tll.Translators.load, file, source_layer=2, n_layers=N)
    assert maps.pairs == ((2, 0),) and maps.unit == normalize
    h = random(5, D, seed=3, scale=7.0)
    x = h / h.norm(dim=-1, keepdim=True) if normalize else h
    by_hand = torch.tensor(1.5).exp() * x + x @ u @ v.T + bias  # selfie_adapters/projection.py
    assert torch.allclose(maps[2, 0](h), by_hand, atol=1e-5) and torch.allclose(maps(h[None])[0], by_hand, atol=1e-5)
    out = maps.export("selfie", tmp_path / "out")
    back = quietly(tll.Translators.load, out, source_layer=2, n_layers=N)
    assert torch.allclose(back[2, 0](h), by_hand, atol=1e-5) and back.unit == normalize
    with pytest.raises(ValueError, match="these read unit vectors|into the final residual"):
        tll.Lens(raw_model(), maps)


def test_a_selfie_checkpoint_says_more_beside_its_config(tmp_path):
    config = {"projection": {"type": "scale_only", "normalize_input": True}}
    content = {"projection_state": {"log_scale": torch.tensor([0.5])}, "config": config, "model_dim": D}
    torch.save(content, tmp_path / "adapter.pt")
    h, given = random(3, D, scale=5.0), {"source_layer": 0, "n_layers": N}
    maps = quietly(tll.Translators.load, tmp_path / "adapter.pt", **given)
    assert maps.pairs == ((0, 0),)  # a map of a layer into itself is no identity here
    assert torch.allclose(maps[0, 0](h), torch.tensor(0.5).exp() * torch.nn.functional.normalize(h, dim=-1), atol=1e-6)
    torch.save(content | {"projection_state": {"log_scale": torch.zeros(1), "gate": torch.ones(D)}}, tmp_path / "new.pt")
    with pytest.raises(ValueError, match=r"\['gate'\] is of a projection that we do not know"):
        tll.Translators.load(tmp_path / "new.pt", **given)


def test_a_scope_takes_a_selfie_adapter(tmp_path):
    model = raw_model()
    save_file({"log_scale": torch.tensor([0.7]), "bias": random(D)}, tmp_path / "adapter.safetensors")
    maps = quietly(tll.Translators.load, tmp_path / "adapter.safetensors", source_layer=2, n_layers=N)
    source, target = tll.Source(TOKENS[:1, :5]), tll.Target(TOKENS[1:, :6], pos=3)
    result = tll.patchscope(model, source, target, layers=[2], target_layers=[0], map=maps)
    seen = {}
    tll.run(model, TOKENS[:1, :5], [tll.read(2, seen)])
    vector = torch.tensor(0.7).exp() * torch.nn.functional.normalize(seen[2][0, -1], dim=-1) + random(D)
    logits = tll.run(model, TOKENS[1:, :6], [tll.patch(0, tll.edits.replace(vector), 3)])[0, -1]
    assert result.top_ids.flatten()[0] == logits.argmax()


# --- writing


def test_what_a_format_has_no_place_for_is_refused(tmp_path):
    full = tll.Translators([(i, N) for i in range(N)], torch.eye(D) + random(N, D, D), random(N, D), n_layers=N)
    for kind, maps, message in (
        ("tuned-lens", full.select([0, 2]), r"missing are \[1\]"),
        ("jacobian-lens", full, "no place for layer 0"),
        ("jacobian-lens", full.select([1, 2]), r"has no bias, and the maps of layers \[1, 2\] have one"),
        ("selfie", full, "one map, put at the embeddings"),
    ):
        with pytest.raises(ValueError, match=message):
            maps.export(kind, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    full.export("tuned-lens", tmp_path / "out")
    with pytest.raises(ValueError, match="exists and is not empty"):
        full.export("tuned-lens", tmp_path / "out")
    full.export("tuned-lens", tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="'thesis.txt', which an export does not write"):
        full.export("tuned-lens", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_a_centred_lens_is_written_for_raw_weights(tmp_path):
    centred = tll.Translators([(i, N) for i in range(N)], random(N, D, D), random(N, D), n_layers=N, meta={"basis": "centered"})
    centred.export("tuned-lens", tmp_path / "out")
    back = quietly(tll.Translators.load, tmp_path / "out")
    h = random(4, D, seed=5, scale=3.0) + 2
    assert torch.allclose(back[1](h), centred[1](h - h.mean(-1, keepdim=True)), atol=1e-5)


# --- a direction


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_direction_adds_its_logits_without_a_bias(arch):
    """The derivative of the logits along v where the norm's scale is held, which a finite difference of two states shows."""
    model = zoo.build(arch, zoo.RAW_KINDS[0])
    maps = tll.Translators([(1, N)], torch.eye(D)[None] + random(1, D, D), random(1, D), n_layers=N)
    lens, v, h = tll.Lens(model, maps), random(D, seed=8, scale=1.0), random(D, seed=9, scale=1.0)
    z = maps[1](h)
    centred = z - z.mean() if arch == "gpt2" else z
    scale = (centred.square().mean() + 1e-5).sqrt()
    eps = 1e-3
    moved = maps[1](h + eps * v)
    held = lambda x: lens.readout.unembed_module((((x - x.mean() if arch == "gpt2" else x) / scale) * _gain(lens))[None, None])[
        0, 0
    ]
    assert torch.allclose((held(moved) - held(z)) * scale / eps, lens.read(v, 1), atol=0.05)
    assert torch.allclose(lens.read(2 * v, 1), 2 * lens.read(v, 1), atol=1e-4) and not lens.read(0 * v, 1).any()


def _gain(lens):
    from tl_lenses.numerics import gain

    return gain(lens.readout.norm_module, D, torch.zeros(()))[0]


def test_a_soft_cap_has_no_logits_of_a_direction():
    with pytest.raises(ValueError, match="a soft cap after them"):
        tll.Lens(zoo.build("gemma2", zoo.RAW_KINDS[0])).read(torch.ones(D), 1)


# --- what a repository offers


def test_files_of_a_repository_are_grouped_by_lens():
    sizes = {"README.md": 1, "config.json": 2, "translators.safetensors": 30, "lens/gpt2/config.json": 4, "lens/gpt2/params.pt": 50, "gpt2/wiki/0_1.pickle": 6, "gpt2/wiki/0_2.pickle": 6, "x/jlens/gpt2_jacobian_lens.pt": 7}  # fmt: skip
    assert [(offer.path, offer.kind, offer.size) for offer in grouped(sizes)] == [
        (".", "tl_lenses", 32), ("gpt2/wiki", "linear-shortcut (2 maps)", 12), ("lens/gpt2", "tuned-lens", 54), ("x/jlens/gpt2_jacobian_lens.pt", "a lens file", 7),
    ]  # fmt: skip

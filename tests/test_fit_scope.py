"""The map of a scope, trained through the frozen model: its laws, against a loop over examples written out here."""

import json

import pytest
import torch
import zoo
from safetensors import safe_open

import tl_lenses as tll
from tl_lenses.fit import scope as S
from tl_lenses.fit.examples import Asked, examples_of

TARGET = tll.Target("the cat sat on x the", tll.at("x"))
TOKENS = zoo.tokens(16, 12)


@pytest.fixture(params=zoo.FEW_KINDS, scope="module")
def model(request):
    return zoo.build("gpt2", request.param)


def fitted(model, source=TOKENS, target=TARGET, labels="token", steps=6, **kwargs):
    kwargs = {"pairs": [(1, 1), (2, 0)], "held_out": 8, "vectors_per_step": 5} | kwargs
    return tll.fit_scope(model, source, target, labels, steps, show_progress=False, **kwargs)


def trainer(monkeypatch, model, *args, **kwargs):
    """What `fit_scope` trains with, before its first step."""
    found = []
    monkeypatch.setattr(S._Fit, "train", lambda self, log, show: found.append(self))
    fitted(model, *args, **kwargs)
    return found[0]


@pytest.mark.parametrize("n_places", [1, 2])
def test_before_the_first_step_it_is_the_unfitted_scope_at_the_length_that_was_there(model, n_places):
    target = TARGET if n_places == 1 else tll.Target("x x the cat sat on the", tll.at("x", occurrence=-1))
    maps = fitted(model, target=target, steps=0)
    n = maps[1, 1].weight[0, 0]
    assert torch.equal(maps[1, 1].weight, n * torch.eye(32)) and not maps.biases.any() and maps.unit
    settings = dict(source="the dog ran", target=target, pairs=[(1, 1), (2, 0)])
    ours = tll.patchscope(model, **settings, map=maps)
    theirs = tll.patchscope(model, **settings, norm="replaced")
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-4)
    assert not torch.allclose(ours.logits, tll.patchscope(model, **settings).logits, atol=1e-2)


def test_a_map_from_a_layer_into_itself_is_the_fitted_one(model):
    maps = fitted(model, steps=2)
    assert maps[1, 1].unit and maps[1, 1].bias.any() and maps[2, 0].bias.any()
    assert torch.equal(maps[2, 2].weight, torch.eye(32))  # not fitted: the identity, as before


@pytest.mark.parametrize(("arch", "rank", "mode"), [("gpt2", 0, "replace"), ("llama", 2, "add"), ("gemma2", 1, "replace")])
def test_the_loss_is_that_of_a_plain_loop(monkeypatch, arch, rank, mode):
    model = zoo.build(arch)
    labels = [[7], [8, 9], [10, 11, 12], [13, 14], [7, 7]]
    sources = [f"the {word} sat" for word in ("cat", "dog", "mat", "bird", "tree")]
    fit = trainer(monkeypatch, model, sources, labels=labels, rank=rank, mode=mode, held_out=1)
    with torch.no_grad():
        for leaf in fit.leaves:
            leaf.copy_(torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1)) * 0.5)
    weights, biases = fit.maps()
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0)).tolist()
    prompt = model.to_tokens(TARGET.prompt, prepend_bos=True)
    place = tll.positions(model, prompt, TARGET.pos)[0].item()
    found = fit.losses(("fitted",), range(5), range(5))[0, 0]
    for p, (layer, into) in enumerate([(1, 1), (2, 0)]):
        total = 0.0
        for i in range(5):
            seen = {}
            tll.run(model, sources[order[i]], [tll.read(layer, seen, key="h", pos=-1)])
            h = seen["h"][0, 0].detach()
            v = weights[p] @ (h / h.norm()) + biases[p]

            def put(x, hook, v=v):
                x = x.clone()
                x[0, place] = v if mode == "replace" else x[0, place] + v
                return x

            label = labels[order[i]]
            ids = torch.cat([prompt, torch.tensor([label])], 1)
            logp = model.run_with_hooks(ids, fwd_hooks=[(tll.site(model, into), put)])[0].log_softmax(-1)
            total -= sum(logp[prompt.shape[1] - 1 + t, y].item() for t, y in enumerate(label))
        assert found[p].item() == pytest.approx(total, rel=1e-5)


def test_the_gradient_is_that_of_differences_in_float64(monkeypatch):
    model = zoo.build("gpt2", zoo.FEW_KINDS[0], torch.float64)
    fit = trainer(monkeypatch, model, labels=2, rank=2)
    with torch.no_grad():
        for leaf in fit.leaves:
            leaf += 0.3 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(2), dtype=leaf.dtype)
    index = fit.drawn(0)
    grads, losses = fit.gradients(index)
    mean = lambda: fit.losses(("fitted", "bias"), index, index)[0] / (2 * len(index))
    with torch.no_grad():
        assert torch.allclose(mean(), losses, rtol=1e-10)
        for leaf, grad in zip(fit.leaves, grads, strict=True):
            for row, column in [(0, 0), (0, 5), (1, leaf.shape[1] // 2), (1, leaf.shape[1] - 1)]:
                way = torch.zeros_like(leaf)
                way[row, column] = 1e-5
                leaf += way
                up = mean().sum()
                leaf -= 2 * way
                down = mean().sum()
                leaf += way
                assert grad[row, column].item() == pytest.approx((up - down).item() / 2e-5, rel=1e-5, abs=1e-9)


def test_a_planted_map_is_found(model):
    generator = torch.Generator().manual_seed(0)
    h, bias = torch.randn(320, 32, generator=generator), torch.randn(32, generator=generator)
    target = tll.Target("the cat sat on x", tll.at("x"))
    settings = dict(source=h, target=target, pairs=[(1, 1)])
    n = fitted(model, labels=[[5]] * 320, steps=0, **settings)[1, 1].weight[0, 0]
    planted = tll.Affine(2 * n * torch.eye(32), 2 * n * bias / bias.norm(), unit=True)
    said = tll.patchscope(model, tll.Source(h), target, target_layers=[1], map=planted).top_ids[:, 0, :1].tolist()
    maps = fitted(model, labels=said, steps=150, vectors_per_step=32, lr=0.1, held_out=60, **settings)
    scores = maps.meta["held_out"]
    assert scores["top1"][0] > 0.7 and scores["unfitted"]["top1"][0] < 0.5
    assert max(scores["shuffled"]["top1"][0], scores["bias"]["top1"][0]) < 0.1
    assert torch.cosine_similarity(maps.biases[0], planted.bias, dim=0) > 0.75
    assert scores["shuffled"]["loss"][0] > scores["bias"]["loss"][0] > scores["loss"][0]


def test_a_seed_is_a_fit(model):
    assert torch.equal(fitted(model, rank=1).weights, fitted(model, rank=1).weights)
    assert not torch.equal(fitted(model, rank=1).weights, fitted(model, rank=1, seed=1).weights)


def test_pairs_do_not_change_each_other(model):
    both = fitted(model)
    for i, pair in enumerate(both.pairs):
        alone = fitted(model, pairs=[pair])
        assert torch.allclose(both.weights[i], alone.weights[0], rtol=1e-4)
        assert torch.allclose(both.biases[i], alone.biases[0], atol=1e-4)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_fit_goes_on_to_the_same_maps(tmp_path, error):
    model, file = zoo.build("gpt2"), tmp_path / "state"
    whole, entries = fitted(model, rank=1), []

    def stop(entry):
        entries.append(entry)
        if entry["step"] == 4:
            raise error("now")

    with pytest.raises(error):
        fitted(model, rank=1, checkpoint=file, log=stop)
    rest = fitted(model, rank=1, checkpoint=file, log=entries)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert set(entries[0]["loss"]) == set(entries[0]["bias"]) == {(1, 1), (2, 0)}
    assert torch.equal(rest.weights, whole.weights) and torch.equal(rest.biases, whole.biases)
    assert rest.meta["held_out"] == whole.meta["held_out"] and rest.meta["tokens_seen"] == whole.meta["tokens_seen"] == 30
    for change in (dict(rank=2), dict(rank=1, labels=1), dict(rank=1, target=tll.Target("a x", 2)), dict(rank=1, note={"a": 1})):
        with pytest.raises(ValueError, match="was made with"):
            fitted(model, checkpoint=file, **change)


def test_labels_of_a_text_are_its_tokens(model):
    mask = torch.ones_like(TOKENS)
    mask[::2, :4] = 0
    mask[1::2, -3:] = 0
    batches = [{"input_ids": TOKENS[i : i + 4], "attention_mask": mask[i : i + 4]} for i in (0, 4, 8, 12)]
    for labels, k in (("token", 0), (1, 1), (3, 3)):
        asked = Asked(model, model, batches, labels, [2, "blocks.0.hook_mlp_out"], [], True, True)
        got = examples_of(asked, 10**6, 0, False)
        seen = {}
        hooks = [tll.read(2, seen, key=2), tll.read("blocks.0.hook_mlp_out", seen, key="blocks.0.hook_mlp_out")]
        tll.run(model, TOKENS, hooks, attention_mask=mask)
        for layer, x in seen.items():
            for v, label in zip(got.vectors[layer], got.labels, strict=True):
                row, column = divmod(int((x - v).norm(dim=-1).argmin()), 12)
                assert (x[row, column] - v).norm() < 1e-4
                first = column + (k > 0)
                assert label == TOKENS[row, first : first + max(k, 1)].tolist() and len(label) == max(k, 1)
                assert mask[row, column] and mask[row, first + max(k, 1) - 1] and mask[row, :column].any()


def test_sources_with_words_of_the_user(model):
    words = [" a", " the cat", " a mat"] * 4
    sources = ["the cat", tll.Source("the dog ran", pos=1), tll.Source(torch.ones(32)), tll.Source(torch.ones(4, 32).cumsum(0))]
    sources += [f"the {'x' * i} ran" for i in range(5)]
    maps = fitted(model, source=sources, labels=words, held_out=2)
    assert maps.meta["held_out"]["vectors"] == 2 and maps.meta["settings"]["examples"] == 12
    assert "unfitted" in str(maps) and list(maps.to_frame().columns)[-4:] == ["top1", "unfitted", "shuffled", "bias"]
    one = maps.select([(2, 0)])
    assert one.meta["held_out"]["bias"]["loss"] == maps.meta["held_out"]["bias"]["loss"][1:]
    assert "bias" in str(one)
    assert "held_out" not in fitted(model, source=sources, labels=words, held_out=0).meta


@pytest.mark.parametrize("rank", [0, 2])
def test_a_saved_map_says_the_same(tmp_path, rank):
    model = zoo.build("gpt2", zoo.FEW_KINDS[0])
    maps = fitted(model, rank=rank)
    maps.save(tmp_path / "maps")
    back = tll.Translators.load(tmp_path / "maps")
    assert back.unit and json.dumps(back.meta["held_out"]) == json.dumps(maps.meta["held_out"])
    said, again = (tll.patchscope(model, "the dog ran", TARGET, pairs=[(2, 0)], map=it) for it in (maps, back))
    assert torch.equal(said.logits, again.logits)


@pytest.mark.parametrize("rank,keys", [(0, {"log_scale", "bias"}), (2, {"weight", "bias"})])
def test_a_map_is_a_selfie_adapter(tmp_path, rank, keys):
    model = zoo.build("gpt2", zoo.FEW_KINDS[0])
    maps = fitted(model, rank=rank)
    file = maps.select([(2, 0)]).export("selfie", tmp_path / "selfie")
    with safe_open(str(file), "pt") as content:
        about = content.metadata()
        assert about["format"] == "selfie_adapter_v1" and json.loads(about["config_json"])["projection"]["normalize_input"]
        assert set(content.keys()) == keys
    theirs = tll.Translators.load(file, source_layer=2, n_layers=3)
    said, again = (tll.patchscope(model, "the dog ran", TARGET, pairs=[(2, 0)], map=it) for it in (maps, theirs))
    assert torch.allclose(said.logits, again.logits, atol=1e-4)


def test_maps_of_directions_have_no_other_basis(model):
    maps = fitted(model, steps=0)
    with pytest.raises(ValueError, match="these maps read h / |h|"):
        maps.to_raw() if maps.basis == "centered" else maps.to_centered()


def test_it_leaves_the_model_as_it_was(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad(), torch.inference_mode():
        assert fitted(model).biases.any()
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_every_setting_of_the_scope_reaches_the_fit(model):
    soft = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    quiet = [tll.patch(1, tll.edits.scale(0.5))]
    settings = [{}, {"target": tll.Target(soft, 2)}, {"source_hooks": quiet}, {"target_hooks": quiet}, {"to": zoo.build("llama")}]
    sums = [round(float(fitted(model, **more).biases.sum()), 4) for more in settings]
    assert len(set(sums)) == len(settings)


def test_a_map_into_another_model_leads_there(model):
    other = zoo.build("llama")
    maps = fitted(model, to=other)
    assert maps.n_target_layers == 3 and tll.patchscope(model, "the dog", TARGET, pairs=[(2, 0)], map=maps, to=other).pairs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels="words"), "labels"),
        (dict(labels=0), "labels, a number of next tokens, must be at least 1"),
        (dict(labels=11), "no position of the text can be an example"),
        (dict(source=["the cat"], labels=["a", "b"]), "1 sources need as many labels, got 2"),
        (dict(source=["the cat"], labels=[""]), "the label '' has no token"),
        (dict(source=["the cat"], labels=[[-1]]), "an id must be at least 0"),
        (dict(source=[tll.Source("the cat", [1, 2])], labels=["a"]), "several positions"),
        (dict(source=torch.zeros(1, 32), labels=["a"]), "has length 0"),
        (dict(pairs=[(1, 3)]), "does not depend on the vector"),
        (dict(pairs=[(1, (1, 2))]), "several layers on one side"),
        (dict(pairs=[(1, 1), (1, "blocks.0.hook_resid_post")]), "is given twice"),
        (dict(pairs=[("blocks.0.mlp.hook_post", 1)]), "leads from width 128 to 32"),
        (dict(target="the x"), "target must be a Target"),
        (dict(mode="norm_add"), "mode must be"),
        (dict(lr=0), "lr must be positive"),
        (dict(log=3), "log must be"),
    ],
)  # fmt: skip
def test_refusals(change, message, unchecked):
    with pytest.raises((ValueError, TypeError), match=message):
        fitted(zoo.build("gpt2"), **change)


def test_numbers_that_are_not_finite_stop_it_at_the_last_good_state(tmp_path, unchecked):
    model = zoo.build("gpt2")
    entries = []
    bad = [tll.patch(2, lambda x: x * float("nan") if len(entries) == 2 else x)]
    with pytest.raises(ValueError, match=r"pair \(1, 1\) is not finite at step 2"):
        fitted(model, target_hooks=bad, log=entries, checkpoint=tmp_path / "state")
    assert tll.files.load_state(tmp_path / "state")["step"] == 2

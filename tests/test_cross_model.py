"""Maps between layers and between models: the numbers are numpy's, one pass is enough, and what does not fit is refused."""

import json

import numpy as np
import pytest
import torch
import zoo
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import tl_lenses as tll
from tl_lenses import edits
from tl_lenses.fit.regression import Evidence, collect, maps_of
from tl_lenses.identity import check_pair, check_tokenizers

PAIRS = [(0, 0), (1, 4), (1, 2), (-1, 4)]
TOKENS = zoo.tokens(60, 12)


def small():
    """Width 16, 3 layers; the tokenizer is the zoo's."""
    return zoo.affine_model()


def big():
    """Width 32, 4 layers; the tokenizer is the zoo's."""
    return zoo.build("gptneo", zoo.FEW_KINDS[0])


def other():
    """Width 32 and 3 layers, and its twin with other weights."""
    return zoo.build("gpt2", zoo.FEW_KINDS[0])


@pytest.fixture(scope="module")
def maps():
    return tll.fit_regression(small(), TOKENS, to=big(), pairs=PAIRS)


def states(model, layer, rows, tokens=TOKENS):
    """States of some rows of the text as float64 numpy `[n, d]`, position 0 left out."""
    seen = {}
    tll.run(model, tokens[rows], [tll.read(tll.site(model, layer), seen, key="x")])
    return seen["x"][:, 1:].flatten(0, 1).double().numpy()


def numpy_ridge(x, y, strength):
    """W and b of ridge toward zero, from the concatenated data."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    c = (x - mean_x).T @ (x - mean_x) / len(x)
    b = (y - mean_y).T @ (x - mean_x) / len(x)
    k = strength * np.trace(c) / len(c)
    w = np.linalg.solve(c + k * np.eye(len(c)), b.T).T
    return w, mean_y - w @ mean_x


HELD = torch.arange(60) % 10 == 0


@pytest.mark.parametrize("strength", [0.0, 1e-3, 0.1])
def test_maps_and_r_squared_are_those_of_numpy(strength):
    got = tll.fit_regression(small(), TOKENS, to=big(), pairs=PAIRS, ridge=strength)
    assert got.d_in == 16 and got.d_out == 32 and got.pairs == ((0, 0), (1, 4), (1, 2), (3, 4))
    assert got.meta["tokens_seen"] == 54 * 11 and got.meta["held_out"]["tokens"] == 6 * 11
    for i, (layer, goal) in enumerate(PAIRS):
        x, y = states(small(), layer, ~HELD), states(big(), goal, ~HELD)
        weight, bias = numpy_ridge(x, y, strength)
        if strength == 0:
            design = np.concatenate([x, np.ones((len(x), 1))], 1)
            solution = np.linalg.lstsq(design, y, rcond=None)[0]
            assert np.allclose(weight, solution[:-1].T, atol=1e-6) and np.allclose(bias, solution[-1], atol=1e-6)
        affine = got[layer, goal]
        assert np.allclose(affine.weight.double(), weight, atol=1e-5), (layer, goal)
        assert np.allclose(affine.bias.double(), bias, atol=1e-5), (layer, goal)
        x, y = states(small(), layer, HELD), states(big(), goal, HELD)
        residual = ((x @ affine.weight.double().numpy().T + affine.bias.double().numpy() - y) ** 2).sum()
        direct = 1 - residual / ((y - y.mean(0)) ** 2).sum()
        assert got.meta["held_out"]["r_squared"][i] == pytest.approx(direct, abs=1e-9)
        assert got.meta["r_squared"][i] != pytest.approx(direct, abs=1e-6)  # on the rows of the fit it is another


def test_a_map_between_affine_states_is_found_exactly():
    """The final state of the affine model is W x + b of each layer: R^2 is 1, on rows that were not fitted too."""
    model, one_token = small(), torch.arange(4, zoo.D_VOCAB)[:, None]
    got = tll.fit_regression(model, one_token, pairs=[(0, 3), (2, 3)], ridge=0.0, skip_first=False)
    for layer in (0, 2):
        weight, bias = zoo.truth(model)[layer]
        assert torch.allclose(got[layer, 3].weight.double(), weight, atol=1e-4)
        assert torch.allclose(got[layer, 3].bias.double(), bias, atol=1e-4)
    assert got.meta["held_out"]["r_squared"] == pytest.approx([1.0, 1.0], abs=1e-9)
    assert "agreement" not in got.meta["held_out"] and "to" not in got.meta  # one model


def test_the_control_counts_where_the_models_agree():
    near, twin = zoo.copied(small()), zoo.copied(small())
    with torch.no_grad():
        for i, parameter in enumerate(near.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        same = [m(TOKENS[HELD]).argmax(-1)[:, 1:] for m in (small(), near)]
    agreed = int((same[0] == same[1]).sum())
    assert 0 < agreed < 66
    held_out = tll.fit_regression(small(), TOKENS, to=near, pairs=[(0, 3)]).meta["held_out"]
    assert held_out["agreed"] == agreed and held_out["agreement"] == pytest.approx(agreed / 66)
    # the same model, loaded twice: everywhere
    assert tll.fit_regression(small(), TOKENS, to=twin, pairs=[(0, 3)]).meta["held_out"]["agreement"] == 1.0


def test_one_pass_is_what_a_pass_per_pair_gives(maps):
    alone = [tll.fit_regression(small(), TOKENS, to=big(), pairs=[pair]) for pair in PAIRS]
    for i, pair in enumerate(PAIRS):
        assert torch.allclose(maps[pair].weight, alone[i][pair].weight, atol=1e-6)
        assert torch.allclose(maps[pair].bias, alone[i][pair].bias, atol=1e-6)
        assert maps.meta["held_out"]["r_squared"][i] == pytest.approx(alone[i].meta["held_out"]["r_squared"][0])


@pytest.mark.parametrize("n_pairs", [1, 4])
def test_each_model_runs_once_per_batch(n_pairs, monkeypatch):
    runs = []
    from tl_lenses import decode

    monkeypatch.setattr(decode, "run", lambda model, *a, **k: runs.append(model) or tll.run(model, *a, **k))
    tll.fit_regression(small(), [TOKENS[:30], TOKENS[30:]], to=big(), pairs=PAIRS[:n_pairs])
    assert [m is small() for m in runs] == [True, False] * 2


def test_covariances_are_shared_between_pairs():
    rows = collect(small(), TOKENS, [("blocks.1.hook_resid_pre", f"blocks.{i}.hook_resid_pre") for i in range(4)], to=big())  # fmt: skip
    (evidence,) = rows.fit
    assert evidence.xx.shape == (1, 16, 16) and evidence.yx.shape == (4, 32, 16) and evidence.xx.dtype == torch.float64


def same_maps(got, maps):
    assert torch.allclose(got.weights, maps.weights, atol=1e-6) and torch.allclose(got.biases, maps.biases, atol=1e-6)
    for key in ("tokens", "r_squared", "agreed", "agreement"):
        assert got.meta["held_out"][key] == pytest.approx(maps.meta["held_out"][key])
    assert got.meta["tokens_seen"] == maps.meta["tokens_seen"]


def test_batches_do_not_matter(maps):
    same_maps(tll.fit_regression(small(), [TOKENS[i : i + 7] for i in range(0, 60, 7)], to=big(), pairs=PAIRS), maps)


def test_shards_add_up(maps):
    shards = [collect(small(), TOKENS[i : i + 20], maps.rows, to=big(), held_out=0.1) for i in (0, 20, 40)]
    same_maps(maps_of(small(), sum(shards), to=big()), maps)


def test_shards_of_different_maps_do_not_add_up(maps):
    one, other = (collect(small(), TOKENS[:20], rows, to=big()) for rows in (maps.rows, maps.rows[:1]))
    with pytest.raises(ValueError, match="evidence of different maps does not add up"):
        one + other


def test_held_out_rows_enter_no_map():
    changed = TOKENS.clone()
    changed[HELD] = zoo.tokens(6, 12, seed=5)
    for ridge in (1e-3, [1e-4, 1e-2, 1.0]):
        before, after = (tll.fit_regression(small(), t, to=big(), pairs=PAIRS, ridge=ridge) for t in (TOKENS, changed))
        assert torch.equal(before.weights, after.weights) and before.meta["r_squared"] == after.meta["r_squared"]
        assert before.meta["held_out"]["r_squared"] != after.meta["held_out"]["r_squared"]


def test_a_strength_is_chosen_on_rows_of_its_own():
    strengths = [1e3, 1e-2, 1.0]
    got = tll.fit_regression(small(), TOKENS, to=big(), pairs=PAIRS, ridge=strengths)
    aside = torch.arange(60) % 10 == 9
    for i, (layer, goal) in enumerate(PAIRS):
        x, y = states(small(), layer, ~HELD & ~aside), states(big(), goal, ~HELD & ~aside)
        x_aside, y_aside = states(small(), layer, aside), states(big(), goal, aside)
        maps = [numpy_ridge(x, y, strength) for strength in strengths]
        errors = [((x_aside @ w.T + b - y_aside) ** 2).sum() for w, b in maps]
        best = strengths[int(np.argmin(errors))]
        assert got.meta["settings"]["ridge"][i] == best
        same = tll.fit_regression(small(), TOKENS, to=big(), pairs=[PAIRS[i]], ridge=best)  # on all but held out
        assert torch.allclose(got[PAIRS[i]].weight, same[PAIRS[i]].weight, atol=1e-6)
        assert got.meta["held_out"]["r_squared"][i] == pytest.approx(same.meta["held_out"]["r_squared"][0])
    assert len(set(got.meta["settings"]["ridge"])) > 1  # each pair its own


def test_without_pairs_layers_meet_at_the_same_relative_depth():
    whole = tll.fit_regression(small(), TOKENS, to=big())
    assert whole.pairs == ((0, 0), (1, 1), (2, 3), (3, 4))  # round(l 4 / 3)
    some = tll.fit_regression(small(), TOKENS, layers=[1, -1], to=big())
    assert some.pairs == ((1, 1), (3, 4)) and torch.allclose(some[1].weight, whole[1].weight, atol=1e-6)
    half = tll.fit_regression(big(), TOKENS, layers=[2], to=small())
    assert half.pairs == ((2, 2),)  # 1.5, halves up


def test_layers_are_those_of_their_model(maps):
    assert maps.n_layers == 3 and maps.target_layers == 4 and maps.sources == (0, 1, 1, 3)
    assert torch.equal(maps[-1, -1].weight, maps[3, 4].weight) and torch.equal(maps[3].weight, maps[3, 4].weight)
    assert torch.equal(maps[1, "blocks.3.hook_resid_post"].weight, maps[1, 4].weight)
    assert torch.equal(maps["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"].weight, maps[1, 2].weight)
    assert [a.weight.shape for a in maps] == [(32, 16)] * 4
    with pytest.raises(KeyError, match=r"\(0, 4\) was not fitted; fitted are \[\(0, 0\), \(1, 4\), \(1, 2\), \(3, 4\)"):
        maps[0, 4]
    with pytest.raises(KeyError, match=r"several targets.*\[4, 2\]"):
        maps[1]
    with pytest.raises(KeyError, match="no layer 5: targets of these translators are layers 0..4"):
        maps[1, 5]
    # between models of one width and depth, too, a layer and its namesake are two places
    twin = tll.fit_regression(other(), TOKENS, to=zoo.copied(other()), pairs=[(1, 1), (3, 2)])
    assert (2, 2) not in twin and not torch.equal(twin[3].weight, torch.eye(32))
    assert twin.meta["settings"]["toward"] == "zero"  # two models share no axes
    chosen = maps.select([(1, 2), 0])
    assert chosen.pairs == ((1, 2), (0, 0))
    for part in (lambda t: t.meta, lambda t: t.meta["held_out"]):
        assert part(chosen)["r_squared"] == [part(maps)["r_squared"][i] for i in (2, 0)]


def test_pairs_within_one_model():
    model = other()
    got = tll.fit_regression(model, TOKENS, pairs=[(0, 2), (1, 2), (3, 1)], held_out=0)
    assert got.pairs == ((0, 2), (1, 2), (3, 1)) and "held_out" not in got.meta
    for pair in ((0, 2), (1, 2)):
        same = tll.fit_regression(model, TOKENS, layers=[pair[0]], target_layer=2)[pair[0], 2]
        assert torch.allclose(got[pair].weight, same.weight, atol=1e-5)
    assert got.meta["settings"]["toward"] == "identity"
    assert torch.equal(got[1, 1].weight, torch.eye(32)) and not torch.equal(got[3].weight, torch.eye(32))
    assert tll.fit_regression(model, TOKENS, to=model, pairs=[(0, 2)]).meta.get("to") is None
    lens = tll.Lens(model, tll.fit_regression(model, TOKENS, pairs=[(0, 3), (2, 3)]))
    assert lens.layers == [0, 2, 3]
    with pytest.raises(ValueError, match="a lens needs maps into the final residual"):
        tll.Lens(model, got)


def test_a_round_trip_keeps_pairs_controls_and_models(maps, tmp_path):
    maps.save(tmp_path / "maps")
    back = tll.Translators.load(tmp_path / "maps")
    assert back.pairs == maps.pairs and back.target_layers == 4
    assert torch.equal(back[1, 4].weight, maps[1, 4].weight) and torch.equal(back[1, 4].bias, maps[1, 4].bias)
    assert back.meta["held_out"] == maps.meta["held_out"] and back.meta["to"] == maps.meta["to"]
    check_pair(back, small(), big(), PAIRS)
    shown = " ".join(str(back).split())
    assert "R^2 on 66 held-out tokens; the two models' next tokens agree, unpatched, at" in shown
    r_squared = back.to_frame()["r_squared"].tolist()
    assert r_squared == maps.meta["held_out"]["r_squared"] and f"{r_squared[0]:.3g}" in shown


def fit(tokens=TOKENS, **settings):
    return tll.fit_regression(small(), tokens, to=big(), pairs=[(3, 4)], **settings)


@pytest.mark.parametrize("name", ["hooks", "target_hooks"])
def test_hooks_reach_their_model(name):
    hooked = fit(**{name: [tll.patch(1, edits.scale(0.5))]})
    assert not torch.allclose(fit().weights, hooked.weights, atol=1e-2)


def test_masks_reach_both_models():
    padded = torch.cat([TOKENS, torch.full((60, 3), zoo.PAD)], 1)
    mask = torch.cat([torch.ones(60, 12), torch.zeros(60, 3)], 1).long()
    plain, masked = fit(), fit(tll.Batch(padded, mask))
    assert torch.allclose(masked.weights, plain.weights, atol=1e-3)
    assert masked.meta["held_out"]["tokens"] == 66 and masked.meta["tokens_seen"] == plain.meta["tokens_seen"]
    assert masked.meta["held_out"]["agreed"] == plain.meta["held_out"]["agreed"]


def test_first_positions_count_where_asked():
    first = fit(skip_first=False)
    assert first.meta["tokens_seen"] == 54 * 12 and first.meta["held_out"]["tokens"] == 72


def test_both_models_are_left_as_they_were():
    models = (small(), big())
    before = [[p.detach().clone() for p in m.parameters()] for m in models]
    hooks = [zoo.n_hooks(m) for m in models]
    tll.fit_regression(models[0], TOKENS, to=models[1])
    assert [zoo.n_hooks(m) for m in models] == hooks
    for model, weights in zip(models, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
def test_models_on_two_devices(maps):
    far = tll.fit_regression(small(), TOKENS, to=zoo.copied(big()).to("cuda"), pairs=PAIRS)
    assert far.delta.device.type == "cpu" and torch.allclose(far.weights, maps.weights, atol=1e-3)


# --- what is refused

CASES = {
    "empty pairs": (dict(pairs=[]), "an empty list of pairs has nothing to fit: give at least one"),
    "no pairs": (dict(pairs=[1, 2]), r"expected pairs \(source layer, target layer\), got 1: give pairs="),
    "source out of range": (
        dict(pairs=[(4, 0)]),
        r"pair \(4, 0\), source model '.*': no layer 4: this model has layers 0..3",
    ),  # fmt: skip
    "target out of range": (
        dict(pairs=[(0, 5)]),
        r"pair \(0, 5\), target model '.*': no layer 5: this model has layers 0..4",
    ),  # fmt: skip
    "no such site": (dict(pairs=[("blocks.0.hook_nope", 0)]), "source model .* no hook 'blocks.0.hook_nope'"),
    "twice": (dict(pairs=[(1, 2), (1, 2)]), r"pair \(1, 2\) is given twice: leave one of them out"),
    "twice by two names": (dict(pairs=[(1, 2), ("blocks.0.hook_resid_post", -3)]), r"and \(1, 2\) are the same: leave"),
    "pairs and layers": (dict(pairs=[(1, 2)], layers=[1]), "either layers or pairs, not both"),
    "a site without depth": (dict(layers=["blocks.0.hook_attn_out"]), "is not a layer, so it has no relative depth"),
    "a layer as well": (dict(pairs=[(1, 2)], target_layer=2), "give either pairs or target_layer=2"),
    "itself without pairs": (dict(to="self"), r"to= is the model itself: give pairs="),
    "a place to itself": (dict(to=None, pairs=[(1, 1)]), "to itself: that is the identity and not stored"),
    "hooks on no model": (
        dict(to=None, pairs=[(1, 2)], target_hooks=[tll.patch(1, edits.zero)]),
        "target_hooks are for another model",
    ),  # fmt: skip
    "no model": (dict(to=1.5), "expected a TransformerLens model"),
    "share": (dict(held_out=0.9), "held_out is a share of the rows, 0 .none. to 0.5, got 0.9"),
    "one row": (dict(tokens=TOKENS[:1]), "no row of the text is left to fit on: all 1 are held out"),
    "one token each": (dict(tokens=TOKENS[:, :1]), "no position to fit on"),
    "few tokens": (
        dict(tokens=TOKENS[:2]),
        r"11 tokens to fit on \(11 more are held out\) are fewer than a covariance of width 16 needs \(at least 17\)",
    ),  # fmt: skip
    "few tokens, none held out": (
        dict(tokens=TOKENS[:1], held_out=0),
        "11 tokens are fewer than a covariance of width 16",
    ),  # fmt: skip
    "one held-out token": (dict(tokens=TOKENS[:9, :2]), "one held-out token has no variance to explain: give more text"),
    "no strength": (dict(ridge=[]), "an empty list of ridge strengths"),
    "few rows for several strengths": (dict(tokens=TOKENS[:9], ridge=[0.1, 1.0]), "at least 10 rows of text"),
    "an identity between widths": (dict(toward="identity"), "needs equal widths, got 16 -> 32: use toward='zero'"),
    "not finite here": (
        dict(hooks=[tll.patch(1, edits.scale(float("inf")))]),
        "activation at 'blocks.1.hook_resid_pre' has values that are not finite",
    ),  # fmt: skip
    "not finite there": (
        dict(target_hooks=[tll.patch(1, edits.scale(float("inf")))]),
        "values that are not finite: 'tiny.*' overflows there",
    ),  # fmt: skip
    "widths": (
        dict(pairs=[(1, 1), (1, "ln_final.hook_scale")]),
        r"sites of different width \(target widths \[1, 32\]\) need separate fits",
    ),  # fmt: skip
}


@pytest.mark.parametrize("case", CASES)
def test_refusals(case, unchecked):
    settings, message = CASES[case]
    settings = {"tokens": TOKENS, "to": big(), **settings}
    if settings["to"] == "self":
        settings["to"] = small()
    with pytest.raises((ValueError, TypeError), match=message):
        tll.fit_regression(small(), **settings)


def test_models_in_train_mode_are_refused():
    trained = zoo.copied(big()).train()
    with pytest.raises(ValueError, match="train mode, so a fit would see dropout"):
        tll.fit_regression(small(), TOKENS, to=trained)


def test_moments_that_are_not_finite_name_the_pair(maps):
    evidence = collect(small(), TOKENS, maps.rows, to=big(), held_out=0.1)
    evidence.fit[1].yx[1, 0, 0] = float("inf")  # the third pair: the second of the second source
    with pytest.raises(ValueError, match=r"the moments of \('blocks.1.hook_resid_pre', 'blocks.2.hook_resid_pre'\) are not"):
        maps_of(small(), evidence, to=big())
    with pytest.raises(ValueError, match="there is no evidence to fit on"):
        maps_of(small(), Evidence(maps.rows), to=big())


def shuffled(folder):
    """The zoo's tokenizer with the ids of "t" and "." exchanged, from a folder, as TransformerLens wants it."""
    spec = json.loads(zoo.tokenizer().backend_tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    vocab["t"], vocab["."] = vocab["."], vocab["t"]
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), **names).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_tokenizers_that_differ_are_refused(tmp_path):
    ours, theirs = small(), zoo.copied(big())
    assert check_tokenizers(ours, theirs)
    theirs.tokenizer = shuffled(tmp_path)
    with pytest.raises(ValueError) as error:
        tll.fit_regression(ours, TOKENS, to=theirs)
    message = str(error.value)
    ids = ours.tokenizer.encode("The capital of France is Paris.", add_special_tokens=False)
    assert "have different tokenizers, so the same ids are different text: 'The capital of France is Paris.' is" in message
    assert str(ids) in message and str(theirs.tokenizer.encode("The capital of France is Paris.", add_special_tokens=False)) in message  # fmt: skip
    assert "of the ids, 2 differ, the first is" in message and "use two models that share a tokenizer" in message


def test_added_special_tokens_are_no_difference():
    theirs = zoo.copied(big())
    theirs.tokenizer = zoo.tokenizer()
    theirs.tokenizer.add_special_tokens({"additional_special_tokens": ["<|chat|>"]})
    assert check_tokenizers(small(), theirs) and check_tokenizers(theirs, small())


def test_a_model_without_a_tokenizer_is_not_compared():
    theirs = zoo.copied(big())
    theirs.tokenizer = None
    assert tll.fit_regression(small(), TOKENS, to=theirs, pairs=[(1, 1)]).meta["to"]["tokenizer"] == "not compared"
    theirs.cfg.d_vocab = 321
    with pytest.raises(ValueError, match="vocabularies of 320 and 321 ids and not both a tokenizer to compare"):
        check_tokenizers(small(), theirs)


def test_check_pair_takes_the_models_fitted(maps):
    check_pair(maps, small(), big())
    check_pair(maps, zoo.copied(small()), big(), pairs=PAIRS)
    within = tll.fit_regression(other(), TOKENS, pairs=[(0, 2)])
    check_pair(within, other())
    check_pair(within, other(), zoo.copied(other()), pairs=[(0, 2)])  # the same model, loaded twice
    check_pair(tll.Translators([(s, t) for s, t in maps.rows], maps.weights, maps.biases, n_layers=3), small(), big())


def _stranger(model):
    """The same shape with another unembedding."""
    model = zoo.copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if zoo.D_VOCAB in parameter.shape and parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8)))
    return model


LEAD = r"these translators lead from '.*' \(d_model 16, 3 layers\) to '.*' \(d_model 32, 4 layers\); "
AGAIN = r"fit maps for these models with fit_regression\(source, tokens, to=target\)"


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (lambda: (small(),), LEAD + "expected these two models, got .* alone: pass the other one as to="),
        (lambda: (big(), small()), LEAD + "the models came the other way round, .*: swap them"),
        (lambda: (other(), big()), LEAD + "the source model here is .*, which has d_model 32: " + AGAIN),
        (lambda: (small(), other()), LEAD + "the target model here is .*, which has n_layers 3: " + AGAIN),
        (lambda: (small(), _stranger(big())), "the target model here is .*, whose readout behaves differently .*: " + AGAIN),
        (lambda: (_stranger(small()), big()), "the source model here is .*, whose readout behaves differently .*: " + AGAIN),
    ],
    ids=["alone", "swapped", "another source", "another target", "a stranger as target", "a stranger as source"],
)
def test_maps_are_of_their_two_models(maps, models, message):
    with pytest.raises(ValueError, match=message):
        check_pair(maps, *models())


def test_maps_are_of_their_pairs_of_layers(maps):
    with pytest.raises(ValueError, match=r"fitted are the pairs \[\(0, 0\), .*\], and \(2, 3\) is asked for: use one of"):
        check_pair(maps, small(), big(), pairs=[(0, 0), (2, 3)])


def test_maps_within_a_model_do_not_lead_into_another():
    within = tll.fit_regression(other(), TOKENS, pairs=[(0, 2)])
    stay = r"these translators stay within '.*' \(d_model 32, 3 layers\); the target model here is .*"
    with pytest.raises(ValueError, match=stay + r"n_layers 4: fit maps .* fit_regression\(source, tokens, to=target\)"):
        check_pair(within, other(), big())


def test_check_pair_compares_bases():
    raw, centred = (zoo.build("gpt2", kind) for kind in zoo.FEW_KINDS)
    of = lambda a, b: tll.fit_regression(a, TOKENS, to=b, pairs=[(1, 1)])
    there = of(centred, big())
    with pytest.raises(ValueError, match=r"whose residual basis is raw and not centered: convert .*to_raw\(\) \(exact\)"):
        check_pair(there, raw, big())
    check_pair(there.to_raw(), raw, big(), pairs=[(1, 1)])
    with pytest.raises(ValueError, match="source .* basis is centered and not raw: load it as the one fitted"):
        check_pair(of(raw, big()), centred, big())
    with pytest.raises(ValueError, match="target .* basis is centered and not raw: load it as the one fitted"):
        check_pair(of(big(), raw), big(), centred)


def test_a_patchscope_uses_the_maps(maps):
    """A vector of the small model through the map (l, l*) into the big one, as the direct computation does it."""
    a, b = small(), big()
    pairs = list(maps.pairs)[:2]
    result = tll.patchscope(a, tll.Source("the cat sat on"), pairs=pairs, map=maps, to=b)
    tokens = a.to_tokens("the cat sat on", prepend_bos=True)
    for cell, (layer, into) in enumerate(pairs):
        seen = {}
        tll.run(a, tokens, [tll.read(tll.site(a, layer), seen, key=0, pos=-1)])
        edit = tll.edits.replace(maps[layer, into](seen[0][0]))
        with torch.no_grad():
            want = tll.run(b, tokens, [tll.patch(tll.site(b, into), edit, pos=-1)])[0, -1]
        torch.testing.assert_close(result.logits[0, cell], want, atol=1e-4, rtol=0)


def test_a_patchscope_refuses_maps_the_other_way_round(maps):
    with pytest.raises(ValueError, match="swap them|lead from"):
        tll.patchscope(big(), tll.Source("the cat sat on"), pairs=[(0, 0)], map=maps, to=small())


def test_a_lens_refuses_maps_between_models(maps):
    with pytest.raises(ValueError, match=r"use them with patchscope\(map=..., to=...\)"):
        tll.Lens(small(), maps)

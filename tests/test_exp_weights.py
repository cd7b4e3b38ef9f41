"""Readings of weights: planted directions are named, folded weights read as raw ones do, and coherence is what it is said to be."""

from itertools import pairwise

import pytest
import torch
import zoo

import tl_lenses as tll
import tl_lenses.experiments.tuned_lens.weights as module
from tl_lenses.experiments import weights
from tl_lenses.experiments.tuned_lens.weights import KINDS, RANDOM, coherence, tokens_of
from tl_lenses.numerics import gain

few = {"columns": 12, "directions": 3, "n_random": 40, "k": 5, "show_progress": False}


# --- norms and scores


@pytest.mark.parametrize("d", [8, 7])
@pytest.mark.parametrize("kind,removes", [(torch.nn.LayerNorm, True), (torch.nn.RMSNorm, False)])
def test_the_gain_of_a_norm_is_found(kind, removes, d):
    norm = kind(d)
    torch.nn.init.normal_(norm.weight)
    gains, mean = gain(norm, d, norm.weight)
    assert torch.allclose(gains, norm.weight, atol=1e-3) and mean is removes


def test_a_bias_is_no_part_of_the_gain():
    norm = torch.nn.LayerNorm(8)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    assert torch.allclose(gain(norm, 8, norm.weight)[0], norm.weight, atol=1e-3)


def test_without_a_norm_the_gain_is_one():
    assert gain(None, 8, torch.zeros(8))[0].eq(1).all()


def test_coherence_is_the_mean_cosine_over_pairs():
    table = torch.eye(6)
    table[1] = table[0]
    assert coherence(table, torch.tensor([[0, 1], [0, 2]])).tolist() == [1.0, 0.0]
    x = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    want = (x[0] @ x[2] + x[0] @ x[5] + x[2] @ x[5]) / 3
    assert float(coherence(x, torch.tensor([[0, 2, 5]]))[0]) == pytest.approx(float(want), abs=1e-6)


def test_singular_vectors_are_those_of_the_whole_product():
    """What a head reads and what it writes for that, in pairs whose signs fit together."""
    linear = zoo.affine_model()
    lens, kinds = tll.Lens(linear), ["OV in", "OV out"]
    report = weights(linear, {"logit": lens}, kinds=kinds, layers=[1], directions=3, k=5, n_random=2, show_progress=False)
    ids = {reading.kind: reading.ids.view(-1, 3, 2, 5) for reading in report.readings if reading.kind in kinds}
    for head in range(2):
        u, _, vh = torch.linalg.svd(linear.W_V[1, head] @ linear.W_O[1, head])
        for i in range(3):
            x = torch.stack([u[:, i], -u[:, i]]), torch.stack([vh[i], -vh[i]])
            want = torch.cat([tokens_of(lens, layer, y.detach(), 5) for layer, y in zip((1, 2), x, strict=True)], 1)
            got = torch.cat([ids[kind][head, i] for kind in kinds], 1)
            assert sorted(got.tolist()) == sorted(want.tolist())


# --- readings


def test_a_planted_direction_reads_as_its_tokens(model):
    """A direction whose image under norm and unembedding is made for one token, written into an MLP, is read as that token."""
    lens, d = tll.Lens(model), model.cfg.d_model
    w_u, (scale, _) = lens.readout.weights()[0], gain(lens.readout.norm_module, d, model.W_U)
    ids = torch.tensor([17, 230, 301])
    x = (w_u[:, ids] / w_u[:, ids].norm(dim=0)).T / scale  # so that gain * x points along the token
    direction = scale * (x - x.mean(-1, keepdim=True))
    want = (direction @ w_u).topk(5).indices
    assert torch.equal(tokens_of(lens, 1, 0.01 * x, 5), want) and (want[:, :2] == ids[:, None]).any(1).all()
    some = torch.arange(100, 320)
    assert torch.equal(tokens_of(lens, 1, x, 5, some), some[(direction @ w_u[:, some]).topk(5).indices])
    shift = torch.ones(d)
    maps = tll.Translators(
        [("blocks.1.hook_resid_pre", "blocks.2.hook_resid_post")], torch.eye(d)[None] * 3, shift[None], n_layers=3
    )  # fmt: skip
    assert torch.equal(tokens_of(tll.Lens(model, maps), 1, x, 5), want)  # length and bias do not count


def ids_of(report):
    """What must agree whatever the signs and the order of heads' singular vectors: top tokens, signs as pairs."""
    return {
        (r.kind, r.block): [{tuple(row) for row in pair} for pair in zip(r.ids[::2].tolist(), r.ids[1::2].tolist(), strict=True)]
        if "columns" not in r.kind else r.ids.tolist()
        for r in report.readings if r.kind != RANDOM
    }  # fmt: skip


def same(first, second):
    """The share of readings that agree; singular values of random weights are near each other, so not all need to."""
    a, b = ids_of(first), ids_of(second)
    assert set(a) == set(b)
    return {kind: sum(x == y for key in a if key[0] == kind for x, y in zip(a[key], b[key], strict=True)) / sum(len(a[key]) for key in a if key[0] == kind) for kind in KINDS}  # fmt: skip


@pytest.mark.parametrize("arch", ["gpt2", "llama", "neox"])
def test_folded_and_raw_weights_read_alike(arch, monkeypatch):
    """With the gains of the norms put in; without them the check fails. Llama's keys and values are shared by two heads each."""
    raw, folded = (zoo.build(arch, kind) for kind in zoo.FEW_KINDS)
    run = lambda m: weights(m, {"logit": tll.Lens(m)}, **few)
    first = run(raw)
    assert len(ids_of(first)) == len(KINDS) * raw.cfg.n_layers
    agree = same(first, run(folded))
    assert all(share > 0.9 for share in agree.values()), agree
    monkeypatch.setattr(module, "gain", lambda norm, d, like: (torch.ones(d), False))
    assert min(same(run(raw), run(folded)).values()) < 0.5


def test_layers_of_what_reads_and_writes(model):
    """What reads is decoded before its block, what writes after it: a lens that knows one layer is enough for each."""
    d = model.cfg.d_model
    at = lambda layer: tll.Lens(model, tll.Translators([(f"blocks.{layer}.hook_resid_pre", "blocks.2.hook_resid_post")], torch.eye(d)[None], torch.zeros(1, d), n_layers=3))  # fmt: skip
    assert weights(model, {"x": at(1)}, kinds=["OV in"], layers=[1], **few).readings
    assert weights(model, {"x": at(2)}, kinds=["OV out"], layers=[1], **few).readings
    with pytest.raises(ValueError, match="'x' has no layer 2"):
        weights(model, {"x": at(1)}, kinds=["OV out"], layers=[1], **few)


@pytest.fixture(scope="module")
def report(model):
    return weights(model, {"logit": tll.Lens(model), "same": tll.Lens(model)}, **few)


def test_equal_lenses_read_alike(report):
    assert report.summary("logit", "OV in") == report.summary("same", "OV in")


def test_random_weights_are_as_coherent_as_random_vectors(report):
    mean, low, high, above = report.summary("logit", RANDOM)
    assert low < mean < high and above == pytest.approx(0.05, abs=0.03)


def test_embeddings_may_be_given(model, report):
    given = weights(model, {"logit": tll.Lens(model)}, embeddings=model.W_E.detach(), kinds=["OV in"], **few)
    assert torch.equal(given.scores("logit", "OV in"), report.scores("logit", "OV in"))


def test_the_result_has_its_table_figure_and_frame(report, tmp_path):
    text = report.markdown()
    for word in (*KINDS, RANDOM, "most coherent, logit", "above"):
        assert word in text
    assert (report.save(tmp_path / "a") / "coherence.svg").exists()
    vectors = 3 * (4 * 4 * 3 * 2 + 2 * 3 * 2 + 2 * 12 + 40)
    assert len(report.to_frame()) == 2 * vectors
    assert all(a <= b for a, b in pairwise(r.block for r in report.readings))


def test_bad_input_is_refused(model):
    lenses = {"logit": tll.Lens(model)}
    for kwargs, message in (
        ({"directions": 9}, "directions is 9: a head has 8 dimensions"),
        ({"directions": 33, "kinds": ["MLP out, singular"]}, r"the residual stream \(d_model\) has 32 dimensions"),
        ({"k": 1}, "k is 1"),
        ({"k": 321}, "at most the vocabulary of 320"),
        ({"kinds": ["OV"]}, "kinds must be 'QK query', .* got 'OV'"),
        ({"layers": [3]}, r"there is no block 3: layer 3 is the final residual"),
        ({"layers": []}, "expected different layers, at least one"),
        ({"among": torch.arange(3)}, "among has 3 tokens: pass 10 or more"),
        ({"embeddings": "W_Q"}, "embeddings must be 'W_E', 'W_U' or a matrix"),
        ({"embeddings": torch.ones(7, 3)}, "embeddings have 7 rows"),
        ({"lenses": {"far": tll.Lens(zoo.build("gpt2", zoo.FEW_KINDS[1]))}}, "lens 'far' was made for another model object"),
    ):
        with pytest.raises(ValueError, match=message):
            weights(model, **{"lenses": lenses, **kwargs})


def test_a_model_without_an_mlp_says_so():
    linear = zoo.affine_model()
    with pytest.raises(ValueError, match="shows no W_in in mlp"):
        weights(linear, {"logit": tll.Lens(linear)}, kinds=["MLP in, singular"], directions=2)


def test_the_command_runs(model):
    from tl_lenses.cli.experiment import Run
    from tl_lenses.cli.lens_experiments import weights as command

    maps = tll.fit_regression(model, zoo.tokens(20, 12))
    report = command(Run(model, layers=[1], n=6, lenses={"maps": maps}), directions=2)
    assert report.lenses == ["logit", "maps"] and len(report.scores("maps", "MLP in, columns")) == 6

"""Causal basis extraction on planted directions, the fast energy against the plain one, and the model's own answer."""

from importlib import import_module

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses.experiments import basis as B
from tl_lenses.experiments import energy as EN

C = import_module("tl_lenses.experiments.tuned_lens.causal_basis")  # the package has a function of this name
D = zoo.D_MODEL
RANDOM = torch.Generator().manual_seed(0)
TOKENS = torch.randint(4, zoo.D_VOCAB, (4, 12), generator=torch.Generator().manual_seed(1))


def unit(seed, n=1):
    x = torch.linalg.qr(torch.randn(D, n, generator=torch.Generator().manual_seed(seed))).Q.T
    return x[0] if n == 1 else x


def planted(model, n=400):
    """A lens that reads two directions only, and states that vary along all but the second, in which they stand far out.

    The second is read weakly: an ablation along a mixture of both would carry the variation of the first into it, and where both
    are read alike that mixture is the true maximum.
    """
    along, aside = unit(3, 2)
    write = unit(4, 2) * D**0.5
    shift = torch.randn(D, generator=torch.Generator().manual_seed(5)) * 2
    weight = 0.5 * (torch.outer(write[0], along) + 0.1 * torch.outer(write[1], aside))
    rows = [(tll.site(model, 1), tll.site(model, -1))]
    lens = tll.Lens(model, tll.Translators(rows, weight[None], shift[None], n_layers=model.cfg.n_layers))
    noise = torch.randn(n, D, generator=torch.Generator().manual_seed(6))
    return lens[1], noise - (noise @ aside)[:, None] * aside + 4 * aside, along, aside


@pytest.mark.parametrize("solver", B.SOLVERS)
def test_a_planted_direction_is_found_first(model, solver):
    decode, states, along, aside = planted(model)
    basis = B.extract(decode, states, 3, solver=solver)
    assert abs(float(basis.vectors[0] @ along)) > 0.95
    assert float(basis.energies[1]) < 0.1 * float(basis.energies[0])
    assert abs(float(basis.vectors[0] @ aside)) < 0.2  # large, and the same everywhere: the mean says it all


def test_an_ablation_to_zero_is_caught(model, monkeypatch):
    decode, states, along, aside = planted(model)
    monkeypatch.setattr(EN, "ablate", lambda h, v, mean, x=None: (x or (h, v))[0] - (h @ v)[:, None] * (x or (h, v))[1])
    basis = B.extract(decode, states, 3)
    assert abs(float(basis.vectors[0] @ along)) < 0.95 and abs(float(basis.vectors[0] @ aside)) > 0.2


def test_what_is_found_is_a_maximum_above_its_start(model):
    states = torch.randn(80, D, generator=torch.Generator().manual_seed(5))
    lens = tll.Lens(model)
    energy, start = EN.energy_of(lens[2], states), B._starts(lens[2], 1)[:, 0]
    for solver in B.SOLVERS:
        basis = B.extract(lens[2], states, 1, solver=solver)
        top = float(basis.energies[0])
        assert top > 1.5 * float(energy(start).detach())
        nearby = [basis.vectors[0] + 0.05 * v / v.norm() for v in torch.randn(50, D, generator=RANDOM)]
        assert top >= max(float(energy(v / v.norm()).detach()) for v in nearby) * (1 - 5e-3)


@pytest.mark.parametrize("arch,kind", zoo.cases(("gpt2", "llama", "gemma2", "neox"), zoo.FEW_KINDS))
def test_the_fast_energy_and_its_gradient_are_those_of_the_lens(arch, kind):
    model = zoo.build(arch, kind)
    width = model.cfg.d_model
    maps = tll.fit_regression(model, torch.cat([TOKENS, TOKENS.flip(1)]), layers=[1])
    decode = tll.Lens(model, maps)[1]
    states = torch.randn(40, width, generator=torch.Generator().manual_seed(6)) * 2 + 1
    for start in (0, 1):
        fast, plain = EN.energy_of(decode, states), EN.energy_of(decode, states, fast=False)
        assert (fast.plane is None) == (arch == "gemma2")  # a soft cap follows
        v = torch.randn(width, generator=torch.Generator().manual_seed(start))
        v = (v / v.norm()).requires_grad_()
        values = [fast(v), plain(v), fast.exact(v)]
        slopes = [torch.autograd.grad(x, v)[0] for x in values]
        for value, slope in zip(values[:2], slopes[:2], strict=True):
            assert torch.allclose(value, values[2], rtol=1e-4, atol=1e-6)
            assert torch.allclose(slope, slopes[2], rtol=1e-3, atol=1e-4 * float(slopes[2].norm()))


def test_a_norm_that_leaves_the_plane_is_not_sent_through_it(model, monkeypatch):
    decode = tll.Lens(model)[1]
    states = torch.randn(30, D, generator=torch.Generator().manual_seed(7))
    monkeypatch.setattr(type(decode.readout), "norm", lambda self, x: torch.tanh(x))
    energy = EN.energy_of(decode, states)
    assert energy.plane is None
    monkeypatch.setattr(EN, "PLANE", 1e9)  # without the check the number would be wrong
    wrong, v = EN.energy_of(decode, states), unit(8)
    assert abs(float(wrong(v)) / float(energy(v)) - 1) > 0.01


def test_the_fast_solver_finds_what_the_published_one_finds_for_less(model):
    states = torch.randn(160, D, generator=torch.Generator().manual_seed(9)) * torch.linspace(0.2, 2, D)
    ours, theirs = (B.extract(tll.Lens(model)[1], states, 8, solver=solver) for solver in B.SOLVERS)
    assert torch.allclose(ours.energies[:2], theirs.energies[:2], rtol=2e-2)
    assert float(ours.energies.sum() / theirs.energies.sum()) > 0.95  # on the lab model: benchmarks/causal_basis.py
    assert ours.evaluations < theirs.evaluations
    for basis in (ours, theirs):
        assert torch.allclose(basis.vectors @ basis.vectors.T, torch.eye(8), atol=1e-4)
        assert (basis.energies.diff() <= 0).all()


def test_a_whole_basis_is_orthonormal(model):
    basis = B.extract(tll.Lens(model)[1], torch.randn(40, D, generator=torch.Generator().manual_seed(2)), D)
    assert torch.allclose(basis.vectors @ basis.vectors.T, torch.eye(D), atol=1e-4)


def test_at_the_final_state_the_lens_is_the_model(model):
    depth = model.cfg.n_layers
    result = C.causal_basis(model, tll.Lens(model), TOKENS, k=4, layers=[1, depth], n=30)
    assert result.settings["n"] == 33  # whole rows of 11
    assert torch.allclose(result.grid.at(layer=depth)["effect"], result.bases[depth].energies, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(result.grid.at(layer=1)["effect"], result.bases[1].energies, rtol=1e-3)
    assert result.spearman(depth) == pytest.approx(1.0)


def test_an_ablation_in_the_wrong_place_is_caught(model, monkeypatch):
    depth = model.cfg.n_layers
    monkeypatch.setattr(C, "site", lambda model, layer: tll.site(model, layer - 1))  # an output taken for an input
    result = C.causal_basis(model, tll.Lens(model), TOKENS, k=4, layers=[depth], n=30)
    assert not torch.allclose(result.grid.at(layer=depth)["effect"], result.bases[depth].energies, rtol=1e-2)


def test_padding_changes_nothing(model):
    plain = C.causal_basis(model, tll.Lens(model), TOKENS, k=2, layers=[1], n=100)
    padded = torch.cat([torch.full((4, 3), zoo.PAD), TOKENS], 1)
    mask = torch.cat([torch.zeros(4, 3), torch.ones(4, 12)], 1).long()
    other = C.causal_basis(model, tll.Lens(model), tll.Batch(padded, mask), k=2, layers=[1], n=100)
    assert other.settings["n"] == plain.settings["n"]
    assert torch.allclose(plain.bases[1].energies, other.bases[1].energies, rtol=1e-2)
    assert torch.allclose(plain.grid.at(layer=1)["effect"], other.grid.at(layer=1)["effect"], rtol=2e-2)


def test_the_report_has_its_tables_figures_and_frame(model, tmp_path):
    result = C.causal_basis(model, tll.Lens(model), TOKENS, k=3, layers=[0, 2], n=20)
    assert "Spearman" in str(result) and "| 2 |" in result.markdown()
    folder = result.save(tmp_path / "out")
    assert {f.name for f in folder.iterdir()} >= {"result.json", "result.csv", "effects.svg", "spearman.svg"}
    assert len(result.to_frame()) == 6


def test_bad_input_is_refused_before_any_pass(model, monkeypatch):
    lens, other = tll.Lens(model), tll.Lens(zoo.build("gpt2", zoo.FEW_KINDS[-1]))
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("ran"))
    for settings, message in (
        ({"k": D + 1}, f"k is {D + 1}: a basis of this model has 1 to {D} directions"),
        ({"k": 0}, "k is 0"),
        ({"solver": "adam"}, "solver must be"),
        ({"layers": [9]}, "no layer 9"),
        ({"layers": []}, "expected different layers, at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            C.causal_basis(model, lens, TOKENS, **settings)
    with pytest.raises(ValueError, match="was made for another model object"):
        C.causal_basis(model, other, TOKENS)
    with pytest.raises(ValueError, match="gives 0 positions"):
        C.causal_basis(model, lens, TOKENS[:, :1])


def test_a_lens_without_the_layer_is_refused(model):
    lens = tll.Lens(model, tll.fit_regression(model, TOKENS, layers=[1]))
    with pytest.raises(ValueError, match="has no layer 0"):
        C.causal_basis(model, lens, TOKENS, k=2)


def test_the_partition_function_survives_logits_far_above_the_former_leader():
    x, g, b = (torch.randn(*shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate([(6, 50), (50,), (50,)]))
    along, across = torch.linspace(0.5, 1.5, 6), torch.linspace(-300, 300, 6)
    inputs = [v.requires_grad_() for v in (along, across, g)]
    got = EN._Partition.apply(*inputs, x, b, x.argmax(-1))
    want = (inputs[0][:, None] * x + inputs[1][:, None] * inputs[2] + b).logsumexp(-1).mean()
    assert torch.allclose(got, want, rtol=1e-5)
    for by_hand, theirs in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        assert torch.allclose(by_hand, theirs, rtol=1e-3, atol=1e-4)

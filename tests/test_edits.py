"""The contract that every edit keeps, and the law of each."""

import pytest
import torch

from tl_lenses import edits
from tl_lenses.translators import Affine

D = 6
X = torch.randn(4, 3, D, generator=torch.Generator().manual_seed(0))
V = torch.randn(D, generator=torch.Generator().manual_seed(1))
MAP = Affine(torch.randn(D, D, generator=torch.Generator().manual_seed(2)), V)

ALL = {
    "replace": edits.replace(V),
    "add": edits.add(V, scale=2.0),
    "scale": edits.scale(0.5),
    "zero": edits.zero,
    "mean": edits.mean(),
    "mean-all": edits.mean(over="all"),
    "mean-given": edits.mean(V),
    "resample": edits.resample(3),
    "resample-source": edits.resample(3, source=torch.randn(9, 3, D)),
    "noise": edits.noise(0.3, seed=1),
    "interpolate": edits.interpolate(V, 0.3),
    "project": edits.project(V),
    "project-keep": edits.project(V, keep=True),
    "project-toward-edit": edits.project(V, toward=edits.mean(over="all")),
    "where": edits.where(torch.tensor([[True, False, True]] * 4), edits.resample(2)),
    "norm_match": edits.norm_match(V),
    "affine": edits.affine(MAP),
    "affine-pinv": edits.affine(MAP, pinv=True),
}


@pytest.mark.parametrize("name", ALL)
def test_contract(name):
    """Same shape and type, nothing in place, does something, the same twice, differentiable."""
    edit = ALL[name]
    before = X.clone()
    y = edit(X)
    assert y.shape == X.shape and y.dtype == X.dtype
    assert torch.equal(X, before)
    assert not torch.equal(y, X)
    assert torch.equal(edit(X), y)
    assert y.data_ptr() != X.data_ptr()
    x = X.clone().requires_grad_()
    out = edit(x)
    if out.requires_grad:
        out.sum().backward()
        assert x.grad.isfinite().all()
    assert edit(X.double()).dtype == torch.float64


def test_every_public_edit_is_in_the_contract():
    public = {
        n
        for n, f in vars(edits).items()
        if callable(f) and not n.startswith("_") and getattr(f, "__module__", "") == edits.__name__
    }
    assert public == {name.split("-")[0] for name in ALL}


@pytest.mark.parametrize("edit", [edits.scale(1.0), edits.add(V, 0.0), edits.interpolate(V, 0.0), edits.noise(0.0)])
def test_an_edit_by_nothing_changes_nothing(edit):
    assert torch.equal(edit(X), X)


@pytest.mark.parametrize(
    "edit,expected",
    [(edits.replace(V), V.expand_as(X)), (edits.zero(), torch.zeros_like(X)), (edits.affine(MAP), MAP(X))],
    ids=["replace", "zero", "affine"],
)
def test_the_new_value_is_the_formula(edit, expected):
    assert torch.equal(edit(X), expected)


def test_interpolation_ends_at_the_value():
    assert torch.allclose(edits.interpolate(V, 1.0)(X), V.expand_as(X))


def test_the_mean_is_over_the_batch():
    assert torch.allclose(edits.mean()(X)[2], X.mean(0))


def test_the_mean_over_all_is_over_positions_as_well():
    assert torch.allclose(edits.mean(over="all")(X)[1, 2], X.mean((0, 1)))


def test_the_pseudo_inverse_undoes_the_map():
    assert torch.allclose(edits.affine(MAP, pinv=True)(edits.affine(MAP)(X)), X, atol=1e-3)


def test_noise_is_that_of_its_seed():
    assert not torch.equal(edits.noise(1.0, seed=1)(X), edits.noise(1.0, seed=2)(X))


def test_resample_is_a_derangement():
    for n in (2, 3, 7):
        x = torch.arange(n, dtype=torch.float32).reshape(n, 1, 1)
        for seed in range(20):
            y = edits.resample(seed)(x)
            assert (y != x).all() and sorted(y.flatten().tolist()) == list(range(n))
    with pytest.raises(ValueError, match="at least two rows"):
        edits.resample()(X[:1])


def test_projection():
    directions = torch.randn(2, D, generator=torch.Generator().manual_seed(4))
    removed = edits.project(directions)(X)
    assert (removed @ directions.T).abs().max() < 1e-5
    assert torch.allclose(edits.project(directions)(removed), removed, atol=1e-6)  # idempotent
    kept = edits.project(directions, keep=True)(X)
    assert torch.allclose(removed + kept, X, atol=1e-5)
    repeated = edits.project(torch.cat([directions, directions[:1] * 2]))(X)  # dependent rows span the same
    assert torch.allclose(repeated, removed, atol=1e-5)
    mean = X.mean((0, 1))
    toward = edits.project(directions, toward=mean)(X)
    assert torch.allclose(toward @ directions.T, (mean @ directions.T).expand(4, 3, 2), atol=1e-5)
    with pytest.raises(ValueError, match="all zero"):
        edits.project(torch.zeros(D))


def test_norm_match():
    y = edits.norm_match(V)(X)
    assert torch.allclose(y.norm(dim=-1), X.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(torch.cosine_similarity(y, V.expand_as(X), dim=-1), torch.ones(4, 3), atol=1e-5)
    assert torch.allclose(edits.norm_match(edits.add(V), norm=7.0)(X).norm(dim=-1), torch.full((4, 3), 7.0), rtol=1e-5)
    assert edits.norm_match(torch.zeros(D))(X).isfinite().all()


@pytest.mark.parametrize(
    ("value", "selected"),
    [(torch.randn(3, D), (1, slice(None))), (torch.randn(4, D), (slice(None), 2))],
    ids=["per position", "per row"],
)
def test_a_value_may_differ_by_position_or_by_row(value, selected):
    assert torch.equal(edits.replace(value)(X)[selected], value)


def test_a_value_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \[5\] does not fit the selected activation \[4, 3, 6\]"):
        edits.replace(torch.zeros(5))(X)


def test_a_mean_is_over_what_is_there():
    with pytest.raises(ValueError, match="over must be"):
        edits.mean(over="rows")


BASIS = torch.linalg.qr(torch.randn(D, 2, generator=torch.Generator().manual_seed(5))).Q.T


def test_a_projection_toward_another_edit_changes_the_subspace_alone():
    got, other = edits.project(BASIS, toward=edits.resample(1), orthonormal=True)(X), edits.resample(1)(X)
    assert torch.allclose(got @ BASIS.T, other @ BASIS.T, atol=1e-5)
    rest = lambda x: x - (x @ BASIS.T) @ BASIS
    assert torch.allclose(rest(got), rest(X), atol=1e-5)


@pytest.mark.parametrize(
    "rows",
    [BASIS * 1.1, torch.stack([BASIS[0], BASIS[0] + 0.1 * BASIS[1]]), torch.full((2, D), torch.nan)],
    ids=["long", "skewed", "nan"],
)
def test_directions_that_are_said_to_be_orthonormal_are_checked(rows):
    with pytest.raises(ValueError, match="said to be orthonormal and are not"):
        edits.project(rows, orthonormal=True)


def test_other_directions_are_not_checked():
    edits.project(BASIS * 1.1)


def test_where_edits_the_masked_positions_as_one_batch():
    mask = torch.rand(4, 3, generator=torch.Generator().manual_seed(6)) < 0.6
    y = edits.where(mask, edits.mean())(X)
    assert torch.equal(y[~mask], X[~mask])
    assert torch.allclose(y[mask], X[mask].mean(0).expand(int(mask.sum()), D), atol=1e-6)
    z = edits.where(mask, edits.resample(3))(X)
    assert torch.equal(z[mask].sort(0).values, X[mask].sort(0).values) and (z[mask] != X[mask]).all()
    with pytest.raises(ValueError, match=r"mask of shape \[4, 2\] does not fit positions \[4, 3\]"):
        edits.where(mask[:, :2], edits.zero)(X)

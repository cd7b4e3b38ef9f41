"""The affine module and its closed forms, against float64 references and their laws."""

import pytest
import torch

from tl_lenses import solve
from tl_lenses.moments import moments
from tl_lenses.translators import Affine, Translators


def _random(n_rows=3, d=5, n_layers=3, **meta):
    g = torch.Generator().manual_seed(0)
    rows = [(f"blocks.{i}.hook_resid_pre", f"blocks.{n_layers - 1}.hook_resid_post") for i in range(n_rows)]
    return Translators(
        rows, torch.randn(n_rows, d, d, generator=g), torch.randn(n_rows, d, generator=g), n_layers=n_layers, meta=meta
    )


def _data(n=400, d=6, rows=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, d, generator=g, dtype=torch.float64) @ torch.randn(rows, d, d, generator=g, dtype=torch.float64) + 3
    w, b = (torch.randn(rows, d, d, generator=g, dtype=torch.float64), torch.randn(rows, d, generator=g, dtype=torch.float64))
    return x, w, b


# --- Affine and Translators


def _affines():
    g = torch.Generator().manual_seed(0)
    a, b, wide = (Affine(torch.randn(n, 4, generator=g), torch.randn(n, generator=g)) for n in (4, 4, 6))
    return a, b, wide, torch.randn(7, 4, generator=g)


def test_a_product_of_maps_is_one_after_the_other():
    a, b, wide, x = _affines()
    assert torch.allclose((a @ b)(x), a(b(x)), atol=1e-5) and not torch.allclose(a(x), x, atol=0.1)
    with pytest.raises(ValueError, match="inner widths differ"):
        a @ wide


def test_the_pseudoinverse_leads_back():
    a, _, wide, x = _affines()
    for affine in (a, wide):
        assert torch.allclose(affine.pinv()(affine(x)), x, atol=1e-4)


def test_a_map_refuses_states_of_another_width():
    with pytest.raises(ValueError, match="width 4, got"):
        _affines()[0](torch.zeros(2, 5))


def test_translators_apply_each_row_to_its_own_input():
    t = _random()
    x = torch.randn(3, 2, 7, 5, generator=torch.Generator().manual_seed(1))
    y = t(x)
    for i in range(3):
        assert torch.allclose(y[i], t[i](x[i]), atol=1e-5)
    assert torch.allclose(t.weights - t.delta, torch.eye(5).expand(3, 5, 5))


def test_a_map_is_found_by_layer_site_or_target():
    t = _random()
    assert torch.equal(t[1].weight, t["blocks.1.hook_resid_pre"].weight)
    assert torch.equal(t[1].weight, t["blocks.0.hook_resid_post"].weight)  # the same place
    assert torch.equal(t[1, 3].weight, t[1].weight)
    assert torch.equal(t[3].weight, torch.eye(5)) and torch.equal(t[-1].weight, torch.eye(5))
    assert 3 in t and 7 not in t
    assert t.select([2, 0]).sources == (2, 0)
    with pytest.raises(KeyError, match=r"not fitted; fitted are \[0\]"):
        t.select([0])[1]
    with pytest.raises(KeyError, match="layers 0..3"):
        t[4]


def _two_targets():
    """Maps of one layer into two others, of another width."""
    source, targets = "blocks.0.hook_resid_pre", ("blocks.1.hook_resid_pre", "blocks.2.hook_resid_post")
    rows = [(source, target) for target in targets]
    return Translators(rows, torch.randn(2, 4, 3), torch.zeros(2, 4), n_layers=3)


def test_a_layer_of_two_targets_wants_its_target():
    t = _two_targets()
    with pytest.raises(KeyError, match=r"several targets.*\[1, 3\]"):
        t[0]
    assert t[0, 1](torch.ones(3)).shape == (4,)


def test_between_different_widths_there_is_no_identity():
    t = _two_targets()
    assert torch.equal(t.delta, t.weights)


def test_constructor_refuses():
    rows = [("a", "b")]
    with pytest.raises(ValueError, match="1 rows need as many"):
        Translators(rows, torch.zeros(2, 3, 3), torch.zeros(2, 3), n_layers=1)
    with pytest.raises(ValueError, match="not finite"):
        Translators(rows, torch.full((1, 3, 3), torch.nan), torch.zeros(1, 3), n_layers=1)
    with pytest.raises(ValueError, match="given twice"):
        Translators(rows * 2, torch.zeros(2, 3, 3), torch.zeros(2, 3), n_layers=1)


def test_frozen_until_asked():
    t = _random()
    assert not any(p.requires_grad for p in t.parameters())
    t.requires_grad_()
    t[1](torch.ones(5)).sum().backward()
    assert t.delta.grad is not None and t.delta.grad[1].abs().sum() > 0 and t.delta.grad[0].abs().sum() == 0


def test_basis_conversion():
    t = _random(basis="centered")
    h = torch.randn(9, 5, generator=torch.Generator().manual_seed(2)) + 4
    raw = t.to_raw()
    assert raw.basis == "raw"
    assert torch.allclose(raw[1](h), t[1](h - h.mean(-1, keepdim=True)), atol=1e-5)
    assert not torch.allclose(t[1](h), raw[1](h), atol=0.1)
    back = raw.to_centered()  # W 1 = 0 now
    assert back.basis == "centered"
    with pytest.raises(ValueError, match="center_writing_weights=False"):
        _random(basis="raw").to_centered()


# --- moments


@pytest.mark.parametrize("order", ["at once", "in a row", "two halves", "backwards"])
def test_moments_do_not_depend_on_how_the_data_come(order):
    x, w, b = _data()
    y = x @ w.mT + b[:, None]
    parts = [moments(x[:, i : i + 37], y[:, i : i + 37]) for i in range(0, 400, 37)]
    m = {
        "at once": lambda: moments(x, y),
        "in a row": lambda: sum(parts),
        "two halves": lambda: sum(parts[:5]) + sum(parts[5:]),
        "backwards": lambda: sum(reversed(parts)),
    }[order]()
    far_x, far_y = (z - z.mean(1, keepdim=True) for z in (x, y))
    assert m.n == 400
    assert torch.allclose(m.mean_x, x.mean(1), rtol=1e-12)
    assert torch.allclose(m.xx, far_x.mT @ far_x, rtol=1e-10)
    assert torch.allclose(m.yx, far_y.mT @ far_x, rtol=1e-9, atol=1e-9)
    assert torch.allclose(m.yy, (far_y**2).sum(1), rtol=1e-10)


def test_moments_of_another_shape_do_not_add_up():
    x, _, _ = _data()
    with pytest.raises(ValueError, match="different shape"):
        moments(x, x) + moments(x[..., :3], x)


def test_moments_refuse_what_is_not_finite():
    x, _, _ = _data()
    with pytest.raises(ValueError, match="not finite"):
        moments(x / 0, x)


def test_moments_keep_precision_far_from_zero():
    x, _, _ = _data(rows=1)
    far = (x + 1e4).float()
    m = sum(moments(far[:, i : i + 50], far[:, i : i + 50]) for i in range(0, 400, 50))
    exact = moments(far.double(), far.double())
    assert torch.allclose(m.xx, exact.xx, rtol=1e-9)


# --- solve


def test_least_squares_recovers_the_map():
    x, w, b = _data()
    m = moments(x, x @ w.mT + b[:, None])
    weight, bias = solve.ridge(m, 0.0)
    assert torch.allclose(weight, w, atol=1e-8) and torch.allclose(bias, b, atol=1e-7)
    assert torch.allclose(solve.r_squared(m, weight, bias), torch.ones(2, dtype=torch.float64))
    assert solve.r_squared(m, torch.eye(6).double().expand(2, 6, 6), torch.zeros(2, 6).double()).max() < 0.9


def test_ridge_equals_its_definition_for_all_strengths():
    x, w, b = _data()
    y = x @ w.mT + b[:, None] + torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    m = moments(x, y)
    for toward, t in (("identity", torch.eye(6, dtype=torch.float64)), ("zero", torch.zeros(6, 6, dtype=torch.float64))):
        for strength, (weight, bias) in zip((0.0, 0.1, 10.0), solve.ridge_path(m, (0.0, 0.1, 10.0), toward), strict=True):
            c, cross = m.xx / m.n, m.yx / m.n
            k = strength * c.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
            eye = torch.eye(6, dtype=torch.float64)
            assert torch.allclose(weight, (cross + k * t) @ torch.linalg.inv(c + k * eye), atol=1e-9)
            assert torch.allclose(bias, m.mean_y - (weight @ m.mean_x[..., None])[..., 0])
        huge, _ = solve.ridge(m, 1e9, toward)
        assert torch.allclose(huge, t.expand_as(huge), atol=1e-6)


def test_ridge_where_directions_are_never_taken():
    x, w, b = _data()
    x[..., -1] = 2 * x[..., 0]  # a dependent direction
    m = moments(x, x @ w.mT + b[:, None])
    weight, bias = solve.ridge(m, 0.0)
    assert weight.abs().max() < 1e3
    assert torch.allclose(x @ weight.mT + bias[:, None], x @ w.mT + b[:, None], atol=1e-6)


def _rotation():
    x, _, b = _data()
    generator = torch.Generator().manual_seed(3)
    return x, b, torch.linalg.qr(torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)).Q


def test_procrustes_finds_a_rotation():
    x, b, q = _rotation()
    weight, bias = solve.procrustes(moments(x, x @ q.mT + b[:, None]))
    assert torch.allclose(weight, q, atol=1e-8) and torch.allclose(bias, b, atol=1e-7)


def test_procrustes_finds_a_scaled_rotation():
    x, _, q = _rotation()
    assert torch.allclose(solve.procrustes(moments(x, 2.5 * x @ q.mT), scaled=True)[0], 2.5 * q, atol=1e-8)


def test_a_shift_is_the_difference_of_the_means():
    x, b, _ = _rotation()
    weight, bias = solve.shift(moments(x, x + b[:, None]))
    assert torch.equal(weight, torch.eye(6).double().expand(2, 6, 6)) and torch.allclose(bias, b)


def test_solvers_refuse():
    x, _, _ = _data(n=6)
    with pytest.raises(ValueError, match=r"6 tokens are fewer than a covariance of width 6 needs \(at least 7\)"):
        solve.ridge(moments(x, x))
    x, _, _ = _data()
    with pytest.raises(ValueError, match="a ridge strength must be at least 0"):
        solve.ridge(moments(x, x), -1.0)
    with pytest.raises(ValueError, match="equal widths"):
        solve.ridge(moments(x, x[..., :3]), 0.1, "identity")
    with pytest.raises(ValueError, match="equal widths"):
        solve.procrustes(moments(x, x[..., :3]))

"""The step of tuned-lens training: products in bf16, a teacher made chunk by chunk, a layer's own positions; against autograd."""

import dataclasses

import pytest
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode

import tl_lenses as tll
import tl_lenses.hooks
from tl_lenses import divergence as D
from tl_lenses.divergence import fused_ce, fused_kl
from tl_lenses.edits import scale
from tl_lenses.fit.common import rows_for
from tl_lenses.fit.optim import map_sizes, optimizer_step, optimizers_of, rate_scales, set_scales
from tl_lenses.fit.settings import Settings, default_lr
from tl_lenses.fit.step import PASS, head_of, loss_and_gradient, narrowed, pieces, scored_pairs, summed_losses
from tl_lenses.fit.stop import Watch
from tl_lenses.tokens import Batch
from tl_lenses.unembed import Readout

KIND = zoo.FEW_KINDS[0]


def _cap(z):
    return 3.0 * torch.tanh(z / 3.0)


def _problem(rows=3, n=40, d=24, d_vocab=300, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, n, d, generator=g, dtype=dtype)
    final = torch.randn(n, d, generator=g, dtype=dtype)
    w = torch.randn(d, d_vocab, generator=g, dtype=dtype) / 3
    return hidden, final, w, torch.randn(d_vocab, generator=g, dtype=dtype)


def _autograd(hidden, teacher, w, b, transform):
    """Loss per row and its gradient, with every logit in memory."""
    x = hidden.clone().requires_grad_()
    logq = transform(x @ w + b).log_softmax(-1)
    logp = teacher.log_softmax(-1)
    loss = (logp.exp() * (logp - logq)).sum(-1).mean(-1)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


@pytest.mark.parametrize("transform", [None, _cap], ids=["plain", "soft-cap"])
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_a_teacher_of_hidden_states_equals_its_logits_in_float64(transform, chunk_size):
    n = 2 + D.BLOCK["cpu"] // (4 * 30_000) * torch.get_num_threads()  # more positions than are worked on at once
    hidden, final, w, b = _problem(rows=2, n=n, d=8, d_vocab=30_000)
    f = transform or (lambda z: z)
    expected, grad = _autograd(hidden, f(final @ w + b), w, b, f)
    for teacher, by_layer in ((final, True), (f(final @ w + b), False)):
        y = hidden.clone().requires_grad_()
        got = fused_kl(y, teacher, w, b, transform=transform, chunk_size=chunk_size, teacher_hidden=by_layer)
        (got_grad,) = torch.autograd.grad(got.sum(), y)
        assert torch.allclose(got, expected, rtol=1e-12) and torch.allclose(got_grad, grad, rtol=1e-9, atol=1e-13)
    assert grad.abs().max() > 1e-3


def test_bfloat16_products_keep_the_loss_and_the_direction():
    hidden, final, w, b = _problem(n=200, d=64, d_vocab=2000)
    expected, grad = _autograd(hidden, final @ w + b, w, b, lambda z: z)
    y = hidden.float().requires_grad_()
    got = fused_kl(y, final.float(), w.bfloat16(), b.float(), teacher_hidden=True)
    (got_grad,) = torch.autograd.grad(got.sum(), y)
    cosine = torch.cosine_similarity(got_grad.double().flatten(1), grad.flatten(1), dim=1)
    # Measured: loss 3e-4 relative, cosine 0.99999.
    assert ((got - expected).abs() / expected).max() < 2e-3
    assert cosine.min() > 0.9995
    assert got_grad.dtype == torch.float32


def test_a_held_out_loss_keeps_its_digits_where_a_layer_is_nearly_right():
    _, final, w, _ = _problem(n=200, d=64, d_vocab=2000)
    generator = torch.Generator().manual_seed(5)
    hidden = final + 0.03 * torch.randn(1, 200, 64, generator=generator, dtype=torch.float64)
    expected, _ = _autograd(hidden, final @ w, w, torch.zeros(2000), lambda z: z)
    narrow = w.bfloat16()
    losses = {}
    for exact in (True, False):
        teacher = D.teacher_of(final.float(), narrow, None, None, hidden=True, exact=exact)
        losses[exact] = D.score(hidden.float(), teacher, narrow, None, None)
    errors = {exact: float((losses / 200 - expected).abs() / expected) for exact, (losses, _) in losses.items()}
    assert expected < 0.01 and errors[True] < 0.06 < errors[False], (expected, errors)  # measured 0.035 and 0.41
    assert torch.equal(losses[True][1], losses[False][1])  # the gradient is the same


def test_held_out_losses_are_the_exact_ones(model):
    tokens = zoo.tokens(6, 16)
    pairs, resid, depth = _step(model, tokens)[0], {}, int(model.cfg.n_layers)
    tll.run(model, tokens, [tll.read(tll.site(model, depth), resid, key=depth)])
    final = resid[depth].flatten(0, 1)
    noise = 0.01 * torch.randn(final.shape, generator=torch.Generator().manual_seed(5))
    pairs = dataclasses.replace(pairs, states=[final + noise])
    maps = torch.zeros(1, *[final.shape[1]] * 2), torch.zeros(1, final.shape[1])
    losses = {name: float(summed_losses(pairs, *maps, head_of(Readout(model), name))) for name in ("bfloat16", "float32")}
    grads = torch.zeros_like(maps[0]), torch.zeros_like(maps[1])
    rough = float(loss_and_gradient(pairs, *maps, head_of(Readout(model), "bfloat16"), *grads))
    errors = [abs(loss - losses["float32"]) / losses["float32"] for loss in (losses["bfloat16"], rough)]
    assert errors[0] < errors[1] / 3, errors


def test_what_all_logits_have_in_common_does_not_cost_bfloat16_its_digits():
    hidden, final, w, b = _problem(n=200, d=64, d_vocab=2000)
    hidden, final = hidden + 1, final + 1
    w = w - 1.5  # logits around -100, as GPT-2's
    assert -120 < float((final @ w).mean()) < -80
    expected, grad = _autograd(hidden, final @ w + b, w, b, lambda z: z)
    errors = []
    for centre in (True, False):
        y = hidden.float().requires_grad_()
        got = fused_kl(y, final.float(), narrowed(w.float(), torch.bfloat16, centre=centre), b.float(), teacher_hidden=True)
        (got_grad,) = torch.autograd.grad(got.sum(), y)
        cosine = torch.cosine_similarity(got_grad.double().flatten(1), grad.flatten(1), dim=1)
        errors.append((float(((got.detach() - expected).abs() / expected).max()), float(1 - cosine.min())))
    (loss, angle), (worse_loss, worse_angle) = errors
    assert loss < 5e-3 and angle < 5e-4
    assert worse_loss > 2 * loss and worse_angle > 2 * angle  # what it is for


TILES = [(1, 1, None), (12, 100, None), (6, 1700, None), (13, 7, 3), (80, 50, None), (5, 0, None)]
WIDE = 200_000  # a vocabulary of which 104 rows of logits in bf16 are all that may exist at a time


def _tiles(rows, n, size):
    return list(D.tiles(rows, n, WIDE, torch.bfloat16, torch.device("cpu"), size))


@pytest.mark.parametrize("rows,n,size", TILES)
def test_tiles_cover_every_position_of_every_layer_once(rows, n, size):
    count = torch.zeros(rows, n)
    for part, groups in _tiles(rows, n, size):
        for group in groups:
            count[group, part] += 1
    assert bool((count == 1).all())


@pytest.mark.parametrize("rows,n,size", [case for case in TILES if case[2] is None])
def test_logits_of_a_tile_fit_in_their_bytes(rows, n, size):
    for part, groups in _tiles(rows, n, size):
        for group in groups:
            held = (part.stop - part.start) * (group.stop - group.start) * WIDE * 2
            assert held <= D.CHUNK["cpu"] or part.stop - part.start == 1


@pytest.mark.parametrize("subsample", [1.0, 0.5])
def test_many_tiles_equal_one(model, subsample, monkeypatch):
    tokens = zoo.tokens(4, 16)
    whole = _step(model, tokens, subsample=subsample, chunk_size=1000)
    monkeypatch.setattr(D, "LAYERS", 1)
    many = _step(model, tokens, subsample=subsample, chunk_size=1000)
    for a, b in zip(whole[1:], many[1:], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)
    if subsample == 1:
        small = _step(model, tokens, chunk_size=7)
        for a, b in zip(whole[1:], small[1:], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_scoring_alone_gives_the_losses_of_a_step(model):
    tokens = zoo.tokens(4, 16)
    pairs, losses, *_ = _step(model, tokens, chunk_size=1000)
    alone = summed_losses(pairs, *_maps(model, len(losses)), head_of(Readout(model), "float32"), chunk_size=5)
    assert torch.allclose(alone / len(pairs), losses, rtol=1e-5)


class _Logits(TorchDispatchMode):
    """Notes the largest number of rows of logits, `[..., d_vocab]`, in a tensor that is made inside."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.ndim > 1 and made.shape[-1] == zoo.D_VOCAB:
            if made.shape[0] != zoo.D_MODEL:  # the unembedding itself
                self.most = max(self.most, made.numel() // zoo.D_VOCAB)
        return made


def test_memory_of_a_step_does_not_grow_with_a_smaller_share(model, monkeypatch):
    monkeypatch.setitem(D.CHUNK, "cpu", 4 * zoo.D_VOCAB * 12)  # twelve rows of logits
    tokens = zoo.tokens(4, 16)
    for share in (1.0, 0.5, 0.1):
        with _Logits() as seen:
            _step(model, tokens, subsample=share)
        assert 0 < seen.most <= 12 + 3, (share, seen.most)  # rounding of a share, per layer


def test_cross_entropy_of_a_float64_model_with_a_bias():
    model = zoo.copied(zoo.build("phi", KIND)).double()
    model.cfg.dtype = torch.float64  # HookedTransformer's norms cast to it
    tokens = zoo.tokens(2, 8)
    step = _step(model, tokens, loss="ce")
    assert all(part.isfinite().all() for part in step[1:]) and step[2].abs().max() > 0


def test_a_fit_under_an_edited_pattern_has_its_own_teacher(model):
    tokens = zoo.tokens(3, 12)
    hook = tll.patch("blocks.1.attn.hook_pattern", scale(0.5))
    tl_lenses.effects._LEADS.pop(model, None)  # as at first use, when the check of patterns makes a pass of its own
    first, second = (_step(model, tokens, hooks=[hook]) for _ in range(2))
    assert first[0].hidden and torch.equal(first[0].teacher, second[0].teacher) and torch.equal(first[1], second[1])


def test_a_batch_is_run_in_pieces_that_give_the_same_unless_a_hook_could_see_it(model, monkeypatch):
    tokens = zoo.tokens(5, 16)
    monkeypatch.setitem(PASS, "cpu", 40)
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    batch = Batch(tokens, mask)
    parts = list(pieces(model, batch, []))
    assert [len(p.tokens) for p in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([p.tokens for p in parts]), tokens)
    assert torch.equal(torch.cat([p.attention_mask for p in parts]), mask)
    wrong = tokens.clone()
    wrong[4, 2] = zoo.D_VOCAB
    with pytest.raises(ValueError, match="row 4"):  # of the batch and not of its piece
        list(pieces(model, Batch(wrong), []))
    hook = ("blocks.0.hook_resid_post", lambda x, hook: x - x.mean(0))
    assert [len(p.tokens) for p in pieces(model, batch, [hook])] == [5]
    model.add_hook(*hook)
    try:
        assert [len(p.tokens) for p in pieces(model, batch, [])] == [5]
    finally:
        model.reset_hooks()
    settings = dict(steps=2, init="identity", optimizer="sgd", precision="float32", layers=[0, 1])
    in_pieces = tll.fit_tuned(model, [batch, batch], **settings)
    monkeypatch.setitem(PASS, "cpu", 10**6)
    whole = tll.fit_tuned(model, [batch, batch], **settings)
    assert torch.allclose(in_pieces.weights, whole.weights, atol=1e-5) and not torch.equal(
        whole.weights[0], torch.eye(int(model.cfg.d_model))
    )


def _picked():
    """States of layers at positions of their own."""
    hidden, final, w, b = _problem(n=12)
    generator = torch.Generator().manual_seed(1)
    picks = torch.stack([torch.randperm(12, generator=generator)[:5] for _ in range(3)])
    return hidden, final, w, b, picks, torch.stack([row[pick] for row, pick in zip(hidden, picks, strict=True)])


def test_the_kl_at_a_layers_own_positions_is_exact():
    hidden, final, w, b, picks, chosen = _picked()
    y = chosen.clone().requires_grad_()
    got = fused_kl(y, final, w, b, teacher_hidden=True, picks=picks)
    (got_grad,) = torch.autograd.grad(got.sum(), y)
    for row, pick in enumerate(picks):
        expected, grad = _autograd(hidden[row, pick][None], (final @ w + b)[pick], w, b, lambda z: z)
        assert torch.allclose(got[row], expected[0]) and torch.allclose(got_grad[row], grad[0])


def test_the_cross_entropy_at_a_layers_own_positions_is_exact():
    _, _, w, b, picks, chosen = _picked()
    ids = torch.randint(0, 300, (12,))
    expected = torch.stack([fused_ce(c[None], ids[p], w, b)[0] for c, p in zip(chosen, picks, strict=True)])
    assert torch.allclose(fused_ce(chosen, ids, w, b, picks=picks), expected)


def _maps(model, n_rows):
    """Deltas and biases that are the same in every test."""
    g, d = torch.Generator().manual_seed(2), int(model.cfg.d_model)
    return torch.randn(n_rows, d, d, generator=g) / d, torch.randn(n_rows, d, generator=g) / d


def _step(model, tokens, *, precision="float32", hooks=(), loss="kl", **kwargs):
    rows = rows_for(model, None)
    head = head_of(Readout(model), precision)
    delta, biases = _maps(model, len(rows))
    grad_w, grad_b = torch.zeros_like(delta), torch.zeros_like(biases)
    pairs = scored_pairs(model, Batch(tokens), rows, list(hooks), True, 0 if loss == "kl" else 1, loss, head.readout)
    losses = loss_and_gradient(pairs, delta, biases, head, grad_w, grad_b, **kwargs)
    return pairs, losses / len(pairs), grad_w / len(pairs), grad_b / len(pairs)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("kind", zoo.FEW_KINDS)
def test_a_step_is_the_same_without_the_models_logits(arch, kind):
    model = zoo.build(arch, kind)
    tokens = zoo.tokens(4, 16)
    lean = _step(model, tokens, chunk_size=13)
    assert lean[0].hidden and lean[0].teacher.shape[1] == model.cfg.d_model
    watched = [("unembed.hook_out", lambda x, hook: None)]
    if "unembed.hook_out" not in model.hook_dict:
        watched = [(lambda name: name.endswith("ln_final.hook_scale"), lambda x, hook: None)]
    full = _step(model, tokens, hooks=watched)
    assert not full[0].hidden and full[0].teacher.shape[1] == model.cfg.d_vocab
    for a, b in zip(lean[1:], full[1:], strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)
    assert model(tokens).shape[1] == 16  # nothing is left on the model


def test_hooks_that_change_the_logits_reach_the_teacher(model):
    if "unembed.hook_out" not in model.hook_dict:
        pytest.skip("no hook after the unembedding")
    tokens = zoo.tokens(4, 16)
    flat = [("unembed.hook_out", lambda x, hook: x * 0)]
    assert not torch.allclose(_step(model, tokens, hooks=flat)[1], _step(model, tokens)[1], rtol=1e-2)
    model.add_hook(*flat[0])
    try:
        assert torch.allclose(_step(model, tokens)[1], _step(model, tokens, hooks=flat)[1])
    finally:
        model.reset_hooks()


def test_subsampling_has_the_right_expectation(model):
    tokens = zoo.tokens(4, 16)
    _, losses, grad_w, grad_b = _step(model, tokens)
    steps = [_step(model, tokens, subsample=0.25, seed=seed, chunk_size=20)[1:] for seed in range(200)]
    mean = [torch.stack(part).mean(0) for part in zip(*steps, strict=True)]
    error = [torch.stack(part).std(0) / 200**0.5 for part in zip(*steps, strict=True)]
    for got, expected, e in zip(mean, (losses, grad_w, grad_b), error, strict=True):
        # About one standard error off; a mean of wrong weights is off everywhere.
        assert ((got - expected).abs() / e.clamp_min(1e-9)).mean() < 1.3
    same = [_step(model, tokens, subsample=0.25, seed=3)[1] for _ in range(2)]
    assert torch.equal(*same) and not torch.equal(same[0], _step(model, tokens, subsample=0.25, seed=4)[1])


def test_precision_is_chosen_by_the_hardware():
    w = torch.zeros(4, 5)
    assert D.product_dtype("auto", w) == (torch.bfloat16 if D.has_bfloat16(w.device) else torch.float32)
    nowhere = w.to("meta")  # a device without bf16 hardware
    assert D.product_dtype("auto", nowhere) == torch.float32


@pytest.mark.parametrize(
    ("asked", "weights", "dtype"),
    [
        ("bfloat16", torch.zeros(4, 5, device="meta"), torch.bfloat16),
        ("auto", torch.zeros(4, 5).double(), torch.float64),
        ("float32", torch.zeros(4, 5), torch.float32),
        ("float32", torch.zeros(4, 5).half(), torch.float16),
    ],
    ids=["bfloat16", "auto", "float32", "no more than the weights have"],
)
def test_precision_is_what_is_asked_for(asked, weights, dtype):
    assert D.product_dtype(asked, weights) == dtype


def test_refusals_of_the_loss(unchecked):
    w = torch.zeros(4, 5)
    with pytest.raises(ValueError, match="precision must be"):
        D.product_dtype("int8", w)
    with pytest.raises(ValueError, match="teacher of width 5"):
        fused_kl(torch.zeros(1, 3, 4), torch.zeros(3, 4), w)


def test_refusals_of_the_fit(model, unchecked):
    for kwargs, message in ((dict(precision="int8"), "precision must be"), (dict(subsample=0.0), "subsample is a share")):
        with pytest.raises(ValueError, match=message):
            tll.fit_tuned(model, zoo.tokens(4, 8), steps=1, init="identity", **kwargs)


# --- the start, and the end


BATCHES = zoo.tokens(30, 16).split(5)


@pytest.mark.parametrize("kind", [list, iter])  # a source that can be read only once will do
def test_the_start_is_fitted_on_the_first_tokens(model, kind):
    start = tll.fit_regression(model, BATCHES[:2])
    expected = tll.fit_tuned(model, BATCHES, steps=3, init=start, optimizer="sgd")
    got = tll.fit_tuned(model, kind(BATCHES), steps=3, init_tokens=160, optimizer="sgd")
    assert torch.allclose(got.weights, expected.weights, atol=1e-6)
    assert got.meta["settings"]["init_tokens"] == 150 and got.meta["tokens_seen"] == 240 + 150


def test_the_start_uses_a_short_text_once(model):
    short = tll.fit_tuned(model, BATCHES, steps=0, init_tokens=10_000)
    assert torch.allclose(short.weights, tll.fit_regression(model, BATCHES).weights, atol=1e-6)


def test_after_a_start_of_all_text_one_pass_has_none_left(model):
    with pytest.raises(ValueError, match="one pass"):
        tll.fit_tuned(model, iter(BATCHES), steps=7, init_tokens=10_000)


def test_the_best_translators_on_held_out_text_are_the_result(model):
    tokens = zoo.tokens(40, 16)
    log = []
    got = tll.fit_tuned(
        model, tokens[:32], steps=40, lr=0.3, init_tokens=600, held_out=tokens[32:], held_out_every=4, patience=3, log=log
    )
    seen = [list(entry["held_out"].values()) for entry in log if "held_out" in entry]
    assert len(log) < 40 and len(seen) >= 3  # such a rate makes it worse, so it ends early
    best = got.meta["held_out"]["loss"]
    scores = tll.evaluate(model, tll.Lens(model, got), tokens[32:])
    start = tll.evaluate(model, tll.Lens(model, tll.fit_tuned(model, tokens[:32], steps=0, init_tokens=600)), tokens[32:])
    for layer in range(model.cfg.n_layers):
        assert scores.value("lens", layer) == pytest.approx(best[layer], rel=0.02, abs=1e-4)
        assert scores.value("lens", layer) <= start.value("lens", layer) * 1.01
        assert best[layer] <= min(row[layer] for row in seen) + 1e-6


def test_a_share_of_a_tensor_is_its_last_rows(model):
    tokens = zoo.tokens(40, 16)
    settings = dict(steps=4, init="identity", held_out_every=2)
    a = tll.fit_tuned(model, tokens, held_out=0.2, **settings)
    b = tll.fit_tuned(model, tokens[:32], held_out=tokens[32:], **settings)
    assert torch.equal(a.weights, b.weights)


def _auto(model, **more):
    tokens = zoo.tokens(40, 16)
    settings = dict(steps="auto", init="identity", held_out=tokens[32:], held_out_every=5, patience=2, optimizer="muon", lr=0.05)
    return tll.fit_tuned(model, tokens[:32], **settings, **more)


@pytest.fixture(scope="module")
def auto(model):
    """A fit that ends by itself, its rates, and the step from which they fall."""
    log = []
    whole = _auto(model, log=log)
    rates = [entry["lr"] for entry in log]
    return whole, rates, next(i for i, rate in enumerate(rates) if rate < rates[0])


def test_steps_auto_ends_by_itself(auto):
    _, rates, falls = auto
    assert rates[falls - 1] == rates[0] and rates[-1] < rates[0] / 2 and len(rates) < 2000
    assert all(a >= b for a, b in zip(rates[falls:], rates[falls + 1 :], strict=False))


def test_steps_auto_goes_on_where_it_was_interrupted(model, auto, tmp_path):
    whole, _, falls = auto

    def stop(entry):
        if entry["step"] == falls + 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _auto(model, checkpoint=tmp_path / "state", log=stop)
    assert torch.allclose(_auto(model, checkpoint=tmp_path / "state").weights, whole.weights, atol=1e-6)


def test_refusals_of_held_out(model, unchecked):
    tokens = zoo.tokens(8, 8)
    for kwargs, message in (
        (dict(steps="auto"), "'auto' with held_out= text"),
        (dict(steps="soon", held_out=0.5), "steps must be a whole number, or 'auto'"),
        (dict(steps=1, held_out=1.5), "leaves -4 to train on"),
        (dict(steps=1, held_out=0.5, tokens=[tokens]), "needs tokens"),
        (dict(steps=1, held_out=0.5, patience=0), "at least 1"),
        (dict(steps=1, held_out=zoo.tokens(2, 1)), "no position to score in held_out"),
    ):
        with pytest.raises(ValueError, match=message):
            tll.fit_tuned(model, **{"tokens": tokens, "init": "identity", **kwargs})


def test_a_layers_rate_follows_its_loss():
    assert rate_scales([4.0, 1.0, 1 / 16, -1e-9], 0.75, [3.0, 1.0, 2.0, 1.0]) == [3.0, 1.0, 0.25, 0.0]
    assert rate_scales([4.0, 0.1], 0.0, [1.0, 5.0]) == [1.0, 5.0]
    leaves = [torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(2)]
    biases = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    for name, device in (("sgd", None), ("muon", None), ("muon", torch.device("cpu")), ("adam", None)):
        optimizers = optimizers_of(leaves, biases, Settings(optimizer=name, lr=1.0, weight_decay=0.0, momentum=0.0))
        set_scales(optimizers, [1.0, 0.25], [1.0, 1.0], 0.0)
        for parameter in (*leaves, *biases):
            torch.nn.init.zeros_(parameter)
            parameter.grad = torch.ones_like(parameter)
        optimizer_step(optimizers, 0.1, device)
        for part in (leaves, biases):
            assert torch.allclose(part[1] * 4, part[0], rtol=1e-5) and part[0].abs().min() > 0, (name, device)


def test_decay_takes_the_same_share_of_a_large_map():
    leaves, biases = ([torch.nn.Parameter(torch.ones(*shape)) for _ in range(2)] for shape in ((4, 4), (4,)))
    optimizers = optimizers_of(leaves, biases, Settings(lr=1.0, weight_decay=0.5, momentum=0.0))
    set_scales(optimizers, [8.0, 1.0], [8.0, 1.0], 0.5)
    for parameter in (*leaves, *biases):
        parameter.grad = torch.zeros_like(parameter)
    optimizer_step(optimizers, 0.1, None)
    for parameter in (*leaves, *biases):
        assert torch.allclose(parameter, torch.tensor(0.95))


@pytest.mark.parametrize("shape", [(6, 6), (6, 4), (4, 6)])
def test_the_size_of_a_map_is_the_geometric_mean_of_its_singular_values(shape):
    delta = 5 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    maps = delta + tll.translators.base(*shape)
    expected = torch.linalg.svdvals(maps.double()).log().mean(1).exp()
    assert map_sizes(delta) == pytest.approx(expected.tolist(), rel=1e-4) and min(expected) > 1
    # smaller maps, and singular ones, are no reason to stand still
    assert map_sizes(torch.stack([-tll.translators.base(*shape), 1e-6 * delta[0]]))[0] == 1.0
    assert map_sizes(torch.zeros(1, 5, 5)) == pytest.approx([1.0])


def test_a_step_of_muon_is_as_large_beside_the_map_at_any_width():
    sizes = []
    for d in (64, 256):
        leaf = torch.nn.Parameter(torch.zeros(d, d))
        settings = Settings(weight_decay=0.0, momentum=0.0).at_width(d)
        optimizers = optimizers_of([leaf], [torch.nn.Parameter(torch.zeros(d))], settings)
        leaf.grad = torch.randn(d, d, generator=torch.Generator().manual_seed(d))
        optimizer_step(optimizers, default_lr("muon", d))
        sizes.append(torch.linalg.svdvals(leaf.detach()).mean().item())
    # Five Newton-Schulz steps leave singular values between 0.68 and 1.13 times what they are meant to be.
    assert 0.2 * 0.68 < sizes[0] < 0.2 * 1.13 and sizes[1] == pytest.approx(sizes[0], rel=0.1), sizes


def test_a_fit_does_not_depend_on_the_scale_that_its_start_has(model, unchecked):
    tokens = zoo.tokens(8, 12)
    d = model.cfg.d_model
    generator = torch.Generator().manual_seed(1)
    first = 8 * (torch.eye(d) + 0.3 * torch.randn(d, d, generator=generator) / d**0.5)
    fits = []
    for times in (1.0, 16.0):
        rows, depth = rows_for(model, [1]), model.cfg.n_layers
        start = tll.Translators(rows, times * first[None], torch.full((1, d), times), n_layers=depth)
        fits.append(tll.fit_tuned(model, [tokens] * 4, steps=4, init=start, layers=[1], weight_decay=0.0)[1])
    small, large = (fit.weight / times for fit, times in zip(fits, (1.0, 16.0), strict=True))
    assert (small - first).norm() > 0.05 * first.norm()
    # Muon orthogonalises in bf16, so a step is right to some percent.
    assert (small - large).norm() < 0.05 * (small - first).norm()
    assert (fits[0].bias - fits[1].bias / 16).norm() < 0.05 * (fits[0].bias - 1).norm()


def _watch():
    """A watch without an end that has looked three times at two layers."""
    watch = Watch(None, every=2, patience=2)
    maps = lambda value: (torch.full((2, 3, 3), value), torch.full((2, 3), value))
    for step, losses in ((0, [1.0, 0.5]), (2, [0.9, 0.6]), (4, [0.95, 0.6])):
        assert watch.rate(step) == 1.0 and watch.due(step) and not watch.ended(step)
        watch.look(step, torch.tensor(losses), *maps(float(step)))
    return watch


def test_the_watch_keeps_the_best_of_each_layer():
    watch = _watch()
    assert watch.best.tolist() == pytest.approx([0.9, 0.5]) and watch.delta[:, 0, 0].tolist() == [2.0, 0.0]


def test_without_an_end_the_watch_cools_down_when_the_loss_no_longer_falls():
    watch = _watch()
    assert (start := watch.cooling_from) == 4
    assert watch.rate(start) == 1.0 and watch.rate(start + 1) == 0.5 and watch.rate(start + 2) == 0.0
    assert watch.ended(start + 2) and not watch.ended(start + 1)


def test_a_fixed_number_of_steps_cools_down_to_its_end_or_stops_before():
    fixed = Watch(10, every=2, patience=1)
    assert [fixed.rate(step) for step in (0, 5, 10)] == [1.0, 0.5, 0.0] and fixed.ended(10)
    for step, loss in ((0, 1.0), (2, 1.1)):
        fixed.look(step, torch.full((1,), loss), torch.zeros(1, 2, 2), torch.zeros(1, 2))
    assert fixed.ended(2)


@pytest.mark.parametrize(("n", "d_vocab"), [(6, 2**18), (32, 3 * 2**14), (5, 2**18)])
def test_products_of_bf16_do_not_end_the_process(n, d_vocab):
    generator = torch.Generator().manual_seed(0)
    p, w_u = (torch.randn(k, d_vocab, generator=generator).bfloat16() for k in (n, 8))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so narrow a product ends it with one thread alone
    got = D.unembedded_back(p, w_u)  # of 6 or 32 rows torch itself raises SIGFPE on a processor with AMX
    torch.set_num_threads(threads)
    assert torch.allclose(got.double(), p.double() @ w_u.double().mT, rtol=1e-2, atol=4.0)

"""States that the start's pass made serve the steps too: the same numbers, one pass, no more memory than is allowed, and none of it kept."""

import gc
import weakref

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses.fit import kept, timing
from tl_lenses.fit.common import rows_for
from tl_lenses.fit.kept import Keeper
from tl_lenses.fit.settings import Settings
from tl_lenses.fit.start import start_of
from tl_lenses.fit.step import PASS
from tl_lenses.text.batches import Text
from tl_lenses.tokens import Batch

KIND = zoo.FEW_KINDS[0]


def text(masked=False):
    """Four batches of different rows; masked ones end in pads."""
    mask = (torch.arange(16) < 12).long().expand(6, -1) if masked else None
    return [Batch(part, mask) for part in zoo.tokens(24, 16).split(6)]


def fit(model, tokens=None, **settings):
    how = dict(steps=6, tokens_per_step=90, init_tokens=300, guard=False, lr_search=False)
    return tll.fit_tuned(model, text() if tokens is None else tokens, **{**how, **settings})


def same(a, b):
    return torch.equal(a.delta, b.delta) and torch.equal(a.biases, b.biases) and a.meta == b.meta


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2", "neox"])
@pytest.mark.parametrize("how", [{}, {"masked": True}, {"layers": ["blocks.1.hook_mlp_out", 1]}, {"guard": True}], ids=str)
def test_a_fit_is_the_same_bit_for_bit(arch, how, monkeypatch):
    model, tokens = zoo.build(arch, KIND), text(how.pop("masked", False))
    with_states = fit(model, tokens, **how)
    monkeypatch.setattr(kept, "BYTES", 0)
    assert same(with_states, fit(model, tokens, **how))


def test_a_batch_of_several_passes_is_read_in_these(monkeypatch):
    monkeypatch.setitem(PASS, "cpu", 32)
    model = zoo.build("gpt2", KIND)
    with_states = fit(model)
    monkeypatch.setattr(kept, "BYTES", 0)
    assert same(with_states, fit(model))


def passes(monkeypatch, work):
    """How many forward passes fits make."""
    counted, run = [], kept.passed
    for module in (kept, __import__("tl_lenses.fit.common", fromlist=["passed"])):
        monkeypatch.setattr(module, "passed", lambda *a, **k: (counted.append(a[1].states is None), run(*a, **k))[1])
    work()
    return sum(counted)


@pytest.mark.parametrize(("room", "expected"), [(2**30, 4 + 2), (0, 4 + 6), (2 * 6 * 16 * 4 * 32 * 4, 4 + 4)])
def test_steps_make_the_passes_that_the_start_did_not_or_had_no_room_for(room, expected, monkeypatch):
    monkeypatch.setattr(
        kept, "BYTES", room
    )  # the third is two batches of three layers, the final residual and 32 numbers of 4 bytes
    model = zoo.build("gpt2", KIND)
    assert model.cfg.n_layers == 3 and model.cfg.d_model == 32
    assert passes(monkeypatch, lambda: fit(model, tokens_per_step=1)) == expected


@pytest.mark.parametrize("settings", [{}, {"optimizer": "sgd"}], ids=str)
def test_the_step_of_a_forecast_makes_its_pass(settings, monkeypatch):
    model, timed = zoo.build("gpt2", KIND), []
    seconds = timing._seconds  # how many passes a timed piece of work makes can be seen nowhere else
    monkeypatch.setattr(timing, "_seconds", lambda work: (timed.append(passes(monkeypatch, work)), seconds(lambda: None))[1])
    timing.time_tuned(model, text(), None, Settings(steps=6, tokens_per_step=90, **settings))
    assert timed[-1] == 1


@pytest.mark.parametrize("how", ["hooks", "a hooked model", "several processes", "offload"])
def test_nothing_is_kept_where_it_could_be_other_numbers_or_in_the_way(how):
    model, hook = zoo.build("gpt2", KIND), ("blocks.0.hook_resid_pre", lambda x, hook: None)
    settings = Settings(init_tokens=300, offload=how == "offload").at_width(model.cfg.d_model)
    hooks = [hook] if how == "hooks" else []
    if how == "a hooked model":
        model.add_hook(*hook)
    try:
        stream = Text.of(text()).stream(seed=0)
        start, stream = start_of(model, stream, rows_for(model, None), settings, None, hooks, alone=how != "several processes")
        assert start.pass_seconds == 0 and next(stream)[0].states is None
    finally:
        model.reset_hooks()


def test_what_a_step_has_used_is_free():
    model = zoo.build("gpt2", KIND)
    settings = Settings(init_tokens=300).at_width(model.cfg.d_model)
    start, stream = start_of(model, Text.of(text()).stream(seed=0), rows_for(model, None), settings, None, [])
    batch, _ = next(stream)
    assert start.pass_seconds >= batch.states.seconds > 0
    gone = weakref.ref(batch.states.states["blocks.0.hook_resid_pre"])
    del batch
    gc.collect()
    assert gone() is None and next(stream)[0].states is not None


def test_a_fit_that_is_resumed_without_them_ends_with_the_same_maps(tmp_path):
    def stop(entry):
        if entry["step"] == 2:
            raise KeyboardInterrupt

    model = zoo.build("gpt2", KIND)
    with pytest.raises(KeyboardInterrupt):
        fit(model, checkpoint=tmp_path / "state", log=stop)
    assert same(fit(model, checkpoint=tmp_path / "state"), fit(model))


def test_rows_of_a_kept_batch_have_their_own_states():
    model = zoo.build("gpt2", KIND)
    batch = Keeper(model, ["blocks.0.hook_resid_pre"], True)(text()[0])
    whole = batch.states.read("blocks.0.hook_resid_pre")
    assert torch.equal(batch.take(slice(1, 3)).states.read("blocks.0.hook_resid_pre"), whole[1:3])

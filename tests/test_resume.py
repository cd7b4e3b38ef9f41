"""Nothing is lost: killed at any moment and resumed, a fit is bit for bit the one that was never killed."""

import functools
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import safetensors.torch
import torch
import tqdm
import zoo

import tl_lenses as tll
import tl_lenses.fit.learner
import tl_lenses.fit.optim
import tl_lenses.fit.training
from tl_lenses import files
from tl_lenses.fit import state
from tl_lenses.progress import StepBar

KIND = zoo.FEW_KINDS[0]
TEXTS = [f"document {i}: " + "the cat sat on the mat. the dog ran to the king. " * (1 + i % 4) for i in range(60)]


def _text(**settings):
    return tll.token_batches(TEXTS, zoo.tokenizer(), seq_len=16, batch_size=3, shuffle_seed=1, shuffle_buffer=9)


def _fit(file=None, **settings):
    settings = {"steps": 12, "init": "identity", "checkpoint_every": 2, "tokens_per_step": 90, **settings}
    return tll.fit_tuned(zoo.build("gpt2", KIND), _text(), checkpoint=file, **settings)


def _same(a, b):
    return torch.equal(a.delta, b.delta) and torch.equal(a.biases, b.biases) and a.meta == b.meta


# --- killed


def _child(work, result):
    """`work()` in a process of its own, its translators saved; how that process ended."""
    child = os.fork()
    if not child:
        tqdm.tqdm.set_lock(threading.RLock())  # killed with the lock that forked processes share, it would keep it
        try:
            work().save(result, overwrite=True)
            os._exit(0)
        except BaseException as error:
            print(error)
            os._exit(1)
    return child


def _dies_at(moment):
    """Kills this process at the n-th of the calls that a fit makes to anything that could be half done."""
    count = 0

    def counting(function, *, after=None):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == moment:
                if after is not None:
                    after(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    def half(tensors, path, metadata=None):
        path.write_bytes(safetensors.torch.save(tensors, metadata)[:500])

    safetensors.torch.save_file = counting(safetensors.torch.save_file, after=half)
    for module, name in (
        (os, "replace"),
        (os, "fsync"),
        (os, "link"),
        (tl_lenses.fit.training, "scored_pairs"),
        (tl_lenses.fit.learner, "optimizer_step"),
        (tl_lenses.fit.optim.Muon, "step"),
        (torch.optim.AdamW, "step"),
        (tl_lenses.fit.training, "random_state"),
    ):
        setattr(module, name, counting(getattr(module, name)))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_twenty_random_moments(tmp_path):
    init = {"init": "regression", "init_tokens": 500}
    whole, file, chance = _fit(**init), tmp_path / "state", random.Random(5)
    kills = 0

    def attempt(moment, dies):
        if dies:
            _dies_at(moment)
        return _fit(file, **init)

    for _ in range(60):
        work = functools.partial(attempt, chance.randrange(2, 40), kills < 20)
        _, end = os.waitpid(_child(work, tmp_path / "lens"), 0)
        if os.WIFSIGNALED(end):
            kills += 1
        else:
            assert os.WEXITSTATUS(end) == 0
            assert not _differences(tll.Translators.load(tmp_path / "lens"), whole)
            if kills >= 20:
                break
            files.remove_state(file)  # through: from the start again
    assert kills >= 20
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".state")]
    assert len(left) <= 2 * kills  # what was half written is never read


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_from_outside_at_any_time(tmp_path):
    start = time.perf_counter()
    whole = _fit(tmp_path / "timed")
    seconds, chance = time.perf_counter() - start, random.Random(7)
    for _ in range(5):
        child = _child(lambda: _fit(tmp_path / "state"), tmp_path / "lens")
        while not (tmp_path / "state").exists():
            time.sleep(0.01)
        time.sleep(chance.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not _differences(_fit(tmp_path / "state"), whole)


def _differences(a, b):
    return [n for n in ("delta", "biases") if not torch.equal(getattr(a, n), getattr(b, n))]


# --- what else can go wrong


def test_ctrl_c_in_the_middle_of_an_optimiser_step_waits_for_its_end(tmp_path, monkeypatch):
    whole, step, calls = _fit(), torch.optim.AdamW.step, []
    n = whole.n_layers  # calls in a step: the biases of each layer are an optimiser's own

    def interrupting(self, *args):  # in the fifth step, of which a layer is done
        calls.append(1)
        if len(calls) == 4 * n + 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupting)
    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path / "state")
    assert files.load_state(tmp_path / "state")["step"] == 5 and len(calls) == 5 * n
    assert _same(_fit(tmp_path / "state"), whole) and len(calls) == 12 * n


def test_a_step_that_breaks_is_not_saved(tmp_path, monkeypatch):
    whole, step, calls = _fit(), torch.optim.AdamW.step, []

    def breaking(self, *args):  # layers and matrices are through, the other biases are not
        calls.append(1)
        if len(calls) == 2 * whole.n_layers + 2:
            raise RuntimeError("out of memory")
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", breaking)
    with pytest.raises(RuntimeError, match="out of memory"):
        _fit(tmp_path / "state")
    assert files.load_state(tmp_path / "state")["step"] == 2
    assert _same(_fit(tmp_path / "state"), whole)


def test_a_full_disk_keeps_the_last_state_and_the_fit_goes_on(tmp_path, monkeypatch):
    whole, save_file, calls = _fit(), safetensors.torch.save_file, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device")
        return save_file(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.warns(files.Notice, match=r"could not be written at step \d+ .*No space left.* is kept"):
        assert _same(_fit(tmp_path / "state"), whole)
    assert files.load_state(tmp_path / "state")["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state", "state.previous"]


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_numbers_that_are_not_finite_name_layer_step_and_text(model, tmp_path, monkeypatch, part):
    compute, calls = tl_lenses.fit.learner.loss_and_gradient, []

    def wrong(pairs, delta, biases, head, grad_w, grad_b, **settings):
        losses = compute(pairs, delta, biases, head, grad_w, grad_b, **settings)
        calls.append(1)
        if len(calls) > 6 and guilty(pairs):
            (losses if part == "loss" else grad_b)[1] = float("inf")
        return losses

    rows = list(_text())
    target = rows[6].tokens[1]  # batches of 3 rows, two a step: the fourth step
    resid = {}
    tll.run(model, target[None], [tll.read(0, resid)])
    mark = resid[0][0, 3]
    guilty = lambda pairs: bool((pairs.states[0] - mark).abs().amax(-1).lt(1e-5).any())
    monkeypatch.setattr(tl_lenses.fit.learner, "loss_and_gradient", wrong)
    text = zoo.tokenizer().decode(target.tolist())
    with pytest.raises(ValueError) as error:
        _fit(tmp_path / "state", guard=False)  # whose rows would come first
    message = str(error.value)
    assert message.startswith(f"the {part} is not finite at step 3 for 'blocks.1.hook_resid_pre', on the text {text!r}")
    assert "the last good state is kept" in message
    saved = files.load_state(tmp_path / "state")
    assert saved["step"] == 3 and saved["delta"].isfinite().all()


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (
            lambda *args, **how: tll.fit_tuned(*args, steps=2, init="identity", **how),
            "the activation at 'blocks.1.hook_resid_pre' .* in the text .*at step 0",
        ),
        (tll.fit_regression, "in the text .*, among the 8 rows behind row 0"),
    ],
    ids=["tuned", "regression"],
)
def test_activations_that_are_not_finite_name_their_text(model, fit, message):
    def spoil(x, hook):
        x = x.clone()
        x[1] = float("inf")
        return x

    with pytest.raises(ValueError, match=message):
        fit(model, zoo.tokens(8, 12), hooks=[("blocks.1.hook_resid_pre", spoil)])


def test_maps_that_are_not_finite_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"is not finite at step \d for 'blocks.0.*lower lr"):
        _fit(tmp_path / "state", optimizer="sgd", lr=1e38, clip=None)
    assert files.load_state(tmp_path / "state")["delta"].isfinite().all()


def test_what_hooks_draw_is_drawn_again(tmp_path):
    noise = [("blocks.1.hook_resid_pre", lambda x, hook: x + 0.1 * torch.randn_like(x))]

    def stop(entry):
        if entry["step"] == 5:
            raise KeyboardInterrupt

    torch.manual_seed(3)
    whole = _fit(hooks=noise)
    torch.manual_seed(3)
    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path / "state", hooks=noise, log=stop)
    torch.manual_seed(4)
    assert _same(_fit(tmp_path / "state", hooks=noise), whole)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": "tl_lenses.fit_tuned", "settings": {}}, "has version 1, this tl_lenses goes on from 3"),
        ({"format": "tl_lenses.fit_regression", "version": state.VERSION}, "is not a checkpoint of fit_tuned"),
    ],
    ids=["older", "another fit"],
)
def test_a_state_of_another_kind_is_refused(tmp_path, content, message):
    files.save_state(tmp_path / "state", content)
    with pytest.raises(ValueError, match=message):
        _fit(tmp_path / "state")


# --- groups of layers, and what lies on the CPU


@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adam"])
def test_groups_of_layers_give_what_all_at_once_give(tmp_path, optimizer):
    init = {"init": "regression", "init_tokens": 500}
    whole = _fit(optimizer=optimizer, **init)
    file = tmp_path / "state"

    def stop(entry):
        if "blocks.2.hook_resid_pre" in entry["loss"] and entry["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _fit(file, optimizer=optimizer, layers_at_once=2, offload=True, log=stop, **init)
    assert {"state.1of2", "state.2of2"} <= {path.name for path in tmp_path.iterdir()}
    log = []
    parts = _fit(file, optimizer=optimizer, layers_at_once=2, offload=True, log=log, **init)
    assert len(log) == 12 - 5 and parts.rows == whole.rows
    assert torch.allclose(parts.delta, whole.delta, atol=1e-6) and torch.allclose(parts.biases, whole.biases, atol=1e-6)
    assert parts.meta["tokens_seen"] == whole.meta["tokens_seen"]


def test_groups_are_refused_where_they_would_change_the_result(unchecked):
    with pytest.raises(ValueError, match="joint_clip needs the gradients of all layers"):
        _fit(layers_at_once=1, joint_clip=True)
    with pytest.raises(ValueError, match="held_out stops by the mean over all layers"):
        _fit(layers_at_once=1, held_out=zoo.tokens(4, 16))
    with pytest.raises(ValueError, match="layers_at_once must be at least 1, got 0"):
        _fit(layers_at_once=0)
    with pytest.raises(ValueError, match="3 groups of layers are 3 passes over the text"):
        tll.fit_tuned(zoo.build("gpt2", KIND), iter([zoo.tokens(8, 16)]), layers_at_once=1, init="identity")


REGRESSION = dict(pairs=[(2, 3), (0, 1), (0, 3), (1, 2)], ridge=[1e-3, 1.0], held_out=0.1)


@pytest.fixture(scope="module")
def regression(model):
    return tll.fit_regression(model, _text(), **REGRESSION)


class Dies:
    """A text that cannot be read further than `n` batches."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        for i, batch in enumerate(_text()):
            if i == self.n:
                raise OSError("the network is gone")
            yield batch


def test_regression_in_groups_on_the_cpu_is_the_same(model, regression):
    parts = tll.fit_regression(model, _text(), layers_at_once=1, offload=True, **REGRESSION)
    assert parts.rows == regression.rows and torch.equal(parts.delta, regression.delta)
    for key in ("held_out", "settings", "r_squared"):
        assert parts.meta[key] == regression.meta[key]


def test_regression_goes_on_where_its_text_broke_off(model, regression, tmp_path):
    keep = dict(checkpoint=tmp_path / "state", checkpoint_every=3)
    with pytest.raises(OSError, match="the network is gone"):
        tll.fit_regression(model, Dies(14), **REGRESSION, **keep)
    assert files.load_state(tmp_path / "state")["counts"][3] == 12
    assert torch.equal(tll.fit_regression(model, Dies(999), **REGRESSION, **keep).delta, regression.delta)
    with pytest.raises(ValueError, match="was made with skip_first=True, now it is False"):
        tll.fit_regression(model, Dies(999), skip_first=False, **REGRESSION, **keep)


def test_the_progress_line_gives_loss_rate_and_time_left(capsys):
    bar = StepBar(4, 1, ["L0", "L1", "L2"], 100, True)
    bar.bar.delay = 0
    bar.update([1.0, 0.5, 0.25], 2000, 1.0, 4)
    text = str(bar.bar)
    bar.close()
    assert "L0 1.000 L1 0.500 L2 0.250, " in text and "tokens/s" in text and "2 of 4" in text and " left" in text


@pytest.mark.parametrize("groups", [None, 1])
@pytest.mark.parametrize("fit", ["tuned", "regression"])
def test_a_second_fit_with_the_same_checkpoint_is_refused_at_its_start(model, fit, groups, tmp_path):
    """As the command does: two fits would replace each other's states. The file is free again after an error too."""
    file = tmp_path / "state"
    tokens, seen = zoo.tokens(16, 12), []

    def start(hooks=()):
        settings = dict(checkpoint=file, layers_at_once=groups, hooks=list(hooks))
        if fit == "tuned":
            return tll.fit_tuned(model, tokens, 2, init="identity", **settings)
        return tll.fit_regression(model, tokens, **settings)

    def second(x, hook):
        if not seen:
            seen.append(None)
            code = f"from tl_lenses.files import locked\nwith locked({str(file)!r}): pass"
            other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            seen[:] = [other.stderr]
        return x

    def stop(x, hook):
        raise RuntimeError("stop")

    site = "blocks.0.hook_resid_pre"
    start([(site, second)])
    assert f"{file} is being written by process {os.getpid()} on " in seen[0]
    files.remove_state(file)
    with pytest.raises(RuntimeError, match="stop"):
        start([(site, stop)])
    assert not list(tmp_path.glob(".*lock"))
    with files.locked(file):  # by another thread, as far as the fit knows
        caught = []
        thread = threading.Thread(target=lambda: caught.append(pytest.raises(ValueError, start).value))
        thread.start()
        thread.join()
    assert "is being written by process" in str(caught[0])

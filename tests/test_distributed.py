"""Several processes fit what one would; a killed one ends the job, and the checkpoint goes on. Forked, over gloo."""

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import zoo

import tl_lenses as tll
import tl_lenses.fit.learner
import tl_lenses.fit.sampled
import tl_lenses.fit.training
from tl_lenses.edits import scale
from tl_lenses.files import load_state, save_state
from tl_lenses.fit.team import Processes, Team
from tl_lenses.tokens import Batch

pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or not dist.is_gloo_available(), reason="needs fork and gloo")


def launch(world, work, folder):
    """`work(rank)` in so many processes; what each returned, or its error as text."""
    model = zoo.build("gpt2", zoo.FEW_KINDS[0])  # made before forking, so that no child has to
    children = []
    for rank in range(world):
        if child := os.fork():
            children.append(child)
            continue
        try:
            dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
            outcome = {"ok": work(rank, model)}
        except BaseException as error:
            outcome = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        try:
            save_state(folder / f"rank{rank}", outcome)
        finally:
            os._exit(0)  # in any case: this process is not to go on with the tests
    ends = [os.waitpid(child, 0)[1] for child in children]
    (folder / "meet").unlink(missing_ok=True)
    outcomes = []
    for rank, end in enumerate(ends):
        outcomes.append({"killed": os.WTERMSIG(end)} if os.WIFSIGNALED(end) else load_state(folder / f"rank{rank}"))
        (folder / f"rank{rank}").unlink(missing_ok=True)
    return outcomes


def _maps(translators):
    return {"delta": translators.delta.data, "biases": translators.biases.data, "meta": translators.meta}


def _ok(outcomes):
    assert all("ok" in outcome for outcome in outcomes), [outcome.get("trace", outcome) for outcome in outcomes]
    return [outcome["ok"] for outcome in outcomes]


def _of(rank, world):
    return Team() if world == 1 else Processes(rank, world)


def test_each_row_is_one_process_own():
    tokens = torch.arange(14).reshape(7, 2)
    for world in (1, 2, 4, 9):
        for first in (0, 3):
            parts = [_of(rank, world).rows_of(Batch(tokens), first) for rank in range(world)]
            own_rows = [i.tolist() for _, i in parts]
            assert sorted(sum(own_rows, [])) == list(range(7))
            assert all((i + first) % world == rank for rank, rows in enumerate(own_rows) for i in rows)
            for batch, i in parts:
                assert (batch is None) == (len(i) == 0) and (batch is None or torch.equal(batch.tokens, tokens[i]))


def test_the_map_of_a_scope_is_that_of_one_process(tmp_path):
    def fit(model):
        target = tll.Target("the cat sat on x", tll.at("x"))
        return tll.fit_scope(model, zoo.tokens(16, 12), target, steps=3, vectors_per_step=5, pairs=[(1, 1), (2, 0)], held_out=2)

    one = fit(zoo.build("gpt2", zoo.FEW_KINDS[0]))
    for maps in _ok(launch(3, lambda rank, model: _maps(fit(model)), tmp_path)):
        assert torch.allclose(maps["delta"], one.delta, rtol=1e-4, atol=1e-5)
        assert torch.allclose(maps["biases"], one.biases, rtol=1e-3, atol=1e-4)
        assert maps["meta"]["tokens_seen"] == one.meta["tokens_seen"] == 15


@pytest.mark.parametrize("world", [2, 4])
def test_regression_is_that_of_one_process(world, tmp_path):
    tokens = zoo.tokens(41, 12)
    batches = [tokens[:3], tokens[3:4], *tokens[4:].split(5)]  # some processes have no row of a batch
    settings = dict(ridge=[1e-4, 1e-1, 10.0], held_out=0.1, limit_tokens=400)
    alone = tll.fit_regression(zoo.build("gpt2", zoo.FEW_KINDS[0]), batches, **settings)
    team = _ok(launch(world, lambda rank, model: _maps(tll.fit_regression(model, batches, **settings)), tmp_path))
    for maps in team:
        assert torch.allclose(maps["delta"], alone.delta, atol=1e-5, rtol=0)
        assert torch.allclose(maps["biases"], alone.biases, atol=1e-5, rtol=0)
        assert torch.equal(maps["delta"], team[0]["delta"])
        for key in ("tokens_seen", "settings"):
            assert maps["meta"][key] == alone.meta[key]
        assert maps["meta"]["held_out"]["tokens"] == alone.meta["held_out"]["tokens"]


def test_a_jacobian_lens_is_that_of_one_process(tmp_path):
    tokens = zoo.tokens(7, 9)
    fit = lambda model: tll.fit_jacobian(model, [tokens[:1], tokens[1:]], skip_first=2, limit_prompts=6)
    one = fit(zoo.build("gpt2", zoo.FEW_KINDS[0]))
    found = _ok(launch(2, lambda rank, model: _maps(fit(model)), tmp_path))
    assert all(torch.allclose(maps["delta"], one.delta, atol=1e-5, rtol=0) for maps in found)
    assert all(maps["meta"]["n_prompts"] == 6 for maps in found)


def test_fewer_rows_than_processes(tmp_path):
    tokens = zoo.tokens(3, 40)
    alone = tll.fit_regression(zoo.build("gpt2", zoo.FEW_KINDS[0]), tokens)
    team = _ok(launch(4, lambda rank, model: _maps(tll.fit_regression(model, tokens)), tmp_path))
    assert all(torch.allclose(maps["delta"], alone.delta, atol=1e-5, rtol=0) for maps in team)


def test_processes_that_each_draw_a_sample_of_the_vocabulary_end_where_one_process_does(tmp_path, monkeypatch):
    monkeypatch.setattr(tl_lenses.fit.sampled, "TOP", 4)
    monkeypatch.setattr(tl_lenses.fit.sampled, "DRAWS", 100)
    tokens, model = zoo.tokens(144, 16), zoo.build("gpt2", zoo.FEW_KINDS[0])
    settings = dict(steps=20, tokens_per_step=160, init_tokens=600, vocabulary="sampled")
    alone = tll.fit_tuned(model, tokens, **settings).meta
    many = _ok(launch(2, lambda rank, model: _maps(tll.fit_tuned(model, tokens, **settings)), tmp_path))
    assert torch.equal(many[0]["delta"], many[1]["delta"]) and many[0]["meta"]["sampled"] and alone["sampled"]
    for start, end, of_one in zip(*(many[0]["meta"]["guard"][key] for key in ("start", "end")), alone["guard"]["end"], strict=True):
        assert end < start and abs(end - of_one) < 0.1 * (start - of_one) + 1e-3


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_training_is_that_of_one_process(world, optimizer, tmp_path):
    tokens = zoo.tokens(144, 16)  # enough for a guard
    # bf16 products round a chunk's gradients by its size: 1e-5 is a matter of float32, the held-out KL is not
    precision = "float32" if optimizer == "sgd" else "auto"
    settings = dict(steps=20, optimizer=optimizer, tokens_per_step=160, init_tokens=600, precision=precision)
    model, calls = zoo.build("gpt2", zoo.FEW_KINDS[0]), []

    def work(rank, model):
        reduce, calls = dist.all_reduce, []
        dist.all_reduce = lambda *args, **kwargs: (calls.append(1), reduce(*args, **kwargs))
        tll.fit_tuned(model, tokens, **{**settings, "steps": 0})
        of_start = len(calls)
        maps = _maps(tll.fit_tuned(model, tokens, **settings))
        return {**maps, "reduces": len(calls) - 2 * of_start}

    alone = tll.fit_tuned(model, tokens, **settings)
    team = _ok(launch(world, work, tmp_path))
    # One per step and not one per layer, the guard's two looks, and Muon's one for the first step's length.
    assert all(maps["reduces"] == settings["steps"] + 2 + (1 if optimizer == "muon" else 0) for maps in team), calls
    guards = [maps["meta"]["guard"] for maps in team]
    assert guards == guards[:1] * world and guards[0]["tokens"] == alone.meta["guard"]["tokens"] == 256
    for key in ("start", "end"):
        assert guards[0][key] == pytest.approx(alone.meta["guard"][key], rel=1e-4 if optimizer == "sgd" else 0.05, abs=1e-4)
    assert all(torch.equal(maps["delta"], team[0]["delta"]) for maps in team)
    assert team[0]["meta"]["tokens_seen"] == alone.meta["tokens_seen"]
    assert alone.delta.abs().max() > 0.01
    if optimizer == "sgd":
        gaps = [(team[0][name] - getattr(alone, name)).abs().max().item() for name in ("delta", "biases")]
        assert max(gaps) < 1e-5, gaps
        return
    many = tll.fit_tuned(model, tokens, steps=0, init=alone)
    many.delta.data, many.biases.data = team[0]["delta"], team[0]["biases"]
    held_out = zoo.tokens(20, 16, seed=9)
    a, b = (tll.evaluate(model, tll.Lens(model, maps), held_out) for maps in (alone, many))
    for layer in range(3):
        assert b.value("lens", layer) == pytest.approx(a.value("lens", layer), rel=0.005)


def _with_a_bad_row(tokens):
    """The last row, which process 1 has, holds an id that is no token."""
    wrong = tokens.clone()
    wrong[-1, 3] = zoo.D_VOCAB
    return wrong


def test_settings_that_differ_are_refused_in_every_process(tmp_path):
    def lr(rank, model):
        return tll.fit_tuned(model, zoo.tokens(8, 16), steps=2, init="identity", lr=0.1 if rank else 0.2)

    for rank in launch(2, lr, tmp_path):
        assert "ValueError: process" in rank["error"] and "was started with lr=0." in rank["error"]


def test_a_bad_row_of_one_process_reaches_all(tmp_path):
    tokens = _with_a_bad_row(zoo.tokens(8, 16))
    bad = lambda rank, model: tll.fit_tuned(model, tokens, steps=2, init="identity")
    errors = [rank["error"] for rank in launch(2, bad, tmp_path)]
    assert all(f"token id {zoo.D_VOCAB}" in error for error in errors) and any("(in process" in e for e in errors)


def test_both_processes_go_on_from_the_file_of_the_first(tmp_path):
    tokens = zoo.tokens(40, 16)
    settings = dict(steps=8, optimizer="muon", init="identity", tokens_per_step=96)
    file = tmp_path / "state"

    def work(stop):
        def fit(rank, model):
            def log(entry):
                if entry["step"] == stop:
                    raise KeyboardInterrupt

            # only the first process sees the disk
            path = file if rank == 0 else tmp_path / "nowhere" / "state"
            return _maps(tll.fit_tuned(model, tokens, checkpoint=path, log=log, **settings))

        return fit

    team = launch(2, work(5), tmp_path)
    assert all("KeyboardInterrupt" in rank["error"] for rank in team) and not (tmp_path / "nowhere").exists()
    whole = _ok(launch(2, lambda rank, model: _maps(tll.fit_tuned(model, tokens, **settings)), tmp_path))
    resumed = _ok(launch(2, work(99), tmp_path))
    assert all(torch.equal(a["delta"], b["delta"]) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", zoo.FEW_KINDS)
def test_a_sharded_model_fits_the_same_maps(arch, kind, tmp_path):
    from tl_lenses.fit.shard import is_sharded, shard, sizes

    tokens = zoo.tokens(23, 16)
    batches = [tokens[:3], tokens[3:4], *tokens[4:].split(5)]  # some processes have no row of a batch
    settings = dict(steps=4, optimizer="sgd", tokens_per_step=100, init_tokens=200, precision="float32")
    settings |= dict(held_out=[zoo.tokens(3, 16, seed=5)], held_out_every=2)
    alone = tll.fit_tuned(zoo.build(arch, kind), batches, **settings)

    def work(rank, _):
        model = zoo.build(arch, kind)
        size = lambda: sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.blocks.parameters())
        before, whole = size(), sizes(model)
        shard(model)
        assert is_sharded(model) and whole[0] == whole[1] > sizes(model)[1]
        assert whole[0] <= sizes(model)[0] < 1.1 * whole[0]  # GPT-2's joint projection and its views are apart then
        maps = _maps(tll.fit_tuned(model, batches, **settings))
        with pytest.raises(ValueError, match="sharded already"):
            shard(model)
        return {**maps, "share": size() / before}

    for maps in _ok(launch(2, work, tmp_path)):
        assert maps["share"] < 0.55  # of the blocks, and again so behind the fit
        assert torch.allclose(maps["delta"], alone.delta, atol=1e-5, rtol=0)
        assert torch.allclose(maps["biases"], alone.biases, atol=1e-5, rtol=0)
        assert maps["meta"]["held_out"]["loss"] == pytest.approx(alone.meta["held_out"]["loss"], rel=1e-4)
        assert maps["meta"]["basis"] == alone.meta["basis"]


@pytest.mark.parametrize("method", ["tuned", "regression"])
def test_with_a_sharded_model_a_bad_row_of_one_process_reaches_all(method, tmp_path):
    from tl_lenses.fit.shard import shard

    tokens = zoo.tokens(8, 16)
    batches = [*_with_a_bad_row(tokens).split(2), *tokens.split(2)]

    def work(rank, model):
        shard(model)
        if method == "regression":
            return _maps(tll.fit_regression(model, batches))
        return tll.fit_tuned(model, batches, steps=2, tokens_per_step=300, init="identity")

    errors = [rank["error"] for rank in launch(2, work, tmp_path)]
    assert all(f"token id {zoo.D_VOCAB}" in error for error in errors)
    assert method == "regression" or any("(in process 1" in error for error in errors)


def test_with_a_sharded_model_a_gradient_that_is_not_finite_reaches_all(tmp_path):
    from tl_lenses.fit.shard import shard

    tokens = zoo.tokens(8, 16)
    guilty = tokens[5]  # of process 1

    def broken(rank, model):
        shard(model)
        compute = tl_lenses.fit.learner.loss_and_gradient

        def wrong(pairs, delta, biases, head, grad_w, *args, **kwargs):
            losses = compute(pairs, delta, biases, head, grad_w, *args, **kwargs)
            if rank == 1 and calls[-1]:
                grad_w[1] += torch.nan
            return losses

        calls, run = [], tl_lenses.fit.training.scored_pairs

        def watched(model, batch, *args, **kwargs):
            calls.append(any(torch.equal(row, guilty) for row in batch.tokens))
            return run(model, batch, *args, **kwargs)

        tl_lenses.fit.learner.loss_and_gradient, tl_lenses.fit.training.scored_pairs = wrong, watched
        return tll.fit_tuned(model, tokens, steps=2, tokens_per_step=300, init="identity")

    errors = [rank["error"] for rank in launch(2, broken, tmp_path)]
    place = "the gradient is not finite at step 0 for 'blocks.1.hook_resid_pre'"
    assert all(place in error and "on the text" in error for error in errors)


KILLED = dict(steps=12, optimizer="sgd", init="identity", tokens_per_step=96, precision="float32")


def _goes_on(file, tokens):
    """One process ends what two began."""
    model, steps = zoo.build("gpt2", zoo.FEW_KINDS[0]), []
    settings = KILLED | dict(checkpoint=file, checkpoint_every=3, log=lambda entry: steps.append(entry["step"]))
    again = tll.fit_tuned(model, tokens, **settings)
    assert steps == [8, 9, 10, 11, 12]
    assert torch.allclose(again.delta, tll.fit_tuned(model, tokens, **KILLED).delta, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_killed_process_ends_the_job(sharded, tmp_path):
    """And its state says how far it came."""
    from tl_lenses.fit.shard import shard

    tokens, file = zoo.tokens(40, 16), tmp_path / "state"

    def work(rank, model):
        def die(entry):
            if rank == 1 and entry["step"] == 7:
                os.kill(os.getpid(), signal.SIGKILL)

        _ = shard(model) if sharded else None
        return _maps(tll.fit_tuned(model, tokens, checkpoint=file, checkpoint_every=3, log=die, **KILLED))

    start = time.perf_counter()
    team = launch(2, work, tmp_path)
    assert team[1] == {"killed": signal.SIGKILL} and time.perf_counter() - start < 60
    assert "lost the others: one of them has ended" in team[0]["error"], team[0]
    assert "in step 8 of 12" in team[0]["error"] and f"{file} holds the last steps" in team[0]["error"]
    assert load_state(file)["step"] == 7
    if not sharded:
        _goes_on(file, tokens)


class _Torn:
    """Text that one process cannot read to its end, in the second pass or in the first."""

    def __init__(self, tokens, ends):
        self.tokens, self.ends = tokens, ends

    def __iter__(self):
        for i, batch in enumerate(self.tokens.split(2)):
            if self.ends and i == 2:
                raise OSError("the disk is gone")
            yield batch


@pytest.mark.parametrize("sharded", [True, False])
def test_a_text_that_one_process_cannot_read_ends_all(sharded, tmp_path):
    from tl_lenses.fit.shard import shard

    tokens = zoo.tokens(12, 16)
    settings = dict(steps=4, tokens_per_step=90, init="identity")

    def tuned(rank, model):
        _ = shard(model) if sharded else None
        return _maps(tll.fit_tuned(model, _Torn(tokens, rank == 1), **settings))

    def held_out(rank, model):
        _ = shard(model) if sharded else None
        return _maps(tll.fit_tuned(model, tokens, held_out=_Torn(tokens, rank == 1), **settings))

    def regression(rank, model):
        _ = shard(model) if sharded else None
        return _maps(tll.fit_regression(model, _Torn(tokens, rank == 1)))

    for work in (tuned, held_out, regression):
        start = time.perf_counter()
        errors = [rank["error"] for rank in launch(2, work, tmp_path)]
        assert errors[1] == "OSError: the disk is gone" and "the disk is gone (in process 1 of 2)" in errors[0], (work, errors)
        assert time.perf_counter() - start < 30


def test_hooks_on_a_sharded_model(tmp_path):
    from tl_lenses.fit.shard import shard

    tokens = zoo.tokens(5, 16)  # a process without a row at the end
    kept = ("blocks.1.hook_resid_pre", lambda x, hook: x + 0.1 * x[:, 2:3])  # wants three positions
    pattern = tll.patch("blocks.1.attn.hook_pattern", scale(0.5))
    settings = dict(steps=2, optimizer="sgd", precision="float32", init_tokens=60)

    def fit(model, hooks):
        model.add_hook(*kept)
        try:
            return tll.fit_tuned(model, tokens.split(2), hooks=hooks, **settings)
        finally:
            model.reset_hooks()

    for hooks in ([], [pattern]):
        alone = fit(zoo.build("gpt2", zoo.FEW_KINDS[0]), hooks)

        def work(rank, model, hooks=hooks):
            shard(model)
            return _maps(fit(model, hooks))

        for maps in _ok(launch(2, work, tmp_path)):
            assert torch.allclose(maps["delta"], alone.delta, atol=1e-5, rtol=0)

    def broken(rank, model):
        shard(model)

        def fail(x, hook):
            if rank == 1:
                raise KeyError("a hook of ours")

        return _maps(tll.fit_tuned(model, tokens, hooks=[("blocks.1.hook_resid_pre", fail)], **settings))

    start = time.perf_counter()
    team = launch(2, broken, tmp_path)
    assert "failed in the middle of a pass" in team[1]["error"] and "a hook of ours" in team[1]["error"], team
    assert team[0]["error"].startswith("Lost") and time.perf_counter() - start < 30, team


def test_one_process_alone_has_nobody_to_share_with(unchecked):
    from tl_lenses.fit.shard import shard

    with pytest.raises(ValueError, match="several processes, and there is one: start them with accelerate launch"):
        shard(zoo.build("gpt2", zoo.FEW_KINDS[0]))


def _launch(*arguments):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", str(port), "-m", "tl_lenses", "fit", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(tll.__file__).parents[1])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def command(tmp_path):
    """Options of `fit` with six steps on a tiny model."""
    zoo.reference("gpt2").save_pretrained(tmp_path / "model")
    zoo.tokenizer().save_pretrained(tmp_path / "model")
    text = "\n<|endoftext|>\n".join(f"{i} the cat sat on the mat. the dog ran to the king." for i in range(80))
    (tmp_path / "text.txt").write_text(text)
    fit = ["--model", tmp_path / "model", "--data", tmp_path / "text.txt", "--steps", 6, "--optimizer", "sgd"]
    # Products in bf16 round the other way where the last bit of a residual differs: then the maps differ by 1e-4.
    return [*fit, "--batch-size", 3, "--device", "cpu", "--precision", "float32"]


@pytest.mark.slow
def test_accelerate_launches_the_command(command, tmp_path):
    """On a model that is spread over both processes: what one finds alone; that it need not be spread is shown above and below."""
    from typer.testing import CliRunner

    from tl_lenses.cli import app

    alone = CliRunner().invoke(app, ["fit", *map(str, command), "--output", str(tmp_path / "one")])
    assert alone.exit_code == 0, alone.stderr
    job = _launch(*command, "--shard", "--output", tmp_path / "two")
    out, err = job.communicate(timeout=300)
    assert job.returncode == 0, err
    assert out.count("saved in") == 1 and "in 2 processes" in out and "memory at the peak" in out
    a, b = (tll.Translators.load(tmp_path / name) for name in ("one", "two"))
    assert torch.allclose(a.delta, b.delta, atol=1e-5, rtol=0) and a.meta["tokens_seen"] == b.meta["tokens_seen"]


@pytest.mark.slow
def test_a_killed_worker_ends_what_accelerate_launched(command, tmp_path):
    """Its state is kept."""
    job = _launch(*command, "--steps", 5000, "--checkpoint-every", 3, "--output", tmp_path / "lens")
    state = tmp_path / "lens.checkpoint"
    for _ in range(600):
        if state.exists() and load_state(state)["step"] > 0:
            break
        time.sleep(0.1)
    workers = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    job.communicate(timeout=300)
    assert job.returncode != 0 and not (tmp_path / "lens").exists() and state.exists()
    assert load_state(state)["step"] > 0

"""Stored states: a fit on them is the fit on their text, no pass over the text is made, and folders that do not fit are refused."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import zoo
from typer.testing import CliRunner

import tl_lenses as tll
import tl_lenses.decode
from tl_lenses import files
from tl_lenses.cli import app
from tl_lenses.fit.evidence import collect
from tl_lenses.fit.regression import maps_of
from tl_lenses.text.batches import Text

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import write_states  # noqa: E402

ROWS = [("blocks.1.hook_resid_pre", "blocks.2.hook_resid_post")]


def tokens(n=24, pos=16):
    return zoo.tokens(n, pos)


def texts(model):
    """Each kind of text that a fit takes, small enough that a fit's passes and the capture's have the same rows."""
    padded, mask = tokens(8, 16), torch.ones(8, 16, dtype=torch.long)
    for row in range(8):
        mask[row, row:] = 0 if row else 1
    ragged = [tll.Batch(tokens(6, 16)), tll.Batch(padded, mask), tll.Batch(tokens(3, 10))]
    words = ["the cat sat on the mat and the dog ran to the king of the sun " * 20] * 6
    corpus = tll.token_batches(words, model.tokenizer, seq_len=16, batch_size=4, shuffle_seed=0)
    return {"ids": tokens(), "batches": ragged, "corpus": corpus}


def capture(model, folder, **settings):
    return tll.capture(model, tokens(), [1, 2], folder, **{"shard_tokens": 100, "show_progress": False, **settings})


def equal(a, b):
    assert a.rows == b.rows
    assert torch.equal(a.weights, b.weights) and torch.equal(a.biases, b.biases)


@pytest.fixture(
    scope="module", params=[(kind, source) for kind in zoo.KINDS for source in ("ids", "batches", "corpus")], ids="-".join
)
def stored(request, tmp_path_factory):
    """A model, a text, and its states in several files."""
    kind, source = request.param
    model = zoo.build("gpt2", kind)
    text, folder = texts(model)[source], tmp_path_factory.mktemp("stored") / "states"
    assert len(list(tll.capture(model, text, to=folder, shard_tokens=100).glob("*.safetensors"))) >= 2
    return model, text, folder


TUNED = dict(steps=4, tokens_per_step=200, seed=3)


@pytest.mark.parametrize("fit", [tll.fit_regression, lambda *args: tll.fit_tuned(*args, **TUNED)], ids=["regression", "tuned"])
def test_a_fit_on_stored_states_is_that_on_the_text_bit_for_bit(stored, fit):
    model, text, folder = stored
    equal(fit(model, text), fit(model, str(folder)))


def test_scores_of_stored_states_are_those_of_the_text_bit_for_bit(stored):
    model, text, folder = stored
    live, again = (tll.evaluate(model, {"logit": tll.Lens(model)}, it) for it in (text, folder))
    assert live.rows == again.rows and live.tokens == again.tokens and live.settings == again.settings


@pytest.mark.parametrize("arch", ["gemma2", "opt", "qwen3", "neox"])
def test_of_several_architectures(arch, tmp_path):
    model = zoo.build(arch, zoo.FEW_KINDS[0])
    folder = capture(model, tmp_path / "states")
    settings = dict(layers=[1, 2])
    equal(tll.fit_regression(model, tokens(), **settings), tll.fit_regression(model, folder, **settings))
    settings |= dict(steps=2, init="identity")
    equal(tll.fit_tuned(model, tokens(), **settings), tll.fit_tuned(model, folder, **settings))
    settings |= dict(loss="ce")
    equal(tll.fit_tuned(model, tokens(), **settings), tll.fit_tuned(model, folder, **settings))


def test_the_text_is_not_run_again(tmp_path, monkeypatch):
    model = zoo.build("gpt2", zoo.FEW_KINDS[0])
    folder = capture(model, tmp_path / "states")
    longest = []
    run = tl_lenses.decode.run
    monkeypatch.setattr(
        tl_lenses.decode, "run", lambda model, tokens, *a, **k: (longest.append(len(tokens)), run(model, tokens, *a, **k))[1]
    )
    tll.fit_tuned(model, folder, steps=9, tokens_per_step=100, layers=[1, 2])  # more than two passes
    tll.fit_regression(model, folder, layers=[1, 2])
    tll.evaluate(model, tll.Lens(model), folder, layers=[1, 2])
    assert longest == [1]  # the first row, to compare
    tll.fit_regression(model, tokens(), layers=[1, 2])
    assert longest[1:] == [8, 8, 8]


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    return capture(model, tmp_path_factory.mktemp("states") / "whole")


def test_shards_are_made_side_by_side(model, whole, tmp_path):
    for i in (2, 0):
        capture(model, tmp_path / "parts", shard=(i, 3))
    with pytest.raises(ValueError, match="states-00001.safetensors is missing"):
        Text.of(tmp_path / "parts")
    parts = capture(model, tmp_path / "parts", shard=(1, 3))
    names = sorted(file.name for file in whole.iterdir())
    assert len(names) == 4 and names == sorted(file.name for file in parts.iterdir())
    assert all((whole / name).read_bytes() == (parts / name).read_bytes() for name in names)


def test_lost_shards_are_made_again_and_no_others(model, whole, tmp_path):
    parts = shutil.copytree(whole, tmp_path / "parts")
    gone, cut, kept = sorted(parts.glob("*.safetensors"))
    before = kept.stat().st_mtime_ns
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:5000])
    with pytest.raises(ValueError, match="missing"):
        tll.fit_regression(model, parts, [1, 2])
    capture(model, parts)
    assert kept.stat().st_mtime_ns == before
    assert all(file.read_bytes() == (whole / file.name).read_bytes() for file in parts.iterdir())
    equal(tll.fit_regression(model, whole, [1, 2]), tll.fit_regression(model, parts, [1, 2]))


def test_moments_of_shards_add(model, tmp_path):
    folder = capture(model, tmp_path / "states")
    shards = [collect(model, str(file), ROWS, show_progress=False) for file in sorted(folder.glob("*.safetensors"))]
    assert len(shards) == 3
    summed, live = maps_of(model, sum(shards)), tll.fit_regression(model, tokens(), [1])
    assert torch.allclose(summed.weights, live.weights, atol=1e-6)


@pytest.mark.parametrize("source", ["ids", "batches"])
def test_a_fit_goes_on_inside_the_states(model, source, tmp_path):
    text = tokens(160, 16) if source == "ids" else list(tokens(160, 16).split(16))
    folder = tll.capture(model, text, [1], tmp_path / "states", shard_tokens=300)
    settings = dict(steps=8, tokens_per_step=256, layers=[1], checkpoint_every=1)
    straight = tll.fit_tuned(model, folder, **settings)
    assert straight.meta["guard"]["tokens"]

    def stop(entry):
        if entry["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tll.fit_tuned(model, folder, **settings, checkpoint=tmp_path / "state", log=stop)
    equal(straight, tll.fit_tuned(model, folder, **settings, checkpoint=tmp_path / "state"))
    equal(straight, tll.fit_tuned(model, text, **settings))


@pytest.mark.parametrize(
    ("fit", "settings"),
    [
        (tll.fit_tuned, dict(steps=2, held_out=0.25)),
        (tll.fit_regression, dict(layers_at_once=1, ridge=[1e-3, 1e-1], held_out=0.1)),
    ],
    ids=["a share held out", "groups of layers"],
)
def test_stored_states_are_fitted_as_text_is(model, whole, fit, settings):
    equal(*(fit(model, text, layers=[1, 2], **settings) for text in (tokens(), whole)))


@pytest.mark.parametrize("dtype,error", [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_half_precision_is_near_and_half_as_large(model, tmp_path, dtype, error):
    folder = capture(model, tmp_path / dtype, dtype=dtype)
    live, near = (tll.evaluate(model, tll.Lens(model), text, layers=[1]).value("lens", 1) for text in (tokens(), folder))
    assert 0 < abs(live - near) < error
    assert folder.joinpath("states-00000.safetensors").stat().st_size < 8 * 16 * (3 * 32 * 2 + 8) + 4000


def test_what_half_precision_does_not_hold_is_refused(model, tmp_path):
    large = [("blocks.1.hook_resid_pre", lambda x, hook: x * 1e6)]
    with pytest.raises(ValueError, match="torch.float16 does not hold them: store bfloat16 or float32"):
        capture(model, tmp_path / "large", dtype="float16", hooks=large)
    assert not (tmp_path / "large" / files.INDEX).exists()


def test_under_interventions(model, tmp_path):
    hooks = [tll.patch(1, tll.edits.scale(0.5))]
    folder = capture(model, tmp_path / "states", hooks=hooks)
    equal(tll.fit_regression(model, tokens(), [1, 2], hooks=hooks), tll.fit_regression(model, folder, [1, 2]))
    with pytest.raises(ValueError, match="hooks do not reach the states of"):
        tll.fit_regression(model, folder, [1, 2], hooks=hooks)


def test_maps_into_another_model_read_the_sources_from_the_disk(model, tmp_path):
    other = zoo.build("llama", zoo.FEW_KINDS[0])
    folder = capture(model, tmp_path / "states")
    settings = dict(to=other, pairs=[(1, 2), (2, 3)])
    equal(tll.fit_regression(model, tokens(), **settings), tll.fit_regression(model, folder, **settings))


def test_states_of_another_model_or_site_or_capture_are_refused(model, tmp_path):
    folder = capture(model, tmp_path / "states")
    with pytest.raises(ValueError, match="holds no states at 'blocks.0.hook_resid_pre', only at blocks.1"):
        tll.fit_regression(model, folder)
    with pytest.raises(ValueError, match="another fingerprint"):
        tll.fit_regression(zoo.build("neox", zoo.FEW_KINDS[0]), folder, [1, 2])
    with pytest.raises(ValueError, match="with another text or shard_tokens"):
        tll.capture(model, tokens() + 1, [1, 2], folder, shard_tokens=100)
    with pytest.raises(ValueError, match="with sites"):
        tll.capture(model, tokens(), [1], folder, shard_tokens=100)
    with pytest.raises(ValueError, match="with another text or shard_tokens"):
        capture(model, folder, shard_tokens=10_000)
    (folder / files.INDEX).unlink()
    with pytest.raises(ValueError, match="its capture has not ended"):
        tll.fit_regression(model, folder, [1, 2])


def test_what_runs_the_model_itself_takes_no_states(model, tmp_path):
    """The text of the folder is there, but not the interventions under which its states were made."""
    folder = capture(model, tmp_path / "states")
    for what, call in {
        "fit_jacobian": lambda: tll.fit_jacobian(model, folder, skip_first=2),
        "an experiment": lambda: tll.experiments.ablations(model, folder),
        "capture": lambda: tll.capture(model, folder, [1, 2], tmp_path / "again"),
    }.items():
        with pytest.raises(ValueError, match=f"^{what} runs the model, and .*states holds states of a run that is over"):
            call()
    assert not (tmp_path / "again").exists()
    maps, live = (
        tll.fit_scope(model, text, tll.Target(tokens(1, 6)[0], pos=3), steps=2, pairs=[(1, 0)], held_out=4)
        for text in (folder, tokens())
    )
    equal(live, maps)


# --- another engine


def engine_folder(arch, folder, *, change=lambda site, x: x):
    reference = zoo.reference(arch)
    n, states_of = write_states.hugging_face(reference, [0, 1, 2])
    changed = lambda ids: {site: change(site, x) for site, x in states_of(ids).items()}
    try:
        write_states.write_folder(folder, arch, n, tokens(24).tolist(), changed, rows_per_shard=10)
    finally:
        for module in reference.modules():
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks_with_kwargs.clear()
    return folder


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_plain_hugging_face_writes_the_states_that_we_read(arch, tmp_path):
    model = zoo.build(arch, zoo.RAW_KINDS[0])
    theirs = engine_folder(arch, tmp_path / "theirs")
    ours = tll.capture(model, tokens(24), to=tmp_path / "ours")
    kept = [list(Text.of(folder)) for folder in (theirs, ours)]
    for a, b in zip(*kept, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        for site in b.states.about["sites"]:
            assert torch.allclose(a.states.read(site), b.states.read(site), atol=1e-5), site
    a, b = (tll.fit_regression(model, folder) for folder in (theirs, ours))
    assert torch.allclose(a.weights, b.weights, atol=1e-3)
    assert {"format", "version", "model", "n_layers", "d_model", "dtype", "sites", "text", "shards", "tokens"} == set(
        json.loads((theirs / files.INDEX).read_text())
    )


def test_states_of_another_place_are_found_out(tmp_path):
    model = zoo.build("llama", zoo.RAW_KINDS[0])
    norm = zoo.reference("llama").model.norm
    final = "blocks.2.hook_resid_post"
    normed = engine_folder("llama", tmp_path / "normed", change=lambda site, x: norm(x).detach() if site == final else x)
    with pytest.raises(ValueError, match=f"at '{final}' differ from this model's by"):
        tll.fit_regression(model, normed)
    shifted = engine_folder("llama", tmp_path / "shifted", change=lambda site, x: x.roll(1, 0))
    with pytest.raises(ValueError, match="differ from this model's by"):
        tll.evaluate(model, tll.Lens(model), shifted)


def test_the_stream_of_vllm_is_the_sum_of_two_arguments():
    """Stand-ins for its modules: a block takes (positions, hidden, residual), the first one None for the residual."""
    x, y = torch.randn(2, 5, 4)
    assert torch.equal(write_states.residual_of_vllm((torch.arange(5), x, None)), x)
    assert torch.equal(write_states.residual_of_vllm((torch.arange(5), x, y)), x + y)
    assert torch.equal(write_states.residual_of_vllm((x, y)), x + y)


# --- the command line


TEXT = ["--limit-tokens", "2048", "--seq-len", "64"]
FIT = ["fit", "--method", "regression", "--no-progress", "--output"]


def _command(*args):
    done = CliRunner().invoke(app, list(map(str, args)))
    return done.exit_code, done.stdout + done.stderr


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """The states of a text, in two parts, by the command."""
    states = tmp_path_factory.mktemp("command") / "states"
    for shard in ("0/2", "1/2"):
        code, said = _command(
            "capture", "--output", states, "--layers", "1,3", "--shard", shard, "--shard-tokens", 600, *TEXT
        )  # fmt: skip
        assert code == 0, said
    return states


@pytest.mark.usefixtures("models_once")
def test_a_fit_of_captured_states_is_that_of_the_text_on_the_command_line(captured, tmp_path):
    for name, text in (("live", ["--layers", "1,3", *TEXT]), ("stored", ["--data", captured])):
        code, said = _command(*FIT, tmp_path / name, *text)
        assert code == 0, said
    equal(tll.Translators.load(tmp_path / "live"), tll.Translators.load(tmp_path / "stored"))
    code, said = _command("eval", "--lens", tmp_path / "stored", "--data", captured, "--layers", "1,3")
    assert code == 0 and "stored" in said, said


@pytest.mark.usefixtures("models_once")
def test_training_takes_captured_states_on_the_command_line(captured, tmp_path):
    code, said = _command("fit", "--output", tmp_path / "tuned", "--data", captured, "--steps", 2, "--no-progress")
    assert code == 0 and tll.Translators.load(tmp_path / "tuned").sources == (1, 3), said


@pytest.mark.usefixtures("models_once")
def test_a_fit_of_captured_states_has_a_dry_run(captured, tmp_path):
    assert "about" in _command(*FIT, tmp_path / "dry", "--data", captured, "--dry-run")[1]


@pytest.mark.usefixtures("models_once")
def test_options_of_text_are_refused_for_captured_states(captured, tmp_path):
    assert "--seq-len is of text" in _command(*FIT, tmp_path / "no", "--data", captured, "--seq-len", 8)[1]


def test_a_part_out_of_range_is_refused(tmp_path):
    assert "--shard should be i/n" in _command("capture", "--output", tmp_path / "no", "--shard", "2/2")[1]

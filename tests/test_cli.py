"""Every command once, Ctrl-C and going on, and one readable line for each kind of mistake."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from typer.testing import CliRunner

import tl_lenses as tll
import tl_lenses.fit.tuned
from tl_lenses.cli import app
from tl_lenses.cli_inputs import lens_names, parse_layers, ranges

TEXT = "the cat sat on the mat. the dog ran to the king of France and a bird sang in Paris.\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    zoo.reference("gpt2").save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("<|endoftext|>\n".join(f"{i} {TEXT * 3}" for i in range(40)), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def fitted(model, data, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("lens") / "reg")
    done = run("fit", "--method", "regression", "--model", model, "--data", data, "--output", folder)
    assert done.exit_code == 0, done.stderr
    return folder


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def refused(*args, code=1):
    """The one line that a mistake leaves on stderr."""
    done = run(*args)
    assert done.exit_code == code
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix("error: ").strip()


# --- every command


def test_fit_regression_saves_and_says_what(model, data, fitted, tmp_path):
    assert tll.Translators.load(fitted).meta["fitter"] == "regression"
    output = tmp_path / "some"
    done = run("fit", "--method", "regression", "--model", model, "--data", data, "--layers", "::2", "--output", output)
    assert done.exit_code == 0 and done.stderr == ""
    assert "layers 0, 2" in done.stdout and str(output) in done.stdout
    assert tll.Translators.load(output).sources == (0, 2)
    again = run("fit", "--method", "regression", "--model", model, "--data", data, "--output", output, "--overwrite")
    assert again.exit_code == 0 and tll.Translators.load(output).sources == (0, 1, 2)


def test_fit_tuned_takes_every_setting(model, data, tmp_path):
    done = run(
        "fit", "--model", model, "--data", data, "--output", tmp_path / "lens", "--steps", 3, "--tokens-per-step", 200,
        "--optimizer", "sgd", "--lr", 0.05, "--loss", "ce", "--layers", "0,blocks.1.hook_resid_pre", "--seed", 7,
        "--seq-len", 32, "--batch-size", 4, "--limit-tokens", 1000, "--dtype", "float32", "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    meta = tll.Translators.load(tmp_path / "lens").meta
    want = {"steps": 3, "tokens_per_step": 200, "optimizer": "sgd", "lr": 0.05, "loss": "ce", "seed": 7}
    assert {key: meta["settings"][key] for key in want} == want
    assert meta["tokens_seen"] == 3 * 2 * 4 * 32
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lens"]  # neither state nor note is left


def test_eval_prints_and_writes_scores_beside_the_logit_lens(model, data, fitted, tmp_path):
    done = run("eval", "--model", model, "--lens", fitted, "--data", data, "--output", tmp_path / "s.json")
    assert done.exit_code == 0 and done.stderr == "", done.stderr
    assert "logit" in done.stdout and "reg" in done.stdout
    content = json.loads((tmp_path / "s.json").read_text())
    assert {(row["lens"], row["layer"]) for row in content["rows"]} == {
        (a, b) for a in ("logit", "reg") for b in range(4)
    }
    assert content["model"] == model and content["versions"]["torch"]
    done = run("eval", "--model", model, "--lens", f"a=b={fitted}", "--data", data)
    assert done.exit_code == 1 and "b=" in done.stderr  # the name ends at the first equals sign
    done = run(
        "eval",
        "--model",
        model,
        "--lens",
        f"mine={fitted}",
        "--data",
        data,
        "--layers",
        "1,-1",
        "--output",
        tmp_path / "s.csv",
    )
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert [(row["lens"], row["layer"]) for row in rows] == [
        ("logit", "1"),
        ("logit", "3"),
        ("mine", "1"),
        ("mine", "3"),
    ]


def test_show_prints_and_saves(model, fitted, tmp_path):
    done = run("show", "the cat sat", "--model", model)
    assert done.exit_code == 0 and "logit lens: 4 layers" in done.stdout
    done = run(
        "show",
        "the cat sat",
        "--model",
        model,
        "--lens",
        fitted,
        "--layers",
        "0,-1",
        "--stat",
        "entropy",
        "--save",
        tmp_path / "a.html",
    )
    assert done.exit_code == 0 and "reg lens: 2 layers" in done.stdout and "entropy" in done.stdout, done.stderr
    assert "<html" in (tmp_path / "a.html").read_text()
    done = run(
        "show",
        "the cat",
        "--model",
        model,
        "--stat",
        "logprob_diff",
        "--target",
        "a",
        "--anti-target",
        "b",
        "--save",
        tmp_path / "b.csv",
    )
    assert done.exit_code == 0 and (tmp_path / "b.csv").stat().st_size, done.stderr


def test_check_passes_or_leaves_with_1(model, monkeypatch):
    done = run("check", "--model", model, "--prompt", "the cat sat on the mat")
    assert done.exit_code == 0 and "the last row is the model" in done.stdout, done.stderr
    from tl_lenses.invariants import Check, Report

    broken = Report("tiny", "raw", [Check("holds", 0.0, "<= 0", True), Check("does not", 1.0, "<= 0", False)])
    monkeypatch.setattr(tll, "check", lambda *args: broken)
    assert "1 of 2 invariants fail" in refused("check", "--model", model)


def test_version():
    done = run("version")
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines["tl-lenses"] == tll.__version__
    assert {"transformer-lens", "torch", "transformers", "python"} <= set(lines)


def test_demo_runs_the_whole_job(tmp_path):
    done = run("demo", "--output", tmp_path / "demo", "--steps", 2, "--heldout-tokens", 256)
    assert done.exit_code == 0 and done.stderr == "", done.stderr
    for part in ("logit", "regression", "tuned", "bits/B", "top-1", "token identity", "heatmap.html"):
        assert part in done.stdout
    page = (tmp_path / "demo" / "heatmap.html").read_text(encoding="utf-8")
    assert "regression" in page and "Tokyo" in page
    assert (tmp_path / "demo" / "heatmap.svg").stat().st_size
    # It is meant to be run again.
    model = tll.lab.load()
    assert tll.Lens(model, tll.Translators.load(tmp_path / "demo" / "tuned")).layers == list(range(9))


def test_the_bundled_model_needs_no_data(tmp_path):
    done = run("fit", "--method", "regression", "--limit-tokens", 512, "--layers", "0", "--output", tmp_path / "lens")
    assert done.exit_code == 0, done.stderr
    done = run("eval", "--lens", tmp_path / "lens", "--limit-tokens", 256)
    assert done.exit_code == 0, done.stderr


def test_help_gives_examples_and_is_light():
    for command in ("demo", "fit", "eval", "show", "patchscope", "experiment", "check", "version"):
        done = run(command, "--help")
        assert done.exit_code == 0 and f"Example: tl-lenses {command}" in " ".join(done.stdout.split())
    assert run().stdout == run("--help").stdout
    heavy = "assert not {'transformer_lens', 'transformers', 'datasets', 'plotly'} & set(sys.modules)"
    code = f"import sys; from typer.testing import CliRunner; from tl_lenses.cli import app; CliRunner().invoke(app, ['--help']); {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(tll.__file__).parents[1])


def test_patchscope_prints_and_saves(model, tmp_path):
    done = run("patchscope", "the cat sat", "--model", model)
    assert done.exit_code == 0 and done.stderr == "" and "cat -> cat" in done.stdout, done.stderr
    asked = ("patchscope", "the cat sat", "--model", model, "--position", "cat", "--scope", "the king of x is")
    for kind in ("json", "csv", "svg", "html"):
        file = tmp_path / f"a.{kind}"
        done = run(*asked, "--layers", "0,-1", "--target-layers", ":2", "--max-new-tokens", 3, "--save", file)
        assert done.exit_code == 0 and str(file) in done.stdout and file.stat().st_size, done.stderr
    content = json.loads((tmp_path / "a.json").read_text())
    assert [(cell["layer"], cell["target_layer"]) for cell in content["cells"]] == [(0, 0), (0, 1), (3, 0), (3, 1)]
    loaded = zoo.build("gpt2", zoo.FEW_KINDS[0])
    want = tll.patchscope(
        loaded, tll.Source("the cat sat", "cat"), tll.Target("the king of x is", tll.at("x", occurrence="last")), [0, -1],
        [0, 1], max_new_tokens=3,
    )  # fmt: skip
    assert [cell["text"] for cell in content["cells"]] == want.text[0]
    assert "<svg" in (tmp_path / "a.svg").read_text() and "patchscope into" in (tmp_path / "a.html").read_text()
    scaled = run(*asked, "--norm", "mean")
    assert scaled.exit_code == 0 and scaled.stdout != run(*asked).stdout
    assert run("patchscope", "the cat", "--model", model, "--scope", "country_capital_city").exit_code == 0


def test_patchscope_mistakes(model, tmp_path):
    ask = ("patchscope", "the cat sat", "--model", model)
    assert "no scope 'nonsense': choose from token-identity" in refused(*ask, "--scope", "nonsense")
    assert "'dog' is not in the prompt" in refused(*ask, "--position", "dog")
    assert "position 99 is not there" in refused(*ask, "--position", "99")
    assert "no layer 9" in refused(*ask, "--layers", "9") and "no layer 9" in refused(*ask, "--target-layers", "9")
    assert "--norm is replaced, mean or a number" in refused(*ask, "--norm", "huge")
    assert "use one of .json" in refused(*ask, "--save", tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())


def test_experiment_runs_prints_and_saves(model, data, fitted, tmp_path):
    done = run(
        "experiment", "next-token", "--model", model, "--data", data, "--lens", fitted, "--limit", 8, "--output", tmp_path / "a"
    )  # fmt: skip
    assert done.exit_code == 0 and done.stderr == "", done.stderr
    for word in ("token identity", "logit lens", "reg", "oracle", "held-out", "shuffled sources", "unpatched"):
        assert word in done.stdout
    assert {"result.json", "result.csv", "heat.svg"} <= {file.name for file in (tmp_path / "a").iterdir()}
    same = (
        "experiment",
        "next-token",
        "--model",
        model,
        "--data",
        data,
        "--limit",
        8,
        "--layers",
        "1,-1",
        "--markdown",
    )
    done = run(*same, "--output", tmp_path / "a")
    assert done.exit_code == 0 and "| layer | token identity |" in done.stdout, done.stderr
    done = run(
        "experiment", "cross-model", "--model", model, "--to", model, "--data", data, "--limit", 4, "--layers", "1",
        "--target-layers", "2,3", "--output", tmp_path / "x",
    )  # fmt: skip
    assert done.exit_code == 0 and "same place" in done.stdout, done.stderr


def test_experiments_on_the_bundled_model(tmp_path):
    few = ("--layers", "0", "--output", tmp_path / "a", "--max-new-tokens", 5)
    done = run("experiment", "attributes", "--target-layers", "0", "--limit", 8, *few)
    assert done.exit_code == 0 and "by relation" in done.stdout, done.stderr
    done = run("experiment", "entities", "--limit", 4, *few)
    assert done.exit_code == 0 and "ROUGE-L" in done.stdout, done.stderr
    done = run("experiment", "multihop", "--target-layers", "0", "--limit", 3, *few)
    assert done.exit_code == 0 and "two hops at once" in done.stdout, done.stderr


def test_experiment_mistakes(model, tmp_path, monkeypatch):
    """Found before a model is loaded."""
    monkeypatch.setattr("tl_lenses.cli_experiments.load_model", lambda *args: pytest.fail("the model was loaded first"))
    out = ("--output", tmp_path / "out")
    assert "Invalid value" in refused("experiment", "nothing", code=2)
    assert "--to is for cross-model, quality, fine-tune, not for entities" in refused(
        "experiment", "entities", "--to", "lab-gpt2", *out
    )
    assert "--no-guard is for attributes, multihop" in refused("experiment", "next-token", "--no-guard", *out)
    assert "--limit 1 is too few" in refused("experiment", "entities", "--limit", 1, *out)
    assert "no file or folder" in refused("experiment", "attributes", "--data", tmp_path / "none", *out)
    assert "expected a .json or .csv" in refused("experiment", "entities", "--data", tmp_path / "none", *out)
    assert "no folder" in refused("experiment", "next-token", "--lens", tmp_path / "none", *out)
    assert "no file or directory" in refused("experiment", "next-token", "--data", tmp_path / "none.txt", *out)
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused("experiment", "entities", "--output", tmp_path / "file")
    assert not (tmp_path / "out").exists()


# --- Ctrl-C


def test_a_fit_goes_on_after_ctrl_c(model, data, tmp_path, monkeypatch):
    command = ["fit", "--model", model, "--data", data, "--steps", 5, "--batch-size", 4]
    whole = run(*command, "--output", tmp_path / "whole")
    assert whole.exit_code == 0, whole.stderr

    clip, calls = tl_lenses.fit.tuned.clip_gradients, []

    def interrupting(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return clip(*args)

    monkeypatch.setattr(tl_lenses.fit.tuned, "clip_gradients", interrupting)
    done = run(*command, "--output", tmp_path / "lens")
    assert done.exit_code == 130 and done.stderr.count("\n") == 1
    state = tmp_path / "lens.checkpoint"
    assert "after step 2 of 5" in done.stderr and str(state) in done.stderr and "same command again" in done.stderr
    assert state.is_file() and not (tmp_path / "lens").exists()

    other = tmp_path / "other.txt"
    other.write_text(TEXT * 50)
    message = refused(*[other if arg == data else arg for arg in command], "--output", tmp_path / "lens")
    assert "was made with data" in message and "other.txt" in message
    assert "was made with lr=" in refused(*command, "--lr", 0.5, "--output", tmp_path / "lens")

    done = run(*command, "--output", tmp_path / "lens")
    assert done.exit_code == 0, done.stderr
    assert len(calls) == 3 + 3  # steps 1 and 2, the interrupted one, and 3 to 5
    one, two = (tll.Translators.load(tmp_path / name) for name in ("whole", "lens"))
    assert torch.equal(one.delta, two.delta) and torch.equal(one.biases, two.biases)
    assert one.meta["tokens_seen"] == two.meta["tokens_seen"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lens", "other.txt", "whole"]


def test_ctrl_c_before_the_first_step_leaves_nothing(model, data, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tl_lenses.fit.tuned, "_start", interrupt)
    done = run("fit", "--model", model, "--data", data, "--output", tmp_path / "lens")
    assert done.exit_code == 130 and done.stderr.count("\n") == 1 and "nothing was written" in done.stderr
    monkeypatch.setattr(tll, "fit_regression", interrupt)
    done = run("fit", "--method", "regression", "--model", model, "--data", data, "--output", tmp_path / "lens")
    assert done.exit_code == 130 and done.stderr.count("\n") == 1 and "nothing was written" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_large_fit_is_planned_grouped_and_restarted(model, data, tmp_path, monkeypatch):
    command = ["fit", "--model", model, "--data", data, "--steps", 4, "--batch-size", 4, "--optimizer", "sgd"]
    many = [*command, "--layers-at-once", 2, "--offload", "--checkpoint-every", 1, "--shuffle-buffer", 7]
    step, calls = tl_lenses.fit.tuned.optimizer_step, []

    def interrupting(*args):
        calls.append(1)
        if len(calls) == 6:  # in the second group
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(tl_lenses.fit.tuned, "optimizer_step", interrupting)
    done = run(*many, "--output", tmp_path / "lens")
    assert done.exit_code == 130 and done.stderr.count("\n") == 1
    assert "memory at the peak of a step" in done.stdout and "2 passes over the text" in done.stdout
    left = {file.name for file in tmp_path.iterdir()}
    assert {"lens.checkpoint.1of2", "lens.checkpoint.2of2", "lens.checkpoint.json"} <= left
    assert "was made with layers_at_once 2, now it is None" in refused(
        *command, "--shuffle-buffer", 7, "--output", tmp_path / "lens"
    )
    done = run(*many, "--output", tmp_path / "lens")
    assert done.exit_code == 0, done.stderr
    assert len(calls) == 6 + 3 and [file.name for file in tmp_path.iterdir()] == ["lens"]
    whole = run(*command, "--shuffle-buffer", 7, "--output", tmp_path / "whole")
    assert whole.exit_code == 0, whole.stderr
    one, two = (tll.Translators.load(tmp_path / name) for name in ("whole", "lens"))
    assert torch.allclose(one.delta, two.delta, atol=1e-6)

    (tmp_path / "again.checkpoint").write_bytes(b"x")
    assert "is damaged" in refused(*command, "--output", tmp_path / "again")
    done = run(*command, "--restart", "--output", tmp_path / "again")
    assert done.exit_code == 0, done.stderr


def test_a_notice_is_one_line(model, data, tmp_path, monkeypatch):
    import safetensors.torch

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    done = run("fit", "--model", model, "--data", data, "--steps", 2, "--output", tmp_path / "lens")
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: the checkpoint")]
    assert len(notes) == 2 and "No space left on device" in notes[0] and "there is none yet" in notes[0]
    assert (
        done.exit_code == 1 and "No space left" in done.stderr.splitlines()[-1]
    )  # the lens itself does not fit either


def test_fit_stops_by_held_out_text(model, data, tmp_path):
    done = run("fit", "--model", model, "--data", data, "--held-out", data, "--steps", "auto", "--batch-size", 4,
               "--layers", "0", "--optimizer", "sgd", "--output", tmp_path / "lens")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    from tl_lenses import Translators

    meta = Translators.load(tmp_path / "lens").meta
    assert meta["settings"]["steps"] == "auto" and list(meta["held_out"]["loss"])


# --- mistakes


def test_data_that_cannot_be_read(model, tmp_path):
    def fit(file, *more):
        return refused("fit", "--model", model, "--data", file, "--output", tmp_path / "lens", *more)

    assert "no file or directory" in fit(tmp_path / "none.txt")
    (tmp_path / "empty.txt").touch()
    assert "is empty" in fit(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1") * 100)
    assert "is not UTF-8 at byte 3" in fit(tmp_path / "latin.txt")
    (tmp_path / "rows.jsonl").write_text('{"body": "some text"}\n' * 10)
    assert "no column 'text', only ['body']. Pass --text-column" in fit(tmp_path / "rows.jsonl")
    (tmp_path / "short.txt").write_text("the cat")
    assert "too few" in fit(tmp_path / "short.txt")
    (tmp_path / "text.pdf").write_text("text")
    assert "expected one of .txt" in fit(tmp_path / "text.pdf")
    assert "expected a split, one of" in fit("lab", "--split", "test")
    assert not (tmp_path / "lens").exists() and not list(tmp_path.glob("lens*"))


def test_output_that_cannot_be_written(model, data, fitted, tmp_path, monkeypatch):
    """Found before a model is loaded."""
    monkeypatch.setattr("tl_lenses.cli.load_model", lambda *args: pytest.fail("the model was loaded first"))
    file = tmp_path / "file"
    file.write_text("x")
    fit = ("fit", "--model", model, "--data", data)
    assert "exists and is not empty" in (message := refused(*fit, "--output", fitted)) and "--overwrite" in message
    assert "not a writable folder" in refused(*fit, "--output", file / "lens")
    assert "is a file" in refused(*fit, "--output", file)
    assert "not a writable folder" in refused(
        *fit, "--output", tmp_path / "lens", "--checkpoint", file / "deep" / "state"
    )
    assert "not a writable folder" in refused(
        "eval", "--model", model, "--data", data, "--output", file / "deep" / "s.csv"
    )
    assert "use one of .csv, .json" in refused("eval", "--model", model, "--data", data, "--output", tmp_path / "s.txt")
    assert "use one of .html" in refused("show", "the cat", "--save", tmp_path / "heat")
    assert "is a directory" in refused(
        "show", "the cat", "--save", (tmp_path / "d.html").mkdir() or tmp_path / "d.html"
    )


def test_models_that_are_not_there(tmp_path):
    assert "no model directory" in refused("check", "--model", tmp_path / "none")
    assert "expected config.json" in refused("check", "--model", tmp_path)
    assert "cannot load the model 'no/such'" in refused("check", "--model", "no/such")


def test_lenses_layers_and_statistics_that_are_not_there(model, data, fitted, tmp_path):
    show = ("show", "the cat", "--model", model)
    assert "no folder" in refused(*show, "--lens", tmp_path / "none")
    assert "not a folder of translators" in refused(*show, "--lens", tmp_path)
    assert "two lenses are called 'reg'" in refused(*show, "--lens", fitted, "--lens", fitted)
    assert "two lenses are called 'logit'" in refused("eval", "--lens", f"logit={fitted}")
    assert "these translators were fitted for" in refused("show", "the cat", "--lens", fitted)  # on the bundled model
    assert "no layer 99" in refused(*show, "--layers", "99")
    assert "no hook 'blocks.9.hook_resid_pre'" in refused(*show, "--layers", "blocks.9.hook_resid_pre")
    assert "selects nothing" in refused(*show, "--layers", "7:9")
    assert "no layer 99" in refused(
        "fit", "--model", model, "--data", data, "--output", tmp_path / "lens", "--layers", "99"
    )
    message = refused(*show, "--stat", "perplexity")
    assert "no statistic 'perplexity'" in message and "cross_entropy" in message
    assert "--anti-target" in refused(*show, "--stat", "logprob_diff")
    assert "context" in refused("show", "the cat " * 100, "--model", model)
    assert not list(tmp_path.iterdir())


def test_usage_errors_leave_with_2(tmp_path):
    assert "--output" in refused("fit", code=2)
    assert "No such command" in refused("fti", code=2)
    assert "--steps" in refused("fit", "--output", tmp_path / "x", "--steps", "many", code=2)
    assert "auto needs --held-out" in refused("fit", "--output", tmp_path / "x", "--steps", "auto", code=2)
    assert "--held-out is for the tuned method" in refused(
        "fit", "--output", tmp_path / "x", "--method", "regression", "--held-out", "lab"
    )
    assert "ridge" in refused("fit", "--output", tmp_path / "x", "--method", "ridge", code=2)
    assert "--data" in refused("fit", "--output", tmp_path / "x", "--model", "gpt2", code=2)


def test_debug_shows_the_trace(tmp_path):
    done = run("--debug", "check", "--model", tmp_path)
    assert done.exit_code == 1 and "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_an_error_of_ours_names_its_type(monkeypatch):
    def fails(*args):
        raise AssertionError("impossible")

    monkeypatch.setattr("tl_lenses.cli.load_model", fails)
    assert refused("check") == "AssertionError: impossible (tl-lenses --debug ... shows where)"


# --- small parts


def test_layers_names_and_ranges():
    assert parse_layers("0, 2:4,-1,blocks.0.hook_resid_mid", 9) == [0, 2, 3, -1, "blocks.0.hook_resid_mid"]
    assert parse_layers("::4", 9) == [0, 4, 8] and parse_layers("6:", 9) == [6, 7, 8]
    assert lens_names(["a/b", "x=c/d"]) == {"b": "a/b", "x": "c/d"} and lens_names(None) == {}
    assert (
        ranges((0, 1, 2)) == "0..2"
        and ranges((0, 2)) == "0, 2"
        and ranges((1, "blocks.1.hook_resid_mid")) == "1, blocks.1.hook_resid_mid"
    )

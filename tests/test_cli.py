"""Every command once, Ctrl-C and going on, and one readable line for each kind of mistake."""

import csv
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.parse
import webbrowser
from pathlib import Path

import pytest
import torch
import zoo
from typer.testing import CliRunner

import tl_lenses as tll
from tl_lenses import files
from tl_lenses.cli import app
from tl_lenses.cli.inputs import lens_names, load_model, parse_layers
from tl_lenses.cli.messages import ranges
from tl_lenses.cli.states import saved_when_terminated
from tl_lenses.model import name_of

pytestmark = pytest.mark.usefixtures("models_once")

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


def jacobian(model, data, output, *more):
    return (
        "fit",
        "--method",
        "jacobian",
        "--model",
        model,
        "--data",
        data,
        "--limit-tokens",
        80,
        "--seq-len",
        40,
        "--output",
        output,
        *more,
    )


def test_fit_jacobian_saves_its_lens(model, data, tmp_path):
    done = run(*jacobian(model, data, tmp_path / "lens", "--layers", "::2"))
    assert "of which sums" in done.output and "jacobian lens of" in done.stdout
    assert tll.Translators.load(tmp_path / "lens").meta["n_prompts"] == 2


def test_fit_jacobian_has_a_dry_run(model, data, tmp_path):
    assert "about" in run(*jacobian(model, data, tmp_path / "lens", "--dry-run")).stdout


def test_fit_jacobian_has_no_groups_of_layers(model, data, tmp_path):
    assert "its layers share one backward pass" in refused(*jacobian(model, data, tmp_path / "lens", "--offload"))


def test_fit_regression_says_its_layers(model, data, tmp_path):
    output = tmp_path / "some"
    done = run("fit", "--method", "regression", "--model", model, "--data", data, "--layers", "::2", "--output", output)
    assert done.exit_code == 0 and done.stderr == ""
    assert "layers 0, 2" in done.stdout and str(output) in done.stdout
    assert tll.Translators.load(output).sources == (0, 2)


def test_fit_overwrites_where_asked(model, data, fitted, tmp_path):
    output = shutil.copytree(fitted, tmp_path / "some")
    done = run(
        "fit", "--method", "regression", "--model", model, "--data", data, "--layers", "1", "--output", output, "--overwrite"
    )
    assert done.exit_code == 0 and tll.Translators.load(output).sources == (1,)
    assert tll.Translators.load(fitted).sources == (0, 1, 2) and tll.Translators.load(fitted).meta["fitter"] == "regression"


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
    # Of the 1,000 tokens of text 31 rows are read for the start, but for their first position.
    assert meta["tokens_seen"] == 3 * 2 * 4 * 32 + 31 * 31 and meta["settings"]["init_tokens"] == 31 * 31
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lens"]  # no state is left


def test_eval_has_scores_beside_the_logit_lens(model, data, fitted, tmp_path):
    done = run("eval", "--model", model, "--lens", fitted, "--data", data, "--output", tmp_path / "s.json")
    assert done.exit_code == 0 and done.stderr == "", done.stderr
    assert "logit" in done.stdout and "reg" in done.stdout
    content = json.loads((tmp_path / "s.json").read_text())
    assert {(row["lens"], row["layer"]) for row in content["rows"]} == {(a, b) for a in ("logit", "reg") for b in range(4)}
    assert content["model"] == model and content["versions"]["torch"]


def test_eval_writes_a_table_of_layers(model, data, fitted, tmp_path):
    table = tmp_path / "s.csv"
    run("eval", "--model", model, "--lens", f"mine={fitted}", "--data", data, "--layers", "1,-1", "--output", table)
    rows = [(row["lens"], row["layer"]) for row in csv.DictReader(table.open())]
    assert rows == [("logit", "1"), ("logit", "3"), ("mine", "1"), ("mine", "3")]


def test_the_name_of_a_lens_ends_at_the_first_equals_sign(model, data, fitted):
    assert "b=" in refused("eval", "--model", model, "--lens", f"a=b={fitted}", "--data", data)


def test_show_prints_the_logit_lens(model):
    done = run("show", "the cat sat", "--model", model)
    assert done.exit_code == 0 and "logit lens: 4 layers" in done.stdout


def test_show_prints_what_it_saves(model, fitted, tmp_path):
    page = tmp_path / "a.html"
    done = run("show", "the cat", "--model", model, "--lens", fitted, "--layers", "0,-1", "--stat", "entropy", "--save", page)
    assert done.exit_code == 0 and "reg lens: 2 layers" in done.stdout and "entropy" in done.stdout, done.stderr
    assert "<html" in page.read_text()


def test_show_compares_two_targets(model, tmp_path):
    table = tmp_path / "b.csv"
    asked = ("--stat", "logprob_diff", "--target", "a", "--anti-target", "b", "--save", table)
    done = run("show", "the cat", "--model", model, *asked)
    assert done.exit_code == 0 and table.stat().st_size, done.stderr


@pytest.fixture(scope="module")
def three(model, fitted, tmp_path_factory):
    """Three texts, from stdin, the command line and a file, with the difference of two lenses: what was said, and the picture."""
    folder = tmp_path_factory.mktemp("three")
    (folder / "p.txt").write_text("a dog ran\n")
    drawn = ("--lens", f"reg={fitted}", "--diff", "reg,logit", "--save", str(folder / "d.svg"), "--width", "150")
    given = ["show", "-", "the cat", "--model", model, *drawn, "--file", str(folder / "p.txt")]
    done = CliRunner().invoke(app, given, input="the mat\n")
    assert done.exit_code == 0, done.stderr
    return done.stdout, (folder / "d.svg").read_text("utf-8")


def test_show_takes_several_texts(three):
    assert all(f"reg − logit, row {i} of 3" in three[0] for i in range(3)) and "·ran" in three[0]


def test_show_draws_a_difference(three):
    assert "reg better" in three[1] and three[1].count(">layer<") == 3  # BOS and two words, one below the other


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("x", "--width", "300"), "--width is of a picture"),
        (("x", "--diff", "a,b"), "must be two of the lenses logit"),
        ((), "no text to read"),
        (("--file", "none"), "is no file"),
    ],
)
def test_show_refuses_what_cannot_be_shown(model, asked, message):
    assert message in refused("show", *asked, "--model", model)


def test_the_last_tokens_are_shown_in_a_page_that_opens(model, monkeypatch):
    seen = []
    monkeypatch.setattr(webbrowser, "open", lambda uri: seen.append(uri) or True)
    done = run("show", "the cat sat on the mat", "--model", model, "--last", 2, "--open")
    assert done.exit_code == 0 and "4 layers × 2 tokens" in done.stdout, done.stderr
    (page,) = [Path(urllib.parse.urlparse(uri).path) for uri in seen]
    last = len(zoo.build("gpt2", zoo.FEW_KINDS[0]).to_tokens("the cat sat on the mat")[0]) - 1
    assert f'title="position {last}"' in page.read_text("utf-8")


def test_a_page_that_cannot_be_opened_says_where_it_is(model, tmp_path, monkeypatch):
    monkeypatch.setattr(webbrowser, "open", lambda uri: False)
    assert "no browser can be opened here: the page is in" in refused("show", "the cat", "--model", model, "--open")
    assert "--open shows a page" in refused("show", "the cat", "--model", model, "--open", "--save", tmp_path / "a.svg")


@pytest.fixture(scope="module")
def chats(model, tmp_path_factory):
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}a dog: {{ m.content }}{% endfor %}"
    folder = shutil.copytree(model, tmp_path_factory.mktemp("chats") / "chats")
    tokenizer.save_pretrained(folder)
    return folder


def test_a_chat_is_shown(chats):
    done = run("show", "the cat", "--model", chats, "--chat")
    assert done.exit_code == 0 and "·d " in done.stdout and "·cat" in done.stdout, done.stderr


def test_a_chat_is_patched(chats):
    done = run("patchscope", "the cat", "--model", chats, "--chat", "--layers", "1")
    assert done.exit_code == 0 and 'source "a dog: the cat"' in done.stdout, done.stdout


def test_a_chat_needs_a_template(model):
    assert "needs a tokenizer with a chat template" in refused("patchscope", "the cat", "--model", model, "--chat")


def test_patchscope_takes_several_texts(model, tmp_path):
    (tmp_path / "p.txt").write_text("a dog ran\n")
    asked = [
        "patchscope",
        "-",
        "the cat",
        "--file",
        tmp_path / "p.txt",
        "--model",
        model,
        "--layers",
        "1,2",
        "--save",
        tmp_path / "a.png",
    ]
    done = CliRunner().invoke(app, [*map(str, asked), "--target-layers", "0,1", "--numbers"], input="the mat\n")
    assert done.exit_code == 0 and done.stdout.count('source "') == 3, done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    asked = ("patchscope", "the cat", "a dog ran", "--model", model, "--layers", "1", "--max-new-tokens", 2)
    done = run(*asked, "--faithful", "--numbers", "--save", tmp_path / "a.html")
    assert done.exit_code == 0 and "texts of 2 sources" in done.stdout and re.search(r'0\.\d\d "', done.stdout), done.stderr
    assert '"own_rank"' in (tmp_path / "a.html").read_text("utf-8")
    assert "no text to read" in refused("patchscope", "--model", model)


def test_check_passes_or_leaves_with_1(model, monkeypatch):
    done = run("check", "--model", model, "--prompt", "the cat sat on the mat")
    assert done.exit_code == 0 and "the last row is the model" in done.stdout, done.stderr
    from tl_lenses.invariants import Check, CheckReport

    broken = CheckReport("tiny", "raw", [Check("holds", 0.0, "<= 0", True), Check("does not", 1.0, "<= 0", False)])
    monkeypatch.setattr(tll, "check", lambda *args, **kwargs: broken)
    assert "1 of 2 invariants fail" in refused("check", "--model", model)


def test_check_compares_with_a_hugging_face_model(model, tmp_path):
    """The folder that was loaded agrees; the same with other weights does not; and what is none is refused."""
    from transformers import AutoModelForCausalLM

    compared = "the model is the plain Hugging Face model"
    done = run("check", "--model", model, "--reference", model)
    assert done.exit_code == 0 and compared in done.stdout and "not compared" not in done.stdout, done.stderr
    other = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        other.get_output_embeddings().weight.add_(0.5 * torch.randn(other.get_output_embeddings().weight.shape))
    other.save_pretrained(tmp_path / "other")
    done = run("check", "--model", model, "--reference", tmp_path / "other")
    assert done.exit_code == 1 and "1 of" in done.stderr
    assert "there is no model directory" in refused("check", "--model", model, "--reference", tmp_path / "nowhere")
    assert "vocabulary" in refused("check", "--model", model, "--reference", "lab-gpt2")


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


def test_the_demo_of_a_real_model_runs_on_any_that_knows_capitals(tmp_path, monkeypatch):
    from tl_lenses import demo

    monkeypatch.setattr(demo, "REAL_TOKENS", 1024)
    monkeypatch.setattr(demo, "REAL_STEPS", 2)
    done = run("demo", "--model", "lab-gpt2", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "from layer  0" in done.stdout and "capitals that the model knows" in done.stdout
    assert (tmp_path / "out" / "tuned").is_dir() and (tmp_path / "out" / "heatmap.svg").is_file()


def test_the_bundled_model_needs_no_data(tmp_path):
    done = run("fit", "--method", "regression", "--limit-tokens", 512, "--layers", "0", "--output", tmp_path / "lens")
    assert done.exit_code == 0, done.stderr
    done = run("eval", "--lens", tmp_path / "lens", "--limit-tokens", 256)
    assert done.exit_code == 0, done.stderr


COMMANDS = ("demo", "fit", "eval", "show", "patchscope", "fit-scope", "experiment", "check", "version")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_gives_an_example(command):
    done = run(command, "--help")
    assert done.exit_code == 0 and f"Example: tl-lenses {command}" in " ".join(done.stdout.split())


def test_no_command_is_help():
    assert run().stdout == run("--help").stdout


def test_help_imports_nothing_heavy():
    heavy = "assert not {'transformer_lens', 'transformers', 'datasets', 'plotly', 'tl_lenses.experiments', 'tl_lenses.views'} & set(sys.modules)"
    code = f"import sys; from typer.testing import CliRunner; from tl_lenses.cli import app; CliRunner().invoke(app, ['--help']); {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(tll.__file__).parents[1])


KING = ("--position", "cat", "--scope", "the king of x is")
OF_X = tll.Target("the king of x is", tll.at("x", occurrence="last"))


def test_patchscope_prints(model):
    done = run("patchscope", "the cat sat", "--model", model)
    assert done.exit_code == 0 and done.stderr == "" and "cat -> cat" in done.stdout, done.stderr


def test_patchscope_takes_a_scope_of_the_papers(model):
    assert run("patchscope", "the cat", "--model", model, "--scope", "country_capital_city").exit_code == 0


@pytest.mark.parametrize("kind,mark", [("json", '"cells"'), ("csv", "layer"), ("svg", "<svg"), ("html", "<mark>")])
def test_patchscope_saves(model, tmp_path, kind, mark):
    file = tmp_path / f"a.{kind}"
    done = run("patchscope", "the cat sat", "--model", model, *KING, "--layers", "0", "--save", file)
    assert done.exit_code == 0 and str(file) in done.stdout and mark in file.read_text(), done.stderr


def test_patchscope_saves_what_the_library_says(model, tmp_path):
    asked = ("--layers", "0,-1", "--target-layers", ":2", "--max-new-tokens", 3, "--save", tmp_path / "a.json")
    run("patchscope", "the cat sat", "--model", model, *KING, *asked)
    cells = json.loads((tmp_path / "a.json").read_text())["cells"]
    assert [(cell["layer"], cell["target_layer"]) for cell in cells] == [(0, 0), (0, 1), (3, 0), (3, 1)]
    want = tll.patchscope(zoo.build("gpt2"), tll.Source("the cat sat", "cat"), OF_X, [0, -1], [0, 1], max_new_tokens=3)
    assert [cell["text"] for cell in cells] == want.text[0]


def test_patchscope_takes_a_norm(model):
    plain, scaled = (run("patchscope", "the cat sat", "--model", model, *KING, *norm) for norm in ((), ("--norm", "mean")))
    assert scaled.exit_code == 0 and scaled.stdout != plain.stdout


def test_patchscope_ends_on_its_faithfulness_against_other_sources(model):
    asked = ("--layers", "1", "--max-new-tokens", 2, "--against", "a dog", "--against", "the old king")
    named = load_model(model, None, "float32")  # its name stands in the title
    sources = [tll.Source("the cat sat", "cat"), "a dog", "the old king"]
    texts = tll.patchscope(named, sources, OF_X, [1], max_new_tokens=2)
    done, lines = (
        run("patchscope", "the cat sat", "--model", model, *KING, *asked),
        lambda text: list(map(str.rstrip, text.splitlines())),
    )
    expected = lines(str(tll.faithfulness(texts)))
    assert done.exit_code == 0 and lines(done.stdout)[-len(expected) :] == expected, done.stderr


def test_patchscope_saves_its_own_source_alone(model, tmp_path, monkeypatch):
    """Beside eleven others in the pass, and not a second time among them."""
    beside, patched = [], tll.patchscope
    monkeypatch.setattr(tll, "patchscope", lambda m, sources, *rest, **how: beside.append(len(sources)) or patched(m, sources, *rest, **how))  # fmt: skip
    contents = []
    for more in ((), ("--faithful",)):
        done = run("patchscope", "the cat", "--model", model, "--layers", "1", "--save", tmp_path / "b.json", *more)
        contents.append(json.loads((tmp_path / "b.json").read_text()))
    assert "texts of 11 sources" in done.stdout and beside == [1, 11]
    for content in contents:
        content.pop("plan")
        for cell in content["cells"]:
            cell["top"] = [[token, pytest.approx(p, abs=1e-5)] for token, p in cell["top"]]
    assert contents[1] == contents[0]


def fit_scope(model, data, output, labels=2):
    asked = ("--scope", "the king of x is", "--layers", "1", "--target-layers", "0,2", "--steps", 3, "--seq-len", 16, "--rank", 1)
    return "fit-scope", "--model", model, "--data", data, "--output", output, "--labels", labels, *asked


def test_fit_scope_saves_a_map(model, data, tmp_path):
    done = run(*fit_scope(model, data, tmp_path / "map"))
    assert done.exit_code == 0 and "unfitted" in done.stdout and f"--map {tmp_path / 'map'}" in done.stdout, done.stderr
    maps = tll.Translators.load(tmp_path / "map")
    assert maps.pairs == ((1, 0), (1, 2)) and maps.meta["settings"]["steps"] == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["map"]


def test_patchscope_takes_the_map_of_fit_scope(model, data, tmp_path):
    run(*fit_scope(model, data, tmp_path / "map"))
    asked = ("--scope", "the king of x is", "--map", tmp_path / "map", "--save", tmp_path / "a.json")
    said = run("patchscope", "the cat sat", "--model", model, *asked)
    assert said.exit_code == 0, said.stderr
    maps = tll.Translators.load(tmp_path / "map")
    target = tll.Target("the king of x is", tll.at("x"))
    tll.patchscope(tll.load_model(model), "the cat sat", target, pairs=list(maps.pairs), map=maps).save(tmp_path / "b.json")
    assert json.loads((tmp_path / "a.json").read_text())["cells"] == json.loads((tmp_path / "b.json").read_text())["cells"]


def test_fit_scope_refuses_labels_that_are_no_number(model, data, tmp_path):
    assert "labels" in refused(*fit_scope(model, data, tmp_path / "no", labels="words"))


def test_patchscope_mistakes(model, tmp_path):
    ask = ("patchscope", "the cat sat", "--model", model)
    assert "no scope 'nonsense': choose from token-identity" in refused(*ask, "--scope", "nonsense")
    assert "'dog' is not in the prompt" in refused(*ask, "--position", "dog")
    assert "position 99 is not there" in refused(*ask, "--position", "99")
    assert "no layer 9" in refused(*ask, "--layers", "9") and "no layer 9" in refused(*ask, "--target-layers", "9")
    assert "--norm is replaced, mean or a number" in refused(*ask, "--norm", "huge")
    assert "use one of .json" in refused(*ask, "--save", tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())


def test_experiment_prints_what_it_saves(model, data, fitted, tmp_path):
    asked = ("--data", data, "--lens", fitted, "--n", 8, "--output", tmp_path / "a")
    done = run("experiment", "next-token", "--model", model, *asked)
    assert done.exit_code == 0 and done.stderr == "", done.stderr
    for word in ("token identity", "logit lens", "reg", "oracle", "held-out", "shuffled sources", "unpatched"):
        assert word in done.stdout
    assert {"result.json", "result.csv", "heat.svg"} <= {file.name for file in (tmp_path / "a").iterdir()}


def test_experiment_prints_markdown(model, data, tmp_path):
    asked = ("--data", data, "--n", 8, "--layers", "1,-1", "--markdown", "--output", tmp_path / "a")
    done = run("experiment", "next-token", "--model", model, *asked)
    assert done.exit_code == 0 and "| layer | token identity |" in done.stdout, done.stderr


def test_experiment_takes_a_second_model(model, data, tmp_path):
    asked = ("--data", data, "--n", 4, "--layers", "1", "--target-layers", "2,3", "--output", tmp_path / "x")
    done = run("experiment", "cross-model", "--model", model, "--to", model, *asked)
    assert done.exit_code == 0 and "same place" in done.stdout, done.stderr


def test_recommend_says_which_lens_for_which_question(model, data, fitted, tmp_path):
    (tmp_path / "lens-eval-own.json").write_text(
        json.dumps({"items": [{"prompt": "the cat sat on the big ", "target": "tree", "intermediates": ["mat", "capital"]}]})
    )
    asked = "recommend", "--model", model, "--data", data, "--lens", f"own={fitted}", "--layers", "0,2", "--n", 400
    done = run(*asked, "--items", tmp_path / "lens-eval-own.json", "--output", tmp_path / "a")
    assert done.exit_code == 0 and done.stderr == "", done.stderr
    for word in ("unigram", "bits per byte", "multiply-adds", "early, layer 0", "middle, layer 2", "unspoken", "random map"):
        assert word in done.stdout, word
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert {row["lens"] for row in result["rows"]} == {"logit", "own", "unigram"}
    assert all(row["kl_low"] <= row["kl"] <= row["kl_high"] for row in result["rows"])
    assert [table["title"] for table in result["tables"]][-1] == "which lens" and (tmp_path / "a" / "kl.svg").is_file()
    assert "no items" in refused(*asked, "--items", tmp_path / "a" / "nothing", "--output", tmp_path / "b")
    assert "nothing" in refused(*asked, "--facts", tmp_path / "nothing", "--output", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_experiments_on_the_bundled_model(tmp_path):
    few = ("--layers", "0", "--output", tmp_path / "a", "--max-new-tokens", 5)
    done = run("experiment", "attributes", "--target-layers", "0", "--n", 8, *few)
    assert done.exit_code == 0 and "by relation" in done.stdout, done.stderr
    done = run("experiment", "entities", "--n", 4, *few)
    assert done.exit_code == 0 and "ROUGE-L" in done.stdout, done.stderr
    done = run("experiment", "multihop", "--target-layers", "0", "--n", 3, *few)
    assert done.exit_code == 0 and "two hops at once" in done.stdout, done.stderr


def test_the_old_name_of_n_says_the_new_one(tmp_path):
    done = run("experiment", "entities", "--limit", 4, "--layers", "0", "--max-new-tokens", 2, "--output", tmp_path / "a")
    assert done.exit_code == 0 and done.stderr == "note: --limit is called --n now\n", done.stderr


def test_experiments_are_listed():
    listed = run("experiment").stdout
    assert "ablations" in listed and "Do blocks go down the gradient of the loss?" in listed


def test_each_experiment_has_its_own_options():
    options = run("experiment", "difficulty", "--help").stdout
    assert "--checkpoint" in options and "--k" not in options and "--limit" not in options
    assert "--checkpoint" not in run("experiment", "ablations", "--help").stdout


def test_an_experiment_that_does_not_exist():
    assert "No such command" in refused("experiment", "nothing", code=2)


@pytest.mark.parametrize("name", ["transfer", "causal-basis", "ablations"])
def test_an_experiment_of_one_lens_refuses_two(model, data, fitted, tmp_path, name):
    lenses = ("--lens", f"a={fitted}", "--lens", f"b={fitted}")
    message = refused("experiment", name, "--model", model, "--data", data, *lenses, "--output", tmp_path / "out")
    assert message == f"{name} reads through one lens, got --lens a, --lens b"


@pytest.mark.parametrize("options", [("entities", "--to", "lab-gpt2"), ("next-token", "--no-guard")])
def test_an_option_of_another_experiment(tmp_path, options):
    assert "No such option" in refused("experiment", *options, "--output", tmp_path / "out", code=2)


@pytest.mark.parametrize(
    "name,option,value,message",
    [
        ("entities", "--n", 1, "--n 1 is too few"),
        ("attributes", "--data", "none", "no file or folder"),
        ("entities", "--data", "none", "expected a .json or .csv"),
        ("next-token", "--lens", "none", "no folder"),
        ("next-token", "--data", "none.txt", "no file or directory"),
        ("entities", "--output", "file", "is a file"),
    ],
)
def test_mistakes_of_experiments_are_found_before_a_model_is_loaded(tmp_path, monkeypatch, name, option, value, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    # there is no such model, which would be the error if it were loaded first
    assert message in refused("experiment", name, "--model", "./none", "--output", "out", option, value)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


# --- Ctrl-C


def _watched(monkeypatch, at):
    """The steps that fits of the command line report from now on; at the `at`-th of them there is Ctrl-C."""
    fit, steps = tll.fit_tuned, []

    def watched(*args, log, **settings):
        def see(entry):
            log.append(entry)
            steps.append(entry["step"])
            if len(steps) == at:
                raise KeyboardInterrupt

        return fit(*args, log=see, **settings)

    monkeypatch.setattr(tll, "fit_tuned", watched)
    return steps


def test_a_fit_goes_on_after_ctrl_c(model, data, tmp_path, monkeypatch):
    command = ["fit", "--model", model, "--data", data, "--steps", 5, "--batch-size", 4]
    whole = run(*command, "--output", tmp_path / "whole")
    assert whole.exit_code == 0, whole.stderr

    steps = _watched(monkeypatch, 2)
    done = run(*command, "--output", tmp_path / "lens")
    assert done.exit_code == 130 and done.stderr.count("\n") == 1
    state = tmp_path / "lens.checkpoint"
    assert "after step 2 of 5" in done.stderr and str(state) in done.stderr and "same command again" in done.stderr
    assert state.is_file() and not (tmp_path / "lens").exists()

    other = tmp_path / "other.txt"
    other.write_text(TEXT * 50)
    message = refused(*[other if arg == data else arg for arg in command], "--output", tmp_path / "lens")
    assert "was made with data=" in message and "other.txt" in message
    assert "was made with lr=" in refused(*command, "--lr", 0.5, "--output", tmp_path / "lens")

    done = run(*command, "--output", tmp_path / "lens")
    assert done.exit_code == 0, done.stderr
    assert steps == [1, 2, 3, 4, 5]
    whole, resumed = (tll.Translators.load(tmp_path / name) for name in ("whole", "lens"))
    assert torch.equal(whole.delta, resumed.delta) and torch.equal(whole.biases, resumed.biases)
    assert whole.meta["tokens_seen"] == resumed.meta["tokens_seen"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lens", "other.txt", "whole"]


def test_ctrl_c_before_the_first_step_leaves_nothing(model, data, tmp_path, monkeypatch):
    def interrupt(x, hook):
        raise KeyboardInterrupt

    for method in ("tuned", "regression"):
        hooked = functools.partial(getattr(tll, f"fit_{method}"), hooks=[("blocks.0.hook_resid_pre", interrupt)])
        monkeypatch.setattr(tll, f"fit_{method}", hooked)
        done = run("fit", "--method", method, "--model", model, "--data", data, "--output", tmp_path / "lens")
        assert done.exit_code == 130 and done.stderr.count("\n") == 1 and "nothing was written" in done.stderr
    assert not list(tmp_path.iterdir())


def training(model, data, output, *more):
    settings = ("--steps", 4, "--batch-size", 4, "--optimizer", "sgd", "--shuffle-buffer", 7)
    return "fit", "--model", model, "--data", data, *settings, "--output", output, *more


GROUPED = ("--layers-at-once", 2, "--offload", "--checkpoint-every", 1)


def test_a_fit_in_groups_goes_on_in_the_group_where_it_stopped(model, data, tmp_path, monkeypatch):
    steps = _watched(monkeypatch, 5)  # in the second group
    done = run(*training(model, data, tmp_path / "lens", *GROUPED))
    assert done.exit_code == 130 and done.stderr.count("\n") == 1
    assert "memory at the peak of a step" in done.stdout and "2 passes over the text" in done.stdout
    assert {"lens.checkpoint.1of2", "lens.checkpoint.2of2"} <= {file.name for file in tmp_path.iterdir()}
    message = refused(*training(model, data, tmp_path / "lens"))
    assert "was made with the layers in 2 groups, now there are 1" in message
    done = run(*training(model, data, tmp_path / "lens", *GROUPED))
    assert done.exit_code == 0, done.stderr
    assert steps == 2 * [1, 2, 3, 4] and [file.name for file in tmp_path.iterdir()] == ["lens"]


def test_a_fit_in_groups_is_that_of_all_layers_at_once(model, data, tmp_path):
    for name, more in (("whole", ()), ("groups", GROUPED)):
        done = run(*training(model, data, tmp_path / name, *more))
        assert done.exit_code == 0, done.stderr
    whole, groups = (tll.Translators.load(tmp_path / name) for name in ("whole", "groups"))
    assert torch.allclose(whole.delta, groups.delta, atol=1e-6)


def test_a_damaged_state_is_begun_again_where_asked(model, data, tmp_path):
    state = tmp_path / "again.checkpoint"
    files.save_state(state, {"step": 1})
    state.write_bytes(state.read_bytes()[:-3])
    assert "is damaged" in refused(*training(model, data, tmp_path / "again"))
    done = run(*training(model, data, tmp_path / "again", "--restart"))
    assert done.exit_code == 0, done.stderr


def dry_run(model, data, folder, *more):
    return (
        "fit",
        "--model",
        model,
        "--data",
        data,
        "--batch-size",
        4,
        "--seq-len",
        32,
        "--output",
        folder / "lens",
        *more,
        "--dry-run",
    )


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--steps", 4), "on this machine: start "),
        (("--steps", "auto", "--held-out", None), "250 steps of "),
        (("--layers-at-once", 2), "2 passes over the text"),
        (("--method", "regression"), "of which moments"),
    ],
    ids=["steps", "auto", "groups", "regression"],
)
def test_a_dry_run_says_memory_with_minutes_and_writes_nothing(model, data, tmp_path, more, expected):
    done = run(*dry_run(model, data, tmp_path, *(data if option is None else option for option in more)))
    assert done.exit_code == 0 and expected in done.stdout and "nothing was written" in done.stdout, done.output
    assert "about " in done.stdout and not list(tmp_path.iterdir())


def test_a_dry_run_counts_the_tokens_that_there_are(model, data, tmp_path):
    output = run(*dry_run(model, data, tmp_path, "--steps", 4, "--limit-tokens", 1000)).stdout
    assert "4 steps, 512 tokens and 1,024 of the start" in output  # the text has no more


def test_a_dry_run_refuses_what_a_fit_would(model, data, tmp_path):
    assert "leave out layers_at_once" in refused(*dry_run(model, data, tmp_path, "--layers-at-once", 2, "--held-out", data))


def test_what_is_not_a_state_is_left_alone(model, data, tmp_path):
    command = ("fit", "--model", model, "--data", data, "--steps", 1, "--output", tmp_path / "lens")
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    for more in ((), ("--restart",)):
        assert "thesis.txt is not the state of a fit" in refused(*command, "--checkpoint", thesis, *more)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("mine")
    message = refused(*command[:-1], tmp_path / "notes", "--overwrite")
    assert "notes holds 'a.md', which is not of translators" in message
    assert thesis.read_text() == "years of work" and (tmp_path / "notes" / "a.md").read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes", "thesis.txt"]


def test_the_text_is_noted_in_the_state_and_in_no_file_beside_it(model, data, tmp_path, monkeypatch):
    beside = tmp_path / "run.json"
    beside.write_text('{"mine": 1}')
    command = ("fit", "--method", "regression", "--model", model, "--data", data, "--checkpoint", tmp_path / "run")
    monkeypatch.setattr(tll.Translators, "save", lambda *args, **kwargs: 1 / 0)
    done = run(*command, "--checkpoint-every", 1, "--output", tmp_path / "lens")
    assert done.exit_code and (tmp_path / "run").is_file()
    monkeypatch.undo()
    for other in (("--seed", 3), ("--seq-len", 32), ("--limit-tokens", 500), ("--batch-size", 2)):
        name = other[0][2:].replace("-", "_")
        assert f"was made with {name}=" in refused(*command, *other, "--output", tmp_path / "lens")
    assert run(*command, "--output", tmp_path / "lens").exit_code == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lens", "run.json"]
    assert beside.read_text() == '{"mine": 1}'


def test_two_fits_into_one_output_or_one_state(model, data, tmp_path):
    pytest.importorskip("fcntl")
    command = ("fit", "--model", model, "--data", data, "--steps", 1)
    code = f"from tl_lenses.files import locked\nwith locked({str(tmp_path / 'lens')!r}):\n print(1, flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(tll.__file__).parents[1]
    )
    assert other.stdout.readline()
    for more in (("--output", tmp_path / "lens"), ("--output", tmp_path / "b", "--checkpoint", tmp_path / "lens")):
        assert f"lens is being written by process {other.pid} on" in refused(*command, *more)
    other.kill()
    other.wait()
    assert run(*command, "--output", tmp_path / "lens").exit_code == 0
    assert [file.name for file in tmp_path.iterdir()] == ["lens"]


def test_a_fit_that_fails_says_where_its_state_is(model, data, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    command = ("fit", "--model", model, "--data", data, "--steps", 2, "--checkpoint-every", 1)
    monkeypatch.setattr(tll.Translators, "save", full)
    done = run(*command, "--output", tmp_path / "lens")
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        f"note: the state of the fit is in {tmp_path / 'lens.checkpoint'}", "error: [Errno 28] No space left on device"
    ]  # fmt: skip
    monkeypatch.undo()
    assert run(*command, "--output", tmp_path / "lens").exit_code == 0
    assert [file.name for file in tmp_path.iterdir()] == ["lens"]


def test_a_lens_that_cannot_be_saved_is_saved_elsewhere(model, data, tmp_path, monkeypatch):
    """Where somebody is there to ask."""
    save, answers = tll.Translators.save, [str(tmp_path / "lens"), str(tmp_path / "other")]

    def full(self, path, **kwargs):
        if Path(path).name == "lens":
            raise OSError(28, "No space left on device")
        save(self, path, **kwargs)

    monkeypatch.setattr(tll.Translators, "save", full)
    monkeypatch.setattr("tl_lenses.cli.fit.sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("tl_lenses.cli.fit.typer.prompt", lambda *args, **kwargs: answers.pop(0))
    from tl_lenses.cli.fit import _save  # the command itself asks at a terminal, which a test has not

    maps = tll.Translators([(0, 1)], torch.eye(2)[None], torch.zeros(1, 2), n_layers=1)
    assert _save(maps, tmp_path / "lens", True) == tmp_path / "other" and not answers
    assert [file.name for file in tmp_path.iterdir()] == ["other"]
    answers.append("")
    with pytest.raises(OSError, match="No space left"):
        _save(maps, tmp_path / "lens", False)


@pytest.fixture(params=["SIGTERM", "SIGHUP"])
def ending(request):
    """A signal that ends a process, whose handler is put back."""
    number = getattr(signal, request.param, None)
    if number is None:
        pytest.skip("not on this system")
    before, interrupt = signal.getsignal(number), signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        pytest.skip("these tests run under nohup")
    yield number
    signal.signal(number, before)
    signal.signal(signal.SIGINT, interrupt)


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background of a shell"])
def test_a_signal_that_ends_is_ctrl_c_while_fitting(ending, handler):
    before = signal.getsignal(ending)
    signal.signal(signal.SIGINT, handler)
    with pytest.raises(KeyboardInterrupt), saved_when_terminated():
        os.kill(os.getpid(), ending)
    assert signal.getsignal(ending) == before


def test_a_signal_that_is_ignored_stays_ignored(ending):
    signal.signal(ending, signal.SIG_IGN)
    with saved_when_terminated():
        os.kill(os.getpid(), ending)


def test_each_stage_is_said_in_a_terminal(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr("tl_lenses.cli.messages.in_terminal", lambda: True)
    done = run("fit", "--model", model, "--data", data, "--steps", 1, "--no-progress", "--output", tmp_path / "lens")
    assert done.exit_code == 0, done.output
    stages = [line.split()[0] for line in done.stderr.splitlines() if line.endswith(" ...")]
    assert stages == ["loading", "planning", "fitting", "saving"]


def test_names_cannot_send_codes_to_the_terminal(capsys):
    from tl_lenses.cli.messages import fail, say

    say("lens \x1b[31m of\tmodel \ud800\n")
    fail("no \x1b]0;x\x07")
    assert capsys.readouterr() == ("lens <0x1B>[31m of\tmodel <U+D800>\n\n", "error: no <0x1B>]0;x<0x07>\n")


def test_a_notice_is_one_line(model, data, tmp_path, monkeypatch):
    import safetensors.torch

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    done = run("fit", "--model", model, "--data", data, "--steps", 2, "--output", tmp_path / "lens")
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: the checkpoint")]
    assert len(notes) == 2 and "No space left on device" in notes[0] and "there is none yet" in notes[0]
    assert done.exit_code == 1 and "No space left" in done.stderr.splitlines()[-1]  # the lens itself does not fit either


def test_fit_stops_by_held_out_text(model, data, tmp_path):
    # A rate that changes nothing: four looks without a gain, and a quarter as many steps to cool down.
    done = run("fit", "--model", model, "--data", data, "--held-out", data, "--steps", "auto", "--batch-size", 4,
               "--layers", "0", "--optimizer", "sgd", "--lr", 1e-9, "--output", tmp_path / "lens")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    meta = tll.Translators.load(tmp_path / "lens").meta
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


@pytest.mark.parametrize(
    "command,outputs,message",
    [
        ("fit", ("--output", "full"), "exists and is not empty"),
        ("fit", ("--output", "full"), "--overwrite"),
        ("fit", ("--output", "file/lens"), "not a writable folder"),
        ("fit", ("--output", "file"), "is a file"),
        ("fit", ("--output", "lens", "--checkpoint", "file/deep/state"), "not a writable folder"),
        ("eval", ("--output", "file/deep/s.csv"), "not a writable folder"),
        ("eval", ("--output", "s.txt"), "use one of .csv, .json"),
        ("show", ("--save", "heat"), "use one of .html"),
        ("show", ("--save", "d.html"), "is a directory"),
    ],
)
def test_output_that_cannot_be_written_is_found_before_a_model_is_loaded(data, tmp_path, monkeypatch, command, outputs, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    for folder in ("full", "d.html"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "notes").write_text("x")
    # there is no such model, which would be the error if it were loaded first
    given = ("the cat",) if command == "show" else ("--data", data)
    assert message in refused(command, *given, "--model", "./none", *outputs)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["d.html", "file", "full"]


def test_models_that_are_not_there(tmp_path):
    assert "no model directory" in refused("check", "--model", tmp_path / "none")
    assert "expected config.json" in refused("check", "--model", tmp_path)
    assert "cannot load the model 'no/such'" in refused("check", "--model", "no/such")


def test_a_real_model_is_in_its_folder_or_the_error_says_what_makes_it(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TL_LENSES_MODELS", str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    for command in (("check",), ("show", "the cat"), ("patchscope", "the cat"), ("fit", "--output", tmp_path / "lens")):
        more = ("--data", "lab") if command[0] == "fit" else ()
        output = refused(*command, "--model", "smollm2-135m", *more)
        assert f"not in {str(tmp_path)!r}: python tools/real_models.py smollm2-135m makes it" in output, output
    shutil.copytree(model, tmp_path / "smollm2-135m")
    done = run("check", "--model", "smollm2-135m")
    assert done.exit_code == 0, done.stderr
    loaded = tll.load_model("smollm2-135m")
    assert name_of(loaded) == "smollm2-135m" and loaded.cfg.n_layers == zoo.build("gpt2", zoo.FEW_KINDS[0]).cfg.n_layers
    with pytest.raises(ValueError, match="expected config.json"):
        tll.load_model(str(tmp_path))


def test_lenses_that_are_not_there(model, tmp_path):
    show = ("show", "the cat", "--model", model)
    assert "no folder" in refused(*show, "--lens", tmp_path / "none")
    assert "is not a lens: expected a folder of tl_lenses" in refused(*show, "--lens", tmp_path)


def test_two_lenses_of_one_name(model, fitted):
    assert "two lenses are called 'reg'" in refused("show", "the cat", "--model", model, "--lens", fitted, "--lens", fitted)
    assert "two lenses are called 'logit'" in refused("eval", "--lens", f"logit={fitted}")


def test_a_lens_of_another_model(fitted):
    assert "these translators were fitted for" in refused("show", "the cat", "--lens", fitted)  # on the bundled model


@pytest.mark.parametrize(
    "layers,message",
    [("99", "no layer 99"), ("blocks.9.hook_resid_pre", "no hook 'blocks.9.hook_resid_pre'"), ("7:9", "selects nothing")],
)
def test_layers_that_are_not_there(model, layers, message):
    assert message in refused("show", "the cat", "--model", model, "--layers", layers)


def test_a_fit_of_a_layer_that_is_not_there_writes_nothing(model, data, tmp_path):
    fit = ("fit", "--model", model, "--data", data, "--output", tmp_path / "lens")
    assert "no layer 99" in refused(*fit, "--layers", "99")
    assert not list(tmp_path.iterdir())


def test_statistics_that_are_not_there(model):
    message = refused("show", "the cat", "--model", model, "--stat", "perplexity")
    assert "no statistic 'perplexity'" in message and "cross_entropy" in message
    assert "--anti-target" in refused("show", "the cat", "--model", model, "--stat", "logprob_diff")


def test_a_prompt_that_is_longer_than_the_context(model):
    assert "context" in refused("show", "the cat " * 100, "--model", model)


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


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--seq-len", 0), "--seq-len must be at least 2, got 0"),
        (("--limit-tokens", 0), "--limit-tokens must be at least 1, got 0"),
        (("--limit-tokens", 100), "--limit-tokens is 100: expected at least 128, which is one row of seq_len 128"),
        (("--batch-size", 0), "--batch-size must be at least 1, got 0"),
        (("--data", ""), "--data is empty"),
        (("--device", ""), "--device '' is no device"),
        (("--device", "gpu"), "--device 'gpu' is no device"),
    ],
)
def test_nothing_and_zero_are_not_the_default(tmp_path, more, message):
    commands = [("eval",), ("fit", "--output", tmp_path / "x"), ("fit", "--method", "regression", "--output", tmp_path / "x")]
    for command in commands:
        assert message in refused(*command, "--model", "lab-gpt2-small", "--data", "lab", *more)
    assert not list(tmp_path.iterdir())


def test_numbers_of_a_fit_that_are_out_of_range(tmp_path):
    for flag in ("--tokens-per-step", "--layers-at-once", "--checkpoint-every"):
        assert flag in refused("fit", "--output", tmp_path / "x", flag, -1, code=2)


def test_debug_shows_the_trace(tmp_path):
    done = run("--debug", "check", "--model", tmp_path)
    assert done.exit_code == 1 and "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_an_error_of_ours_names_its_type(model, monkeypatch):
    def fails(*args, **kwargs):
        raise AssertionError("impossible")

    monkeypatch.setattr(tll, "check", fails)
    assert refused("check", "--model", model) == "AssertionError: impossible (tl-lenses --debug ... shows where)"


# --- small parts


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0, 2:4,-1,blocks.0.hook_resid_mid", [0, 2, 3, -1, "blocks.0.hook_resid_mid"]),
        ("::4", [0, 4, 8]),
        ("6:", [6, 7, 8]),
    ],
)
def test_layers_are_numbers_slices_or_sites(text, layers):
    assert parse_layers(text, 9) == layers


def test_a_lens_is_called_by_its_folder_or_as_asked():
    assert lens_names(["a/b", "x=c/d"]) == {"b": "a/b", "x": "c/d"} and lens_names(None) == {}


@pytest.mark.parametrize(
    ("layers", "text"),
    [((0, 1, 2), "0..2"), ((0, 2), "0, 2"), ((1, "blocks.1.hook_resid_mid"), "1, blocks.1.hook_resid_mid")],
)
def test_layers_are_said_as_ranges(layers, text):
    assert ranges(layers) == text

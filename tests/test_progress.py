"""Work says how far it is: a bar in a terminal, lines in a log file, each with a total and the time left; and a fit its minutes."""

import io
import re
import sys
from typing import Any

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses import progress as bars
from tl_lenses.experiments.subject import Subject
from tl_lenses.text.batches import Text

KIND = zoo.FEW_KINDS[0]


@pytest.fixture
def model():
    return zoo.build("gpt2", KIND)


@pytest.fixture
def lines(monkeypatch, capsys):
    """What a log file gets, by the name of the bar, with a line after every bit of work."""
    monkeypatch.setattr(bars, "EVERY", 1e-9)

    def read():
        by_bar = {}
        for line in capsys.readouterr().err.splitlines():
            by_bar.setdefault(line.split(":")[0], []).append(line)
        return by_bar

    return read


def test_a_log_file_gets_whole_lines_now_and_then(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    for _ in bars.progress(range(10), desc="work"):
        clock[0] += 8.0
    text = capsys.readouterr().err
    assert "\r" not in text and text.endswith("\n")
    assert [line.split(",")[0] for line in text.splitlines()] == ["work: 4 of 10", "work: 8 of 10", "work: 10 of 10"]
    assert text.splitlines()[0] == "work: 4 of 10, 00:32 so far, 00:48 left"


def test_short_work_and_show_false_are_silent(capsys):
    assert list(bars.progress(range(3), desc="work")) == [0, 1, 2]
    assert list(bars.progress(range(3), desc="work", show=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_after_two_seconds(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    for i in bars.progress(range(10), desc="work"):
        assert ("/10" in terminal.getvalue()) == (i > 2)
        clock[0] += 0.7
    assert re.search(r"work: .*3/10 \[00:02<00:0\d", terminal.getvalue())


def test_every_bar_of_a_fit_has_its_end(model, lines):
    tokens = zoo.tokens(40, 16)
    log = []
    tll.fit_tuned(model, tokens, steps=3, init_tokens=200, held_out=0.2, held_out_every=2, log=log)
    shown = lines()
    assert shown["start"][0].startswith("start: 1 of 2, ") and shown["start"][-1].startswith("start: 2 of 2")
    assert all(" of 1, " in line and " left" in line for line in shown["held-out text"])
    assert [line.split(",")[0] for line in shown["tuned lens"]][:3] == [f"tuned lens: {i} of 3" for i in (1, 2, 3)]
    assert " left, L0 " in shown["tuned lens"][0] and "tokens/s" in shown["tuned lens"][0]

    tll.fit_regression(model, tokens, held_out=zoo.tokens(8, 16, seed=1))
    shown = lines()
    assert shown["regression"][-1].startswith("regression: 5 of 5, ")
    assert shown["held-out text"][-1].startswith("held-out text: 1 of 1")
    tll.fit_regression(model, tokens, limit_tokens=200)  # 120 positions are used of each batch
    assert lines()["regression"][-1].startswith("regression: 2 of 2, ")


def test_a_fit_that_does_not_know_its_last_step_gets_an_end_when_it_does(model, lines):
    settings: dict[str, Any] = dict(held_out=zoo.tokens(8, 16, seed=1), held_out_every=2, patience=1, lr=1e-9, init="identity")
    lens = tll.fit_tuned(model, zoo.tokens(40, 16), steps="auto", **settings)
    shown = lines()["tuned lens"]
    last = lens.meta["held_out"]["looks"][0][-1]["step"]
    assert shown[0].startswith("tuned lens: 1, ") and "not known" in shown[0]
    assert f"tuned lens: {last} of {last}, " in shown[-1]


def test_every_bar_of_a_reading_has_its_end(model, lines):
    lens, tokens = tll.Lens(model), zoo.tokens(24, 16)
    tll.evaluate(model, lens, tokens)
    tll.trajectory(model, lens, tokens[:2], chunk_size=10)
    tll.patchscope(model, tll.Source(tokens[:1, :4]), tll.Target(tokens[:1, :5]), layers=range(3))
    for _ in Subject.of(model, {"logit": lens}, None).batches(tokens, desc="an experiment", show_progress=None):
        pass
    shown = lines()
    assert shown["evaluating"][-1].startswith("evaluating: 3 of 3")
    assert shown["trajectory"][-1].startswith("trajectory: 128 of 128")
    assert shown["patchscope"][-1].startswith("patchscope: 3 of 3")
    assert shown["an experiment"][-1].startswith("an experiment: 3 of 3")


def test_after_the_first_step_a_fit_says_how_long_it_takes(model, lines, monkeypatch):
    fit = lambda **more: tll.fit_tuned(model, zoo.tokens(40, 16), steps=5, init="identity", **more)
    fit()
    assert not any(name.startswith("about") for name in lines())  # seconds are not worth a word
    monkeypatch.setattr(bars, "ASK", 0.0)
    for more, steps in (({}, 4), ({"subsample": 0.5}, 3)):  # the first step of a sample is exact, and longer
        fit(**more)
        (shown,) = (line for name, part in lines().items() if name.startswith("about") for line in part)
        assert f"to go: {steps} steps of " in shown and "every second layer about" in shown
    fit(show_progress=False)
    assert not lines()


def test_texts_know_about_how_many_batches_they_are(tmp_path):
    tokenizer = tll.lab.load("lab-gpt2-small").tokenizer
    cut = lambda source, **more: tll.token_batches(source, tokenizer, seq_len=64, batch_size=8, **more)
    documents = tll.lab.text("heldout")[:20]
    file = tmp_path / "text.txt"
    file.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    n = sum(1 for _ in cut(documents))
    for source in (documents, str(file), tmp_path):
        guess = Text.of(cut(source)).n_batches
        assert guess is not None and abs(guess - n) <= 0.15 * n, (source, guess, n)
    assert cut(documents, limit_tokens=2048).n_batches == 4
    assert cut(lambda: iter(documents)).n_batches is cut(iter(documents)).n_batches is None
    assert cut(lambda: iter(documents), limit_tokens=2048).n_batches == 4

    ids = torch.zeros(20, 4, dtype=torch.long)
    assert Text.of(ids).n_batches == 3 and Text.of(ids, 5).n_batches == 4 and Text.of([ids, ids]).n_batches == 2
    assert Text.of(iter([ids])).n_batches is None

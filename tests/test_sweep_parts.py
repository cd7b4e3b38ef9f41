"""Sweeps in shares: the merged result is that of one run, to the last byte; parts that do not fit are refused."""

import pytest

from tl_lenses.cli.commands import app
from tl_lenses.patchscopes import planner

SMALL = {
    "next-token": ["--n", "6", "--layers", "1,4"],
    "attributes": ["--n", "8", "--layers", "1,4", "--target-layers", "0,2", "--max-new-tokens", "2"],
    "entities": ["--n", "4", "--layers", "1,4", "--max-new-tokens", "3"],
    "multihop": ["--n", "3", "--layers", "1,4", "--target-layers", "0,2", "--max-new-tokens", "2"],
    "cross-model": ["--n", "6", "--layers", "1,2", "--target-layers", "2"],
}


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planner, "_MOST_ROWS", 5)
    monkeypatch.setattr("tl_lenses.cli.patchscope_experiments.FIT_TOKENS", 2**12)

    def run(*args):
        with pytest.raises(SystemExit) as done:
            app(list(args))
        said = capsys.readouterr()
        return done.value.code, said.out + said.err

    return run


def counted(monkeypatch):
    """The cells of every batch that runs."""
    batches, run_cells = [], planner.run_cells
    watched = lambda target, cells, draws: (batches.append(len(cells)), run_cells(target, cells, draws))[1]
    monkeypatch.setattr("tl_lenses.patchscopes.run.run_cells", watched)
    return batches


@pytest.mark.parametrize("name", SMALL)
def test_an_experiment_in_parts_is_the_experiment(name, command, tmp_path, monkeypatch):
    batches = counted(monkeypatch)
    code, said = command("experiment", name, *SMALL[name], "--output", "whole")
    assert code == 0, said
    n, shares = len(batches), []
    assert n > 2
    for part in ("1/2", "0/2"):
        batches.clear()
        code, said = command("experiment", name, *SMALL[name], "--output", "parts", "--shard", part)
        assert code == 0 and f"part {part} is in parts.parts" in said, said
        shares.append(len(batches))
    assert sorted(shares) == [n // 2, n - n // 2] and not (tmp_path / "parts").exists()
    batches.clear()
    code, said = command("merge", "parts")
    assert code == 0 and not batches, said
    assert {file.name for file in (tmp_path / "whole").iterdir()} == {file.name for file in (tmp_path / "parts").iterdir()}
    for name in ("result.json", "result.csv"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_patchscope_in_parts(command, tmp_path):
    sweep = ["patchscope", "the cat sat", "--target-layers", "0,1,2", "--max-new-tokens", "3"]
    assert command(*sweep, "--save", "whole.json")[0] == 0
    for part in range(3):
        assert command(*sweep, "--save", "parts.json", f"--shard={part}/3")[0] == 0
    code, said = command("merge", "parts.json")
    assert code == 0, said
    assert (tmp_path / "parts.json").read_text() == (tmp_path / "whole.json").read_text()


def test_what_does_not_fit_is_refused(command, tmp_path):
    sweep = ["patchscope", "the cat sat", "--save", "out.json"]
    assert "has no part of a sweep" in command("merge", "out.json")[1]
    assert command(*sweep, "--shard", "0/2")[0] == 0
    assert "lacks the parts 1/2: run the command with --shard 1/2" in command("merge", "out.json")[1]
    assert command("patchscope", "the dog sat", "--save", "out.json", "--shard", "1/2")[0] == 0
    assert "is of another command than" in command("merge", "out.json")[1]
    assert "--shard should be i/n" in command(*sweep, "--shard", "2/2")[1]
    assert "--shard needs --save" in command("patchscope", "x", "--shard", "0/2")[1]
    assert "No such option" in command("experiment", "quality", "--shard", "0/2")[1]
    assert not (tmp_path / "out.json").exists()


def test_a_sweep_that_follows_what_was_said_before_is_refused(tmp_path):
    """As parts of a command would, whose later cells come from earlier answers."""
    import torch

    from tl_lenses.patchscopes.parts import Said, answers, merging, shared

    said = lambda x: lambda: Said.of(torch.full((1, 3), float(x)), [[[]]], True)

    def program():
        first = answers("first", said(1), said(0))
        return answers(f"after {float(first.logits[0, 0])}", said(2), said(0)).logits

    for part in range(2):
        with shared(tmp_path, part, 2, ["x"]):
            program()
    with pytest.raises(ValueError, match="batch 1 of this sweep is in no part"), merging(tmp_path):
        program()

"""Files: exact round trips, refused elsewhere, nothing half written."""

import json
import os
import shutil

import pytest
import torch
import zoo
from test_lens import _random

import tl_lenses as tll
from tl_lenses import checkpoint
from tl_lenses.fingerprint import basis_of, fingerprint


@pytest.fixture
def saved(tmp_path):
    model = zoo.build("gpt2", zoo.FEW_KINDS[0])
    t = _random(model, basis=basis_of(model), fingerprint=fingerprint(model), fitter="tuned", model="tiny")
    t.save(tmp_path / "lens")
    return t, tmp_path / "lens"


def test_a_round_trip_of_random_translators_is_exact(saved):
    t, path = saved
    back = tll.Translators.load(path)
    assert torch.equal(back.delta, t.delta) and torch.equal(back.biases, t.biases) and back.delta.abs().sum() > 0
    assert back.rows == t.rows and back.n_layers == t.n_layers
    assert {k: v for k, v in back.meta.items() if k != "versions"} == t.meta and "torch" in back.meta["versions"]
    assert torch.equal(back.weights, t.weights)
    back.save(path.parent / "again")
    assert torch.equal(tll.Translators.load(path.parent / "again").delta, t.delta)


def test_the_file_is_safetensors_and_json_and_fits_only_its_model(saved):
    _, path = saved
    assert sorted(os.listdir(path)) == ["config.json", "translators.safetensors"]
    assert json.loads((path / "config.json").read_text())["format"] == "tl_lenses.translators"
    tll.Lens(zoo.build("gpt2", zoo.FEW_KINDS[0]), tll.Translators.load(path))
    with pytest.raises(ValueError, match="fitted for 'tiny'"):
        tll.Lens(zoo.build("neox", zoo.FEW_KINDS[0]), tll.Translators.load(path))


def test_existing_folders_are_not_overwritten_in_silence(saved):
    t, path = saved
    with pytest.raises(ValueError, match="exists and is not empty: choose another folder or pass overwrite=True"):
        t.save(path)
    other = _random(zoo.build("gpt2", zoo.FEW_KINDS[0]), seed=9)
    other.save(path, overwrite=True)
    assert torch.equal(tll.Translators.load(path).delta, other.delta)
    assert sorted(os.listdir(path.parent)) == ["lens"]  # no temporary folder is left


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_full_disk_leaves_what_was_there(saved, monkeypatch, overwrite):
    import safetensors.torch

    t, path = saved

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    target = path if overwrite else path.parent / "new"
    with pytest.raises(OSError, match="No space left"):
        t.save(target, overwrite=overwrite)
    monkeypatch.undo()
    assert torch.equal(tll.Translators.load(path).delta, t.delta)
    assert sorted(os.listdir(path.parent)) == ["lens"]


def test_outputs_that_cannot_be_written(saved, tmp_path, monkeypatch):
    t, _ = saved
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file: expected a folder"):
        t.save(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot write to"):
        t.save(tmp_path / "file" / "below")
    monkeypatch.setattr(os, "access", lambda *a: False)  # the tests may run as root, to whom everything is writable
    with pytest.raises(ValueError, match="is not a writable folder"):
        t.save(tmp_path / "elsewhere")


def test_what_is_not_translators_is_refused(saved, tmp_path):
    _, path = saved
    with pytest.raises(FileNotFoundError, match="no folder 'nowhere', and it is not a Hub name"):
        tll.Translators.load("nowhere")
    with pytest.raises(FileNotFoundError, match="the Hub did not give it"):
        tll.Translators.load("owner/name")
    with pytest.raises(ValueError, match="expected config.json and translators.safetensors"):
        tll.Translators.load(tmp_path)
    for name, content, message in (
        ("foreign", '{"base_model_name_or_path": "gpt2"}', "not of tl_lenses translators: expected format"),
        ("broken", "{", "is damaged"),
        ("newer", json.dumps({**json.loads((path / "config.json").read_text()), "version": 99}), "upgrade tl-lenses"),
    ):
        shutil.copytree(path, tmp_path / name)
        (tmp_path / name / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            tll.Translators.load(tmp_path / name)


def test_truncated_and_changed_files_are_refused(saved):
    _, path = saved
    weights = path / "translators.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="damaged or truncated"):
        tll.Translators.load(path)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="its checksum is not the one in config.json"):
        tll.Translators.load(path)
    weights.unlink()
    with pytest.raises(ValueError, match="but no translators.safetensors: copy the whole folder"):
        tll.Translators.load(path)


def test_states_round_trip_and_are_written_whole(tmp_path, monkeypatch):
    tree = {"a": torch.randn(3), "b": [{"c": torch.arange(2), 5: None}, "text", 1.5], "empty": {}}
    file = tmp_path / "deep" / "state"
    checkpoint.save_state(file, tree)
    back = checkpoint.load_state(file)
    assert (
        torch.equal(back["a"], tree["a"])
        and back["b"][0][5] is None
        and back["b"][1:] == ["text", 1.5]
        and back["empty"] == {}
    )
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        checkpoint.save_state(file, {"a": torch.zeros(3)})
    monkeypatch.undo()
    assert torch.equal(checkpoint.load_state(file)["a"], tree["a"]) and os.listdir(file.parent) == ["state"]


def test_tensors_that_share_memory_are_saved_one_by_one(tmp_path):
    stacked = torch.randn(3, 4)
    checkpoint.save_state(tmp_path / "state", {"all": stacked, "rows": list(stacked), "again": stacked[1:, 2:]})
    back = checkpoint.load_state(tmp_path / "state")
    assert torch.equal(back["all"], stacked) and torch.equal(torch.stack(back["rows"]), stacked)
    assert torch.equal(back["again"], stacked[1:, 2:])


@pytest.mark.parametrize("links", [True, False])
def test_the_last_two_states_are_kept_and_a_damaged_one_falls_back(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    file = tmp_path / "state"
    for step in range(4):
        checkpoint.save_state(file, {"step": step, "x": torch.full((500,), step)})
    assert sorted(os.listdir(tmp_path)) == ["state", "state.previous"]
    assert checkpoint.load_state(file)["step"] == 3
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1]), b"", None):
        file.write_bytes(damaged) if damaged is not None else file.unlink()
        with pytest.warns(checkpoint.Notice, match=r"state is damaged .*: going on from .*state.previous, one earlier"):
            assert checkpoint.load_state(file)["step"] == 2
        assert checkpoint.state_exists(file)
    checkpoint.previous_of(file).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"is damaged .* and state.previous beside it is damaged too"):
        checkpoint.load_state(file)
    checkpoint.remove_state(file)
    assert not os.listdir(tmp_path)


def test_a_write_that_really_fails_keeps_both_states(tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    import signal

    file = tmp_path / "state"
    for step in range(2):
        checkpoint.save_state(file, {"step": step})
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as on a full disk, files end early
    try:
        with pytest.raises(OSError):
            checkpoint.save_state(file, {"step": 2, "x": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert checkpoint.load_state(file)["step"] == 1 and sorted(os.listdir(tmp_path)) == ["state", "state.previous"]

"""Files: exact round trips, refused elsewhere, nothing half written."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses import files
from tl_lenses.identity import basis_of, fingerprint


@pytest.fixture
def saved(tmp_path):
    model = zoo.build("gpt2", zoo.FEW_KINDS[0])
    t = zoo.random_maps(model, basis=basis_of(model), fingerprint=fingerprint(model), fitter="tuned", model="tiny")
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


def test_a_lens_is_safetensors_with_json(saved):
    _, path = saved
    assert sorted(os.listdir(path)) == ["config.json", "translators.safetensors"]
    assert json.loads((path / "config.json").read_text())["format"] == "tl_lenses.translators"


def test_a_file_fits_only_its_model(saved):
    _, path = saved
    tll.Lens(zoo.build("gpt2", zoo.FEW_KINDS[0]), tll.Translators.load(path))
    with pytest.raises(ValueError, match="fitted for 'tiny'"):
        tll.Lens(zoo.build("neox", zoo.FEW_KINDS[0]), tll.Translators.load(path))


def test_existing_folders_are_not_overwritten_in_silence(saved):
    t, path = saved
    with pytest.raises(ValueError, match="exists and is not empty: choose another folder or pass overwrite=True"):
        t.save(path)
    other = zoo.random_maps(zoo.build("gpt2", zoo.FEW_KINDS[0]), seed=9)
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
    with pytest.raises(FileNotFoundError, match="no folder './nowhere', and it is not a Hub name"):
        tll.Translators.load("./nowhere")
    for name in ("nowhere", "owner/name"):
        with pytest.raises(FileNotFoundError, match=f"no folder '{name}', and the Hub did not give it"):
            tll.Translators.load(name)
    with pytest.raises(ValueError, match=r"is not a lens: expected a folder of tl_lenses .*, got \['lens'\]"):
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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file, whole: file.write_bytes(whole[:-100]), "damaged or truncated"),
        (lambda file, whole: file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1])), "its checksum is not the one in config.json"),
        (lambda file, whole: file.unlink(), "but no translators.safetensors: copy the whole folder"),
    ],
    ids=["truncated", "changed", "gone"],
)
def test_damaged_files_are_refused(saved, damage, message):
    file = saved[1] / "translators.safetensors"
    damage(file, file.read_bytes())
    with pytest.raises(ValueError, match=message):
        tll.Translators.load(saved[1])


def test_states_round_trip(tmp_path):
    tree = {"a": torch.randn(3), "b": [{"c": torch.arange(2), 5: None}, "text", 1.5], "empty": {}}
    files.save_state(tmp_path / "deep" / "state", tree)
    back = files.load_state(tmp_path / "deep" / "state")
    assert torch.equal(back["a"], tree["a"]) and back["b"][0][5] is None and back["b"][1:] == ["text", 1.5] and back["empty"] == {}


def test_a_state_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    file = tmp_path / "state"
    files.save_state(file, {"a": torch.ones(3)})
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        files.save_state(file, {"a": torch.zeros(3)})
    monkeypatch.undo()
    assert torch.equal(files.load_state(file)["a"], torch.ones(3)) and os.listdir(tmp_path) == ["state"]


def test_tensors_that_share_memory_are_saved_one_by_one(tmp_path):
    stacked = torch.randn(3, 4)
    files.save_state(tmp_path / "state", {"all": stacked, "rows": list(stacked), "again": stacked[1:, 2:]})
    back = files.load_state(tmp_path / "state")
    assert torch.equal(back["all"], stacked) and torch.equal(torch.stack(back["rows"]), stacked)
    assert torch.equal(back["again"], stacked[1:, 2:])


@pytest.mark.parametrize("links", [True, False])
def test_the_last_two_states_are_kept_and_a_damaged_one_falls_back(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    file = tmp_path / "state"
    for step in range(4):
        files.save_state(file, {"step": step, "x": torch.full((500,), step)})
    assert sorted(os.listdir(tmp_path)) == ["state", "state.previous"]
    assert files.load_state(file)["step"] == 3
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1]), b"", None):
        file.write_bytes(damaged) if damaged is not None else file.unlink()
        with pytest.warns(files.Notice, match=r"state is damaged .*: going on from .*state.previous, one earlier"):
            assert files.load_state(file)["step"] == 2
        assert files.state_exists(file)
    files.previous_of(file).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"is damaged .* and state.previous beside it is damaged too"):
        files.load_state(file)


def test_a_write_that_really_fails_keeps_both_states(tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows

    file = tmp_path / "state"
    for step in range(2):
        files.save_state(file, {"step": step})
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as on a full disk, files end early
    try:
        with pytest.raises(OSError):
            files.save_state(file, {"step": 2, "x": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert files.load_state(file)["step"] == 1 and sorted(os.listdir(tmp_path)) == ["state", "state.previous"]


# --- everything in a folder is covered


def _changes(config):
    """Every key of a config deleted, of another kind, or moved, at every depth."""

    def walk(node, path):
        if isinstance(node, dict):
            for key in node:
                yield path, key
                yield from walk(node[key], (*path, key))
        elif isinstance(node, list):
            for i in range(len(node)):
                yield path, i
                yield from walk(node[i], (*path, i))

    for path, key in walk(config, ()):
        for new in (..., None, True, -1, 2.5, "x", [], {}, "reverse"):
            changed = json.loads(json.dumps(config))
            place = changed
            for step in path:
                place = place[step]
            if new is ...:
                del place[key]
            elif new != "reverse":
                place[key] = new
            elif isinstance(place[key], list):
                place[key].reverse()
            yield changed


@pytest.mark.parametrize("version", [1, 2])
def test_a_changed_config_is_refused_or_says_the_same(saved, unchecked, version):
    t, path = saved
    t.meta["fingerprint"] = t.meta["fingerprint"][:2]  # fewer numbers to change
    t.save(path, overwrite=True)
    file = path / "config.json"
    config = json.loads(file.read_text())
    if version == 1:  # as tl_lenses 0.1 wrote it
        del config["checksum"]
        config["version"] = 1
    count = refused = 0
    for changed in _changes(config):
        file.write_text(json.dumps(changed))
        count += 1
        try:
            back = tll.Translators.load(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert version == 1 or json.loads(json.dumps(changed)) == config
            assert len(back) == len(t)
    assert count > 300 and refused > (100 if version == 1 else count - 40), (count, refused)
    file.write_text(json.dumps(config))
    assert torch.equal(tll.Translators.load(path).delta, t.delta)


def test_a_flipped_byte_is_refused_or_changes_nothing(saved, unchecked):
    t, path = saved
    generator = torch.Generator().manual_seed(0)
    for name in ("config.json", "translators.safetensors"):
        file, whole = path / name, (path / name).read_bytes()
        for at in torch.randint(len(whole), (250,), generator=generator).tolist():
            for new in (bytes([whole[at] ^ 1 << at % 8]), b"", b"\xff", b"["):
                file.write_bytes(whole[:at] + new + whole[at + 1 :])
                try:
                    back = tll.Translators.load(path)
                except ValueError as error:
                    assert str(path) in str(error)
                else:
                    assert torch.equal(back.delta, t.delta) and back.rows == t.rows, (name, at, new)
                    assert {k: v for k, v in back.meta.items() if k != "versions"} == t.meta
        file.write_bytes(whole)


def test_a_deleted_fingerprint_does_not_pass(saved):
    _, path = saved
    config = json.loads((path / "config.json").read_text())
    del config["meta"]["fingerprint"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json is damaged: its checksum is another"):
        tll.Translators.load(path)


def test_weights_that_do_not_fit_the_config(saved, unchecked):
    from safetensors.torch import save_file

    t, path = saved
    for delta, biases, message in (
        (t.delta.data[:2], t.biases.data, "'delta' should have shape"),
        (t.delta.data.long(), t.biases.data, "should hold floating point numbers"),
        (t.delta.data.to(torch.float8_e4m3fn), t.biases.data, "should hold floating point numbers"),
        (t.delta.data * float("nan"), t.biases.data, "values that are not finite"),
        (None, t.biases.data, "has no 'delta'"),
    ):
        tensors = {"delta": delta, "biases": biases}
        save_file({k: x.contiguous() for k, x in tensors.items() if x is not None}, path / "translators.safetensors")
        config = json.loads((path / "config.json").read_text())
        config["sha256"] = files.sha256(path / "translators.safetensors")
        config["checksum"] = files.maps._checksum(config)
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message) as caught:
            tll.Translators.load(path)
        assert str(path) in str(caught.value)
    for text in ("[" * 100_000, '{"format": "tl_lenses.translators", "version": ' + "9" * 5000 + "}"):
        (path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json is"):
            tll.Translators.load(path)


def test_a_record_that_json_cannot_hold_is_refused_at_once(saved):
    t, path = saved
    with pytest.raises(TypeError, match=r"meta\['when'\] cannot be written as JSON"):
        tll.Translators(t.rows, t.weights, t.biases, n_layers=t.n_layers, meta={"when": object()})
    t.meta["mask"] = torch.ones(2)
    with pytest.raises(TypeError, match=r"meta\['mask'\] cannot be written as JSON"):
        t.save(path, overwrite=True)
    assert sorted(os.listdir(path.parent)) == ["lens"]


# --- what is not ours stays, what is ours is whole


def test_a_folder_that_holds_something_else_is_not_replaced(saved, tmp_path):
    t, path = saved
    thesis = tmp_path / "work"
    thesis.mkdir()
    (thesis / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match=r"work holds 'thesis.txt', which is not of translators"):
        t.save(thesis, overwrite=True)
    (path / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"lens holds 'notes.md', which is not of translators"):
        t.save(path, overwrite=True)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"model holds 'config.json', which is not of translators"):
        t.save(model, overwrite=True)
    assert (thesis / "thesis.txt").read_text() == "years" and (path / "notes.md").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["lens", "model", "work"]


def test_a_state_is_not_written_over_something_else(tmp_path):
    for name in ("state", "state.previous"):
        file = tmp_path / name
        file.write_text("years of work")
        with pytest.raises(ValueError, match=f"{name} is not the state of a fit.*left as it is"):
            files.save_state(tmp_path / "state", {"step": 1})
        with pytest.raises(ValueError, match=f"{name} is not the state of a fit.*left as it is"):
            files.remove_state(tmp_path / "state")
        assert file.read_text() == "years of work" and os.listdir(tmp_path) == [name]
        file.unlink()
    (tmp_path / "state").write_text("years of work")
    with pytest.raises(ValueError, match="is not the state of a fit"):
        files.load_state(tmp_path / "state")


def test_remove_state_removes_all_files_of_a_fit_and_no_other(tmp_path):
    for name in ("run", "run.1of2", "run.2of2", "runner"):
        for step in range(2):
            files.save_state(tmp_path / name, {"step": step})
    (tmp_path / "run.json").write_text("{}")
    files.remove_state(tmp_path / "run")
    assert sorted(os.listdir(tmp_path)) == ["run.json", "runner", "runner.previous"]


_KILLED = """
import os, sys
import torch
import tl_lenses as tll
from tl_lenses.files import atomic, maps
where, exchange, path = sys.argv[1], sys.argv[2] == "True", sys.argv[3]
if not exchange:
    atomic._exchange = lambda one, other: False
def dies(function, times):
    left = [times]
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)
        return function(*args, **kwargs)
    return call
if where.startswith("rename"):
    os.rename = dies(os.rename, int(where[-1]))
elif where == "write":
    maps.sync = dies(maps.sync, 0)
elif where == "after":
    maps.shutil.rmtree = dies(maps.shutil.rmtree, 0)
t = tll.Translators.load(path)
t.delta.data += 1
t.save(path, overwrite=True)
"""


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("where", ["write", "rename0", "rename1", "rename2", "after"])
def test_killed_at_any_moment_there_is_a_whole_lens(saved, where, exchange):
    t, path = saved
    subprocess.run([sys.executable, "-c", _KILLED, where, str(exchange), str(path)], check=False, timeout=120)
    back = tll.Translators.load(path)
    assert torch.equal(back.delta, t.delta) or torch.equal(back.delta, t.delta + 1)
    back.save(path, overwrite=True)  # the next run brings back and removes what was left
    assert torch.equal(tll.Translators.load(path).delta, back.delta)
    assert os.listdir(path.parent) == ["lens"]


def test_an_error_between_the_renames_puts_the_old_one_back(saved, monkeypatch):
    t, path = saved
    monkeypatch.setattr(files.atomic, "_exchange", lambda one, other: False)
    rename, calls = os.rename, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(*args)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        t.save(path, overwrite=True)
    assert len(calls) == 3 and torch.equal(tll.Translators.load(path).delta, t.delta)
    assert os.listdir(path.parent) == ["lens"]


def test_temporary_files_of_killed_writes_are_removed_and_those_of_others_stay(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    of_this_process = f".tl_lenses.{files.atomic.host()}.{os.getpid()}.abcdefgh"
    elsewhere = ".tl_lenses.another-machine.1.abcdefgh"
    for name in (of_this_process, elsewhere, ".tl_lenses.notes", f".tl_lenses.{files.atomic.host()}.{child.pid}.abcdefgh"):
        (tmp_path / name).write_text("x")
    files.write_bytes(tmp_path / "a", b"")
    assert sorted(os.listdir(tmp_path)) == sorted([of_this_process, elsewhere, ".tl_lenses.notes", "a"])
    os.utime(tmp_path / elsewhere, (0, 0))
    files.write_bytes(tmp_path / "a", b"")
    assert sorted(os.listdir(tmp_path)) == sorted([of_this_process, ".tl_lenses.notes", "a"])


# --- one process at a time


def test_a_lock_names_the_process_that_has_it_and_ends_with_it(tmp_path):
    pytest.importorskip("fcntl")
    code = f"from tl_lenses.files import locked\nwith locked({str(tmp_path / 'lens')!r}):\n print('in', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    with pytest.raises(ValueError, match=rf"lens is being written by process {other.pid} on .*, since"):
        with files.locked(tmp_path / "lens"):
            pass
    other.kill()
    other.wait()
    with files.locked(tmp_path / "lens"), files.locked(tmp_path / "another"):
        assert sorted(os.listdir(tmp_path)) == [".another.lock", ".lens.lock"]
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
            with files.locked(tmp_path / "lens"):
                pass
    assert os.listdir(tmp_path) == []


# --- tables


def test_csv_has_a_line_for_each_row_whatever_is_in_a_token(tmp_path):
    import csv

    import pandas

    tokens = ["a\rb", "a\nb", 'a"b', "a,b", " a", "\r", "", "\x1b[31m", "\x00", "half \ud83d", "byte \udce2", "日本"]
    shown = [*tokens[:7], "<0x1B>[31m", "<0x00>", "half <U+D83D>", "byte <0xE2>", "日本"]
    rows = [{"token": t, "kl": k / 3 if k else float("nan")} for k, t in enumerate(tokens)]
    for given in (rows, pandas.DataFrame(rows, dtype=object)):
        files.write_bytes(tmp_path / "a.csv", files.csv_text(given).encode())
        with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
            assert [row["token"] for row in csv.DictReader(file)] == shown
        back = pandas.read_csv(tmp_path / "a.csv", keep_default_na=False, na_values={"kl": ""}, lineterminator="\n")
        assert len(back) == len(tokens) and back.kl[4] == 4 / 3 and back.kl.isna().sum() == 1
    frame = pandas.DataFrame({"x": torch.tensor([0.1, 2.0]).numpy(), "n": [1, 2], "ok": [True, False], "none": [None, "a"]})
    assert files.csv_text(frame) == frame.to_csv(index=False)
    with pytest.raises(TypeError, match="expected a frame or"):
        files.csv_text("text")


def test_json_that_every_reader_takes(tmp_path):
    import numpy as np

    content = {
        1: (1, 2.5, float("nan"), float("inf")), "t": torch.tensor([1.0, float("nan")]), "n": np.float32(0.5),
        "half \ud83d": "\udce2\x1b", "path": tmp_path, "none": None, "yes": True, "set": {3},
    }  # fmt: skip

    def never(constant):
        raise AssertionError(constant)

    assert json.loads(files.json_text(content), parse_constant=never) == {
        "1": [1, 2.5, None, None], "t": [1.0, None], "n": 0.5, "half <U+D83D>": "<0xE2>\x1b", "path": str(tmp_path),
        "none": None, "yes": True, "set": [3],
    }  # fmt: skip
    with pytest.raises(TypeError, match=r"the content\['a'\]\[1\] is a object: expected text"):
        files.json_text({"a": [1, object()]})


def test_a_lens_on_a_full_disk_is_an_error_of_the_system_and_leaves_nothing(tmp_path):
    """The command then asks for another folder; `error.translators` and checkpoints have it for states."""
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import torch, tl_lenses as tll
maps = tll.Translators([(0, 3)], torch.randn(1, 64, 64), torch.zeros(1, 64), n_layers=3)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    maps.save({str(tmp_path / "lens")!r})
except OSError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("refused: writing "), done.stderr
    assert not list(tmp_path.iterdir())

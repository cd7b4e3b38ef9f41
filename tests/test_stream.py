"""A position in the text: reading goes on there to the same batches, in every kind of source, without reading again."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import pandas
import pytest
import torch
from test_data import TEXTS, make_tokenizer

import tl_lenses.text.sources
from tl_lenses.files import load_state, save_state
from tl_lenses.text.batches import Text, token_batches
from tl_lenses.text.stream import Bookmark, ahead
from tl_lenses.tokens import Batch

TOKENIZER = make_tokenizer(bos_token="<bos>", eos_token="<eos>")
LONG = [f"{text} " * (1 + n % 7) for n, text in enumerate(TEXTS * 3)]


def _lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _source(kind, folder):
    """Something with the texts of LONG, made again at each call as in a new process."""
    half = len(LONG) // 2
    if kind == "list":
        return list(LONG)
    if kind == "function":
        return lambda: iter(LONG)
    if kind == "generator":
        return (text for text in LONG)
    if kind in ("dataset", "stream", "stream-shuffled"):
        dataset = datasets.Dataset.from_dict({"text": LONG})
        if kind == "dataset":
            return dataset
        dataset = dataset.to_iterable_dataset(num_shards=5)
        return dataset.shuffle(seed=3, buffer_size=7) if kind == "stream-shuffled" else dataset
    if kind == "jsonl":
        return _lines(folder / "a.jsonl", LONG)
    if kind == "json":
        (folder / "a.json").write_text(json.dumps(LONG, indent=1))
        return folder / "a.json"
    if kind == "parquet":
        pandas.DataFrame({"text": LONG}).to_parquet(folder / "a.parquet", row_group_size=13)
        return folder / "a.parquet"
    if kind == "csv":
        pandas.DataFrame({"text": LONG}).to_csv(folder / "a.csv", index=False)
        return folder / "a.csv"
    if kind == "txt":
        (folder / "a.txt").write_text("\n<|endoftext|>\n".join(LONG))
        return folder / "a.txt"
    if kind == "passages":
        (folder / "a.txt").write_text("\n\n".join(text.replace("\n", "\n\n") for text in LONG))
        return folder / "a.txt"
    folder = folder / "many"
    folder.mkdir(exist_ok=True)
    _lines(folder / "a.jsonl", LONG[:half])
    (folder / "b.txt").write_text("\n<|endoftext|>\n".join(LONG[half:]) + "\n<|endoftext|>\n")
    _lines(folder / "c.jsonl", LONG[:3])
    return folder


KINDS = [
    *("list", "function", "generator", "dataset", "stream", "stream-shuffled"),
    *("jsonl", "json", "parquet", "csv", "txt", "passages", "folder"),
]


def _same(a, b):
    return torch.equal(a.tokens, b.tokens) and a.bytes_per_token == b.bytes_per_token


@pytest.mark.parametrize("shuffle", [None, 5, 10_000])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_goes_on_where_it_stood(kind, shuffle, tmp_path):
    make = lambda: token_batches(
        _source(kind, tmp_path),
        TOKENIZER,
        seq_len=33,
        batch_size=3,
        shuffle_seed=None if shuffle is None else 2,
        shuffle_buffer=shuffle or 1,
    )
    whole = list(Text.of(make()).stream(endless=False))
    assert len(whole) > 20 and [p.index for _, p in whole] == list(range(1, len(whole) + 1))
    for at in (0, 1, len(whole) // 2, len(whole) - 2):
        save_state(tmp_path / "state", whole[at][1].state())  # as a checkpoint keeps it
        position = Bookmark.load(load_state(tmp_path / "state"))
        again = make()
        rest = list(Text.of(again).stream(at=position, endless=False))
        assert len(rest) == len(whole) - at - 1
        for (a, p), (b, q) in zip(rest, whole[at + 1 :], strict=True):
            assert _same(a, b) and (p.epoch, p.index, p.rows) == (q.epoch, q.index, q.rows)
        assert again.n_tokens == sum(batch.tokens.numel() for batch, _ in whole)


def test_an_endless_stream_goes_on_in_its_second_pass():
    make = lambda: token_batches(LONG, TOKENIZER, seq_len=33, batch_size=3, shuffle_seed=1, limit_tokens=900)
    stream = Text.of(make()).stream()
    first = [next(stream) for _ in range(25)]
    assert {p.epoch for _, p in first} == {0, 1, 2}  # 27 rows, 9 batches
    assert not torch.equal(first[0][0].tokens, first[9][0].tokens)
    for at in (8, 9, 13, 17):
        rest = Text.of(make()).stream(at=first[at][1])
        assert all(torch.equal(next(rest)[0].tokens, batch.tokens) for batch, _ in first[at + 1 :])


@pytest.mark.parametrize("kind", ["tensor", "list"])
def test_tensors_and_lists_of_batches_have_positions_too(kind):
    tokens = torch.arange(60).reshape(20, 3)
    made = tokens if kind == "tensor" else [tokens[:7], tokens[7:9], Batch(tokens[9:])]
    stream = Text.of(made).stream(seed=4)
    first = [next(stream)[0] for _ in range(9)]
    stream = Text.of(made).stream(seed=4)
    position = [next(stream)[1] for _ in range(4)][-1]
    rest = Text.of(made).stream(seed=4, at=Bookmark.load(position.state()))
    assert all(torch.equal(next(rest)[0].tokens, batch.tokens) for batch in first[4:])


def test_going_on_reads_no_text_before_its_place(tmp_path):
    path = _lines(tmp_path / "a.jsonl", LONG)
    make = lambda: token_batches(path, TOKENIZER, seq_len=33, batch_size=3)
    *_, (_, place), (after, _), _, _ = Text.of(make()).stream(endless=False)
    content = path.read_bytes()
    spoilt = int(0.7 * len(content))
    path.write_bytes(b"x" * spoilt + content[spoilt:])
    assert _same(next(Text.of(make()).stream(at=place))[0], after)


def test_a_stream_of_datasets_is_not_read_from_its_start():
    read = []

    def rows(shards):
        for shard in shards:
            for i in range(40):
                read.append((shard, i))
                yield {"text": LONG[i]}

    make = lambda: token_batches(
        datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2, 3]}), TOKENIZER, seq_len=33, batch_size=3
    )
    whole = list(Text.of(make()).stream(endless=False))
    _, position = whole[-2]
    read.clear()
    assert _same(next(Text.of(make()).stream(at=position))[0], whole[-1][0])
    assert {shard for shard, _ in read} == {3}


def test_a_text_that_has_changed_is_refused(tmp_path):
    path = _lines(tmp_path / "a.jsonl", LONG)
    make = lambda: token_batches(path, TOKENIZER, seq_len=33, batch_size=3)
    position = list(Text.of(make()).stream(endless=False))[20][1]
    _lines(path, LONG[1:])
    with pytest.raises(ValueError, match="the text has changed since its place was noted: file 0 was 'a.jsonl'"):
        next(Text.of(make()).stream(at=position))


# --- the thread that is ahead


def _equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def passes():
    """A text read in this process and by two workers, and one pass over each."""
    settings = dict(seq_len=9, batch_size=2, shuffle_seed=1, shuffle_buffer=5)
    alone, shared = (token_batches(list(LONG) * 4, TOKENIZER, workers=workers, **settings) for workers in (0, 2))
    return alone, shared, list(Text.of(alone).stream(endless=False)), list(Text.of(shared).stream(endless=False))


def test_worker_processes_give_the_same_batches(passes):
    *_, expected, got = passes
    assert len(got) == len(expected) > 20 and all(_same(a, b) for (a, _), (b, _) in zip(got, expected, strict=True))


def test_worker_processes_give_the_same_places(passes):
    *_, expected, got = passes
    assert all(_equal(a.state(), b.state()) for (_, a), (_, b) in zip(got, expected, strict=True))


def test_worker_processes_count_the_same_tokens(passes):
    alone, shared, *_ = passes
    assert shared.n_tokens == alone.n_tokens and shared.counted == alone.counted


def test_worker_processes_go_on_in_the_middle(passes):
    _, shared, expected, got = passes
    middle = len(got) // 2
    on = [batch.tokens for batch, _ in Text.of(shared).stream(at=got[middle][1], endless=False)]
    assert torch.equal(torch.cat(on), torch.cat([batch.tokens for batch, _ in expected[middle + 1 :]]))


def test_a_worker_that_is_killed_is_an_error(passes):
    shared = passes[1]
    list(shared)  # has its workers
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="a worker process of the tokenizer ended.*workers=0 does without"):
        list(shared)
    assert shared.pool is None  # the next pass starts others


def test_worker_processes_give_what_came_before_an_error_of_the_source():
    def torn():
        yield from LONG
        raise OSError("the disk is gone")

    got = []
    for n in (0, 1):
        got.append([])
        with pytest.raises(OSError, match="the disk is gone"):
            batches = token_batches(torn, TOKENIZER, seq_len=9, batch_size=2, workers=n, prefetch=0)
            got[-1] += (batch.tokens.tolist() for batch in batches)
    assert got[0] == got[1] and len(got[0]) > 5


def test_a_tokenizer_that_workers_cannot_have_is_refused():
    stuck = make_tokenizer(bos_token="<bos>", eos_token="<eos>")
    stuck.lock = threading.Lock()
    with pytest.raises(ValueError, match="cannot be sent to worker processes .*pass workers=0"):
        next(iter(token_batches(LONG, stuck, seq_len=9, batch_size=2, workers=1)))


_NO_GUARD = """
import sys
sys.path.insert(0, {tests!r})
from test_stream import TOKENIZER, LONG
import tl_lenses as tll
TOKENIZER.ballast = b"x" * 2**20  # more than a pipe takes
next(iter(tll.token_batches(LONG, TOKENIZER, seq_len=9, batch_size=2, workers=2)))
"""


@pytest.mark.parametrize("how", ["no guard", "killed"])
def test_workers_that_die_while_they_start_are_an_error_and_no_hang(tmp_path, how):
    code = _NO_GUARD.format(tests=str(Path(__file__).parent))
    if how == "killed":  # a worker runs the script again, under another name
        code = code.replace("import sys\n", "import os, sys\nif __name__ != '__main__':\n    os.kill(os.getpid(), 9)\n", 1)
    (tmp_path / "script.py").write_text(code)
    done = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "RuntimeError: a worker process of the tokenizer ended" in done.stderr.splitlines()[-1]


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = """
import multiprocessing, os, sys, tl_lenses as tll
sys.path.insert(0, {tests!r})
from test_stream import LONG, TOKENIZER
if __name__ == "__main__":
    batches = tll.token_batches(LONG * 50, TOKENIZER, seq_len=9, batch_size=2, workers=1)
    next(iter(batches))
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), 9)
"""
    (tmp_path / "script.py").write_text(script.format(tests=str(Path(__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": str(Path(tl_lenses.text.sources.__file__).parents[2])}
    done = subprocess.run([sys.executable, str(tmp_path / "script.py")], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    worker = int(done.stdout)
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists() or "State:\tZ" in Path(f"/proc/{worker}/status").read_text():
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the worker outlived its parent")


def test_the_thread_has_ended_when_its_reader_has():
    def items():
        for i in range(100):
            time.sleep(0.3)  # in a tokenizer
            yield i

    stream = ahead(items(), 3)
    assert next(stream) == 0
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "tl_lenses text"]


@pytest.mark.parametrize("n", [3, 0])
def test_a_thread_gives_what_it_reads(n):
    assert list(ahead(iter(range(50)), n)) == list(range(50))


def test_the_thread_is_ahead_by_no_more_than_asked():
    made = []
    stream = ahead((made.append(i) or i for i in range(100)), 3)
    assert next(stream) == 0
    time.sleep(0.3)
    assert len(made) == 5  # one read, three waiting, one in hand
    stream.close()
    time.sleep(0.3)
    assert len(made) <= 6


def test_errors_come_out_of_the_thread_in_their_place():
    def items():
        yield 1
        raise ValueError("row 1 is wrong")

    stream = ahead(items(), 3)
    assert next(stream) == 1
    with pytest.raises(ValueError, match="row 1 is wrong"):
        next(stream)

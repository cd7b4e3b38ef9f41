"""Documents to batches of full rows: tokenising, packing, shuffling, and bookmarks to continue from.

A bookmark holds the state at the start of a group of documents and the number of rows given since. To continue, that
one group is tokenised again, and nothing before it.
"""

import os
import pickle
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

import torch
from torch import Tensor

from tl_lenses.text.sources import GROUP, Place, Placed
from tl_lenses.tokens import Batch, encode, special_id

MEASURED = 2**20  # tokens `bytes_per_token` reads when no pass was made: a streamed corpus may have no end
SAMPLE = 2**16  # characters that `n_batches` takes the bytes per token of
T = TypeVar("T")


@dataclass(frozen=True)
class PackerState:
    """Everything needed to resume packing at the start of a group of documents."""

    place: Place = None
    buffer: tuple[str, ...] = ()  # documents that the shuffle holds
    generator: Tensor | None = None
    ended: bool = False  # the source is through, the buffer is given out in order
    pending: tuple[int, ...] = ()  # ids that filled no row yet
    any_text: bool = False
    counted: tuple[int, int] = (0, 0)  # tokens and bytes of the documents
    rows: int = 0  # rows given


@dataclass(frozen=True)
class Bookmark:
    """The place of a stream of batches."""

    epoch: int = 0  # number of passes made
    index: int = 0  # number of batches given in this pass
    before: PackerState | None = None  # for text, the state before the group of documents that gave the last row
    rows: int = 0  # number of rows of that group that were given

    def state(self) -> dict[str, Any]:
        """As JSON values and tensors, for `files.save_state`."""
        state: dict[str, Any] = {"epoch": self.epoch, "index": self.index, "rows": self.rows, "before": None}
        if (b := self.before) is not None:
            texts = [text.encode("utf-8", "surrogatepass") for text in b.buffer]
            sizes = torch.tensor([len(text) for text in texts], dtype=torch.long)
            buffer = torch.frombuffer(bytearray(b"".join(texts)) or bytearray(1), dtype=torch.uint8)
            state["before"] = {**vars(b), "sizes": sizes, "buffer": buffer}
        return state

    @staticmethod
    def load(state: dict[str, Any]) -> "Bookmark":
        """From the dict that `state` returned."""
        before = None
        if (b := state["before"]) is not None:
            whole, ends = b["buffer"].numpy().tobytes(), b["sizes"].cumsum(0).tolist()
            cut = [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]
            texts = tuple(text.decode("utf-8", "surrogatepass") for text in cut)
            fields: dict[str, Any] = {name: value for name, value in b.items() if name != "sizes"}
            fields |= {"buffer": texts, "pending": tuple(b["pending"]), "counted": tuple(b["counted"])}
            before = PackerState(**fields)
        return Bookmark(state["epoch"], state["index"], before, state["rows"])


@dataclass(eq=False, repr=False)
class TokenBatches:
    """The result of `token_batches`. `n_tokens` counts the tokens in the batches of the last pass, BOS and EOS too."""

    start: Callable[[Place], Placed]
    name: str
    one_shot: bool
    tokenizer: Any
    seq_len: int
    batch_size: int
    bos: int | None
    shuffle: tuple[int, int] | None
    limit_tokens: int | None
    drop_last: bool
    n_bytes: Callable[[], int | None] = lambda: None  # of the source, about
    prefetch: int = 4
    workers: int = 0
    pool: ProcessPoolExecutor | None = None  # started when first needed, and kept
    n_tokens: int = 0
    counted: tuple[int, int] = (0, 0)  # tokens and bytes of the documents of the longest pass

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, index: int) -> Iterator[Batch]:
        """One pass. With a shuffle seed each index has an order of its own; `iter()` is `epoch(0)`."""
        return (batch for batch, _ in self.marked(index))

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token of the documents (BOS and EOS not counted) that the longest pass so far has read.

        Before any pass, documents are read for it: up to `limit_tokens`, or about a million tokens.
        """
        if not self.counted[0] and self.one_shot:
            raise ValueError(f"{self.name} can be read only once: ask for bytes_per_token after iterating over it.")
        if not self.counted[0]:
            enough = self.limit_tokens or MEASURED
            next((None for _ in self._groups(self._documents(0), PackerState()) if self.counted[0] >= enough), None)
        if not self.counted[0]:
            raise ValueError(f"{self.name} holds no text, so bytes_per_token is not known. Pass a source with text.")
        return self.counted[1] / self.counted[0]

    @property
    def n_batches(self) -> int | None:
        """An estimate of the batches of a pass, from `limit_tokens` and the size of the source; None where it is unknown."""
        rows = [] if self.limit_tokens is None else [self.limit_tokens // self.seq_len]
        n_bytes = self.n_bytes()
        if n_bytes is not None and not self.one_shot:
            n_tokens, size = self.counted
            if not n_tokens:
                sample = next((text for text, _ in self.start(None) if text.strip()), " ")[:SAMPLE]
                n_tokens, size = len(encode(self.tokenizer, [sample])[0]), len(sample.encode("utf-8", "surrogatepass"))
            rows.append(int(n_bytes * n_tokens / size) // (self.seq_len - (self.bos is not None)))
        return max(1, -(-min(rows) // self.batch_size)) if rows else None

    def marked(self, epoch: int, at: Bookmark | None = None) -> Iterator[tuple[Batch, Bookmark]]:
        """One pass from a bookmark on; each batch with the bookmark after it."""
        at = Bookmark(epoch) if at is None else at
        before = at.before or PackerState()
        return self._marked(epoch, at, before, self._documents(epoch, before))

    def _marked(self, epoch: int, at: Bookmark, before: PackerState, documents: "_Documents") -> Iterator[tuple[Batch, Bookmark]]:
        rows = islice(self._rows(documents, before), at.rows, None)
        given = before.rows + at.rows
        if self.limit_tokens is not None:
            rows = islice(rows, max(0, self.limit_tokens // self.seq_len - given))
        self.n_tokens = n_tokens = given * self.seq_len
        needed, index = self.batch_size if self.drop_last else 1, at.index
        batch = list(islice(rows, self.batch_size))
        while len(batch) >= needed:
            after = list(islice(rows, self.batch_size))  # one ahead, so that the last batch knows the bytes of all text
            self.n_tokens = n_tokens = n_tokens + len(batch) * self.seq_len
            index += 1
            _, begun, row = batch[-1]
            tokens = torch.tensor([ids for ids, _, _ in batch])
            yield Batch(tokens, None, self.bytes_per_token), Bookmark(epoch, index, begun, row)
            batch = after
        if not n_tokens:
            raise ValueError(
                f"{self.name} holds {self.counted[0]} tokens: too few for {needed} row{'s' * (needed > 1)} of "
                f"seq_len {self.seq_len}. Pass more text or a smaller seq_len{' or batch_size' * self.drop_last}."
            )

    def _documents(self, epoch: int, before: PackerState | None = None) -> "_Documents":
        before = before or PackerState()
        texts = iter(()) if before.ended else self.start(before.place)
        if self.shuffle is None:
            return _Documents(texts, before.place)
        seed, size = self.shuffle
        # with seed + epoch, epoch 1 of seed 0 would repeat epoch 0 of seed 1: seeds meant to be independent are not
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        if before.generator is not None:
            generator.set_state(before.generator)
        return _Documents(texts, before.place, size, generator, list(before.buffer), before.ended)

    def _groups(self, documents: "_Documents", before: PackerState) -> Iterator[tuple[list[list[int]], PackerState]]:
        """Ids of each document of a group, and the state before it; `pending` and `rows` are for the caller to add."""
        tokens, size = before.counted
        if self.workers and self.pool is None:
            self.pool = _pool(self.tokenizer, self.workers)
        taken = iter(lambda: (documents.before(), documents.take(GROUP)), None)
        groups = takewhile(lambda item: item[1], taken)
        for begun, group, encoded in self._encoded(groups):
            begun = replace(begun, counted=(tokens, size))
            size += sum(len(text.encode()) for text in group)
            tokens += sum(map(len, encoded))
            self.counted = max(self.counted, (tokens, size))
            yield [ids for ids in encoded if ids], begun  # an empty document would only double a separator

    def _encoded(self, groups: Iterator[tuple[PackerState, list[str]]]) -> Iterator[tuple[PackerState, list[str], list[list[int]]]]:
        """The groups with their ids, in order; with a pool several of them are being tokenised at a time."""
        if self.pool is None:
            yield from ((begun, group, encode(self.tokenizer, group)) for begun, group in groups)
            return
        waiting: deque[tuple[PackerState, list[str], Future[list[list[int]]]]] = deque()
        failed: Exception | None = None
        try:
            while True:
                try:
                    for begun, group in islice(groups, 0 if failed else 2 * self.workers - len(waiting)):
                        waiting.append((begun, group, self.pool.submit(_encode_there, group)))
                except BrokenExecutor:
                    raise
                except Exception as error:  # of the source: what was read before it comes first
                    failed = error
                if not waiting:
                    if failed is not None:
                        raise failed
                    return
                begun, group, ids = waiting.popleft()
                yield begun, group, ids.result()
        except BrokenExecutor as error:
            self.pool = None
            raise RuntimeError(
                "a worker process of the tokenizer ended: it was killed, ran out of memory, or a script that starts workers lacks "
                'its `if __name__ == "__main__":`; workers=0 does without'
            ) from error
        finally:
            for _, _, ids in waiting:
                ids.cancel()

    def _rows(self, documents: "_Documents", before: PackerState) -> Iterator[tuple[list[int], PackerState, int]]:
        """Rows, each with the state before its group and its number in it, from 1."""
        head = [] if self.bos is None else [self.bos]
        width = self.seq_len - len(head)
        eos = special_id(self.tokenizer, "eos")
        separator = [] if eos is None else [eos]
        pending, any_text, rows = list(before.pending), before.any_text, before.rows
        for group, begun in self._groups(documents, before):
            begun = replace(begun, pending=tuple(pending), any_text=any_text, rows=rows)
            number = 0
            for ids in group:
                pending += separator + ids if any_text else ids
                any_text = True
                full = len(pending) - len(pending) % width
                for at in range(0, full, width):
                    number += 1
                    yield head + pending[at : at + width], begun, number
                del pending[:full]
            rows += number


@dataclass(eq=False, repr=False)
class _Documents:
    """The texts of a source, in order or each taking the place of one drawn from a buffer."""

    texts: Placed
    place: Place = None
    size: int = 0
    generator: torch.Generator | None = None
    buffer: list[str] = field(default_factory=list)
    ended: bool = False

    def take(self, n: int) -> list[str]:
        """The next n, fewer at the end."""
        return list(islice(self._next() if self.generator is None else self._shuffled(self.generator), n))

    def before(self) -> PackerState:
        state = None if self.generator is None else self.generator.get_state()
        return PackerState(self.place, tuple(self.buffer), state, self.ended)

    def _next(self) -> Iterator[str]:
        for text, place in self.texts:
            self.place = place
            yield text

    def _shuffled(self, generator: torch.Generator) -> Iterator[str]:
        if not self.ended:
            self.buffer += islice(self._next(), max(0, self.size - len(self.buffer)))
            for text in self._next():
                drawn = int(torch.randint(len(self.buffer), (), generator=generator))
                given, self.buffer[drawn] = self.buffer[drawn], text
                yield given
            order = torch.randperm(len(self.buffer), generator=generator).tolist()
            self.buffer, self.ended = [self.buffer[drawn] for drawn in reversed(order)], True
        while self.buffer:
            yield self.buffer.pop()


def _pool(tokenizer: Any, workers: int) -> ProcessPoolExecutor:
    try:
        pickled = pickle.dumps(tokenizer)
    except Exception as error:
        raise ValueError(f"this tokenizer cannot be sent to worker processes ({error}): pass workers=0") from error
    # Spawned: a fork of a process with threads (torch's, ours) may hang.
    context = get_context("spawn")
    # Not as an argument of the process: that is written into a pipe which the parent holds open at both ends, so that
    # writing more than the pipe takes would wait for ever if the worker dies while it starts.
    tokenizers = context.Queue()
    for _ in range(workers):
        tokenizers.put(pickled)
    tokenizers.cancel_join_thread()  # where no worker takes it, the interpreter does not wait for that at its end
    return ProcessPoolExecutor(workers, context, _start_there, (tokenizers,))


_tokenizer: Any = None  # of a worker process


def _start_there(tokenizers: Any) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the fit's, which saves and then ends its workers

    def watch() -> None:  # workers of a fit that was killed would wait forever
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _tokenizer = pickle.loads(tokenizers.get())


def _encode_there(texts: list[str]) -> list[list[int]]:
    return encode(_tokenizer, texts)


def ahead(items: Iterator[T], size: int) -> Generator[T, None, None]:
    """The same items, made by a thread that is up to `size` of them ahead.

    Fast tokenizers work without the interpreter's lock and so does torch, so that a thread is enough for one of them
    (`benchmarks/text_throughput.py`); `workers` are for slow ones, and for models faster than one thread.
    """
    if not size:
        yield from items
        return
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(size)
    stopped = threading.Event()

    def put(item: T | None, error: BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return made.put((item, error), timeout=0.1)
            except queue.Full:
                pass

    def work() -> None:
        try:
            for item in items:
                put(item, None)
                if stopped.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:  # belongs to whoever waits for the item
            put(None, error)

    thread = threading.Thread(target=work, name="tl_lenses text", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        # A thread that is in a tokenizer or in torch when the interpreter ends aborts it ("terminate called without an active exception").
        # An item takes a fraction of a second; a source that hangs is not waited for.
        if thread is not threading.current_thread():
            thread.join(timeout=10)

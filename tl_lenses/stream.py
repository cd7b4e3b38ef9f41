"""Documents to batches of full rows: tokenising, packing, shuffling, and a position to go on from.

A position is taken where a group of documents begins, together with the number of rows that were given since: going on
tokenises that one group again and nothing before it.
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
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from tl_lenses.texts import GROUP, Place, Placed

MEASURED = 2**20  # tokens `bytes_per_token` reads when no pass was made: a streamed corpus may have no end
T = TypeVar("T")


class Batch(NamedTuple):
    """Ids `[batch, pos]`, their mask (1 real, 0 pad; None: all real), and the bytes per token of the text so far."""

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"] | None = None
    bytes_per_token: float | None = None


@dataclass(frozen=True)
class Before:
    """What packing needs to begin with a group of documents; see `Position`."""

    place: Place = None
    buffer: tuple[str, ...] = ()  # documents that the shuffle holds
    generator: Tensor | None = None
    ended: bool = False  # the source is through, the buffer is given out in order
    pending: tuple[int, ...] = ()  # ids that filled no row yet
    any_text: bool = False
    counted: tuple[int, int] = (0, 0)  # tokens and bytes of the documents
    rows: int = 0  # rows given


@dataclass(frozen=True)
class Position:
    """Where a stream of batches stands.

    Attributes:
        epoch: passes made.
        index: batches given in this pass.
        before: of text, the state before the group of documents that gave the last row.
        rows: rows of that group that were given.
    """

    epoch: int = 0
    index: int = 0
    before: Before | None = None
    rows: int = 0

    def state(self) -> dict[str, Any]:
        """As JSON values and tensors, for `checkpoint.save_state`."""
        found: dict[str, Any] = {"epoch": self.epoch, "index": self.index, "rows": self.rows, "before": None}
        if (b := self.before) is not None:
            texts = [text.encode("utf-8", "surrogatepass") for text in b.buffer]
            found["before"] = {
                "place": b.place, "ended": b.ended, "pending": list(b.pending), "any_text": b.any_text,
                "counted": list(b.counted), "rows": b.rows, "generator": b.generator,
                "sizes": torch.tensor([len(text) for text in texts], dtype=torch.long),
                "buffer": torch.frombuffer(bytearray(b"".join(texts)) or bytearray(1), dtype=torch.uint8),
            }  # fmt: skip
        return found

    @staticmethod
    def load(state: dict[str, Any]) -> "Position":
        """What `state` gave."""
        before = None
        if (b := state["before"]) is not None:
            whole, ends = b["buffer"].numpy().tobytes(), b["sizes"].cumsum(0).tolist()
            cut = [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]
            before = Before(
                b["place"],
                tuple(text.decode("utf-8", "surrogatepass") for text in cut),
                b["generator"],
                b["ended"],
                tuple(b["pending"]),
                b["any_text"],
                (b["counted"][0], b["counted"][1]),
                b["rows"],
            )
        return Position(state["epoch"], state["index"], before, state["rows"])


@dataclass(eq=False, repr=False)
class TokenBatches:
    """What `token_batches` returns. `n_tokens` counts the tokens in the batches of the last pass, BOS and EOS too."""

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
            next((None for _ in self._groups(self._documents(0), Before()) if self.counted[0] >= enough), None)
        if not self.counted[0]:
            raise ValueError(f"{self.name} holds no text, so bytes_per_token is not known. Pass a source with text.")
        return self.counted[1] / self.counted[0]

    def marked(self, epoch: int, at: Position | None = None) -> Iterator[tuple[Batch, Position]]:
        """One pass, behind a position in it; each batch with the position behind it."""
        at = Position(epoch) if at is None else at
        before = at.before or Before()
        return self._marked(epoch, at, before, self._documents(epoch, before))

    def _marked(
        self, epoch: int, at: Position, before: Before, documents: "_Documents"
    ) -> Iterator[tuple[Batch, Position]]:
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
            yield Batch(tokens, None, self.bytes_per_token), Position(epoch, index, begun, row)
            batch = after
        if not n_tokens:
            raise ValueError(
                f"{self.name} holds {self.counted[0]} tokens: too few for {needed} row{'s' * (needed > 1)} of "
                f"seq_len {self.seq_len}. Pass more text or a smaller seq_len{' or batch_size' * self.drop_last}."
            )

    def _documents(self, epoch: int, before: Before | None = None) -> "_Documents":
        before = before or Before()
        texts = iter(()) if before.ended else self.start(before.place)
        if self.shuffle is None:
            return _Documents(texts, before.place)
        seed, size = self.shuffle
        # with seed + epoch, epoch 1 of seed 0 would repeat epoch 0 of seed 1: seeds meant to be independent are not
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        if before.generator is not None:
            generator.set_state(before.generator)
        return _Documents(texts, before.place, size, generator, list(before.buffer), before.ended)

    def _groups(self, documents: "_Documents", before: Before) -> Iterator[tuple[list[list[int]], Before]]:
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

    def _encoded(
        self, groups: Iterator[tuple[Before, list[str]]]
    ) -> Iterator[tuple[Before, list[str], list[list[int]]]]:
        """The groups with their ids, in order; with a pool several of them are being tokenised at a time."""
        if self.pool is None:
            yield from ((begun, group, encode(self.tokenizer, group)) for begun, group in groups)
            return
        waiting: deque[tuple[Before, list[str], Future[list[list[int]]]]] = deque()
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

    def _rows(self, documents: "_Documents", before: Before) -> Iterator[tuple[list[int], Before, int]]:
        """Rows, each with the state before its group and its number in it, from 1."""
        head = [] if self.bos is None else [self.bos]
        width = self.seq_len - len(head)
        eos = self.tokenizer.eos_token_id
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

    def before(self) -> Before:
        state = None if self.generator is None else self.generator.get_state()
        return Before(self.place, tuple(self.buffer), state, self.ended)

    def _next(self) -> Iterator[str]:
        for text, place in self.texts:
            self.place = place
            yield text

    def _shuffled(self, generator: torch.Generator) -> Iterator[str]:
        if not self.ended:
            self.buffer += islice(self._next(), max(0, self.size - len(self.buffer)))
            for text in self._next():
                drawn = int(torch.randint(len(self.buffer), (), generator=generator))
                found, self.buffer[drawn] = self.buffer[drawn], text
                yield found
            order = torch.randperm(len(self.buffer), generator=generator).tolist()
            self.buffer, self.ended = [self.buffer[drawn] for drawn in reversed(order)], True
        while self.buffer:
            yield self.buffer.pop()


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of each text and nothing else."""
    # no special tokens, or BOS would come twice; not verbose, or it warns of documents longer than the context
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _pool(tokenizer: Any, workers: int) -> ProcessPoolExecutor:
    try:
        pickle.dumps(tokenizer)
    except Exception as error:
        raise ValueError(f"this tokenizer cannot be sent to worker processes ({error}): pass workers=0") from error
    # Spawned: a fork of a process with threads (torch's, ours) may hang.
    return ProcessPoolExecutor(workers, get_context("spawn"), _start_there, (tokenizer,))


_tokenizer: Any = None  # of a worker process


def _start_there(tokenizer: Any) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the fit's, which saves and then ends its workers

    def watch() -> None:  # workers of a fit that was killed would wait forever
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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

"""Several processes that fit as one: `accelerate launch -m tl_lenses fit ...`, or a script of your own under it.

Every process reads the same stream of text and runs the model on its own rows of it (row i of the stream belongs to
process `i mod world`). Sums over positions, of moments or gradients, are then added up over processes with one
all-reduce. The result is that of one process on the same text, to rounding. The first process writes files.
"""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tl_lenses.model import LensModel, forward, prepare
from tl_lenses.tokens import Batch

LAUNCHED = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # how many processes torchrun, accelerate and MPI started
CHUNK = 2**26  # elements in one message where a tensor has to be brought to the device that communicates

T = TypeVar("T")


class Lost(RuntimeError):
    """Another process of the fit has ended."""


@dataclass(frozen=True)
class Team:
    """The processes that fit together. This class is one process alone, and its methods do nothing; `Processes` are several."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def device(self) -> str | None:
        """The accelerator of this process; None for the one that a single process would take."""
        return None

    def rows_of(self, batch: Batch, first: int) -> tuple[Batch | None, Int[Tensor, " rows"]]:
        """This process' rows of a batch that begins with row `first` of the stream, and their numbers in the batch."""
        return batch, torch.arange(len(batch.tokens))

    def add_up(self, flat: Float[Tensor, " n"]) -> None:
        """Sum over processes, in place: one all-reduce of one buffer."""

    def gather(self, value: Any) -> list[Any]:
        """A small value of every process, by rank."""
        return [value]

    def from_first(self, tree: Any) -> Any:
        """The tree of the first process, in all of them."""
        return tree

    @contextmanager
    def together(self, sums: Float[Tensor, " n"] | None = None) -> Iterator[None]:
        """An error in the block of one process is raised in all of them, after the block; else they would wait for it.

        Args:
            sums: is added up over processes after the block, its last number counting the errors, in one all-reduce.
                Messages are exchanged only if there was an error.

        Raises:
            Exception: this process' own, or a ValueError with the message of the first other one.
            Lost: another process has ended.
        """
        yield

    def same_settings(self, settings: dict[str, Any]) -> None:
        """Refuse processes that were given different settings.

        Raises:
            ValueError: names the setting and both values.
        """

    def in_turn(self, items: Iterable[T], models: Sequence[LensModel | None]) -> Generator[T, None, None]:
        """The items. With a sharded model, an error of one process' source reaches all before any waits in a gather."""
        yield from items

    @contextmanager
    def in_step(self, models: Sequence[LensModel | None], batch: Batch, passes: int) -> Iterator[None]:
        """Run the sharded models at most `passes` times each inside the block.

        Missing passes are run afterwards, so that every process joins the same number of gathers. Does nothing for models
        that are not sharded.

        Args:
            batch: a batch of the text, for its width.
            passes: the most that any process makes in its block, the same number in all of them.

        Raises:
            Exception: an error in the block of any process, in all of them.
            Lost: another process has ended, or this one has failed in the middle of a pass, where the others wait for it.
        """
        yield


@dataclass(frozen=True)
class Processes(Team):
    """Several processes: `rank` of `world`, over torch.distributed."""

    @property
    def device(self) -> str | None:
        return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else None

    def rows_of(self, batch: Batch, first: int) -> tuple[Batch | None, Int[Tensor, " rows"]]:
        index = torch.tensor(range((self.rank - first) % self.world, len(batch.tokens), self.world), dtype=torch.long)
        if not len(index):
            return None, index
        return batch.take(index.to(batch.tokens.device)), index

    def add_up(self, flat: Float[Tensor, " n"]) -> None:
        self._collective(lambda part: dist.all_reduce(part), flat)

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world
        self._guarded(lambda: dist.all_gather_object(values, value))
        return values

    def from_first(self, tree: Any) -> Any:
        own = iter([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)])
        shapes = [tree_map_only(Tensor, lambda leaf: leaf.new_empty(leaf.shape, device="meta"), tree)]
        self._guarded(lambda: dist.broadcast_object_list(shapes))

        def received(shape: Tensor) -> Tensor:
            tensor = next(own).cpu().contiguous() if self.first else torch.empty_like(shape, device="cpu")
            if tensor.numel():  # as bytes, since not every backend can send every type
                self._collective(lambda part: dist.broadcast(part, 0), tensor.view(-1).view(torch.uint8))
            return tensor

        return tree_map_only(Tensor, received, shapes[0])

    @contextmanager
    def together(self, sums: Float[Tensor, " n"] | None = None) -> Iterator[None]:
        error: Exception | None = None
        try:
            yield
        except Lost:
            raise
        except Exception as raised:
            error = raised
        if sums is not None:
            sums[-1] += error is not None
            self.add_up(sums)
        if sums is None or sums[-1]:
            self._agree(error)

    def same_settings(self, settings: dict[str, Any]) -> None:
        for rank, other in enumerate(self.gather(settings)):
            for key, value in settings.items():
                if other.get(key) != value and repr(other.get(key)) != repr(value):
                    raise ValueError(
                        f"process {rank} was started with {key}={other.get(key)!r}, process {self.rank} with {value!r}: "
                        "start all processes with the same settings"
                    )

    def in_turn(self, items: Iterable[T], models: Sequence[LensModel | None]) -> Generator[T, None, None]:
        if not any(model is not None and is_sharded(model) for model in models):
            yield from items
            return
        source = iter(items)
        try:
            while True:
                item = None
                with self.together():
                    item = next(source, None)
                if item is None:
                    return
                yield item
        finally:
            getattr(source, "close", lambda: None)()

    @contextmanager
    def in_step(self, models: Sequence[LensModel | None], batch: Batch, passes: int) -> Iterator[None]:
        sharded: list[Any] = [model for model in models if model is not None and is_sharded(model)]
        if not sharded:
            yield
            return
        counts = _Passes(sharded)
        error: Exception | None = None
        try:
            try:
                yield
            except Exception as raised:
                error = raised
            if counts.begun == counts.done:
                try:
                    counts.make_up(passes, max(1, batch.tokens.shape[1]))  # hooks on the model may want its positions
                except Exception as raised:
                    error = raised
            if counts.begun != counts.done:
                raise Lost(
                    f"process {self.rank} of {self.world} failed in the middle of a pass of the sharded model, in which the others wait for it, "
                    f"or lost them there: {str(error).splitlines()[0][:200]}"
                ) from error
        finally:
            counts.remove()
        self._agree(error)

    def _agree(self, error: BaseException | None) -> None:
        messages = self.gather(None if error is None else f"{error}")
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise ValueError(f"{message} (in process {rank} of {self.world})")

    def _collective(self, run: Callable[[Tensor], object], flat: Tensor) -> None:
        if dist.get_backend() != "nccl" or flat.is_cuda:
            self._guarded(lambda: run(flat))
            return
        for part in flat.split(CHUNK):
            there = part.cuda()
            self._guarded(lambda there=there: run(there))
            part.copy_(there)

    def _guarded(self, run: Callable[..., object]) -> None:
        try:
            run()
        except RuntimeError as error:  # gloo and NCCL speak of sockets
            raise Lost(
                f"process {self.rank} of {self.world} lost the others: one of them has ended or cannot be reached "
                f"({str(error).splitlines()[0][:120]})"
            ) from error


class _Passes:
    """Counts the forward passes that sharded models begin and finish."""

    def __init__(self, models: list[Any]):
        self.models, self.begun, self.done = models, [0] * len(models), [0] * len(models)

        def counter(counts: list[int], i: int) -> Callable[..., None]:
            def count(*args: object) -> None:
                counts[i] += 1

            return count

        self.handles = [m.blocks[0].register_forward_pre_hook(counter(self.begun, i)) for i, m in enumerate(models)]
        self.handles += [m.blocks[-1].register_forward_hook(counter(self.done, i)) for i, m in enumerate(models)]

    def make_up(self, passes: int, width: int) -> None:
        """Run each model on a row of zeros until it has finished so many passes."""
        for i, model in enumerate(self.models):
            while self.done[i] < passes:
                with torch.no_grad():
                    forward(model, prepare(model, torch.zeros(1, width, dtype=torch.long)), None)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def processes() -> Team:
    """The processes that were launched together, joined here where the script has not done so; `Team()` for one alone."""
    if not dist.is_available():
        return Team()
    launched = max(int(os.environ.get(name, "1")) for name in LAUNCHED)
    if not dist.is_initialized() and launched > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
        if not dist.is_initialized():
            raise RuntimeError(
                f"{launched} processes were launched and did not find each other: start them with accelerate launch or torchrun"
            )
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Team()
    return Processes(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Leave the group of processes, as torch requires before a process ends."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_sharded(model: LensModel) -> bool:
    """Whether `shard` was called on the model."""
    return any(is_spread(p) for p in model.parameters())  # type: ignore[attr-defined]


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, a class that is not imported where nobody uses it."""
    return hasattr(tensor, "full_tensor")

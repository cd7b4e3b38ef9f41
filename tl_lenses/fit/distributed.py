"""Several processes that fit as one: `accelerate launch -m tl_lenses fit ...`, or a script of your own under it.

Every process reads the same stream of text and runs the model on its own rows of it (row i of the stream belongs to
process `i mod world`); what is added up over positions, moments or gradients, is added up over processes with one
all-reduce. All of them so do what one process would on the same text, to rounding. The first one writes files.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses.data import Batch
from tl_lenses.moments import Moments

LAUNCHED = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # how many processes torchrun, accelerate and MPI started
CHUNK = 2**26  # elements in one message where a tensor has to be brought to the device that communicates


@dataclass(frozen=True)
class Processes:
    """This process among those that fit together: `rank` of `world`."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes files and speaks."""
        return self.rank == 0

    @property
    def device(self) -> str | None:
        """The accelerator of this process; None for whatever a single process would take."""
        if self.world == 1 or not torch.cuda.is_available():
            return None
        return f"cuda:{torch.cuda.current_device()}"


def processes() -> Processes:
    """Those that were launched together; joined here where the script has not done so.

    Raises:
        RuntimeError: they could not be joined: each would fit alone and overwrite the others' files.
    """
    if not dist.is_available():
        return Processes()
    launched = max(int(os.environ.get(name, "1")) for name in LAUNCHED)
    if not dist.is_initialized() and launched > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
        if not dist.is_initialized():
            raise RuntimeError(
                f"{launched} processes were launched and did not find each other: start them with accelerate launch or torchrun"
            )
    if not dist.is_initialized():
        return Processes()
    return Processes(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Out of the group, as torch wants it before a process ends."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def own_rows(batch: Batch, first: int, who: Processes) -> tuple[Batch | None, Int[Tensor, " rows"]]:
    """This process' rows of a batch that begins with row `first` of the stream, and their numbers in the batch."""
    mine = torch.tensor(range((who.rank - first) % who.world, len(batch.tokens), who.world), dtype=torch.long)
    if who.world == 1:
        return batch, mine
    if not len(mine):
        return None, mine
    mask = None if batch.attention_mask is None else batch.attention_mask[mine.to(batch.attention_mask.device)]
    return Batch(batch.tokens[mine.to(batch.tokens.device)], mask, batch.bytes_per_token), mine


def add_up(flat: Float[Tensor, " n"], who: Processes) -> None:
    """Sum over processes, in place: one all-reduce of one buffer."""
    if who.world > 1:
        _collective(lambda part: dist.all_reduce(part), flat, who)


def merged(parts: Sequence[tuple[Moments, ...]], who: Processes) -> list[tuple[Moments, ...]]:
    """The moments of all processes' rows, for several sets of them; exact to rounding in float64.

    `n = sum n_i`, `mean = sum n_i mean_i / n`, and around that mean `xx = sum xx_i + n_i (mean_i - mean)(mean_i - mean)^T`.
    """
    if who.world == 1:
        return list(parts)
    # A process whose rows all went elsewhere has none of a set and does not know its shapes.
    shapes = gathered([[(m.mean_x.shape, m.yx.shape) for m in part] for part in parts], who)
    found = []
    for i, part in enumerate(parts):
        known = next((s[i] for s in shapes if s[i]), [])
        found.append(
            tuple(_merged(part[g] if part else None, known[g][0], known[g][1], who) for g in range(len(known)))
        )
    return found


def _merged(m: Moments | None, shape_x: torch.Size, shape_yx: torch.Size, who: Processes) -> Moments:
    if m is None:
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64)
        pair = shape_yx[:2]
        m = Moments(0, zeros(*shape_x), zeros(*pair), zeros(*shape_x, shape_x[-1]), zeros(*shape_yx), zeros(*pair))
    sums = torch.cat([m.mean_x.new_tensor([m.n]), m.n * m.mean_x.flatten(), m.n * m.mean_y.flatten()])
    add_up(sums, who)
    n = round(float(sums[0]))
    mean_x, mean_y = (sums[1:] / n).split([m.mean_x.numel(), m.mean_y.numel()])
    mean_x, mean_y = mean_x.view_as(m.mean_x), mean_y.view_as(m.mean_y)
    dx, dy = m.mean_x - mean_x, m.mean_y - mean_y
    flat = torch.cat([
        (m.xx + m.n * dx[:, :, None] * dx[:, None, :]).flatten(),
        (m.yx + m.n * dy[:, :, None] * dx[:, None, :]).flatten(),
        (m.yy + m.n * dy**2).flatten(),
    ])  # fmt: skip
    add_up(flat, who)
    xx, yx, yy = flat.split([m.xx.numel(), m.yx.numel(), m.yy.numel()])
    return Moments(n, mean_x, mean_y, xx.view_as(m.xx), yx.view_as(m.yx), yy.view_as(m.yy))


def gathered(value: Any, who: Processes) -> list[Any]:
    """A small value of every process, by rank."""
    if who.world == 1:
        return [value]
    values: list[Any] = [None] * who.world
    _guarded(lambda: dist.all_gather_object(values, value), who)
    return values


def agree(error: BaseException | None, who: Processes) -> None:
    """Raise in every process what one of them found: else the others would wait for it.

    Raises:
        Exception: this process' own, or a ValueError with what the first other one says.
    """
    found = gathered(None if error is None else f"{error}", who)
    if error is not None:
        raise error
    for rank, message in enumerate(found):
        if message is not None:
            raise ValueError(f"{message} (in process {rank} of {who.world})")


def same_settings(settings: dict[str, Any], who: Processes) -> None:
    """Refuse processes that were told different things.

    Raises:
        ValueError: names the setting and both values.
    """
    for rank, other in enumerate(gathered(settings, who)):
        for key, value in settings.items():
            if other.get(key) != value and repr(other.get(key)) != repr(value):  # NaN is not NaN
                raise ValueError(
                    f"process {rank} was started with {key}={other.get(key)!r}, process {who.rank} with {value!r}: "
                    "start all of them with the same settings"
                )


def from_first(tree: Any, who: Processes) -> Any:
    """What the first process read from a file, in all of them: only it needs to see the disk."""
    if who.world == 1:
        return tree
    tensors: list[Tensor] = []

    def strip(node: Any) -> Any:
        if isinstance(node, Tensor):
            tensors.append(node)
            return ("tensor", node.shape, node.dtype)
        if isinstance(node, dict):
            return ("dict", {key: strip(value) for key, value in node.items()})
        return ("list", [strip(value) for value in node]) if isinstance(node, (list, tuple)) else ("value", node)

    sent = [strip(tree) if who.first else None]
    _guarded(lambda: dist.broadcast_object_list(sent), who)

    def grow(node: Any) -> Any:
        kind, content, *dtype = node
        if kind == "tensor":
            tensor = tensors.pop(0).cpu().contiguous() if who.first else torch.empty(content, dtype=dtype[0])
            # bytes, since not every type can be sent by every backend
            if tensor.numel():
                _collective(lambda part: dist.broadcast(part, 0), tensor.view(-1).view(torch.uint8), who)
            return tensor
        if kind == "dict":
            return {key: grow(value) for key, value in content.items()}
        return [grow(value) for value in content] if kind == "list" else content

    return grow(sent[0])


def _collective(run: Any, flat: Tensor, who: Processes) -> None:
    if dist.get_backend() != "nccl" or flat.is_cuda:
        _guarded(lambda: run(flat), who)
        return
    for part in flat.split(CHUNK):
        there = part.cuda()
        _guarded(lambda there=there: run(there), who)
        part.copy_(there)


def _guarded(run: Any, who: Processes) -> None:
    try:
        run()
    except RuntimeError as error:  # gloo and NCCL speak of sockets
        raise Lost(
            f"process {who.rank} of {who.world} lost the others: one of them has ended or cannot be reached "
            f"({str(error).splitlines()[0][:120]})"
        ) from error


class Lost(RuntimeError):
    """Another process of the fit has ended."""

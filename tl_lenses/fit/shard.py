"""A frozen model too large for one device, spread over the processes that fit together (FSDP2).

Each process holds its share of every block's parameters and gathers a block's while that block runs. Embedding, final norm and
unembedding, which a lens reads at every layer, stay whole. A gather is a collective: a process that has no row left to run,
or has met an error, makes passes over one row until all have made as many.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from tl_lenses.fit.distributed import Lost, Processes, agree, processes
from tl_lenses.model import LensModel, check_model, forward, name_of, prepare


def shard(model: LensModel) -> None:
    """Spread the parameters of the model's blocks over the processes, in place. Every process calls it, with the same model.

    From then on every process has to run the model whenever one does; the fitters see to that. Nothing is trained: parameters no
    longer ask for gradients.

    Raises:
        ValueError: a single process, or a model that is sharded already.

    Example:
        >>> shard(model)                                    # doctest: +SKIP
        >>> lens = tll.fit_tuned(model, tokens)             # doctest: +SKIP

    Source: `torch.distributed.fsdp.fully_shard`; Zhao et al. 2023 (PyTorch FSDP).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    check_model(model, what="a sharded fit")
    who = processes()
    if who.world == 1:
        raise ValueError(
            "a model is sharded over several processes, and there is one: start them with accelerate launch"
        )
    if is_sharded(model):
        raise ValueError(f"{name_of(model)!r} is sharded already")
    kind = "cuda" if who.device else "cpu"
    mesh = init_device_mesh(kind, (who.world,))
    module: Any = model
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.contiguous()  # bridges split GPT-2's joint projection into views
    for block in module.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    for tensor in (*module.parameters(), *module.buffers()):  # the rest, whole
        if not _spread(tensor):
            tensor.data = tensor.data.to(who.device or "cpu")


def is_sharded(model: LensModel) -> bool:
    """Whether `shard` was called on the model."""
    return any(_spread(p) for p in model.parameters())  # type: ignore[attr-defined]


def _spread(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # DTensor, which is not imported where nobody has


@contextmanager
def in_step(models: Sequence[LensModel | None], passes: int, who: Processes) -> Iterator[None]:
    """In the block this process may run each model up to `passes` times; what it leaves out it makes up for behind it.

    Does nothing for models that are not sharded.

    Args:
        passes: the most that any process makes in its block, the same in all of them.

    Raises:
        Exception: what any of the processes met in its block, in all of them.
        Lost: another process has ended.
    """
    sharded = [model for model in models if model is not None and is_sharded(model)]
    if not sharded:
        yield
        return
    made = [0] * len(sharded)

    def counter(i: int) -> Callable[..., None]:
        def count(*args: object) -> None:
            made[i] += 1

        return count

    handles = [model.blocks[0].register_forward_pre_hook(counter(i)) for i, model in enumerate(sharded)]  # type: ignore[attr-defined]
    error: Exception | None = None
    try:
        try:
            yield
        except Exception as wrong:
            if _is_lost(wrong):
                raise Lost(
                    f"process {who.rank} of {who.world} lost the others ({str(wrong).splitlines()[0][:120]})"
                ) from wrong
            error = wrong
        for i, model in enumerate(sharded):
            while made[i] < passes:
                with torch.no_grad():
                    forward(model, prepare(model, torch.zeros(1, 1, dtype=torch.long)), None)
    finally:
        for handle in handles:
            handle.remove()
    agree(error, who)


def _is_lost(error: Exception) -> bool:
    """Whether a gather failed for want of the others: gloo and NCCL speak of sockets."""
    if isinstance(error, getattr(dist, "DistBackendError", Lost)):
        return True
    return isinstance(error, RuntimeError) and any(
        word in str(error).lower() for word in ("gloo", "nccl", "connection")
    )

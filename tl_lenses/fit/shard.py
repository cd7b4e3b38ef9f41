"""A frozen model too large for one device, spread over the processes that fit together (FSDP2).

Each process holds its share of every block's parameters and gathers a block's while that block runs. Embedding, final norm and
unembedding, which a lens reads at every layer, stay whole. A gather is a collective: a process that has no row left to run,
or has met an error between two passes, makes passes over a row of zeros until all have made as many.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from tl_lenses.data import Batch
from tl_lenses.fit.distributed import Lost, Processes, agree, processes
from tl_lenses.model import LensModel, check_model, forward, name_of, prepare

T = TypeVar("T")


def shard(model: LensModel, device: str | None = None) -> None:
    """Spread the parameters of the model's blocks over the processes, in place. Every process calls it, with the same model.

    From then on every process has to run the model whenever one does; the fitters see to that. Nothing is trained: parameters no
    longer ask for gradients.

    Args:
        device: "cpu" or "cuda"; what the processes have if None.

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
    place = who.device if who.device and device in (None, "cuda") else "cpu"
    mesh = init_device_mesh(place.split(":")[0], (who.world,))
    module: Any = model
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.contiguous()  # bridges split GPT-2's joint projection into views
    for block in module.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    for tensor in (*module.parameters(), *module.buffers()):  # the rest, whole
        if not _spread(tensor):
            tensor.data = tensor.data.to(place)
    module.cfg.device = place  # HookedTransformer moves tokens and residuals there


def is_sharded(model: LensModel) -> bool:
    """Whether `shard` was called on the model."""
    return any(_spread(p) for p in model.parameters())  # type: ignore[attr-defined]


def sizes(model: LensModel) -> tuple[int, int]:
    """Parameters of the model, tied ones once, and how many of them this process holds."""
    module: Any = model
    # A share of a sharded parameter has no address of its own.
    whole = {id(p) if _spread(p) else p.data_ptr(): p.numel() for p in module.parameters()}
    here = (p.to_local() if _spread(p) else p for p in module.parameters())
    return sum(whole.values()), sum({p.data_ptr(): p.numel() for p in here}.values())


def _spread(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # DTensor, which is not imported where nobody has


def in_turn(items: Iterable[T], models: Sequence[LensModel | None], who: Processes) -> Generator[T, None, None]:
    """The items; with a sharded model, an error of one process' source reaches all before anybody waits in a gather."""
    shared = any(model is not None and is_sharded(model) for model in models)
    source = iter(items)
    try:
        while True:
            item, error = None, None
            try:
                item = next(source, None)
            except Exception as wrong:
                error = wrong
            if shared:
                agree(error, who)
            elif error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        getattr(source, "close", lambda: None)()


@contextmanager
def in_step(models: Sequence[LensModel | None], batch: Batch, passes: int, who: Processes) -> Iterator[None]:
    """In the block this process may run each model up to `passes` times; what it leaves out it makes up for behind it.

    Does nothing for models that are not sharded.

    Args:
        batch: one of the text, for its width.
        passes: the most that any process makes in its block, the same in all of them.

    Raises:
        Exception: what any of the processes met in its block, in all of them.
        Lost: another process has ended, or this one has failed in the middle of a pass, where the others wait for it.
    """
    sharded: list[Any] = [model for model in models if model is not None and is_sharded(model)]
    if not sharded:
        yield
        return
    begun, done = [0] * len(sharded), [0] * len(sharded)

    def counter(counts: list[int], i: int) -> Callable[..., None]:
        def count(*args: object) -> None:
            counts[i] += 1

        return count

    handles = [model.blocks[0].register_forward_pre_hook(counter(begun, i)) for i, model in enumerate(sharded)]
    handles += [model.blocks[-1].register_forward_hook(counter(done, i)) for i, model in enumerate(sharded)]
    error: Exception | None = None
    try:
        try:
            yield
        except Exception as wrong:
            error = wrong
        if begun == done:
            try:
                width = max(1, batch.tokens.shape[1])  # hooks on the model may want its positions
                for i, model in enumerate(sharded):
                    while done[i] < passes:
                        with torch.no_grad():
                            forward(model, prepare(model, torch.zeros(1, width, dtype=torch.long)), None)
            except Exception as wrong:
                error = wrong
        if begun != done:
            raise Lost(
                f"process {who.rank} of {who.world} failed in the middle of a pass of the sharded model, in which the others wait for it, "
                f"or lost them there: {str(error).splitlines()[0][:200]}"
            ) from error
    finally:
        for handle in handles:
            handle.remove()
    agree(error, who)

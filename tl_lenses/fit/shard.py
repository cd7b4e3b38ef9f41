"""A frozen model too large for one device, spread over the processes that fit together (FSDP2).

Each process holds its share of every block's parameters and gathers a block's while that block runs. Embedding, final norm and
unembedding, which a lens reads at every layer, stay whole. A gather is a collective: a process that has no row left to run,
or has met an error between two passes, makes passes over a row of zeros until all have made as many.
"""

from typing import Any

from tl_lenses.fit.team import is_sharded, is_spread, processes
from tl_lenses.model import LensModel, check_model, name_of

__all__ = ["is_sharded", "shard", "sizes"]


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
    team = processes()
    if team.world == 1:
        raise ValueError("a model is sharded over several processes, and there is one: start them with accelerate launch")
    if is_sharded(model):
        raise ValueError(f"{name_of(model)!r} is sharded already")
    place = team.device if team.device and device in (None, "cuda") else "cpu"
    mesh = init_device_mesh(place.split(":")[0], (team.world,))
    module: Any = model
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.contiguous()  # bridges split GPT-2's joint projection into views
    for block in module.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    for tensor in (*module.parameters(), *module.buffers()):  # the rest, whole
        if not is_spread(tensor):
            tensor.data = tensor.data.to(place)
    module.cfg.device = place  # HookedTransformer moves tokens and residuals there


def sizes(model: LensModel) -> tuple[int, int]:
    """Parameters of the model, tied ones once, and how many of them this process holds."""
    module: Any = model
    # A share of a sharded parameter has no address of its own.
    whole = {id(p) if is_spread(p) else p.data_ptr(): p.numel() for p in module.parameters()}
    here = (p.to_local() if is_spread(p) else p for p in module.parameters())
    return sum(whole.values()), sum({p.data_ptr(): p.numel() for p in here}.values())

"""What a norm does, found by what it does rather than by its class: its gain, and whether it removes the mean."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


@torch.no_grad()
def gain(norm: nn.Module | None, d: int, like: Tensor) -> tuple[Float[Tensor, " d"], bool]:
    """The gain of a norm and whether it removes the mean, found by what it does to vectors of +1 and -1; none is (1, False)."""
    if norm is None:
        return torch.ones(d).to(like), False
    signs = torch.ones(d).to(like)
    signs[1::2] = -1
    if d % 2:
        signs[-1] = 0
    call = lambda x: norm(x[None, None])[0, 0]
    found = torch.ones(d).to(like)
    for shift in (0, 1):  # the zero of an odd width is somewhere else the second time
        x = signs.roll(shift)
        y = (call(x) - call(torch.zeros_like(x))) * x.square().mean().sqrt()
        found = torch.where(x != 0, y * x, found)
    return found, bool(torch.allclose(call(signs), call(signs + 1), rtol=1e-3, atol=1e-3))

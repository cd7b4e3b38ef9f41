"""Optimisers of the tuned lens: which, at what rates, with what decay. Each layer has one of its own, with a rate of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_lenses.fit.whiten import whitened_step
from tl_lenses.translators import base

# Learning rates at the first step; they fall linearly to zero. SGD: the paper's rate 1 times (1 - momentum), since torch's momentum
# multiplies by its inverse. Muon: over the root of the width, below.
LR = {"muon": 1.0, "sgd": 0.1, "adam": 1e-3}
MOMENTUM = {"muon": 0.7, "sgd": 0.9, "adam": 0.9}
WEIGHT_DECAY = {"muon": 0.01, "sgd": 1e-3, "adam": 0.0}
# A layer's rate follows its KL at the first step: layers near the end are nearly right and want small steps (docs/log.md).
LR_POWER = {"muon": 0.75, "sgd": 0.0, "adam": 0.0}


def make_optimizers(
    name: str, matrix: nn.Parameter | None, bias: nn.Parameter, lr: float, weight_decay: float, momentum: float
) -> list[torch.optim.Optimizer]:
    """Of one layer: Muon for the matrix with AdamW for the bias, or Nesterov SGD or AdamW for both."""
    groups = [{"params": [p], "scale": 1.0} for p in (matrix, bias) if p is not None]
    if name == "sgd":
        return [torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay)]
    if name == "adam" or matrix is None:
        return [torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay)]
    return [
        torch.optim.Muon(
            groups[:1],
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=True,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(groups[1:], lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay),
    ]


def default_lr(name: str, d: int) -> float:
    """The rate that is best where it was measured: Muon's falls with the root of the width, `1 / sqrt(d)`.

    A step of Muon has singular values of `0.2 sqrt(d) lr` ("match_rms_adamw"), so this is a fifth of the identity's at any width, as
    Yang, Simon & Bernstein 2023 (A Spectral Condition for Feature Learning, section 3) ask of a square matrix. Measured at 64, 128 and
    256 (docs/log.md); at 8,192 it is 0.011, and the tuned-lens authors have 0.01.
    """
    return LR[name] / d**0.5 if name == "muon" else LR[name]


def map_sizes(delta: Float[Tensor, "rows d_out d_in"]) -> list[float]:
    """What a map's singular values are like: their geometric mean, `|det W| ** (1 / d)`, or 1 where that is smaller.

    The final norm does not see the size of a map, but a step of fixed size does: embeddings are small beside what they are mapped to, and a
    regression's map of layer 0 is tens of times the identity. The root mean square is not it: a few large values make it.
    """
    sizes = []
    for d in delta:
        w = d.float() + base(*d.shape, device=d.device)
        w = w if w.is_cuda else w.cpu()  # not every accelerator has a QR
        tall = w if w.shape[0] >= w.shape[1] else w.mT
        r = torch.linalg.qr(tall, mode="r").R  # |det W| is the product of its diagonal
        sizes.append(max(1.0, r.diagonal().abs().log().mean().exp().item()))
    return sizes


def rate_scales(losses: Sequence[float], power: float, sizes: Sequence[float]) -> list[float]:
    """What each layer's rate is multiplied by: `size * min(loss, 1 nat) ** power`, of its map and its loss at the first step."""
    return [
        size * (max(min(loss, 1.0), 0.0) ** power if power else 1.0) for loss, size in zip(losses, sizes, strict=True)
    ]


def set_scales(
    optimizers: Sequence[Sequence[torch.optim.Optimizer]],
    scales: Sequence[float],
    sizes: Sequence[float],
    weight_decay: float,
) -> None:
    """Keep a layer's factor and decay in its groups, and with them in the optimiser's state.

    Decay takes away a share of the map, so a rate that was made larger for the map's size must not make it larger too.
    """
    for layer, scale, size in zip(optimizers, scales, sizes, strict=True):
        for group in (group for opt in layer for group in opt.param_groups):
            group.update(scale=scale, weight_decay=weight_decay / size)


def optimizers_of(
    name: str, leaves: list[nn.Parameter], biases: list[nn.Parameter], settings: dict[str, Any]
) -> list[list[torch.optim.Optimizer]]:
    """Of every layer, so that the state of one at a time need be on the device."""
    rates = settings["lr"], settings["weight_decay"], settings["momentum"]
    return [
        make_optimizers(name, None if settings["bias_only"] else leaf, bias, *rates)
        for leaf, bias in zip(leaves, biases, strict=True)
    ]


def optimizer_step(
    optimizers: Sequence[Sequence[torch.optim.Optimizer]],
    lr: float,
    device: torch.device | None = None,
    white: Float[Tensor, "rows d_in d_in"] | None = None,
) -> None:
    """One step of all.

    Args:
        lr: of this step, before each layer's factor.
        device: each layer's state comes here for its step and goes back to the CPU.
        white: P of the coordinates that the matrices' gradients are in (`fit.whiten`).
    """
    for row, layer in enumerate(optimizers):
        for group in (group for opt in layer for group in opt.param_groups):
            group["lr"] = lr * group["scale"]
        if device is not None:
            for opt in layer:
                move_state(opt, device)
        if white is not None:
            whitened_step(layer[0], white[row])
        for opt in layer if white is None else layer[1:]:
            opt.step()
        if device is not None:
            for opt in layer:
                move_state(opt, "cpu")


def move_state(opt: torch.optim.Optimizer, device: str | torch.device) -> None:
    """The numbers that an optimiser keeps per parameter, to a device."""
    for state in opt.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim:  # AdamW counts its steps on the CPU
                state[key] = value.to(device)

"""Optimisers of the tuned lens: which, at what rates, with what decay. Each layer is a parameter group with a rate of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

# Learning rates at the first step; they fall linearly to zero. SGD: the paper's rate 1 times (1 - momentum), since torch's momentum
# multiplies by its inverse. Muon: docs/log.md, "rates of the tuned lens".
LR = {"muon": 0.04, "sgd": 0.1, "adam": 1e-3}
WEIGHT_DECAY = {"muon": 0.01, "sgd": 1e-3, "adam": 0.0}
# A layer's rate follows its KL at the first step: layers near the end are nearly right and want small steps (docs/log.md).
LR_POWER = {"muon": 0.75, "sgd": 0.0, "adam": 0.0}


def make_optimizers(
    name: str, matrices: list[nn.Parameter], biases: list[nn.Parameter], lr: float, weight_decay: float, momentum: float
) -> list[torch.optim.Optimizer]:
    """Muon for matrices with AdamW for biases, Nesterov SGD, or AdamW; one group per layer, in order."""
    one = [*([matrices] if matrices else []), biases]
    together = [{"params": list(layer), "scale": 1.0} for layer in zip(*one, strict=True)]
    if name == "sgd":
        return [torch.optim.SGD(together, lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay)]
    if name == "adam" or not matrices:
        return [torch.optim.AdamW(together, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay)]
    groups: list[list[dict[str, Any]]] = [[{"params": [p], "scale": 1.0} for p in part] for part in (matrices, biases)]
    return [
        torch.optim.Muon(
            groups[0],
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=True,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(groups[1], lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay),
    ]


def rate_scales(losses: Sequence[float], power: float) -> list[float]:
    """What each layer's rate is multiplied by: `min(loss, 1 nat) ** power`, from its loss at the first step."""
    return [max(min(loss, 1.0), 0.0) ** power if power else 1.0 for loss in losses]


def set_scales(optimizers: Sequence[torch.optim.Optimizer], scales: Sequence[float]) -> None:
    """Keep a layer's factor in its group, and with it in the optimiser's state."""
    if len(optimizers[0].param_groups) == len(scales):
        pairs = [pair for opt in optimizers for pair in zip(opt.param_groups, scales, strict=True)]
    else:  # one layer per optimiser, or per pair of them
        each = len(optimizers) // len(scales)
        pairs = [(opt.param_groups[0], scales[i // each]) for i, opt in enumerate(optimizers)]
    for group, scale in pairs:
        group["scale"] = scale


def optimizers_of(
    name: str, leaves: list[nn.Parameter], biases: list[nn.Parameter], settings: dict[str, Any], offload: bool
) -> list[torch.optim.Optimizer]:
    """Of all layers together; with `offload` layer by layer, so that the state of one at a time is on the device."""
    rates = settings["lr"], settings["weight_decay"], settings["momentum"]
    parts = [([leaf], [bias]) for leaf, bias in zip(leaves, biases, strict=True)] if offload else [(leaves, biases)]
    return [
        opt
        for matrices, vectors in parts
        for opt in make_optimizers(name, [] if settings["bias_only"] else matrices, vectors, *rates)
    ]


def optimizer_step(optimizers: list[torch.optim.Optimizer], lr: float, device: torch.device | None) -> None:
    """One step of all; with a device, each optimiser's state comes there for its step and goes back to the CPU."""
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = lr * group["scale"]
        if device is not None:
            move_state(opt, device)
        opt.step()
        if device is not None:
            move_state(opt, "cpu")


def move_state(opt: torch.optim.Optimizer, device: str | torch.device) -> None:
    """The numbers that an optimiser keeps per parameter, to a device."""
    for state in opt.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim:  # AdamW counts its steps on the CPU
                state[key] = value.to(device)

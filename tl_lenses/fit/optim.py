"""Optimisers of the tuned lens: which, at what rates, with what decay. Each layer is a parameter group with a rate of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

# Learning rates at the first step; they fall linearly to zero. SGD: the paper's rate 1 times (1 - momentum), since torch's momentum
# multiplies by its inverse. Muon: docs/log.md, "rates of the tuned lens".
LR = {"muon": 0.03, "sgd": 0.1, "adam": 1e-3}
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
    for opt in optimizers:
        for group, scale in zip(opt.param_groups, scales, strict=True):
            group["scale"] = scale


def set_rate(opt: torch.optim.Optimizer, lr: float) -> None:
    """The rate of every layer for the next step."""
    for group in opt.param_groups:
        group["lr"] = lr * group["scale"]

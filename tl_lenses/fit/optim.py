"""Optimisers of the tuned lens: which, at what rates, with what decay."""

from typing import Any

import torch
from torch import nn

# Learning rates at the first step; they fall linearly to zero. SGD: the paper's rate 1 times (1 - momentum), since
# torch's momentum
# multiplies by its inverse. Muon: benchmarks/fit_recipes.py.
LR = {"muon": 0.01, "sgd": 0.1, "adam": 1e-3}
WEIGHT_DECAY = {"muon": 0.01, "sgd": 1e-3, "adam": 0.0}


def make_optimizers(
    name: str, matrices: list[nn.Parameter], biases: list[nn.Parameter], lr: float, weight_decay: float, momentum: float
) -> list[torch.optim.Optimizer]:
    if name == "sgd":
        return [
            torch.optim.SGD(
                [*matrices, *biases], lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay
            )
        ]
    if name == "adam" or not matrices:
        return [torch.optim.AdamW([*matrices, *biases], lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay)]
    return [
        torch.optim.Muon(
            matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=True, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(biases, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay),
    ]


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
            group["lr"] = lr
        if device is not None:
            move_state(opt, device)
        opt.step()
        if device is not None:
            move_state(opt, "cpu")


def move_state(opt: torch.optim.Optimizer, device: str | torch.device) -> None:
    for state in opt.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim:  # AdamW counts its steps on the CPU
                state[key] = value.to(device)

"""Optimisers of the tuned lens: which, at what rates, with what decay."""

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

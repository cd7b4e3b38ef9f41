"""Optimisers of the tuned lens: which, at what rates, with what decay. Each layer has one of its own, with a rate of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_lenses.affine import base
from tl_lenses.divergence import has_bfloat16
from tl_lenses.fit.settings import Settings
from tl_lenses.fit.whiten import whitened_step

Optimizers = Sequence[Sequence[torch.optim.Optimizer]]  # of each layer


def optimizers_of(
    leaves: Sequence[nn.Parameter], biases: Sequence[nn.Parameter], settings: Settings
) -> list[list[torch.optim.Optimizer]]:
    """Separate optimisers for every layer, so that the state of one at a time need be on the device."""
    return [_of_layer(leaf, bias, settings) for leaf, bias in zip(leaves, biases, strict=True)]


def _of_layer(matrix: nn.Parameter, bias: nn.Parameter, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrix with AdamW for the bias, or Nesterov SGD or AdamW for both."""
    groups = [{"params": [p], "scale": 1.0} for p in (() if settings.bias_only else (matrix,)) + (bias,)]
    momentum = settings.momentum
    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    assert momentum is not None and None not in common.values()  # Settings.at_width fills them in
    if settings.optimizer == "sgd":
        return [torch.optim.SGD(groups, momentum=momentum, nesterov=momentum > 0, **common)]
    adam = lambda groups: torch.optim.AdamW(groups, betas=(momentum, 0.999), **common)
    if not settings.muon:
        return [adam(groups)]
    return [Muon(groups[:1], momentum=momentum, **common), adam(groups[1:])]


class Muon(torch.optim.Muon):
    """torch's, of one matrix, in steps as long as AdamW's. Where bf16 products would be emulated they are fp32 ones of the same bf16 numbers, rounded to bf16.

    Source: `torch.optim._muon` (torch 2.13) for the equations; docs/log.md of 2026-11-29 for what emulation costs.
    """

    def __init__(self, groups: Any, **options: Any) -> None:
        super().__init__(groups, nesterov=True, adjust_lr_fn="match_rms_adamw", **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Nesterov momentum, orthogonalised."""
        (group,) = self.param_groups
        (matrix,) = group["params"]
        if closure is not None or matrix.grad is None or has_bfloat16(matrix.device):
            return super().step(closure)
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        buffer = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
        step = _orthogonal(matrix.grad.lerp(buffer, group["momentum"]), group["ns_coefficients"], group["ns_steps"], group["eps"])
        length = group["lr"] * 0.2 * max(matrix.shape) ** 0.5
        matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-length)
        return None


def _orthogonal(
    x: Float[Tensor, "d_out d_in"], coefficients: Sequence[float], n_steps: int, eps: float
) -> Float[Tensor, "d_out d_in"]:
    """Newton-Schulz, `X <- a X + (b A + c A^2) X` with `A = X X^T`, every matrix rounded to bf16."""
    (a, b, c), tall = coefficients, x.shape[0] > x.shape[1]
    rounded = lambda x: x.bfloat16().float()
    x = x.bfloat16()
    x = x.div_(x.norm().clamp(min=eps)).float()
    x = x.mT if tall else x
    for _ in range(n_steps):
        gram = rounded(x @ x.mT)
        update = rounded(torch.addmm(gram, gram, gram, beta=b, alpha=c))
        x = rounded(torch.addmm(x, update, x, beta=a))
    return x.mT if tall else x


def map_sizes(delta: Float[Tensor, "rows d_out d_in"]) -> list[float]:
    """Geometric mean of the singular values of W, `|det W| ** (1 / d)`, at least 1.

    The final norm does not see the size of a map, but a step of fixed size does: embeddings are smaller than the states that they are
    mapped to, and a regression's map of layer 0 is tens of times the identity. We do not use the root mean square: a few large
    singular values dominate it.
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
    """The factor of each layer's rate: `size * min(loss, 1 nat) ** power`, from its map and its loss at the first step."""
    return [size * (max(min(loss, 1.0), 0.0) ** power if power else 1.0) for loss, size in zip(losses, sizes, strict=True)]


# Shares of the first step's length that are tried on fresh tokens, from the longest; each is half of the one before it.
LENGTHS = (1.0, 0.5, 0.25, 0.125)
# The rate after a first step of the best length, relative to it and at most the one that was tried: it falls to zero, so its mean is half.
AFTER = 2**0.5


# Positions of a step, per dimension, whose gradient's direction is good enough for the whole rate. A step of Muon is as long however noisy
# its direction is: with fewer positions the noise adds up over the steps and the gain does not.
ENOUGH = 1.75


def noise_share(n_positions: float, d_model: int) -> float:
    """The share of the rate that a step of so many positions takes: `min(1, n / (1.75 d_model))`."""
    return min(1.0, n_positions / (ENOUGH * d_model))


def best_lengths(before: Float[Tensor, " rows"], losses: Float[Tensor, "lengths rows"]) -> Float[Tensor, " rows"]:
    """For each row the longest of `LENGTHS` whose gain is nine tenths of the best one's, so that noise shortens nothing; the shortest if none gains."""
    gains = (before - losses).nan_to_num(-float("inf"), -float("inf"), -float("inf")).cpu()
    enough = (gains > 0) & (gains >= 0.9 * gains.amax(0))
    enough[-1] |= ~enough.any(0)
    return torch.tensor(LENGTHS)[enough.int().argmax(0)]


def set_scales(optimizers: Optimizers, scales: Sequence[float], sizes: Sequence[float], weight_decay: float) -> None:
    """Keep a layer's factor and decay in its groups, and with them in the optimiser's state.

    Decay takes away a share of the map, so a rate that was made larger for the map's size must not make it larger too.
    """
    for layer, scale, size in zip(optimizers, scales, sizes, strict=True):
        for group in (group for opt in layer for group in opt.param_groups):
            group.update(scale=scale, weight_decay=weight_decay / size)


def multiply_scales(optimizers: Optimizers, factors: Float[Tensor, " rows"]) -> None:
    """Multiply each layer's factor."""
    for layer, factor in zip(optimizers, factors.tolist(), strict=True):
        for group in (group for opt in layer for group in opt.param_groups):
            group["scale"] *= factor


def optimizer_step(
    optimizers: Optimizers,
    lr: float,
    device: torch.device | None = None,
    white: Float[Tensor, "rows d_in d_in"] | None = None,
) -> None:
    """One step of every layer, whose state is moved to a `device` for it and then back to the CPU.

    `white` is P, if the matrices' gradients are in whitened coordinates (`fit.whiten`).
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
    """Move the numbers that an optimiser keeps per parameter to a device."""
    for state in opt.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim:  # AdamW counts its steps on the CPU
                state[key] = value.to(device)

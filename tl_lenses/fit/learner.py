"""The translators of a tuned lens in training: maps, gradients and optimisers, without text, files or processes."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_lenses.fit.optim import map_sizes, move_state, optimizer_step, optimizers_of, rate_scales, set_scales
from tl_lenses.fit.sampled import on_sample
from tl_lenses.fit.settings import Settings
from tl_lenses.fit.step import Head, Pairs, clip_gradients, loss_and_gradient
from tl_lenses.fit.whiten import whiten


class Learner:
    """The translators in training: maps, gradients and optimisers, without text, files or processes.

    Attributes:
        delta, biases: D `[rows, d_out, d_in]` and b `[rows, d_out]`, fp32. The leaves of the optimisers are views of them.
        white: P of Muon's coordinates (`fit.whiten`), or None.
        samples: whether gradients are estimated on a sample of the vocabulary (`fit.sampled`).
        sums: gradients, losses and two counts in one buffer, so that processes need one all-reduce per step.
        grad_w, grad_b, losses, counts: views of `sums`; the counts are positions and errors.

    Example:
        >>> learner = Learner(torch.zeros(1, 4, 4), torch.zeros(1, 4), Settings(lr=0.1, optimizer="sgd"))
        >>> learner.grad_b.fill_(1.0), learner.update(0.1)[1]                # doctest: +SKIP
    """

    def __init__(self, delta: Tensor, biases: Tensor, settings: Settings, white: Tensor | None = None):
        self.delta, self.biases, self.white, self.settings = delta, biases, white, settings
        self.samples = False
        self.device, n_rows = delta.device, len(delta)
        # One 2-D leaf per layer, each a view of the stacked buffer: Muon orthogonalises matrix by matrix.
        self.leaves = [nn.Parameter(d) for d in delta]
        self.bias_leaves = [nn.Parameter(b) for b in biases]
        self.optimizers = optimizers_of(self.leaves, self.bias_leaves, settings)
        self.sums = torch.zeros(delta.numel() + biases.numel() + n_rows + 2, device=self.device)
        grad_w, grad_b, self.losses, self.counts = self.sums.split([delta.numel(), biases.numel(), n_rows, 2])
        self.grad_w, self.grad_b = grad_w.view_as(delta), grad_b.view_as(biases)

    def clear(self) -> None:
        """Set gradients, losses and counts to zero."""
        self.sums.zero_()

    def add(self, pairs: Pairs, head: Head, *, seed: int = 0, exact: bool = False) -> None:
        """Add the loss and gradient sums of these positions, and their number, to the buffers."""
        chunk_size = self.settings.chunk_size
        if len(pairs):
            scored = on_sample(pairs, head, seed, chunk_size) if self.samples else (pairs, head)
            self.losses += loss_and_gradient(
                scored[0], self.delta, self.biases, scored[1], self.grad_w, self.grad_b, chunk_size=chunk_size,
                subsample=self.settings.subsample, seed=seed, exact=exact,
            )  # fmt: skip
        self.counts[0] += len(pairs)

    def average(self) -> None:
        """Divide gradients and losses by the number of positions."""
        self.sums[:-2].div_(self.counts[0].item())

    def finite_gradients(self) -> Tensor:
        """For each row, whether its loss and gradient are finite."""
        return self.losses.isfinite() & finite(self.grad_w, self.grad_b)

    def finite_maps(self) -> Tensor:
        """For each row, whether its map is finite."""
        return finite(self.delta, self.biases)

    def prepare_gradients(self) -> None:
        """Turn the gradients to Muon's coordinates and clip them."""
        if self.white is not None:
            whiten(self.grad_w, self.white)
        if self.settings.clip is not None:
            clip_gradients(self.grad_w, self.grad_b, self.settings.clip, self.settings.joint_clip, self.settings.bias_only)

    def scale_rates(self) -> None:
        """Set each layer's rate from its map and its loss; called at the first step."""
        assert self.settings.lr_power is not None and self.settings.weight_decay is not None
        sizes = map_sizes(self.delta) if self.settings.muon else [1.0] * len(self.delta)
        scales = rate_scales(self.losses.tolist(), self.settings.lr_power, sizes)
        set_scales(self.optimizers, scales, sizes, self.settings.weight_decay)

    def hand_over(self) -> None:
        """Give the gradients to the optimisers' leaves."""
        for i, (leaf, bias) in enumerate(zip(self.leaves, self.bias_leaves, strict=True)):
            leaf.grad, bias.grad = self.grad_w[i], self.grad_b[i]

    def update(self, lr: float) -> None:
        """One step of all optimisers at this rate, before each layer's factor."""
        optimizer_step(self.optimizers, lr, self.device if self.settings.offload else None, self.white)

    @torch.no_grad()
    def on_the_way(self, origin: tuple[Tensor, Tensor], share: float) -> tuple[Tensor, Tensor]:
        """Maps at a share of the way from `origin` to the learner's."""
        delta, biases = origin
        return torch.lerp(delta, self.delta, share), torch.lerp(biases, self.biases, share)

    def move(self, origin: tuple[Tensor, Tensor], factor: float | Tensor) -> None:
        """Multiply the way from `origin` to the maps by a factor, or by one for each row."""
        of_row = torch.as_tensor(factor, device=self.device, dtype=self.delta.dtype).expand(len(self.delta))
        for maps, start in zip((self.delta, self.biases), origin, strict=True):
            maps.sub_(start).mul_(of_row.view(-1, *[1] * (maps.ndim - 1))).add_(start)

    def state(self) -> dict[str, Any]:
        """For `files.save_state`."""
        optimizers = [[opt.state_dict() for opt in layer] for layer in self.optimizers]
        return {"delta": self.delta, "biases": self.biases, "optimizers": optimizers, "white": self.white}

    def load_optimizers(self, state: list[list[dict[str, Any]]]) -> None:
        """Continue from the optimisers of a state."""
        for layer, saved_layer in zip(self.optimizers, state, strict=True):
            for opt, saved in zip(layer, saved_layer, strict=True):
                opt.load_state_dict(saved)
                if self.settings.offload:
                    move_state(opt, "cpu")


def finite(weights: Float[Tensor, "rows d_out d_in"], biases: Float[Tensor, "rows d_out"]) -> Tensor:
    """For each row, whether all its numbers are finite. A sum is not finite where a summand is not, and needs no memory."""
    return (weights.flatten(1).sum(1) + biases.sum(1)).isfinite()

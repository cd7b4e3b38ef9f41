"""When to stop: the loss on held-out text, watched along a fit.

With a fixed number of steps the rate falls linearly from the first to the last. With `steps="auto"` nobody knows the last one: the rate
stays until the held-out loss does, then falls to zero over a quarter as many steps as there were, and that is the end.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.checks import finite_number
from tl_lenses.text.batches import Text

COOLING = 4  # the rate falls over 1/COOLING of the steps before it
GAIN = 2e-3  # a fall of the mean loss by less than this share is none
MOST = 20_000  # steps of "auto" at most


@dataclass
class Watch:
    """The held-out loss of every layer, the best translators so far, and what follows from it."""

    steps: int | None  # steps of the fit, None for "auto"
    every: int = 25  # steps between two looks
    patience: int = 4  # looks without a gain before it ends ("auto": before the rate falls)
    cooling_from: int | None = None  # the step at which the rate began to fall, "auto" only
    looks: list[dict[str, Any]] = field(default_factory=list)  # `{"step", "loss": [nats per layer]}` of every look
    # the lowest loss of each layer, nats; its translators are in `delta` and `biases`, on the CPU
    best: Tensor | None = None
    delta: Tensor | None = None
    biases: Tensor | None = None
    stopped: bool = False

    def rate(self, step: int) -> float:
        """Share of the learning rate at a step."""
        if self.steps is not None:
            return 1 - step / self.steps
        if self.cooling_from is None:
            return 1.0
        return max(0.0, 1 - (step - self.cooling_from) / self._cooling())

    def ended(self, step: int) -> bool:
        """Whether the fit ends after so many steps."""
        if self.steps is not None:
            return self.stopped or step >= self.steps
        cooled = self.cooling_from is not None and step >= self.cooling_from + self._cooling()
        return cooled or step >= MOST

    @property
    def last(self) -> int | None:
        """The step at which it ends at the latest, as far as that is known."""
        if self.steps is not None or self.cooling_from is None:
            return self.steps
        return self.cooling_from + self._cooling()

    def due(self, step: int) -> bool:
        """Whether the held-out loss is due after so many steps: at the start, every `every` steps, and at the end."""
        return step % self.every == 0 or self.ended(step)

    def look(
        self,
        step: int,
        losses: Float[Tensor, " rows"],
        delta: Float[Tensor, "rows d_out d_in"],
        biases: Float[Tensor, "rows d_out"],
    ) -> None:
        """Note the held-out losses; keep each layer's translators where they are its best."""
        losses = losses.detach().cpu()
        if self.best is None or self.delta is None or self.biases is None:
            self.best, self.delta, self.biases = losses.clone(), delta.cpu().clone(), biases.cpu().clone()
        else:
            better = losses < self.best
            self.best = torch.where(better, losses, self.best)
            self.delta[better], self.biases[better] = delta.cpu()[better], biases.cpu()[better]
        self.looks.append({"step": step, "loss": losses.tolist()})
        if not self._stuck():
            return
        if self.steps is not None:
            self.stopped = True
        elif self.cooling_from is None:
            self.cooling_from = step

    def _stuck(self) -> bool:
        """No gain in the last `patience` looks over the best before them."""
        means = [sum(look["loss"]) / len(look["loss"]) for look in self.looks]
        if len(means) <= self.patience:
            return False
        return min(means[-self.patience :]) > (1 - GAIN) * min(means[: -self.patience])

    def _cooling(self) -> int:
        return max(self.every, (self.cooling_from or 0) // COOLING)

    def state(self) -> dict[str, Any]:
        """JSON values and tensors, for `files.save_state`."""
        return dict(vars(self))

    @staticmethod
    def load(state: dict[str, Any]) -> "Watch":
        """The inverse of `state`."""
        return Watch(**state)


def split_held_out(text: Text, held_out: Any) -> tuple[Text, Text | None]:
    """Text to train on, and held-out text: the last rows of the same, or other text; None for None."""
    if held_out is None:
        return text, None
    return text.split(finite_number("held_out", held_out)) if is_share(held_out) else (text, Text.of(held_out))


def is_share(held_out: Any) -> bool:
    """Whether `held_out` is a number, of any type, and not text."""
    return isinstance(held_out, (int, float)) or getattr(held_out, "ndim", None) == 0

"""When to stop: the loss on held-out text, watched along a fit.

With a fixed number of steps the rate falls linearly from the first to the last. With `steps="auto"` nobody knows the last one: the rate
stays until the held-out loss does, then falls to zero over a quarter as many steps as there were, and that is the end.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.data import as_batches

COOLING = 4  # the rate falls over 1/COOLING of the steps before it
GAIN = 2e-3  # a fall of the mean loss by less than this share is none
MOST = 20_000  # steps of "auto" at most


@dataclass
class Watch:
    """The held-out loss of every layer, the best translators so far, and what follows from it.

    Attributes:
        steps: steps of the fit, None for "auto".
        every: steps between two looks.
        patience: looks without a gain before it ends ("auto": before the rate falls).
        cooling_from: the step at which the rate began to fall, "auto" only.
        looks: `{"step", "loss": [nats per layer]}` of every look.
        best: the lowest loss of each layer, nats; its translators are in `delta` and `biases`, on the CPU.
    """

    steps: int | None
    every: int = 25
    patience: int = 4
    cooling_from: int | None = None
    looks: list[dict[str, Any]] = field(default_factory=list)
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
        """Whether there is no step after so many."""
        if self.steps is not None:
            return self.stopped or step >= self.steps
        cooled = self.cooling_from is not None and step >= self.cooling_from + self._cooling()
        return cooled or step >= MOST

    def due(self, step: int) -> bool:
        """Whether to look after so many steps: at the start, now and then, and at the end."""
        return step % self.every == 0 or self.ended(step)

    def look(
        self,
        step: int,
        losses: Float[Tensor, " rows"],
        delta: Float[Tensor, "rows d_out d_in"],
        biases: Float[Tensor, "rows d_out"],
    ) -> None:
        """Take note of held-out losses; keep each layer's translators where they are its best."""
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
        """JSON values and tensors, for `checkpoint.save_state`."""
        return dict(vars(self))

    @staticmethod
    def load(state: dict[str, Any]) -> "Watch":
        """What `state` gave."""
        return Watch(**state)


def split_held_out(tokens: Any, held_out: Any) -> tuple[Any, Any]:
    """What to train on, and batches of what not to, None for nothing.

    Raises:
        ValueError: a share of a text whose length is not known, or one that leaves nothing.
    """
    if held_out is None:
        return tokens, None
    if not isinstance(held_out, (int, float)):
        return tokens, as_batches(held_out)
    if not (isinstance(tokens, Tensor) and tokens.ndim == 2):
        raise ValueError(
            f"a share, held_out={held_out!r}, needs tokens [n, seq], whose number is known: give other text, such as held_out=token_batches(...)"
        )
    kept = round(len(tokens) * (1 - held_out))
    if not 0 < kept < len(tokens):
        raise ValueError(
            f"held_out={held_out!r} of {len(tokens)} rows leaves {kept} to train on: give a share between 0 and 1"
        )
    return tokens[:kept], as_batches(tokens[kept:])

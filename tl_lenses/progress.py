"""A progress bar where somebody looks: a terminal or a notebook, and only for work of over two seconds."""

import sys
import time
from collections.abc import Sequence
from typing import Any


def progress(
    iterable: Any = None, *, total: int | None = None, desc: str = "", initial: int = 0, show: bool | None = None
) -> Any:
    """A tqdm bar over `iterable`, or one to `update` by hand. `show=None` decides by where the output goes."""
    from tqdm.auto import tqdm

    if show is None:
        show = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(iterable, total=total, desc=desc, initial=initial, disable=not show, delay=2, dynamic_ncols=True)


class StepBar:
    """A line for training: steps, loss at the first, middle and last layer, tokens per second, time left."""

    def __init__(
        self, steps: int | None, done: int, labels: Sequence[str], tokens: int, default: bool | None, show: bool | None
    ):
        self.bar = progress(total=steps, desc="tuned lens", initial=done, show=default if default is False else show)
        self.labels, self.tokens, self.start = labels, tokens, time.perf_counter()
        self.which = sorted({0, len(labels) // 2, len(labels) - 1})

    def update(self, values: Sequence[float], tokens: int) -> None:
        """After a step: the loss of each layer, and the tokens seen by then."""
        rate = (tokens - self.tokens) / (time.perf_counter() - self.start)
        losses = " ".join(f"{self.labels[i]} {values[i]:.3f}" for i in self.which)
        self.bar.set_postfix_str(f"{losses}, {rate:,.0f} tokens/s", refresh=False)
        self.bar.update()

    def close(self) -> None:
        """Leave the line as it is."""
        self.bar.close()

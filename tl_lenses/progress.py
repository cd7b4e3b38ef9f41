"""How far long work is: a bar in a terminal or a notebook, and in a log file a line every half minute. Work of seconds is silent."""

import sys
import time
from collections.abc import Sequence, Sized
from typing import Any

EVERY = 30.0  # seconds between two lines in a log file
SILENT = 2.0  # seconds of work before there is a bar
LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} left{postfix}"
LINE_WITHOUT_END = "{desc}: {n_fmt}, {elapsed} so far, of how many is not known{postfix}"
ASK = 60.0  # seconds that a fit has to take before it says how long that is


def progress(iterable: Any = None, *, total: int | None = None, desc: str = "", initial: int = 0, show: bool | None = None) -> Any:
    """A tqdm bar over `iterable`, or one to `update` by hand; lines instead where stderr is neither a terminal nor a notebook.

    Args:
        iterable: its total is its length, or its `n_batches`, which a text may know about.
    """
    if show is False:
        from tqdm import tqdm

        return tqdm(iterable, disable=True)
    work: Any = iterable
    if total is None and iterable is not None:
        total = len(iterable) if isinstance(iterable, Sized) else getattr(iterable, "n_batches", None)
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        from tqdm.auto import tqdm

        return tqdm(work, total=total, desc=desc, initial=initial, delay=SILENT, dynamic_ncols=True)
    from tqdm import tqdm

    return tqdm(
        work, total=total, desc=desc, initial=initial, file=_Lines(sys.stderr), delay=EVERY, mininterval=EVERY, miniters=1,
        bar_format=LINE_WITHOUT_END if total is None else LINE,
    )  # fmt: skip


def set_total(bar: Any, total: int) -> None:
    """The end of a bar's work, where it is known only later."""
    bar.total = total
    if getattr(bar, "bar_format", None) == LINE_WITHOUT_END:
        bar.bar_format = LINE


class _Lines:
    """A file in which each state of a bar is a line of its own."""

    def __init__(self, file: Any):
        self.file = file

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            self.file.write(f"{text}\n")

    def flush(self) -> None:
        self.file.flush()


class StepBar:
    """A line for training: steps, loss at the first, middle and last layer, tokens per second, time left.

    `steps` is None where nobody knows their number yet; `done` and `tokens` were before. The first step says how long the fit takes
    if steps are `alike`, else the second.
    """

    def __init__(self, steps: int | None, done: int, labels: Sequence[str], tokens: int, show: bool | None, alike: bool = True):
        self.bar = progress(total=steps, desc="tuned lens", initial=done, show=show)
        self.labels, self.tokens, self.start = labels, tokens, time.perf_counter()
        self.which = sorted({0, len(labels) // 2, len(labels) - 1})
        self.before_word = 1 if alike else 2

    def update(self, values: Sequence[float], tokens: int, seconds: float, steps: int | None, looks: float = 0.0) -> None:
        """After a step: losses by layer, tokens by then, seconds of the step, steps of the fit, seconds of the looks that are to come."""
        if steps is not None:
            set_total(self.bar, steps)
        rate = (tokens - self.tokens) / (time.perf_counter() - self.start)
        losses = " ".join(f"{self.labels[i]} {values[i]:.3f}" for i in self.which)
        self.bar.set_postfix_str(f"{losses}, {rate:,.0f} tokens/s", refresh=False)
        self.bar.update()
        self.before_word -= 1
        if self.before_word == 0 and steps is not None and not self.bar.disable:
            left = max(0, steps - self.bar.n)
            if (text := forecast(left, seconds, looks, len(self.labels))) is not None:
                self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the line as it is."""
        self.bar.close()


def forecast(steps: int, seconds: float, looks: float = 0.0, layers: int = 1) -> str | None:
    """How long so many steps take, and a way to half of that; None where it is less than a minute.

    >>> forecast(249, 2.9, layers=30)
    'about 12 minutes to go: 249 steps of 2.9 s each; with half the steps, half the tokens per step or every second layer about 6 minutes'
    """
    if (whole := steps * seconds + looks) < ASK:
        return None
    ways = ["half the steps", "half the tokens per step", *["every second layer"] * (layers > 1)]
    look = f" and {duration(looks)} of looks at text that is set aside" if looks >= 1 else ""
    return (
        f"about {duration(whole)} to go: {steps} steps of {seconds:.2g} s each{look}; with {', '.join(ways[:-1])} or {ways[-1]} "
        f"about {duration(steps * seconds / 2 + looks)}"
    )


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, to two figures.

    >>> duration(47.2), duration(724.0), duration(9000.0)
    ('47 s', '12 minutes', '2.5 hours')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"

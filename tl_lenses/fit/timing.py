"""How long a fit takes, from a few batches of its start and one step of it: `tl-lenses fit --dry-run`. Nothing is written."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from tl_lenses.fit.common import row_groups, rows_for
from tl_lenses.fit.evidence import collect
from tl_lenses.fit.jacobian import fit_jacobian
from tl_lenses.fit.plan import AUTO_STEPS
from tl_lenses.fit.regression import maps_of
from tl_lenses.fit.settings import Settings
from tl_lenses.fit.state import Checkpoint
from tl_lenses.fit.team import processes
from tl_lenses.fit.training import Task, Training
from tl_lenses.fit.tuned import groups_of_fit
from tl_lenses.layers import LayerOrSite
from tl_lenses.model import LensModel, d_model
from tl_lenses.progress import duration
from tl_lenses.text.batches import Text
from tl_lenses.tokens import Batch

MEASURED = 2  # batches that the moments are timed on, after one more to warm up


@dataclass(frozen=True)
class Timing:
    """Seconds of the parts of a fit on this machine, as they were measured just now."""

    moments: float  # of the regression, or of the start, over all its batches
    solving: float  # of the maps from them
    # step, steps: of one optimiser step, and their number; 0 of a regression
    step: float = 0.0
    steps: int = 0
    # look, looks: of one look at the held-out text or the guard, and their number
    look: float = 0.0
    looks: int = 0
    groups: int = 1  # passes over the text, each of which has all of these

    @property
    def seconds(self) -> float:
        """The whole fit."""
        return self.groups * (self.moments + self.solving + self.steps * self.step + self.looks * self.look)

    def __str__(self) -> str:
        first = duration(self.groups * (self.moments + self.solving))
        if not self.steps:
            return f"about {first} on this machine"
        parts = [f"start {first}", f"{self.steps:,} steps of {self.groups * self.step:.2g} s"]
        if self.looks:
            parts.append(f"{self.looks} looks of {self.look:.2g} s")
        half = duration(self.seconds - self.groups * self.steps * self.step / 2)
        return (
            f"about {duration(self.seconds)} on this machine: {', '.join(parts)}\n"
            f"half the steps, half the tokens per step or every second layer: about {half}"
        )


def time_regression(
    model: LensModel, tokens: Any, layers: Iterable[LayerOrSite] | None, settings: Settings, limit_tokens: int | None
) -> Timing:
    """The time of `fit_regression`, from a few of its batches. Of a text whose length is not known, up to `limit_tokens`."""
    text = Text.of(tokens)
    groups = row_groups(rows_for(model, layers), settings.layers_at_once, text)
    first = list(islice(text, MEASURED + 1))
    total = text.n_batches
    if limit_tokens is not None:
        limit = -(-limit_tokens // first[0].tokens.numel())
        total = limit if total is None else min(total, limit)
    if total is None:
        raise ValueError("how long a text is whose length is not known cannot be said: pass limit_tokens=...")
    each, solving = _moments(model, first, groups[0], settings)
    return Timing(total * each, solving, groups=len(groups))


def time_jacobian(model: LensModel, tokens: Any, layers: Iterable[LayerOrSite] | None, rule: Any) -> Timing:
    """The time of `fit_jacobian`, from the second of its batches."""
    text = Text.of(tokens)
    if text.n_batches is None:
        raise ValueError("how long a text is whose length is not known cannot be said: pass limit_tokens=...")
    layers = None if layers is None else list(layers)
    fit = lambda batch: fit_jacobian(model, [batch], layers, rule=rule, show_progress=False)
    first = list(islice(text, 2))
    fit(first[0])  # what runs for the first time is slower
    return Timing(text.n_batches * _seconds(lambda: fit(first[-1])), 0.0)


def time_tuned(
    model: LensModel, tokens: Any, layers: Iterable[LayerOrSite] | None, settings: Settings, held_out: Any = None
) -> Timing:
    """The time of `fit_tuned` with these settings, from a few batches and two real steps, without a checkpoint.

    A step is timed with its forward pass; steps on states that the start has kept (`fit.kept`) need none, so a short fit takes less.
    """
    text, settings = Text.of(tokens), settings.at_width(d_model(model))
    groups = groups_of_fit(rows_for(model, layers), settings, text)
    first = list(islice(text, MEASURED + 1))
    moments = solving = look = 0.0
    if n_start := settings.start_tokens(d_model(model)):
        each, solving = _moments(model, first, groups[0], settings)
        n_batches = -(-n_start // first[0].tokens.numel())
        moments = each * (n_batches if text.n_batches is None else min(n_batches, text.n_batches))
    steps, looks = AUTO_STEPS if settings.steps == "auto" else settings.steps, 0
    apart = None if held_out is None else Text.of(held_out)
    one_batch = None if apart is None else Text.of(list(islice(apart, 1)))
    small = replace(settings, init_tokens=1, steps=max(2, steps), held_out=apart is not None)
    training = Training(
        Task(model, text, groups[0], small, held_out=one_batch), Checkpoint(None, "", {}, (), processes()), processes(), None, False
    )  # fmt: skip
    try:
        if training.watched is not None:  # held-out text, or the guard: at the start and at the end
            look = _seconds(training.look) * (1 if apart is None else apart.n_batches or 1)
            looks = 2 if apart is None else 2 + (steps - 1) // settings.held_out_every
        training.step()  # it searches its length, on states that the start has read
        step = _seconds(training.step)
    finally:
        training.bar.close()
        training.stream.close()
    return Timing(moments, solving, step, steps, look, looks, len(groups))


def _moments(model: LensModel, first: list[Batch], rows: Any, settings: Settings) -> tuple[float, float]:
    """Seconds of a batch's moments, and of the maps from them."""
    read = lambda batches: collect(
        model, batches, rows, skip_first=settings.skip_first, offload=settings.offload, show_progress=False
    )
    read(first[:1])  # what runs for the first time is slower
    measured = first[1:] or first
    each = _seconds(lambda: read(measured)) / len(measured)
    evidence = read(first[:1])
    return each, _seconds(lambda: maps_of(model, evidence))


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began

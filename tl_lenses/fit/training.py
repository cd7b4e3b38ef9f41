"""Training of a tuned lens: `start` or `resume`, then `step` after `step` with a `look` at held-out text and a `save` when due."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.fit.common import Log, NotFinite, logger, shown
from tl_lenses.fit.guard import SHARES, Guard, guard_of, guard_of_rows, tokens_read
from tl_lenses.fit.kept import seconds_of
from tl_lenses.fit.learner import Learner
from tl_lenses.fit.optim import AFTER, LENGTHS, best_lengths, multiply_scales, noise_share
from tl_lenses.fit.sampled import on_sample
from tl_lenses.fit.settings import Settings
from tl_lenses.fit.start import first_batches, regression_start, start_of
from tl_lenses.fit.state import Checkpoint, guilty_text, random_state, set_random_state, unbroken
from tl_lenses.fit.step import Pairs, head_of, most_passes, pieces, scored_pairs, summed_losses
from tl_lenses.fit.stop import Watch
from tl_lenses.fit.team import Lost, Team
from tl_lenses.hooks import Hook, check_edits
from tl_lenses.model import LensModel, d_model, hooked
from tl_lenses.progress import StepBar, progress
from tl_lenses.text.batches import ROWS, Bookmark, Text
from tl_lenses.tokens import Batch
from tl_lenses.translators import Row, Translators
from tl_lenses.unembed import Readout

SEARCHED = 512  # tokens on which the length of the first step is chosen


@dataclass(frozen=True)
class Task:
    """What is trained: some rows of a model, on a text."""

    model: LensModel
    text: Text
    rows: list[Row]  # `(source site, target site)` of each map
    settings: Settings  # with a learning rate, see `Settings.at_width`
    init: Translators | None = None  # translators to start from, where `settings.init` says so
    hooks: list[Hook] = field(default_factory=list)
    held_out: Text | None = None  # text for `look`, or None


class Training:
    """One fit of a group of rows, from its start or a checkpoint to its end (`run`). Every number that changes is a field.

    Attributes:
        done: optimiser steps that were made.
        n_tokens, n_rows: tokens and rows of text that were seen.
        n_init: positions that the start was fitted on.
        pass_seconds: of the passes that the start made and the steps to come need not make.
        look_seconds: of the last look at held-out text or the guard.
        show: whether there are bars.
        bookmark: the place in the text after the last step.
        on_disk: the step of the last checkpoint that was written or read.
        whole: False in the middle of an optimiser step, whose state is not to be saved.
    """

    def __init__(self, task: Task, checkpoint: Checkpoint, team: Team, log: Log, show_progress: bool | None):
        self.task, self.checkpoint, self.team, self.log = task, checkpoint, team, logger(log)
        self.model, self.rows, self.settings, self.hooks = task.model, task.rows, task.settings, task.hooks
        self.readout = Readout(self.model)
        self.done = self.n_tokens = self.n_rows = self.n_init = 0
        self.pass_seconds = 0.0
        self.bookmark: Bookmark | None = None
        self.on_disk: int | None = None
        self.whole, self.look_seconds = True, 0.0
        self.show = show_progress if team.first else False
        steps = None if isinstance(self.settings.steps, str) else self.settings.steps
        # A guard is two looks and stops nothing.
        every = max(1, steps or 1) if self.settings.guards else self.settings.held_out_every
        self.watch = Watch(steps, every, self.settings.patience)
        state = checkpoint.resume()
        if state is not None and state["position"]:
            self.bookmark = Bookmark.load(state["position"])
        text, self.guard = task.text, Guard() if state is None else Guard.load(state["guard"], task.text)
        if self.settings.guards and text.ids is not None:
            again = self.guard.start_again
            text, guard = guard_of_rows(text, self._tokens_trained(text.ids[:ROWS].numel()))
            self.guard = replace(guard, start_again=again)
        self.text = text
        self.stream: Generator[tuple[Batch, Bookmark], None, None] = team.in_turn(
            text.stream(seed=self.settings.seed, at=self.bookmark), [self.model]
        )
        self.feed: Iterator[tuple[Batch, Bookmark]] = self.stream
        if state is None and self.settings.guards and text.ids is None:
            self.guard = self._set_aside()
        self.feed = self.guard.rest(self.feed)
        self.watched = task.held_out or (Text.of(list(self.guard.batches)) if self.guard.batches else None)
        check_edits(self.model, self.hooks)  # every process makes its passes now, or none
        if state is None:
            self.start()
        else:
            self.resume(state)
        self.head = head_of(self.readout, self.settings.precision)
        self.learner.samples = self.settings.samples(self.head.w_u.shape[1])
        self.bar = StepBar(
            self.watch.last, self.done, list(map(_label, self.rows)), self.n_tokens, self.show,
            alike=self.settings.subsample == 1,
        )  # fmt: skip

    def _tokens_trained(self, of_batch: int) -> int:
        return int(self.settings.steps) * max(self.settings.tokens_per_step or 0, of_batch)

    def _set_aside(self) -> Guard:
        """The guard's tokens, from the beginning of the feed; the feed is still at its beginning."""
        if self.task.text.one_shot:
            return guard_of([], self.task.text, 0, True)
        with self.team.together():
            first, self.feed = first_batches(self.feed, 1)
            n_trained = self._tokens_trained(first[0].tokens.numel())
            first, self.feed = first_batches(self.feed, tokens_read(n_trained))
        return guard_of(first, self.task.text, n_trained, bool(self.hooks) or hooked(self.model))

    def start(self) -> None:
        """Begin at the first step."""
        start, self.feed = start_of(
            self.model, self.feed, self.rows, self.settings, self.task.init, self.hooks, self.show, alone=self.team.world == 1
        )
        wanted = self.settings.start_tokens(d_model(self.model))
        self.n_init, self.pass_seconds, self.guard = start.n_tokens, start.pass_seconds, self.guard.beside(start.n_read, wanted)
        self.learner = self._learner(start.delta, start.biases, start.white)

    def resume(self, state: dict[str, Any]) -> None:
        """Continue after the last step of a checkpoint."""
        self.n_init = state["init_tokens"]
        self.learner = self._learner(state["delta"], state["biases"], state["white"])
        self.learner.load_optimizers(state["optimizers"])
        self.done, self.n_tokens, self.n_rows = state["step"], state["tokens"], state["rows_seen"]
        self.on_disk = self.done
        self.watch = Watch.load(state["watch"])
        set_random_state(state["random"])

    def _learner(self, delta: Tensor, biases: Tensor, white: Tensor | None) -> Learner:
        device = self.readout.device
        if white is not None:
            white = white.to("cpu" if self.settings.offload else device)
        return Learner(delta.float().to(device).contiguous(), biases.float().to(device).contiguous(), self.settings, white)

    def run(self) -> "Training":
        """Train to the end. Whatever ends it early, the last whole step is saved.

        Raises:
            Lost: another process has ended.
            NotFinite: a loss, gradient or map is not finite.
        """
        try:
            self.look()
            self.save()
            while not self.watch.ended(self.done):
                self.step()
                if self.done % self.settings.checkpoint_every == 0 or self.watch.ended(self.done):
                    if not (good := self.learner.finite_maps()).all():
                        raise NotFinite(self._not_finite("translator", good))
                    with unbroken():
                        self.save()
        except Lost as error:
            self.save()
            raise Lost(self._lost(error)) from error
        except BaseException:
            self.save()  # the last whole step: nothing is lost to Ctrl-C or to a bad batch
            raise
        finally:
            self.bar.close()
            self.stream.close()
        return self

    @property
    def unsaved(self) -> bool:
        """Whether there is a whole step that a checkpoint should hold and the disk does not."""
        missing = self.checkpoint.file is not None and self.team.first and 0 < self.done != self.on_disk
        return missing and self.whole and bool(self.learner.finite_maps().all())

    @property
    def maps(self) -> tuple[Tensor, Tensor]:
        """D and b of the result on the CPU: each layer's best look, or the last step where nothing is held out.

        A guard's only look before the end is the start, and a fit that ends early is worth more than that.
        """
        seen = bool(self.task.held_out) or (self.watch.looks and self.watch.looks[-1]["step"] == self.done)
        if seen and self.watch.delta is not None and self.watch.biases is not None:
            return self.watch.delta, self.watch.biases
        return self.learner.delta.cpu(), self.learner.biases.cpu()

    def step(self) -> None:
        """One optimiser step: gradients of about `tokens_per_step` tokens, summed over processes; then a look and the log."""
        learner, began = self.learner, time.perf_counter()
        learner.clear()
        batches: list[Batch] = []
        with self.team.together(learner.sums):
            n_tokens, n_rows, bookmark = self._gradients(batches)
        if learner.counts[0] == 0:
            raise ValueError("no position to train on in a whole step: rows of one token with skip_first, or all pads")
        learner.average()
        if not (good := learner.finite_gradients()).all():
            raise NotFinite(self._guilty(good, batches, n_rows))
        learner.prepare_gradients()
        if self.done == 0:
            learner.scale_rates()
        rate = (self.settings.lr or 0.0) * self.watch.rate(self.done)
        if self.settings.lr_search:
            rate *= noise_share(float(learner.counts[0]), learner.delta.shape[-1])
        learner.hand_over()
        searches = self.done == 0 and self.settings.lr_search and self.watch.steps != 1
        if searches:
            search = time.perf_counter()
            self._first_step(rate)
            began += time.perf_counter() - search  # the other steps do not search
        with unbroken():
            self.whole = False
            if not searches:
                learner.update(rate)
            self.done, self.bookmark = self.done + 1, bookmark
            self.n_tokens, self.n_rows = self.n_tokens + n_tokens, self.n_rows + n_rows
            self.whole = True
        spared, seconds = seconds_of(batches), time.perf_counter() - began
        self.pass_seconds = max(0.0, self.pass_seconds - spared)
        self.look()
        left = max(1, (self.watch.last or 2**62) - self.done)
        self._report(rate, max(seconds, seconds + spared - self.pass_seconds / left))  # of a step to come

    def _first_step(self, rate: float) -> None:
        """The first step, as long in each layer as is best on the next tokens of the text; the later ones are shortened alike."""
        learner = self.learner
        with self.team.together():
            ahead, self.feed = first_batches(self.feed, 1)
        batch = ahead[0]
        if not (self.hooks or hooked(self.model)):  # they could know its rows
            batch = batch.take(slice(0, max(1, SEARCHED // batch.tokens.shape[1])))
        before = learner.delta.clone(), learner.biases.clone()
        self.whole = False  # until the length is chosen: after an interrupt the fit begins again
        learner.update(rate)
        shares = [lambda share=share: learner.on_the_way(before, share) for share in (0.0, *LENGTHS)]
        # one pass of the model for all
        losses = self._mean_losses([batch], "the text after the first step", maps=shares, sampled=learner.samples)
        lengths = best_lengths(losses[0], losses[1:])
        learner.move(before, lengths)
        multiply_scales(learner.optimizers, (AFTER * lengths).clamp(max=1.0))

    def _gradients(self, batches: list[Batch]) -> tuple[int, int, Bookmark | None]:
        """Add up the gradients of this process' rows, which are appended to `batches`; tokens and rows of the text, and the place after them."""
        n_tokens, n_rows, bookmark = 0, 0, self.bookmark
        try:
            while n_tokens < (self.settings.tokens_per_step or 1):
                batch, bookmark = next(self.feed)
                self.last_batch = batch
                n_tokens += batch.tokens.numel()
                rows, _ = self.team.rows_of(batch, self.n_rows + n_rows)
                n_rows += len(batch.tokens)
                batches += [] if rows is None else [rows]
                with self._in_step(batch):
                    if rows is not None:
                        self._add(rows, self.n_rows + n_rows)
        except NotFinite as error:
            raise NotFinite(f"{error}, at step {self.done}") from None
        return n_tokens, n_rows, bookmark

    def _in_step(self, batch: Batch) -> Any:
        passes = most_passes(self.model, batch, self.hooks, self.team.world)
        return self.team.in_step([self.model], batch, passes)

    def _pairs(self, batch: Batch) -> Iterator[Pairs]:
        """The positions to score, of one forward pass after the other."""
        s = self.settings
        assert s.token_shift is not None  # Settings fills it in
        for piece in pieces(self.model, batch, self.hooks):
            yield scored_pairs(self.model, piece, self.rows, self.hooks, s.skip_first, s.token_shift, s.loss, self.readout)

    def _add(self, batch: Batch, row: int) -> None:
        """Add a batch's gradients to the learner's; `row` is the number of the row after it, for the random positions."""
        for i, pairs in enumerate(self._pairs(batch)):
            # the first losses set each layer's rate
            self.learner.add(pairs, self.head, seed=self._seed(row) + i, exact=self.done == 0)
            del pairs  # before the next pass

    def _seed(self, row: int) -> int:
        """Of the random positions and tokens of a batch that ends before a row of the text."""
        return (self.settings.seed * 1_000_003 + row) * 1009

    def look(self) -> None:
        """Evaluate the held-out loss if it is due and was not evaluated before a resume. All processes get the same numbers."""
        looks = self.watch.looks
        if self.watched is None or not self.watch.due(self.done) or (looks and looks[-1]["step"] == self.done):
            return
        began, total = time.perf_counter(), None if self.show is False else self.watched.n_batches
        watched = "held-out text" if self.task.held_out else "guard"
        with progress(total=total, desc=watched, show=self.show) as bar:
            if self.settings.guards and looks:
                self._end(bar.update)
            else:
                sampled = self.learner.samples and self.settings.guards  # held-out losses are exact
                losses = self._mean_losses(self.watched, "held_out", bar.update, sampled=sampled)[0]
                with unbroken():
                    self.watch.look(self.done, losses, self.learner.delta, self.learner.biases)
        self.look_seconds = time.perf_counter() - began

    def _end(self, tick: Callable[[], object]) -> None:
        """The guard's last look: each layer goes back to the best of `SHARES` of its way from the start, or to the start."""
        learner, watch = self.learner, self.watch
        assert self.watched is not None and watch.delta is not None and watch.biases is not None
        origin = watch.delta.to(learner.device, copy=True), watch.biases.to(learner.device, copy=True)
        ways = [lambda share=share: learner.on_the_way(origin, share) for share in SHARES]
        losses = self._mean_losses(self.watched, "guard", tick, maps=ways, sampled=learner.samples)
        best = losses.nan_to_num(float("inf")).argmin(0).cpu()
        again = self._start_again() if self.guard.start_again else origin
        with unbroken():
            self.whole = False
            shares = torch.tensor(SHARES)[best]
            learner.move(origin, shares)
            watch.look(self.done, losses.gather(0, best.to(losses.device)[None])[0], learner.delta, learner.biases)
            watch.looks[-1]["share"] = shares.tolist()
            for kept, new, old in zip((watch.delta, watch.biases), again, origin, strict=True):
                kept += (new - old).to(kept.device)  # the result: no step follows
            self.whole = True

    def _start_again(self) -> tuple[Tensor, Tensor]:
        """D and b of the start's regression with the guard's tokens too."""
        s, stream = self.settings, self.text.stream(seed=self.settings.seed)
        with closing(stream):
            first, _ = first_batches(self.guard.rest(stream), s.start_tokens(d_model(self.model)))
        both = [*first, *self.guard.batches]
        delta, biases, _ = regression_start(
            self.model, both, self.rows, self.hooks, s.skip_first, offload=s.offload, show_progress=self.show
        )
        return delta.float().to(self.learner.device), biases.float().to(self.learner.device)

    def _mean_losses(
        self,
        text: Iterable[Batch],
        name: str,
        tick: Callable[[], object] = lambda: None,
        maps: Sequence[Callable[[], tuple[Tensor, Tensor]]] = (),
        sampled: bool = False,
    ) -> Float[Tensor, "maps rows"]:
        """Each row's mean loss on a text, the same in all processes.

        Args:
            maps: make D and b; those of the learner by default.
            sampled: on a sample of the vocabulary, the same for all maps and in all looks at a text.
        """
        learner, first, size = self.learner, 0, self.settings.chunk_size
        maps = maps or [lambda: (learner.delta, learner.biases)]
        sums = torch.zeros(len(maps) * len(self.rows) + 2, device=learner.device)  # losses, positions, errors
        losses = sums[:-2].view(len(maps), -1)
        with self.team.together(sums):
            for batch in self.team.in_turn(text, [self.model]):
                tick()
                rows, _ = self.team.rows_of(batch, first)
                first += len(batch.tokens)
                with self._in_step(batch):
                    for i, pairs in enumerate(() if rows is None else self._pairs(rows)):
                        scored = on_sample(pairs, self.head, self._seed(first) + i, size) if sampled else (pairs, self.head)
                        for loss, of in zip(losses, maps, strict=True):
                            loss += summed_losses(scored[0], *of(), scored[1], chunk_size=size)
                        sums[-2] += len(pairs)
                        del pairs, scored
        if sums[-2] == 0:
            raise ValueError(f"no position to score in {name}: rows of one token with skip_first, or all pads")
        return losses / sums[-2]

    def save(self) -> None:
        """Write a checkpoint of the last step, unless the disk has it already or it is not whole and finite."""
        if self.checkpoint.file is None or self.on_disk == self.done:
            return
        if not (self.whole and self.learner.finite_maps().all()):
            return
        state = {
            "step": self.done, "tokens": self.n_tokens, "rows_seen": self.n_rows, "init_tokens": self.n_init,
            "position": None if self.bookmark is None else self.bookmark.state(), "random": random_state(),
            "watch": self.watch.state(), "guard": self.guard.state(), **self.learner.state(),
        }  # fmt: skip
        if self.checkpoint.keep(state, f"at step {self.done}"):
            self.on_disk = self.done

    def _report(self, rate: float, seconds: float) -> None:
        """The log's entry of a step, and the progress bar."""
        losses = self.learner.losses.tolist()
        by_layer = lambda values: {row[0]: value for row, value in zip(self.rows, values, strict=True)}
        entry = {"step": self.done, "tokens": self.n_tokens, "lr": rate, "loss": by_layer(losses)}
        if self.watch.looks and self.watch.looks[-1]["step"] == self.done:
            entry["held_out" if self.task.held_out else "guard"] = by_layer(self.watch.looks[-1]["loss"])
        self.log(entry)
        looks = -((self.done - (self.watch.last or self.done)) // self.watch.every)
        looks *= len(SHARES) if self.settings.guards else 1
        self.bar.update(losses, self.n_tokens, seconds, self.watch.last, looks * self.look_seconds)

    def _guilty(self, good: Tensor, batches: list[Batch], n_rows: int) -> str:
        """The message for a loss or gradient that is not finite, with the row of text that makes it so, if one does."""
        learner = self.learner
        part = "gradient" if learner.losses.isfinite().all() else "loss"

        def is_finite(row: Batch) -> bool:
            learner.clear()
            self._add(row, 0)
            return bool(learner.finite_gradients().all())

        suspects = batches if learner.finite_maps().all() else []  # with maps that are not finite every text is guilty
        with self.team.in_step([self.model], self.last_batch, -(-n_rows // self.team.world)):
            passage = guilty_text(suspects, is_finite, lambda row: shown(self.model, row.tokens[0]))
        passages = [text for text in self.team.gather(passage) if text]
        return self._not_finite(part, good, passages[0] if passages else None)

    def _not_finite(self, part: str, good: Tensor, passage: str | None = None) -> str:
        bad = [row[0] for row, ok in zip(self.rows, good.tolist(), strict=True) if not ok]
        more = f" and {len(bad) - 1} more" if bad[1:] else ""
        text, leave_out = (f", on the text {passage}", " or leave that text out") if passage else ("", "")
        return (
            f"the {part} is not finite at step {self.done} for {bad[0]!r}{more}{text}: lower lr (now {self.settings.lr}){leave_out}; "
            "the last good state is kept"
        )

    def _lost(self, error: Lost) -> str:
        file, steps = self.checkpoint.file, self.watch.steps
        kept = "there is no checkpoint" if file is None else f"the checkpoint {file} holds the last steps"
        of = "" if steps is None else f" of {steps}"
        return f"{error} in step {self.done + 1}{of}; {kept}: start all processes again to go on"


def _label(row: Row) -> str:
    parts = row[0].split(".")
    return f"L{parts[1]}" if row[0].endswith("hook_resid_pre") else row[0].removeprefix("blocks.")

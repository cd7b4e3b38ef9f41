"""Evidence for closed-form maps: moments of their states over a text, which add up over batches, shards and processes."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_lenses.checks import finite_number, whole_number
from tl_lenses.fit.common import NotFinite, states
from tl_lenses.fit.state import Checkpoint, alone
from tl_lenses.fit.team import Team, processes
from tl_lenses.hooks import Hook, check_edits
from tl_lenses.identity import check_tokenizers
from tl_lenses.model import LensModel, name_of
from tl_lenses.moments import Moments, grouped_moments
from tl_lenses.progress import progress, set_total
from tl_lenses.text.batches import Bookmark, Text
from tl_lenses.tokens import Batch, used_positions
from tl_lenses.translators import Row

SETS = ("fit", "choose", "held_out")


@dataclass(frozen=True)
class Evidence:
    """The moments of some maps' states over three disjoint sets of rows of a text. Shards add up (`a + b`)."""

    rows: tuple[Row, ...]  # `(source site, target site)` of each map
    # fit, choose, held_out: one `Moments` per distinct source, in order, with its targets in order; empty where no row
    # of the text went there
    fit: tuple[Moments, ...] = ()
    choose: tuple[Moments, ...] = ()
    held_out: tuple[Moments, ...] = ()
    agreed: int | None = None  # held-out positions at which both models have the same argmax; None within one model

    def __add__(self, other: "Evidence") -> "Evidence":
        if self.rows != other.rows:
            raise ValueError(
                f"evidence of different maps does not add up: {list(self.rows)} and {list(other.rows)}; collect shards with the same rows"
            )
        agreed = None if self.agreed is None or other.agreed is None else self.agreed + other.agreed
        sums = (_sum(getattr(self, name), getattr(other, name)) for name in SETS)
        return Evidence(self.rows, *sums, agreed=agreed)

    def __radd__(self, other: object) -> "Evidence":
        """So that `sum(shards)` works."""
        return self if other == 0 else NotImplemented  # type: ignore[return-value]


def _sum(a: tuple[Moments, ...], b: tuple[Moments, ...]) -> tuple[Moments, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True)) if a and b else a or b


def count(part: tuple[Moments, ...]) -> int:
    """Positions of a set."""
    return part[0].n if part else 0


def merged_evidence(total: Evidence, team: Team) -> Evidence:
    """The evidence of all processes, in all of them."""
    if team.world == 1:
        return total
    parts = merged([total.fit, total.choose, total.held_out], team)
    agreed = team.gather(total.agreed)
    return Evidence(total.rows, *parts, agreed=None if total.agreed is None else sum(agreed))


def merged(parts: Sequence[tuple[Moments, ...]], team: Team) -> list[tuple[Moments, ...]]:
    """The moments of all processes' rows, for several sets of them; exact to rounding in float64.

    `n = sum n_i`, `mean = sum n_i mean_i / n`, and around that mean `xx = sum xx_i + n_i (mean_i - mean)(mean_i - mean)^T`.
    """
    # A process whose rows all went to other sets has no moments of this one and does not know its shapes.
    shapes = team.gather([[(m.mean_x.shape, m.yx.shape) for m in part] for part in parts])
    result = []
    for i, part in enumerate(parts):
        known = next((s[i] for s in shapes if s[i]), [])
        moments = part or [None] * len(known)
        result.append(tuple(_merged(m, x, yx, team) for m, (x, yx) in zip(moments, known, strict=True)))
    return result


def _merged(m: Moments | None, shape_x: torch.Size, shape_yx: torch.Size, team: Team) -> Moments:
    if m is None:
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64)
        pair = shape_yx[:2]
        m = Moments(0, zeros(*shape_x), zeros(*pair), zeros(*shape_x, shape_x[-1]), zeros(*shape_yx), zeros(*pair))
    sums = torch.cat([m.mean_x.new_tensor([m.n]), m.n * m.mean_x.flatten(), m.n * m.mean_y.flatten()])
    team.add_up(sums)
    n = round(float(sums[0]))
    mean_x, mean_y = (sums[1:] / n).split([m.mean_x.numel(), m.mean_y.numel()])
    mean_x, mean_y = mean_x.view_as(m.mean_x), mean_y.view_as(m.mean_y)
    dx, dy = m.mean_x - mean_x, m.mean_y - mean_y
    flat = torch.cat([
        (m.xx + m.n * dx[:, :, None] * dx[:, None, :]).flatten(),
        (m.yx + m.n * dy[:, :, None] * dx[:, None, :]).flatten(),
        (m.yy + m.n * dy**2).flatten(),
    ])  # fmt: skip
    team.add_up(flat)
    xx, yx, yy = flat.split([m.xx.numel(), m.yx.numel(), m.yy.numel()])
    return Moments(n, mean_x, mean_y, xx.view_as(m.xx), yx.view_as(m.yx), yy.view_as(m.yy))


def on_device(evidence: Evidence, device: str) -> Evidence:
    move = lambda m: Moments(m.n, *(getattr(m, f.name).to(device) for f in fields(m) if f.name != "n"))
    parts = (tuple(move(m) for m in getattr(evidence, name)) for name in SETS)
    return Evidence(evidence.rows, *parts, agreed=evidence.agreed)


def evidence_tree(evidence: Evidence) -> dict[str, Any]:
    """For `files.save_state`."""
    numbers = lambda m: {f.name: getattr(m, f.name) for f in fields(m)}
    parts = {name: [numbers(m) for m in getattr(evidence, name)] for name in SETS}
    return {**parts, "agreed": evidence.agreed}


def evidence_of(tree: dict[str, Any], rows: tuple[Row, ...]) -> Evidence:
    """The inverse of `evidence_tree`."""
    parts = (tuple(Moments(**m) for m in tree[name]) for name in SETS)
    return Evidence(rows, *parts, agreed=tree["agreed"])


# --- a pass over a text

CHOOSING = 10  # of several ridge strengths, every tenth row of the text says which is best


class Counts(NamedTuple):
    """How much of a text was read. `to_fit` counts only positions that maps are fitted on."""

    positions: int = 0
    rows: int = 0
    to_fit: int = 0
    batches: int = 0


@dataclass(frozen=True)
class Reading:
    """What is read of a text, and under which interventions. `collect` says what each field means."""

    rows: tuple[Row, ...]
    to: LensModel | None = None
    skip_first: bool = True
    hooks: tuple[Hook, ...] = ()
    target_hooks: tuple[Hook, ...] = ()
    held_out: float = 0.0
    choose: bool = False
    limit_tokens: int | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        if self.to is None and self.target_hooks:
            raise ValueError("target_hooks are for another model, and there is none: pass to=model, or hooks=")

    @property
    def sources(self) -> list[str]:
        """The distinct source sites, in order."""
        return list(groups_of(self.rows))

    @property
    def goals(self) -> list[str]:
        """The distinct target sites, in order."""
        return list(dict.fromkeys(target for _, target in self.rows))

    @property
    def nothing(self) -> Evidence:
        """Evidence of no text."""
        return Evidence(self.rows, agreed=0 if self.to is not None and self.held_out else None)

    def sets(self, first: int, n: int) -> Bool[Tensor, "sets n"]:
        """Which rows of a batch that begins with row `first` of the text are to fit on, to choose by, and held out.

        A row's set depends on its number alone, whatever the batches and processes.
        """
        index = torch.arange(first, first + n)
        every = round(1 / self.held_out) if self.held_out else 0
        held_out = index % every == 0 if every else torch.zeros_like(index, dtype=torch.bool)
        choosing = (index % CHOOSING == CHOOSING - 1) & ~held_out & self.choose
        return torch.stack([~held_out & ~choosing, choosing, held_out])

    def settings(self) -> dict[str, Any]:
        """JSON values that decide the result."""
        return {
            "rows": [list(row) for row in self.rows], "skip_first": self.skip_first, "held_out": self.held_out, "choose": self.choose,
            "limit_tokens": self.limit_tokens, "to": None if self.to is None else name_of(self.to),
        }  # fmt: skip


def groups_of(rows: Sequence[Row]) -> dict[str, list[int]]:
    """The numbers of the rows of each source."""
    groups: dict[str, list[int]] = {}
    for i, (source, _) in enumerate(rows):
        groups.setdefault(source, []).append(i)
    return groups


@torch.inference_mode(False)
@torch.no_grad()
def collect(
    model: LensModel,
    tokens: Any,
    rows: Sequence[Row],
    *,
    to: LensModel | None = None,
    skip_first: bool = True,
    hooks: Iterable[Hook] = (),
    target_hooks: Iterable[Hook] = (),
    held_out: float | int = 0,
    choose: bool = False,
    limit_tokens: int | None = None,
    offload: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    note: Mapping[str, Any] | None = None,
    show_progress: bool | None = None,
    desc: str = "regression",
) -> Evidence:
    """The moments of every row over a text, one pass. States of `to` are moved to the device of `model`.

    Processes that were launched together share the rows of the text, and all of them get the sum. `offload` adds up on
    the CPU; with `checkpoint` the state is kept every `checkpoint_every` batches, with the `note` of the caller. `desc` is the name
    of the progress bar.

    Which rows of the text are held out depends on their number alone and not on the batches: of a share of 0.1, rows
    0, 10, 20, ...; and of the others, rows 9, 19, ... to choose among ridge strengths.

    Raises:
        ValueError: no token to fit on, or none held out; sites of different width; tokenizers that differ.

    Example:
        >>> rows = [("blocks.2.hook_resid_pre", "blocks.7.hook_resid_post")]
        >>> shards = [collect(model, part, rows) for part in (first, second)]      # doctest: +SKIP
        >>> maps_of(model, sum(shards))                                            # doctest: +SKIP
    """
    share = finite_number("held_out", held_out, least=0)
    if share > 0.5:
        raise ValueError(f"held_out is a share of the rows, 0 (none) to 0.5, got {held_out!r}")
    limit_tokens = None if limit_tokens is None else whole_number("limit_tokens", limit_tokens, least=1)
    reading = Reading(tuple(rows), to, skip_first, tuple(hooks), tuple(target_hooks), share, choose, limit_tokens, offload)
    with alone(checkpoint, processes()):
        collecting = Collecting(model, reading, checkpoint, checkpoint_every, note)
        total = collecting.run(tokens, show_progress, desc)
    _check_enough(total, reading, collecting.counts.rows)
    return total


@torch.no_grad()
def collect_held_out(model: LensModel, tokens: Any, reading: Reading, show_progress: bool | None = None) -> Evidence:
    """Evidence of a text of which every row is held out."""
    reading = replace(reading, held_out=1.0, choose=False, limit_tokens=None)
    return Collecting(model, reading, None, 1, None).run(tokens, show_progress, "held-out text")


class Collecting:
    """One pass over a text: the evidence so far, and the place in the text. Every number that changes is a field."""

    def __init__(self, model: LensModel, reading: Reading, file: str | Path | None, every: int, note: Mapping[str, Any] | None):
        self.model, self.reading, self.every = model, reading, whole_number("checkpoint_every", every, least=1)
        if reading.to is not None:
            check_tokenizers(model, reading.to)
        self.team = processes()
        settings = {**reading.settings(), "note": note}
        self.checkpoint = Checkpoint.of(file, "fit_regression", settings, self._models, self.team)
        self.total, self.bookmark, self.counts = reading.nothing, None, Counts()
        if (state := self.checkpoint.resume()) is not None:
            self.bookmark, self.counts = Bookmark.load(state["position"]), Counts(*state["counts"])
            self.total = evidence_of(state["evidence"], reading.rows) if self.team.first else reading.nothing
        check_edits(model, list(reading.hooks))  # every process makes its passes now, or none
        if reading.to is not None:
            check_edits(reading.to, list(reading.target_hooks))

    @property
    def _models(self) -> list[LensModel | None]:
        return [self.model, self.reading.to]

    def run(self, tokens: Any, show_progress: bool | None, desc: str = "regression") -> Evidence:
        """The evidence of the text and of all processes; `desc` is the bar's name."""
        text = Text.of(tokens)
        stream = text.stream(at=self.bookmark, endless=False)
        limit = self.reading.limit_tokens
        total = text.n_batches if show_progress is not False else None
        shown = progress(total=total, initial=self.counts.batches, desc=desc, show=show_progress if self.team.first else False)
        with shown as bar, closing(stream), self.team.together():
            for batch, bookmark in self.team.in_turn(stream, self._models):
                self.add(batch)
                self.bookmark = bookmark
                if limit and self.counts.positions:
                    needed = -(-limit * self.counts.batches // self.counts.positions)
                    set_total(bar, needed if total is None else min(total, needed))
                bar.update()
                if limit and self.counts.to_fit and self.counts.positions >= limit:
                    break
                if self.checkpoint.file is not None and self.counts.batches % self.every == 0:
                    self.save()
        return merged_evidence(self.total, self.team)

    def add(self, batch: Batch) -> None:
        """Add the evidence of this process' rows of a batch."""
        reading, counts, n = self.reading, self.counts, len(batch.tokens)
        sets = reading.sets(counts.rows, n)
        rows, index = self.team.rows_of(batch, counts.rows)
        with self.team.in_step(self._models, batch, 1):
            if rows is not None:
                try:
                    part = _part(self.model, rows, sets[:, index], reading)
                except NotFinite as error:
                    raise NotFinite(f"{error}, among the {n} rows behind row {counts.rows}") from None
                self.total = self.total + (on_device(part, "cpu") if reading.offload else part)
        used = used_positions(batch, reading.skip_first).cpu()
        self.counts = Counts(
            counts.positions + int(used.sum()), counts.rows + n, counts.to_fit + int(used[sets[0]].sum()), counts.batches + 1
        )  # fmt: skip

    def save(self) -> None:
        """Write a checkpoint: the sum goes to the first process, and the others begin again with nothing."""
        self.total = merged_evidence(self.total, self.team)
        assert self.bookmark is not None  # a batch was read
        state = {"position": self.bookmark.state(), "counts": list(self.counts), "evidence": evidence_tree(self.total)}
        self.checkpoint.keep(state, f"after {self.counts.rows} rows of text")
        self.total = self.total if self.team.first else self.reading.nothing


def _check_enough(total: Evidence, reading: Reading, n_rows: int) -> None:
    if not count(total.fit):
        if count(total.held_out):
            raise ValueError(f"no row of the text is left to fit on: all {n_rows} are held out; give more rows, or held_out=0")
        raise ValueError(
            "no position to fit on: the rows hold one token each and skip_first leaves none; pass skip_first=False or longer rows"
        )
    if reading.choose and not total.choose:
        raise ValueError(
            "choosing among ridge strengths needs at least 10 rows of text (every tenth is set aside): give more, or one strength"
        )


def _part(model: LensModel, batch: Batch, sets: Bool[Tensor, "sets batch"], reading: Reading) -> Evidence:
    """The evidence of one batch, each of whose rows is in one of the sets."""
    x, y, used, same = _both(model, batch, reading)
    kept = [used & chosen.to(used.device)[:, None] for chosen in sets]
    goals = reading.goals
    targets = [[goals.index(reading.rows[i][1]) for i in members] for members in groups_of(reading.rows).values()]
    parts = [grouped_moments([s[k] for s in x], [s[k] for s in y], targets) if k.any() else () for k in kept]
    return Evidence(reading.rows, *parts, agreed=None if same is None else int(same[kept[2]].sum()))


def _both(model: LensModel, batch: Batch, reading: Reading) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor | None]:
    """States `[batch, pos, d]` of sources and targets, positions to use, and where both models' argmax agree."""
    to, sources, goals, hooks = reading.to, reading.sources, reading.goals, list(reading.hooks)
    names = sources if to is not None else [*sources, *goals]
    output, seen, used, _ = states(model, batch, names, hooks, reading.skip_first)
    same = None
    x, there = [seen[name] for name in sources], seen
    if to is not None:
        text = Batch(*batch)  # without stored states, which are the source model's
        other, there, _, _ = states(to, text, goals, list(reading.target_hooks), reading.skip_first)
        same = output.logits(model).argmax(-1).to(used.device) == other.logits(to).argmax(-1).to(used.device)
    y = [there[name].to(used.device) for name in goals]
    for side, parts in (("source", x), ("target", y)):
        widths = sorted({part.shape[-1] for part in parts})
        if len(widths) > 1:
            raise ValueError(f"sites of different width ({side} widths {widths}) need separate fits")
    return [part.to(used.device) for part in x], y, used, same

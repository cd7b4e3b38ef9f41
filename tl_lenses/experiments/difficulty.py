"""Which predictions are hard? Those that settle late in the layers, and those that settle late in training: do the two agree?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.data import Batch, as_batches
from tl_lenses.evaluation import used_positions
from tl_lenses.experiments.choices import Question, check_lenses, layers_asked, scored
from tl_lenses.experiments.picture import Lines, Picture
from tl_lenses.experiments.ranks import percentiles, spearman, spearman_draws
from tl_lenses.experiments.report import Report, Table, named
from tl_lenses.hooks import residual_reads, run
from tl_lenses.lens import Lens
from tl_lenses.model import LensModel, check_model, n_layers, prepare
from tl_lenses.progress import progress

TOKENS, ENTROPY = "tokens", "entropy of the model"


@dataclass(frozen=True)
class Settled:
    """When the predictions of one set settled.

    Attributes:
        depth: by lens `[item]`, the first layer from which on its top choice is the model's.
        learned: `[item]`, the first training step from which on the model's top choice is the last one.
        entropy: `[item]`, of the model's final distribution, nats: how unsure it is, with no lens at all.
    """

    depth: dict[str, Int[Tensor, " item"]]
    learned: Int[Tensor, " item"]
    entropy: Float[Tensor, " item"]


@dataclass(frozen=True)
class Difficulty(Report):
    """Prediction depth and iteration learned of tokens and of questions.

    Attributes:
        steps: of the checkpoints, the finished model last.
        sets: `"tokens"`, and a set per task of the questions.
    """

    steps: list[int]
    sets: dict[str, Settled] = field(default_factory=dict)

    name = "difficulty"

    @property
    def lenses(self) -> list[str]:
        """Names of the lenses."""
        return list(next(iter(self.sets.values())).depth)

    def correlation(self, which: str, with_: str) -> tuple[float, float, float]:
        """Spearman's correlation of iteration learned with a lens's depth or the model's entropy; 95% interval over items."""
        one = self.sets[which]
        other = one.entropy if with_ == ENTROPY else one.depth[with_].double()
        learned = one.learned.double()
        low, high = percentiles(spearman_draws(other.double(), learned, seed=self.settings.get("seed", 0)))
        return float(spearman(other.double(), learned)), float(low), float(high)

    def difference(self, which: str, a: str, b: str) -> tuple[float, float, float]:
        """How much larger the correlation is with lens a than with lens b; interval over the same resampled items."""
        one, seed = self.sets[which], self.settings.get("seed", 0)
        draws = [spearman_draws(one.depth[x].double(), one.learned.double(), seed=seed) for x in (a, b)]
        low, high = percentiles(draws[0] - draws[1])
        return self.correlation(which, a)[0] - self.correlation(which, b)[0], float(low), float(high)

    def tables(self) -> list[Table]:
        """Correlations by set, then mean depth by the step at which a prediction was learned."""
        pair = len(self.lenses) == 2
        rows = []
        for which, one in self.sets.items():
            row: list[Any] = [which.replace("_", " "), str(len(one.learned))]
            row += [_interval(*self.correlation(which, name)) for name in [*self.lenses, ENTROPY]]
            rows.append([*row, *([_interval(*self.difference(which, *reversed(self.lenses)))] if pair else [])])
        more = [f"{self.lenses[1]} - {self.lenses[0]}"] if pair else []
        title = f"prediction depth against iteration learned, {self.model}"
        note = "Spearman's correlation (95% interval over items); the entropy needs no lens"
        first = Table(title, ["", "n", *self.lenses, ENTROPY, *more], rows, note, percent=False)
        rows = [
            [str(step), str(n), *(means[name] for name in self.lenses)]
            for step, (n, means) in self._by_step(TOKENS if TOKENS in self.sets else next(iter(self.sets))).items()
        ]
        return [
            first,
            Table("mean depth by step learned", ["step", "n", *self.lenses], rows, "tokens; in layers", percent=False),
        ]

    def _by_step(self, which: str) -> dict[int, tuple[int, dict[str, float]]]:
        one, found = self.sets[which], {}
        for step in self.steps:
            mine = one.learned == step
            found[step] = (int(mine.sum()), {name: float(x[mine].double().mean()) for name, x in one.depth.items()})
        return found

    def pictures(self) -> dict[str, Picture]:
        """Mean depth against the step learned."""
        which = TOKENS if TOKENS in self.sets else next(iter(self.sets))
        found = self._by_step(which)
        series = {
            name: [(float(max(step, 1)), means[name]) for step, (n, means) in found.items() if n]
            for name in self.lenses
        }
        title = f"Prediction depth, {which}, {self.model}"
        return {"depth": Lines(title, series, "training step after which the top token stays", "layer", log_x=True)}

    def rows(self) -> list[dict[str, Any]]:
        """A row per item."""
        return [
            {
                "set": which, "item": i, "learned": int(one.learned[i]), "entropy": float(one.entropy[i]),
                **{f"depth_{name}": int(x[i]) for name, x in one.depth.items()},
            }
            for which, one in self.sets.items()
            for i in range(len(one.learned))
        ]  # fmt: skip


def settled(top: Int[Tensor, "time item"]) -> Int[Tensor, " item"]:
    """The first time from which on every top choice is the last one's: `min {t : top[t'] = top[-1] for all t' >= t}`.

    Along layers this is the prediction depth, along checkpoints the iteration learned.

    >>> settled(torch.tensor([[7, 1], [2, 7], [2, 7]]))
    tensor([1, 1])
    """
    same = (top == top[-1]).flip(0).long().cumprod(0).sum(0)
    return len(top) - same


@torch.no_grad()
def difficulty(
    model: LensModel,
    lenses: Mapping[str, Lens],
    tokens: Any,
    checkpoints: Sequence[tuple[int, Any]],
    *,
    questions: Sequence[Question] = (),
    layers: Sequence[int] | None = None,
    n: int = 2000,
    skip_first: bool = True,
    seed: int = 0,
    show_progress: bool | None = None,
) -> Difficulty:
    """Prediction depth and iteration learned, per token and per question, and how they correlate.

    `depth = min {l : argmax lens_l' = argmax lens_L for all l' >= l}`; iteration learned is the same along checkpoints. The top
    choice of a token is the model's top-1 of the whole vocabulary, that of a question the likeliest of its choices.

    Args:
        model: the finished model.
        lenses: of that model, by name.
        tokens: text, as `evaluate` takes it.
        checkpoints: pairs `(step, model)` or `(step, function that loads it)` in order; the last one is `(step, model)` with the
            finished model. One that is loaded here is dropped before the next, so that only one is in memory.
        questions: examples with choices, grouped by their task.
        layers: `0..n_layers` by default; the last one is always there.
        n: positions, drawn at random.
        skip_first: leave out real position 0 of each row.
        seed: of the draw and the intervals.

    Raises:
        ValueError: fewer than three checkpoints, steps out of order, a last checkpoint that is another model, checkpoints of
            different vocabularies, a lens of another model, too little text.

    Source: Belrose et al. 2023 (Tuned Lens), section 5.3 and Table 2; Baldock et al. 2021 (prediction depth).

    Example:
        >>> early = [(s, lambda s=s: tll.lab.load("lab-neox", step=s)) for s in tll.lab.steps("lab-neox")[:-1]]  # doctest: +SKIP
        >>> print(difficulty(model, lenses, tokens, [*early, (2048, model)]))                                   # doctest: +SKIP
    """
    check_model(model, what="an experiment")
    rows = layers_asked(model, layers)
    rows = rows if rows[-1] == n_layers(model) else [*rows, n_layers(model)]
    check_lenses(model, lenses, rows)
    _check_checkpoints(model, checkpoints)
    batches, chosen = _drawn(model, tokens, n, skip_first, seed)
    tasks: dict[str, list[Question]] = {}
    for question in questions:
        tasks.setdefault(question.task or "questions", []).append(question)

    top, entropy = _tops(model, lenses, batches, chosen, rows)
    depth = {TOKENS: {name: _at(rows, settled(x)) for name, x in top.items()}}
    unsure = {TOKENS: entropy}
    for task, those in tasks.items():
        found = scored(model, lenses, those, layers=rows, show_progress=show_progress).logprobs
        depth[task] = {name: _at(rows, settled(x.argmax(-1).T)) for name, x in found.items()}
        unsure[task] = S.entropy(S.log_probs(next(iter(found.values()))[:, -1]))

    along: dict[str, list[Tensor]] = {which: [] for which in depth}
    for step, one in progress(checkpoints, desc="checkpoints", show=show_progress):
        one = one if hasattr(one, "hook_dict") else one()
        _check_vocabulary(model, one, step)
        along[TOKENS].append(torch.cat([_top(one, batch, at) for batch, at in zip(batches, chosen, strict=True)]))
        for task, those in tasks.items():
            final = scored(one, {"model": Lens(one)}, those, layers=[n_layers(one)], show_progress=False)
            along[task].append(final.logprobs["model"][:, -1].argmax(-1))
        del one
    steps = [step for step, _ in checkpoints]
    sets = {
        which: Settled(depth[which], _at(steps, settled(torch.stack(along[which]))), unsure[which].double())
        for which in depth
    }
    settings = {"n": len(entropy), "layers": rows, "lenses": list(lenses), "tasks": list(tasks), "seed": seed}
    return Difficulty(named(model), steps, sets, settings=settings)


def _interval(mean: float, low: float, high: float) -> str:
    return "–" if math.isnan(mean) else f"{mean:.2f} ({low:.2f}, {high:.2f})"


def _at(names: Sequence[int], index: Int[Tensor, " item"]) -> Int[Tensor, " item"]:
    return torch.tensor(list(names))[index]


def _check_checkpoints(model: LensModel, checkpoints: Sequence[tuple[int, Any]]) -> None:
    steps = [step for step, _ in checkpoints]
    if len(steps) < 3:
        raise ValueError(
            f"{len(steps)} checkpoints are too few to order anything: pass three at least, the finished model last"
        )
    if steps != sorted(set(steps)):
        raise ValueError(f"the steps of checkpoints must increase, got {steps}")
    if checkpoints[-1][1] is not model:
        raise ValueError("the last checkpoint must be the finished model itself, which the lenses read: (step, model)")
    for step, one in checkpoints:
        if hasattr(one, "hook_dict"):
            _check_vocabulary(model, one, step)
        elif not callable(one):
            raise TypeError(
                f"checkpoint {step} is a {type(one).__name__}: expected a model or a function that loads it"
            )


def _check_vocabulary(model: LensModel, other: Any, step: int) -> None:
    sizes = int(other.cfg.d_vocab), int(model.cfg.d_vocab)
    words = [getattr(getattr(one, "tokenizer", None), "get_vocab", dict)() for one in (other, model)]
    if sizes[0] != sizes[1] or (all(words) and words[0] != words[1]):
        raise ValueError(
            f"checkpoint {step} has another vocabulary ({sizes[0]} tokens, the finished model {sizes[1]}): their top tokens cannot "
            "be compared"
        )


def _drawn(model: LensModel, tokens: Any, n: int, skip_first: bool, seed: int) -> tuple[list[Batch], list[Tensor]]:
    """Batches with enough positions, and which of them are used."""
    batches, masks, count = [], [], 0
    for batch in as_batches(tokens):
        batch = prepare(model, batch.tokens, batch.attention_mask)
        used = used_positions(batch, skip_first).cpu()
        batches.append(batch)
        masks.append(used)
        count += int(used.sum())
        if count >= n:
            break
    if count < 10:
        raise ValueError(f"the text gives {count} positions, too few to correlate: pass more of it")
    keep = torch.zeros(count, dtype=torch.bool)
    keep[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:n]] = True
    chosen = []
    for used, part in zip(masks, keep.split([int(used.sum()) for used in masks]), strict=True):
        mine = torch.zeros_like(used)
        mine[used] = part
        chosen.append(mine)
    return batches, chosen


def _top(model: LensModel, batch: Batch, at: Tensor) -> Int[Tensor, " item"]:
    logits = run(model, batch.tokens, attention_mask=batch.attention_mask)
    return logits[at.to(logits.device)].argmax(-1).cpu()


def _tops(
    model: LensModel, lenses: Mapping[str, Lens], batches: list[Batch], chosen: list[Tensor], rows: list[int]
) -> tuple[dict[str, Int[Tensor, "layer item"]], Float[Tensor, " item"]]:
    """The likeliest token of every layer by lens, and the entropy of the model."""
    parts: dict[str, list[Tensor]] = {name: [] for name in lenses}
    entropy = []
    for batch, at in zip(batches, chosen, strict=True):
        seen: dict[Any, Tensor] = {}
        at = at.to(batch.tokens.device)
        logits = run(model, batch.tokens, residual_reads(model, rows, seen), attention_mask=batch.attention_mask)[at]
        entropy.append(S.entropy(S.log_probs(logits)).cpu())
        final = logits.argmax(-1).cpu()
        for name, lens in lenses.items():
            layers = [
                final
                if row == rows[-1]
                else torch.cat([lens[row](x).argmax(-1).cpu() for x in seen[row][at].split(256)])
                for row in rows
            ]
            parts[name].append(torch.stack(layers))
    return {name: torch.cat(those, 1) for name, those in parts.items()}, torch.cat(entropy)

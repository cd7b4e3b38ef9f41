"""Which predictions are hard? Do predictions that settle late in the layers settle late in training as well?"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.checks import seed_of, several, whole_number
from tl_lenses.experiments.choices import Question, scored
from tl_lenses.experiments.grid import Grid, Table, interval
from tl_lenses.experiments.report import Report
from tl_lenses.experiments.subject import Layers, Lenses, Subject, text_settings
from tl_lenses.lens import Lens
from tl_lenses.model import LensModel, n_layers
from tl_lenses.numerics import mean_interval, percentiles, spearman, spearman_draws
from tl_lenses.progress import progress
from tl_lenses.tokens import Batch
from tl_lenses.views import Picture

TOKENS, ENTROPY = "tokens", "entropy of the model"


@dataclass(frozen=True)
class Settled:
    """When the predictions of one set settled."""

    # by lens `[item]`, the first layer from which on its top choice is the model's
    depth: dict[str, Int[Tensor, " item"]]
    # `[item]`, the first training step from which on the model's top choice is the last one
    learned: Int[Tensor, " item"]
    # `[item]`, of the model's final distribution, nats: how unsure it is, with no lens at all
    entropy: Float[Tensor, " item"]


@dataclass(frozen=True, repr=False)
class Difficulty(Report):
    """Prediction depth and iteration learned of tokens and of questions.

    The grid has the axes set, step (of the checkpoints, the finished model last) and lens, and the values

    - `n` `[set, step]`: how many items were learned at a step;
    - `mean_depth`: their mean depth, in layers, with its 95% interval over items (`mean_depth_low`, `mean_depth_high`); NaN where
      there are none.

    Attributes:
        sets: `"tokens"`, and a set per task of the questions.
    """

    sets: dict[str, Settled] = field(default_factory=dict)

    name = "difficulty"

    @staticmethod
    def of(model: str, steps: list[int], sets: dict[str, Settled], settings: dict[str, Any]) -> "Difficulty":
        """Sets of items, with their mean depth by the step at which they were learned."""
        lenses = list(next(iter(sets.values())).depth)
        masks = [[items.learned == step for step in steps] for items in sets.values()]
        n = torch.tensor([[int(mask.sum()) for mask in row] for row in masks])
        of = [items.depth[lens][mask].double() for items, row in zip(sets.values(), masks, strict=True) for mask in row for lens in lenses]  # fmt: skip
        ends = zip(*(mean_interval(x, seed=settings.get("seed", 0)) for x in of), strict=True)
        depth = {
            f"mean_depth{end}": torch.stack(list(x)).view(*n.shape, len(lenses))
            for end, x in zip(("", "_low", "_high"), ([x.mean() for x in of], *ends), strict=True)
        }
        grid = Grid.over({"set": list(sets), "step": steps, "lens": lenses}, {"n": n, **depth})
        return Difficulty(model, sets, grid=grid, settings=settings)

    def correlation(self, which: str, with_: str) -> tuple[float, float, float]:
        """Spearman's correlation of iteration learned with a lens's depth or the model's entropy; 95% interval over items."""
        items = self.sets[which]
        other = (items.entropy if with_ == ENTROPY else items.depth[with_]).double()
        learned = items.learned.double()
        low, high = percentiles(spearman_draws(other, learned, seed=self.settings.get("seed", 0)))
        return float(spearman(other, learned)), float(low), float(high)

    def difference(self, which: str, a: str, b: str) -> tuple[float, float, float]:
        """How much larger the correlation is with lens a than with lens b; interval over the same resampled items."""
        items, seed = self.sets[which], self.settings.get("seed", 0)
        draws = [spearman_draws(items.depth[x].double(), items.learned.double(), seed=seed) for x in (a, b)]
        low, high = percentiles(draws[0] - draws[1])
        return self.correlation(which, a)[0] - self.correlation(which, b)[0], float(low), float(high)

    def tables(self) -> list[Table]:
        """Correlations by set, then mean depth by the step at which a prediction was learned."""
        pair = len(self.lenses) == 2
        rows = []
        for which, items in self.sets.items():
            row = [which.replace("_", " "), str(len(items.learned))]
            row += [interval(*self.correlation(which, name)) for name in [*self.lenses, ENTROPY]]
            rows.append([*row, *([interval(*self.difference(which, *reversed(self.lenses)))] if pair else [])])
        more = [f"{self.lenses[1]} - {self.lenses[0]}"] if pair else []
        title = f"prediction depth against iteration learned, {self.model}"
        note = "Spearman's correlation (95% interval over items); the entropy needs no lens"
        first = Table(title, ["", "n", *self.lenses, ENTROPY, *more], rows, note, percent=False)
        shown = self.grid.at(set=self._first())
        rows = [
            [str(step), str(int(n)), *depths.tolist()]
            for step, n, depths in zip(self.steps, shown["n"], shown["mean_depth"], strict=True)
        ]
        note = "tokens; in layers"
        return [first, Table("mean depth by step learned", ["step", "n", *self.lenses], rows, note, percent=False)]

    def _first(self) -> str:
        """The set that is shown by step: the tokens, where they are among the sets."""
        return TOKENS if TOKENS in self.sets else next(iter(self.sets))

    def pictures(self) -> dict[str, Picture]:
        """Mean depth against the step learned."""
        grid, title = self.grid.at(set=self._first()), f"Prediction depth, {self._first()}, {self.model}"
        seen = [step for step, n in zip(self.steps, grid["n"].tolist(), strict=True) if n]
        grid = grid.at(step=seen)
        grid = Grid({**grid.axes, "step": [float(max(step, 1)) for step in seen]}, grid.values)
        across = "training step after which the top token stays"
        return {"depth": grid.lines(title, "mean_depth", x="step", by="lens", across=across, up="layer", log_x=True)}

    def rows(self) -> list[dict[str, Any]]:
        """A row per item."""
        return [
            {
                "set": which, "item": i, "learned": int(items.learned[i]), "entropy": float(items.entropy[i]),
                **{f"depth_{name}": int(x[i]) for name, x in items.depth.items()},
            }
            for which, items in self.sets.items()
            for i in range(len(items.learned))
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
    model: LensModel, lenses: Lenses, tokens: Any, checkpoints: Sequence[tuple[int, Any]], *,
    questions: Sequence[Question] = (), layers: Layers = None, n: int = 2000,
    skip_first: bool = True, seed: int = 0, show_progress: bool | None = None,
) -> Difficulty:  # fmt: skip
    """Prediction depth and iteration learned, per token and per question, and how they correlate.

    `depth = min {l : argmax lens_l' = argmax lens_L for all l' >= l}`; iteration learned is the same along checkpoints. The top
    choice of a token is the model's top-1 of the whole vocabulary, that of a question the likeliest of its choices.

    Args:
        model: the finished model.
        lenses: of that model: a lens or `{name: lens}`.
        tokens: text, as `evaluate` takes it.
        checkpoints: pairs `(step, model)` or `(step, function that loads it)` in order; the last one is `(step, model)` with the
            finished model. One that is loaded here is dropped before the next, so that only one is in memory.
        questions: examples with choices, grouped by their task.
        layers: `0..n_layers` by default; the last one is always there.
        n: positions, drawn at random; from 10.
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
    subject = Subject.of(model, lenses, layers, what="difficulty", every=True)
    subject = replace(subject, layers=sorted({*subject.layers, subject.depth}))
    n, seed = whole_number("n", n, least=10), seed_of(seed)
    checkpoints = several("checkpoints", checkpoints, "(step, model)")
    questions = several("questions", questions, "questions")
    if wrong := [question for question in questions if not isinstance(question, Question)]:
        raise TypeError(f"expected a choices.Question, got {type(wrong[0]).__name__}")
    _check_checkpoints(model, checkpoints)
    batches = _chosen(subject, tokens, n, skip_first, seed)
    tasks: dict[str, list[Question]] = {}
    for question in questions:
        tasks.setdefault(question.task or "questions", []).append(question)

    top, entropy = _tops(subject, batches)
    layers, depth = subject.layers, {TOKENS: {name: _at(subject.layers, settled(x)) for name, x in top.items()}}
    unsure = {TOKENS: entropy}
    for task, asked in tasks.items():
        logprobs = scored(model, subject.lenses, asked, layers=layers, show_progress=show_progress).logprobs
        depth[task] = {name: _at(layers, settled(x.argmax(-1).T)) for name, x in logprobs.items()}
        unsure[task] = S.entropy(S.log_probs(next(iter(logprobs.values()))[:, -1]))

    along: dict[str, list[Tensor]] = {which: [] for which in depth}
    for step, checkpoint in progress(checkpoints, desc="checkpoints", show=show_progress):
        other = checkpoint if hasattr(checkpoint, "hook_dict") else checkpoint()
        _check_vocabulary(model, other, step)
        along[TOKENS].append(torch.cat([Subject(other).read(batch, at)[1].argmax(-1).cpu() for batch, at in batches]))
        for task, asked in tasks.items():
            final = scored(other, {"model": Lens(other)}, asked, layers=[n_layers(other)], show_progress=False)
            along[task].append(final.logprobs["model"][:, -1].argmax(-1))
        del other
    steps = [step for step, _ in checkpoints]
    sets = {which: Settled(depth[which], _at(steps, settled(torch.stack(along[which]))), unsure[which].double()) for which in depth}
    settings = {
        **text_settings(tokens), "n": len(entropy), "layers": layers, "lenses": list(subject.lenses), "tasks": list(tasks),
        "seed": seed,
    }  # fmt: skip
    return Difficulty.of(subject.name, steps, sets, settings)


def _at(names: Sequence[int], index: Int[Tensor, " item"]) -> Int[Tensor, " item"]:
    return torch.tensor(list(names))[index]


def _check_checkpoints(model: LensModel, checkpoints: Sequence[tuple[int, Any]]) -> None:
    if wrong := [pair for pair in checkpoints if not isinstance(pair, (tuple, list)) or len(pair) != 2]:
        raise TypeError(f"a checkpoint is a pair (step, model), got {type(wrong[0]).__name__}")
    steps = [whole_number("a step", step) for step, _ in checkpoints]
    if len(steps) < 3:
        raise ValueError(f"{len(steps)} checkpoints are too few to order anything: pass three at least, the finished model last")
    if steps != sorted(set(steps)):
        raise ValueError(f"the steps of checkpoints must increase, got {steps}")
    if checkpoints[-1][1] is not model:
        raise ValueError("the last checkpoint must be the finished model itself, which the lenses read: (step, model)")
    for step, checkpoint in checkpoints:
        if hasattr(checkpoint, "hook_dict"):
            _check_vocabulary(model, checkpoint, step)
        elif not callable(checkpoint):
            kind = type(checkpoint).__name__
            raise TypeError(f"checkpoint {step} is a {kind}: expected a model or a function that loads it")


def _check_vocabulary(model: LensModel, other: Any, step: int) -> None:
    sizes = int(other.cfg.d_vocab), int(model.cfg.d_vocab)
    words = [getattr(getattr(x, "tokenizer", None), "get_vocab", dict)() for x in (other, model)]
    if sizes[0] != sizes[1] or (all(words) and words[0] != words[1]):
        raise ValueError(
            f"checkpoint {step} has another vocabulary ({sizes[0]} tokens, the finished model {sizes[1]}): their top tokens cannot "
            "be compared"
        )


def _chosen(subject: Subject, tokens: Any, n: int, skip_first: bool, seed: int) -> list[tuple[Batch, Tensor]]:
    """Batches with enough positions, each with a mask of the drawn ones."""
    batches, masks, count = [], [], 0
    for batch, used in subject.batches(tokens, skip_first=skip_first):
        batches.append(batch)
        masks.append(used.cpu())
        count += int(used.sum())
        if count >= n:
            break
    if count < 10:
        raise ValueError(f"the text gives {count} positions, too few to correlate: pass more of it")
    keep = torch.zeros(count, dtype=torch.bool)
    keep[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:n]] = True
    chosen = []
    for batch, used, part in zip(batches, masks, keep.split([int(used.sum()) for used in masks]), strict=True):
        at = torch.zeros_like(used)
        at[used] = part
        chosen.append((batch, at.to(batch.tokens.device)))
    return chosen


def _tops(
    subject: Subject, batches: list[tuple[Batch, Tensor]]
) -> tuple[dict[str, Int[Tensor, "layer item"]], Float[Tensor, " item"]]:
    """The likeliest token of every layer by lens, and the entropy of the model; the last layer is the model itself."""
    parts: dict[str, list[Tensor]] = {name: [] for name in subject.lenses}
    entropy = []
    for batch, at in batches:
        states, logits = subject.read(batch, at)
        entropy.append(S.entropy(S.log_probs(logits)).cpu())
        final = logits.argmax(-1).cpu()
        for name, lens in subject.lenses.items():
            tops = [torch.cat([lens[layer](x).argmax(-1).cpu() for x in states[layer].split(256)]) for layer in subject.layers[:-1]]
            parts[name].append(torch.stack([*tops, final]))
    return {name: torch.cat(columns, 1) for name, columns in parts.items()}, torch.cat(entropy)

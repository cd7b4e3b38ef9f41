"""Can a prompt with an injected instruction be told by its prediction trajectory? Detectors that have seen normal prompts only.

Features are the log-probabilities of the answers at every layer, or, where there are no answers, statistics of every layer's
prediction; the rivals are distances of the final state, which need no lens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.checks import several, some_of, whole_number
from tl_lenses.experiments.choices import Question, Scored, scored
from tl_lenses.experiments.grid import Grid, Table, interval
from tl_lenses.experiments.injections import Task
from tl_lenses.experiments.report import Report
from tl_lenses.experiments.subject import Layers, Lenses, Subject
from tl_lenses.lens import Lens
from tl_lenses.model import LensModel
from tl_lenses.numerics import DRAWS, auroc, ledoit_wolf, percentiles, resampled
from tl_lenses.views import Picture

FOREST, LOF, SVM = "iForest", "LOF", "OC-SVM"
SRM, MAHALANOBIS = "final state, SRM", "final state, Mahalanobis"
NORMAL = "normal"
DETECTORS = (FOREST, LOF, SVM)
TRAIN = 0.75  # of the normal questions: scikit-learn's default share, which the paper took


@dataclass(frozen=True, repr=False)
class Detection(Report):
    """AUROC of every detector on every task and attack.

    The grid has the axes task, method (`"lens, detector"` or a baseline), attack and condition (the attacks, after "normal"),
    and the values

    - `auroc` `[task, method, attack]`: mean over the splits; 1 is perfect, 0.5 chance;
    - `low`, `high`: 95% interval over splits and resampled questions;
    - `accuracy` `[task, condition]`: share of right answers of the model; NaN without answers;
    - `obeyed` `[task, condition]`: share of answers that the injected instruction asked for; NaN where none is;
    - `shrinkage` `[task]`: mean weight of the identity in SRM's covariance.
    """

    name = "detection"

    def tables(self) -> list[Table]:
        """A table per attack, and how the attacks change the answers."""
        tables = []
        for a, attack in enumerate(self.attacks):
            rows = [
                [method, *(interval(*(float(x[t, m, a]) for x in (self.auroc, self.low, self.high))) for t in range(len(self.tasks)))]
                for m, method in enumerate(self.methods)
            ]  # fmt: skip
            note = "" if a else "AUROC, mean (95% interval) over splits; fitted on normal prompts only"
            columns = ["", *(task.replace("_", " ") for task in self.tasks)]
            tables.append(Table(f"{attack}, {self.model}", columns, rows, note, percent=False))
        rows = []
        for t, task in enumerate(self.tasks):
            obeyed = [float(x) for x in self.obeyed[t, 1:] if not x.isnan()]
            rows.append([task, *map(float, self.accuracy[t]), *(obeyed[:1] or [float("nan")])])
        columns = ["share right", NORMAL, *self.attacks, "obeyed"]
        note = (
            f"n = {self.settings['n']} a task; instructions: {self.settings.get('source', 'given')}; obeyed: the answer that "
            f"the instruction asks for; shrinkage of the covariance {float(self.shrinkage.mean()):.2f}"
        )
        return [*tables, Table("answers of the model", columns, rows, note)]

    def pictures(self) -> dict[str, Picture]:
        """Mean AUROC over the tasks by method and attack; then the tasks one by one, with intervals over splits: a picture an attack."""
        means = self.grid.mean("task").heat(
            f"AUROC, mean over tasks, {self.model}", "auroc", down="method", across="attack", low=0.5, high=1.0, labels=("", "attack")
        )  # fmt: skip
        pictures: dict[str, Picture] = {"heat": means}
        for attack in self.attacks:
            grid = self.grid.at(attack=attack)
            pictures[f"tasks-{attack}"] = grid.lines(
                f"AUROC, {attack}, {self.model}", "auroc", x="task", by="method", ends={"auroc": ("low", "high")}, up="AUROC, 95% over splits",
                bars=True,
            )  # fmt: skip
        return pictures

    def rows(self) -> list[dict[str, Any]]:
        """A row per task, method and attack."""
        accuracy = {(row["task"], row["condition"]): row["accuracy"] for row in self.grid.rows("accuracy")}
        return [
            {
                **row, "accuracy": accuracy[row["task"], NORMAL],
                "accuracy_injected": accuracy[row["task"], row["attack"]],
            }
            for row in self.grid.rows("auroc", "low", "high")
        ]  # fmt: skip


def detection(
    model: LensModel, lenses: Lenses, tasks: Sequence[Task], *, detectors: Sequence[str] = DETECTORS,
    layers: Layers = None, splits: int = 10, neighbors: int = 20, draws: int = DRAWS,
    seed: int = 0, batch_size: int = 16, show_progress: bool | None = None,
) -> Detection:  # fmt: skip
    """AUROC of anomaly detectors that are fitted on normal prompts and see normal and injected ones.

    The features of a question are `[log p_l(choice)]` for all layers and choices, flattened (paper), or entropy, largest
    probability, KL to the model and the log-probability of the model's top token per layer where it has no choices. In each of
    `splits` splits a detector is fitted on three quarters of the groups of normal questions, and scores the other normal
    questions and all injected ones. The baselines take the final residual (before the norm) at the last token: SRM's
    `m(x) = (x - mu)^T S^-1 (x - mu) - (x - mu)^T diag(S)^-1 (x - mu)`, and its first term alone.

    Args:
        tasks: from `injections.tasks_of`, or of your own: any normal and anomalous prompts.
        detectors: of scikit-learn (extra `detect`), with its defaults.
        layers: of the features; `0..n_layers` by default.
        neighbors: of Local Outlier Factor.
        draws: bootstrap draws of the intervals; each takes a split and resamples its questions.
        seed: of splits, forests and draws.

    Raises:
        ValueError: a task with normal or with injected prompts only, fewer examples than a detector needs, a detector that
            is not known, a lens of another model.
        ImportError: scikit-learn is missing.

    Source: Belrose et al. 2023 (Tuned Lens), section 5.2 and Table 1; SRM: Bai et al. 2022.

    Example:
        >>> print(detection(model, {"tuned": lens}, tasks_of(read_facts())))      # doctest: +SKIP
    """
    subject = Subject.of(model, lenses, layers, what="detection", every=True)
    detectors, seed = some_of("detectors", detectors, DETECTORS), whole_number("seed", seed, least=0, most=2**32 - 1)
    splits, neighbors = whole_number("splits", splits, least=1), whole_number("neighbors", neighbors, least=1)
    draws, batch_size = whole_number("draws", draws, least=1), whole_number("batch_size", batch_size, least=1)
    tasks = several("tasks", tasks, "tasks")
    if wrong := [task for task in tasks if not isinstance(task, Task)]:
        raise TypeError(f"expected injections.Task, got {type(wrong[0]).__name__}: see injections.tasks_of")
    attacks = _attacks(tasks)
    halves = [_splits(task, splits, seed, neighbors if LOF in detectors else 1) for task in tasks]
    make = {name: _maker(name, neighbors) for name in detectors}
    every = sorted({*subject.layers, subject.depth})

    methods = [f"{lens}, {detector}" for lens in subject.lenses for detector in detectors] + [SRM, MAHALANOBIS]
    mean, low, high = torch.zeros(3, len(tasks), len(methods), len(attacks)).unbind(0)
    accuracy, obeyed = torch.full((2, len(tasks), len(attacks) + 1), torch.nan).unbind(0)
    shrinkage = torch.zeros(len(tasks))
    for t, task in enumerate(tasks):
        conditions = [task.normal, *(task.injected[attack] for attack in attacks)]
        everything = [question for questions in conditions for question in questions]
        ends = torch.tensor([0, *map(len, conditions)]).cumsum(0).tolist()
        parts = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
        asked = scored(model, subject.lenses, everything, layers=every, batch_size=batch_size, show_progress=show_progress)
        for c, part in enumerate(parts):
            accuracy[t, c], obeyed[t, c] = _answers(asked.logprobs, everything[part], part)
        scores, weight = _scores(subject, asked, make, halves[t], seed)
        shrinkage[t] = weight
        tests = [test for _, test in halves[t]]
        for m in range(len(methods)):
            for a, part in enumerate(parts[1:]):
                each = torch.stack([auroc(x[test], x[part]) for x, test in zip(scores[m], tests, strict=True)])
                bounds = percentiles(_bootstrap(scores[m], tests, part, draws, seed))
                mean[t, m, a], low[t, m, a], high[t, m, a] = each.mean(), *bounds
    names = [task.name for task in tasks]
    settings = {
        "data": ", ".join(names), "n": len(tasks[0].normal), "splits": splits, "train": TRAIN, "neighbors": neighbors,
        "layers": subject.layers, "seed": seed, "bos": subject.bos,
    }  # fmt: skip
    axes, by_condition = ("task", "method", "attack"), ("task", "condition")
    grid = Grid(
        {"task": names, "method": methods, "attack": attacks, "condition": [NORMAL, *attacks]},
        {
            "auroc": (axes, mean), "low": (axes, low), "high": (axes, high), "accuracy": (by_condition, accuracy),
            "obeyed": (by_condition, obeyed), "shrinkage": (("task",), shrinkage),
        },
    )  # fmt: skip
    return Detection(subject.name, grid=grid, settings=settings)


def _scores(
    subject: Subject,
    asked: Scored,
    make: Mapping[str, Callable[[Tensor, Tensor, int], Tensor]],
    halves: Sequence[tuple[Tensor, Tensor]],
    seed: int,
) -> tuple[list[list[Tensor]], Tensor]:
    """How unusual every question is by method and split, the baselines last, and the mean weight of the identity."""
    features = {name: _features(lens, asked.last, asked.logprobs[name], subject.layers) for name, lens in subject.lenses.items()}
    final, shrinkage = asked.last[:, -1].double(), torch.zeros(())
    scores: list[list[Tensor]] = [[] for _ in range(len(features) * len(make) + 2)]
    for s, (train, _) in enumerate(halves):
        whole, diagonal, weight = mahalanobis(final[train], final)
        unusual = [detect(x[train], x, seed + s) for x in features.values() for detect in make.values()]
        for method, x in zip(scores, [*unusual, whole - diagonal, whole], strict=True):
            method.append(x)
        shrinkage += weight / len(halves)
    return scores, shrinkage


def mahalanobis(train: Float[Tensor, "n d"], x: Float[Tensor, "m d"]) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"], float]:
    """`(x - mu)^T S^-1 (x - mu)`, the same with diag(S), and how far S was shrunk. Their difference is SRM's score.

    With fewer prompts than dimensions the sample covariance is singular, so S is Ledoit and Wolf's
    `(1 - w) S_n + w tr(S_n) / d I`, whose weight w goes to 0 as n grows.

    Source: Bai et al. 2022 (SRM) as cited by Belrose et al. 2023; Ledoit and Wolf 2004, section 3.2.
    """
    mu = train.mean(0)
    covariance, weight = ledoit_wolf(train - mu)
    away = x - mu
    whole = (away * torch.linalg.solve(covariance, away.T).T).sum(1)
    return whole, (away**2 / covariance.diagonal()).sum(1), weight


def _attacks(tasks: Sequence[Task]) -> list[str]:
    if not tasks:
        raise ValueError("no tasks: pass at least one, see injections.tasks_of")
    attacks = list(tasks[0].injected)
    for task in tasks:
        if not task.normal or not task.injected or not all(task.injected.values()):
            raise ValueError(
                f"the task {task.name!r} has one class only ({len(task.normal)} normal prompts, "
                f"{sum(map(len, task.injected.values()))} injected): AUROC needs both"
            )
        if list(task.injected) != attacks:
            raise ValueError(f"the tasks differ in their attacks: {attacks} and {list(task.injected)} of {task.name!r}")
    return attacks


def _splits(task: Task, splits: int, seed: int, neighbors: int) -> list[tuple[Tensor, Tensor]]:
    """Normal questions to fit on and to test on; a group is never in both."""
    groups: dict[Any, list[int]] = {}
    for i, question in enumerate(task.normal):
        groups.setdefault(i if question.group is None else question.group, []).append(i)
    names = list(groups)
    cut = round(TRAIN * len(names))
    generator = torch.Generator().manual_seed(seed)
    halves = []
    for _ in range(splits):
        order = torch.randperm(len(names), generator=generator).tolist()
        train, test = ([i for at in part for i in groups[names[at]]] for part in (order[:cut], order[cut:]))
        if len(train) < neighbors + 1 or not test:
            raise ValueError(
                f"the task {task.name!r} has {len(task.normal)} normal prompts in {len(names)} groups, {len(train)} to fit on: a detector "
                f"needs {neighbors + 1} and one to test on. Pass more prompts or fewer neighbors"
            )
        halves.append((torch.tensor(train), torch.tensor(test)))
    return halves


def _maker(name: str, neighbors: int) -> Callable[[Tensor, Tensor, int], Tensor]:
    """A function (train, x, seed) -> how unusual each x is."""
    try:
        from sklearn.ensemble import IsolationForest
        from sklearn.neighbors import LocalOutlierFactor
        from sklearn.svm import OneClassSVM
    except ImportError:
        raise ImportError("the detectors need scikit-learn: pip install tl-lenses[detect]") from None
    makers: dict[str, Callable[[int], Any]] = {
        FOREST: lambda seed: IsolationForest(random_state=seed),
        LOF: lambda seed: LocalOutlierFactor(n_neighbors=neighbors, novelty=True),
        SVM: lambda seed: OneClassSVM(),
    }

    def unusual(train: Tensor, x: Tensor, seed: int) -> Tensor:
        fitted = makers[name](seed).fit(train.numpy())
        return -torch.as_tensor(fitted.score_samples(x.numpy())).double()

    return unusual


@torch.no_grad()
def _features(
    lens: Lens, last: Float[Tensor, "n layer d"], logprobs: Float[Tensor, "n layer choice"], rows: list[int]
) -> Float[Tensor, "n feature"]:
    """Choices by layer, or statistics by layer where there are none. `last` always ends with the final layer."""
    if logprobs.shape[-1]:
        return logprobs[:, : len(rows)].flatten(1).double()
    logits = lambda layer, x: S.log_probs(lens[layer](x.to(lens.readout.weights()[0].device))).cpu()
    final, statistics = logits(lens.n_layers, last[:, -1]), []
    for at, layer in enumerate(rows):
        logp = logits(layer, last[:, at])
        top = final.argmax(-1)
        of_layer = [S.entropy(logp), logp.max(-1).values.exp(), S.kl(final, logp), S.target_logprob(logp, top)]
        statistics.append(torch.stack(of_layer, -1))
    return torch.cat(statistics, -1).double()


def _answers(
    logprobs: Mapping[str, Float[Tensor, "n layer choice"]], questions: Sequence[Question], part: slice
) -> tuple[float, float]:
    """How often the model's likeliest choice is the right one, and the one that an instruction wants. Layer n_layers of any lens."""
    at_end = next(iter(logprobs.values()))[part, -1]
    if not at_end.shape[-1]:
        return torch.nan, torch.nan
    answered = at_end.argmax(-1)
    share = lambda goal: float((answered == goal)[goal >= 0].float().mean()) if bool((goal >= 0).any()) else torch.nan
    return share(torch.tensor([q.right for q in questions])), share(torch.tensor([q.instructed for q in questions]))


def _bootstrap(scores: Sequence[Tensor], tests: Sequence[Tensor], part: slice, draws: int, seed: int) -> Float[Tensor, " draw"]:
    """AUROC of resampled questions, as many draws from every split."""
    parts, each = [], -(-draws // len(scores))
    pick = lambda x, seed: x[resampled(len(x), each, seed)]
    for s, (x, test) in enumerate(zip(scores, tests, strict=True)):
        parts.append(auroc(pick(x[test], seed + 2 * s), pick(x[part], seed + 2 * s + 1)))
    return torch.cat(parts)

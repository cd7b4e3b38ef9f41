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
from tl_lenses.experiments.choices import Question, check_lenses, layers_asked, scored
from tl_lenses.experiments.injections import Task
from tl_lenses.experiments.picture import Heat, Picture
from tl_lenses.experiments.ranks import DRAWS, auroc, percentiles, resampled
from tl_lenses.experiments.report import Report, Table, named
from tl_lenses.lens import Lens
from tl_lenses.model import LensModel, check_model, n_layers

FOREST, LOF, SVM = "iForest", "LOF", "OC-SVM"
SRM, MAHALANOBIS = "final state, SRM", "final state, Mahalanobis"
DETECTORS = (FOREST, LOF, SVM)
TRAIN = 0.75  # of the normal questions; what scikit-learn splits off by default, as the paper did


@dataclass(frozen=True)
class Detection(Report):
    """AUROC of every detector on every task and attack.

    Attributes:
        tasks, methods, attacks: names along the axes; a method is `"lens, detector"` or a baseline.
        auroc: mean over the splits, `[task, method, attack]`; 1 is perfect, 0.5 chance.
        low, high: 95% interval over splits and resampled questions.
        accuracy: share of right answers of the model, `[task, 1 + attack]`, the normal prompts first; NaN without answers.
        obeyed: share of answers that the injected instruction asked for, `[task, 1 + attack]`; NaN where none is.
        shrinkage: mean weight of the identity in SRM's covariance, by task.
    """

    tasks: list[str]
    methods: list[str]
    attacks: list[str]
    auroc: Float[Tensor, "task method attack"]
    low: Float[Tensor, "task method attack"]
    high: Float[Tensor, "task method attack"]
    accuracy: Float[Tensor, "task condition"]
    obeyed: Float[Tensor, "task condition"]
    shrinkage: Float[Tensor, " task"]

    name = "detection"

    def tables(self) -> list[Table]:
        """A table per attack, and what the attacks do to the answers."""
        found = []
        for a, attack in enumerate(self.attacks):
            rows = [
                [method, *(self._cell(t, m, a) for t in range(len(self.tasks)))]
                for m, method in enumerate(self.methods)
            ]
            note = "AUROC, mean (95% interval) over splits; fitted on normal prompts only" if a == 0 else ""
            found.append(
                Table(
                    f"{attack}, {self.model}",
                    ["", *(t.replace("_", " ") for t in self.tasks)],
                    rows,
                    note,
                    percent=False,
                )
            )
        rows = []
        for t, task in enumerate(self.tasks):
            follow = [float(x) for x in self.obeyed[t, 1:] if not x.isnan()]
            rows.append([task, *map(float, self.accuracy[t]), *(follow[:1] or [float("nan")])])
        columns = ["share right", "normal", *self.attacks, "obeyed"]
        note = (
            f"n = {self.settings['n']} a task; instructions: {self.settings.get('source', 'given')}; obeyed: the answer that "
            f"the instruction asks for; shrinkage of the covariance {float(self.shrinkage.mean()):.2f}"
        )
        return [*found, Table("answers of the model", columns, rows, note)]

    def _cell(self, t: int, m: int, a: int) -> str:
        mean, low, high = (float(x[t, m, a]) for x in (self.auroc, self.low, self.high))
        return f"{mean:.2f} ({low:.2f}, {high:.2f})"

    def pictures(self) -> dict[str, Picture]:
        """Mean AUROC over the tasks by method and attack; then one picture an attack, by task."""
        heat = lambda title, values, across, what: Heat(
            title, self.methods, across, values.tolist(), "", what, low=0.5, high=1.0
        )
        found: dict[str, Picture] = {
            "heat": heat(f"AUROC, mean over tasks, {self.model}", self.auroc.mean(0), self.attacks, "attack")
        }
        for a, attack in enumerate(self.attacks):
            title = f"AUROC, {attack}, {self.model}"
            found[f"heat-{attack}"] = heat(title, self.auroc[:, :, a].T, self.tasks, "task")
        return found

    def rows(self) -> list[dict[str, Any]]:
        """A row per task, method and attack."""
        return [
            {
                "task": task, "method": method, "attack": attack, "auroc": float(self.auroc[t, m, a]),
                "low": float(self.low[t, m, a]), "high": float(self.high[t, m, a]),
                "accuracy": float(self.accuracy[t, 0]), "accuracy_injected": float(self.accuracy[t, a + 1]),
            }
            for t, task in enumerate(self.tasks)
            for m, method in enumerate(self.methods)
            for a, attack in enumerate(self.attacks)
        ]  # fmt: skip


def detection(
    model: LensModel,
    lenses: Mapping[str, Lens],
    tasks: Sequence[Task],
    *,
    detectors: Sequence[str] = DETECTORS,
    layers: Sequence[int] | None = None,
    splits: int = 10,
    neighbors: int = 20,
    draws: int = DRAWS,
    seed: int = 0,
    batch_size: int = 16,
    show_progress: bool | None = None,
) -> Detection:
    """AUROC of anomaly detectors that are fitted on normal prompts and see normal and injected ones.

    The features of a question are `[log p_l(choice)]` for all layers and choices, flattened (paper), or entropy, largest
    probability, KL to the model and the log-probability of the model's top token per layer where it has no choices. In each of
    `splits` splits a detector is fitted on three quarters of the groups of normal questions, and scores the other normal
    questions and all injected ones. The baselines take the final residual (before the norm) at the last token: SRM's
    `m(x) = (x - mu)^T S^-1 (x - mu) - (x - mu)^T diag(S)^-1 (x - mu)`, and its first term alone.

    Args:
        lenses: by name.
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
    check_model(model, what="an experiment")
    rows = layers_asked(model, layers)
    check_lenses(model, lenses, rows)
    if not lenses:
        raise ValueError("no lenses: pass at least one, such as {'logit': Lens(model)}")
    if unknown := [name for name in detectors if name not in DETECTORS]:
        raise ValueError(f"no detector {unknown[0]!r}; there are {list(DETECTORS)}")
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    attacks = _attacks(tasks)
    halves = [_splits(task, splits, seed, neighbors if LOF in detectors else 1) for task in tasks]
    make = {name: _maker(name, neighbors) for name in detectors}

    methods = [f"{lens}, {detector}" for lens in lenses for detector in detectors] + [SRM, MAHALANOBIS]
    shape = (len(tasks), len(methods), len(attacks))
    mean, low, high = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    accuracy, obeyed = torch.full((2, len(tasks), len(attacks) + 1), torch.nan).unbind(0)
    shrinkage = torch.zeros(len(tasks))
    for t, task in enumerate(tasks):
        conditions = [task.normal, *(task.injected[attack] for attack in attacks)]
        everything = [question for those in conditions for question in those]
        ends = torch.tensor([0, *(len(those) for those in conditions)]).cumsum(0).tolist()
        parts = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
        found = scored(
            model, lenses, everything, layers=sorted({*rows, n_layers(model)}), batch_size=batch_size,
            show_progress=show_progress,
        )  # fmt: skip
        features = {name: _features(lens, found.last, found.logprobs[name], rows) for name, lens in lenses.items()}
        for c, part in enumerate(parts):
            accuracy[t, c], obeyed[t, c] = _answers(found.logprobs, everything[part], part)
        scores: list[list[Tensor]] = [[] for _ in methods]
        for s, (train, _) in enumerate(halves[t]):
            for m, method in enumerate(methods[:-2]):
                lens, _, detector = method.rpartition(", ")
                scores[m].append(make[detector](features[lens][train], features[lens], seed + s))
            final = found.last[:, -1].double()
            whole, diagonal, weight = mahalanobis(final[train], final)
            scores[-2].append(whole - diagonal)
            scores[-1].append(whole)
            shrinkage[t] += weight / splits
        tests = [test for _, test in halves[t]]
        for m in range(len(methods)):
            for a, part in enumerate(parts[1:]):
                each = torch.stack([auroc(one[test], one[part]) for one, test in zip(scores[m], tests, strict=True)])
                bounds = percentiles(_bootstrap(scores[m], tests, part, draws, seed))
                mean[t, m, a], low[t, m, a], high[t, m, a] = each.mean(), *bounds
    settings = {
        "n": len(tasks[0].normal), "splits": splits, "train": TRAIN, "neighbors": neighbors, "layers": rows, "seed": seed,
    }  # fmt: skip
    return Detection(
        named(model), [task.name for task in tasks], methods, attacks, mean, low, high, accuracy, obeyed, shrinkage,
        settings=settings,
    )  # fmt: skip


def mahalanobis(
    train: Float[Tensor, "n d"], x: Float[Tensor, "m d"]
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"], float]:
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


def ledoit_wolf(x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "d d"], float]:
    """The covariance of centred samples, shrunk to a multiple of the identity, and the weight of that."""
    n, d = x.shape
    sample = x.T @ x / n
    goal = sample.diagonal().mean()
    distance = (sample**2).sum() - d * goal**2
    noise = (((x**2).sum(1) ** 2).mean() - (sample**2).sum()) / n
    weight = float((noise / distance).clamp(0, 1)) if distance > 0 else 1.0
    eye = torch.eye(d, dtype=x.dtype, device=x.device)
    return (1 - weight) * sample + weight * goal * eye, weight


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
    found = []
    for _ in range(splits):
        order = torch.randperm(len(names), generator=generator).tolist()
        train, test = ([i for at in part for i in groups[names[at]]] for part in (order[:cut], order[cut:]))
        if len(train) < neighbors + 1 or not test:
            raise ValueError(
                f"the task {task.name!r} has {len(task.normal)} normal prompts in {len(names)} groups, {len(train)} to fit on: a detector "
                f"needs {neighbors + 1} and one to test on. Pass more prompts or fewer neighbors"
            )
        found.append((torch.tensor(train), torch.tensor(test)))
    return found


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
    final, found = logits(lens.n_layers, last[:, -1]), []
    for at, layer in enumerate(rows):
        logp = logits(layer, last[:, at])
        top = final.argmax(-1)
        found.append(
            torch.stack(
                [S.entropy(logp), logp.max(-1).values.exp(), S.kl(final, logp), S.target_logprob(logp, top)], -1
            )
        )
    return torch.cat(found, -1).double()


def _answers(
    logprobs: Mapping[str, Float[Tensor, "n layer choice"]],
    questions: Sequence[Question],
    part: slice,
) -> tuple[float, float]:
    """How often the model's likeliest choice is the right one, and the one that an instruction wants. Layer n_layers of any lens."""
    at_end = next(iter(logprobs.values()))[part, -1]
    if not at_end.shape[-1]:
        return torch.nan, torch.nan
    said = at_end.argmax(-1)
    share = lambda goal: float((said == goal)[goal >= 0].float().mean()) if bool((goal >= 0).any()) else torch.nan
    return share(torch.tensor([q.right for q in questions])), share(torch.tensor([q.wanted for q in questions]))


def _bootstrap(
    scores: Sequence[Tensor], tests: Sequence[Tensor], part: slice, draws: int, seed: int
) -> Float[Tensor, " draw"]:
    """AUROC of resampled questions, as many draws from every split."""
    found = []
    for s, (one, test) in enumerate(zip(scores, tests, strict=True)):
        normal, anomalous = one[test], one[part]
        each = -(-draws // len(scores))
        found.append(
            auroc(
                normal[resampled(len(normal), each, seed + 2 * s)],
                anomalous[resampled(len(anomalous), each, seed + 2 * s + 1)],
            )
        )
    return torch.cat(found)

"""Which attributes of a subject can be read from its vector? A question with a patched placeholder, beside a trained probe."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.checks import seed_of, whole_number
from tl_lenses.deprecation import renamed
from tl_lenses.experiments.common import CONDITIONS, RUN, UNPATCHED, Cells, Controlled, Result, scores_of, vectors_of
from tl_lenses.experiments.facts import Fact, Facts, contains, contaminated, drawn, facts_of, known, source_of, target_of, texts_of
from tl_lenses.experiments.faithful import identification
from tl_lenses.experiments.grid import Table
from tl_lenses.experiments.subject import Layers, Subject
from tl_lenses.model import LensModel
from tl_lenses.patchscopes import Source, patchscope
from tl_lenses.progress import progress

FOLDS = 3


@dataclass(frozen=True, repr=False)
class Attributes(Result):
    """Hits of every fact in every cell, by condition, with the probe beside them.

    Attributes:
        facts: the items.
        probe: `[item, layer]`, whether a logistic regression trained on other folds names the object; None without
            scikit-learn.
        left_out: per relation, how many facts were left out, and why.
        identified: `[item, cell]`, whether a text is likeliest under its own vector, among the vectors of ten items of its relation.
    """

    facts: list[Fact] = field(default_factory=list)
    probe: Float[Tensor, "item layer"] | None = None
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    identified: Float[Tensor, "item cell"] | None = None

    name = "attributes"

    @property
    def relations(self) -> list[str]:
        """Relations that have items."""
        return list(dict.fromkeys(fact.relation for fact in self.facts))

    def items(self, relation: str) -> list[int]:
        """The items of a relation."""
        return [i for i, fact in enumerate(self.facts) if fact.relation == relation]

    def tables(self) -> list[Table]:
        """Conditions in three numbers, the profile over source layers, and the relations."""
        n, identified = len(self.facts), self.cells.over_targets(self.identified)
        by_layer = self.cells.profile(*RUN, probe=self._probed(range(n)), identified=identified)
        title, note = "by source layer: any target layer has it", "identified: mean over target layers"
        return [
            self.cells.table(f"attribute extraction, {self.model}: {n} facts of {len(self.relations)} relations"),
            by_layer.table(title, "score", across="condition", columns=["l"], percent=True, note=note),
            self._by_relation(),
        ]

    def _by_relation(self) -> Table:
        """The paper's table: the mean over source layers of the share that any target layer has, and the probe's."""
        rows: list[list[Any]] = []
        for relation in self.relations:
            items = self.items(relation)
            part = self.cells.subset(items)
            patched, *controls = part.profile(*RUN)["score"].tolist()
            layers = torch.tensor(patched)
            spread = 100 * float(layers.std()) if len(layers) > 1 else 0.0
            rows.append(
                [
                    relation, str(len(items)), str(len({self.facts[i].object for i in items})), float(layers.mean()),
                    f"{spread:.1f}", max(sum(x) / len(x) for x in controls), part.summary().held_out,
                    float(self._probed(items).mean()),
                ]
            )  # fmt: skip
        empty = [relation for relation in self.left_out if relation not in self.relations]
        rows += [[relation, "0", "", None, None, None, None, None] for relation in empty]
        reasons: Counter[str] = Counter()
        for counts in self.left_out.values():
            reasons.update(counts)
        note = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        return Table(
            "by relation: mean over source layers (±: their spread) of what any target layer has",
            ["relation", "n", "objects", "patched", "±", "best control", "held-out", "probe"],
            rows,
            f"left out: {note}" if note else "",
        )

    def _probed(self, items: Iterable[int]) -> Float[Tensor, " layer"]:
        """The probe's mean over items, by source layer; NaN without a probe."""
        if self.probe is None:
            return torch.full((len(self.layers),), math.nan, dtype=torch.float64)
        return self.probe[list(items)].double().mean(0)

    def rows(self) -> list[dict[str, Any]]:
        """A row per relation, condition and cell; the probe has a source layer only."""
        rows, cells = [], self.cells.beside(identified=self.identified)
        for relation in self.relations:
            items = self.items(relation)
            rows += cells.subset(items).rows(relation=relation)
            if self.probe is not None:
                rows += [
                    {"relation": relation, "condition": "probe", "layer": layer, "target_layer": None}
                    | {"score": score, "items": len(items)}
                    for layer, score in zip(self.layers, self._probed(items).tolist(), strict=True)
                ]
        return rows


@renamed(limit="n")
@torch.no_grad()
def attributes(
    model: LensModel, facts: Facts = None, *, layers: Layers = None,
    target_layers: Layers = None, max_new_tokens: int = 20, n: int | None = 60, text: str = "{}",
    guard: bool = True, smallest: int = 3, seed: int = 0, show_progress: bool | None = None,
) -> Attributes:  # fmt: skip
    """Ask for attributes of a subject with its vector in the place of a placeholder, in every cell (l, l*).

    Only facts that this model knows are asked for: with the real subject in the question, its text has the object.

    Args:
        facts: `read_facts(...)`, or the path that it takes; the bundled ones by default.
        layers: source layers, `0..n_layers` by default.
        target_layers: `0..n_layers - 1` by default: in the last one nothing is left to compute.
        max_new_tokens: of the text in which the object is looked for (up to the first newline).
        n: facts in all, the same number of each relation; None takes all.
        text: where a subject is read that comes without a sentence.
        guard: leave out facts whose object is in the target prompt, in its unpatched text, or in the subject: a hit
            there proves nothing. Questions that list their answers are left out entirely.
        smallest: relations with fewer facts, or a single object, are left out.
        seed: of the draw and the controls.

    Returns:
        `Attributes`. The controls go through the same cells: the vector of a subject with another object, a random one
        of the same length, the mean of the relation's vectors, and the prompt unpatched.

    Raises:
        ValueError: the model knows none of the facts; a layer that is not there; a number out of range.

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 4.2; probe: logistic regression per layer, 3 folds.

    Example:
        >>> print(attributes(model, "lre-relations"))      # doctest: +SKIP
    """
    subject = Subject.of(model, layers=layers, what="attributes")
    pairs = subject.pairs(target_layers)
    n = None if n is None else whole_number("n", n, least=2)
    max_new_tokens, seed = whole_number("max_new_tokens", max_new_tokens, least=1), seed_of(seed)
    given, data = facts_of(facts)
    relations, left_out = _usable(model, given, n, whole_number("smallest", smallest, least=1), max_new_tokens, guard, seed)
    items = [fact for members in relations.values() for fact in members]
    if not items:
        raise ValueError(
            f"none of the {len(given)} facts can be asked for: the model does not know them, or the guard leaves them out ({left_out})"
        )
    scores, probes, identified = [], [], []
    with progress(total=len(items), desc="attributes", show=show_progress) as bar:
        for name, members in relations.items():
            vectors = vectors_of(model, [source_of(model, fact, text) for fact in members])
            score, found = _asked(model, members, vectors, pairs, max_new_tokens, seed)
            scores.append(score)
            identified.append(found)
            probes.append(probe(vectors[:, subject.layers], [fact.object for fact in members], seed))
            bar.set_postfix_str(name)
            bar.update(len(members))
    cells = Cells(
        pairs,
        {name: torch.cat([part[name] for part in scores]) for name in CONDITIONS},
        [(fact.relation, fact.subject) for fact in items],
        seed=seed,
    )
    right = [x for x in probes if x is not None]
    return Attributes(
        subject.name, cells, items, torch.cat(right) if len(right) == len(probes) else None, left_out, torch.cat(identified),
        settings={
            "data": data, "bos": subject.bos, "max_new_tokens": max_new_tokens, "limit": n, "text": text, "guard": guard, "seed": seed,
            "templates": {name: members[0].template for name, members in relations.items()},
        },
    )  # fmt: skip


def _usable(
    model: LensModel, facts: list[Fact], n: int | None, smallest: int, max_new_tokens: int, guard: bool, seed: int
) -> tuple[dict[str, list[Fact]], dict[str, dict[str, int]]]:
    """Facts to ask for by relation, and how many were left out for which reason."""
    n_relations = len({fact.relation for fact in facts})
    share = None if n is None else max(-(-n // max(n_relations, 1)), smallest)
    chosen: dict[str, list[Fact]] = {}
    left_out: dict[str, dict[str, int]] = {}
    for name, members in drawn(facts, None if share is None else 4 * share, seed).items():
        usable, left_out[name] = _usable_of_relation(model, members, share, max_new_tokens, guard)
        if len(usable) < smallest or len({fact.object for fact in usable}) < 2:
            left_out[name]["in relations that are too small"] = len(usable)
        else:
            chosen[name] = usable
    return chosen, left_out


def _usable_of_relation(
    model: LensModel, facts: list[Fact], share: int | None, max_new_tokens: int, guard: bool
) -> tuple[list[Fact], dict[str, int]]:
    """The first facts that the model knows and that a hit would prove, and why others were left out."""
    usable: list[Fact] = []
    reasons: dict[str, int] = {}
    prompt = str(target_of(model, facts[0].template).prompt)
    unpatched = texts_of(model, [prompt], max_new_tokens)[0]
    size = share or len(facts)
    for start in range(0, len(facts), size):
        part = facts[start : start + size]
        for fact, knows in zip(part, known(model, part, max_new_tokens), strict=True):
            why = contaminated(fact, prompt, unpatched) if guard else ""
            reason = f"with the object {why}" if why else "" if knows else "that the model does not know"
            if reason:
                reasons[reason] = reasons.get(reason, 0) + 1
            elif share is None or len(usable) < share:
                usable.append(fact)
        if share is not None and len(usable) >= share:
            break
    return usable, reasons


def _asked(
    model: LensModel, facts: list[Fact], vectors: Float[Tensor, "n layer d"], pairs: list[Any], max_new_tokens: int, seed: int
) -> tuple[dict[str, Float[Tensor, "item cell"]], Float[Tensor, "item cell"]]:  # fmt: skip
    """Hits by condition of one relation (one template in the files of the paper and of LRE), and which texts are identified."""
    target, answers = target_of(model, facts[0].template), [fact.object for fact in facts]
    identified: list[Tensor] = []

    def asked(source: Source) -> list[list[str]]:
        result = patchscope(
            model, source, target, pairs=pairs, max_new_tokens=max_new_tokens, stop=_newline(model), keep="top_k",
            show_progress=False,
        )  # fmt: skip
        identified.append(identification(result, len(facts), seed=seed))
        return result.text or []

    texts = Controlled.of(vectors, answers, seed).ask(asked)
    texts[UNPATCHED] = [texts_of(model, [str(target.prompt)], max_new_tokens)] * len(facts)
    return scores_of(texts, answers, contains), identified[0]


def _newline(model: LensModel) -> tuple[str, ...]:
    """The stop string of one line, where the tokenizer can write it."""
    tokenizer: Any = model.tokenizer  # type: ignore[attr-defined]
    return ("\n",) if "\n" in tokenizer.decode(tokenizer.encode("\n", add_special_tokens=False)) else ()


def probe(vectors: Float[Tensor, "n layer d"], answers: Sequence[str], seed: int = 0) -> Float[Tensor, "n layer"] | None:
    """Whether a logistic regression per layer, trained on the other folds, names the answer; None without scikit-learn.

    An answer that is in one fold only can never be named: that is the probe's limit, not an error.
    """
    try:
        from sklearn.dummy import DummyClassifier
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        return None
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed)).tolist()
    right = torch.zeros(vectors.shape[:2])
    for fold in range(FOLDS):
        test = order[fold::FOLDS]
        train = [i for i in order if i not in set(test)]
        named = [answers[i] for i in train]
        for layer in range(vectors.shape[1] if test and train else 0):
            x = vectors[:, layer].float().cpu().numpy()
            many = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
            model = many if len(set(named)) > 1 else DummyClassifier()
            for i, guess in zip(test, model.fit(x[train], named).predict(x[test]), strict=True):
                right[i, layer] = float(answers[i] == guess)
    return right

"""Which attributes of a subject can be read from its vector? A question with a patched placeholder, beside a trained probe."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.experiments.common import (
    MEAN,
    PATCHED,
    RANDOM,
    SHUFFLED,
    UNPATCHED,
    Cells,
    Result,
    Table,
    named,
    others,
    random_like,
    vectors_of,
)
from tl_lenses.experiments.facts import (
    Fact,
    contains,
    contaminated,
    drawn,
    known,
    source_of,
    target_of,
    texts_of,
)
from tl_lenses.model import LensModel, check_model, n_layers
from tl_lenses.patchscopes import Source, patchscope
from tl_lenses.progress import progress

FOLDS = 3


@dataclass(frozen=True)
class Attributes(Result):
    """Hits of every fact in every cell, by condition, with the probe beside them.

    Attributes:
        facts: the items.
        probe: `[item, layer]`, whether a logistic regression trained on other folds names the object; None without
            scikit-learn.
        left_out: per relation, how many facts were left out, and why.
    """

    facts: list[Fact] = field(default_factory=list)
    probe: Float[Tensor, "item layer"] | None = None
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)

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
        n, k = len(self.facts), len(self.relations)
        summary = self.cells.table(f"attribute extraction, {self.model}: {n} facts of {k} relations")
        conditions = [c for c in self.cells.scores if c != UNPATCHED]
        profiles = {c: self.cells.by_source_layer(c) for c in conditions}
        rows = [
            [str(layer), *(profiles[c][layer] for c in conditions), self._probed(range(n), i)]
            for i, layer in enumerate(profiles[PATCHED])
        ]
        by_layer = Table("by source layer: any target layer has it", ["l", *conditions, "probe"], rows)
        return [summary, by_layer, self._by_relation()]

    def _by_relation(self) -> Table:
        """The paper's table: the mean over source layers of what any target layer has, and the probe's."""
        rows = []
        for relation in self.relations:
            mine = self.items(relation)
            part = self.cells.subset(mine)
            layers = torch.tensor(list(part.by_source_layer().values()))
            spread = 100 * float(layers.std()) if len(layers) > 1 else 0.0
            average = lambda c, part=part: sum(found := part.by_source_layer(c).values()) / len(found)
            rows.append(
                [
                    relation, str(len(mine)), str(len({self.facts[i].object for i in mine})), float(layers.mean()),
                    f"{spread:.1f}", max(map(average, (SHUFFLED, RANDOM, MEAN))), part.summary().held_out, self._probed(mine),
                ]
            )  # fmt: skip
        for relation in self.left_out:
            if relation not in self.relations:
                rows.append([relation, "0", "", None, None, None, None, None])
        columns = ["relation", "n", "objects", "patched", "±", "best control", "held-out", "probe"]
        reasons: dict[str, int] = {}
        for found in self.left_out.values():
            for reason, count in found.items():
                reasons[reason] = reasons.get(reason, 0) + count
        note = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        return Table(
            "by relation: mean over source layers (±: their spread) of what any target layer has", columns, rows,
            f"left out: {note}" if note else "",
        )  # fmt: skip

    def _probed(self, items: Iterable[int], layer: int | None = None) -> float:
        if self.probe is None:
            return math.nan
        x = self.probe[list(items)].double()
        return float((x if layer is None else x[:, layer]).mean())

    def rows(self) -> list[dict[str, Any]]:
        """A row per relation, condition and cell; the probe has a source layer only."""
        found = []
        for relation in self.relations:
            mine = self.items(relation)
            found += self.cells.subset(mine).rows(relation=relation)
            if self.probe is not None:
                layers = list(dict.fromkeys(a for a, _ in self.cells.pairs))
                for layer, value in zip(layers, self.probe[mine].double().mean(0).tolist(), strict=True):
                    found.append(
                        {"relation": relation, "condition": "probe", "layer": layer, "target_layer": None}
                        | {"score": value, "items": len(mine)}
                    )
        return found


@torch.no_grad()
def attributes(
    model: LensModel,
    facts: Sequence[Fact],
    *,
    layers: Iterable[int] | None = None,
    target_layers: Iterable[int] | None = None,
    max_new_tokens: int = 20,
    limit: int | None = 60,
    text: str = "{}",
    guard: bool = True,
    smallest: int = 3,
    seed: int = 0,
    show_progress: bool | None = None,
) -> Attributes:
    """Ask for attributes of a subject with its vector in the place of a placeholder, in every cell (l, l*).

    Only facts that this model knows are asked for: with the real subject in the question, its text has the object.

    Args:
        model: of both runs.
        facts: `read_facts(...)`.
        layers: source layers, `0..n_layers` by default.
        target_layers: `0..n_layers - 1` by default: in the last one nothing is left to compute.
        max_new_tokens: of the text in which the object is looked for (up to the first newline).
        limit: facts in all, the same number of each relation; None takes all.
        text: where a subject is read that comes without a sentence.
        guard: leave out facts whose object is in the target prompt, in its unpatched text, or in the subject: a hit
            there proves nothing. Questions that list their answers are left out entirely.
        smallest: relations with fewer facts, or a single object, are left out.
        seed: of the draw and the controls.

    Returns:
        `Attributes`. The controls go through the same cells: the vector of a subject with another object, a random one
        of the same length, the mean of the relation's vectors, and the prompt unpatched.

    Raises:
        ValueError: the model knows none of the facts.

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 4.2; probe: logistic regression per layer, 3 folds.

    Example:
        >>> print(attributes(model, read_facts("lre-relations")))      # doctest: +SKIP
    """
    check_model(model, what="an experiment")
    depth = n_layers(model)
    rows = list(range(depth + 1)) if layers is None else [range(depth + 1)[layer] for layer in layers]
    columns = list(range(depth)) if target_layers is None else list(target_layers)
    n_relations = len({fact.relation for fact in facts})
    share = None if limit is None else max(-(-limit // max(n_relations, 1)), smallest)
    left_out: dict[str, dict[str, int]] = {}
    chosen = {
        name: _usable(model, those, share, max_new_tokens, guard, left_out.setdefault(name, {}))
        for name, those in drawn(facts, 10**9 if share is None else 4 * share, seed).items()
    }
    for name, those in chosen.items():
        if len(those) < smallest or len({fact.object for fact in those}) < 2:
            left_out[name]["in relations that are too small"] = len(those)
            chosen[name] = []
    items = [fact for those in chosen.values() for fact in those]
    if not items:
        raise ValueError(
            f"none of the {len(facts)} facts can be asked for: the model does not know them, or the guard leaves them out ({left_out})"
        )

    pairs: list[Any] = []
    parts: list[dict[str, Tensor]] = []
    probed: list[Tensor | None] = []
    with progress(total=len(items), desc="attributes", show=show_progress) as bar:
        for name, those in chosen.items():
            if not those:
                continue
            vectors = vectors_of(model, [source_of(model, fact, text) for fact in those])
            # One template a relation; the files of the paper and of LRE have it so.
            scores, pairs = _asked(model, those, vectors, rows, columns, max_new_tokens, seed)
            parts.append(scores)
            probed.append(probe(vectors[:, rows], [fact.object for fact in those], seed))
            bar.set_postfix_str(name)
            bar.update(len(those))
    cells = Cells(
        pairs,
        {c: torch.cat([part[c] for part in parts]) for c in parts[0]},
        [(fact.relation, fact.subject) for fact in items],
        seed=seed,
    )
    probes = [x for x in probed if x is not None]
    return Attributes(
        named(model), cells, items, torch.cat(probes) if len(probes) == len(probed) else None, left_out,
        settings={
            "max_new_tokens": max_new_tokens, "limit": limit, "text": text, "guard": guard, "seed": seed,
            "templates": {name: those[0].template for name, those in chosen.items() if those},
        },
    )  # fmt: skip


def _usable(
    model: LensModel, facts: list[Fact], share: int | None, n_new: int, guard: bool, reasons: dict[str, int]
) -> list[Fact]:
    """The first facts that the model knows and that a hit would prove."""
    found: list[Fact] = []
    prompt = target_of(model, facts[0].template).prompt
    unpatched = texts_of(model, [str(prompt)], n_new)[0]
    size = share or len(facts)
    for start in range(0, len(facts), size):
        part = facts[start : start + size]
        for fact, knows in zip(part, known(model, part, n_new), strict=True):
            why = contaminated(fact, str(prompt), unpatched) if guard else ""
            reason = f"with the object {why}" if why else "" if knows else "that the model does not know"
            if reason:
                reasons[reason] = reasons.get(reason, 0) + 1
            elif share is None or len(found) < share:
                found.append(fact)
        if share is not None and len(found) >= share:
            break
    return found


def _asked(
    model: LensModel, facts: list[Fact], vectors: Float[Tensor, "n layer d"], layers: list[int], target_layers: list[int],
    n_new: int, seed: int,
) -> tuple[dict[str, Tensor], list[Any]]:  # fmt: skip
    """Hits by condition of one relation, and its cells. A shuffled source needs no run: it is another item's."""
    n, target = len(facts), target_of(model, facts[0].template)
    sources = torch.cat([vectors, random_like(vectors, seed), vectors.mean(0, keepdim=True)])
    result = patchscope(
        model, Source(sources), target, layers, target_layers, max_new_tokens=n_new, stop=_newline(model),
        keep="top_k", show_progress=False,
    )  # fmt: skip
    texts = result.text or []
    objects = [fact.object for fact in facts]
    hits = lambda rows: torch.tensor(
        [[float(contains(cell, o)) for cell in texts[r]] for r, o in zip(rows, objects, strict=True)]
    )
    unpatched = texts_of(model, [str(target.prompt)], n_new)[0]
    scores = {
        PATCHED: hits(range(n)),
        SHUFFLED: hits(others(objects, seed)),
        RANDOM: hits(range(n, 2 * n)),
        MEAN: hits([2 * n] * n),
        UNPATCHED: torch.tensor([[float(contains(unpatched, o))] for o in objects]),
    }
    return scores, result.pairs


def _newline(model: LensModel) -> tuple[str, ...]:
    """The stop string of one line, where the tokenizer can write it."""
    tokenizer: Any = model.tokenizer  # type: ignore[attr-defined]
    return ("\n",) if "\n" in tokenizer.decode(tokenizer.encode("\n", add_special_tokens=False)) else ()


def probe(
    vectors: Float[Tensor, "n layer d"], answers: Sequence[str], seed: int = 0
) -> Float[Tensor, "n layer"] | None:
    """Whether a logistic regression per layer, trained on the other folds, names the answer; None without scikit-learn.

    An answer that is in one fold only can never be named: that is the probe's limit, not an error.

    Args:
        vectors: what the patchscope reads as well.
        answers: the classes.
        seed: of the folds.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        return None
    n, n_layers_ = vectors.shape[:2]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    right = torch.zeros(n, n_layers_)
    for fold in range(FOLDS):
        test = order[fold::FOLDS]
        train = [i for i in order if i not in set(test)]
        classes = {answers[i] for i in train}
        for layer in range(n_layers_ if test and train else 0):
            x = vectors[:, layer].float().cpu().numpy()
            if len(classes) == 1:
                guessed: Sequence[Any] = list(classes) * len(test)
            else:
                scaler = StandardScaler().fit(x[train])
                model = LogisticRegression(max_iter=200).fit(scaler.transform(x[train]), [answers[i] for i in train])
                guessed = model.predict(scaler.transform(x[test]))
            for i, guess in zip(test, guessed, strict=True):
                right[i, layer] = float(answers[i] == guess)
    return right

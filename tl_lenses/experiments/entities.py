"""When does a name become an entity? Descriptions of a bare name, layer by layer, scored against reference descriptions."""

import csv
import json
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

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
from tl_lenses.experiments.facts import PLACEHOLDER, read_facts, texts_of
from tl_lenses.experiments.picture import Picture
from tl_lenses.model import LensModel, check_model, n_layers
from tl_lenses.patchscopes import Source, Target, patchscope

EXAMPLES = 3


@dataclass(frozen=True)
class Entities(Result):
    """ROUGE-L of every description at every layer, by condition.

    Attributes:
        names: the entities.
        references: the descriptions that count as right.
        texts: `[entity][layer]`, what the model said.
    """

    names: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)

    name = "entities"

    @property
    def layers(self) -> list[int]:
        """Source layers; l* = l."""
        return [a for a, _ in self.cells.pairs]

    def tables(self) -> list[Table]:
        """Conditions in three numbers, the profile over layers, and what was said of one entity."""
        title = f"entity resolution, {self.model}: {len(self.names)} entities, ROUGE-L"
        conditions = [c for c in self.cells.scores if c != UNPATCHED]
        rows = [
            [str(layer), *(float(self.cells.mean(c)[i]) for c in conditions)] for i, layer in enumerate(self.layers)
        ]
        best = max(range(len(self.names)), key=lambda i: float(self.cells.scores[PATCHED][i].sum()))
        said = [[str(layer), self.texts[best][i][:60]] for i, layer in enumerate(self.layers)]
        return [
            self.cells.table(title, percent=False),
            Table("by layer", ["layer", *conditions], rows, percent=False),
            Table(f"what is said of {self.names[best]!r}", ["layer", "text"], said, percent=False),
        ]

    def pictures(self) -> dict[str, Picture]:
        """ROUGE-L by condition and layer."""
        high = max(0.1, *(float(x.double().mean(0).max()) for x in self.cells.scores.values()))
        return {"heat": self.cells.heat(f"ROUGE-L, {self.model}", high=high)}


def read_descriptions(path: str | Path | None = None) -> dict[str, str]:
    """Names and descriptions: a `.json` object, a `.csv` with the columns `subject` and `description`, or the built-in ones.

    Raises:
        ValueError: no such file, or nothing like that in it.
    """
    if path is None:
        return {fact.subject: fact.description for fact in read_facts() if fact.description}
    path = Path(path)
    if not path.is_file() or path.suffix not in (".json", ".csv"):
        raise ValueError(f"expected a .json or .csv file of subjects and descriptions, got {str(path)!r}")
    if path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, Mapping) or not all(isinstance(v, str) for v in content.values()):
            raise ValueError(f"{path} is no JSON object of names and descriptions")
        return dict(content)
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        if not {"subject", "description"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} has no columns subject and description, only {reader.fieldnames}")
        return {row["subject"]: row["description"] for row in reader}


@torch.no_grad()
def entities(
    model: LensModel,
    descriptions: Mapping[str, str],
    *,
    target: Target | None = None,
    layers: Iterable[int] | None = None,
    max_new_tokens: int = 50,
    limit: int | None = 60,
    seed: int = 0,
    show_progress: bool | None = None,
) -> Entities:
    """Describe entities from the vector of their bare name's last token, layer by layer (l* = l).

    Args:
        model: of both runs.
        descriptions: name -> reference.
        target: a few-shot prompt of descriptions that ends in the placeholder, such as
            `tll.scopes.entity_description()`. By default three of the entities, drawn at random, make the prompt and
            are not scored.
        layers: `0..n_layers` by default.
        max_new_tokens: of the description.
        limit: entities, drawn at random; None takes all.
        seed: of the draw and the controls.

    Returns:
        `Entities`. What is scored is the text up to the next entry of the list (`clipped`), by the F-measure of ROUGE-L.

    Raises:
        ValueError: fewer than two entities to score.
        ImportError: `rouge-score` is not installed (extra `experiments`).

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 4.3; Lin 2004 (ROUGE).

    Example:
        >>> print(entities(model, read_descriptions(), target=tll.scopes.entity_description()))      # doctest: +SKIP
    """
    check_model(model, what="an experiment")
    score = _rouge()
    wanted = list(range(n_layers(model) + 1)) if layers is None else [range(n_layers(model) + 1)[i] for i in layers]
    names = list(descriptions)
    random.Random(seed).shuffle(names)
    if target is None:
        shown, names = names[:EXAMPLES], names[EXAMPLES:]
        target = Target("".join(f"{name}: {descriptions[name]}, " for name in shown) + PLACEHOLDER)
    names = names[:limit]
    if len({descriptions[name] for name in names}) < 2:
        raise ValueError(
            f"{len(names)} entities are too few to score: pass at least two, and {EXAMPLES} for the prompt"
        )
    vectors = vectors_of(model, [Source(name) for name in names])
    n = len(names)
    result = patchscope(
        model, Source(torch.cat([vectors, random_like(vectors, seed), vectors.mean(0, keepdim=True)])), target, wanted,
        max_new_tokens=max_new_tokens, keep="top_k", show_progress=show_progress,
    )  # fmt: skip
    said = [[clipped(text) for text in row] for row in result.text or []]
    references = [descriptions[name] for name in names]
    scored = lambda rows: torch.tensor(
        [[score(text, r) for text in said[row]] for row, r in zip(rows, references, strict=True)]
    )
    prompt = target.prompt
    unpatched = clipped(texts_of(model, [prompt], max_new_tokens)[0]) if isinstance(prompt, str) else ""
    scores = {
        PATCHED: scored(range(n)),
        SHUFFLED: scored(others(references, seed)),
        RANDOM: scored(range(n, 2 * n)),
        MEAN: scored([2 * n] * n),
        UNPATCHED: torch.tensor([[score(unpatched, r)] for r in references]),
    }
    return Entities(
        named(model), Cells(result.pairs, scores, names, seed=seed), names, references, said[:n],
        settings={"target": prompt, "max_new_tokens": max_new_tokens, "seed": seed},
    )  # fmt: skip


def clipped(text: str) -> str:
    """The description in a generated text: behind the colon (a name is often completed first), before the next entry.

    >>> clipped("sonian: National museum, Pizza: food from Italy")
    'National museum'
    """
    text = text.split("\n")[0]
    head, colon, rest = text.partition(":")
    text = rest if colon and len(head) < 40 else text
    return re.split(r", [^,:]{1,60}:", text)[0].strip(" ,.")


def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ImportError("descriptions are scored with rouge-score: pip install tl-lenses[experiments]") from None
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return lambda text, reference: scorer.score(reference, text)["rougeL"].fmeasure

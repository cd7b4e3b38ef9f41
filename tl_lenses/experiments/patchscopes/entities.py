"""When does a name become an entity? Descriptions of a bare name, layer by layer, scored against reference descriptions."""

import csv
import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.checks import seed_of, whole_number
from tl_lenses.deprecation import renamed
from tl_lenses.experiments.common import PATCHED, RUN, UNPATCHED, Cells, Controlled, Result, scores_of, vectors_of
from tl_lenses.experiments.facts import PLACEHOLDER, read_facts, texts_of
from tl_lenses.experiments.faithful import identification
from tl_lenses.experiments.grid import Table
from tl_lenses.experiments.subject import Layers, Subject
from tl_lenses.files import as_path
from tl_lenses.model import LensModel
from tl_lenses.patchscopes import Source, Target, patchscope
from tl_lenses.views import Picture

EXAMPLES = 3


@dataclass(frozen=True, repr=False)
class Entities(Result):
    """ROUGE-L of every description at every layer (l* = l), by condition.

    Attributes:
        names: the entities.
        references: the descriptions that count as right.
        texts: `[entity][layer]`, the model's descriptions.
        identified: whether a description is likeliest under its own vector, among the vectors of ten entities (`tll.faithfulness`
            has the controls).
    """

    names: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    identified: Float[Tensor, "entity layer"] | None = None

    name = "entities"

    def tables(self) -> list[Table]:
        """Conditions in three numbers, the profile over layers, and the descriptions of one entity."""
        title = f"entity resolution, {self.model}: {len(self.names)} entities, ROUGE-L"
        by_layer = self.cells.profile(*RUN, identified=self.cells.over_targets(self.identified))
        best = max(range(len(self.names)), key=lambda i: float(self.cells.scores[PATCHED][i].sum()))
        descriptions = [[str(layer), text[:60]] for layer, text in zip(self.layers, self.texts[best], strict=True)]
        return [
            self.cells.table(title, percent=False),
            by_layer.table("by layer", "score", across="condition"),
            Table(f"what is said of {self.names[best]!r}", ["layer", "text"], descriptions, percent=False),
        ]

    def rows(self) -> list[dict[str, Any]]:
        """A row per condition and layer, and the share of descriptions that are identified."""
        return self.cells.beside(identified=self.identified).rows()

    def pictures(self) -> dict[str, Picture]:
        """ROUGE-L by condition and layer; then with their intervals."""
        high, title = max(0.1, *(float(self.cells.mean(name).max()) for name in self.cells.scores)), f"ROUGE-L, {self.model}"
        return {"heat": self.cells.heat(title, high=high), "layers": self.cells.lines(title, "ROUGE-L")}


def read_descriptions(path: str | Path | None = None) -> dict[str, str]:
    """Names and descriptions: a `.json` object, a `.csv` with the columns `subject` and `description`, or the built-in ones."""
    if path is None:
        return {fact.subject: fact.description for fact in read_facts() if fact.description}
    path = as_path(path)
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


@renamed(limit="n")
@torch.no_grad()
def entities(
    model: LensModel, descriptions: Mapping[str, str] | str | Path | None = None, *, target: Target | None = None,
    layers: Layers = None, max_new_tokens: int = 50, n: int | None = 60, seed: int = 0,
    show_progress: bool | None = None,
) -> Entities:  # fmt: skip
    """Describe entities from the vector of their bare name's last token, layer by layer (l* = l).

    Args:
        descriptions: name -> reference, or a path for `read_descriptions`; the bundled ones by default.
        target: a few-shot prompt of descriptions that ends in the placeholder, such as
            `tll.scopes.entity_description()`. By default three of the entities, drawn at random, make the prompt and
            are not scored.
        layers: `0..n_layers` by default.
        max_new_tokens: of the description.
        n: entities, drawn at random; None takes all.
        seed: of the draw and the controls.

    Returns:
        `Entities`. The score of a text, up to the next entry of the list (`clipped`), is the F-measure of ROUGE-L.

    Raises:
        ValueError: fewer than two entities to score; a layer that is not there; a number out of range.
        ImportError: `rouge-score` is not installed (extra `experiments`).

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 4.3; Lin 2004 (ROUGE).

    Example:
        >>> print(entities(model, target=tll.scopes.entity_description()))      # doctest: +SKIP
    """
    subject = Subject.of(model, layers=layers, what="entities")
    n = None if n is None else whole_number("n", n, least=2)
    max_new_tokens, seed = whole_number("max_new_tokens", max_new_tokens, least=1), seed_of(seed)
    score = _rouge()
    if isinstance(descriptions, Mapping):
        data = f"{len(descriptions)} descriptions"
    else:
        data = "bundled descriptions" if descriptions is None else as_path(descriptions).name
        descriptions = read_descriptions(descriptions)
    names = list(descriptions)
    random.Random(seed).shuffle(names)
    if target is None:
        shown, names = names[:EXAMPLES], names[EXAMPLES:]
        target = Target("".join(f"{name}: {descriptions[name]}, " for name in shown) + PLACEHOLDER)
    names = names[:n]
    references = [descriptions[name] for name in names]
    if len(set(references)) < 2:
        raise ValueError(f"{len(names)} entities are too few to score: pass at least two, and {EXAMPLES} for the prompt")

    identified: list[Tensor] = []

    def described(source: Source) -> list[list[str]]:
        result = patchscope(
            model, source, target, subject.layers, max_new_tokens=max_new_tokens, keep="top_k", show_progress=show_progress
        )  # fmt: skip
        identified.append(identification(result, len(names), seed=seed))
        return [[clipped(text) for text in row] for row in result.text or []]

    texts = Controlled.of(vectors_of(model, [Source(name) for name in names]), references, seed).ask(described)
    prompt = target.prompt
    unpatched = clipped(texts_of(model, [prompt], max_new_tokens)[0]) if isinstance(prompt, str) else ""
    texts[UNPATCHED] = [[unpatched]] * len(names)
    cells = Cells([(layer, layer) for layer in subject.layers], scores_of(texts, references, score), names, seed=seed)
    return Entities(
        subject.name, cells, names, references, texts[PATCHED], identified[0],
        settings={"data": data, "bos": subject.bos, "target": prompt, "max_new_tokens": max_new_tokens, "seed": seed},
    )  # fmt: skip


def clipped(text: str) -> str:
    """The description in a generated text: after the colon (a name is often completed first), before the next entry.

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

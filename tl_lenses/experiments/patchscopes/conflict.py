"""Who speaks, the vector or its reader? A source model that was taught other facts than the model that reads it."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tl_lenses.checks import one_of, seed_of, several, whole_number
from tl_lenses.experiments.facts import Fact, drawn, source_of, target_of, texts_of
from tl_lenses.experiments.grid import Grid, Table
from tl_lenses.experiments.report import Report
from tl_lenses.experiments.subject import Layers, Subject
from tl_lenses.lab import path
from tl_lenses.model import LensModel, tokenizer_of
from tl_lenses.patchscopes import Source, patchscope
from tl_lenses.patchscopes.scoring import text_scores
from tl_lenses.token_text import normalised
from tl_lenses.tokens import encode
from tl_lenses.views import Picture


@dataclass(frozen=True, repr=False)
class Conflict(Report):
    """Per cell (l, l*) the mean probability of both answers, over the axes "layer" and "target_layer".

    Attributes:
        to: name of the model that reads.
        facts: what the source model was taught, with its own object.
        others: what the reader knows, per fact.
        grid: "source", the probability of the source model's object; "reader", of the reader's; "lead", their difference;
            "share", of facts where the source model's object is the likelier one.
    """

    to: str = ""
    facts: list[Fact] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    name = "conflict"

    def tables(self) -> list[Table]:
        """Every source layer with the target layer that says most of either answer."""
        best = (self.grid["source"] + self.grid["reader"]).argmax(1)
        values = [self.grid[name] for name in ("source", "reader", "share")]
        rows = [
            [str(layer), str(self.grid.axes["target_layer"][b]), *(float(x[i, b]) for x in values)]
            for i, (layer, b) in enumerate(zip(self.grid.axes["layer"], best.tolist(), strict=True))
        ]
        title = f"who speaks: {self.model} read by {self.to}, {len(self.facts)} facts that both know differently"
        note = "l*: where either answer is the likeliest; share: of facts whose source model's object is the likelier one"
        return [Table(title, ["l", "l*", "P(source's)", "P(reader's)", "share"], rows, note, percent=False)]

    def pictures(self) -> dict[str, Picture]:
        """The difference of the probabilities: above 0 the vector speaks, below 0 its reader."""
        how = {"diverging": True, "low": -1.0, "high": 1.0, "labels": ("source layer l", "target layer l*")}
        title = "P(source model's object) - P(reader's object)"
        return {"who": self.grid.heat(title, "lead", down="layer", across="target_layer", **how)}


def conflicting(relations: Iterable[str] | None = None) -> tuple[list[Fact], list[str]]:
    """The facts that lab-gpt2-permuted was taught, and the objects that lab-gpt2 knows.

    Args:
        relations: some of its four; all by default.

    Raises:
        FileNotFoundError: the model is not at hand.
        ValueError: another relation.
    """
    taught = json.loads((path("lab-gpt2-permuted") / "facts.json").read_text(encoding="utf-8"))
    given = list(taught) if relations is None else several("relations", relations, "names")
    names = [one_of("a relation of lab-gpt2-permuted", name, list(taught)) for name in given]
    found = [
        (Fact(name, subject, new, taught[name]["template"]), true)
        for name in names for subject, (true, new) in taught[name]["pairs"].items()
    ]  # fmt: skip
    return [fact for fact, _ in found], [true for _, true in found]


@torch.no_grad()
def conflict(
    model: LensModel, to: LensModel, facts: Sequence[Fact], others: Sequence[str], *, layers: Layers = None,
    target_layers: Layers = None, of: Literal["subject", "answer"] = "subject", n: int | None = 40,
    text: str = "{}", seed: int = 0,
    show_progress: bool | None = None,
) -> Conflict:  # fmt: skip
    """Put the vector of a subject out of one model into the question of another model, which knows another answer.

    `P(o | T, h_M) - P(o* | T, h_M)` per (l, l*), for the object o that the source model M was taught and the object o*
    that its reader M* knows, both as whole texts. A method that reads the vector says o; one that knows says o*. With
    `of="answer"` both ends are known: while the models do not differ the reader says o*, and at l = l* = n_layers M's answer is read.

    Args:
        model: M.
        to: M*, of the same tokenizer and width.
        facts: with M's objects, such as `conflicting()`.
        others: M*'s objects.
        layers: source layers, `0..n_layers` by default.
        target_layers: `0..n_layers - 1` by default, of an answer `0..n_layers`.
        of: "subject", its last token in `text`, into the question of another word; or "answer", the last token of the question,
            where M is about to answer, into the same place of the same question.
        n: facts, of each relation the same number; None takes all. Only those that both models answer count.
        text: where a subject is read.
        seed: of the draw.

    Raises:
        ValueError: no fact that both models answer, each with its own object.

    Source: Li et al. 2026 (Do Activation Verbalization Methods Convey Privileged Information?), section 5.

    Example:
        >>> taught, model = tll.lab.load("lab-gpt2-permuted"), tll.lab.load()      # doctest: +SKIP
        >>> print(conflict(taught, model, *conflicting()))      # doctest: +SKIP
    """
    source = Subject.of(model, layers=layers, what="conflict")
    final = "default" if one_of("of", of, ("subject", "answer")) == "answer" else "asked"
    reader = Subject.of(to, layers=target_layers, what="conflict", final=final)
    n, seed = None if n is None else whole_number("n", n, least=1), seed_of(seed)
    rows, across = source.layers, reader.layers
    given, other = several("facts", facts, "facts"), several("others", others, "texts")
    if len(given) != len(other) or not given or not all(isinstance(fact, Fact) for fact in given):
        raise ValueError(f"expected an object in others for each experiments.Fact, got {len(given)} and {len(other)}")
    theirs = dict(zip(given, other, strict=True))
    questions = [fact.question for fact in given]
    says = [[normalised(said) for said in texts_of(one, questions, 8)] for one in (model, to)]
    says_it = lambda fact, ours, reads: ours.startswith(normalised(fact.object)) and reads.startswith(normalised(theirs[fact]))
    both = [fact for fact, *said in zip(given, *says, strict=True) if says_it(fact, *said)]
    if not both:
        raise ValueError(f"none of the {len(given)} facts is answered by both models, each with its own object")
    relations = drawn(both, None, seed)
    share = None if n is None else -(-n // len(relations))
    items = [fact for members in relations.values() for fact in members[:share]]
    probs = []
    for name in relations:
        part, same = [fact for fact in items if fact.relation == name], of == "answer"
        result = patchscope(
            model, [Source(fact.question) if same else source_of(model, fact, text) for fact in part],
            None if same else target_of(to, part[0].template), rows, across, to=to, max_new_tokens=8, keep="top_k",
            show_progress=show_progress,
        )  # fmt: skip
        answers = [f" {x}" for fact in part for x in (fact.object, theirs[fact])]
        ids = [[tuple(row)] * len(result.pairs) for row in encode(tokenizer_of(to), answers)]
        compared = torch.eye(len(part), dtype=torch.bool).repeat_interleave(2, 0)
        prompts = [of_source[0] for of_source in result.request.targets for _ in range(2)]
        scores = text_scores(result.request, ids, compared, prompts, show_progress=show_progress)
        each = scores.nan_to_num(-float("inf")).max(-1).values.exp()  # [pair, 2 x item]
        probs.append(each.reshape(len(rows), len(across), len(part), 2))
    p, q = torch.cat(probs, 2).unbind(-1)
    values = {"source": p, "reader": q, "lead": p - q, "share": (p > q).double()}
    axes: dict[str, Sequence[Any]] = {"layer": rows, "target_layer": across}
    return Conflict(
        source.name, grid=Grid.over(axes, {name: x.mean(-1) for name, x in values.items()}),
        settings={"of": of, "text": text, "seed": seed, "n": n, "relations": list(relations)}, to=reader.name, facts=items,
        others=[theirs[fact] for fact in items],
    )  # fmt: skip

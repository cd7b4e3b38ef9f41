"""Does a patch make two hops out of one? Single hops, two hops at once, and two hops with the first one's vector put in between."""

import random
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
    known,
    target_of,
    texts_of,
    two_hops,
)
from tl_lenses.experiments.picture import Picture
from tl_lenses.model import LensModel, check_model, n_layers
from tl_lenses.patchscopes import Source, Target, patchscope, scopes
from tl_lenses.progress import progress

THINK = "Let's think step by step. "
FORMS = ("placeholder", "same prompt", "masked")


@dataclass(frozen=True)
class Multihop(Result):
    """Hits of every query in every cell; `cells` is the placeholder form, `forms` has all.

    Attributes:
        queries: the two facts of each query.
        forms: cells by form. *placeholder*: the end of the first question ("Pizza originates from the country of") into
            the `x` of the second ("The capital of x is the city of"). *same prompt*: the end of the phrase "the country that
            Pizza comes from" into the token before it, in "The capital of the country that Pizza comes from". *masked*: the
            same, where the phrase has not seen what precedes it, and the answer follows "The capital of" at once.
        plain: `[query]` hits without a patch: the first hop, the second hop, two hops at once, and these after "Let's
            think step by step".
    """

    queries: list[tuple[Fact, Fact]] = field(default_factory=list)
    forms: dict[str, Cells] = field(default_factory=dict)
    plain: dict[str, Float[Tensor, " query"]] = field(default_factory=dict)

    name = "multihop"

    def tables(self) -> list[Table]:
        """Without a patch, then every form in three numbers."""
        n = len(self.queries)
        title = f"multi-hop correction, {self.model}: {n} queries whose two hops are known"
        rows = [[name, float(x.double().mean())] for name, x in self.plain.items()]
        return [
            Table(title, ["without a patch", "right"], rows),
            *(cells.table(f"patched, {form}") for form, cells in self.forms.items()),
        ]

    def pictures(self) -> dict[str, Picture]:
        """Accuracy by (l, l*), for every form."""
        found = {f"heat-{form.replace(' ', '-')}": c.heat(f"{form}, {self.model}") for form, c in self.forms.items()}
        return {"heat": self.cells.heat(f"two hops by a patch, {self.model}"), **dict(list(found.items())[1:])}

    def rows(self) -> list[dict[str, Any]]:
        """A row per form, condition and cell; without a patch there is one a condition."""
        plain = [
            {"form": "plain", "condition": name, "layer": None, "target_layer": None}
            | {"score": float(x.double().mean()), "items": len(x)}
            for name, x in self.plain.items()
        ]
        return plain + [row for form, cells in self.forms.items() for row in cells.rows(form=form)]


@torch.no_grad()
def multihop(
    model: LensModel,
    facts: Sequence[Fact],
    *,
    layers: Iterable[int] | None = None,
    target_layers: Iterable[int] | None = None,
    forms: Sequence[str] = FORMS,
    max_new_tokens: int = 20,
    limit: int | None = 24,
    guard: bool = True,
    seed: int = 0,
    show_progress: bool | None = None,
) -> Multihop:
    """Answer two-hop questions by patching, of which the model answers both hops alone.

    Args:
        model: of both runs.
        facts: `read_facts(...)`; where the object of one with a `phrase` is the subject of another, there is a query.
        layers: source layers, `0..n_layers` by default.
        target_layers: `0..n_layers - 1` by default.
        forms: which patched forms to run, of "placeholder", "same prompt", "masked".
        max_new_tokens: of the text in which the answer is looked for (up to the first newline).
        limit: queries, drawn at random; None takes all.
        guard: leave out queries whose answer is in a prompt or in the unpatched text of the second question.
        seed: of the draw and the controls.

    Returns:
        `Multihop`. The controls go through the same cells: the vector of a query with another answer, a random one of
        the same length, the mean of all, and no patch.

    Raises:
        ValueError: no query whose hops the model both knows, or an unknown form.

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 5: "same prompt" is its S = T = [pi2][pi1], and "masked" what
    makes this equivalent to S = pi1, T = pi2 (see `tll.scopes.multihop`).

    Example:
        >>> print(multihop(model, read_facts()))      # doctest: +SKIP
    """
    check_model(model, what="an experiment")
    if not forms or set(forms) - set(FORMS):
        raise ValueError(f"forms are some of {', '.join(FORMS)}, got {list(forms)}")
    depth = n_layers(model)
    rows = list(range(depth + 1)) if layers is None else [range(depth + 1)[layer] for layer in layers]
    columns = list(range(depth)) if target_layers is None else list(target_layers)
    queries = _usable(model, two_hops(facts), max_new_tokens, guard, limit, seed)
    answers = [two.object for _, two in queries]
    both = [_both(one, two) for one, two in queries]
    ask = lambda prompts, goals: torch.tensor(
        [float(contains(t, g)) for t, g in zip(texts_of(model, prompts, max_new_tokens), goals, strict=True)]
    )
    plain = {
        "first hop": ask([one.template.format(one.subject) for one, _ in queries], [one.object for one, _ in queries]),
        "second hop": ask([two.template.format(two.subject) for _, two in queries], answers),
        "two hops at once": ask(both, answers),
        "step by step": ask([THINK + text for text in both], answers),
    }
    found: dict[str, Cells] = {}
    names = [(one.relation, one.subject, two.relation) for one, two in queries]
    with progress(total=len(forms) * len(queries), desc="multihop", show=show_progress) as bar:
        for form in forms:
            bar.set_postfix_str(form)
            if form == FORMS[0]:
                pairs, scores = _placeholder(model, queries, rows, columns, max_new_tokens, seed)
            else:
                pairs, scores = _in_place(model, queries, rows, columns, max_new_tokens, seed, form == FORMS[2])
            found[form] = Cells(pairs, scores, names, seed=seed)
            bar.update(len(queries))
    return Multihop(
        named(model), next(iter(found.values())), queries, found, plain,
        settings={"max_new_tokens": max_new_tokens, "guard": guard, "seed": seed, "queries": both},
    )  # fmt: skip


def _both(one: Fact, two: Fact) -> str:
    """Both hops in one question."""
    return two.template.format(one.phrase.format(one.subject))


def _usable(
    model: LensModel, queries: list[tuple[Fact, Fact]], n_new: int, guard: bool, limit: int | None, seed: int
) -> list[tuple[Fact, Fact]]:
    """Queries whose hops are both known alone, and whose answer a hit would prove."""
    random.Random(seed).shuffle(queries)
    first = dict(zip(queries, known(model, [one for one, _ in queries], n_new), strict=True)) if queries else {}
    second = dict(zip(queries, known(model, [two for _, two in queries], n_new), strict=True)) if queries else {}
    found = [q for q in queries if first[q] and second[q]]
    if guard and found:
        prompts = {two.template: str(target_of(model, two.template).prompt) for _, two in found}
        said = dict(zip(prompts, texts_of(model, list(prompts.values()), n_new), strict=True))
        found = [
            (one, two)
            for one, two in found
            if not contaminated(two, _both(one, two), said[two.template]) and not contains(one.subject, two.object)
        ]
    found = found[:limit]
    if len({two.object for _, two in found}) < 2:
        raise ValueError(
            f"{len(found)} of {len(queries)} two-hop queries are left, expected two answers at least: the model has to know both hops"
        )
    return found


def _placeholder(
    model: LensModel, queries: list[tuple[Fact, Fact]], layers: list[int], target_layers: list[int], n_new: int, seed: int
) -> tuple[list[Any], dict[str, Tensor]]:  # fmt: skip
    """The end of the first question into the placeholder of the second one."""
    vectors = vectors_of(model, [Source(one.template.format(one.subject)) for one, _ in queries])
    noise, mean = random_like(vectors, seed), vectors.mean(0, keepdim=True)
    swapped = others([two.object for _, two in queries], seed)
    scores: dict[str, list[Any]] = {
        name: [None] * len(queries) for name in (PATCHED, SHUFFLED, RANDOM, MEAN, UNPATCHED)
    }
    pairs: list[Any] = []
    for template in dict.fromkeys(two.template for _, two in queries):
        mine = [i for i, (_, two) in enumerate(queries) if two.template == template]
        target = target_of(model, template)
        texts, pairs = _texts(
            model, torch.cat([vectors[mine], vectors[[swapped[i] for i in mine]], noise[mine], mean]), target, layers,
            target_layers, n_new,
        )  # fmt: skip
        unpatched = texts_of(model, [str(target.prompt)], n_new)[0]
        for k, i in enumerate(mine):
            answer = queries[i][1].object
            said = (texts[k], texts[len(mine) + k], texts[2 * len(mine) + k], texts[-1], [unpatched])
            for name, row in zip(scores, said, strict=True):
                scores[name][i] = [float(contains(text, answer)) for text in row]
    return pairs, {name: torch.tensor(rows) for name, rows in scores.items()}


def _in_place(
    model: LensModel, queries: list[tuple[Fact, Fact]], layers: list[int], target_layers: list[int], n_new: int, seed: int,
    masked: bool,
) -> tuple[list[Any], dict[str, Tensor]]:  # fmt: skip
    """The end of the phrase into the token before it, in the two-hop question itself."""
    hops = [
        scopes.multihop(model, one.phrase.format(one.subject), two.template.split("{}")[0], masked=masked)
        for one, two in queries
    ]
    own = torch.cat([vectors_of(model, [hop["source"]], hop["source_hooks"]) for hop in hops])
    noise, mean, swapped = random_like(own, seed), own.mean(0), others([two.object for _, two in queries], seed)
    scores: dict[str, list[Any]] = {name: [] for name in (PATCHED, SHUFFLED, RANDOM, MEAN)}
    pairs: list[Any] = []
    for i, hop in enumerate(hops):
        rows = torch.stack([own[i], own[swapped[i]], noise[i], mean])
        texts, pairs = _texts(model, rows, hop["target"], layers, target_layers, n_new)
        for name, row in zip(scores, texts, strict=True):
            scores[name].append([float(contains(text, queries[i][1].object)) for text in row])
    tokenizer: Any = model.tokenizer  # type: ignore[attr-defined]
    prompts = [tokenizer.decode(hop["target"].prompt.tolist(), skip_special_tokens=True) for hop in hops]
    unpatched = texts_of(model, prompts, n_new)
    right = [[float(contains(text, two.object))] for text, (_, two) in zip(unpatched, queries, strict=True)]
    return pairs, {**{name: torch.tensor(found) for name, found in scores.items()}, UNPATCHED: torch.tensor(right)}


def _texts(
    model: LensModel, vectors: Float[Tensor, "n layer d"], target: Target, layers: list[int], target_layers: list[int],
    n_new: int,
) -> tuple[list[list[str]], list[Any]]:  # fmt: skip
    """One line of text per vector and cell."""
    result = patchscope(
        model, Source(vectors), target, layers, target_layers, max_new_tokens=n_new, keep="top_k", show_progress=False
    )
    return [[text.split("\n")[0] for text in row] for row in result.text or []], result.pairs

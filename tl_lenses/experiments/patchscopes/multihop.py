"""Does a patch make two hops out of one? Single hops, two hops at once, and two hops with the first one's vector put in between."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses import methods
from tl_lenses.checks import seed_of, some_of, whole_number
from tl_lenses.deprecation import renamed
from tl_lenses.experiments.common import CONDITIONS, UNPATCHED, Cells, Controlled, Pair, Result, scores_of, vectors_of
from tl_lenses.experiments.facts import Fact, Facts, contains, contaminated, facts_of, known, target_of, texts_of, two_hops
from tl_lenses.experiments.grid import Table
from tl_lenses.experiments.subject import Layers, Subject
from tl_lenses.model import LensModel
from tl_lenses.patchscopes import Source, Target, patchscope
from tl_lenses.progress import progress
from tl_lenses.views import Picture

THINK = "Let's think step by step. "
FORMS = ("placeholder", "same prompt", "masked")
Query = tuple[Fact, Fact]  # the object of the first is the subject of the second


@dataclass(frozen=True, repr=False)
class Multihop(Result):
    """Hits of every query in every cell; `cells` is the placeholder form, `forms` has all.

    Attributes:
        queries: the two facts of each query.
        forms: cells by form. *placeholder*: the end of the first question ("Pizza originates from the country of") into
            the `x` of the second ("The capital of x is the city of"). *same prompt*: the end of the phrase "the country that
            Pizza comes from" into the token before it, in "The capital of the country that Pizza comes from". *masked*: the
            same, but the phrase has not seen the words before it, and the answer follows "The capital of" at once.
        plain: `[query]` hits without a patch: the first hop, the second hop, two hops at once, and these after "Let's
            think step by step".
    """

    queries: list[Query] = field(default_factory=list)
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
        """Accuracy by (l, l*), for every form; of the first one by source layer with its interval."""
        title = f"two hops by a patch, {self.model}"
        pictures: dict[str, Picture] = {"heat": self.cells.heat(title)}
        for form, cells in list(self.forms.items())[1:]:
            pictures[f"heat-{form.replace(' ', '-')}"] = cells.heat(f"{form}, {self.model}")
        return pictures | {"layers": self.cells.lines(title, "share right")}

    def rows(self) -> list[dict[str, Any]]:
        """A row per form, condition and cell; without a patch there is one a condition."""
        plain = [
            {"form": "plain", "condition": name, "layer": None, "target_layer": None}
            | {"score": float(x.double().mean()), "items": len(x)}
            for name, x in self.plain.items()
        ]
        return plain + [row for form, cells in self.forms.items() for row in cells.rows(form=form)]


@renamed(limit="n")
@torch.no_grad()
def multihop(
    model: LensModel, facts: Facts = None, *, layers: Layers = None,
    target_layers: Layers = None, forms: Sequence[str] = FORMS, max_new_tokens: int = 20,
    n: int | None = 24, guard: bool = True, seed: int = 0, show_progress: bool | None = None,
) -> Multihop:  # fmt: skip
    """Answer two-hop questions by patching, of which the model answers both hops alone.

    Args:
        facts: `read_facts(...)`, or the path that it takes; the bundled ones by default. Where the object of a fact with
            a `phrase` is the subject of another one, there is a query.
        layers: source layers, `0..n_layers` by default.
        target_layers: `0..n_layers - 1` by default.
        forms: which patched forms to run, of "placeholder", "same prompt", "masked".
        max_new_tokens: of the text in which the answer is looked for (up to the first newline).
        n: queries, drawn at random; None takes all.
        guard: leave out queries whose answer is in a prompt or in the unpatched text of the second question.
        seed: of the draw and the controls.

    Returns:
        `Multihop`. The controls go through the same cells: the vector of a query with another answer, a random one of
        the same length, the mean of all, and no patch.

    Raises:
        ValueError: no query whose hops the model both knows; an unknown form; a layer that is not there; a number out of
            range.

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 5: "same prompt" is its S = T = [pi2][pi1], and "masked" makes
    this equivalent to S = pi1, T = pi2 (see `tll.methods.multihop`).

    Example:
        >>> print(multihop(model))      # doctest: +SKIP
    """
    subject = Subject.of(model, layers=layers, what="multihop")
    pairs = subject.pairs(target_layers)
    forms = some_of("forms", forms, FORMS)
    if not forms:
        raise ValueError(f"forms must be some of {', '.join(FORMS)}, got none")
    n = None if n is None else whole_number("n", n, least=2)
    max_new_tokens, seed = whole_number("max_new_tokens", max_new_tokens, least=1), seed_of(seed)
    given, data = facts_of(facts)
    queries = _usable(model, two_hops(given), max_new_tokens, guard, n, seed)
    names = [(first.relation, first.subject, second.relation) for first, second in queries]
    plain = _unpatched(model, queries, max_new_tokens)
    cells: dict[str, Cells] = {}
    with progress(total=len(forms) * len(queries), desc="multihop", show=show_progress) as bar:
        for form in forms:
            bar.set_postfix_str(form)
            if form == "placeholder":
                scores = into_placeholder(model, queries, pairs, max_new_tokens, seed)
            else:
                scores = in_place(model, queries, pairs, max_new_tokens, seed, masked=form == "masked")
            cells[form] = Cells(pairs, scores, names, seed=seed)
            bar.update(len(queries))
    both = [_both(first, second) for first, second in queries]
    return Multihop(
        subject.name, next(iter(cells.values())), queries, cells, plain,
        settings={
            "data": data, "bos": subject.bos, "max_new_tokens": max_new_tokens, "guard": guard, "seed": seed, "queries": both,
        },
    )  # fmt: skip


def _both(first: Fact, second: Fact) -> str:
    """Both hops in one question."""
    return second.template.format(first.noun_phrase)


def _usable(model: LensModel, queries: list[Query], max_new_tokens: int, guard: bool, n: int | None, seed: int) -> list[Query]:
    """Queries whose hops are both known alone, and whose answer a hit would prove."""
    random.Random(seed).shuffle(queries)
    if queries:
        knows = [known(model, [query[hop] for query in queries], max_new_tokens) for hop in (0, 1)]
        usable = [query for query, *hops in zip(queries, *knows, strict=True) if all(hops)]
    else:
        usable = []
    if guard and usable:
        prompts = {second.template: str(target_of(model, second.template).prompt) for _, second in usable}
        unpatched = dict(zip(prompts, texts_of(model, list(prompts.values()), max_new_tokens), strict=True))
        usable = [
            (first, second)
            for first, second in usable
            if not contaminated(second, _both(first, second), unpatched[second.template])
            and not contains(first.subject, second.object)
        ]
    usable = usable[:n]
    if len({second.object for _, second in usable}) < 2:
        raise ValueError(
            f"{len(usable)} of {len(queries)} two-hop queries are left, expected two answers at least: the model has to know both hops"
        )
    return usable


def _unpatched(model: LensModel, queries: list[Query], max_new_tokens: int) -> dict[str, Float[Tensor, " query"]]:
    """Hits without a patch: each hop alone, both at once, and both after an invitation to think."""
    both, answers = [_both(*query) for query in queries], [second.object for _, second in queries]
    asked = {
        "first hop": ([first.question for first, _ in queries], [first.object for first, _ in queries]),
        "second hop": ([second.question for _, second in queries], answers),
        "two hops at once": (both, answers),
        "step by step": ([THINK + question for question in both], answers),
    }
    texts = {name: texts_of(model, prompts, max_new_tokens) for name, (prompts, _) in asked.items()}
    return {
        name: torch.tensor([float(contains(*pair)) for pair in zip(texts[name], right, strict=True)])
        for name, (_, right) in asked.items()
    }


def into_placeholder(
    model: LensModel, queries: list[Query], pairs: list[Pair], max_new_tokens: int, seed: int
) -> dict[str, Float[Tensor, "query cell"]]:
    """Scores by condition: the end of the first question into the placeholder of the second one."""
    answers = [second.object for _, second in queries]
    vectors = Controlled.of(vectors_of(model, [Source(first.question) for first, _ in queries]), answers, seed)
    texts: dict[str, list[list[str]]] = {name: [[]] * len(queries) for name in CONDITIONS}
    for template in dict.fromkeys(second.template for _, second in queries):
        items = [i for i, (_, second) in enumerate(queries) if second.template == template]
        target = target_of(model, template)
        by_condition = vectors.ask(lambda source, to=target: _texts(model, source, to, pairs, max_new_tokens), items)
        by_condition[UNPATCHED] = [texts_of(model, [str(target.prompt)], max_new_tokens)] * len(items)
        for name, rows in by_condition.items():
            for i, row in zip(items, rows, strict=True):
                texts[name][i] = row
    return scores_of(texts, answers, contains)


def in_place(
    model: LensModel, queries: list[Query], pairs: list[Pair], max_new_tokens: int, seed: int, *, masked: bool
) -> dict[str, Float[Tensor, "query cell"]]:
    """Scores by condition: the end of the phrase into the token before it, in the two-hop question itself."""
    answers = [second.object for _, second in queries]
    hops = [methods.multihop(model, first.noun_phrase, second.template.split("{}")[0], masked=masked) for first, second in queries]
    states = torch.cat([vectors_of(model, [hop["source"]], hop["source_hooks"]) for hop in hops])
    vectors = Controlled.of(states, answers, seed)
    texts: dict[str, list[list[str]]] = {name: [] for name in CONDITIONS}
    for i, hop in enumerate(hops):
        by_condition = vectors.ask(lambda source, to=hop["target"]: _texts(model, source, to, pairs, max_new_tokens), [i])
        for name, rows in by_condition.items():
            texts[name] += rows
    tokenizer: Any = model.tokenizer  # type: ignore[attr-defined]
    prompts = [tokenizer.decode(hop["target"].prompt.tolist(), skip_special_tokens=True) for hop in hops]
    texts[UNPATCHED] = [[text] for text in texts_of(model, prompts, max_new_tokens)]
    return scores_of(texts, answers, contains)


def _texts(model: LensModel, source: Source, target: Target, pairs: list[Pair], max_new_tokens: int) -> list[list[str]]:
    """One line of text per vector and cell."""
    result = patchscope(model, source, target, pairs=pairs, max_new_tokens=max_new_tokens, keep="top_k", show_progress=False)
    return [[text.split("\n")[0] for text in row] for row in result.text or []]

"""Does a text say what the vector holds, or what the prompt, the mean of a layer or the source's words would say anyway?"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_lenses.checks import seed_of, some_of, whole_number
from tl_lenses.experiments.common import MEAN, RANDOM, UNPATCHED, heat_of_pairs, random_like
from tl_lenses.experiments.grid import Grid, Table, interval
from tl_lenses.experiments.report import Report
from tl_lenses.model import name_of
from tl_lenses.numerics import DRAWS, percentiles, resampled
from tl_lenses.patchscopes import PatchscopeResult, Target, scopes
from tl_lenses.patchscopes.continuation import Continuation
from tl_lenses.patchscopes.request import Request
from tl_lenses.patchscopes.run import run, sources_read
from tl_lenses.patchscopes.scoring import Ids, asked, in_words, text_scores
from tl_lenses.patchscopes.sources import ReadySource, VectorsByLayer
from tl_lenses.patchscopes.targets import Prompt, ready_target
from tl_lenses.progress import progress
from tl_lenses.token_text import token_text
from tl_lenses.views import Picture

VECTOR, OTHER = "vector", "other vector"
AS_TEXT, LAST, INVERTED = "source as text", "token as text", "inverted as text"
CONTROLS = (OTHER, RANDOM, MEAN, UNPATCHED, AS_TEXT, LAST, INVERTED)
SAME = 1e-3  # nats: scores that differ by less are equal
_ROWS = 12  # texts in a table


@dataclass(frozen=True, repr=False)
class Faithfulness(Report):
    """Of every cell (l, l*) and condition: what share of texts is identified, and how specific they are.

    Attributes:
        sources: their labels.
        pairs: the cells.
        texts: `[source][cell]`, what was read out of the vectors.
        scores: by condition `[cell, text, source]`, `log p(y_i | what the condition has of source j)` in nats; NaN where
            the two were not compared.
        said: by condition `[source][cell]`, the condition's own texts.
        grid: means over sources with their intervals, over the axes "condition" and "cell".
        chance: of an identification.
        result: the result whose texts were scored; `tll.page` shows it with the scores beside the texts.
    """

    sources: list[str] = field(default_factory=list)
    pairs: list[Any] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    scores: dict[str, Float[Tensor, "cell text source"]] = field(default_factory=dict)
    said: dict[str, list[list[str]]] = field(default_factory=dict)
    chance: float = math.nan
    result: Any = None

    name = "faithfulness"

    @property
    def best(self) -> int:
        """The cell whose texts are the most specific."""
        return int(self.grid.at(condition=VECTOR)["specificity"].nan_to_num(-math.inf).argmax())

    def of_texts(self) -> dict[str, Float[Tensor, "source cell"]]:
        """Of every text its specificity, nats per token, and the rank of its own vector among all that it was scored with."""
        a = self.scores[VECTOR]
        rank = 1 + (a > a.diagonal(dim1=1, dim2=2)[..., None] + SAME).sum(-1).double()
        return {"specificity": specificity(a).T / self.grid["length"], "own_rank": rank.T}

    def tables(self) -> list[Table]:
        """The vector cell by cell, all conditions in the most specific cell, and the texts there."""
        cells, best, n = self.grid.axes["cell"], self.best, len(self.sources)
        others = {c: f"= {c.split()[-1] if c == AS_TEXT else 'mean'}" for c in (AS_TEXT, MEAN) if c in self.scores}
        by_cell = [
            [label, *self._row(VECTOR, p, "distinct"), *(f"{self.grid.at(condition=c)['same'][p]:.2f}" for c in others)]
            for p, label in enumerate(cells)
        ]
        by_condition = [[c, *self._row(c, best, "margin", "same", "distinct")] for c in self.scores]
        columns = zip(self.sources, self.texts, *(x[:, best].tolist() for x in self.of_texts().values()), strict=True)
        read = [[source[:28], repr(text[best])[:40], f"{rank:.0f}", f"{x:.2f}"] for source, text, x, rank in columns]
        left_out = "".join(f"; without {c}: {why}" for c, why in self.settings.get("left_out", {}).items())
        head = ["identified (95 %)", "specificity (95 %)"]
        return [
            Table(
                f"texts of {n} sources, {self.model}", ["l, l*", *head, "distinct", *others.values()], by_cell,
                f"identified: share of texts that are likeliest under their own vector, chance {self.chance:.2f}; specificity: nats per token over "
                "other vectors; =: share of texts that are what the source as text, or the mean vector, gives; intervals: bootstrap over sources",
                percent=False,
            ),
            Table(
                f"controls in the most specific cell, {cells[best]}", ["", *head, "lead", "same", "distinct"], by_condition,
                f"lead: nats per token by which the vector makes its text likelier than this does; same: share of equal texts{left_out}",
                percent=False,
            ),
            Table(
                f"texts in that cell{f', {_ROWS} of {n}' if n > _ROWS else ''}", ["source", "text", "rank of its vector", "specificity"],
                read[:_ROWS], percent=False,
            ),
        ]  # fmt: skip

    def _row(self, condition: str, p: int, *more: str) -> list[str]:
        of = {name: float(self.grid.at(condition=condition)[name][p]) for name in self.grid if name != "length"}
        shown = [interval(*(of[f"{name}{end}"] for end in ("", "_low", "_high"))) for name in ("identified", "specificity")]
        return shown + ["–" if math.isnan(of[x]) else f"{of[x]:.0f}" if x == "distinct" else f"{of[x]:.2f}" for x in more]

    def pictures(self) -> dict[str, Picture]:
        """Identification and specificity over layers: a line per condition with its interval; a heat map of a sweep."""
        cells, of, pictures = list(self.grid.axes["cell"]), self.grid.at(condition=VECTOR), dict[str, Picture]()
        layers = {"down": "source layer l", "across": "target layer l*"}
        is_sweep = len(self.pairs) > max(len({*side}) for side in zip(*self.pairs, strict=True))
        for name, up in (("identified", "share of texts identified"), ("specificity", "nats per token")):
            title = f"{name}, {self.model}"
            if is_sweep:
                pictures[name] = heat_of_pairs(title, self.pairs, of[name], **layers)
                continue
            places, ticks = Grid({**self.grid.axes, "cell": range(len(cells))}, self.grid.values), dict(enumerate(cells))
            pictures[name] = places.lines(title, name, x="cell", by="condition", across="l, l*", up=up, ticks=ticks)
        return pictures

    def rows(self) -> list[dict[str, Any]]:
        """A row per condition and cell."""
        names = [name for name in self.grid if name != "length"]
        pairs = dict(zip(self.grid.axes["cell"], self.pairs, strict=True))
        layers = lambda row: dict(zip(("layer", "target_layer"), pairs[row.pop("cell")], strict=True))
        return [layers(row) | row for row in self.grid.rows(*names)]


# --- the numbers


def identified(scores: Float[Tensor, "cell text source"]) -> Float[Tensor, "cell text"]:
    """1 where a text is likeliest under its own source, `1[i = argmax_j A[i, j]]`; shared where several are.

    >>> identified(torch.tensor([[[-1.0, -3.0], [-2.0, -2.0]]]))
    tensor([[1.0000, 0.5000]], dtype=torch.float64)
    """
    x = scores.nan_to_num(-math.inf)
    top = x >= x.max(-1, keepdim=True).values - SAME
    return top.diagonal(dim1=1, dim2=2).double() / top.sum(-1)


def specificity(scores: Float[Tensor, "cell text source"]) -> Float[Tensor, "cell text"]:
    """`A[i, i] - log mean_{j != i} exp A[i, j]`, in nats per text.

    >>> specificity(torch.tensor([[[-1.0, -3.0], [-2.0, -2.0]]]))
    tensor([[2., 0.]], dtype=torch.float64)
    """
    own, others = scores.diagonal(dim1=1, dim2=2), ~(scores.isnan() | torch.eye(scores.shape[-1], dtype=torch.bool))
    return own - scores.masked_fill(~others, -math.inf).logsumexp(-1) + others.sum(-1).double().log()


def _grid(
    scores: Mapping[str, Tensor], said: Mapping[str, list[list[str]]], length: Float[Tensor, "source cell"], cells: list[str], draws: int, seed: int,
) -> Grid:  # fmt: skip
    """Means over sources with bootstrap intervals."""
    index, per = resampled(len(length), draws, seed), length.T
    values: dict[str, list[Tensor]] = {}
    for condition, a in scores.items():
        margin = (scores[VECTOR].diagonal(dim1=1, dim2=2) - a.diagonal(dim1=1, dim2=2)) / per
        measured = {"identified": identified(a), "specificity": specificity(a) / per, "margin": margin}
        for name, x in measured.items():
            x = x.double()
            low, high = percentiles(x[:, index].mean(-1).T)
            for end, value in (("", x.mean(1)), ("_low", low), ("_high", high)):
                values.setdefault(name + end, []).append(value)
        columns, own, read = range(len(cells)), said.get(condition), said[VECTOR]
        equal = [sum(a[p] == b[p] for a, b in zip(own or (), read, strict=False)) / len(read) for p in columns]
        for name, x in (("same", equal), ("distinct", [len({row[p] for row in own or ()}) for p in columns])):
            values.setdefault(name, []).append(torch.tensor([math.nan] * len(x) if own is None else x, dtype=torch.float64))
    both = ("condition", "cell")
    grid: dict[str, tuple[Sequence[str], Tensor]] = {name: (both, torch.stack(x)) for name, x in values.items()}
    axes = {"condition": list(scores), "cell": cells, "source": list(range(len(length)))}
    return Grid(axes, grid | {"length": (("source", "cell"), length)})


# --- the conditions


@dataclass(frozen=True)
class _Readings:
    """The texts of a result, and everything that they are asked with."""

    request: Request  # the call, its sources given as vectors
    original: Request  # the same with its sources as they were
    vectors: list[VectorsByLayer]  # by source and layer
    ids: list[list[Ids]]  # `[source][pair]`
    compared: Bool[Tensor, "text source"]  # which texts are scored with which sources
    other: list[int]  # for every source another one that it is compared with
    show: bool | None  # progress bars

    @staticmethod
    def of(result: Any, among: int | None, seed: int, show: bool | None, n: int | None = None) -> "_Readings":
        """Read the sources (the first n of them) again."""
        if not isinstance(result, PatchscopeResult):
            raise TypeError(f"expected the result of tll.patchscope, got {type(result).__name__}")
        original: Request | None = result.request
        if original is None:
            raise ValueError(
                "this result has no call to ask again: pass the result that tll.patchscope returned, in the same session"
            )
        if len(original.scales) > 1:
            raise ValueError("this result sweeps scales: make a result for each scale")
        if any(len(prompts) > 1 for prompts in original.targets):
            raise ValueError(
                "this result combines several targets, and its texts have no single prompt: make a result for each target"
            )
        original = replace(original, sources=original.sources[:n], targets=original.targets[:n])
        n = len(original.sources)
        if n < 2:
            raise ValueError(f"a text is told from those of other vectors: pass a result of at least two sources, got {n}")
        tokens = result.top_ids[..., :1] if result.tokens is None else result.tokens
        ids = [[tuple(i for i in cell if i >= 0) for cell in row] for row in tokens[:n].tolist()]
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        compared, other = torch.zeros(n, n, dtype=torch.bool), [0] * n
        most = n if among is None else among
        for group in order.tensor_split(max(1, min(math.ceil(n / most), n // 2))):  # of two at least
            compared[group[:, None], group] = True
            for i, j in zip(group.tolist(), group.roll(1).tolist(), strict=True):
                other[i] = j
        vectors, _ = sources_read(original)
        given = [ReadySource(s.label, None, s.columns, v) for s, v in zip(original.sources, vectors, strict=True)]
        return _Readings(replace(original, sources=given), original, vectors, ids, compared, other, show)

    def prompts(self) -> list[Prompt]:
        """The target prompt of every source."""
        return [prompts[0] for prompts in self.request.targets]

    def written(self, ids: Ids) -> str:
        """Ids as text: cut off at EOS and stop strings where they were generated."""
        if self.request.continuation.max_new_tokens:
            return self.request.continuation.text(list(ids))
        tokenizer = getattr(self.request.to, "tokenizer", None)
        return str(ids[0]) if tokenizer is None else token_text(tokenizer, ids[:1])[ids[0]]

    def with_vectors(self, vectors: Sequence[VectorsByLayer]) -> Request:
        """The call with other vectors, one per source."""
        sources = [replace(s, given=v) for s, v in zip(self.request.sources, vectors, strict=True)]
        return replace(self.request, sources=sources)

    def in_words(self, words: Sequence[Sequence[str]]) -> list[list[Prompt]]:
        """The target prompts with words `[source][pair]` in place of their placeholders."""
        prompts = []
        for prompt, row in zip(self.prompts(), words, strict=True):
            made = {text: in_words(self.request, prompt, text) for text in dict.fromkeys(row)}
            prompts.append([made[text] for text in row])
        return prompts

    def asked(
        self, prompts: Sequence[Sequence[Prompt]], compared: Bool[Tensor, "text source"]
    ) -> tuple[Float[Tensor, "pair text source"], list[list[str]]]:
        """Scores and texts of prompts `[source][pair]` that nothing is put into; each different one runs once."""
        n, n_pairs = len(self.ids), len(self.request.pairs)
        scores = torch.full((n_pairs, n, n), torch.nan, dtype=torch.float64)
        said = [[""] * n_pairs for _ in range(n)]
        uses: dict[Ids, tuple[Prompt, list[tuple[int, int]]]] = {}
        for j, row in enumerate(prompts):
            for p, prompt in enumerate(row):
                uses.setdefault(tuple(prompt.tokens[0].tolist()), (prompt, []))[1].append((j, p))
        for prompt, places in progress(uses.values(), desc="asking in words", show=self.show):
            wanted = [(i, j, p) for j, p in places for i in range(n) if compared[i, j]]
            distinct = list(dict.fromkeys(self.ids[i][p] for i, _, p in wanted))
            values, ids = asked(self.request, prompt, distinct)
            value_of, text = dict(zip(distinct, values, strict=True)), self.written(tuple(ids))
            for i, j, p in wanted:
                scores[p, i, j] = value_of[self.ids[i][p]]
            for j, p in places:
                said[j][p] = text
        return scores, said


def _with_vectors(r: _Readings, chosen: Sequence[str], seed: int) -> tuple[dict[str, Tensor], dict[str, list[list[str]]]]:
    """The conditions that put vectors into the target, scored together: the vectors, random ones, and their mean."""
    n, sources, compared = len(r.ids), list(r.request.sources), r.compared
    blocks, mean = [VECTOR], None
    if RANDOM in chosen:
        generator = torch.Generator().manual_seed(seed)
        noise = [{layer: random_like(x, generator) for layer, x in v.items()} for v in r.vectors]
        sources += r.with_vectors(noise).sources
        compared, blocks = torch.cat([compared, r.compared], 1), [*blocks, RANDOM]
    if MEAN in chosen:
        mean = {layer: torch.stack([v[layer] for v in r.vectors]).mean(0) for layer in r.vectors[0]}
        sources.append(replace(sources[0], given=mean))
        compared = torch.cat([compared, torch.ones(n, 1, dtype=torch.bool)], 1)
    scored = text_scores(replace(r.request, sources=sources), r.ids, compared, r.prompts(), show_progress=r.show)
    scores = dict(zip(blocks, scored.split(n, -1), strict=False))
    said = {VECTOR: [[r.written(ids) for ids in row] for row in r.ids]}
    if OTHER in chosen:
        scores[OTHER], said[OTHER] = scores[VECTOR][..., r.other], [said[VECTOR][j] for j in r.other]
    if mean is not None:
        scores[MEAN] = scored[..., -1:].expand(-1, -1, n).masked_fill(~r.compared, torch.nan)
        result = run(r.with_vectors([mean] * n), show_progress=False)
        said[MEAN] = result.text or [[r.written((int(ids[0]),)) for ids in row] for row in result.top_ids]
    return scores, said


def _words(r: _Readings, repeat: Target) -> dict[str, tuple[str, Callable[[], list[list[str]]]]]:
    """By condition in words: why it cannot be asked ("" where it can), and its words `[source][pair]`."""
    request, n_pairs = r.original, len(r.request.pairs)
    prompts, tokenizer = r.prompts(), getattr(request.model, "tokenizer", None)
    why = "the target is the source's own prompt" if request.own_prompt else ""
    why = why or ("target_hooks count the columns of the target prompt" if request.options.target_hooks else "")
    why = why or ("the target has no text" if any(in_words(request, p, "") is None for p in prompts[:1]) else "")
    has_text = tokenizer is not None and all(source.tokens is not None for source in request.sources)

    def of_source(only_last: bool) -> list[list[str]]:
        texts = []
        for source in request.sources:
            ids, last = source.tokens[0].tolist(), max(source.columns)  # type: ignore[union-attr]
            start = last if only_last else int(ids[0] == tokenizer.bos_token_id and last > 0)  # type: ignore[union-attr]
            texts.append([tokenizer.decode(ids[start : last + 1], clean_up_tokenization_spaces=False)] * n_pairs)  # type: ignore[union-attr]
        return texts

    def repeated() -> list[list[str]]:
        n_new = min(8, max(max(s.columns, default=4) for s in request.sources) + 1)
        continuation = Continuation.of(request.to, n_new, False, 1.0, 0, ())
        target = ready_target(request.to, repeat, -1, n_new, prepend_bos=request.options.prepend_bos)
        texts = run(replace(r.request, targets=[[target]] * len(r.ids), continuation=continuation), show_progress=r.show).text
        return [[text.strip().split("\n")[0] for text in row] for row in texts or []]

    without = why or ("" if has_text else "the sources are no text")
    spans = any(len(x) > 1 for by_layer in r.vectors for x in by_layer.values())
    no_inversion = why or ("a source gives several vectors" if spans else "")
    return {
        AS_TEXT: (without, lambda: of_source(False)),
        LAST: (without, lambda: of_source(True)),
        INVERTED: (no_inversion, repeated),
    }


def identification(result: PatchscopeResult, n: int | None = None, *, among: int = 10, seed: int = 0) -> Float[Tensor, "text pair"]:
    """Whether each text of a result is likeliest under its own vector, among the vectors of at most so many sources.

    Args:
        result: of `patchscope`.
        n: the first n sources only, such as those that are no controls.
        among: how many sources a text is told from, its own included: chance is one in so many.
        seed: of their draw.
    """
    r = _Readings.of(result, among, seed, False, n)
    return identified(text_scores(r.request, r.ids, r.compared, r.prompts(), show_progress=False)).T


@torch.no_grad()
def faithfulness(
    result: PatchscopeResult, *, controls: Sequence[str] = CONTROLS, repeat: Target | None = None, among: int | None = 20,
    draws: int = DRAWS, seed: int = 0, show_progress: bool | None = None,
) -> Faithfulness:  # fmt: skip
    """Does each text of a patchscope say what its vector holds? The patched model itself is asked, no judge.

    `A[i, j] = log p(y_i | target with h_j)`: a text is *identified* if it is likeliest under its own vector,
    `i = argmax_j A[i, j]`, and *specific* by `(A[i, i] - log mean_{j != i} exp A[i, j]) / |y_i|` nats per token. The same
    numbers with something else in the vector's place say what the text could have come from.

    Args:
        result: of `patchscope`, of at least two sources with one target; without generated text its top tokens are
            scored.
        controls: some of "other vector" (another source's), "random vector" (of equal norm), "mean vector" (over sources),
            "unpatched", "source as text" (in place of the placeholder, up to the source's position), "token as text" (its
            last token alone), and "inverted as text": what `repeat` reads out of the vector, asked in words.
        repeat: the prompt of the inversion; `scopes.repeat()` by default.
        among: a text is told from those of at most so many sources (drawn at random); None means all.
        draws: of the bootstrap over sources.
        seed: of all draws.

    Returns:
        `Faithfulness`. Controls that cannot be made are left out, and its table says why.

    Raises:
        TypeError, ValueError: no result of a patchscope, fewer than two sources, several targets or scales; an unknown
            control.

    Source: Li et al. 2026 (Do Activation Verbalization Methods Convey Privileged Information?), sections 3 to 5, for text
    alone and inversion; identification is a contrastive score, as in InfoNCE (van den Oord et al. 2018).

    Example:
        >>> result = tll.patchscope(model, names, tll.scopes.entity_description(), max_new_tokens=5)      # doctest: +SKIP
        >>> print(tll.faithfulness(result))      # doctest: +SKIP
    """
    chosen = some_of("controls", controls, CONTROLS)
    among = None if among is None else whole_number("among", among, least=2)
    draws, seed = whole_number("draws", draws, least=1), seed_of(seed)
    repeat = scopes.repeat() if repeat is None else repeat
    if not isinstance(repeat, Target):
        raise TypeError(f"repeat must be a tll.Target, got {type(repeat).__name__}")
    r, left_out = _Readings.of(result, among, seed, show_progress), {}
    if MEAN in chosen and any(v[layer].shape != x.shape for v in r.vectors for layer, x in r.vectors[0].items()):
        left_out[MEAN] = "the sources give different numbers of vectors"
    scores, said = _with_vectors(r, [c for c in chosen if c not in left_out], seed)
    if UNPATCHED in chosen:
        as_it_is = [[prompt] * len(r.request.pairs) for prompt in r.prompts()]
        own, said[UNPATCHED] = r.asked(as_it_is, torch.eye(len(r.ids), dtype=torch.bool))
        own = own.diagonal(dim1=1, dim2=2)[..., None].expand(-1, -1, len(r.ids))
        scores[UNPATCHED] = own.masked_fill(~r.compared, torch.nan)
    for condition, (why, words) in _words(r, repeat).items():
        if condition in chosen and why:
            left_out[condition] = why
        elif condition in chosen:
            scores[condition], said[condition] = r.asked(r.in_words(words()), r.compared)
    pairs, length = r.request.pairs, torch.tensor([[len(ids) for ids in row] for row in r.ids], dtype=torch.float64)
    cells = [str(a) if a == b else f"{'' if a is None else a}, {b}" for a, b in pairs]
    ordered = {c: scores[c] for c in (VECTOR, *CONTROLS) if c in scores}
    return Faithfulness(
        name_of(r.request.to), grid=_grid(ordered, said, length, cells, draws, seed),
        settings={**result.settings, "among": among, "draws": draws, "score_seed": seed, "left_out": left_out},
        sources=[source.label for source in r.request.sources], pairs=pairs, texts=said[VECTOR], scores=ordered, said=said,
        chance=float((1 / r.compared.sum(1).double()).mean()), result=result,
    )  # fmt: skip

"""Does a lens read what the model thinks of and does not say? The rank of unspoken intermediates, beside controls."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.affine import Affine
from tl_lenses.checks import seed_of, several, whole_number
from tl_lenses.experiments.facts import facts_of, two_hops
from tl_lenses.experiments.grid import Grid, Table, interval
from tl_lenses.experiments.report import Report
from tl_lenses.experiments.subject import Subject
from tl_lenses.files import as_path
from tl_lenses.layers import LayerOrSite
from tl_lenses.lens import LayerLens, Lens
from tl_lenses.model import LensModel, prepare, tokenizer_of
from tl_lenses.numerics import DRAWS, percentiles, resampled
from tl_lenses.progress import progress
from tl_lenses.sites import at, positions
from tl_lenses.views import Picture

RANDOM, SHUFFLED = "random map", "shuffled labels"
# Forms of the intermediates of order-ops: their own table is not published.
_SYNONYMS = {
    "addition": ("plus", "add", "sum", "+"), "subtraction": ("minus", "subtract", "difference", "-"),
    "multiplication": ("times", "multiply", "product", "*", "×"), "division": ("divided", "divide", "quotient", "/", "÷"),
    "exponentiation": ("power", "squared", "exponent", "^"), "modulo": ("mod", "remainder", "%"),
}  # fmt: skip
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_CHUNK = 64  # items whose logits exist at a time


@dataclass(frozen=True)
class Item:
    """A prompt, and words that its answer needs and that nobody says.

    Attributes:
        kind: the set that it is of.
        prompt: read at the token before `target`; without one at its last token, or at its last newline in "poetry".
        intermediates: the words.
        target: what follows; it says where the prompt's last token is, and is not scored.
    """

    kind: str
    prompt: str
    intermediates: tuple[str, ...]
    target: str = ""


@dataclass(frozen=True, repr=False)
class Intermediates(Report):
    """Scores `max(0, 1 - log r / log k_max)`, r the best rank over layers and surface forms, means over items.

    The grid has the axes kind and lens: `score`, the interval `low` and `high` over resampled items, `shuffled` (the labels of other items), `above`, the mean
    difference to the first lens, with `above_low` and `above_high`; and with the axis layer `by_layer`, scores of a single layer, its interval `by_layer_low` and
    `by_layer_high`, and `by_layer_shuffled`.

    Attributes:
        ranks: `[lens, layer, item, 2]`, best rank over the forms of the item's own label, and of another item's.
        items: those measured: a prompt and one intermediate each.
        k_max: rank with a score of 0.
        left_out: how many were left out, by reason.
    """

    ranks: Int[Tensor, "lens layer item two"]
    items: list[Item] = field(default_factory=list)
    k_max: int = 100
    left_out: dict[str, int] = field(default_factory=dict)

    name = "intermediates"

    def pass_at(self, k: int) -> dict[str, float]:
        """The share of items whose best rank over layers is k or less, by lens."""
        k = whole_number("k", k, least=1)
        return dict(zip(self.lenses, (self.ranks[..., 0].amin(1) <= k).double().mean(1).tolist(), strict=True))

    def tables(self) -> list[Table]:
        """Any layer, by set of items and lens; then layer by layer."""
        rows = [
            [row["kind"], str(int(row["items"])), row["lens"], interval(row["score"], row["low"], row["high"]), f"{row['shuffled']:.2f}", interval(row["above"], row["above_low"], row["above_high"])]
            for row in self.grid.rows("score", "low", "high", "shuffled", "above", "above_low", "above_high", "items")
        ]  # fmt: skip
        reasons = ", ".join(f"{n} {why}" for why, n in self.left_out.items() if n)
        note = f"k_max {self.k_max}; best rank over layers {self.layers[0]}..{self.layers[-1]} and forms; 95% over items; left out: {reasons or 'none'}"
        first = Table(
            "unspoken intermediates",
            ["set", "items", "lens", "score", SHUFFLED, f"above {self.lenses[0]}"],
            rows,
            note,
            percent=False,
        )
        names = ("by_layer", "by_layer_low", "by_layer_high")
        one = [
            [row["lens"], str(row["layer"]), interval(*(row[name] for name in names)), f"{row['by_layer_shuffled']:.2f}"]
            for row in self.grid.at(kind="all").rows(*names, "by_layer_shuffled")
        ]
        note = f"all sets; 95% over items; {RANDOM}: of the norm of the last lens' maps"
        return [first, Table("unspoken intermediates, one layer", ["lens", "layer", "score", SHUFFLED], one, note, percent=False)]  # fmt: skip

    def pictures(self) -> dict[str, Picture]:
        """The score of each layer alone, all sets together."""
        grid = self.grid.at(kind="all")
        return {"layers": grid.lines("unspoken intermediates by layer", "by_layer", by="lens", up="score of one layer")}


def read_items(path: str | Path | None = None) -> list[Item]:
    """The published sets from `lens-eval-*.json`, a file or a folder; None makes two hops of the bundled facts.

    Raises:
        ValueError: no such file, or another content.

    Example:
        >>> read_items()[0].intermediates
        ('Italy',)
    """
    if path is None:
        return [
            Item("two hops", second.template.format(first.noun_phrase), (first.object,), second.object)
            for first, second in two_hops(facts_of(None)[0])
        ]
    path = as_path(path)
    files = sorted(path.rglob("lens-eval-*.json")) if path.is_dir() else [path] if path.is_file() else []
    items = []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))["items"]
            kind = file.stem.removeprefix("lens-eval-")
            items += [Item(kind, i["prompt"], tuple(i["intermediates"]), i.get("target", "")) for i in content]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no evaluation set: expected items with prompt and intermediates ({error!r})") from None  # fmt: skip
    if not items:
        raise ValueError(f"no items in {str(path)!r}: expected lens-eval-*.json of the jacobian-lens repository")
    return items


def forms_of(word: str, tokenizer: Any) -> list[int]:
    """Ids of the single tokens that say a word: with and without a space, as it is, in lower case and with a capital; numbers in both forms.

    Raises:
        TypeError: no text.
    """
    words = {word, *_SYNONYMS.get(word, ())}
    words |= {_NUMBERS[int(w)] for w in words if w.isdigit() and int(w) < len(_NUMBERS)}
    texts = {f"{space}{form}" for w in words for form in (w, w.lower(), w.capitalize()) for space in ("", " ")}
    coded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in sorted(texts)]
    return sorted({ids[0] for ids in coded if len(ids) == 1})


@torch.no_grad()
def intermediates(
    model: LensModel,
    lenses: Lens | Mapping[str, Lens],
    items: Sequence[Item] | str | Path | None = None,
    *,
    layers: Iterable[LayerOrSite] | None = None,
    k_max: int = 100,
    said: int = 1,
    n: int | None = None,
    seed: int = 0,
    show_progress: bool | None = None,
) -> Intermediates:
    """How well lenses rank words that an answer goes through and that the model does not say, where it would be said next.

    Args:
        lenses: a lens or `{name: lens}`; the others are compared with the first. A random map of the norm of the last lens' maps is added, and
            every lens is scored on the labels of other items too.
        items: `read_items(...)` or what it takes; two hops of the bundled facts by default.
        layers: below the final one; all by default.
        k_max: rank with score 0; the published sets do not say theirs.
        said: an intermediate among so many likeliest tokens of the model is said anyway, and left out.
        n: items at most of each set, in their order.
        seed: of random map, other items and intervals.

    Returns:
        `Intermediates`. Left out: an intermediate in the prompt, one that is no single token, one that the model says.

    Raises:
        ValueError: no item is left.

    Source: Gurnee et al. 2026 (2607.15495), comparison of methods; their README's positions.

    Example:
        >>> print(intermediates(model, {"logit": tll.Lens(model), "tuned": lens}))      # doctest: +SKIP
    """
    subject = Subject.of(model, lenses, layers, what="intermediates", final="never" if layers is not None else "asked")
    k_max, said, seed = whole_number("k_max", k_max, least=2), whole_number("said", said, least=0), seed_of(seed)
    given = read_items(items) if items is None or isinstance(items, (str, Path)) else several("items", items, "items")
    if wrong := [item for item in given if not isinstance(item, Item)]:
        raise TypeError(f"expected an Item, got {type(wrong[0]).__name__}")
    if n is not None:
        n, of_kind = whole_number("n", n, least=2), {}
        for item in given:
            of_kind.setdefault(item.kind, []).append(item)
        given = [item for members in of_kind.values() for item in members[:n]]
    kept, forms, states, left_out = _read(subject, given, said, show_progress)
    if len(kept) < 2:
        raise ValueError(
            f"{len(kept)} items are left of {len(given)}, two are needed; left out: {left_out}. said=0 keeps what the model says"
        )
    last = list(subject.lenses.values())[-1]
    generator, decoders = torch.Generator().manual_seed(seed), {}
    for name, lens in subject.lenses.items():
        decoders[name] = [lens[layer] for layer in subject.layers]
    decoders[RANDOM] = [_random_like(last[layer], generator) for layer in subject.layers]
    other = _others(kept, torch.Generator().manual_seed(seed))
    ranks = torch.stack([
        torch.stack([_ranks(decode, states[:, i], forms, other) for i, decode in enumerate(by_layer)])
        for by_layer in decoders.values()
    ])  # fmt: skip
    settings = {"k_max": k_max, "said": said, "seed": seed, "left_out": left_out, "data": "two hops of the bundled facts" if items is None else str(items)[:80]}  # fmt: skip
    grid = _grid(ranks, kept, list(decoders), subject.layers, k_max, seed)
    return Intermediates(subject.name, ranks, kept, k_max, left_out, grid=grid, settings=settings)


def _read(subject: Subject, items: Sequence[Item], said: int, show: bool | None) -> tuple[list[Item], list[list[int]], Tensor, dict[str, int]]:  # fmt: skip
    """One item per usable intermediate, its forms, states `[item, layer, d_model]`, and how many were left out and why."""
    model, tokenizer = subject.model, tokenizer_of(subject.model)
    kept, forms, states = [], [], []
    left_out = {"in the prompt": 0, "no single token": 0, "said by the model": 0}
    for item in progress(items, desc="intermediates", show=show):
        ids, column = _position(model, item)
        batch = prepare(model, ids[:, : column + 1])
        row = torch.zeros(1, dtype=torch.long), torch.full((1,), column)
        by_layer, logits = subject.read(batch, row)
        for word in item.intermediates:
            ways = forms_of(word, tokenizer)
            if re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", item.prompt.lower()):
                left_out["in the prompt"] += 1
            elif not ways:
                left_out["no single token"] += 1
            elif said and int(S.rank(logits.expand(len(ways), -1), torch.tensor(ways)).min()) <= said:
                left_out["said by the model"] += 1
            else:
                kept.append(Item(item.kind, item.prompt, (word,), item.target))
                forms.append(ways)
                states.append(torch.stack([by_layer[layer][0] for layer in subject.layers]))
    return kept, forms, torch.stack(states) if states else torch.empty(0), left_out


def _position(model: LensModel, item: Item) -> tuple[Tensor, int]:
    """The ids of the prompt (with its target, as they are tokenised together) and the column that is read."""
    ids = prepare(model, item.prompt + item.target).tokens
    if item.target:
        return ids, int(positions(model, ids, at(item.target, "last", span=True))[0, 0]) - 1
    if item.kind == "poetry":
        return ids, int(positions(model, ids, at("\n", "last"))[0, 0])
    return ids, ids.shape[1] - 1


def _random_like(decode: LayerLens, generator: torch.Generator) -> LayerLens:
    """A map of random numbers with the Frobenius norm of a lens' map, and no bias."""
    d = decode.readout.d_model
    weight = torch.eye(d) if decode.affine is None else decode.affine.weight.float().cpu()
    drawn = torch.randn(d, d, generator=generator)
    drawn = drawn * (weight.norm() / drawn.norm())
    return LayerLens(decode.readout, Affine(drawn.to(decode.readout.device), torch.zeros(d, device=decode.readout.device)))


def _others(items: Sequence[Item], generator: torch.Generator) -> list[int]:
    """For each item another one of its set, with another intermediate where there is one."""
    chosen = []
    for i, item in enumerate(items):
        same = [k for k, x in enumerate(items) if x.kind == item.kind and x.intermediates != item.intermediates]
        pool = same or [k for k in range(len(items)) if k != i]
        chosen.append(pool[int(torch.randint(len(pool), (1,), generator=generator))])
    return chosen


def _ranks(decode: LayerLens, x: Float[Tensor, "item d_model"], forms: list[list[int]], other: list[int]) -> Tensor:
    """`[item, 2]`: the best rank over the forms of an item's own label, and of another one's."""
    out = torch.zeros(len(x), 2, dtype=torch.long)
    for part in S.evenly(len(x), _CHUNK):
        logits = decode(x[part]).float().cpu()
        for i, row in zip(range(part.start, part.stop), logits, strict=True):
            for k, ways in enumerate((forms[i], forms[other[i]])):
                out[i, k] = 1 + (row > row[ways].max()).sum()  # the best form's
    return out


def scores(ranks: Int[Tensor, "*axes"], k_max: int) -> Float[Tensor, "*axes"]:
    """`max(0, 1 - log r / log k_max)`: the area under pass@k over log k of one item, of which r is the rank."""
    return (1 - ranks.double().log() / log(k_max)).clamp_min(0)


def _grid(ranks: Tensor, items: Sequence[Item], names: list[str], layers: list[int], k_max: int, seed: int) -> Grid:
    best, by_layer = scores(ranks.amin(1), k_max), scores(ranks, k_max)  # [lens, item, 2], [lens, layer, item, 2]
    kinds = list(dict.fromkeys(item.kind for item in items))
    members = {"all": list(range(len(items)))} | {k: [i for i, x in enumerate(items) if x.kind == k] for k in kinds if len(kinds) > 1}  # fmt: skip
    values: dict[str, list[Tensor]] = {}
    for rows in members.values():
        own, index = best[:, rows, 0], resampled(len(rows), DRAWS, seed)
        above = own - own[:1]
        found = {"score": own.mean(1), "shuffled": best[:, rows, 1].mean(1), "above": above.mean(1), "items": torch.full((len(names),), float(len(rows)))}  # fmt: skip
        for name, x in (("", own), ("above_", above)):
            found[f"{name}low"], found[f"{name}high"] = percentiles(x[:, index].mean(-1).T)
        one = by_layer[:, :, rows]  # [lens, layer, item, 2]
        found["by_layer"], found["by_layer_shuffled"] = one.mean(2).unbind(-1)
        ends = [percentiles(x[..., 0][:, index].mean(-1).T) for x in one.unbind(1)]
        found["by_layer_low"], found["by_layer_high"] = (torch.stack(x, 1) for x in zip(*ends, strict=True))
        for name, x in found.items():
            values.setdefault(name, []).append(x)
    axes = {"kind": list(members), "lens": names, "layer": layers}
    return Grid(axes, {name: (("kind", "lens", "layer")[: x[0].ndim + 1], torch.stack(x)) for name, x in values.items()})

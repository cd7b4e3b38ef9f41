"""Which lens should I believe? Lenses of one model beside each other and beside controls, with a sentence per band of layers."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.checks import seed_of
from tl_lenses.decode import Chunk, batches_to_read, decode, read_run
from tl_lenses.evaluation import BytesPerToken
from tl_lenses.experiments.facts import Fact
from tl_lenses.experiments.grid import Grid, Table, interval
from tl_lenses.experiments.report import Report
from tl_lenses.experiments.subject import Subject, text_settings
from tl_lenses.experiments.which_lens.intermediates import RANDOM, Intermediates, Item, intermediates, scores
from tl_lenses.experiments.which_lens.usage import Usage, usage
from tl_lenses.layers import LayerOrSite
from tl_lenses.lens import LayerLens, Lens, decoders_of, named_lenses
from tl_lenses.model import LensModel
from tl_lenses.numerics import DRAWS, jackknife, percentiles, resampled
from tl_lenses.text.batches import Text
from tl_lenses.tokens import Batch, next_tokens, used_positions
from tl_lenses.unembed import Readout
from tl_lenses.views import Picture

UNIGRAM = "unigram"
GROUPS = 8  # of rows of the text: each keeps its mean distributions, so that memory does not grow with the rows
_BINS = 10  # of the calibration


@dataclass(frozen=True, repr=False)
class Comparison(Report):
    """Lenses beside each other. The row "unigram" says the model's mean distribution over the text everywhere: what a frequent-token guess gets.

    The grid has the axes lens and layer: `kl` to the model (nats), `top1` agreement, `cross_entropy` of the next token (nats) and its `bits_per_byte`, `bias` (KL of
    the marginals, nats) and `ece`, the calibration error of the likeliest token as a guess of the next one. Each has an interval, `kl_low` and `kl_high`: by
    resampled rows of the text, of `bias` and `ece`, which are no means, by a jackknife over groups of rows. `multiply_adds` per position (map and unembedding) and `bytes` (of
    the map) are counted, not measured: they have none.

    Attributes:
        sums: `[lens, layer, row]` of KL, and `counts [row]` positions, which the sentences resample.
        unspoken: ranks of intermediates, where they were asked for.
        used: swaps and ablations, where they were asked for.
        seed: of the intervals.
    """

    sums: Tensor
    counts: Tensor
    unspoken: Intermediates | None = None
    used: Usage | None = None
    seed: int = 0

    name = "compare"

    def sentences(self) -> list[str]:
        """For each band of layers (early, middle, late) and question: which lens, how sure, or that none beats its control.

        Numbers of a band are means over its layers, and where an interval is no bootstrap of the band, its ends are means too: too wide rather than too
        narrow.
        """
        return [f"{band}, {question}: {text}" for band, question, text in self._said()]

    def _said(self) -> list[tuple[str, str, str]]:
        questions = {
            "next token": self._next_token, "bias": lambda part: self._least(part, "bias", " nats"),
            "calibration": lambda part: self._least(part, "ece", ""), "cost": self._cheapest, "unspoken": self._unspoken,
            "used": self._used,
        }  # fmt: skip
        said, bands = [], torch.arange(len(self.layers)).tensor_split(3)
        for band, part in zip(("early", "middle", "late"), bands, strict=True):
            if len(part):
                first, last = self.layers[int(part[0])], self.layers[int(part[-1])]
                where = f"{band}, layer {first}" + f" to {last}" * (first != last)
                said += [(where, question, text) for question, answer in questions.items() if (text := answer(part))]
        return said

    def _kl(self, part: Tensor) -> tuple[Float[Tensor, " lens"], Float[Tensor, "lens draw"], list[int]]:
        """Mean KL over a band of layers, the same of resampled texts, and the lenses below the unigram guess, the nearest first."""
        index = resampled(len(self.counts), DRAWS, self.seed)
        sums = self.sums[:, part].mean(1)
        mean, draws = sums.sum(-1) / self.counts.sum(), sums[:, index].sum(-1) / self.counts[index].sum(-1)
        speaks = (draws < draws[-1]).double().mean(1) >= 0.975
        return mean, draws, [i for i in mean[:-1].argsort().tolist() if speaks[i]]

    def _next_token(self, part: Tensor) -> str:
        mean, draws, able = self._kl(part)
        if not able:
            return f"none beats the unigram guess ({float(mean[-1]):.2f} nats)"
        best = able[0]
        order = [best, *(i for i in mean[:-1].argsort().tolist() if i != best)]
        low, high = (float(x) for x in percentiles(draws[best]))
        text = f"{self.lenses[best]}, KL {interval(float(mean[best]), low, high)}, unigram {float(mean[-1]):.2f}"
        return text + _surely(self.lenses, order, draws, "below", "texts")

    def _least(self, part: Tensor, key: str, unit: str) -> str:
        """Among lenses that beat the unigram guess: it has no bias and is calibrated, since it says nothing of a position."""
        able = self._kl(part)[2]
        if not able:
            return "none beats the unigram guess on the next token"
        ends = [self.grid[f"{key}{end}"][:, part].mean(1) for end in ("", "_low", "_high")]
        order = sorted(able, key=lambda i: float(ends[0][i]))
        own = interval(*(float(x[order[0]]) for x in ends))
        return f"{self.lenses[order[0]]}, {own}{unit}, unigram {float(ends[0][-1]):.2f}{_beside(self.lenses, order, ends)}"

    def _cheapest(self, part: Tensor) -> str:
        """The cheapest lens whose KL is within the interval of the nearest one's."""
        mean, draws, able = self._kl(part)
        if not able:
            return "none beats the unigram guess, which has no map and no product"
        low, high = (float(x) for x in percentiles(draws[able[0]]))
        adds, size = (self.grid[name][:, part].mean(1) for name in ("multiply_adds", "bytes"))
        costs = [(float(a), float(b)) for a, b in zip(adds[:-1], size[:-1], strict=True)]
        near = [i for i in able if i == able[0] or float(mean[i]) <= high]
        first = min(near, key=lambda i: costs[i])  # the nearest of equal ones
        text = f"{self.lenses[first]}, {costs[first][0] / 1e6:.1f} M multiply-adds, {costs[first][1] / 1e6:.2f} MB"
        if first != able[0]:
            best = f"{self.lenses[able[0]]}, {interval(float(mean[able[0]]), low, high)}"
            return f"{text}; its KL {float(mean[first]):.2f} is within the interval of {best}"
        cheaper = min(costs) < costs[first]
        return text + ("; none cheaper is within its interval" if cheaper else "; none is cheaper")

    def _unspoken(self, part: Tensor) -> str:
        if self.unspoken is None:
            return ""
        found, wanted = self.unspoken, [self.layers[int(i)] for i in part]
        rows = [i for i, layer in enumerate(found.layers) if layer in wanted]
        if not rows:
            return ""
        own, other = scores(found.ranks[:, rows].amin(1), found.k_max).unbind(-1)  # [lens, item]
        order, control = own[:-1].mean(1).argsort(descending=True).tolist(), found.lenses.index(RANDOM)
        best, index = order[0], resampled(own.shape[1], DRAWS, self.seed)
        above = (own[best] - torch.maximum(own[control].mean(), other[best].mean()))[index].mean(-1)
        if not float(percentiles(above)[0]) > 0:
            return f"none beats its control ({own.shape[1]} items)"
        low, high = (float(x) for x in percentiles(own[best][index].mean(-1)))
        score = interval(float(own[best].mean()), low, high)
        text = f"{found.lenses[best]}, score {score}, other labels {float(other[best].mean()):.2f}, random map {float(own[control].mean()):.2f} ({own.shape[1]} items)"
        return text + _surely(found.lenses, order, own[:, index].mean(-1), "above", "items")

    def _used(self, part: Tensor) -> str:
        if self.used is None:
            return ""
        wanted = [layer for layer in self.used.layers if layer in [self.layers[int(i)] for i in part]]
        if not wanted:
            return ""
        grid = self.used.grid.at(layer=wanted)
        ends = [grid[f"swap{end}"].mean(1) for end in ("", "_low", "_high")]
        order, control = ends[0].argsort(descending=True).tolist(), grid["swap_random"].mean(1)
        best = order[0]
        if not float(ends[1][best]) > float(control[best]):
            return "none beats random directions"
        moved = interval(*(float(x[best]) for x in ends), digits=1)
        return f"{self.used.lenses[best]}, a swap moves {moved} nats, random directions {float(control[best]):.1f}{_beside(self.used.lenses, order, ends, 1)}"

    def tables(self) -> list[Table]:
        """Next-token numbers and what they cost, then the tables of the other reports, then the sentences."""
        shown = lambda row, key, k=1, digits=2: interval(*(k * row[f"{key}{end}"] for end in ("", "_low", "_high")), digits=digits)  # fmt: skip
        text = "cross_entropy" if bool(self.grid["bits_per_byte"].isnan().all()) else "bits_per_byte"
        first = [[shown(row, "kl"), shown(row, "top1", 100, 1), shown(row, text)] for row in self.grid.rows()]
        second = [
            [shown(row, "bias"), shown(row, "ece"), f"{row['multiply_adds'] / 1e6:.1f}", f"{row['bytes'] / 1e6:.2f}"]
            for row in self.grid.rows()
        ]
        where = [[row["lens"], str(row["layer"])] for row in self.grid.rows()]
        joined = lambda cells: [[*a, *b] for a, b in zip(where, cells, strict=True)]
        said_as = "next token, nats" if text == "cross_entropy" else "bits per byte"
        note = f"{int(self.counts.sum())} positions; KL to the model, nats; 95% over rows of the text; unigram: the mean distribution everywhere"
        costs = (
            f"bias in nats; 95%, jackknife over {min(GROUPS, len(self.counts))} groups of rows; a lens' cost is counted: millions of multiply-adds per position, "
            "map and unembedding, and megabytes of the map"
        )
        tables = [
            Table("next token", ["lens", "layer", "KL", "top-1, %", said_as], joined(first), note, percent=False),
            Table("bias, calibration, cost", ["lens", "layer", "bias", "calibration error", "M multiply-adds", "MB"], joined(second), costs, percent=False),
        ]  # fmt: skip
        tables += [table for report in (self.unspoken, self.used) if report is not None for table in report.tables()]
        said = [list(row) for row in self._said()]
        return [*tables, Table("which lens", ["layers", "question", "answer"], said, percent=False)]

    def pictures(self) -> dict[str, Picture]:
        """KL by layer; then those of the other reports."""
        pictures: dict[str, Picture] = {"kl": self.grid.lines("KL to the model by layer", "kl", by="lens", up="nats", log_y=True)}  # fmt: skip
        for report in (self.unspoken, self.used):
            pictures |= {} if report is None else report.pictures()
        return pictures


def _surely(names: Sequence[str], order: Sequence[int], draws: Float[Tensor, "lens draw"], what: str, of: str) -> str:
    """In how many draws the first lens of an order is on its side of the second."""
    if len(order) < 2:
        return ""
    first, second = draws[order[0]], draws[order[1]]
    sure = float(((first < second) if what == "below" else (first > second)).double().mean())
    return f"; {what} {names[order[1]]} in {sure:.0%} of resampled {of}"


def _beside(names: Sequence[str], order: Sequence[int], ends: Sequence[Tensor], digits: int = 2) -> str:
    """The second lens of an order, and whether its interval and the first one's are apart."""
    if len(order) < 2:
        return ""
    (mean, low, high), (first, second) = ends, order[:2]
    apart = bool(high[first] < low[second] or low[first] > high[second])
    own = interval(*(float(x[second]) for x in (mean, low, high)), digits=digits)
    return f"; {names[second]} {own}, {'apart' if apart else 'overlapping'}"


@torch.no_grad()
def compare(
    model: LensModel,
    lenses: Lens | Mapping[str, Lens],
    tokens: Any,
    *,
    items: Sequence[Item] | str | Path | None = None,
    facts: Sequence[Fact] | str | Path | None = None,
    layers: Iterable[LayerOrSite] | None = None,
    said: int = 1,
    skip_first: bool = True,
    seed: int = 0,
    show_progress: bool | None = None,
) -> Comparison:
    """Lenses of one model on three questions, each with an interval and a control; `print` ends in a sentence per band of layers.

    Next token: KL to the model, agreement, bits per byte, bias, calibration and cost, beside the unigram guess. Unspoken intermediates, where `items` are given, beside a
    random map and other labels. Use, where `facts` are given: swaps along the lens' directions, beside the logit lens' and random ones. No single number ranks them.

    Args:
        lenses: a lens or `{name: lens}`; all share one pass over the text. The guess, whose distribution is known at its end, takes another
            pass without lenses.
        tokens: held-out text, as `evaluate` takes it.
        items: as `experiments.intermediates` takes them.
        facts: as `experiments.usage` takes them.
        layers: below the final one; all by default.
        said: as `experiments.intermediates` takes it.
        skip_first: leave out real position 0 of each row.
        seed: of the intervals and controls.

    Raises:
        ValueError: text with fewer than two rows to resample; what the two experiments refuse.

    Example:
        >>> print(tll.compare(model, {"logit": tll.Lens(model), "tuned": lens}, heldout))      # doctest: +SKIP
    """
    lenses = named_lenses(model, lenses, alone="lens")
    subject = Subject.of(model, lenses, layers, what="a comparison", final="never" if layers is not None else "asked")
    seed, text = seed_of(seed), Text.of(tokens)
    text = Text(list(text), one_shot=True) if text.one_shot else text  # token ids, to be read twice
    made, size = _Sums(), BytesPerToken(model, None)
    decoders = decoders_of(subject.lenses, subject.layers)
    for batch, used in batches_to_read(model, text, skip_first, "comparing", show_progress, size):
        made.start(len(batch.tokens))
        for chunk, places in _chunks(model, batch, used, subject.layers, decoders):
            made.add(chunk, places)
    if made.n_rows < 2:
        raise ValueError(f"an interval is over rows of the text, and there are {made.n_rows}: give two rows at least")
    guess, of_guess = made.marginal().clamp_min(1e-30).log(), _Sums()
    for batch, used in batches_to_read(model, text, skip_first, "the unigram guess", show_progress):
        of_guess.start(len(batch.tokens))
        for chunk, places in _chunks(model, batch, used, [], decoders):
            logp = guess.to(chunk.p).expand_as(chunk.p)
            of_guess.add_lens(UNIGRAM, chunk, (logp, logp.exp()), places)
    unspoken = used_by = None
    if items is not None:
        unspoken = intermediates(model, subject.lenses, items, layers=subject.layers, said=said, seed=seed, show_progress=show_progress)  # fmt: skip
    if facts is not None:
        used_by = usage(model, subject.lenses, facts, layers=subject.layers, seed=seed, show_progress=show_progress)
    grid, sums, counts = _grid(made, of_guess, decoders, subject.layers, size.ratio, seed)
    settings = {**text_settings(tokens), "skip_first": skip_first, "seed": seed, "positions": int(counts.sum()), "bytes_per_token": size.ratio}  # fmt: skip
    return Comparison(subject.name, sums, counts, unspoken, used_by, seed, grid=grid, settings=settings)


def _chunks(
    model: LensModel, batch: Batch, used: Tensor, layers: Sequence[int], decoders: Mapping[str, Sequence[LayerLens]]
) -> Iterator[tuple[Chunk, "_Places"]]:
    """What lenses say at some positions, and which positions these are."""
    reading = read_run(model, batch, layers, (), used)
    goal = next_tokens(batch.tokens, used_positions(batch, False)).flatten()
    for chunk in decode(reading, decoders, Readout(model)):
        yield chunk, _Places(S.likeliest(chunk.logp), goal[chunk.at], chunk.at // batch.tokens.shape[1])


class _Places(NamedTuple):
    """Of some positions of a batch."""

    top: Int[Tensor, " n"]  # the model's likeliest token
    next: Int[Tensor, " n"]  # the next token, -1 where there is none
    row: Int[Tensor, " n"]  # in the batch


@dataclass
class _Sums:
    """Running sums of lenses over a text: a few numbers per row of the text, and distributions over the vocabulary by group of rows.

    Attributes:
        by_row: `[row, number]` of each lens and layer, a tensor per batch: KL, agreements, `log p(next)`, and per bin of the likeliest token's
            probability `sum of probabilities - hits` as a guess of the next token.
        counts: `[row, 2]`, positions, and those with a next token.
        marginals: `[group, d_vocab]`, sums of probabilities of each lens and layer, and of the model under None.
        n_rows: of the text so far; row r is in the group r modulo `GROUPS`.
    """

    by_row: dict[Any, list[Tensor]] = field(default_factory=dict)
    counts: list[Tensor] = field(default_factory=list)
    marginals: dict[Any, Tensor] = field(default_factory=dict)
    n_rows: int = 0

    def start(self, n_rows: int) -> None:
        """The next batch has so many rows."""
        self.n_rows += n_rows
        self.counts.append(torch.zeros(n_rows, 2, dtype=torch.float64))

    def add(self, chunk: Chunk, places: _Places) -> None:
        """Some positions of a batch."""
        if chunk.first:
            one_each = torch.stack([torch.ones_like(places.next), places.next >= 0], 1)
            self.counts[-1].index_add_(0, places.row.cpu(), one_each.double().cpu())
            self._add_marginal(None, chunk.p, places.row)
        for i, by_name in chunk.logits.items():
            for name, logits in by_name.items():
                self.add_lens((name, i), chunk, chunk.distribution(logits), places)

    def add_lens(
        self, key: Any, chunk: Chunk, said: tuple[Float[Tensor, "n d_vocab"], Float[Tensor, "n d_vocab"]], places: _Places
    ) -> None:
        """What one lens says there, as log-probabilities and probabilities."""
        (logp, p), scored = said, places.next >= 0
        best = S.likeliest(logp)
        sure = p.amax(-1)
        numbers = torch.zeros(len(best), 3 + _BINS, dtype=torch.float64)
        numbers[:, 0] = S.kl(chunk.logp, logp, chunk.p).cpu()
        numbers[:, 1] = (best == places.top).cpu()
        numbers[:, 2] = S.target_logprob(logp, places.next).nan_to_num(0.0).cpu()
        excess = torch.where(scored, sure - (best == places.next).to(sure), 0.0)
        bins = 3 + (sure * _BINS).long().clamp(max=_BINS - 1)
        numbers.scatter_(1, bins[:, None].cpu(), excess[:, None].double().cpu())
        sums = self.by_row.setdefault(key, [])
        if len(sums) < len(self.counts):
            sums.append(torch.zeros(len(self.counts[-1]), 3 + _BINS, dtype=torch.float64))
        sums[-1].index_add_(0, places.row.cpu(), numbers)
        self._add_marginal(key, p, places.row)

    def _add_marginal(self, key: Any, p: Float[Tensor, "n d_vocab"], row: Tensor) -> None:
        if key not in self.marginals:
            self.marginals[key] = torch.zeros(GROUPS, p.shape[1])
        group = (self.n_rows - len(self.counts[-1]) + row) % GROUPS
        for g in group.unique().tolist():
            self.marginals[key][g] += p[group == g].sum(0).float().cpu()

    def marginal(self) -> Float[Tensor, " d_vocab"]:
        """The model's mean distribution."""
        total = self.marginals[None].double().sum(0)
        return total / total.sum()


def _grid(
    made: _Sums, of_guess: _Sums, decoders: Mapping[str, Sequence[LayerLens]], layers: list[int], ratio: float | None, seed: int
) -> tuple[Grid, Tensor, Tensor]:  # fmt: skip
    """The grid, and KL by lens, layer and row of the text, with their numbers of positions."""
    counts = torch.cat(made.counts)
    there = counts[:, 0] > 0
    counts, index = counts[there], resampled(int(there.sum()), DRAWS, seed)
    group = (torch.arange(len(there)) % GROUPS)[there]
    rows, sums = [], []
    for name in [*decoders, UNIGRAM]:
        for i, layer in enumerate(layers):
            source, key = (of_guess, UNIGRAM) if name == UNIGRAM else (made, (name, i))
            x = torch.cat(source.by_row[key])[there]
            sums.append(x[:, 0])
            numbers = _numbers(x, counts, index)
            numbers |= {f"bits_per_byte{end}": numbers[f"cross_entropy{end}"] / math.log(2) / (ratio or math.nan) for end in ("", "_low", "_high")}  # fmt: skip
            numbers |= _of_groups(x, counts, group, made.marginals[None], source.marginals[key])
            map_cost = (0.0, 4.0 * len(made.marginals[None][0])) if name == UNIGRAM else _cost(decoders[name][i])
            rows.append({"lens": name, "layer": layer, **numbers, "multiply_adds": map_cost[0], "bytes": map_cost[1]})
    shape = len(decoders) + 1, len(layers), len(counts)
    return Grid.of_rows(rows, ["lens", "layer"]), torch.stack(sums).view(shape), counts[:, 0]


def _numbers(x: Float[Tensor, "row n"], counts: Float[Tensor, "row two"], index: Tensor) -> dict[str, float]:
    """Means over positions, and their intervals over resampled rows."""
    found = {}
    for name, own, of in (("kl", x[:, 0], 0), ("top1", x[:, 1], 0), ("cross_entropy", -x[:, 2], 1)):
        low, high = percentiles(own[index].sum(-1) / counts[:, of][index].sum(-1))
        mean = float(own.sum() / counts[:, of].sum())
        found |= {name: mean, f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


def _of_groups(x: Tensor, counts: Tensor, group: Tensor, model: Tensor, lens: Tensor) -> dict[str, float]:
    """Bias and calibration error, and their jackknife intervals over groups of rows."""
    kept = group.unique()
    by_group = torch.stack([torch.cat([x[group == g, 3:].sum(0), counts[group == g, 1].sum()[None]]) for g in kept])
    p, q = model[kept].double(), lens[kept].double()

    def bias(some: Tensor) -> float:
        logs = [m[some].sum(0).div(m[some].sum()).clamp_min(1e-30).log() for m in (p, q)]
        return max(0.0, float(S.kl(*logs)))

    def ece(some: Tensor) -> float:
        *excess, n = by_group[some].sum(0)
        return float(sum(abs(e) for e in excess) / n)

    found = {}
    for name, of in (("bias", bias), ("ece", ece)):
        value, low, high = jackknife(of, len(kept))
        found |= {name: value, f"{name}_low": max(0.0, low), f"{name}_high": high}
    return found


def _cost(decode: LayerLens) -> tuple[float, float]:
    """Multiply-adds per position of map and unembedding, and bytes of the map."""
    w_u, _ = decode.readout.weights()
    if decode.affine is None:
        return float(w_u.numel()), 0.0
    parts = (decode.affine.weight, decode.affine.bias)
    return float(w_u.numel() + parts[0].numel()), float(sum(x.numel() * x.element_size() for x in parts))

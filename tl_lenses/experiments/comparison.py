"""Which lens should I believe? Lenses of one model beside each other and beside controls, with a sentence per band of layers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.checks import seed_of
from tl_lenses.decode import decode, read_run
from tl_lenses.experiments.facts import Fact
from tl_lenses.experiments.grid import Grid, Table, interval
from tl_lenses.experiments.report import Report
from tl_lenses.experiments.subject import Subject, text_settings
from tl_lenses.experiments.which_lens.intermediates import RANDOM, Intermediates, Item, intermediates
from tl_lenses.experiments.which_lens.usage import Usage, usage
from tl_lenses.layers import LayerOrSite
from tl_lenses.lens import Lens, decoders_of, named_lenses
from tl_lenses.model import LensModel
from tl_lenses.numerics import DRAWS, percentiles, resampled
from tl_lenses.tokens import next_tokens, used_positions
from tl_lenses.views import Picture

UNIGRAM = "unigram"
_BINS = 10  # of the calibration


@dataclass(frozen=True, repr=False)
class Comparison(Report):
    """Lenses beside each other. The row "unigram" says the model's mean distribution over the text everywhere: what a frequent-token guess gets.

    The grid has the axes lens and layer: `kl` to the model (nats) with `kl_low`, `kl_high` over resampled rows of the text, `top1` agreement, `cross_entropy` of the
    next token (nats), `bias` (KL of the marginals, nats) and `ece`, the calibration error of the likeliest token as a guess of the next one.

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
        """For each band of layers (early, middle, late) and question: which lens, how sure, or that none beats its control."""
        return [f"{band}, {question}: {text}" for band, question, text in self._said()]

    def _said(self) -> list[tuple[str, str, str]]:
        said, questions = [], {"next token": self._next_token, "unspoken": self._unspoken, "used": self._used}
        bands = zip(("early", "middle", "late"), torch.arange(len(self.layers)).tensor_split(3), strict=True)
        for band, part in bands:
            if len(part):
                first, last = self.layers[int(part[0])], self.layers[int(part[-1])]
                where = f"{band}, layer {first}" + f" to {last}" * (first != last)
                said += [(where, question, text) for question, answer in questions.items() if (text := answer(part))]
        return said

    def _next_token(self, part: Tensor) -> str:
        index = resampled(len(self.counts), DRAWS, self.seed)
        draws = self.sums[:, part].mean(1)[:, index].sum(-1) / self.counts[index].sum(-1)  # [lens, draw]
        mean = self.sums[:, part].mean(1).sum(-1) / self.counts.sum()
        order = mean[:-1].argsort().tolist()
        best = order[0]
        low, high = (float(x) for x in percentiles(draws[best]))
        wins = float((draws[best] < draws[-1]).double().mean())
        if wins < 0.975:
            return f"none beats the unigram guess ({float(mean[-1]):.2f} nats)"
        text = f"{self.lenses[best]}, KL {interval(float(mean[best]), low, high)}, unigram {float(mean[-1]):.2f}"
        if len(order) > 1:
            sure = float((draws[best] < draws[order[1]]).double().mean())
            text += f"; below {self.lenses[order[1]]} in {sure:.0%} of resampled texts"
        return text

    def _unspoken(self, part: Tensor) -> str:
        if self.unspoken is None:
            return ""
        found, wanted = self.unspoken, [self.layers[int(i)] for i in part]
        rows = [i for i, layer in enumerate(found.layers) if layer in wanted]
        if not rows:
            return ""
        score = (1 - found.ranks[:, rows].amin(1).double().log() / torch.tensor(float(found.k_max)).log()).clamp_min(0)
        own, other = score.unbind(-1)  # [lens, item]
        best, control = int(own[:-1].mean(1).argmax()), found.lenses.index(RANDOM)
        index = resampled(own.shape[1], DRAWS, self.seed)
        above = (own[best] - torch.maximum(own[control].mean(), other[best].mean()))[index].mean(-1)
        low, _ = percentiles(above)
        if not float(low) > 0:
            return f"none beats its control ({own.shape[1]} items)"
        return f"{found.lenses[best]}, score {float(own[best].mean()):.2f}, other labels {float(other[best].mean()):.2f}, random map {float(own[control].mean()):.2f} ({own.shape[1]} items)"

    def _used(self, part: Tensor) -> str:
        if self.used is None:
            return ""
        wanted = [layer for layer in self.used.layers if layer in [self.layers[int(i)] for i in part]]
        if not wanted:
            return ""
        grid = self.used.grid.at(layer=wanted)
        best = int(grid["swap"].mean(1).argmax())
        if not float(grid["swap_low"][best].mean()) > float(grid["swap_random"][best].mean()):
            return "none beats random directions"
        return f"{self.used.lenses[best]}, a swap moves {float(grid['swap'][best].mean()):.1f} nats, random directions {float(grid['swap_random'][best].mean()):.1f}"

    def tables(self) -> list[Table]:
        """Next-token numbers, then those of the other reports, then the sentences."""
        rows = [
            [row["lens"], str(row["layer"]), interval(row["kl"], row["kl_low"], row["kl_high"]), f"{row['top1']:.1%}", *(f"{row[key]:.2f}" for key in ("cross_entropy", "bias", "ece"))]
            for row in self.grid.rows()
        ]  # fmt: skip
        columns = ["lens", "layer", "KL", "top-1", "next token", "bias", "calibration error"]
        note = f"{int(self.counts.sum())} positions; KL to the model, next token and bias in nats; 95% over rows of the text; unigram: the mean distribution everywhere"
        tables = [Table("next token", columns, rows, note, percent=False)]
        tables += [
            table for report in (self.unspoken, self.used) if report is not None for table in report.tables()[:1]
        ]
        said = [list(row) for row in self._said()]
        return [*tables, Table("which lens", ["layers", "question", "answer"], said, percent=False)]

    def pictures(self) -> dict[str, Picture]:
        """KL by layer; then those of the other reports."""
        pictures: dict[str, Picture] = {"kl": self.grid.lines("KL to the model by layer", "kl", by="lens", up="nats", log_y=True)}  # fmt: skip
        for report in (self.unspoken, self.used):
            pictures |= {} if report is None else report.pictures()
        return pictures


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

    Next token: KL to the model, beside the unigram guess. Unspoken intermediates, where `items` are given, beside a random map and other labels. Use,
    where `facts` are given: swaps along the lens' directions, beside the logit lens' and random ones. No single number ranks them.

    Args:
        lenses: a lens or `{name: lens}`; all share one pass over the text.
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
    seed, made = seed_of(seed), _Sums(subject)
    decoders, readout = decoders_of(subject.lenses, subject.layers), next(iter(subject.lenses.values())).readout
    for batch, used in subject.batches(tokens, skip_first=skip_first, desc="comparing", show_progress=show_progress):
        if used.any():
            reading = read_run(model, batch, subject.layers, (), used)
            goal = next_tokens(batch.tokens, used_positions(batch, False)).flatten()
            for chunk in decode(reading, decoders, readout):
                made.add(chunk, goal[chunk.at], made.n_rows + chunk.at // batch.tokens.shape[1])
            made.n_rows += len(batch.tokens)
    if made.n_rows < 2:
        raise ValueError(f"an interval is over rows of the text, and there are {made.n_rows}: give two rows at least")
    unspoken = used_by = None
    if items is not None:
        unspoken = intermediates(model, subject.lenses, items, layers=subject.layers, said=said, seed=seed, show_progress=show_progress)  # fmt: skip
    if facts is not None:
        used_by = usage(model, subject.lenses, facts, layers=subject.layers, seed=seed, show_progress=show_progress)
    grid, sums, counts = made.grid(seed)
    settings = {**text_settings(tokens), "skip_first": skip_first, "seed": seed, "positions": int(counts.sum())}
    return Comparison(subject.name, sums, counts, unspoken, used_by, seed, grid=grid, settings=settings)


class _Sums:
    """Running sums over positions. `by_row[key][row of the text]` holds those that are resampled."""

    def __init__(self, subject: Subject):
        self.names, self.layers = list(subject.lenses), subject.layers
        self.n_rows, self.counts = 0, {}
        self.kl: dict[Any, dict[int, float]] = {}
        self.totals: dict[Any, Tensor] = {}
        self.marginals: dict[Any, Tensor] = {}
        self.rows_p: dict[int, Tensor] = {}  # the model's distributions, summed by row of the text
        self.entropy: dict[int, float] = {}
        self.top: Tensor | None = None
        self.next: Tensor | None = None

    def add(self, chunk: Any, goal: Tensor, rows: Tensor) -> None:
        top, places = S.likeliest(chunk.logp), rows.cpu()
        if chunk.first:
            count = lambda ids: torch.bincount(ids.cpu(), minlength=chunk.p.shape[1]).double()
            self.top = count(top) + (0 if self.top is None else self.top)
            self.next = count(goal[goal >= 0]) + (0 if self.next is None else self.next)
            entropy = S.entropy(chunk.logp, chunk.p).double().cpu()
            for row in places.unique().tolist():
                inside = places == row
                self.counts[row] = self.counts.get(row, 0) + int(inside.sum())
                self.rows_p[row] = chunk.p[inside.to(chunk.p.device)].sum(0).double().cpu() + self.rows_p.get(row, 0)
                self.entropy[row] = self.entropy.get(row, 0.0) + float(entropy[inside].sum())
        for i, by_name in chunk.logits.items():
            for name, logits in by_name.items():
                logp = S.log_probs(logits)
                kl = S.kl(chunk.logp, logp, chunk.p).double().cpu()
                sums = self.kl.setdefault((name, i), {})
                for row in places.unique().tolist():
                    sums[row] = sums.get(row, 0.0) + float(kl[places == row].sum())
                best, p, scored = S.likeliest(logp), logp.amax(-1).exp(), goal >= 0
                bins = (p[scored] * _BINS).long().clamp(max=_BINS - 1)
                table = torch.zeros(3, _BINS, dtype=torch.float64)
                for k, x in enumerate((p[scored], (best == goal)[scored], torch.ones_like(p[scored]))):
                    table[k].index_add_(0, bins.cpu(), x.double().cpu())
                loss = -float(S.target_logprob(logp, goal).double().nansum())
                numbers = torch.cat(
                    [torch.tensor([float((best == top).sum()), loss], dtype=torch.float64), table.flatten()]
                )
                self.totals[name, i] = numbers + self.totals.get((name, i), 0)
                self.marginals[name, i] = logp.exp().sum(0).double().cpu() + self.marginals.get((name, i), 0)

    def grid(self, seed: int) -> tuple[Grid, Tensor, Tensor]:
        """The grid, and KL by lens, layer and row of the text, with their numbers of positions."""
        places = sorted(self.counts)
        counts = torch.tensor([float(self.counts[row]) for row in places], dtype=torch.float64)
        n, index = float(counts.sum()), resampled(len(places), DRAWS, seed)
        whole = torch.stack([self.rows_p[row] for row in places])
        marginal = whole.sum(0) / n
        log_marginal = marginal.clamp_min(1e-30).log()
        # KL(p || q) of q the same everywhere: sum over positions of -p . log q - H(p)
        guess = -(whole @ log_marginal) - torch.tensor([self.entropy[row] for row in places], dtype=torch.float64)
        sums = torch.stack([torch.stack([torch.tensor([self.kl[name, i][row] for row in places], dtype=torch.float64) for i in range(len(self.layers))]) for name in self.names] + [guess.expand(len(self.layers), -1)])  # fmt: skip
        assert self.top is not None and self.next is not None
        n_next = float(self.next.sum().clamp_min(1))
        best = int(marginal.argmax())
        rows = []
        for k, name in enumerate([*self.names, UNIGRAM]):
            for i, layer in enumerate(self.layers):
                low, high = percentiles(sums[k, i][index].sum(-1) / counts[index].sum(-1))
                row = {
                    "lens": name,
                    "layer": layer,
                    "kl": float(sums[k, i].sum()) / n,
                    "kl_low": float(low),
                    "kl_high": float(high),
                }
                if name == UNIGRAM:
                    right = float(self.next[best]) / n_next
                    row |= {"top1": float(self.top[best]) / n, "cross_entropy": -float((self.next * log_marginal).sum()) / n_next, "bias": 0.0, "ece": abs(float(marginal[best]) - right)}  # fmt: skip
                else:
                    agreed, loss, *table = self.totals[name, i].tolist()
                    said, right, _ = torch.tensor(table).view(3, _BINS)
                    own = (self.marginals[name, i] / n).clamp_min(1e-30).log()
                    row |= {"top1": agreed / n, "cross_entropy": loss / n_next, "bias": float(S.kl(log_marginal, own)), "ece": float((said - right).abs().sum()) / n_next}  # fmt: skip
                rows.append(row)
        return Grid.of_rows(rows, ["lens", "layer"]), sums, counts

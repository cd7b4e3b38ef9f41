"""Is what a lens reads what the model uses? Swaps and ablations along a lens' directions, and their angle to a subspace that mediates."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses.checks import seed_of, several, whole_number
from tl_lenses.experiments.facts import Fact, facts_of
from tl_lenses.experiments.grid import Grid, Table, interval
from tl_lenses.experiments.report import Report
from tl_lenses.experiments.subject import Subject
from tl_lenses.hooks import patch, run
from tl_lenses.layers import LayerOrSite
from tl_lenses.lens import Lens
from tl_lenses.model import LensModel, prepare
from tl_lenses.numerics import DRAWS, gain, percentiles, resampled
from tl_lenses.progress import progress
from tl_lenses.sites import site
from tl_lenses.tokens import Batch
from tl_lenses.views import Picture

LOGIT = "logit lens"


@dataclass(frozen=True, repr=False)
class Usage(Report):
    """What swaps and ablations along a lens' directions do to an answer, nats, means over facts.

    The grid has the axes lens and layer. `swap`: the change of `log p(other) - log p(answer)`, and `flips`, the share of facts whose likeliest token becomes the other
    answer. `ablate`: the change of the answer's log-odds. `..._random`: the same change of the state in size, along random
    directions. Each has an interval over resampled facts, `swap_low` and `swap_high`.

    Attributes:
        facts: whose answers the model gives.
        others: for each the answer that it is swapped with.
    """

    facts: list[Fact] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    name = "usage"

    def tables(self) -> list[Table]:
        """A row per lens and layer."""
        rows = [
            [row["lens"], str(row["layer"]), *(cell for key, k, digits in (("swap", 1, 1), ("flips", 100, 0), ("ablate", 1, 1)) for cell in self._cells(row, key, k, digits))]
            for row in self.grid.rows()
        ]  # fmt: skip
        columns = ["lens", "layer", "swap, nats", "random", "flips, %", "random", "ablate, nats", "random"]
        note = f"{len(self.facts)} facts; 95% over facts; random: a change of the same size along random directions"
        return [Table("decodable against used", columns, rows, note, percent=False)]

    def _cells(self, row: dict[str, Any], key: str, k: int, digits: int) -> tuple[str, str]:
        """A number with its interval, and its control."""
        of = interval(*(k * row[f"{key}{end}"] for end in ("", "_low", "_high")), digits=digits)
        return of, f"{k * row[f'{key}_random']:.{digits}f}"

    def pictures(self) -> dict[str, Picture]:
        """The effect of a swap by layer."""
        up = "log-odds of the other answer, nats"
        return {"swap": self.grid.lines("swaps along lens directions", "swap", by="lens", up=up)}


def lens_directions(lens: Lens, layer: LayerOrSite, ids: Int[Tensor, " k"] | Sequence[int]) -> Float[Tensor, "k d"]:
    """`v_t = W_l^T C (gain * (W_U[:, t] - mean_v W_U[:, v]))`: along it the lens' logit of t rises most, beside all others' mean.

    C removes the mean where the norm does. The mean over the vocabulary is taken off, since no softmax sees it and it is most of what all
    directions share.

    Raises:
        KeyError: a layer that was not fitted.

    Example:
        >>> lens_directions(lens, 4, torch.tensor([1535, 262])).shape      # doctest: +SKIP
        torch.Size([2, 256])
    """
    if not isinstance(lens, Lens):
        raise TypeError(f"expected a Lens, got {type(lens).__name__}: tll.Lens(model) makes one")
    w_u, _ = lens.readout.weights()
    listed = ids.flatten().tolist() if isinstance(ids, Tensor) else several("ids", ids, "token ids")
    ids = torch.tensor([whole_number("a token id", i, least=0, most=w_u.shape[1] - 1) for i in listed], dtype=torch.long)
    gains, removes_mean = gain(lens.readout.norm_module, w_u.shape[0], w_u.new_zeros((), dtype=torch.float64 if w_u.dtype == torch.float64 else torch.float32))  # fmt: skip
    v = gains * (w_u[:, ids].T - w_u.mean(1)).to(gains)
    v = v - v.mean(-1, keepdim=True) if removes_mean else v
    affine = lens[layer].affine
    return v if affine is None else v @ affine.weight.detach().to(v)


@runtime_checkable
class HasBasis(Protocol):
    """What TransformerLens' `fit_das` returns: a learned subspace."""

    @property
    def basis(self) -> Float[Tensor, "d k"]:
        """Orthonormal columns."""
        ...


@dataclass(frozen=True)
class Angle:
    """The largest principal angle between two subspaces, degrees, and what random ones have.

    Attributes:
        degrees: 0 where the smaller one lies in the other.
        null: the middle 95% of the angle of a Haar-random subspace of the lens' dimension.
        overlap: mean squared cosine; `overlap_null = k / d` is expected of a random one.
    """

    degrees: float
    null: tuple[float, float]
    overlap: float
    overlap_null: float


def readout_angle(
    directions: Float[Tensor, "n d"], subspace: Float[Tensor, "d k"] | HasBasis, *, draws: int = DRAWS, seed: int = 0
) -> Angle:
    """The angle between a lens' directions and a subspace that a model uses, such as DAS finds (`transformer_lens.tools.analysis.fit_das`).

    `cos = the least singular value of Q_v^T Q_s`, of min(n, k) ones, Q orthonormal bases. A perfect readout at a random angle is no mediator.

    Args:
        directions: of a lens, such as `lens_directions` gives.
        subspace: columns that span it, or what `fit_das` returns, at the same layer.
        draws: random subspaces for the null.
        seed: of these.

    Raises:
        ValueError: widths that differ; fewer dimensions than directions.

    Source: 2605.29126 (readout-mediator angle); Björck and Golub 1973.

    Example:
        >>> readout_angle(torch.eye(8)[:1], torch.eye(8)[:, :2]).degrees
        0.0
    """
    span: Tensor = subspace if isinstance(subspace, Tensor) else getattr(subspace, "basis", subspace)  # type: ignore[assignment]
    for name, x in (("directions", directions), ("subspace", span)):
        if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
            raise TypeError(f"{name} must be a matrix, got {type(x).__name__} {list(getattr(x, 'shape', []))}")
    d, draws, seed = directions.shape[1], whole_number("draws", draws, least=2), seed_of(seed)
    if len(span) != d or len(directions) > d or span.shape[1] > d:
        raise ValueError(f"directions [n, d] and a subspace [d, k] of one width, got {list(directions.shape)} and {list(span.shape)}")  # fmt: skip
    basis = torch.linalg.qr(span.detach().double())[0]
    cosines = lambda v: torch.linalg.svdvals(torch.linalg.qr(v.detach().double().mT)[0].mT @ basis).clamp(max=1)
    degrees = lambda c: c.amin(-1).acos().rad2deg()
    own = cosines(directions)
    drawn = torch.randn(draws, *directions.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = percentiles(degrees(cosines(drawn)))
    most = max(len(directions), basis.shape[1])
    exact = 0.0 if float(own.amin()) > 1 - 1e-12 else float(degrees(own))
    return Angle(exact, (float(low), float(high)), float(own.square().mean()), most / d)


@torch.no_grad()
def usage(
    model: LensModel,
    lenses: Lens | Mapping[str, Lens],
    facts: Sequence[Fact] | str | Path | None = None,
    *,
    layers: Iterable[LayerOrSite] | None = None,
    n: int | None = 24,
    seed: int = 0,
    show_progress: bool | None = None,
) -> Usage:
    """Swap and ablate what lenses read at the last token of a question: does the model's answer follow?

    With unit directions s of the answer and t of another answer of the same relation, a swap is `h <- h - (h.s) s + (h.s) t`, and an ablation
    `h <- h - (h.s) s`. The logit lens' directions are a row, where it is not among the lenses.

    Args:
        lenses: a lens or `{name: lens}`.
        facts: `read_facts(...)`, or the path that it takes; those that the model answers with its likeliest token count.
        layers: `0..n_layers - 1` by default.
        n: facts, drawn at random; None takes all.
        seed: of draw, other answers, random directions and intervals.

    Raises:
        ValueError: fewer than two facts that the model knows.

    Source: Gurnee et al. 2026 (2607.15495), swaps; norm-matched placebos as in TransformerLens' `interchange`.

    Example:
        >>> print(usage(model, {"tuned": lens}))      # doctest: +SKIP
    """
    subject = Subject.of(model, lenses, layers, what="usage", final="never" if layers is not None else "asked")
    n, seed = None if n is None else whole_number("n", n, least=2), seed_of(seed)
    chosen, others, ids = _asked(model, facts_of(facts)[0], n, seed)
    if len(chosen) < 2:
        raise ValueError(f"{len(chosen)} facts are answered by the model's likeliest token, two are needed: give other facts")
    batch = prepare(model, [fact.question for fact in chosen])
    plain = run(model, batch.tokens, attention_mask=batch.attention_mask)[:, -1].float().log_softmax(-1)
    is_there = any(lens.translators is None for lens in subject.lenses.values())
    named = subject.lenses if is_there else {LOGIT: Lens(model), **subject.lenses}
    index, rows = resampled(len(chosen), DRAWS, seed), []
    with progress(total=len(named) * len(subject.layers), desc="usage", show=show_progress) as bar:
        for name, lens in named.items():
            for layer in subject.layers:
                v = torch.nn.functional.normalize(lens_directions(lens, layer, ids.flatten()), dim=-1)
                s, t = v.view(len(chosen), 2, -1).unbind(1)
                noise = torch.randn(2, *s.shape, generator=torch.Generator().manual_seed(seed)).to(s)
                r = torch.nn.functional.normalize(noise, dim=-1)
                row: dict[str, Any] = {"lens": name, "layer": layer}
                for key, (off, on) in {"": (s, t), "_random": (r[0], r[1])}.items():
                    swapped = _run(model, batch, layer, s, off, on)
                    ablated = _run(model, batch, layer, s, off, torch.zeros_like(off))
                    measured = {
                        "swap": _difference(swapped, ids) - _difference(plain, ids),
                        "flips": (swapped.argmax(-1).cpu() == ids[:, 1]).double(),
                        "ablate": _log_odds(ablated, ids) - _log_odds(plain, ids),
                    }
                    for what, x in measured.items():
                        low, high = percentiles(x[index].mean(-1))
                        row |= {f"{what}{key}": float(x.mean()), f"{what}{key}_low": float(low), f"{what}{key}_high": float(high)}  # fmt: skip
                rows.append(row)
                bar.update()
    grid = Grid.of_rows(rows, ["lens", "layer"])
    other_texts = [other.object for other in others]
    return Usage(subject.name, chosen, other_texts, grid=grid, settings={"facts": len(chosen), "seed": seed})


def _asked(model: LensModel, facts: list[Fact], n: int | None, seed: int) -> tuple[list[Fact], list[Fact], Tensor]:
    """Facts that the model answers at once, for each another fact of its relation, and first tokens of both answers `[fact, 2]`."""
    facts = list(dict.fromkeys(facts))
    random.Random(seed).shuffle(facts)
    chosen, others, ids = [], [], []
    for fact in facts:
        if n is not None and len(chosen) >= n:
            break
        pool = [other for other in facts if other.relation == fact.relation and other.object != fact.object]
        if not pool or "{}" not in fact.template:
            continue
        tokens, (answer, length) = prepare(model, fact.question).tokens, _first(model, fact.question, fact.object)
        other = pool[random.Random(f"{seed} {fact.question}").randrange(len(pool))]
        swapped, _ = _first(model, fact.question, other.object)
        if tokens.shape[1] == length and answer != swapped and int(run(model, tokens)[0, -1].argmax()) == answer:
            chosen.append(fact)
            others.append(other)
            ids.append((answer, swapped))
    return chosen, others, torch.tensor(ids, dtype=torch.long).view(-1, 2)


def _first(model: LensModel, question: str, answer: str) -> tuple[int, int]:
    """The first token of an answer behind a question, and how many tokens come before it."""
    alone, both = prepare(model, question).tokens[0].tolist(), prepare(model, f"{question} {answer}").tokens[0].tolist()
    same = next((i for i, (a, b) in enumerate(zip(alone, both, strict=False)) if a != b), min(len(alone), len(both) - 1))
    return both[same], same


def _run(model: LensModel, batch: Batch, layer: int, read: Tensor, off: Tensor, on: Tensor) -> Tensor:
    """Log-probabilities after `h <- h - c off + c on` at the last token, `c = h . read`."""

    def edit(x: Float[Tensor, "batch one d"]) -> Float[Tensor, "batch one d"]:
        y = x[:, 0].to(read)
        share = (y * read).sum(-1, keepdim=True)
        return (y - share * off + share * on)[:, None].to(x)

    hook = patch(site(model, layer), edit, pos=-1)
    return run(model, batch.tokens, [hook], attention_mask=batch.attention_mask)[:, -1].float().log_softmax(-1)


def _difference(logp: Tensor, ids: Tensor) -> Tensor:
    """`log p(other) - log p(answer)`."""
    own = logp.gather(-1, ids.to(logp.device))
    return (own[:, 1] - own[:, 0]).double().cpu()


def _log_odds(logp: Tensor, ids: Tensor) -> Tensor:
    """`log p - log(1 - p)` of the answer."""
    p = logp.gather(-1, ids[:, :1].to(logp.device))[:, 0].double().cpu()
    return p - torch.log(-torch.expm1(p.clamp(max=-1e-12)))

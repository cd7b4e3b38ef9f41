"""The input of every view, from a trajectory: row labels, real columns, cell texts and values as plain lists.

A trajectory is known here only by its attributes (`layers, n_layers, name, model_name, tokens, mask, targets,
anti_targets, stats, top_ids, top_probs, vocab`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_lenses.checks import index, several
from tl_lenses.files import readable
from tl_lenses.views.style import STATS, Scale, Stat, between, scale_of, stat_info, versus

Trajectory = Any  # duck-typed: a view never imports what it draws


@dataclass(frozen=True)
class Grid:
    """One batch row without its pads. Rows run from the first layer to the last; views turn them over."""

    labels: list[str]
    positions: list[int]  # columns of traj.tokens
    tokens: list[str]
    targets: list[str | None]
    top: list[list[list[tuple[str, float]]]]  # [layer][position][k]
    hits: list[list[bool]]  # the top token is the target


def grid(traj: Trajectory, batch: int = 0, top: int | None = None) -> Grid:
    """The cells of batch row `batch`, each with its `top` likeliest tokens (all if None).

    ValueError for a row out of range and for a trajectory without top tokens.
    """
    if not traj.top_ids.shape[-1]:
        raise ValueError("this trajectory has no top tokens to show: make it with top_k=1 or more")
    b = batch_row(traj, batch)
    columns = torch.nonzero(traj.mask[b]).flatten()
    ids = traj.top_ids[:, b, columns, :top]
    targets = traj.targets[b, columns]
    cells = [
        [[(token(traj, i), p) for i, p in zip(*cell, strict=True)] for cell in zip(*layer, strict=True)]
        for layer in zip(ids.tolist(), traj.top_probs[:, b, columns, :top].tolist(), strict=True)
    ]
    return Grid(
        labels=row_labels(traj.layers),
        positions=columns.tolist(),
        tokens=[token(traj, i) for i in traj.tokens[b, columns].tolist()],
        targets=[token(traj, i) if i >= 0 else None for i in targets.tolist()],
        top=cells,
        hits=((ids[..., 0] == targets) & (targets >= 0)).tolist(),
    )


def checked(traj: Any) -> Trajectory:
    """A trajectory."""
    if not all(hasattr(traj, name) for name in ("layers", "tokens", "mask", "stats", "top_ids")):
        raise TypeError(f"expected a trajectory, or a mapping of them, got {type(traj).__name__}: tll.trajectory makes one")
    return traj


def token(traj: Trajectory, i: int) -> str:
    """The text of a token id as the trajectory's vocabulary has it, else `<i>`."""
    return traj.vocab.get(i, f"<{i}>")


def batch_row(traj: Trajectory, batch: int) -> int:
    """`batch` counted from the front; ValueError outside the batch."""
    n = traj.tokens.shape[0]
    return index("batch", batch, n, f"this trajectory has {n} row{'s' * (n > 1)}")


def row_labels(layers: tuple[Any, ...]) -> list[str]:
    """Short names of the rows (layers, sites, or tuples of them), the full ones where short names would collide.

    >>> row_labels((0, "blocks.3.hook_resid_mid", "blocks.3.attn.hook_z"))
    ['0', '3 resid_mid', '3 attn.z']
    """
    short = [re.sub(r"^blocks\.(\d+)\.", r"\1 ", readable(str(layer))).replace("hook_", "") for layer in layers]
    return short if len(set(short)) == len(short) else [readable(str(layer)) for layer in layers]


def available(traj: Trajectory) -> list[str]:
    """The statistics that can be drawn, those of `STATS` first. Top tokens give `max_prob` too."""
    names = {*traj.stats, *(["max_prob"] if traj.top_ids.shape[-1] else [])}
    return [n for n in STATS if n in names] + [n for n in traj.stats if n not in STATS]


def pick(traj: Trajectory, stat: str | None) -> Stat:
    """The named statistic; None takes kl, else entropy, else the first. ValueError lists the available ones."""
    names = available(checked(traj))
    if stat is None:
        return stat_of(traj, next((n for n in ("kl", "entropy") if n in names), names[0]))
    if not isinstance(stat, str) or stat not in names:
        raise ValueError(f"no statistic {stat!r} in this trajectory: it has {', '.join(names)}")
    return stat_of(traj, stat)


def stat_of(traj: Trajectory, name: str) -> Stat:
    """How a statistic of this trajectory is drawn."""
    return getattr(traj, "drawn", {}).get(name) or stat_info(name)


def set_aside(*trajs: Trajectory) -> Bool[Tensor, "batch pos"]:
    """Positions that the fit of one of these lenses left out (`skip_first`): drawn faded, and no part of a colour scale."""
    out = [x for t in trajs if (x := getattr(t, "left_out", None)) is not None]
    return torch.stack(out).any(0) if out else torch.zeros_like(trajs[0].mask)


FADED = "faded: position 0, which the fit left out (skip_first), as the colour scale does"


def values(traj: Trajectory, stat: Stat) -> Tensor:
    """The statistic as floats `[layer, batch, pos]`, NaN where undefined and at pads."""
    if stat.name in traj.stats:
        x = traj.stats[stat.name]
        x = x.double() if x.is_floating_point() else torch.where(x < 0, torch.nan, x.double())
    else:
        x = traj.top_probs[..., 0].double()
    return torch.where(traj.mask, x.detach(), torch.nan)


def row_values(traj: Trajectory, stat: Stat, batch: int, positions: list[int]) -> list[list[float]]:
    """`values` of one batch row at these positions, [layer][position]."""
    return values(traj, stat)[:, batch, positions].tolist()


def scale(stat: Stat, *trajs: Trajectory) -> Scale:
    """One colour range for all rows of all these trajectories, so that their pictures compare."""
    used = ~set_aside(*trajs)
    shown = [values(t, stat)[:, used].flatten() for t in trajs if stat.name in available(t)]
    return scale_of(stat, torch.cat(shown).sort().values.tolist())


def lenses(traj: Trajectory | Mapping[str, Trajectory]) -> dict[str, Trajectory]:
    """A trajectory or a mapping of them as a dict by lens name. ValueError where their layers or tokens differ."""
    if not isinstance(traj, Mapping):
        return {checked(traj).name or getattr(traj, "settings", {}).get("lens", "lens"): traj}
    by_name = {readable(str(name)): checked(trajectory) for name, trajectory in traj.items()}
    if not by_name:
        raise ValueError("expected at least one trajectory, got an empty mapping")
    first_name, first = next(iter(by_name.items()))
    for name, other in by_name.items():
        if tuple(other.layers) != tuple(first.layers):
            raise ValueError(f"the lenses {first_name!r} and {name!r} have different layers: {first.layers} and {other.layers}")
        if not torch.equal(other.tokens, first.tokens) or not torch.equal(other.mask, first.mask):
            raise ValueError(f"the lenses {first_name!r} and {name!r} were read on different tokens")
    return by_name


@dataclass(frozen=True)
class Difference:
    """What two lenses say on the same prompt, as a trajectory to draw: the statistics of a minus those of b, and how far
    they are from each other; the tokens in its cells are a's. `drawn` has the statistics by name.
    """

    name: str
    of: tuple[str, str]
    layers: tuple[Any, ...]
    n_layers: int
    model_name: str
    tokens: Tensor
    mask: Tensor
    targets: Tensor
    top_ids: Tensor
    top_probs: Tensor
    vocab: Mapping[int, str]
    left_out: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)
    drawn: dict[str, Stat] = field(default_factory=dict)


def difference(trajs: Mapping[str, Trajectory], pair: tuple[str, str]) -> Difference:
    """The first lens of a pair of names minus the second at every cell (of ranks, log₁₀); with `divergence` where `trajs` has it.

    ValueError for a name that is not there, or twice the same.
    """
    by_name, names = lenses(trajs), several("diff", pair, "names of two lenses")
    if any(not isinstance(n, str) or n not in by_name for n in names) or len(set(names)) != 2 or len(names) != 2:
        raise ValueError(f"a difference needs two of the lenses {', '.join(by_name)}, got {pair!r}")
    a, b = names
    x, y = by_name[a], by_name[b]
    made = Difference(
        f"{a} − {b}", (a, b), x.layers, x.n_layers, x.model_name, x.tokens, x.mask, x.targets, x.top_ids, x.top_probs,
        {**y.vocab, **x.vocab}, set_aside(x, y),
    )  # fmt: skip
    for stat in (stat_of(x, name) for name in available(x) if name in available(y)):
        left, right = values(x, stat), values(y, stat)
        made.stats[stat.name] = left.log10() - right.log10() if stat.curve == "log" else left - right
        made.drawn[stat.name] = versus(stat, a, b)
    if hasattr(trajs, "divergence"):
        for kind, stat in between(a, b).items():
            made.stats[stat.name], made.drawn[stat.name] = trajs.divergence(a, b, kind), stat  # type: ignore[attr-defined]
    return made


def base_name(model: str) -> str:
    """`SmolLM2-135M` of `HuggingFaceTB/SmolLM2-135M` or of a folder."""
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1]


def heading(traj: Trajectory, name: str = "") -> str:
    """`pythia-70m, tuned lens`; a lens without a name is called by its kind."""
    name = name or traj.name or getattr(traj, "settings", {}).get("lens", "")
    lens = name if isinstance(traj, Difference) else f"{name} lens" if name else "lens"
    return readable(f"{base_name(traj.model_name)}, {lens}" if traj.model_name else lens)

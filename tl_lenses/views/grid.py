"""From a trajectory to what every view draws: row labels, real columns, cell texts and values as plain lists.

A trajectory is known here only by its attributes (`layers, n_layers, name, model_name, tokens, mask, targets,
anti_targets, stats, top_ids, top_probs, vocab`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tl_lenses.views.style import STATS, Scale, Stat, scale_of, stat_info

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
    """The cells of batch row `batch`; `top` tokens each, all that there are if None.

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


def token(traj: Trajectory, i: int) -> str:
    """The text of a token id as the trajectory's vocabulary has it, else `<i>`."""
    return traj.vocab.get(i, f"<{i}>")


def batch_row(traj: Trajectory, batch: int) -> int:
    """`batch` counted from the front; ValueError outside the batch."""
    n = traj.tokens.shape[0]
    if not -n <= batch < n:
        raise ValueError(f"batch={batch} is out of range: this trajectory has {n} row{'s' * (n > 1)} (0..{n - 1})")
    return batch % n


def row_labels(layers: tuple[int | str, ...]) -> list[str]:
    """Short names of the rows, the full ones where short names would collide.

    >>> row_labels((0, "blocks.3.hook_resid_mid", "blocks.3.attn.hook_z"))
    ['0', '3 resid_mid', '3 attn.z']
    """
    short = [re.sub(r"^blocks\.(\d+)\.", r"\1 ", str(layer)).replace("hook_", "") for layer in layers]
    return short if len(set(short)) == len(short) else [str(layer) for layer in layers]


def available(traj: Trajectory) -> list[str]:
    """The statistics that can be drawn, in the table's order first. `max_prob` is there wherever top tokens are."""
    names = {*traj.stats, *(["max_prob"] if traj.top_ids.shape[-1] else [])}
    return [n for n in STATS if n in names] + [n for n in traj.stats if n not in STATS]


def pick(traj: Trajectory, stat: str | None) -> Stat:
    """The statistic asked for, else kl, entropy or the first one there. ValueError lists the available ones."""
    names = available(traj)
    if stat is None:
        return stat_info(next((n for n in ("kl", "entropy") if n in names), names[0]))
    if stat not in names:
        raise ValueError(f"no statistic {stat!r} in this trajectory: it has {', '.join(names)}")
    return stat_info(stat)


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
    return scale_of(
        stat, torch.cat([values(t, stat).flatten() for t in trajs if stat.name in available(t)]).sort().values.tolist()
    )


def lenses(traj: Trajectory | Mapping[str, Trajectory]) -> dict[str, Trajectory]:
    """A trajectory or a mapping of them as a dict by lens name. ValueError where their layers or tokens differ."""
    if not isinstance(traj, Mapping):
        return {traj.name or "lens": traj}
    found = {str(name): one for name, one in traj.items()}
    if not found:
        raise ValueError("expected at least one trajectory, got an empty mapping")
    first_name, first = next(iter(found.items()))
    for name, other in found.items():
        if tuple(other.layers) != tuple(first.layers):
            raise ValueError(
                f"the lenses {first_name!r} and {name!r} have different layers: {first.layers} and {other.layers}"
            )
        if not torch.equal(other.tokens, first.tokens) or not torch.equal(other.mask, first.mask):
            raise ValueError(f"the lenses {first_name!r} and {name!r} were read on different tokens")
    return found


def heading(traj: Trajectory) -> str:
    """`pythia-70m, tuned lens`, as far as the names are known."""
    lens = f"{traj.name} lens" if traj.name else "lens"
    return f"{traj.model_name}, {lens}" if traj.model_name else lens

"""Trajectories as data: a pandas frame, and JSON that has everything."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_lenses.files import json_text
from tl_lenses.views.grid import Trajectory, checked, lenses, token, values
from tl_lenses.views.style import stat_info

SCHEMA = "tl_lenses.trajectories"
VERSION = 1


def frame(traj: Trajectory | Mapping[str, Trajectory]) -> Any:
    """A pandas frame with one row per (layer, batch, pos), pads left out. A mapping is stacked, with a column `lens`.

    Columns: layer, batch, pos (of `traj.tokens`), token_id, token, target_id, target, every statistic, top_id, top,
    top_prob. Where there is no target, its id and rank are <NA> and the text is None.

    >>> frame(traj).query("layer == 3")[["token", "top", "kl"]]
    """
    import pandas as pd

    if isinstance(traj, Mapping):
        by_name = lenses(traj)
        return pd.concat([frame(t).assign(lens=name) for name, t in by_name.items()], ignore_index=True)[
            ["lens", *frame(next(iter(by_name.values()))).columns]
        ]
    n_layers = len(checked(traj).layers)
    b, p = torch.nonzero(traj.mask, as_tuple=True)
    n = len(b)
    tokens, targets = traj.tokens[b, p].tolist(), traj.targets[b, p].tolist()
    columns: dict[str, Any] = {
        "layer": [layer for layer in traj.layers for _ in range(n)],
        "batch": b.tolist() * n_layers,
        "pos": p.tolist() * n_layers,
        "token_id": tokens * n_layers,
        "token": [token(traj, i) for i in tokens] * n_layers,
        "target_id": pd.array([i if i >= 0 else None for i in targets] * n_layers, dtype="Int64"),
        "target": [token(traj, i) if i >= 0 else None for i in targets] * n_layers,
    }
    for name, raw in traj.stats.items():
        x = values(traj, stat_info(name))[:, b, p].flatten()
        if raw.is_floating_point():
            columns[name] = x.to(raw.dtype).numpy()
        else:
            columns[name] = pd.array([None if math.isnan(v) else int(v) for v in x.tolist()], dtype="Int64")
    if traj.top_ids.shape[-1]:
        top_ids = traj.top_ids[:, b, p, 0].flatten().tolist()
        columns["top_id"] = top_ids
        columns["top"] = [token(traj, i) for i in top_ids]
        columns["top_prob"] = traj.top_probs[:, b, p, 0].flatten().tolist()
    return pd.DataFrame(columns)


def to_json(traj: Trajectory | Mapping[str, Trajectory]) -> str:
    """Everything a trajectory holds, as JSON: nested lists in the tensors' shapes, NaN and infinities null, fp32 exact.

    `{"schema": "tl_lenses.trajectories", "version": 1, "trajectories": [{"name", "model_name", "n_layers", "layers",
    "tokens", "mask", "targets", "anti_targets", "stats", "top_ids", "top_probs", "tracked",
    "settings", "vocab"}]}`, one entry per lens.

    >>> json.loads(to_json(traj))["trajectories"][0]["stats"]["kl"][-1]
    """
    by_name = lenses(traj)
    body = {"schema": SCHEMA, "version": VERSION, "trajectories": [_plain(name, t) for name, t in by_name.items()]}
    return json_text(body, compact=True)


def _plain(name: str, traj: Trajectory) -> dict[str, Any]:
    return {
        "name": name, "model_name": traj.model_name, "n_layers": traj.n_layers, "layers": list(traj.layers),
        "tokens": traj.tokens.tolist(), "mask": traj.mask.tolist(), "targets": traj.targets.tolist(),
        "anti_targets": None if traj.anti_targets is None else traj.anti_targets.tolist(),
        "stats": {stat: _numbers(x) for stat, x in traj.stats.items()}, "top_ids": traj.top_ids.tolist(),
        "top_probs": _numbers(traj.top_probs), "tracked": _tracked(traj), "settings": dict(getattr(traj, "settings", {})),
        "vocab": {str(i): text for i, text in sorted(traj.vocab.items())},
    }  # fmt: skip


def _tracked(traj: Trajectory) -> Any:
    tracked = getattr(traj, "tracked", None)
    if tracked is None:
        return None
    return {"ids": tracked.ids.tolist(), "ranks": tracked.ranks.tolist(), "probs": _numbers(tracked.probs)}


def _numbers(x: Tensor) -> Any:
    """Nested lists; floats as the shortest decimal that is the same fp32 number, null where there is none."""
    if not x.is_floating_point():
        return x.tolist()
    flat = x.detach().float().cpu().numpy()
    shortest = flat.astype(np.str_).astype(np.float64).astype(object)
    shortest[~np.isfinite(flat)] = None
    return shortest.tolist()

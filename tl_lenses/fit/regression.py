"""Closed-form maps in one pass over the text: a lens, shortcuts between layers, and maps from one model into another."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tl_lenses import solve
from tl_lenses.checks import finite_number, one_of
from tl_lenses.deprecation import say
from tl_lenses.fit.common import record, row_groups, rows_for, rows_of_pairs
from tl_lenses.fit.evidence import Evidence, Reading, collect, collect_held_out, count, groups_of
from tl_lenses.fit.state import alone, state_file
from tl_lenses.fit.stop import is_share
from tl_lenses.fit.team import processes
from tl_lenses.hooks import Hook, checked_hooks
from tl_lenses.identity import check_tokenizers, identity_of
from tl_lenses.layers import LayerOrSite
from tl_lenses.model import LensModel, check_model, n_layers
from tl_lenses.moments import Moments
from tl_lenses.text.batches import Text
from tl_lenses.translators import Row, Translators

Method = Literal["ridge", "procrustes", "shift"]

__all__ = ["Evidence", "collect", "fit_regression", "maps_of"]


@torch.inference_mode(False)  # so that the maps can be trained on, whatever mode they are fitted in
@torch.no_grad()
def fit_regression(
    model: LensModel,
    tokens: Any,
    layers: Iterable[LayerOrSite] | None = None,
    to: LensModel | LayerOrSite | None = None,
    ridge: float | Sequence[float] = 1e-3,
    *,
    skip_first: bool = True,
    hooks: Iterable[Hook] = (),
    pairs: Iterable[tuple[LayerOrSite, LayerOrSite]] | None = None,
    target_layer: LayerOrSite | None = None,
    target_hooks: Iterable[Hook] = (),
    held_out: Any = None,
    toward: Literal["identity", "zero"] | None = None,
    method: Method = "ridge",
    limit_tokens: int | None = None,
    layers_at_once: int | None = None,
    offload: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    note: Mapping[str, Any] | None = None,
    show_progress: bool | None = None,
) -> Translators:
    """Least squares between states: `W = (B + k T)(C + k I)^-1`, `b = mean_y - W mean_x`, all maps in one pass.

    Without `to` and `pairs`, the regression lens: each layer to the final residual (before the final norm). With
    `pairs`, every (l, l*) of one model; with `to=` another model, from a state here to the state there at the same
    token, `translators[l, l*]`. Moments are streamed in float64, so the result does not depend on how the text is
    batched. To fit over shards: `collect` each shard, add the results, then `maps_of(model, sum)`.

    Args:
        tokens: `[n, seq]`, `token_batches(...)`, an iterable of batches, or the path of stored states (`capture`); both models read the same ids.
        layers: source layers or sites, `0..n_layers-1` by default; heads are flattened.
        to: another model, with the same tokenizer. (A layer here is the old name of `target_layer`.)
        ridge: strength relative to the covariance's mean eigenvalue, 0 or more. Of several, each map gets the best on rows
            set aside for it (every tenth), then is fitted on these too.
        skip_first: leave out real position 0 of each row and nothing else.
        hooks: interventions under which to fit.
        pairs: (l, l*) to fit. By default, with another model, each l of `layers` (`0..n_layers`) to the l* at the
            same relative depth, `round(l L* / L)`.
        target_layer: target layer or site of the same model, the final residual by default.
        target_hooks: interventions on the other model.
        held_out: text that no map is fitted on (as `tokens`), or a share of the rows of `tokens`, 0 to 0.5: 0.1 with pairs or
            another model (rows 0, 10, 20, ...), else 0. Gives R^2 per map, `meta["held_out"]["r_squared"]`, and as a control the
            share of these tokens at which both models, unpatched, predict the same next token (`["agreement"]`).
        toward: the map that a strong ridge gives; the identity where the widths are equal (within one model), zero elsewhere.
        method: "procrustes" fits a rotation, "shift" a bias only.
        limit_tokens: stop after about this many tokens.
        layers_at_once: source layers whose moments are held at a time, each group a pass over the same text.
        offload: add the moments up on the CPU.
        checkpoint, checkpoint_every, note: as in `fit_tuned`; the file keeps the sums, every so many batches.

    Raises:
        ValueError: fewer tokens than a covariance needs; unknown layers; pairs that are empty, twice or out of range;
            activations or moments that are not finite; models whose tokenizers differ; a checkpoint of other settings, text or models.
        TypeError: a setting of the wrong type.

    Source: Belrose et al. 2023 (Tuned Lens), section 3.2 compares with it; Din et al. 2023 (Jump to Conclusions),
    section 3, between layers; Ghandeharioun et al. 2024 (Patchscopes), section 4.4, between models.

    Example:
        >>> lens = tll.Lens(model, tll.fit_regression(model, tokens))                # doctest: +SKIP
        >>> maps = tll.fit_regression(small, tokens, to=big, pairs=[(2, 3), (4, 6)])   # doctest: +SKIP
    """
    check_model(model, what="a fit")
    if to is not None and isinstance(to, (int, str)):
        say(f"fit_regression(to=...) of a layer is called target_layer now: fit_regression(target_layer={to!r})")
        if target_layer is not None:
            raise TypeError("fit_regression() got both to= and target_layer=, which are the same: pass target_layer=")
        to, target_layer = None, to
    rows, other = _rows(model, layers, to, pairs, target_layer)
    strengths = _strengths(ridge)
    one_of("method", method, ("ridge", "procrustes", "shift"))
    if held_out is None:
        held_out = 0.1 if other is not None or pairs is not None else 0.0
    share, held_out_text = (finite_number("held_out", held_out), None) if is_share(held_out) else (0.0, Text.of(held_out))
    text = Text.of(tokens)
    hooks, target_hooks = tuple(checked_hooks(model, hooks)), tuple(checked_hooks(other or model, target_hooks))
    if toward is not None:
        one_of("toward", toward, ("identity", "zero"))
    settings: dict[str, Any] = {"skip_first": skip_first}
    if share or held_out_text is not None:
        settings["held_out"] = share or "text"
    groups = row_groups(rows, layers_at_once, text if held_out_text is None or text.one_shot else held_out_text)
    parts = []
    with alone(checkpoint, processes()):
        for i, group in enumerate(groups):
            evidence = collect(
                model, text, group, to=other, skip_first=skip_first, hooks=hooks, target_hooks=target_hooks, held_out=share,
                choose=len(strengths) > 1, limit_tokens=limit_tokens, offload=offload,
                checkpoint=state_file(checkpoint, i, len(groups)), checkpoint_every=checkpoint_every, note=note,
                show_progress=show_progress,
            )  # fmt: skip
            if held_out_text is not None:
                reading = Reading(tuple(group), other, skip_first, hooks, target_hooks, offload=offload)
                apart = collect_held_out(model, held_out_text, reading, show_progress)
                evidence = Evidence(evidence.rows, evidence.fit, evidence.choose, apart.held_out, apart.agreed)
            parts.append(maps_of(model, evidence, to=other, ridge=strengths, toward=toward, method=method, settings=settings))
    return parts[0] if len(parts) == 1 else _together(model, rows, parts)


def _rows(
    model: LensModel, layers: Any, to: LensModel | None, pairs: Any, target_layer: LayerOrSite | None
) -> tuple[list[Row], LensModel | None]:
    """The rows to fit, and the other model if there is one."""
    if to is not None:
        check_model(to, what="a fit")
    other = None if to is model else to
    if other is not None or pairs is not None:
        if target_layer is not None:
            raise ValueError(f"give either pairs or target_layer={target_layer!r}: pairs say the target layers")
        return rows_of_pairs(model, other, pairs, layers), other
    if to is model:
        raise ValueError("to= is the model itself: give pairs=[(l, l*), ...] for maps between its layers")
    return rows_for(model, layers, target_layer), None


def _strengths(ridge: Any) -> list[float]:
    """The strengths of the ridge as a list, checked."""
    several = list(ridge) if isinstance(ridge, (Sequence, Tensor)) and getattr(ridge, "ndim", 1) else [ridge]
    if not several:
        raise ValueError("an empty list of ridge strengths: give at least one")
    return [finite_number("ridge", strength, least=0) for strength in several]


def _together(model: LensModel, rows: list[Row], parts: list[Translators]) -> Translators:
    """The maps of groups in the order of `rows`, with the record of each."""
    order = {row: i for i, row in enumerate(row for part in parts for row in part.rows)}
    pick = [order[row] for row in rows]
    join = lambda lists: [value for part in lists for value in part]
    meta = dict(parts[0].meta)
    meta["r_squared"] = [join(part.meta["r_squared"] for part in parts)[i] for i in pick]
    if meta["settings"]["ridge"] is not None:
        ridge = join(part.meta["settings"]["ridge"] for part in parts)
        meta["settings"] = {**meta["settings"], "ridge": [ridge[i] for i in pick]}
    if "held_out" in meta:
        outside = join(part.meta["held_out"]["r_squared"] for part in parts)
        meta["held_out"] = {**meta["held_out"], "r_squared": [outside[i] for i in pick]}
    weights, biases = (torch.cat([getattr(part, name).detach() for part in parts])[pick] for name in ("weights", "biases"))
    return Translators(rows, weights, biases, n_layers=n_layers(model), meta=meta)


@torch.inference_mode(False)
@torch.no_grad()
def maps_of(
    model: LensModel, evidence: Evidence, *, to: LensModel | None = None, ridge: Sequence[float] = (1e-3,),
    toward: Literal["identity", "zero"] | None = None, method: Method = "ridge", settings: dict[str, Any] | None = None,
) -> Translators:  # fmt: skip
    """Translators from evidence, which may be a sum over shards; `model` and `to` are the models that it was collected on.

    Raises:
        ValueError: moments that are not finite (the pair is named), fewer tokens than a covariance needs.
    """
    ridge = _strengths(ridge)
    one_of("method", method, ("ridge", "procrustes", "shift"))
    rows, groups = evidence.rows, groups_of(evidence.rows)
    _check_moments(evidence, groups, method)
    d_out, d_in = evidence.fit[0].yx.shape[1:]
    # Two models share no axes, so that the identity means nothing between them even where the widths agree.
    toward = toward or ("identity" if d_in == d_out and to is None else "zero")
    maps: list[Any] = [None] * len(rows)
    for g, members in enumerate(groups.values()):
        fit = evidence.fit[g]
        setting = evidence.choose[g] if evidence.choose else None
        weights, biases, chosen = _solved(fit, setting, ridge, toward, method)
        fit = fit if setting is None else fit + setting
        inside = solve.r_squared(fit, weights, biases)
        # Of the numbers that are kept, so that R^2 is theirs.
        weights, biases = weights.float(), biases.float()
        outside = solve.r_squared(evidence.held_out[g], weights, biases) if evidence.held_out else inside
        for k, i in enumerate(members):
            maps[i] = (weights[k], biases[k], chosen[k], float(inside[k]), float(outside[k]))
    weights, biases, chosen, inside, outside = zip(*maps, strict=True)
    n_held_out = count(evidence.held_out)
    made = {"method": method, "ridge": list(chosen) if method == "ridge" else None, "toward": toward}
    meta = record(model, "regression", count(evidence.fit) + count(evidence.choose), made | (settings or {}))
    meta["r_squared"] = list(inside)
    if to is not None:
        same = "same" if check_tokenizers(model, to) else "not compared"
        meta["to"] = {**identity_of(to), "n_layers": n_layers(to), "tokenizer": same}
    if n_held_out:
        meta["held_out"] = {"tokens": n_held_out, "r_squared": list(outside)}
        if evidence.agreed is not None:
            meta["held_out"] |= {"agreed": evidence.agreed, "agreement": evidence.agreed / n_held_out}
    return Translators(rows, torch.stack(weights), torch.stack(biases), n_layers=n_layers(model), meta=meta)


def _solved(
    fit: Moments, choose: Moments | None, ridge: Sequence[float], toward: Literal["identity", "zero"], method: Method
) -> tuple[Tensor, Tensor, list[float]]:
    """Float64 maps of one source, and the strength of each."""
    if method != "ridge":
        whole = fit if choose is None else fit + choose
        weights, biases = (solve.procrustes if method == "procrustes" else solve.shift)(whole)
        return weights, biases, [0.0] * len(weights)
    if choose is None:
        weights, biases = solve.ridge(fit, ridge[0], toward)
        return weights, biases, [ridge[0]] * len(weights)
    quality = torch.stack([solve.r_squared(choose, *m) for m in solve.ridge_path(fit, ridge, toward)])
    best = quality.argmax(0).tolist()
    maps = solve.ridge_path(fit + choose, ridge, toward)
    weights = torch.stack([maps[s][0][i] for i, s in enumerate(best)])
    biases = torch.stack([maps[s][1][i] for i, s in enumerate(best)])
    return weights, biases, [ridge[s] for s in best]


def _check_moments(evidence: Evidence, groups: dict[str, list[int]], method: str) -> None:
    rows = evidence.rows
    if not evidence.fit:
        raise ValueError("there is no evidence to fit on: collect it over some text")
    for part in (evidence.fit, evidence.choose, evidence.held_out):
        for m, members in zip(part, groups.values(), strict=bool(part)):
            for k, i in enumerate(members):
                numbers = (m.mean_x, m.xx, m.mean_y[k], m.yx[k], m.yy[k])
                if not all(bool(number.isfinite().all()) for number in numbers):
                    raise ValueError(
                        f"the moments of {rows[i]} are not finite: states of that size overflow float64 when squared; "
                        "look at the states at these sites, or leave the pair out"
                    )
    if evidence.held_out and count(evidence.held_out) < 2:
        raise ValueError("one held-out token has no variance to explain: give more text, or held_out=0")
    need = evidence.fit[0].xx.shape[-1] + 1
    if method != "shift" and evidence.held_out and count(evidence.fit) < need:
        raise ValueError(
            f"{count(evidence.fit)} tokens to fit on ({count(evidence.held_out)} more are held out) are fewer than a "
            f"covariance of width {need - 1} needs (at least {need}): give more tokens, or held_out=0"
        )

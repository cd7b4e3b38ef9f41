"""Closed-form maps in one pass over the text: a lens, shortcuts between layers, and maps from one model into another."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_lenses import solve
from tl_lenses.data import Batch, Position, positions
from tl_lenses.evaluation import used_positions
from tl_lenses.fingerprint import check_tokenizers
from tl_lenses.fit.common import NotFinite, identity_of, record, row_groups, rows_for, rows_of_pairs, states
from tl_lenses.fit.distributed import Lost, agree, own_rows, processes, same_settings
from tl_lenses.fit.evidence import Evidence, count, evidence_of, evidence_tree, merged_evidence, on_device
from tl_lenses.fit.shard import in_step, in_turn
from tl_lenses.fit.state import keep, resume, state_file
from tl_lenses.hooks import Hook, check_edits
from tl_lenses.model import LensModel, check_model, n_layers, name_of
from tl_lenses.moments import Moments, grouped_moments
from tl_lenses.progress import progress
from tl_lenses.sites import LayerOrSite
from tl_lenses.translators import Row, Translators
from tl_lenses.unembed import Readout

Method = Literal["ridge", "procrustes", "shift"]
CHOOSING = 10  # of several ridge strengths, every tenth row of the text says which is best


@torch.no_grad()
def fit_regression(
    model: LensModel,
    tokens: Any,
    layers: Iterable[LayerOrSite] | None = None,
    to: LayerOrSite | LensModel | None = None,
    ridge: float | Sequence[float] = 1e-3,
    skip_first: bool = True,
    hooks: Iterable[Hook] = (),
    *,
    pairs: Iterable[tuple[LayerOrSite, LayerOrSite]] | None = None,
    target_hooks: Iterable[Hook] = (),
    held_out: float | int | None = None,
    toward: Literal["identity", "zero"] | None = None,
    method: Method = "ridge",
    limit_tokens: int | None = None,
    layers_at_once: int | None = None,
    offload: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    show_progress: bool | None = None,
) -> Translators:
    """Least squares between states: `W = (B + k T)(C + k I)^-1`, `b = mean_y - W mean_x`, all maps in one pass.

    Without `to` and `pairs`, the regression lens: each layer to the final residual (before the final norm). With
    `pairs`, every (l, l*) of one model; with `to=` another model, from a state here to the state there at the same
    token, `translators[l, l*]`. Moments are streamed in float64, so the result does not depend on how the text is
    batched. `collect` gives them alone (they add up over shards), and `maps_of` the translators of a sum.

    Args:
        tokens: `[n, seq]`, `token_batches(...)`, or an iterable of batches; both models read the same ids.
        layers: source layers or sites, `0..n_layers-1` by default; heads are flattened.
        to: target layer or site, the final residual by default; or another model, with the same tokenizer.
        ridge: strength relative to the covariance's mean eigenvalue. Of several, each map gets the best on rows set
            aside for it (every tenth), then is fitted on these too.
        skip_first: leave out real position 0 of each row and nothing else.
        hooks: interventions under which to fit.
        pairs: (l, l*) to fit. By default, with another model, each l of `layers` (`0..n_layers`) to the l* at the
            same relative depth, `round(l L* / L)`.
        target_hooks: interventions on the other model.
        held_out: share of the rows of the text that no map is fitted on, 0.1 with pairs or another model (rows 0, 10,
            20, ...), else 0. Gives R^2 per map, `meta["held_out"]["r_squared"]`, and as a control the share of these
            tokens at which both models, unpatched, predict the same next token (`["agreement"]`).
        toward: what a strong ridge gives; the identity where the widths are equal (within one model), zero elsewhere.
        method: "procrustes" fits a rotation, "shift" a bias only.
        limit_tokens: stop after about this many tokens.
        layers_at_once: source layers whose moments are held at a time, each group a pass over the same text.
        offload: add the moments up on the CPU.
        checkpoint: file that keeps the sums every `checkpoint_every` batches; an existing one of the same settings is
            gone on from.

    Raises:
        ValueError: fewer tokens than a covariance needs; unknown layers; pairs that are empty, twice or out of range;
            activations or moments that are not finite; models whose tokenizers differ.

    Source: Belrose et al. 2023 (Tuned Lens), section 3.2 compares with it; Din et al. 2023 (Jump to Conclusions),
    section 3, between layers; Ghandeharioun et al. 2024 (Patchscopes), section 4.4, between models.

    Example:
        >>> lens = tll.Lens(model, tll.fit_regression(model, tokens))                # doctest: +SKIP
        >>> maps = tll.fit_regression(small, tokens, to=big, pairs=[(2, 3), (4, 6)])   # doctest: +SKIP
    """
    check_model(model, what="a fit")
    hooks, target_hooks = list(hooks), list(target_hooks)
    other = None if to is None or isinstance(to, (int, str)) else to
    if other is not None:
        check_model(other, what="a fit")
    other = None if other is model else other
    if other is not None or pairs is not None:
        if isinstance(to, (int, str)):
            raise ValueError(f"give either pairs or to={to!r}: pairs say the target layers")
        rows = rows_of_pairs(model, other, pairs, layers)
    elif to is model:
        raise ValueError("to= is the model itself: give pairs=[(l, l*), ...] for maps between its layers")
    else:
        rows = rows_for(model, layers, to)  # type: ignore[arg-type]
    if held_out is None:
        held_out = 0.1 if other is not None or pairs is not None else 0.0
    strengths = [float(ridge)] if isinstance(ridge, (int, float)) else list(ridge)
    _check_settings(strengths, method)
    groups = row_groups(rows, layers_at_once, tokens)
    found = []
    for i, group in enumerate(groups):
        evidence = collect(
            model,
            tokens,
            group,
            to=other,
            skip_first=skip_first,
            hooks=hooks,
            target_hooks=target_hooks,
            held_out=held_out,
            choose=len(strengths) > 1,
            limit_tokens=limit_tokens,
            offload=offload,
            checkpoint=state_file(checkpoint, i, len(groups)),
            checkpoint_every=checkpoint_every,
            show_progress=show_progress,
        )
        found.append(
            maps_of(
                model,
                evidence,
                to=other,
                ridge=strengths,
                toward=toward,
                method=method,
                settings={"skip_first": skip_first, **({"held_out": held_out} if held_out else {})},
            )
        )
    return found[0] if len(found) == 1 else _together(model, rows, found)


def _together(model: LensModel, rows: list[Row], found: list[Translators]) -> Translators:
    """The maps of groups in the order of `rows`, with what is known of each."""
    order = {row: i for i, row in enumerate(row for part in found for row in part.rows)}
    pick = [order[row] for row in rows]
    join = lambda lists: [value for part in lists for value in part]
    meta = dict(found[0].meta)
    meta["r_squared"] = [join(part.meta["r_squared"] for part in found)[i] for i in pick]
    if meta["settings"]["ridge"] is not None:
        ridge = join(part.meta["settings"]["ridge"] for part in found)
        meta["settings"] = {**meta["settings"], "ridge": [ridge[i] for i in pick]}
    if "held_out" in meta:
        outside = join(part.meta["held_out"]["r_squared"] for part in found)
        meta["held_out"] = {**meta["held_out"], "r_squared": [outside[i] for i in pick]}
    weights, biases = (
        torch.cat([getattr(part, name).detach() for part in found])[pick] for name in ("weights", "biases")
    )
    return Translators(rows, weights, biases, n_layers=n_layers(model), meta=meta)


def _groups(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Rows by their source."""
    found: dict[str, list[int]] = {}
    for i, (source, _) in enumerate(rows):
        found.setdefault(source, []).append(i)
    return found


@torch.no_grad()
def collect(
    model: LensModel,
    tokens: Any,
    rows: Sequence[Row],
    *,
    to: LensModel | None = None,
    skip_first: bool = True,
    hooks: Iterable[Hook] = (),
    target_hooks: Iterable[Hook] = (),
    held_out: float | int = 0,
    choose: bool = False,
    limit_tokens: int | None = None,
    offload: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    show_progress: bool | None = None,
) -> Evidence:
    """The moments of every row over a text, one pass. What is read of `to` moves to the device of `model`.

    Processes that were launched together share the rows of the text, and all of them get the sum. `offload` adds up on
    the CPU; with `checkpoint` the state is kept every `checkpoint_every` batches.

    Which rows of the text are held out depends on their number alone and not on the batches: of a share of 0.1, rows
    0, 10, 20, ...; and of what remains, rows 9, 19, ... to choose among ridge strengths.

    Raises:
        ValueError: no token to fit on, or none held out; sites of different width; tokenizers that differ.
    """
    if not 0 <= held_out <= 0.5:
        raise ValueError(f"held_out is a share of the rows, 0 (none) to 0.5, got {held_out!r}")
    hooks, target_hooks, rows = list(hooks), list(target_hooks), tuple(rows)
    if to is not None:
        check_tokenizers(model, to)
    elif target_hooks:
        raise ValueError("target_hooks are for another model, and there is none: pass to=model, or hooks=")
    places = list(_groups(rows)), list(dict.fromkeys(target for _, target in rows))
    targets = [[places[1].index(rows[i][1]) for i in members] for members in _groups(rows).values()]
    every = round(1 / held_out) if held_out else 0
    nothing = Evidence(rows, agreed=0 if to is not None and held_out else None)
    who = processes()
    settings = {
        "rows": [list(row) for row in rows], "skip_first": skip_first, "held_out": held_out, "choose": choose,
        "limit_tokens": limit_tokens, "to": None if to is None else name_of(to),
    }  # fmt: skip
    same_settings(settings, who)
    total, position, counts = nothing, None, [0, 0, 0, 0]  # tokens used, rows, tokens to fit on, batches
    if (state := resume(checkpoint, "fit_regression", settings, who)) is not None:
        position, counts = Position.load(state["position"]), state["counts"]
        total = evidence_of(state["evidence"], rows) if who.first else nothing
    check_edits(model, hooks)  # every process makes its passes now, or none
    if to is not None:
        check_edits(to, target_hooks)
    stream = positions(tokens, at=position, endless=False)
    error: Exception | None = None
    try:
        for batch, position in progress(
            in_turn(stream, [model, to], who), desc="regression", show=show_progress if who.first else False
        ):
            # Sets by the number of a row in the whole text, whatever the batches and processes.
            index = torch.arange(counts[1], counts[1] + len(batch.tokens))
            apart = index % every == 0 if every else torch.zeros_like(index, dtype=torch.bool)
            choosing = (index % CHOOSING == CHOOSING - 1) & ~apart & choose
            sets = torch.stack([~apart & ~choosing, choosing, apart])
            own, mine = own_rows(batch, counts[1], who)
            with in_step([model, to], batch, 1, who):
                if own is not None:
                    part = _part(model, to, own, sets[:, mine], places, targets, rows, hooks, target_hooks, skip_first)
                    total = total + (on_device(part, "cpu") if offload else part)
            used = used_positions(batch, skip_first).cpu()
            counts = [
                counts[0] + int(used.sum()),
                counts[1] + len(index),
                counts[2] + int(used[sets[0]].sum()),
                counts[3] + 1,
            ]
            if limit_tokens and counts[2] and counts[0] >= limit_tokens:
                break
            if checkpoint is not None and counts[3] % checkpoint_every == 0:
                # What all have found goes to the first process, and the others begin again with nothing.
                total = merged_evidence(total, who)
                state = {
                    "settings": settings,
                    "position": position.state(),
                    "counts": counts,
                    "evidence": evidence_tree(total),
                }
                keep(checkpoint, "fit_regression", state, f"after {counts[1]} rows of text", who)
                total = total if who.first else nothing
    except Lost:
        raise
    except NotFinite as wrong:
        error = NotFinite(f"{wrong}, among the {len(batch.tokens)} rows behind row {counts[1]}")
    except Exception as wrong:  # the other processes would wait for this one
        error = wrong
    finally:
        stream.close()
    agree(error, who)
    total = merged_evidence(total, who)
    if not count(total.fit):
        if count(total.held_out):
            raise ValueError(
                f"no row of the text is left to fit on: all {counts[1]} are held out; give more rows, or held_out=0"
            )
        raise ValueError(
            "no position to fit on: the rows hold one token each and skip_first leaves none; pass skip_first=False or longer rows"
        )
    if choose and not total.choose:
        raise ValueError(
            "choosing among ridge strengths needs at least 10 rows of text (every tenth is set aside): give more, or one strength"
        )
    return total


def _part(
    model: LensModel,
    to: LensModel | None,
    batch: Batch,
    sets: Bool[Tensor, "sets batch"],
    places: tuple[list[str], list[str]],
    targets: list[list[int]],
    rows: tuple[Row, ...],
    hooks: list[Hook],
    target_hooks: list[Hook],
    skip_first: bool,
) -> Evidence:
    """The evidence of one batch, whose rows are in one of the sets (fit, choose, held out) each."""
    x, y, used, same = _both(model, to, batch, *places, hooks, target_hooks, skip_first)
    kept = [used & chosen.to(used.device)[:, None] for chosen in sets]
    parts = [grouped_moments([s[k] for s in x], [s[k] for s in y], targets) if k.any() else () for k in kept]
    return Evidence(rows, *parts, agreed=None if same is None else int(same[kept[2]].sum()))


def _both(
    model: LensModel,
    to: LensModel | None,
    batch: Batch,
    sources: list[str],
    goals: list[str],
    hooks: list[Hook],
    target_hooks: list[Hook],
    skip_first: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor | None]:
    """States `[batch, pos, d]` of sources and targets, positions to use, and where both models' argmax agree."""
    wanted = sources if to is not None else [*sources, *goals]
    # Nobody reads one model's own logits: two models' are compared.
    watched = [*hooks, *((name, None) for name in wanted)]
    with Readout(model).without_logits([], watched) if to is None else nullcontext():
        logits, seen, used, _ = states(model, batch, wanted, hooks, skip_first)
    same = None
    x, there = [seen[name] for name in sources], seen
    if to is not None:
        others, there, _, _ = states(to, batch, goals, target_hooks, skip_first)
        same = logits.argmax(-1).to(used.device) == others.argmax(-1).to(used.device)
    y = [there[name].to(used.device) for name in goals]
    for side, parts in (("source", x), ("target", y)):
        widths = sorted({part.shape[-1] for part in parts})
        if len(widths) > 1:
            raise ValueError(f"sites of different width ({side} widths {widths}) need separate fits")
    return [part.to(used.device) for part in x], y, used, same


@torch.no_grad()
def maps_of(
    model: LensModel,
    evidence: Evidence,
    *,
    to: LensModel | None = None,
    ridge: Sequence[float] = (1e-3,),
    toward: Literal["identity", "zero"] | None = None,
    method: Method = "ridge",
    settings: dict[str, Any] | None = None,
) -> Translators:
    """Translators of evidence, which may be a sum over shards; `model` and `to` are the models that it is of.

    Raises:
        ValueError: moments that are not finite (the pair is named), fewer tokens than a covariance needs.
    """
    _check_settings(ridge, method)
    rows, groups = evidence.rows, _groups(evidence.rows)
    _check_moments(evidence, groups, method)
    d_out, d_in = evidence.fit[0].yx.shape[1:]
    # Two models share no axes, so that the identity means nothing between them even where the widths agree.
    toward = toward or ("identity" if d_in == d_out and to is None else "zero")
    found: list[Any] = [None] * len(rows)
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
            found[i] = (weights[k], biases[k], chosen[k], float(inside[k]), float(outside[k]))
    weights, biases, chosen, inside, outside = zip(*found, strict=True)
    apart = count(evidence.held_out)
    meta = record(
        model,
        "regression",
        count(evidence.fit) + count(evidence.choose),
        {
            "method": method,
            "ridge": list(chosen) if method == "ridge" else None,
            "toward": toward,
            **(settings or {}),
        },
    )
    meta["r_squared"] = list(inside)
    if to is not None:
        same = "same" if check_tokenizers(model, to) else "not compared"
        meta["to"] = {**identity_of(to), "n_layers": n_layers(to), "tokenizer": same}
    if apart:
        meta["held_out"] = {"tokens": apart, "r_squared": list(outside)}
        if evidence.agreed is not None:
            meta["held_out"] |= {"agreed": evidence.agreed, "agreement": evidence.agreed / apart}
    return Translators(rows, torch.stack(weights), torch.stack(biases), n_layers=n_layers(model), meta=meta)


def _solved(
    fit: Moments,
    choose: Moments | None,
    ridge: Sequence[float],
    toward: Literal["identity", "zero"],
    method: Method,
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


def _check_settings(ridge: Sequence[float], method: str) -> None:
    if method not in ("ridge", "procrustes", "shift"):
        raise ValueError(f"method must be 'ridge', 'procrustes' or 'shift', got {method!r}")
    if not ridge:
        raise ValueError("an empty list of ridge strengths: give at least one")


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


# --- the lens alone: every row has a source of its own, so its evidence is one `Moments`


def gather(
    model: LensModel,
    tokens: Any,
    rows: Sequence[Row],
    *,
    skip_first: bool = True,
    hooks: Iterable[Hook] = (),
    limit_tokens: int | None = None,
    hold_out: bool = False,
    offload: bool = False,
    show_progress: bool | None = None,
) -> tuple[Moments, Moments | None]:
    """Moments of rows with distinct sources over a text, and where asked those of every tenth row of text apart."""
    evidence = collect(
        model,
        tokens,
        rows,
        skip_first=skip_first,
        hooks=hooks,
        choose=hold_out,
        limit_tokens=limit_tokens,
        offload=offload,
        show_progress=show_progress,
    )
    return _joined(evidence.fit), _joined(evidence.choose) if hold_out else None


def from_moments(
    model: LensModel,
    fit: Moments,
    rows: Sequence[Row],
    *,
    held_out: Moments | None = None,
    ridge: Sequence[float] = (1e-3,),
    toward: Literal["identity", "zero"] | None = None,
    method: Method = "ridge",
    settings: dict[str, Any] | None = None,
) -> Translators:
    """Translators of what `gather` gave, which may be a sum over shards."""
    evidence = Evidence(tuple(rows), _split(fit), () if held_out is None else _split(held_out))
    return maps_of(model, evidence, ridge=ridge, toward=toward, method=method, settings=settings)


def _joined(parts: tuple[Moments, ...]) -> Moments:
    cat = lambda name: torch.cat([getattr(m, name) for m in parts])
    return Moments(parts[0].n, cat("mean_x"), cat("mean_y"), cat("xx"), cat("yx"), cat("yy"))


def _split(m: Moments) -> tuple[Moments, ...]:
    rows = [slice(i, i + 1) for i in range(len(m.yx))]
    return tuple(Moments(m.n, m.mean_x[r], m.mean_y[r], m.xx[r], m.yx[r], m.yy[r]) for r in rows)

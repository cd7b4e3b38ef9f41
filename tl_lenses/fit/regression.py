"""The closed-form lens: ridge regression from each layer to the final residual, one pass over the text."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch

from tl_lenses import solve
from tl_lenses.data import as_batches
from tl_lenses.fit.common import activations, record, rows_for
from tl_lenses.hooks import Hook
from tl_lenses.model import LensModel, check_model
from tl_lenses.moments import Moments, moments
from tl_lenses.progress import progress
from tl_lenses.sites import LayerOrSite
from tl_lenses.translators import Row, Translators


@torch.no_grad()
def fit_regression(
    model: LensModel,
    tokens: Any,
    layers: Iterable[LayerOrSite] | None = None,
    to: LayerOrSite | None = None,
    ridge: float | Sequence[float] = 1e-3,
    skip_first: bool = True,
    hooks: Iterable[Hook] = (),
    *,
    toward: Literal["identity", "zero"] | None = None,
    method: Literal["ridge", "procrustes", "shift"] = "ridge",
    limit_tokens: int | None = None,
    show_progress: bool | None = None,
) -> Translators:
    """Least squares from each layer to the final residual: `W = (B + k T)(C + k I)^-1`, `b = mean_y - W mean_x`.

    Moments are streamed in float64, so the result does not depend on how the text is batched. `gather` gives the
    moments alone (they
    add up over shards), and `from_moments` the translators of moments.

    Args:
        tokens: `[n, seq]`, `token_batches(...)`, or an iterable of batches.
        layers: source layers or sites, `0..n_layers-1` by default; heads are flattened.
        to: target layer or site, the final residual by default.
        ridge: strength relative to the covariance's mean eigenvalue. Of several, each layer gets the best on
            held-out batches (every tenth),
            then is fitted on all.
        skip_first: leave out real position 0 of each row and nothing else.
        hooks: interventions under which to fit.
        toward: what a strong ridge gives; the identity where the widths are equal, zero elsewhere.
        method: "procrustes" fits a rotation, "shift" a bias only.
        limit_tokens: stop after about this many tokens.

    Raises:
        ValueError: fewer tokens than a covariance needs; unknown layers; activations that are not finite.

    Source: Belrose et al. 2023 (Tuned Lens), section 3.2 compares with it; Din et al. 2023 (Jump to Conclusions).

    Example:
        >>> lens = tll.Lens(model, tll.fit_regression(model, tokens))      # doctest: +SKIP
    """
    check_model(model, what="a fit")
    rows = rows_for(model, layers, to)
    strengths = [ridge] if isinstance(ridge, (int, float)) else list(ridge)
    fit, held_out = gather(
        model,
        tokens,
        rows,
        skip_first=skip_first,
        hooks=hooks,
        limit_tokens=limit_tokens,
        hold_out=len(strengths) > 1,
        show_progress=show_progress,
    )
    return from_moments(
        model,
        fit,
        rows,
        held_out=held_out,
        ridge=strengths,
        toward=toward,
        method=method,
        settings={"skip_first": skip_first},
    )


def gather(
    model: LensModel,
    tokens: Any,
    rows: Sequence[Row],
    *,
    skip_first: bool = True,
    hooks: Iterable[Hook] = (),
    limit_tokens: int | None = None,
    hold_out: bool = False,
    show_progress: bool | None = None,
) -> tuple[Moments, Moments | None]:
    """Moments of every row over a text, and those of every tenth batch apart where asked."""
    total: Moments | None = None
    apart: Moments | None = None
    hooks = list(hooks)
    widths: set[int] = set()
    for i, batch in enumerate(progress(as_batches(tokens), desc="regression", show=show_progress)):
        _, seen, used, _ = activations(model, batch, rows, hooks, skip_first)
        if not used.any():
            continue
        widths |= {seen[source].shape[-1] for source, _ in rows}
        if len(widths) > 1:
            raise ValueError(f"sites of different width ({sorted(widths)}) need separate fits")
        target = seen[rows[0][1]][used]
        part = moments(torch.stack([seen[source][used] for source, _ in rows]), target[None])
        if hold_out and i % 10 == 9:
            apart = part if apart is None else apart + part
        else:
            total = part if total is None else total + part
        if limit_tokens and total is not None and total.n + (apart.n if apart else 0) >= limit_tokens:
            break
    if total is None:
        raise ValueError(
            "no position to fit on: the rows hold one token each and skip_first leaves none; pass skip_first=False or longer rows"
        )
    if hold_out and apart is None:
        raise ValueError(
            "choosing among ridge strengths needs at least 10 batches (every tenth is held out): give more, or one strength"
        )
    return total, apart


def from_moments(
    model: LensModel,
    fit: Moments,
    rows: Sequence[Row],
    *,
    held_out: Moments | None = None,
    ridge: Sequence[float] = (1e-3,),
    toward: Literal["identity", "zero"] | None = None,
    method: Literal["ridge", "procrustes", "shift"] = "ridge",
    settings: dict[str, Any] | None = None,
) -> Translators:
    """Translators of moments, which may be a sum over shards."""
    d_out, d_in = fit.yx.shape[1:]
    toward = toward or ("identity" if d_in == d_out else "zero")
    n_tokens = fit.n + (held_out.n if held_out else 0)
    chosen: list[float] | None = None
    if method == "ridge":
        if held_out is not None:
            quality = torch.stack([solve.r_squared(held_out, *m) for m in solve.ridge_path(fit, ridge, toward)])
            best = quality.argmax(0)
            fit = fit + held_out
            maps = solve.ridge_path(fit, ridge, toward)
            weights = torch.stack([maps[s][0][i] for i, s in enumerate(best.tolist())])
            biases = torch.stack([maps[s][1][i] for i, s in enumerate(best.tolist())])
            chosen = [ridge[s] for s in best.tolist()]
        else:
            weights, biases = solve.ridge(fit, ridge[0], toward)
            chosen = [ridge[0]] * len(rows)
    elif method in ("procrustes", "shift"):
        weights, biases = (solve.procrustes if method == "procrustes" else solve.shift)(fit)
    else:
        raise ValueError(f"method must be 'ridge', 'procrustes' or 'shift', got {method!r}")
    meta = record(
        model, "regression", n_tokens, {"method": method, "ridge": chosen, "toward": toward, **(settings or {})}
    )
    meta["r_squared"] = solve.r_squared(fit, weights, biases).tolist()
    return Translators(rows, weights.float(), biases.float(), n_layers=int(model.cfg.n_layers), meta=meta)

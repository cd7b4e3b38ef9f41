"""How good is a lens? Per layer, on held-out text, streamed."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.data import Batch, as_batches
from tl_lenses.hooks import Hook, residual_reads, run
from tl_lenses.lens import Lens
from tl_lenses.model import LensModel, check_model, n_layers, prepare
from tl_lenses.progress import progress
from tl_lenses.sites import LayerOrSite
from tl_lenses.trajectory import layers_of, next_tokens


@dataclass(frozen=True)
class Scores:
    """One row per lens and layer: `lens, layer, kl, cross_entropy, bits_per_byte, top1, entropy, bias`.

    `kl` is KL(model || lens) and `bias` KL of the two marginals, nats; `cross_entropy` nats per token with the next
    token; `top1` the share
    of positions where the lens' top token is the model's. The row of layer `n_layers` is the model itself.
    """

    rows: list[dict[str, Any]]
    tokens: int
    bytes_per_token: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def to_frame(self) -> Any:
        """A pandas data frame."""
        import pandas

        return pandas.DataFrame(self.rows)

    def value(self, lens: str, layer: int | str, name: str = "kl") -> float:
        """One number."""
        found = [row for row in self.rows if row["lens"] == lens and row["layer"] == layer]
        if not found or name not in found[0]:
            raise KeyError(f"no {name!r} of lens {lens!r} at layer {layer!r}")
        return found[0][name]

    def __str__(self) -> str:
        from tl_lenses import views

        return views.to_text(views.scores_table(self.rows))

    def __rich__(self) -> Any:
        from tl_lenses import views

        return views.scores_table(self.rows)

    def _repr_html_(self) -> str:
        from tl_lenses import views

        return views.scores_html(self.rows)

    def figure(self, value: str = "kl") -> Any:
        """Lines over layers, one per lens (extra `plot`)."""
        from tl_lenses import views

        return views.scores_figure(self.rows, value)


def used_positions(batch: Batch, skip_first: bool) -> Bool[Tensor, "batch pos"]:
    """Real positions; without each row's first one (usually BOS, of outsized norm) where asked."""
    mask = (
        torch.ones_like(batch.tokens, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask.bool()
    )
    return mask & (mask.cumsum(1) > 1) if skip_first else mask


@torch.no_grad()
def evaluate(
    model: LensModel,
    lens: Lens | Mapping[str, Lens],
    tokens: Any,
    *,
    layers: Iterable[LayerOrSite] | slice | None = None,
    skip_first: bool = True,
    hooks: Iterable[Hook] = (),
    bytes_per_token: float | None = None,
    chunk_size: int | None = None,
    show_progress: bool | None = None,
) -> Scores:
    """Per layer: KL to the model, cross entropy, bits per byte, top-1 agreement, entropy, and bias.

    Args:
        lens: a `Lens`, or `{name: Lens}`; all share one pass over the text.
        tokens: `[n, seq]`, a `Batch`, `token_batches(...)`, or an iterable of those.
        layers: by default all that the lenses have.
        skip_first: leave out real position 0 of each row and nothing else.
        hooks: your interventions; the teacher is the same hooked run.
        bytes_per_token: for bits per byte of plain ids; batches know their own, a tokenizer can decode the rest.

    Returns:
        `Scores`. Means are over positions; bits per byte is `cross_entropy / (ln 2 * bytes per token)`.

    Raises:
        ValueError: no tokens; activations that are not finite (the layer is named).

    Source: Belrose et al. 2023 (Tuned Lens), section 3 (bias: section 3.1; bits per byte: Gao et al. 2020).

    Example:
        >>> print(tll.evaluate(model, {"logit": tll.Lens(model), "tuned": lens}, heldout))      # doctest: +SKIP
    """
    check_model(model, what="an evaluation")
    lenses = dict(lens) if isinstance(lens, Mapping) else {"lens": lens}
    depth = n_layers(model)
    rows = layers_of(lenses, layers, depth)
    decoders = {name: [one[row] for row in rows] for name, one in lenses.items()}
    hooks = list(hooks)
    d_vocab = int(model.cfg.d_vocab)
    sums = {
        (name, i): dict.fromkeys(("kl", "cross_entropy", "top1", "entropy"), 0.0)
        for name in lenses
        for i in range(len(rows))
    }
    marginals: dict[Any, Tensor] = {}
    n = n_targets = n_bytes = n_counted = 0
    ratio = bytes_per_token

    for batch in progress(as_batches(tokens), desc="evaluating", show=show_progress):
        ratio = batch.bytes_per_token if bytes_per_token is None and batch.bytes_per_token is not None else ratio
        batch = prepare(model, batch.tokens, batch.attention_mask)
        used = used_positions(batch, skip_first)
        if not used.any():
            continue
        resid: dict[Any, Tensor] = {}
        logits = run(
            model, batch.tokens, [*hooks, *residual_reads(model, rows, resid)], attention_mask=batch.attention_mask
        )
        goal = next_tokens(batch.tokens, used_positions(batch, False))[used]
        if ratio is None and getattr(model, "tokenizer", None) is not None:
            text = [model.tokenizer.decode(row[keep].tolist()) for row, keep in zip(batch.tokens, used, strict=True)]  # type: ignore[attr-defined]
            n_bytes, n_counted = n_bytes + sum(len(t.encode()) for t in text), n_counted + int(used.sum())
        own = logits[used]
        hidden = {row: resid[row][used] for row in rows}
        for row in rows:
            if not hidden[row].isfinite().all():
                raise ValueError(
                    f"the residual at layer {row!r} has values that are not finite: the model overflows there (try float32 or bfloat16)"
                )
        for part in S.chunks(len(own), d_vocab, chunk_size):
            logp_model = S.log_probs(own[part])
            p_model, top = logp_model.exp(), logp_model.argmax(-1)
            marginals["model"] = marginals.get("model", 0) + p_model.sum(0, dtype=torch.float64)
            for name in lenses:
                for i, row in enumerate(rows):
                    # The last row is the model's own output, interventions on the final norm included.
                    logp = logp_model if row == depth else S.log_probs(decoders[name][i](hidden[row][part]))
                    q, total = logp.exp(), sums[name, i]
                    total["kl"] += float(S.kl(logp_model, logp, p_model).double().sum())
                    total["entropy"] += float(S.entropy(logp, q).double().sum())
                    total["top1"] += int((logp.argmax(-1) == top).sum())
                    total["cross_entropy"] -= float(S.target_logprob(logp, goal[part]).double().nansum())
                    marginals[name, i] = marginals.get((name, i), 0) + q.sum(0, dtype=torch.float64)
        n, n_targets = n + len(own), n_targets + int((goal >= 0).sum())

    if n == 0:
        raise ValueError(
            "no position to score: the rows hold one token each and skip_first leaves none; pass skip_first=False or longer rows"
        )
    if ratio is None and n_counted:
        ratio = n_bytes / n_counted
    logp_marginal = (marginals["model"] / n).log()
    table = []
    for name in lenses:
        for i, row in enumerate(rows):
            total = sums[name, i]
            entry: dict[str, Any] = {"lens": name, "layer": row, "kl": total["kl"] / n}
            entry["cross_entropy"] = total["cross_entropy"] / n_targets if n_targets else math.nan
            entry["bits_per_byte"] = entry["cross_entropy"] / math.log(2) / ratio if ratio else math.nan
            entry["top1"], entry["entropy"] = total["top1"] / n, total["entropy"] / n
            entry["bias"] = float(S.kl(logp_marginal, (marginals[name, i] / n).log()))
            table.append(entry)
    return Scores(table, n, ratio, {"skip_first": skip_first, "hooks": len(hooks)})

"""Does the lens of a model still read its fine-tune? The base's translators before the fine-tune's own norm and unembedding."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.data import as_batches
from tl_lenses.evaluation import used_positions
from tl_lenses.experiments.picture import Lines, Picture
from tl_lenses.experiments.report import Report, Table, named
from tl_lenses.experiments.streams import check_lenses, common_layers
from tl_lenses.hooks import Hook
from tl_lenses.lens import Lens
from tl_lenses.model import LensModel, check_model, n_layers, prepare, tokenizer_of
from tl_lenses.progress import progress
from tl_lenses.trajectory import trajectory
from tl_lenses.translators import Translators

LOGIT, BASE, OWN = "logit", "base's lens", "own lens"


@dataclass(frozen=True)
class FineTune(Report):
    """Bits per byte of three lenses on a fine-tune, row by row of text.

    Attributes:
        base: name of the model that the transferred lens was fitted on.
        layers: the layer axis; the last one usually is the fine-tune itself.
        bits_per_byte: per lens `[row, layer]`, mean cross entropy of the next token.
        kl: per lens `[row, layer]`, KL(fine-tune || lens), bits per byte too.
        warning: what was said of the transferred lens' fingerprint, if anything.
    """

    base: str
    layers: list[int]
    bits_per_byte: dict[str, Float[Tensor, "row layer"]]
    kl: dict[str, Float[Tensor, "row layer"]]
    warning: str = ""

    name = "fine-tune"

    def cost(self, value: str = "bits_per_byte") -> Float[Tensor, "row layer"]:
        """What the base's lens costs over the fine-tune's own one, bits per byte, for every row of text.

        Args:
            value: "bits_per_byte" or "kl".
        """
        scores = getattr(self, value)
        return scores[BASE] - scores[OWN]

    def error(self, value: str = "bits_per_byte") -> Float[Tensor, " layer"]:
        """Standard error of the mean cost over rows of text; NaN of one row."""
        x = self.cost(value)
        return x.std(0) / math.sqrt(len(x))

    def tables(self) -> list[Table]:
        """Per layer the three lenses and what the transferred one costs: in cross entropy, then in KL."""
        found = []
        for value, what in (("bits_per_byte", "cross entropy of the next token"), ("kl", f"KL({self.model} || lens)")):
            scores = getattr(self, value)
            numbers = [*(scores[name] for name in (LOGIT, BASE, OWN)), self.cost(value)]
            columns = [*(x.mean(0).tolist() for x in numbers), self.error(value).tolist()]
            rows = [[str(layer), *row] for layer, *row in zip(self.layers, *columns, strict=True)]
            note = "cost: the base's lens over the own one; ±: its standard error over rows of text"
            if self.warning and not found:
                note += f". {self.warning}"
            title = f"the lens of {self.base} on {self.model}: {what}, bits per byte"
            found.append(Table(title, ["layer", LOGIT, BASE, OWN, "cost", "±"], rows, note, percent=False))
        return found

    def pictures(self) -> dict[str, Picture]:
        """Bits per byte of the three lenses; cost per layer."""
        lines = lambda scores: {
            name: list(zip(self.layers, x.mean(0).tolist(), strict=True)) for name, x in scores.items()
        }
        return {
            "bits_per_byte": Lines(
                f"lenses on {self.model}", lines(self.bits_per_byte), up="cross entropy, bits per byte"
            ),
            "cost": Lines(
                f"cost of the lens of {self.base}",
                lines({"bits per byte": self.cost(), "KL, bits per byte": self.cost("kl")}), up="bits per byte",
            ),
        }  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """A row per lens and layer: means over rows of text."""
        return [
            {
                "lens": name, "layer": layer, "bits_per_byte": float(self.bits_per_byte[name][:, i].mean()),
                "kl": float(self.kl[name][:, i].mean()), "cost": float(self.cost()[:, i].mean()),
                "cost_error": float(self.error()[i]), "cost_kl": float(self.cost("kl")[:, i].mean()),
                "cost_kl_error": float(self.error("kl")[i]),
            }
            for name in (LOGIT, BASE, OWN)
            for i, layer in enumerate(self.layers)
        ]  # fmt: skip


@torch.no_grad()
def fine_tune(
    model: LensModel,
    base: Translators,
    own: Translators,
    tokens: Any,
    *,
    layers: Iterable[int] | None = None,
    skip_first: bool = True,
    hooks: Iterable[Hook] = (),
    bytes_per_token: float | None = None,
    chunk_size: int | None = None,
    show_progress: bool | None = None,
) -> FineTune:
    """What a lens that was fitted on the base costs on its fine-tune, against the lens fitted on the fine-tune.

    The translators are kept; final norm and unembedding are the fine-tune's own: `Lens(model, base, check="warn")`.

    Args:
        model: the fine-tune.
        base: translators fitted on the model that it was trained from.
        own: translators fitted on the fine-tune, on the same text.
        tokens: held-out text, as `evaluate` takes it; costs are compared row by row.
        layers: all that both have, by default.
        skip_first: leave out real position 0 of each row.
        hooks: your interventions.
        bytes_per_token: for plain ids; batches know their own, a tokenizer can decode the rest.
        chunk_size: positions decoded at a time.

    Raises:
        ValueError: translators of another width, depth or basis; `own` of another model; text without a next token.

    Source: Belrose et al. 2023 (Tuned Lens), section 3.4 and Figure 13.

    Example:
        >>> found = fine_tune(tuned, tll.fit_tuned(base, text), tll.fit_tuned(tuned, text), heldout)      # doctest: +SKIP
        >>> found.cost().mean(0)      # doctest: +SKIP
    """
    check_model(model, what="fine-tune")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        transferred = Lens(model, base, check="warn")
    found = {LOGIT: Lens(model), BASE: transferred, OWN: Lens(model, own)}
    check_lenses(model, found, "fine-tune")
    rows = common_layers(found, layers, n_layers(model))
    ratio, n_bytes, n_counted = bytes_per_token, 0, 0
    scores: dict[str, dict[str, list[Tensor]]] = {k: {name: [] for name in found} for k in ("cross_entropy", "kl")}
    for batch in progress(as_batches(tokens), desc="fine-tune", show=show_progress):
        ratio = batch.bytes_per_token if bytes_per_token is None and batch.bytes_per_token is not None else ratio
        batch = prepare(model, batch.tokens, batch.attention_mask)
        used = used_positions(batch, skip_first).cpu()
        result = trajectory(
            model, found, batch.tokens, rows, top_k=1, hooks=hooks, attention_mask=batch.attention_mask,
            chunk_size=chunk_size,
        )  # fmt: skip
        if ratio is None and getattr(model, "tokenizer", None) is not None:
            text = [tokenizer_of(model).decode(t[u].tolist()) for t, u in zip(batch.tokens.cpu(), used, strict=True)]
            n_bytes, n_counted = n_bytes + sum(len(one.encode()) for one in text), n_counted + int(used.sum())
        for name in found:
            for key, kept in scores.items():
                value = getattr(result[name], key).double().masked_fill(~used, math.nan)
                # A mean per row of text: positions of one row are no independent samples.
                kept[name].append(value.nanmean(-1).T)
    if ratio is None:
        if not n_counted:
            raise ValueError("bits per byte need the bytes per token: pass bytes_per_token=...")
        ratio = n_bytes / n_counted
    bits = {
        key: {name: torch.cat(x) / (math.log(2) * ratio) for name, x in kept.items()} for key, kept in scores.items()
    }
    keep = ~bits["cross_entropy"][OWN].isnan().any(1)
    if not keep.any():
        raise ValueError("no position has a next token to predict: pass rows of three tokens or more")
    bits = {key: {name: x[keep] for name, x in kept.items()} for key, kept in bits.items()}
    settings = {
        "rows": int(keep.sum()), "bytes_per_token": ratio, "skip_first": skip_first,
        "base": base.meta.get("fitter"), "own": own.meta.get("fitter"),
    }  # fmt: skip
    return FineTune(
        named(model), str(base.meta.get("model", "the base")), rows, bits["cross_entropy"], bits["kl"],
        "The base's readout behaves differently" if said else "", settings=settings,
    )  # fmt: skip

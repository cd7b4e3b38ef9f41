"""Does the lens of a model still read its fine-tune? The base's translators before the fine-tune's own norm and unembedding."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.checks import finite_number, whole_number
from tl_lenses.decode import decode, read_run
from tl_lenses.evaluation import BytesPerToken
from tl_lenses.experiments.grid import Grid, Table
from tl_lenses.experiments.report import Report
from tl_lenses.experiments.subject import Layers, Subject, text_settings
from tl_lenses.hooks import Hook, checked_hooks
from tl_lenses.lens import Lens, decoders_of
from tl_lenses.model import LensModel, check_model, prepare
from tl_lenses.progress import progress
from tl_lenses.text.batches import Text
from tl_lenses.tokens import next_tokens, used_positions
from tl_lenses.translators import Translators
from tl_lenses.views import Picture

LOGIT, BASE, OWN = "logit", "base's lens", "own lens"
LENSES, COST, ERROR = [LOGIT, BASE, OWN], "cost", "±"
# The values, and their headings.
VALUES = {"bits_per_byte": "cross entropy of the next token", "kl": "KL({} || lens)"}


@dataclass(frozen=True, repr=False)
class FineTune(Report):
    """Bits per byte of three lenses on a fine-tune, row by row of text.

    The grid has the axes lens (the logit lens, the base's, the fine-tune's own), row (of text) and layer, and the values

    - `bits_per_byte`: mean cross entropy of the next token;
    - `kl`: KL(fine-tune || lens), bits per byte too.

    The last layer usually is the fine-tune itself.

    Attributes:
        base: name of the model that the transferred lens was fitted on.
        warning: about the fingerprint of the transferred lens, if there was one.
    """

    base: str
    warning: str = ""

    name = "fine-tune"

    def cost(self, value: str = "bits_per_byte") -> Float[Tensor, "row layer"]:
        """The base's lens over the fine-tune's own one, bits per byte, for every row of text.

        Args:
            value: "bits_per_byte" or "kl".
        """
        return self.grid.at(lens=BASE)[value] - self.grid.at(lens=OWN)[value]

    def error(self, value: str = "bits_per_byte") -> Float[Tensor, " layer"]:
        """Standard error of the mean cost over rows of text; NaN of one row."""
        x = self.cost(value)
        return x.std(0) / math.sqrt(len(x))

    def summary(self) -> Grid:
        """Means over rows of text by layer and column: the three lenses, the cost, and its standard error."""
        columns = {value: [*(x.mean(0) for x in self.grid[value]), self.cost(value).mean(0), self.error(value)] for value in VALUES}
        axes = {"column": [*LENSES, COST, ERROR], "layer": self.layers}
        return Grid.over(axes, {value: torch.stack(x) for value, x in columns.items()})

    def tables(self) -> list[Table]:
        """Per layer the three lenses and the cost of the transferred one: in cross entropy, then in KL."""
        summary, tables = self.summary(), []
        note = "cost: the base's lens over the own one; ±: its standard error over rows of text"
        for value, heading in VALUES.items():
            title = f"the lens of {self.base} on {self.model}: {heading.format(self.model)}, bits per byte"
            more = f". {self.warning}" if self.warning and not tables else ""
            tables.append(summary.table(title, value, across="column", note=note + more))
        return tables

    def pictures(self) -> dict[str, Picture]:
        """Cost per layer; bits per byte of the three lenses; both with their intervals over rows of text."""
        costs = {"bits_per_byte": "in cross entropy", "kl": "in KL to the fine-tune"}
        title, up = f"what the lens of {self.base} costs on {self.model}", "over its own lens, bits per byte"
        axes = {"row": list(self.grid.axes["row"]), "layer": self.layers}
        cost = Grid.over(axes, {value: self.cost(value) for value in VALUES}).spread("row")
        lenses, entropy = self.grid.spread("row"), "cross entropy, bits per byte"
        return {
            "cost": cost.lines(title, costs, up=up),
            "bits_per_byte": lenses.lines(f"lenses on {self.model}", "bits_per_byte", by="lens", up=entropy),
        }

    def rows(self) -> list[dict[str, Any]]:
        """A row per lens and layer: means over rows of text."""
        summary = self.summary()
        lenses = {value: (("lens", "layer"), summary.at(column=LENSES)[value]) for value in VALUES}
        costs = {
            name: (("layer",), summary.at(column=column)[value])
            for name, column, value in (
                ("cost", COST, "bits_per_byte"), ("cost_error", ERROR, "bits_per_byte"), ("cost_kl", COST, "kl"),
                ("cost_kl_error", ERROR, "kl"),
            )
        }  # fmt: skip
        return Grid({"lens": LENSES, "layer": self.layers}, lenses | costs).rows()


@torch.no_grad()
def fine_tune(
    model: LensModel, base: Translators, own: Translators, tokens: Any, *, layers: Layers = None,
    skip_first: bool = True, hooks: Iterable[Hook] = (), bytes_per_token: float | None = None,
    chunk_size: int | None = None, show_progress: bool | None = None,
) -> FineTune:  # fmt: skip
    """The cost of a lens fitted on the base, read on its fine-tune, against a lens fitted on the fine-tune.

    The translators are kept; final norm and unembedding are the fine-tune's own: `Lens(model, base, check="warn")`.

    Args:
        model: the fine-tune.
        base: translators fitted on the model that it was trained from.
        own: translators fitted on the fine-tune, on the same text.
        tokens: held-out text, as `evaluate` takes it; costs are compared row by row.
        layers: all that both have, by default.
        skip_first: leave out real position 0 of each row.
        bytes_per_token: for plain ids; batches know their own, a tokenizer can decode the rest.
        chunk_size: positions decoded at a time.

    Raises:
        ValueError: translators of another width, depth or basis; `own` of another model; text without a next token.

    Source: Belrose et al. 2023 (Tuned Lens), section 3.4 and Figure 13.

    Example:
        >>> result = fine_tune(tuned, tll.fit_tuned(base, text), tll.fit_tuned(tuned, text), heldout)      # doctest: +SKIP
        >>> result.cost().mean(0)      # doctest: +SKIP
    """
    check_model(model, what="fine-tune")
    for given in (base, own):
        if not isinstance(given, (Translators, str, Path)):
            raise TypeError(f"base and own must be Translators or paths of saved ones, got {type(given).__name__}")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        transferred = Lens(model, base, check="warn")
    lenses = {LOGIT: Lens(model), BASE: transferred, OWN: Lens(model, own)}
    subject = Subject.of(model, lenses, layers, what="fine-tune")
    bytes_per_token = None if bytes_per_token is None else finite_number("bytes_per_token", bytes_per_token, above=0)
    chunk_size = None if chunk_size is None else whole_number("chunk_size", chunk_size, least=1)
    decoders, readout = decoders_of(lenses, subject.layers), transferred.readout
    size, hooks = BytesPerToken(model, bytes_per_token), checked_hooks(model, hooks)
    sums: list[Float[Tensor, "value lens row layer"]] = []
    for batch in progress(Text.of(tokens).to_run("fine-tune"), desc="fine-tune", show=show_progress):
        known_ratio = batch.bytes_per_token
        batch = prepare(model, batch.tokens, batch.attention_mask)
        used, real = used_positions(batch, skip_first), used_positions(batch, False)
        size.add(known_ratio, batch, used)
        following = next_tokens(batch.tokens, real)
        nats = torch.full((2, len(lenses), len(subject.layers), real.numel()), math.nan, dtype=torch.float64)
        reading = read_run(model, batch, subject.layers, hooks, real)
        for chunk in decode(reading, decoders, readout, chunk_size):
            goal, at = following.flatten()[chunk.at], chunk.at.cpu()
            for j, by_lens in chunk.logits.items():
                for i, name in enumerate(lenses):
                    logq = S.log_probs(by_lens[name])
                    nats[0, i, j, at] = -S.target_logprob(logq, goal).double().cpu()
                    nats[1, i, j, at] = S.kl(chunk.logp, logq, chunk.p).double().cpu()
        # A mean per row of text: positions of one row are no independent samples.
        nats = nats.unflatten(-1, real.shape).masked_fill(~used.cpu(), math.nan)
        sums.append(nats.nanmean(-1).transpose(-1, -2))
    if size.ratio is None:
        raise ValueError("bits per byte need the bytes per token: pass bytes_per_token=...")
    bits = torch.cat(sums, 2) / (math.log(2) * size.ratio)
    keep = ~bits[0, LENSES.index(OWN)].isnan().any(1)
    if not keep.any():
        raise ValueError("no position has a next token to predict: pass rows of three tokens or more")
    n = int(keep.sum())
    axes = {"lens": LENSES, "row": range(n), "layer": subject.layers}
    grid = Grid.over(axes, dict(zip(VALUES, bits[:, :, keep], strict=True)))
    settings = {
        **text_settings(tokens), "rows": n, "bytes_per_token": size.ratio, "skip_first": skip_first,
        "base": base.meta.get("fitter"), "own": own.meta.get("fitter"),
    }  # fmt: skip
    warning = "The base's readout behaves differently" if warned else ""
    return FineTune(subject.name, str(base.meta.get("model", "the base")), warning, grid=grid, settings=settings)

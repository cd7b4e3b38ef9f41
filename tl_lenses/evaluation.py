"""How good is a lens? Per layer, on held-out text, streamed."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.checks import entry, finite_number, whole_number
from tl_lenses.decode import Chunk, batches_to_read, decode, read_run
from tl_lenses.files import csv_text, json_text, versions
from tl_lenses.hooks import Hook, checked_hooks
from tl_lenses.layers import LayerOrSite
from tl_lenses.lens import Lens, common_layers, decoders_of, named_lenses, printable
from tl_lenses.model import LensModel, check_model, n_layers
from tl_lenses.shown import Shown
from tl_lenses.text.batches import Text
from tl_lenses.tokens import Batch, next_tokens, used_positions

_SUMS = ("kl", "cross_entropy", "top1", "entropy")


@dataclass(frozen=True, repr=False)
class Scores(Shown):
    """One row per lens and layer: `lens, layer, kl, cross_entropy, bits_per_byte, top1, entropy, bias`.

    `kl` is KL(model || lens) and `bias` KL of the two marginals, nats; `cross_entropy` nats per token with the next
    token; `top1` the share of positions where the lens' top token is the model's. The row of layer `n_layers` is the model itself.
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
        row = entry({(row["lens"], row["layer"]): row for row in self.rows}, "row", (printable(lens), layer))
        return entry(row, "value", name)

    def __repr__(self) -> str:
        names = ", ".join(dict.fromkeys(repr(str(row["lens"])) for row in self.rows))
        layers = len(dict.fromkeys(row["layer"] for row in self.rows))
        return f"Scores({names}, {layers} layers, {self.tokens} tokens)"

    def __rich__(self) -> Any:
        return self._views.scores_table(self.rows)

    def _repr_html_(self) -> str:
        return self._views.scores_html(self.rows)

    def figure(self, value: str = "kl") -> Any:
        """Lines over layers, one per lens: a matplotlib figure (extra `plot`)."""
        return self._views.scores_figure(self.rows, value)

    def save(self, path: str | Path, *, value: str = "kl", overwrite: bool = True, about: Mapping[str, Any] | None = None) -> Path:
        """Write `.csv` (a row per lens and layer), `.json`, `.html` (the table), or `.svg` and `.png` (extra `plot`). See `views.save_as`.

        Args:
            value: which numbers a picture shows; another one is a ValueError.
            about: what else `.json` should say, such as the model and the text.

        Example:
            >>> scores.save("scores.csv")      # doctest: +SKIP
        """
        if about is not None and not isinstance(about, Mapping):
            raise TypeError(f"about must be a mapping, got {type(about).__name__}")
        numbers = {"tokens": self.tokens, "bytes_per_token": self.bytes_per_token, **self.settings}
        lines = lambda: self._views.scores_lines(self.rows, value)
        writers: dict[str, Callable[[], str | bytes]] = {
            ".csv": lambda: csv_text(self.rows),
            ".json": lambda: json_text({**(about or {}), **numbers, "versions": versions(), "rows": self.rows}) + "\n",
            ".html": lambda: self._views.page_of("scores", self._views.scores_html(self.rows)),
            ".svg": lambda: lines().svg(),
            ".png": lambda: lines().png(),
        }
        return self._views.save_as(path, writers, example="scores.csv", overwrite=overwrite)


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
        tokens: `[n, seq]`, a `Batch`, `token_batches(...)`, an iterable of those, or the path of stored states (`capture`).
        layers: by default all that the lenses have.
        skip_first: leave out real position 0 of each row and nothing else.
        hooks: your interventions; the teacher is the same hooked run.
        bytes_per_token: for bits per byte of plain ids; batches know their own, a tokenizer can decode the rest.

    Returns:
        `Scores`. Means are over positions; bits per byte is `cross_entropy / (ln 2 * bytes per token)`.

    Raises:
        TypeError: something else than lenses, layers, tokens or numbers; the error says what was expected.
        ValueError: no tokens; activations that are not finite (the layer is named).

    Source: Belrose et al. 2023 (Tuned Lens), section 3 (bias: section 3.1; bits per byte: Gao et al. 2020).

    Example:
        >>> print(tll.evaluate(model, {"logit": tll.Lens(model), "tuned": lens}, heldout))      # doctest: +SKIP
    """
    check_model(model, what="an evaluation")
    lenses = named_lenses(model, lens, alone="lens")
    hooks = checked_hooks(model, hooks)
    bytes_per_token = None if bytes_per_token is None else finite_number("bytes_per_token", bytes_per_token, above=0)
    chunk_size = None if chunk_size is None else whole_number("chunk_size", chunk_size, least=1)
    rows = common_layers(lenses, layers, n_layers(model))
    decoders = decoders_of(lenses, rows)
    readout = next(iter(lenses.values())).readout
    totals = _Totals({(name, i): dict.fromkeys(_SUMS, 0.0) for name in lenses for i in range(len(rows))})
    size, rooms = BytesPerToken(model, bytes_per_token), S.Rooms()

    text = Text.of(tokens)
    for batch, used in batches_to_read(model, text, skip_first, "evaluating", show_progress, size):
        reading = read_run(model, batch, rows, hooks, used)
        goal = next_tokens(batch.tokens, used_positions(batch, False))
        for chunk in decode(reading, decoders, readout, chunk_size, rooms):
            totals.add(chunk, goal.flatten()[chunk.at])
        totals.n, totals.n_targets = totals.n + int(used.sum()), totals.n_targets + int((goal[used] >= 0).sum())

    if totals.n == 0:
        raise ValueError(
            "no position to score: the rows hold one token each and skip_first leaves none; pass skip_first=False or longer rows"
        )
    ratio = size.ratio
    table = [{"lens": name, "layer": rows[i], **totals.means(name, i, ratio)} for name in lenses for i in range(len(rows))]
    return Scores(table, totals.n, ratio, {"skip_first": skip_first, "hooks": len(hooks), "bos": text.bos})


@dataclass
class _Totals:
    """Running sums over positions, by lens and row; `marginals` are sums of probabilities in fp64."""

    sums: dict[tuple[str, int], dict[str, float]]
    marginals: dict[Any, Tensor] = field(default_factory=dict)
    n: int = 0
    n_targets: int = 0

    def add(self, chunk: Chunk, target: Tensor) -> None:
        """Some positions of one batch; `target` are the next tokens there, -1 where there is none."""
        top = S.likeliest(chunk.logp)
        if chunk.first:
            self._add_marginal("model", chunk.p)
        for i, by_name in chunk.logits.items():
            for name, logits in by_name.items():
                (logp, q), room = chunk.distribution(logits), chunk.rooms.like("room", logits)
                total = self.sums[name, i]
                total["kl"] += float(S.kl(chunk.logp, logp, chunk.p, room).double().sum())
                total["entropy"] += float(S.entropy(logp, q, room).double().sum())
                total["top1"] += int((S.likeliest(logp) == top).sum())
                total["cross_entropy"] -= float(S.target_logprob(logp, target).double().nansum())
                self._add_marginal((name, i), q)

    def _add_marginal(self, key: Any, p: Tensor) -> None:
        if key not in self.marginals:
            self.marginals[key] = p.new_zeros(p.shape[-1], dtype=torch.float64)
        self.marginals[key] += p.sum(0)  # a few rows; a sum that widens each number takes five times as long

    def means(self, name: str, i: int, bytes_per_token: float | None) -> dict[str, float]:
        """The numbers of one lens at one row."""
        total = self.sums[name, i]
        loss = total["cross_entropy"] / self.n_targets if self.n_targets else math.nan
        marginal, of_model = ((self.marginals[key] / self.n).log() for key in ((name, i), "model"))
        return {
            "kl": total["kl"] / self.n,
            "cross_entropy": loss,
            "bits_per_byte": loss / math.log(2) / bytes_per_token if bytes_per_token else math.nan,
            "top1": total["top1"] / self.n,
            "entropy": total["entropy"] / self.n,
            "bias": float(S.kl(of_model, marginal)),
        }


class BytesPerToken:
    """Mean bytes of text per token: what the user says, what the batches know, or what the tokenizer decodes.

    >>> size = BytesPerToken(model, None)                      # doctest: +SKIP
    >>> size.add(batch.bytes_per_token, batch, used); size.ratio      # doctest: +SKIP
    """

    def __init__(self, model: LensModel, given: float | None):
        self.tokenizer = getattr(model, "tokenizer", None)
        self.given = given
        self.known = given
        self.n_bytes = self.n_tokens = 0

    def add(self, known: float | None, batch: Batch, used: Bool[Tensor, "batch pos"]) -> None:
        """One batch; `known` is the ratio that the batch brings along."""
        if self.given is None and known is not None:
            self.known = known
        if self.known is None and self.tokenizer is not None:
            texts = [self.tokenizer.decode(row[keep].tolist()) for row, keep in zip(batch.tokens, used, strict=True)]
            self.n_bytes += sum(len(text.encode()) for text in texts)
            self.n_tokens += int(used.sum())

    @property
    def ratio(self) -> float | None:
        """Bytes per token; None where nobody knows."""
        return self.known if self.known is not None or not self.n_tokens else self.n_bytes / self.n_tokens

"""The subject of an experiment: a model, lenses of it and layers, checked in one place, and the residuals read from a text."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.checks import seed_of, several, whole_number
from tl_lenses.hooks import Hook, checked_hooks, residual_reads, run
from tl_lenses.layers import LayerOrSite, as_layer, label, resolve_layer
from tl_lenses.lens import Lens, named_lenses
from tl_lenses.model import LensModel, check_model, n_layers, name_of, prepare
from tl_lenses.progress import progress
from tl_lenses.text.batches import Text
from tl_lenses.text.stream import TokenBatches
from tl_lenses.tokens import Batch, bos_text, next_tokens, used_positions

Layers = Iterable[LayerOrSite] | None  # None for all
Lenses = Lens | Mapping[str, Lens]  # one, or several by name
NONE: Mapping[str, Lens] = MappingProxyType({})  # of an experiment that reads through none; a user's None is refused
# Is layer n_layers, the final residual, among the layers: by default, if it is asked for, or never (no block follows it)?
Final = Literal["default", "asked", "never"]
Positions = Bool[Tensor, "batch pos"] | tuple[Int[Tensor, " n"], Int[Tensor, " n"]]


def layers_of(layers: Layers, depth: int, *, final: Final = "default") -> list[int]:
    """Layers as `0..n_layers`, in order. Negative ones count from `n_layers`; the hook name of a residual is its layer.

    Args:
        final: "default": all layers are `0..n_layers`; "asked": `n_layers` only if it is in the list; "never": refused.

    >>> layers_of([-1, 0, "blocks.2.hook_resid_pre"], 4), layers_of(None, 4, final="never")
    ([0, 2, 4], [0, 1, 2, 3])
    """
    if layers is None:
        return list(range(depth + (final == "default")))
    given = several("layers", layers)
    named = [label(layer) if isinstance(layer, str) else layer for layer in given]
    if sites := [name for name in named if isinstance(name, str)]:
        raise ValueError(f"experiments take layers by number, got {sites[0]!r}")
    resolved = sorted(resolve_layer(as_layer(layer), depth) for layer in named if not isinstance(layer, str))
    if len(set(resolved)) != len(resolved) or not resolved:
        raise ValueError(f"expected different layers, at least one (None for all), got {given}")
    if final == "never" and resolved[-1] == depth:
        raise ValueError(
            f"there is no block {depth}: layer {depth} is the final residual, the layers that a block follows are 0..{depth - 1}"
        )
    return resolved


def lenses_of(model: LensModel, lenses: Lenses, what: str) -> dict[str, Lens]:
    """Lenses by name, a single one as "lens"."""
    if isinstance(lenses, Mapping) and not lenses:
        raise ValueError(f"{what} needs at least one lens, got an empty mapping: pass {{'logit': tll.Lens(model)}}")
    return named_lenses(model, lenses, alone="lens")


def check_finite(states: dict[int, Float[Tensor, "*n d_model"]]) -> dict[int, Float[Tensor, "*n d_model"]]:
    """Residuals by layer as they are."""
    for layer, x in states.items():
        if not x.isfinite().all():
            raise ValueError(
                f"the residual at layer {layer} has values that are not finite: the model overflows there (try float32 or bfloat16)"
            )
    return states


def data_of(tokens: Any) -> str:
    """The name of a text or of prompts, for the settings of a result.

    >>> data_of(torch.zeros(2, 5, dtype=torch.long)), data_of(["Once upon a time"])
    ('token ids [2, 5]', 'prompts (1)')
    """
    if isinstance(tokens, TokenBatches):
        return tokens.name.strip("'")
    if isinstance(tokens, Text):
        return data_of(tokens.batches if tokens.ids is None else tokens.ids)
    if isinstance(tokens, str) or (isinstance(tokens, Sequence) and all(isinstance(text, str) for text in tokens)):
        return f"prompts ({1 if isinstance(tokens, str) else len(tokens)})"
    ids = tokens.tokens if isinstance(tokens, Batch) else tokens
    return f"token ids {list(ids.shape)}" if isinstance(ids, Tensor) else f"token ids ({type(tokens).__name__})"


def text_settings(tokens: Any) -> dict[str, Any]:
    """The name of a text, and the BOS that its rows start with; None for ids, which stay as they are.

    >>> text_settings(torch.zeros(2, 5, dtype=torch.long))
    {'data': 'token ids [2, 5]', 'bos': None}
    """
    return {"data": data_of(tokens), "bos": Text.of(tokens).bos}


def logits_of(model: LensModel, batch: Batch, hooks: Iterable[Hook] = ()) -> Float[Tensor, "batch pos d_vocab"]:
    """The logits of a batch with interventions."""
    return run(model, batch.tokens, hooks, attention_mask=batch.attention_mask)


@dataclass(frozen=True)
class Texts:
    """Batches that an experiment goes over again and again, each with the positions that count."""

    batches: list[Batch]  # as the model takes them
    # `[batch, pos]` of each: real positions, without each row's first one where asked
    used: list[Bool[Tensor, "batch pos"]]

    @property
    def n(self) -> int:
        """Number of positions that count."""
        return sum(int(mask.sum()) for mask in self.used)

    def __iter__(self) -> Iterator[tuple[Batch, Bool[Tensor, "batch pos"]]]:
        return iter(zip(self.batches, self.used, strict=True))


@dataclass(frozen=True)
class Drawn:
    """Positions drawn at random."""

    states: dict[int, Float[Tensor, "n d_model"]]  # by layer `[n, d_model]`
    logp: Float[Tensor, "n d_vocab"]  # the model's log-probabilities of the next token, `[n, d_vocab]`, nats
    rows: list[int]  # the row of the text that each position is from


@dataclass(frozen=True)
class Subject:
    """A model, lenses of this model object, and layers that each of the lenses has."""

    model: LensModel  # in eval mode
    lenses: dict[str, Lens] = field(default_factory=dict)  # by name; empty where the experiment reads through none
    layers: list[int] = field(default_factory=list)  # `0..n_layers`, in order

    @staticmethod
    def of(
        model: LensModel, lenses: Lenses = NONE, layers: Layers = None,
        *, what: str = "an experiment", final: Final = "default", every: bool = False,
    ) -> "Subject":  # fmt: skip
        """The one check of the model, the lenses and the layers of an experiment, before anything runs.

        Args:
            layers: None for all (see `layers_of`) that every lens has.
            every: None asks for all layers, and a lens that lacks one is refused.
            what: name of the experiment, for errors.

        >>> Subject.of(model, {"tuned": lens}, [0, -1], what="quality").layers      # doctest: +SKIP
        [0, 8]
        """
        check_model(model, what=what)
        named = {} if lenses is NONE else lenses_of(model, lenses, what)
        layers = None if layers is None else several("layers", layers)
        resolved = layers_of(layers, n_layers(model), final=final)
        missing = {layer: name for name, lens in named.items() for layer in resolved if layer not in lens.layers}
        common = [layer for layer in resolved if layer not in missing]
        if missing and (layers is not None or every or not common):
            layer, name = next(iter(missing.items()))
            raise ValueError(
                f"lens {name!r} has no layer {layer}; it has {named[name].layers}: fit it there, or leave the layer out"
            )
        return Subject(model, named, common)

    @property
    def depth(self) -> int:
        """`n_layers` of the model."""
        return n_layers(self.model)

    @property
    def name(self) -> str:
        """The model's name, as tables show it."""
        return name_of(self.model)

    @property
    def bos(self) -> str | None:
        """The text of the BOS that is put before a text; None where the tokenizer has none."""
        return bos_text(getattr(self.model, "tokenizer", None))

    # --- text

    def batches(
        self, tokens: Any, *, skip_first: bool = True, desc: str = "", show_progress: bool | None = False
    ) -> Iterator[tuple[Batch, Bool[Tensor, "batch pos"]]]:
        """Every batch of a text as the model takes it, with its real positions.

        Args:
            skip_first: leave out real position 0 of each row, whose residual has an outsized norm.
        """
        text = Text.of(tokens).to_run("an experiment")
        for batch in progress(text, desc=desc, show=show_progress) if desc else text:
            ready = prepare(self.model, batch.tokens, batch.attention_mask)
            yield ready, used_positions(ready, skip_first)

    def texts(self, tokens: Any, *, n: int | None = None, skip_first: bool = True, resampled: bool = False) -> Texts:
        """The rows of a text until `n` positions are there (all positions of the last row count).

        Args:
            resampled: each position will take the state of another one of its batch.
        """
        n = None if n is None else whole_number("n", n, least=1)
        batches, masks, seen = [], [], 0
        for batch, used in self.batches(tokens, skip_first=skip_first):
            if n is not None:
                after = seen + used.sum(1).cumsum(0)
                rows = int((after < n).sum()) + 1  # up to the row that reaches n
                mask = batch.attention_mask
                batch, used = Batch(batch.tokens[:rows], None if mask is None else mask[:rows]), used[:rows]
            batches.append(batch)
            masks.append(used)
            seen += int(used.sum())
            if n is not None and seen >= n:
                break
        if seen < 2:
            raise ValueError(f"the text gives {seen} positions, and an ablation needs 2 at least: pass more of it, or longer rows")
        if resampled and any(int(used.sum()) < 2 for used in masks):
            raise ValueError("resampling needs two positions in every batch: pass larger batches or longer rows")
        return Texts(batches, masks)

    def pairs(self, target_layers: Layers) -> list[tuple[int, int]]:
        """Cells (l, l*) of all layers and target layers; these are `0..n_layers - 1` by default."""
        return list(itertools.product(self.layers, layers_of(target_layers, self.depth, final="asked")))

    # --- residuals

    @torch.no_grad()
    def read(
        self, batch: Batch, at: Positions, *, layers: Iterable[int] | None = None, hooks: Iterable[Hook] = (), logits: bool = True
    ) -> tuple[dict[int, Float[Tensor, "n d_model"]], Float[Tensor, "n_or_none d_vocab"]]:
        """Residuals by layer and the model's logits at some positions of a batch, in one pass.

        Args:
            at: a mask `[batch, pos]`, or rows and columns.
            hooks: your interventions; they run before the reads.
            logits: False leaves them out (an empty tensor).
        """
        layers, seen = list(self.layers if layers is None else layers), {}
        reads = [*hooks, *residual_reads(self.model, layers, seen)]
        out = run(self.model, batch.tokens, reads, "logits" if logits else None, attention_mask=batch.attention_mask)
        states = check_finite({layer: seen[layer][at] for layer in layers})
        return states, out[at] if logits else torch.empty(0, 0)

    def states(
        self, texts: Texts, layers: Iterable[int] | None = None, *, hooks: Iterable[Hook] = ()
    ) -> dict[int, Float[Tensor, "n d_model"]]:
        """The residual of every layer at all positions that count."""
        layers = list(self.layers if layers is None else layers)
        parts = [self.read(batch, used, layers=layers, hooks=hooks, logits=False)[0] for batch, used in texts]
        return {layer: torch.cat([part[layer] for part in parts]) for layer in layers}

    def predictions(
        self, tokens: Any, *, hooks: Iterable[Hook] = (), skip_first: bool = True, desc: str = "",
        show_progress: bool | None = None,
    ) -> Iterator[tuple[dict[int, Float[Tensor, "n d_model"]], Int[Tensor, " n"]]]:  # fmt: skip
        """Batch by batch, the residuals of every position that has a next token, and these next tokens."""
        hooks, n = checked_hooks(self.model, hooks), 0
        for batch, used in self.batches(tokens, skip_first=skip_first, desc=desc, show_progress=show_progress):
            following = next_tokens(batch.tokens, used_positions(batch, False))
            at = used & (following >= 0)
            if at.any():
                n += int(at.sum())
                yield self.read(batch, at, hooks=hooks)[0], following[at]
        if n == 0:
            raise ValueError("no position has a next token to predict: pass rows of three tokens or more")

    def draw(
        self, batches: Iterable[tuple[Batch, Bool[Tensor, "batch pos"]]], n: int, *, seed: int = 0,
        per_row: int | None = None, layers: Iterable[int] | None = None,
    ) -> Drawn:  # fmt: skip
        """Up to n positions at random, from the first batches that have so many.

        Args:
            batches: from `batches` or `texts`; of an iterator the rest can be read afterwards.
            per_row: at most so many positions of a row; by default a batch is drawn from as a whole.
        """
        per_row = None if per_row is None else whole_number("per_row", per_row, least=1)
        generator = torch.Generator().manual_seed(seed_of(seed))
        layers = list(self.layers if layers is None else layers)
        states: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        logps, rows, first = [], [], 0
        for batch, used in batches:
            places = used.cpu().nonzero()
            groups = places.split(used.sum(1).tolist()) if per_row else [places]
            picked = []
            for group in groups:
                most = n - len(rows) - sum(map(len, picked))
                order = torch.randperm(len(group), generator=generator)
                picked.append(group[order[: most if per_row is None else min(per_row, most)]])
            at = torch.cat(picked)
            rows += (at[:, 0] + first).tolist()
            first += len(batch.tokens)
            row, column = at.to(batch.tokens.device).unbind(1)
            by_layer, logits = self.read(batch, (row, column), layers=layers)
            logps.append(S.log_probs(logits))
            for layer in layers:
                states[layer].append(by_layer[layer])
            if len(rows) >= n:
                break
        if len(rows) < 2:
            raise ValueError("the text gives fewer than two positions: pass more of it, or longer rows")
        return Drawn({layer: torch.cat(parts) for layer, parts in states.items()}, torch.cat(logps), rows)

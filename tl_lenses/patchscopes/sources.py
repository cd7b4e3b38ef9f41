"""Where the vectors of a patchscope come from: prompts, read in as few passes as there are prompt lengths, or tensors."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses.hooks import Hook, hooked, installed, marked
from tl_lenses.hooks import read as read_hook
from tl_lenses.model import Decoder, LensModel, n_layers, prepare
from tl_lenses.sites import LayerOrSite, Position, positions, sites

# Columns of one source pass: enough to fill a processor, small beside a model.
_PASS_TOKENS = 4096


@dataclass(frozen=True)
class Source:
    """Where a vector comes from: text, token ids, or vectors.

    Args:
        prompt: text (BOS is prepended), token ids `[pos]`, or vectors: `[d_model]` and `[n, d_model]` have no layer,
            `[n, n_layers + 1, d_model]`
            are indexed by layer.
        pos: int, substring (its last token), `tll.at(...)` or slice; -1 is the last token. A list is a span for as many
            target positions.

    Example:
        >>> Source("Diana, Princess of Wales", pos="Wales")
        Source(prompt='Diana, Princess of Wales', pos='Wales')
    """

    prompt: str | Tensor | Sequence[int]
    pos: Position = -1

    @property
    def has_vectors(self) -> bool:
        """Whether the prompt is a tensor of vectors rather than text or ids."""
        return isinstance(self.prompt, Tensor) and self.prompt.is_floating_point()

    @property
    def has_layers(self) -> bool:
        """Whether there is a layer to choose: all but vectors `[d_model]` and `[n, d_model]`."""
        return not self.has_vectors or self.prompt.ndim == 3  # type: ignore[union-attr]


@dataclass(frozen=True)
class Vectors:
    """One entry of the source axis: a label, the vectors by layer (None: without one), and the prompt they come from."""

    label: str
    by_layer: dict[Any, Float[Tensor, "k d"]]
    tokens: Int[Tensor, "1 pos"] | None = None
    columns: tuple[int, ...] = ()


def ids_of(prompt: str | Tensor | Sequence[int]) -> str | Tensor:
    """Text and tensors as they are, a list of ids as a tensor.

    Raises:
        TypeError: neither, such as a numpy array of vectors (whose numbers would be cut off to ids).
    """
    if isinstance(prompt, (str, Tensor)):
        return prompt
    ids = list(prompt) if isinstance(prompt, Iterable) else [None]
    if not all(hasattr(i, "__index__") and not isinstance(i, bool) for i in ids):
        raise TypeError(
            f"expected text, token ids or a tensor of vectors, got {type(prompt).__name__}: torch.as_tensor(...) makes one"
        )
    return torch.tensor([operator.index(i) for i in ids], dtype=torch.long)  # pyright: ignore[reportArgumentType]


def collect(
    model: LensModel,
    sources: Sequence[Source],
    layers: Iterable[LayerOrSite | None],
    hooks: Sequence[Hook],
    *,
    prepend_bos: bool = True,
) -> list[Vectors]:
    """The vectors of every source at every layer asked for: `collect_along` with nobody along."""
    return collect_along(model, sources, layers, hooks, (), prepend_bos=prepend_bos)[0]


def collect_along(
    model: LensModel,
    sources: Sequence[Source],
    layers: Iterable[LayerOrSite | None],
    hooks: Sequence[Hook],
    along: Sequence[Int[Tensor, "1 _"]],
    *,
    prepend_bos: bool = True,
) -> tuple[list[Vectors], list[Decoder | None]]:
    """The vectors of every source at every layer asked for: one pass per prompt length, whatever the number of layers.

    Prompts of equal length share a pass, equal prompts share a row, so nothing is padded. With `hooks` (whose positions
    and values may be for a single row) every prompt runs alone.

    Args:
        model: runs the prompts.
        sources: what was asked for.
        layers: layers and sites to read, or None for vectors without a layer.
        hooks: the user's interventions on the source run.
        along: other prompts whose keys and values are wanted. They ride in the first pass of about their length: a pass
            over one short prompt costs nearly what a pass over several does.
        prepend_bos: for text.

    Returns:
        The vectors by source, and a decoder per prompt of `along` (None: it did not find a seat).

    Raises:
        ValueError: a position that is not there, vectors of another shape, vectors that are not finite.
    """
    riders: list[Decoder | None] = [None] * len(along)
    wanted = list(dict.fromkeys(layers))
    ready: list[list[Vectors] | None] = [_given(model, one, wanted) if one.has_vectors else None for one in sources]
    jobs: dict[int, dict[tuple[int, ...], list[int]]] = {}  # length -> ids -> sources
    prompts: dict[int, Int[Tensor, "1 pos"]] = {}
    columns: dict[int, tuple[int, ...]] = {}
    for i, one in enumerate(sources):
        if ready[i] is None:
            batch = prepare(model, ids_of(one.prompt), prepend_bos=prepend_bos)
            if len(batch.tokens) != 1:
                raise ValueError("a Source is one prompt: pass a list of Sources for several")
            prompts[i] = batch.tokens
            columns[i] = tuple(positions(model, batch.tokens, one.pos)[0].tolist())
            ids = tuple(batch.tokens[0].tolist())
            jobs.setdefault(len(ids), {}).setdefault(ids, []).append(i)
    for length, by_ids in jobs.items():
        rows = list(by_ids.items())
        width = 1 if hooks else max(1, _PASS_TOKENS // length)
        for start in range(0, len(rows), width):
            part = rows[start : start + width]
            tokens = torch.cat([prompts[mine[0]] for _, mine in part])
            seats = [i for i, other in enumerate(along) if riders[i] is None and _alike(length, other.shape[1])]
            seen, decoder = _read(model, _stacked([tokens, *(along[i] for i in seats)]), wanted, hooks)
            for row, i in enumerate(seats, start=len(part)):
                riders[i] = decoder.cut(row, along[i].shape[1])
            for row, (_, mine) in enumerate(part):
                for i in mine:
                    found = {layer: x[row, list(columns[i])].flatten(1) for layer, x in seen.items()}
                    prompt = sources[i].prompt
                    label = prompt if isinstance(prompt, str) else _decode(model, prompts[i][0])
                    ready[i] = [Vectors(label, found, prompts[i], columns[i])]
    collected = [one for several in ready for one in several or []]
    for one in collected:
        for layer, vector in one.by_layer.items():
            if not bool(vector.isfinite().all()):
                where = "" if layer is None else f" at layer {layer}"
                raise ValueError(f"the vectors of source {one.label!r}{where} are not finite: NaN or infinity in them")
    return collected, riders


def _alike(a: int, b: int) -> bool:
    """Whether padding the shorter of two prompts costs less than a pass of its own."""
    return max(a, b) <= 2 * min(a, b)


def _stacked(prompts: Sequence[Int[Tensor, "_ _"]]) -> Int[Tensor, "rows pos"]:
    """Prompts of different lengths as one batch, repeating last tokens on the right: what lies behind a column never
    reaches it, so there is nothing to mask."""
    width = max(one.shape[1] for one in prompts)
    return torch.cat([torch.cat([one, one[:, -1:].expand(-1, width - one.shape[1])], 1) for one in prompts])


def _read(
    model: LensModel, tokens: Tensor, layers: list[Any], hooks: Sequence[Hook]
) -> tuple[dict[Any, Tensor], Decoder]:
    """Activations `[row, pos, ...]` by layer of one pass, and the keys and values that it left."""
    seen: dict[Any, Tensor] = {}
    names = sites(model, layers)
    # The logits are of no use, unless somebody looks on.
    spare = not (hooks or any(name.startswith("unembed") for name in names.values()) or hooked(model))
    decoder = Decoder(model)
    with (
        installed(model, [*hooks, *(read_hook(name, seen, key=layer) for layer, name in names.items())]),
        marked(0, tokens.shape[1]),
    ):
        decoder.feed(tokens, last=0 if spare else None)
    for layer, x in seen.items():
        if x.ndim < 3 or x.shape[:2] != tokens.shape:
            raise ValueError(
                f"{layer!r} gives {list(x.shape)}, not one vector per position [batch, pos, ...]: it cannot be a source"
            )
    return seen, decoder


def _given(model: LensModel, one: Source, layers: list[Any]) -> list[Vectors]:
    """Vectors as they were passed."""
    vectors: Tensor = one.prompt  # type: ignore[assignment]
    if not (isinstance(one.pos, int) and one.pos == -1):
        raise ValueError(
            f"vectors have no positions to choose from, got pos={one.pos!r}: leave it out, and index the tensor"
        )
    if not vectors.numel():
        raise ValueError(
            f"there are no vectors in a tensor of shape {list(vectors.shape)}: expected [n, d_model], n >= 1"
        )
    if vectors.ndim == 3:
        if vectors.shape[1] != n_layers(model) + 1:
            raise ValueError(
                f"vectors [n, n_layers + 1, d_model] need {n_layers(model) + 1} layers, got {list(vectors.shape)}"
            )
        if sites := [layer for layer in layers if isinstance(layer, str)]:
            raise ValueError(f"vectors [n, n_layers + 1, d_model] have residual layers only, got {sites[0]!r}")
        return [Vectors(f"vector {i}", {layer: v[layer][None] for layer in layers}) for i, v in enumerate(vectors)]
    if vectors.ndim not in (1, 2):
        raise ValueError(
            f"expected vectors [d_model], [n, d_model] or [n, n_layers + 1, d_model], got {list(vectors.shape)}"
        )
    rows = vectors[None] if vectors.ndim == 1 else vectors
    return [Vectors(f"vector {i}", {None: v[None]}) for i, v in enumerate(rows)]


def _decode(model: LensModel, ids: Int[Tensor, " pos"]) -> str:
    tokenizer = getattr(model, "tokenizer", None)
    return str(ids.tolist()) if tokenizer is None else tokenizer.decode(ids.tolist())

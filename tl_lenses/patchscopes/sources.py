"""Where the vectors of a patchscope come from: tensors, or prompts, read in one pass per prompt length."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses.decoding import Decoder
from tl_lenses.hooks import Hook, installed, marked
from tl_lenses.hooks import read as read_hook
from tl_lenses.layers import LayerOrSite
from tl_lenses.model import LensModel, hooked, n_layers, prepare
from tl_lenses.sites import Position, positions, sites

# Columns of one source pass: enough to fill a processor, small beside a model.
_PASS_TOKENS = 4096

# Text, token ids, the output of a tokenizer, or the messages of a chat.
Tokens = str | Tensor | Sequence[int] | Mapping[str, Any] | Sequence[Mapping[str, Any]]
# The vectors of one source at each layer; None where vectors have no layer.
VectorsByLayer = dict[LayerOrSite | None, Float[Tensor, "_k _d"]]


@dataclass(frozen=True)
class Source:
    """Where a vector comes from: text, token ids, or vectors.

    Args:
        prompt: text (BOS is prepended), token ids `[pos]`, the output of a tokenizer or of `apply_chat_template`, a list
            of chat messages, or vectors: `[d_model]` and `[n, d_model]` have no layer, `[n, n_layers + 1, d_model]` are
            indexed by layer.
        pos: int, substring (its last token), `tll.at(...)` or slice; -1 is the last token. A list is a span for as many
            target positions.

    Example:
        >>> Source("Diana, Princess of Wales", pos="Wales")
        Source(prompt='Diana, Princess of Wales', pos='Wales')
    """

    prompt: Tokens
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
class ReadySource:
    """One entry of the source axis, checked before anything runs."""

    label: str  # the text of the prompt, or the number of the vector
    tokens: Int[Tensor, "1 pos"] | None = None  # the ids of a prompt; None for vectors
    columns: tuple[int, ...] = ()  # the columns of the prompt whose vectors are taken
    given: dict[Any, Float[Tensor, "_k _d"]] | None = None  # the vectors by layer, where the source is vectors


def ready_sources(
    model: LensModel, sources: Sequence[Source], layers: Iterable[LayerOrSite | None], *, prepend_bos: bool = True
) -> list[ReadySource]:
    """Sources as ids and columns, or as vectors at the layers that will be read. A tensor of n vectors gives n entries."""
    layers = list(dict.fromkeys(layers))
    ready: list[ReadySource] = []
    for source in sources:
        if source.has_vectors:
            ready += _given(model, source, layers)
            continue
        tokens = ids_of(model, source.prompt, "Source", prepend_bos=prepend_bos)
        columns = tuple(positions(model, tokens, source.pos)[0].tolist())
        label = source.prompt
        if not isinstance(label, str):
            ids, tokenizer = tokens[0].tolist(), getattr(model, "tokenizer", None)
            label = str(ids) if tokenizer is None else tokenizer.decode(ids)
        ready.append(ReadySource(label, tokens, columns))
    return ready


def ids_of(model: LensModel, prompt: Tokens, kind: str, *, prepend_bos: bool = True) -> Int[Tensor, "1 pos"]:
    """The ids of one prompt, without pads."""
    if not (isinstance(prompt, (str, Tensor, Mapping)) or is_chat(prompt)):
        ids = list(prompt) if isinstance(prompt, Iterable) else [None]
        if not all(hasattr(i, "__index__") and not isinstance(i, bool) for i in ids):
            raise TypeError(
                f"expected text, token ids, chat messages or a tensor of vectors, got {type(prompt).__name__}: torch.as_tensor(...) makes one"
            )
        prompt = torch.tensor([operator.index(i) for i in ids], dtype=torch.long)  # pyright: ignore[reportArgumentType]
    tokens, mask, _ = prepare(model, prompt, prepend_bos=prepend_bos)  # type: ignore[arg-type]
    if len(tokens) != 1:
        does = "to combine several" if kind == "Target" else "for several"
        raise ValueError(f"a {kind} is one prompt: pass a list of {kind}s {does}")
    return tokens if mask is None else tokens[:, mask[0].bool()]


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of chat messages, such as `{"role": "user", "content": "Hello"}`."""
    return isinstance(prompt, (list, tuple)) and bool(prompt) and all(isinstance(part, Mapping) for part in prompt)


def read_vectors(
    model: LensModel, sources: Sequence[ReadySource], layers: Iterable[LayerOrSite | None],
    hooks: Sequence[Hook] = (), prefixes: Sequence[Int[Tensor, "1 _"]] = (),
) -> tuple[list[VectorsByLayer], list[Decoder | None]]:  # fmt: skip
    """The vectors of every source at every layer: one pass per prompt length, whatever the number of layers.

    Prompts of equal length share a pass, equal prompts share a row, so nothing is padded. With `hooks` (whose positions
    and values may be for a single row) every prompt runs alone.

    Args:
        prefixes: extra prompts, run in the same batch when lengths are close, which saves a pass.
    """
    layers = list(dict.fromkeys(layers))
    vectors: list[VectorsByLayer] = [dict(source.given or {}) for source in sources]
    decoders: list[Decoder | None] = [None] * len(prefixes)
    for length, prompts in _by_length(sources).items():
        width = 1 if hooks else max(1, _PASS_TOKENS // length)
        for start in range(0, len(prompts), width):
            rows = prompts[start : start + width]
            # Close: to pad the shorter of the two costs less than a pass of its own.
            widths = [(length, prefix.shape[1]) for prefix in prefixes]
            close = [i for i, w in enumerate(widths) if decoders[i] is None and max(w) <= 2 * min(w)]
            batch = [sources[sharing[0]].tokens for sharing in rows] + [prefixes[i] for i in close]
            seen, decoder = _read(model, _stacked(batch), layers, hooks)  # type: ignore[arg-type]
            for row, i in enumerate(close, start=len(rows)):
                decoders[i] = decoder.cut(row, prefixes[i].shape[1])
            for row, sharing in enumerate(rows):
                for i in sharing:
                    columns = list(sources[i].columns)
                    vectors[i] = {layer: x[row, columns].flatten(1) for layer, x in seen.items()}
                    _check_finite(sources[i].label, vectors[i])
    return vectors, decoders


def _by_length(sources: Sequence[ReadySource]) -> dict[int, list[list[int]]]:
    """Prompt length -> the prompts of this length, each as the sources (by number) that share it."""
    groups: dict[int, dict[tuple[int, ...], list[int]]] = {}
    for i, source in enumerate(sources):
        if source.tokens is not None:
            ids = tuple(source.tokens[0].tolist())
            groups.setdefault(len(ids), {}).setdefault(ids, []).append(i)
    return {length: list(by_ids.values()) for length, by_ids in groups.items()}


def _check_finite(label: str, vectors: VectorsByLayer) -> None:
    for layer, vector in vectors.items():
        if not bool(vector.isfinite().all()):
            where = "" if layer is None else f" at layer {layer}"
            raise ValueError(f"the vectors of source {label!r}{where} are not finite: NaN or infinity in them")


def _stacked(prompts: Sequence[Int[Tensor, "1 _"]]) -> Int[Tensor, "rows pos"]:
    """Prompts as one batch, the last token repeated on the right: no column attends to later ones, so no mask is needed."""
    width = max(prompt.shape[1] for prompt in prompts)
    return torch.cat([torch.cat([p, p[:, -1:].expand(-1, width - p.shape[1])], 1) for p in prompts])


def _read(model: LensModel, tokens: Tensor, layers: list[Any], hooks: Sequence[Hook]) -> tuple[dict[Any, Tensor], Decoder]:
    """Activations `[row, pos, ...]` by layer of one pass, and the keys and values that it left."""
    seen: dict[Any, Tensor] = {}
    names = sites(model, layers)
    # The logits are not used, unless hooks look at them.
    needs_no_logits = not (hooks or any(name.startswith("unembed") for name in names.values()) or hooked(model))
    decoder = Decoder(model)
    with (
        installed(model, [*hooks, *(read_hook(name, seen, key=layer) for layer, name in names.items())]),
        marked(0, tokens.shape[1]),
    ):
        decoder.feed(tokens, last=0 if needs_no_logits else None)
    for layer, x in seen.items():
        if x.ndim < 3 or x.shape[:2] != tokens.shape:
            raise ValueError(
                f"{layer!r} gives {list(x.shape)}, not one vector per position [batch, pos, ...]: it cannot be a source"
            )
    return seen, decoder


def _given(model: LensModel, source: Source, layers: list[Any]) -> list[ReadySource]:
    """Vectors as they were passed, one entry each."""
    vectors: Tensor = source.prompt  # type: ignore[assignment]
    shape = list(vectors.shape)
    if not (isinstance(source.pos, int) and source.pos == -1):
        raise ValueError(f"vectors have no positions to choose from, got pos={source.pos!r}: leave it out, and index the tensor")
    if not vectors.numel():
        raise ValueError(f"there are no vectors in a tensor of shape {shape}: expected [n, d_model], n >= 1")
    if vectors.ndim == 3:
        if vectors.shape[1] != n_layers(model) + 1:
            raise ValueError(f"vectors [n, n_layers + 1, d_model] need {n_layers(model) + 1} layers, got {shape}")
        if hook_names := [layer for layer in layers if isinstance(layer, str)]:
            raise ValueError(f"vectors [n, n_layers + 1, d_model] have residual layers only, got {hook_names[0]!r}")
        by_layer = [{layer: v[layer][None] for layer in layers} for v in vectors]
    elif vectors.ndim in (1, 2):
        by_layer = [{None: v[None]} for v in vectors.reshape(-1, vectors.shape[-1])]
    else:
        raise ValueError(f"expected vectors [d_model], [n, d_model] or [n, n_layers + 1, d_model], got {shape}")
    ready = [ReadySource(f"vector {i}", given=given) for i, given in enumerate(by_layer)]
    for entry in ready:
        _check_finite(entry.label, entry.given or {})
    return ready

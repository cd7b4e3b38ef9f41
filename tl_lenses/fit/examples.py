"""Examples for the map of a scope: vectors of the source layers, each with the tokens that the target should say of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.checks import one_of, several, whole_number
from tl_lenses.fit.common import place, states
from tl_lenses.hooks import Hook
from tl_lenses.identity import check_tokenizers
from tl_lenses.model import LensModel, n_layers, tokenizer_of
from tl_lenses.patchscopes import Source
from tl_lenses.patchscopes.request import sources_of
from tl_lenses.patchscopes.sources import read_vectors, ready_sources
from tl_lenses.progress import progress
from tl_lenses.text.batches import Text
from tl_lenses.tokens import encode

ONE_IN = 8  # of the positions of a text, one in so many is an example
MOST = 2**14  # examples of a text


@dataclass(frozen=True)
class Asked:
    """What `fit_scope` was asked to learn: `source` and `labels` as it takes them, at these source layers."""

    model: LensModel
    to: LensModel
    source: Any
    labels: Any
    layers: Sequence[Any]
    hooks: Sequence[Hook]
    prepend_bos: bool
    skip_first: bool


@dataclass(frozen=True)
class Examples:
    """Vectors by source layer, on the CPU, and the ids that the target should say of each."""

    vectors: dict[Any, Float[Tensor, "n d"]]
    labels: list[list[int]]


def examples_of(asked: Asked, n: int, seed: int, show: bool | None) -> Examples:
    """Those of the text, at most n; or one per source, in a random order."""
    in_text = isinstance(asked.labels, str) or not isinstance(asked.labels, Iterable)
    examples = _of_text(asked, n, seed, show) if in_text else _of_sources(asked, seed)
    for layer, x in examples.vectors.items():
        if not bool(x.norm(dim=-1).all()):
            raise ValueError(f"a vector of layer {layer!r} has length 0, so it has no direction h / |h|")
    return examples


def _of_text(asked: Asked, n: int, seed: int, show: bool | None) -> Examples:
    """Random positions of the text, in its order, with the token there or the next ones."""
    if isinstance(asked.labels, str):
        one_of("labels, where it is no list,", asked.labels, ("token",))
    ahead = 0 if asked.labels == "token" else whole_number("labels, a number of next tokens,", asked.labels, least=1)
    if asked.to is not asked.model:
        check_tokenizers(asked.model, asked.to)
    names = {layer: place(asked.model, layer) for layer in dict.fromkeys(asked.layers)}
    n, generator = min(n, MOST), torch.Generator().manual_seed(seed)
    taken: dict[Any, list[Tensor]] = {layer: [] for layer in names}
    labels: list[list[int]] = []
    with progress(total=n, desc="vectors", show=show) as bar:
        for batch, _ in Text.of(asked.source).stream(endless=False):
            _, seen, used, batch = states(asked.model, batch, names.values(), asked.hooks, asked.skip_first)
            has_label = used.clone()
            if ahead:
                has_label[:, -ahead:] = False
                has_label[:, :-ahead] &= used[:, ahead:]
            where = has_label.nonzero().cpu()
            where = where[torch.randperm(len(where), generator=generator)[: min(-(-len(where) // ONE_IN), n - len(labels))]]
            first = int(ahead > 0)
            labels += [batch.tokens[i, j + first : j + first + max(ahead, 1)].tolist() for i, j in where.tolist()]
            for layer, name in names.items():
                i, j = where.to(seen[name].device).unbind(1)
                taken[layer].append(seen[name][i, j].cpu())
            bar.update(len(where))
            if len(labels) == n:
                break
    if not labels:
        raise ValueError("no position of the text can be an example: all pads, or rows shorter than a label")
    return Examples({layer: torch.cat(x) for layer, x in taken.items()}, labels)


def _of_sources(asked: Asked, seed: int) -> Examples:
    """The vectors of the sources, in a random order, so that any may be held out."""
    whole = Source(asked.source) if isinstance(asked.source, Tensor) else asked.source
    sources = [source if source.has_layers else _at_each_layer(source, n_layers(asked.model)) for source in sources_of(whole)]
    ready = ready_sources(asked.model, sources, asked.layers, prepend_bos=asked.prepend_bos)
    labels = [_ids(asked.to, label) for label in several("labels", asked.labels, "texts or token ids")]
    if len(labels) != len(ready):
        raise ValueError(f"{len(ready)} sources need as many labels, got {len(labels)}")
    with torch.no_grad():
        by_source, _ = read_vectors(asked.model, ready, asked.layers, asked.hooks)
    for source, vectors in zip(ready, by_source, strict=True):
        if any(len(v) != 1 for v in vectors.values()):
            raise ValueError(f"the source {source.label!r} has several positions, and a label is of one vector")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    vectors = {layer: torch.cat([by_source[i][layer] for i in order]).cpu() for layer in dict.fromkeys(asked.layers)}
    return Examples(vectors, [labels[i] for i in order])


def _at_each_layer(source: Source, depth: int) -> Source:
    vectors: Tensor = source.prompt  # type: ignore[assignment]
    return Source(vectors.reshape(-1, 1, vectors.shape[-1]).expand(-1, depth + 1, -1), source.pos)


def _ids(model: LensModel, label: Any) -> list[int]:
    if isinstance(label, str):
        ids = encode(tokenizer_of(model), [label])[0]
    else:
        most = int(model.cfg.d_vocab) - 1
        ids = [whole_number("an id", i, least=0, most=most) for i in several("a label", label, "ids, or a text")]
    if not ids:
        raise ValueError(f"the label {label!r} has no token")
    return ids

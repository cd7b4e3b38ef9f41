"""One vector from a source prompt, put into a target prompt, which then goes on: (S, i, M, l) -> (T, i*, f, M*, l*)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses import edits
from tl_lenses.data import Batch
from tl_lenses.hooks import Hook, generate, patch, run
from tl_lenses.hooks import read as read_hook
from tl_lenses.model import LensModel, check_model, d_model, n_layers, prepare, tokenizer_of
from tl_lenses.patchscopes.result import Pair, PatchscopeResult, top_of
from tl_lenses.progress import progress
from tl_lenses.sites import At, LayerOrSite, Position, positions, resolve_layer, site
from tl_lenses.token_text import token_text
from tl_lenses.translators import Translators

KEEP_BYTES = 256 * 10**6


@dataclass(frozen=True)
class Source:
    """Where a vector comes from: text, token ids, or vectors.

    Args:
        prompt: text (BOS is prepended), token ids `[pos]`, or vectors: `[d_model]` and `[n, d_model]` have no layer,
            `[n, n_layers + 1, d_model]`
            are indexed by layer.
        pos: int, substring, `tll.at(...)` or slice; -1 is the last token. A list is a span for as many target
            positions.

    Example:
        >>> Source("Diana, Princess of Wales", pos="Wales")
        Source(prompt='Diana, Princess of Wales', pos='Wales')
    """

    prompt: str | Tensor | Sequence[int]
    pos: Position = -1


@dataclass(frozen=True)
class Target:
    """The prompt that interprets a vector, and the position that receives it."""

    prompt: str | Tensor | Sequence[int]
    pos: Position = -1


@torch.no_grad()
def patchscope(
    model: LensModel,
    source: Source | Sequence[Source],
    target: Target,
    layers: Iterable[LayerOrSite] | None = None,
    target_layers: Iterable[LayerOrSite] | None = None,
    pairs: Iterable[tuple[LayerOrSite | None, LayerOrSite]] | None = None,
    map: Callable[[Tensor], Tensor] | Translators | None = None,
    mode: Literal["replace", "add"] = "replace",
    to: LensModel | None = None,
    read: int | str | At = -1,
    max_new_tokens: int = 0,
    when: Literal["prompt", "every_step"] = "prompt",
    do_sample: bool = False,
    seed: int = 0,
    stop: Sequence[str] = (),
    batch_size: int | None = None,
    keep: Literal["auto", "logits", "top_k"] = "auto",
    *,
    source_hooks: Iterable[Hook] = (),
    target_hooks: Iterable[Hook] = (),
    prepend_bos: bool = True,
    show_progress: bool | None = None,
) -> PatchscopeResult:
    """Put `f(h)` of a source run into a target run at (l*, i*) and see what it says next: `hbar[i*, l*] <- f(h[i, l])`.

    Args:
        model: runs the source (and the target, unless `to`).
        source: one `Source` or several (the source axis of the result).
        layers: source layers, `0..n_layers` by default.
        target_layers: None patches each layer into the same layer; a list, every l into every l*.
        pairs: exactly these `(l, l*)` instead; l is None for vectors without a layer.
        map: f, a function of vectors `[k, d]`: an `Affine`, or `Translators` whose row (l, l*) is used.
        mode: "replace" the target's vector, or "add" to it.
        to: another model for the target (with a `map` where the widths differ).
        read: position of the target whose next-token distribution is read.
        max_new_tokens: continue the target by this many tokens, greedily unless `do_sample`.
        when: "prompt" patches the prompt's pass only; "every_step" generated positions as well.
        stop: strings that end a text (they are cut off).
        batch_size: cells per forward pass, 32 by default.
        keep: "auto" keeps logits up to 256 MB and the top 10 tokens beyond.
        source_hooks, target_hooks: your interventions on either run; they run before ours.
        prepend_bos: for text on either side; ids are never changed.

    Returns:
        `PatchscopeResult` with `pairs`, `logits [source, pair, d_vocab]` at the read position, and
        `text[source][pair]`.

    Raises:
        ValueError: positions that are not there, counts that do not match, widths that differ without a map.

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 3.1.

    Example:
        >>> source, target = tll.Source("Diana, Princess of Wales"), tll.scopes.token_identity()      # doctest: +SKIP
        >>> print(tll.patchscope(model, source, target))      # doctest: +SKIP
    """
    check_model(model, what="a patchscope")
    target_model = model if to is None else to
    check_model(target_model, what="a patchscope")
    if mode not in ("replace", "add"):
        raise ValueError(f"mode must be 'replace' or 'add', got {mode!r}")
    if keep not in ("auto", "logits", "top_k"):
        raise ValueError(f"keep must be 'auto', 'logits' or 'top_k', got {keep!r}")
    sources = [source] if isinstance(source, Source) else list(source)
    if not sources:
        raise ValueError("an empty list of sources has nothing to patch")
    source_hooks, target_hooks = list(source_hooks), list(target_hooks)
    wanted = _pairs(model, target_model, sources, layers, target_layers, pairs)
    vectors: list[dict[Any, Float[Tensor, "k d"]]] = []
    labels: list[str] = []
    for one in sources:
        for label, by_layer in _vectors(model, one, [layer for layer, _ in wanted], source_hooks, prepend_bos):
            labels.append(label)
            vectors.append(by_layer)

    batch = prepare(target_model, _ids(target.prompt), prepend_bos=prepend_bos)
    place = positions(target_model, batch.tokens, target.pos)[0]
    read_at = positions(target_model, batch.tokens, read)[0]
    if len(read_at) != 1:
        raise ValueError(f"read={read!r} selects {len(read_at)} positions, expected one")
    d_vocab = int(target_model.cfg.d_vocab)
    keep_logits = keep == "logits" or (keep == "auto" and 4 * len(labels) * len(wanted) * d_vocab <= KEEP_BYTES)

    cells = [(s, p) for s in range(len(labels)) for p in range(len(wanted))]
    kept: list[Any] = [None] * len(cells)
    top: list[Any] = [None] * len(cells)
    texts: list[list[int]] = [[] for _ in cells]
    # Rows of one pass share the target layer, so one patch serves the whole batch, each row with its own vector.
    cells_at: dict[Any, list[int]] = {}
    for c, (_, p) in enumerate(cells):
        cells_at.setdefault(wanted[p][1], []).append(c)
    groups = [
        (layer, group[i : i + (batch_size or 32)])
        for layer, group in cells_at.items()
        for i in range(0, len(group), batch_size or 32)
    ]
    for layer, group in progress(groups, desc="patchscope", show=show_progress):
        chosen = []
        for c in group:
            s, p = cells[c]
            v = vectors[s][wanted[p][0]]
            v = _mapped(map, v, wanted[p])
            if v.shape[-1] != d_model(target_model):
                raise ValueError(
                    f"a vector of width {v.shape[-1]} does not fit the target model (d_model {d_model(target_model)}): pass map=, an affine map between them"
                )
            if len(v) not in (1, len(place)):
                raise ValueError(
                    f"the source gives {len(v)} positions and the target takes {len(place)}: expected one for all, or as many"
                )
            chosen.append(v.expand(len(place), -1))
        value = torch.stack(chosen)
        edit = edits.replace(value) if mode == "replace" else edits.add(value)
        tokens = batch.tokens.expand(len(group), -1)
        hooks = [*target_hooks, patch(site(target_model, layer), edit, pos=place.tolist(), when=when)]
        logits = run(target_model, tokens, hooks)[:, int(read_at[0])]
        ids, probs = top_of(logits)
        for i, c in enumerate(group):
            kept[c] = logits[i].float().cpu() if keep_logits else None
            top[c] = (ids[i], probs[i])
        if max_new_tokens:
            full = generate(target_model, tokens, hooks, max_new_tokens, do_sample=do_sample, seed=seed)
            for i, c in enumerate(group):
                texts[c] = full[i, tokens.shape[1] :].tolist()

    shape = (len(labels), len(wanted))
    tokenizer = getattr(target_model, "tokenizer", None)
    top_ids = torch.stack([ids for ids, _ in top]).reshape(*shape, -1)
    ids_seen = range(d_vocab) if keep_logits else {int(i) for i in top_ids.unique()}
    return PatchscopeResult(
        sources=labels,
        pairs=wanted,
        top_ids=top_ids,
        top_probs=torch.stack([probs for _, probs in top]).reshape(*shape, -1),
        vocab={i: str(i) for i in ids_seen} if tokenizer is None else token_text(tokenizer, ids_seen),
        kept=torch.stack(kept).reshape(*shape, -1) if keep_logits else None,
        text=_texts(target_model, texts, shape, stop) if max_new_tokens else None,
        tokens=_padded(texts).reshape(*shape, -1) if max_new_tokens else None,
        settings={
            "target": target.prompt if isinstance(target.prompt, str) else batch.tokens[0].tolist(), "mode": mode, "when": when,
            "max_new_tokens": max_new_tokens, "do_sample": do_sample, "seed": seed, "stop": list(stop),
        },
    )  # fmt: skip


def _ids(prompt: str | Tensor | Sequence[int]) -> str | Tensor:
    return prompt if isinstance(prompt, (str, Tensor)) else torch.tensor(list(prompt), dtype=torch.long)


def _is_vectors(one: Source) -> bool:
    return isinstance(one.prompt, Tensor) and one.prompt.is_floating_point()


def _pairs(
    model: LensModel, target_model: LensModel, sources: list[Source], layers: Any, target_layers: Any, pairs: Any
) -> list[Pair]:
    """The cells `(l, l*)`, layers resolved."""
    depth, target_depth = n_layers(model), n_layers(target_model)
    bare = {_is_vectors(one) and one.prompt.ndim < 3 for one in sources}  # type: ignore[union-attr]
    if len(bare) > 1:
        raise ValueError("vectors without a layer and sources with layers cannot share a call: their pairs differ")
    resolve = lambda layer, n: resolve_layer(layer, n) if isinstance(layer, int) else layer
    if pairs is not None:
        if layers is not None or target_layers is not None:
            raise ValueError("give either pairs, or layers and target_layers")
        found = [(None if a is None else resolve(a, depth), resolve(b, target_depth)) for a, b in pairs]
        if any((a is None) != (True in bare) for a, _ in found):
            raise ValueError("the source layer of a pair is None for vectors without a layer, and only for those")
    elif True in bare:
        if layers is not None:
            raise ValueError(
                "vectors [n, d_model] have no layer: give target_layers, or vectors [n, n_layers + 1, d_model]"
            )
        found = [
            (None, resolve(b, target_depth))
            for b in (range(target_depth + 1) if target_layers is None else target_layers)
        ]
    else:
        rows = [resolve(a, depth) for a in (range(depth + 1) if layers is None else layers)]
        if target_layers is None:
            found = [(a, resolve(a, target_depth)) for a in rows]
        else:
            found = [(a, resolve(b, target_depth)) for a in rows for b in target_layers]
    if not found:
        raise ValueError("no pair of layers to patch: layers, target_layers or pairs is empty")
    for a, b in found:
        if a is not None:
            site(model, a)
        site(target_model, b)
    return found


def _vectors(
    model: LensModel, one: Source, layers: list[Any], hooks: list[Hook], prepend_bos: bool
) -> list[tuple[str, dict[Any, Tensor]]]:
    """Per source on the source axis: a label and `{layer: [k, d]}`."""
    if _is_vectors(one):
        vectors: Tensor = one.prompt  # type: ignore[assignment]
        if vectors.ndim == 3:
            if vectors.shape[1] != n_layers(model) + 1:
                raise ValueError(
                    f"vectors [n, n_layers + 1, d_model] need {n_layers(model) + 1} layers, got {list(vectors.shape)}"
                )
            return [
                (f"vector {i}", {layer: v[layer][None] for layer in dict.fromkeys(layers)})
                for i, v in enumerate(vectors)
            ]
        if vectors.ndim not in (1, 2):
            raise ValueError(
                f"expected vectors [d_model], [n, d_model] or [n, n_layers + 1, d_model], got {list(vectors.shape)}"
            )
        rows = vectors[None] if vectors.ndim == 1 else vectors
        return [(f"vector {i}", {None: v[None]}) for i, v in enumerate(rows)]
    batch = prepare(model, _ids(one.prompt), prepend_bos=prepend_bos)  # type: ignore[arg-type]
    if len(batch.tokens) != 1:
        raise ValueError("a Source is one prompt: pass a list of Sources for several")
    place = positions(model, batch.tokens, one.pos)
    seen: dict[Any, Tensor] = {}
    reads = [
        read_hook(site(model, layer), seen, key=layer, pos=place, fn=lambda x: x.flatten(2)[0])
        for layer in dict.fromkeys(layers)
    ]
    run(model, batch.tokens, [*hooks, *reads])
    label = one.prompt if isinstance(one.prompt, str) else _decode(model, batch)
    return [(label, seen)]


def _decode(model: LensModel, batch: Batch) -> str:
    tokenizer = getattr(model, "tokenizer", None)
    return str(batch.tokens[0].tolist()) if tokenizer is None else tokenizer.decode(batch.tokens[0].tolist())


def _mapped(map: Any, v: Tensor, pair: Pair) -> Tensor:
    if map is None:
        return v
    if isinstance(map, Translators):
        layer, target_layer = pair
        if layer is None:
            raise ValueError(
                "vectors without a layer have no row in Translators: pass one map, as translators[l, l_target]"
            )
        return map[layer, target_layer](v)
    return map(v)


def _texts(model: LensModel, cells: list[list[int]], shape: tuple[int, int], stop: Sequence[str]) -> list[list[str]]:
    tokenizer = tokenizer_of(model)
    eos = tokenizer.eos_token_id
    texts = []
    for ids in cells:
        ids = ids[: ids.index(eos)] if eos in ids else ids
        text = tokenizer.decode(ids)
        ends = [text.find(s) for s in stop if s in text]
        texts.append(text[: min(ends)] if ends else text)
    return [texts[s * shape[1] : (s + 1) * shape[1]] for s in range(shape[0])]


def _padded(cells: list[list[int]]) -> Tensor:
    """Generated ids as one tensor; -1 after the end of a batch that stopped early."""
    width = max(len(ids) for ids in cells)
    return torch.tensor([ids + [-1] * (width - len(ids)) for ids in cells], dtype=torch.long)

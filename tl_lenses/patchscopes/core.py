"""One vector from a source prompt, put into a target prompt, which then goes on: (S, i, M, l) -> (T, i*, f, M*, l*)."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tl_lenses.hooks import Hook, checked_hooks
from tl_lenses.model import Decoder, LensModel, check_model, n_layers, tokenizer_of
from tl_lenses.patchscopes.cells import (
    Norm,
    all_pairs,
    cell,
    check_device,
    check_map,
    check_widths,
    combiner,
    mean_norms,
    routes,
)
from tl_lenses.patchscopes.planner import (
    Decoding,
    Prompt,
    batches,
    prefix,
    rows_per_batch,
    run_cells,
    why_not_shared,
)
from tl_lenses.patchscopes.result import Layers, PatchscopeResult, top_of
from tl_lenses.patchscopes.sources import Source, collect_along
from tl_lenses.patchscopes.targets import Target, ready_target, same_place
from tl_lenses.progress import progress
from tl_lenses.sites import At, sites
from tl_lenses.token_text import token_text
from tl_lenses.translators import Translators

KEEP_BYTES = 256 * 10**6


@torch.no_grad()
def patchscope(
    model: LensModel,
    source: Source | str | Sequence[Source | str],
    target: Target | Sequence[Target] | None = None,
    layers: Iterable[Layers] | None = None,
    target_layers: Iterable[Layers] | None = None,
    pairs: Iterable[tuple[Layers | None, Layers]] | None = None,
    map: Callable[[Tensor], Tensor] | Translators | None = None,
    mode: Literal["replace", "add", "interpolate", "norm_add"] = "replace",
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
    norm: Norm = None,
    scale: float | Sequence[float] = 1.0,
    alpha: float = 0.5,
    isolate: bool = False,
    ensemble: Literal["mean", "intersect"] = "mean",
    ensemble_k: int = 1000,
    temperature: float = 1.0,
    source_hooks: Iterable[Hook] = (),
    target_hooks: Iterable[Hook] = (),
    prepend_bos: bool = True,
    share: bool = True,
    show_progress: bool | None = None,
) -> PatchscopeResult:
    """Put `f(h)` of a source run into a target run at (l*, i*) and see what it says next: `hbar[i*, l*] <- f(h[i, l])`.

    A sweep repeats nothing that the patch cannot change: one source pass for all layers, one pass over the target before
    the first patched position, and then only what follows it, many cells in a batch.

    Args:
        model: runs the source (and the target, unless `to`).
        source: one `Source` or several (the source axis of the result); text alone means its last token.
        target: one `Target`; several, whose distributions are combined (`ensemble`); or None for the source's own
            prompt at the source's own place (found by characters where `to` has another tokenizer).
        layers: source layers, `0..n_layers` by default. Wherever a layer is accepted a tuple is too: several at once.
        target_layers: None patches each layer into the same layer; a list, every l into every l*.
        pairs: exactly these `(l, l*)` instead; l is None for vectors without a layer. `(l, (a, b))` puts the vector
            into both layers, `((a, b), (c, d))` a into c and b into d in one run.
        map: f, a function of vectors `[k, d]`: an `Affine`, or `Translators` whose row (l, l*) is used.
        mode: "replace" the target's vector h, "add" to it, "interpolate" `(1 - alpha) h + alpha v`, or "norm_add"
            `h + |h| v / |v|`.
        to: another model for the target (with a `map` where the widths differ). Vectors move to its device.
        read: position of the target whose next-token distribution is read.
        max_new_tokens: continue the target by this many tokens, greedily unless `do_sample`.
        when: "prompt" patches the prompt's pass only; "every_step" generated positions as well.
        do_sample: draw from `softmax(logits / temperature)`, with a number per cell and step from `seed`.
        stop: strings that end a text (they are cut off).
        batch_size: cells per forward pass; None takes what fits in half a gigabyte.
        keep: "auto" keeps logits up to 256 MB and the top 10 tokens beyond.
        norm: None keeps the vector's length; "replaced" gives it that of the vector it meets; "mean" the mean length of
            the target prompt's own residuals at that layer (BOS left out); a number, or a tensor `[n_layers + 1]`, those.
        scale: a factor on the vector, after `norm`; several make a sweep, which multiplies the source axis.
        alpha: of "interpolate".
        isolate: hide the keys and values that the placeholder has below the patch from later positions.
        ensemble: of several targets: "mean" averages the probabilities, "intersect" also drops tokens that are not in
            the top `ensemble_k` of every target.
        source_hooks, target_hooks: your interventions on either run; they run before ours. With `target_hooks` whole
            prompts run.
        prepend_bos: for text on either side; ids are never changed.
        share: False runs one cell at a time, whole prompts, without a cache: slow, for comparison.

    Returns:
        `PatchscopeResult` with `pairs`, `logits [source, pair, d_vocab]` at the read position, and
        `text[source][pair]`.

    Raises:
        ValueError: positions that are not there, counts that do not match, widths that differ without a map, a map of
            other models or layers, vectors that are not finite, stop strings that can never match.

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 3.1; norm_add: Karvonen et al. 2025 (Activation Oracles).

    Example:
        >>> source, target = tll.Source("Diana, Princess of Wales"), tll.scopes.token_identity()      # doctest: +SKIP
        >>> print(tll.patchscope(model, source, target))      # doctest: +SKIP
    """
    check_model(model, what="a patchscope")
    target_model = model if to is None else to
    if target_model is not model:
        check_model(target_model, what="a patchscope")
    _check_choices(mode=mode, keep=keep, when=when, ensemble=ensemble)
    _check_numbers(
        norm, alpha, n_layers(target_model),
        max_new_tokens=(max_new_tokens, 0), batch_size=(1 if batch_size is None else batch_size, 1), seed=(seed, None),
        ensemble_k=(ensemble_k, 1),
    )  # fmt: skip
    sources = [Source(one) if isinstance(one, str) else one for one in _listed(source, "source", Source)]
    if not sources:
        raise ValueError("an empty list of sources has nothing to patch")
    source_hooks, target_hooks = checked_hooks(model, source_hooks), checked_hooks(target_model, target_hooks)
    wanted = all_pairs(model, target_model, sources, layers, target_layers, pairs)
    scales = [float(s) for s in _listed(scale)]
    if not scales or not all(math.isfinite(s) for s in scales):
        raise ValueError(f"scale must be a finite number or a list of them, got {scale!r}")
    decoding = _decoding(target_model, max_new_tokens, do_sample, temperature, seed, stop)
    if isinstance(map, Translators):
        check_map(map, model, target_model, wanted)
    elif map is None:
        check_widths(model, target_model, sources, wanted)
    elif not callable(map):
        raise TypeError(f"map must be a function of vectors [k, d], an Affine or Translators, got {type(map).__name__}")
    check_device(map, model, sources)
    fixed = None
    if target is not None:
        fixed = [
            ready_target(target_model, one, read, max_new_tokens, prepend_bos=prepend_bos)
            for one in _listed(target, "target", Target)
        ]
        if not fixed:
            raise ValueError("an empty list of targets has nowhere to put a vector")
        if len(fixed) > 1 and max_new_tokens:
            raise ValueError("texts of several targets cannot be combined: use max_new_tokens=0, or one target a call")
        if when == "every_step" and max(len(prompt.place) for prompt in fixed) > 1:
            raise ValueError("when='every_step' patches one position a step: give a target of one position")
    elif any(one.has_vectors for one in sources):
        raise ValueError("target=None means the source's own prompt, and vectors have none: give a Target")

    # Up to here nothing ran: what can be refused beforehand has been.
    into_layers = list(dict.fromkeys(b for pair in wanted for _, b in routes(*pair)))
    names = sites(target_model, into_layers)
    # The targets' prefixes ride in the sources' pass where they can.
    along = [
        prompt for prompt in fixed or []
        if share and to is None and not source_hooks and prompt.soft is None
        and not why_not_shared(model, prompt, target_hooks)
    ]  # fmt: skip
    vectors, riders = collect_along(
        model, sources, [a for pair in wanted for a, _ in routes(*pair)], source_hooks,
        [prompt.tokens[:, : min(prompt.place)] for prompt in along], prepend_bos=prepend_bos,
    )  # fmt: skip
    prefixes = {id(prompt): decoder for prompt, decoder in zip(along, riders, strict=True)}
    axis = [(one, s) for one in vectors for s in scales]
    targets = [
        same_place(model, target_model, one, read, max_new_tokens) if fixed is None else fixed for one, _ in axis
    ]
    relative = mode == "norm_add" or (isinstance(norm, str) and norm == "replaced")
    combine = combiner("add" if mode == "norm_add" else mode, alpha, relative)

    d_vocab = int(target_model.cfg.d_vocab)
    cells = [(s, p) for s in range(len(axis)) for p in range(len(wanted))]
    keep_logits = keep == "logits" or (keep == "auto" and 4 * len(cells) * d_vocab <= KEEP_BYTES)
    draws = None
    if do_sample:
        shape = (len(cells), max(max_new_tokens, 1))
        draws = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    kept: list[Any] = [None] * len(cells)
    top: list[Any] = [None] * len(cells)
    ids: list[list[int]] = [[] for _ in cells]
    notes: dict[str, None] = {}
    with progress(total=len(cells), desc="patchscope", show=show_progress) as bar:
        for mine in _by_target(cells, targets):
            prompts = targets[cells[mine[0]][0]]
            means = [
                mean_norms(target_model, prompt, into_layers) if isinstance(norm, str) and norm == "mean" else {}
                for prompt in prompts
            ]
            starts, size = _plan(
                target_model, prompts, target_hooks, max_new_tokens, share, batch_size, notes, prefixes
            )
            for part in batches(len(mine), size):
                now = [mine[i] for i in part]
                outs = []
                for prompt, start, mean in zip(prompts, starts, means, strict=True):
                    rows = [
                        cell(
                            target_model,
                            prompt,
                            *axis[cells[c][0]],
                            wanted[cells[c][1]],
                            map,
                            norm,
                            relative,
                            mean,
                            names,
                        )
                        for c in now
                    ]
                    logits, new = run_cells(
                        target_model, prompt, rows, combine, start=start, hooks=target_hooks, when=when,
                        isolate=isolate, decoding=decoding, draws=None if draws is None else draws[now], use_cache=share,
                    )  # fmt: skip
                    outs.append(logits)
                logits = outs[0] if len(outs) == 1 else _combined(outs, ensemble, ensemble_k)
                best, probs = top_of(logits)
                for i, c in enumerate(now):
                    kept[c] = logits[i].float().cpu() if keep_logits else None
                    top[c], ids[c] = (best[i], probs[i]), new[i]
                bar.update(len(now))

    shape = (len(axis), len(wanted))
    tokenizer = getattr(target_model, "tokenizer", None)
    top_ids = torch.stack([best for best, _ in top]).reshape(*shape, -1)
    seen = {int(i) for i in top_ids.unique()}
    return PatchscopeResult(
        sources=[one.label if len(scales) == 1 else f"{one.label} x {s:g}" for one, s in axis],
        pairs=wanted,
        top_ids=top_ids,
        top_probs=torch.stack([probs for _, probs in top]).reshape(*shape, -1),
        vocab={i: str(i) for i in seen} if tokenizer is None else token_text(tokenizer, seen),
        tokenizer=tokenizer,
        kept=torch.stack(kept).reshape(*shape, -1) if keep_logits else None,
        text=_texts(target_model, ids, shape, stop) if max_new_tokens else None,
        tokens=_padded(ids).reshape(*shape, -1) if max_new_tokens else None,
        scales=scales if len(scales) > 1 else None,
        plan="; ".join(notes),
        settings={
            "target": _shown(target, fixed), "mode": mode, "when": when, "norm": norm if isinstance(norm, str) else None,
            "max_new_tokens": max_new_tokens, "do_sample": do_sample, "seed": seed, "stop": list(stop), "isolate": isolate,
        },
    )  # fmt: skip


def _listed(value: Any, what: str = "", kind: type | None = None) -> list[Any]:
    """One thing or several as a list, of the kind that is wanted."""
    found = [value] if isinstance(value, (Source, Target, str, int, float)) else value
    if kind is None:
        return list(found)
    texts = (str, kind) if kind is Source else kind
    if not isinstance(found, (list, tuple)) or not all(isinstance(one, texts) for one in found):
        got = (
            next((one for one in found if not isinstance(one, texts)), found)
            if isinstance(found, (list, tuple))
            else found
        )
        raise TypeError(
            f"{what} must be a {kind.__name__} or a list of them, got {type(got).__name__}: write tll.{kind.__name__}(...)"
        )
    return list(found)


def _check_numbers(norm: Norm, alpha: float, depth: int, **whole: tuple[Any, int | None]) -> None:
    """Refuse numbers that are not finite, not whole or too small.

    Raises:
        ValueError, TypeError: which one, and what it must be.
    """
    for name, (value, least) in whole.items():
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if least is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, got {alpha}")
    if isinstance(norm, str):
        if norm not in ("replaced", "mean"):
            raise ValueError(
                f"norm must be None, 'replaced', 'mean', a number or a tensor [n_layers + 1], got {norm!r}"
            )
    elif norm is not None:
        if isinstance(norm, bool):
            raise TypeError(f"norm must be None, 'replaced', 'mean', a number or a tensor [n_layers + 1], got {norm}")
        lengths = torch.as_tensor(norm, dtype=torch.float64)
        if lengths.ndim and lengths.shape != (depth + 1,):
            raise ValueError(
                f"norm as a tensor has a length per residual layer [{depth + 1}], got {list(lengths.shape)}"
            )
        if not bool((lengths.isfinite() & (lengths > 0)).all()):
            raise ValueError(f"norm must be a positive finite length, got {norm}: None keeps the vector's own")


def _check_choices(**choices: str) -> None:
    """Refuse a word that is not one of those that an argument takes."""
    allowed = {
        "mode": ("replace", "add", "interpolate", "norm_add"), "keep": ("auto", "logits", "top_k"),
        "when": ("prompt", "every_step"), "ensemble": ("mean", "intersect"),
    }  # fmt: skip
    for name, value in choices.items():
        if value not in allowed[name]:
            words = [repr(word) for word in allowed[name]]
            raise ValueError(f"{name} must be {', '.join(words[:-1])} or {words[-1]}, got {value!r}")


def _by_target(cells: list[tuple[int, int]], targets: list[list[Prompt]]) -> list[list[int]]:
    """Indices of the cells that share their target, so that they can share batches."""
    key = lambda prompt: (tuple(prompt.tokens[0].tolist()), prompt.place, prompt.read, id(prompt.soft))
    found: dict[Any, list[int]] = {}
    names: dict[int, Any] = {}
    for c, (s, _) in enumerate(cells):
        name = names.setdefault(s, tuple(key(prompt) for prompt in targets[s]))
        found.setdefault(name, []).append(c)
    return list(found.values())


def _plan(
    model: LensModel, prompts: list[Prompt], hooks: list[Hook], n_new: int, share: bool, batch_size: int | None,
    notes: dict[str, None], prefixes: dict[int, Decoder | None],
) -> tuple[list[Any], int]:  # fmt: skip
    """The shared prefix of every target (or None), and how many cells run together; says in `notes` what was planned."""
    starts, sizes = [], []
    for prompt in prompts:
        reason = "share=False" if not share else why_not_shared(model, prompt, hooks)
        start = None if reason else prefixes.get(id(prompt)) or prefix(model, prompt)
        reason = reason or "the cache of this model cannot be shared"
        first = 0 if start is None else min(prompt.place)
        notes[f"whole prompts ({reason})" if start is None else f"prefix of {first} tokens shared"] = None
        starts.append(start)
        sizes.append(rows_per_batch(model, prompt, first, n_new))
    return starts, 1 if not share else batch_size or min(sizes)


def _decoding(
    model: LensModel, max_new_tokens: int, do_sample: bool, temperature: float, seed: int, stop: Sequence[str]
) -> Decoding:
    """How texts go on.

    Raises:
        ValueError: a temperature that is not positive, a stop string that no text can have.
        TypeError: a stop string that is none.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if isinstance(stop, str):
        raise ValueError(f"stop must be a list of strings, got the string {stop!r}: write [{stop!r}]")
    if stop and not max_new_tokens:
        raise ValueError("stop strings can never match: nothing is generated with max_new_tokens=0")
    if not max_new_tokens:
        return Decoding()
    tokenizer = tokenizer_of(model)
    for text in stop:
        if not isinstance(text, str):
            raise TypeError(f"stop must be a list of strings, got {text!r} in it")
        again = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), clean_up_tokenization_spaces=False)
        if not text or text not in again:
            raise ValueError(
                f"the stop string {text!r} can never match: this tokenizer writes it as {again!r}" if text
                else "an empty stop string would end every text before it starts"
            )  # fmt: skip
    stopped = None if not stop else lambda ids: any(text in tokenizer.decode(ids) for text in stop)
    return Decoding(max_new_tokens, do_sample, temperature, tokenizer.eos_token_id, stopped)


def _combined(outs: list[Tensor], ensemble: str, k: int) -> Tensor:
    """Log of the mean probability over targets; with "intersect" only tokens in the top k of each."""
    logits = torch.stack([out.float().log_softmax(-1) for out in outs]).logsumexp(0) - torch.tensor(len(outs)).log()
    if ensemble == "mean":
        return logits
    k = min(k, logits.shape[-1])
    inside = torch.stack([out >= out.topk(k, dim=-1).values[..., -1:] for out in outs]).all(0)
    return logits.masked_fill(~inside, float("-inf"))


def _shown(target: Any, fixed: list[Prompt] | None) -> Any:
    """The target as the settings of a result record it."""
    if fixed is None:
        return "the source's own prompt"
    shown = [
        one.prompt if isinstance(one.prompt, str) else f"soft prompt of {prompt.tokens.shape[1]} vectors"
        if prompt.soft is not None else prompt.tokens[0].tolist()
        for one, prompt in zip(_listed(target), fixed, strict=True)
    ]  # fmt: skip
    return shown[0] if len(shown) == 1 else shown


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
    """Generated ids as one tensor; -1 after the end of a text that stopped early."""
    width = max(len(ids) for ids in cells)
    return torch.tensor([ids + [-1] * (width - len(ids)) for ids in cells], dtype=torch.long)

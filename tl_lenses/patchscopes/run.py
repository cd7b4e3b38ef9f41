"""One vector from a source prompt, put into a target prompt, which is then continued: (S, i, M, l) -> (T, i*, f, M*, l*)."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from tl_lenses.decoding import Decoder
from tl_lenses.hooks import Hook
from tl_lenses.model import LensModel
from tl_lenses.patchscopes.continuation import Continuation
from tl_lenses.patchscopes.filling import Filling, Norm
from tl_lenses.patchscopes.parts import Said, answers
from tl_lenses.patchscopes.planner import TargetRun, VectorsBySite, batches, prefix, rows_per_batch, run_cells, why_not_shared
from tl_lenses.patchscopes.request import Ensemble, Options, Request, checked_models
from tl_lenses.patchscopes.result import Layers, Pair, PatchscopeResult, Samples, mode_of
from tl_lenses.patchscopes.sources import Source, Tokens, VectorsByLayer, read_vectors
from tl_lenses.patchscopes.targets import Prompt, Target
from tl_lenses.progress import progress
from tl_lenses.sites import At, sites
from tl_lenses.token_text import token_text
from tl_lenses.translators import Translators

KEEP_BYTES = 100 * 10**6

Cell = tuple[int, float, Any]  # the number of a source, the scale of its vector, a pair of layers
Insertion = Callable[[int, float, Any], VectorsBySite]


@torch.no_grad()
def patchscope(
    model: LensModel,
    source: Source | Tokens | Sequence[Source | str],
    target: Target | Sequence[Target] | None = None,
    layers: Iterable[Layers] | None = None,
    target_layers: Iterable[Layers] | None = None,
    *,
    pairs: Iterable[tuple[Layers | None, Layers]] | None = None,
    map: Callable[[Tensor], Tensor] | Translators | None = None,
    mode: Literal["replace", "add", "interpolate", "norm_add"] = "replace",
    to: LensModel | None = None,
    read: int | str | At = -1,
    max_new_tokens: int = 0,
    when: Literal["prompt", "every_step"] = "prompt",
    do_sample: bool = False,
    n_samples: int | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    batch_size: int | None = None,
    keep: Literal["auto", "logits", "top_k"] = "auto",
    norm: Norm | None = None,
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
    """Put `f(h)` of a source run into a target run at (l*, i*) and read its next tokens: `hbar[i*, l*] <- f(h[i, l])`.

    A sweep repeats nothing that the patch cannot change: one source pass for all layers, one pass over the target before
    the first patched position, and then only the rest of the target, many cells in a batch.

    Args:
        model: runs the source (and the target, unless `to`).
        source: one `Source` or several (the source axis of the result); text, ids or chat messages alone mean their last
            token.
        target: one `Target`; several, whose distributions are combined (`ensemble`); or None for the source's own
            prompt at the source's own place (found by characters where `to` has another tokenizer).
        layers: source layers, `0..n_layers` by default. Wherever a layer is accepted a tuple is too: several at once.
        target_layers: None patches each layer into the same layer; a list, every l into every l*.
        pairs: exactly these `(l, l*)` instead; l is None for vectors without a layer. `(l, (a, b))` puts the vector
            into both layers, `((a, b), (c, d))` a into c and b into d in one run.
        map: f, a function of vectors `[k, d]` such as an `Affine`, or `Translators` whose row (l, l*) is used.
        mode: "replace" the target's vector h, "add" to it, "interpolate" `(1 - alpha) h + alpha v`, or "norm_add"
            `h + |h| v / |v|`.
        to: another model for the target (with a `map` where the widths differ). Vectors move to its device.
        read: position of the target whose next-token distribution is read.
        max_new_tokens: continue the target by this many tokens, greedily unless `do_sample`.
        when: "prompt" patches the prompt's pass only; "every_step" generated positions as well.
        do_sample: draw from `softmax(logits / temperature)`, temperature > 0, with a number per cell and step from `seed`.
        n_samples: texts per cell (and target, of several: an ensemble of prompts), which share the pass over the prompt; above 1
            with `do_sample`. They are `result.samples[source][pair]`, and `result.text` is the most frequent one.
        stop: strings that end a text (they are cut off).
        batch_size: cells per forward pass, at least 1; None takes as many as fit in half a gigabyte.
        keep: "auto" keeps logits up to 100 MB and the top 10 tokens beyond.
        norm: the vector's length. None keeps it; "replaced" takes that of the vector it meets, which is typical for late
            layers into early ones; "mean" the mean length of the target prompt's own residuals at that layer, without
            BOS; or a positive number, or a tensor `[n_layers + 1]` with one per layer.
        scale: a finite factor on the vector, after `norm`. A list of factors is a sweep: it multiplies the source axis.
        alpha: of "interpolate", any finite number: 0 changes nothing, 1 replaces.
        isolate: hide the keys and values that the placeholder has below the patch from later positions.
        ensemble: how several targets are combined: "mean" averages the probabilities, "intersect" also drops tokens
            that are not in the top `ensemble_k` (at least 1) of every target.
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
    target_model = checked_models(model, to)
    request = Request.of(
        model, source, target, (layers, target_layers, pairs), scale,
        filling=Filling.of(target_model, map, mode, norm, alpha),
        continuation=Continuation.of(target_model, max_new_tokens, do_sample, temperature, seed, stop, 1 if n_samples is None else n_samples),
        ensemble=Ensemble.of(ensemble, ensemble_k),
        options=Options.of(
            model, target_model, source_hooks, target_hooks, read=read, when=when, isolate=isolate,
            prepend_bos=prepend_bos, batch_size=batch_size, keep=keep, share=share, samples=n_samples is not None,
        ),
    )  # fmt: skip
    return run(request, show_progress=show_progress)


def run(request: Request, *, show_progress: bool | None = None) -> PatchscopeResult:
    """Read the sources, run every cell, and pack the answers.

    A cell is a source with a scale and a pair of layers. Cells that share their target run in batches.
    """
    vectors, prefixes = sources_read(request)
    axis = [(source, scale) for source in range(len(vectors)) for scale in request.scales]
    cells = [(source, scale, pair) for source, scale in axis for pair in request.pairs]
    d_vocab, continuation, keep = int(request.to.cfg.d_vocab), request.continuation, request.options.keep
    kept = keep == "logits" or keep == "auto" and 4 * len(cells) * d_vocab <= KEEP_BYTES
    logits: Tensor | None = None
    draws = continuation.draws(len(cells), len(request.targets[0]))
    ids_of_blank = [[0] * continuation.max_new_tokens] * continuation.n_samples * len(request.targets[0])
    top: dict[int, tuple[Tensor, Tensor]] = {}
    ids: dict[int, list[list[int]]] = {}
    notes: dict[str, None] = {}
    with progress(total=len(cells), desc="patchscope", show=show_progress) as bar:
        for prompts, members in by_target(request, cells):
            runs, size = planned(request, prompts, prefixes, notes)
            inserted = [insertion(request, vectors, prompt) for prompt in prompts]
            asked = [(prompt.tokens.tolist(), prompt.place, prompt.read) for prompt in prompts]
            for part in batches(len(members), size):
                numbers = [members[i] for i in part]
                some = [cells[number] for number in numbers]
                said = answers(
                    (asked, some, continuation.max_new_tokens, continuation.n_samples),
                    partial(_said, request, runs, inserted, some, None if draws is None else draws[numbers], kept),
                    partial(_blank, len(numbers), d_vocab, ids_of_blank, kept),
                )
                for row, number in enumerate(numbers):
                    top[number], ids[number] = (said.top_ids[row], said.top_probs[row]), said.ids[row]
                if said.logits is not None:
                    logits = torch.empty(len(cells), said.logits.shape[-1]) if logits is None else logits
                    logits[numbers] = said.logits.to(logits)  # fp32, of a model in half precision too
                bar.update(len(numbers))
    in_order = range(len(cells))
    return _result(request, axis, logits, [top[i] for i in in_order], [ids[i] for i in in_order], list(notes))


def _said(
    request: Request, runs: Sequence[TargetRun], inserted: Sequence[Insertion], cells: Sequence[Cell], draws: Tensor | None,
    keep_logits: bool,
) -> Said:  # fmt: skip
    """The answers of a batch of cells, all of its targets combined."""
    logits, texts, n = [], [[] for _ in cells], request.continuation.n_samples
    for t, (target, vectors_of) in enumerate(zip(runs, inserted, strict=True)):
        rows = [vectors_of(*cell) for cell in cells]
        x, ids = run_cells(target, rows, None if draws is None else draws[:, t].flatten(0, 1))
        logits.append(x)
        for i, text in enumerate(texts):
            text += ids[i * n : (i + 1) * n]
    return Said.of(request.ensemble.combined(logits), texts, keep_logits)


def _blank(n_cells: int, d_vocab: int, ids: list[list[int]], keep_logits: bool) -> Said:
    """Stands for cells that another process runs."""
    return Said.of(torch.zeros(n_cells, d_vocab), [ids] * n_cells, keep_logits)


def sources_read(request: Request) -> tuple[list[VectorsByLayer], dict[int, Decoder | None]]:
    """The vectors of every source, and prefixes of targets that ran in the same pass, by the prompt's `id`."""
    options, shared = request.options, []
    if options.share and request.to is request.model and not options.source_hooks and not request.own_prompt:
        runs_whole = lambda prompt: prompt.soft is not None or why_not_shared(request.model, prompt, options.target_hooks)
        shared = [prompt for prompt in request.targets[0] if not runs_whole(prompt)]
    beginnings = [prompt.tokens[:, : min(prompt.place)] for prompt in shared]
    hooks, layers = options.source_hooks, request.source_layers
    vectors, decoders = read_vectors(request.model, request.sources, layers, hooks, beginnings)
    return vectors, {id(prompt): decoder for prompt, decoder in zip(shared, decoders, strict=True)}


def by_target(request: Request, cells: Sequence[Cell]) -> list[tuple[list[Prompt], list[int]]]:
    """The numbers of the cells that share their target, so that they can share batches."""
    key = lambda prompt: (tuple(prompt.tokens[0].tolist()), prompt.place, prompt.read, id(prompt.soft))
    keys = [tuple(key(prompt) for prompt in prompts) for prompts in request.targets]
    groups: dict[object, tuple[list[Prompt], list[int]]] = {}
    for number, (source, _, _) in enumerate(cells):
        groups.setdefault(keys[source], (request.targets[source], []))[1].append(number)
    return list(groups.values())


def planned(
    request: Request, prompts: Sequence[Prompt], prefixes: dict[int, Decoder | None], notes: dict[str, None]
) -> tuple[list[TargetRun], int]:
    """How each target runs, and how many cells run together. Adds to `notes` what is shared, or why nothing is."""
    runs, options = [], request.options
    for prompt in prompts:
        reason = why_not_shared(request.to, prompt, options.target_hooks) if options.share else "share=False"
        start = None if reason else prefixes.get(id(prompt)) or prefix(request.to, prompt)
        reason = reason or "the cache of this model cannot be shared"
        notes[f"whole prompts ({reason})" if start is None else f"prefix of {min(prompt.place)} tokens shared"] = None
        target = TargetRun(
            request.to, prompt, request.filling.combine, request.continuation, start, options.target_hooks, options.when,
            options.isolate, options.share,
        )  # fmt: skip
        runs.append(target)
    if not options.share:
        return runs, 1
    return runs, options.batch_size or min(rows_per_batch(target) for target in runs)


def insertion(request: Request, vectors: Sequence[VectorsByLayer], prompt: Prompt) -> Insertion:
    """The function that gives the vectors that a cell puts into a prompt, one per placeholder."""
    layers, n_places = request.target_layers, len(prompt.place)
    means, names = request.filling.mean_norms(prompt, layers), sites(request.to, layers)

    def inserted(source: int, scale: float, pair: Pair) -> VectorsBySite:
        filled = request.filling.vectors(request.sources[source].label, vectors[source], pair, n_places, means)
        return {names[layer]: (v * scale).expand(n_places, -1) for layer, v in filled.items()}

    return inserted


def _result(
    request: Request, axis: Sequence[tuple[int, float]], logits: Tensor | None, top: Sequence[tuple[Tensor, Tensor]],
    ids: Sequence[list[list[int]]], notes: Sequence[str],
) -> PatchscopeResult:  # fmt: skip
    """The answers of all cells, in their order."""
    shape = (len(axis), len(request.pairs))
    top_ids, top_probs = (torch.stack(x).reshape(*shape, -1) for x in zip(*top, strict=True))
    tokenizer, seen = getattr(request.to, "tokenizer", None), {int(i) for i in top_ids.unique()}
    labels = [(request.sources[source].label, scale) for source, scale in axis]
    by_source = lambda x: [x[i : i + shape[1]] for i in range(0, len(x), shape[1])]
    samples = text = tokens = None
    if request.continuation.max_new_tokens:
        texts = [[request.continuation.text(sample) for sample in cell] for cell in ids]
        modes = [mode_of(cell) for cell in texts]
        tokens = _padded([cell[mode] for cell, mode in zip(ids, modes, strict=True)]).reshape(*shape, -1)
        text = by_source([cell[mode] for cell, mode in zip(texts, modes, strict=True)])
        if request.options.samples:
            drawn = _padded([sample for cell in ids for sample in cell])
            samples = Samples(by_source(texts), drawn.reshape(*shape, len(ids[0]), -1))
    return PatchscopeResult(
        sources=[label if len(request.scales) == 1 else f"{label} x {scale:g}" for label, scale in labels],
        pairs=request.pairs, top_ids=top_ids, top_probs=top_probs,
        vocab={i: str(i) for i in seen} if tokenizer is None else token_text(tokenizer, seen), tokenizer=tokenizer,
        kept_logits=None if logits is None else logits.reshape(*shape, -1), text=text, tokens=tokens, drawn=samples,
        scales=request.scales if len(request.scales) > 1 else None, plan="; ".join(notes), settings=request.settings(),
        request=request,
    )  # fmt: skip


def _padded(ids: Sequence[list[int]]) -> Tensor:
    """Ids as rows, -1 after the end of each: a text may have stopped early."""
    width = max(map(len, ids))
    return torch.tensor([row + [-1] * (width - len(row)) for row in ids], dtype=torch.long)

"""The tuned lens: translators that minimise KL(model || lens), all layers in the same pass over a frozen model."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from tl_lenses.checks import one_of
from tl_lenses.files import Notice
from tl_lenses.fit.common import Log, logger, record, row_groups, rows_for
from tl_lenses.fit.settings import Settings
from tl_lenses.fit.state import Checkpoint, alone, note_of, state_file
from tl_lenses.fit.stop import split_held_out
from tl_lenses.fit.team import processes
from tl_lenses.fit.training import Task, Training
from tl_lenses.hooks import Hook, checked_hooks
from tl_lenses.layers import LayerOrSite
from tl_lenses.model import LensModel, check_model, d_model, n_layers
from tl_lenses.text.batches import Text
from tl_lenses.translators import Row, Translators, base


@torch.inference_mode(False)  # so that a fit inside inference_mode has gradients
def fit_tuned(
    model: LensModel,
    tokens: Any,
    steps: int | Literal["auto"] = 250,
    tokens_per_step: int | None = None,
    loss: Literal["kl", "ce"] = "kl",
    *,
    init: Literal["regression", "identity"] | Translators = "regression",
    optimizer: Literal["muon", "sgd", "adam"] = "muon",
    lr: float | None = None,
    weight_decay: float | None = None,
    token_shift: int | None = None,
    bias_only: bool = False,
    layers: Iterable[LayerOrSite] | None = None,
    seed: int = 0,
    chunk_size: int | None = None,
    checkpoint: str | Path | None = None,
    log: Log = None,
    hooks: Iterable[Hook] = (),
    skip_first: bool = True,
    momentum: float | None = None,
    clip: float | None = 1.0,
    joint_clip: bool = False,
    lr_power: float | None = None,
    lr_search: bool | None = None,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    subsample: float = 1.0,
    vocabulary: Literal["exact", "sampled", "auto"] = "auto",
    init_tokens: int | None = None,
    held_out: Any = None,
    held_out_every: int = 25,
    patience: int = 4,
    guard: bool = True,
    checkpoint_every: int = 25,
    note: Mapping[str, Any] | None = None,
    layers_at_once: int | None = None,
    offload: bool = False,
    show_progress: bool | None = None,
) -> Translators:
    """Train `x -> x + D x + b` per layer by KL(model || lens), the model frozen.

    Loss and gradient come fused and chunk by chunk (`divergence.fused_kl`), so two full logit tensors never exist. The published
    recipe is `steps=250, tokens_per_step=2**18, init="identity", optimizer="sgd", joint_clip=True, skip_first=False`; its Muon
    successor `init="identity", optimizer="muon", lr=0.01, lr_power=0, joint_clip=True, tokens_per_step=2**18`.

    Args:
        tokens: `[n, seq]`, `token_batches(...)`, an iterable of batches, or the path of stored states (`capture`); read again (in another
            order, from `seed`) when it ends and can be.
        steps: optimiser steps, 0 or more; the rate falls linearly to zero over them. "auto", with `held_out`: the rate stays until the
            held-out loss does, then falls to zero over a quarter as many steps as there were.
        tokens_per_step: batches are added up to about this many tokens; one batch by default.
        loss: "kl" against the model's distribution, or "ce" against the text.
        init: where to start: "regression" fits the closed form on the first tokens of the stream, which are trained on too (no
            second pass over the text), and Muon then steps in coordinates in which their states are more alike in all directions
            (`fit.whiten`); "identity" is the logit lens; pass `Translators` to continue training them.
        optimizer: "muon" (matrices; AdamW for biases), "sgd" (Nesterov), "adam" (AdamW).
        lr, weight_decay, momentum: by optimiser if None, Muon's rate `1 / sqrt(d_model)`; decay pulls to the identity. lr above 0,
            weight_decay at least 0, momentum in [0, 1).
        token_shift: position t is scored against t + shift: 0 for KL, 1 for CE by default.
        bias_only: train b alone.
        layers: layers or sites, `0..n_layers-1` by default.
        chunk_size: positions whose logits, of up to six layers, exist at a time.
        checkpoint: file that keeps the state every `checkpoint_every` steps and when interrupted; an existing one of the same
            settings, model and `note` is resumed.
        note: JSON values that decide the result and that a fit cannot see, such as the name of the text and how it was cut; kept in
            the checkpoint, and compared when it is resumed.
        log: called with (or appended) `{"step", "tokens", "lr", "loss": {layer: nats}}` after each step.
        hooks: interventions under which to fit; the teacher is the same hooked run.
        clip: gradient norm per layer, above 0 (over all layers together with `joint_clip`, as published); None for none.
        precision: of the products with the unembedding: bf16 (accumulated in fp32) where the hardware multiplies it, with "auto".
        subsample: share of the positions, in (0, 1], that each layer is trained on, its own random ones.
        vocabulary: "sampled" scores teacher and layers on the teacher's 8 most likely tokens of every position and 1,024 weighted draws
            (`fit.sampled`): only the teacher has a product with the whole vocabulary. Held-out text is scored exactly. "auto" samples
            32,768 tokens and more, from a regression: far from the model, estimates are low. `meta["sampled"]` says which it was.
        init_tokens: tokens for the regression start; by default `max(128 d_model, 8192)`.
        held_out: text that is not trained on (as `tokens`), or of a tensor `[n, seq]` the share of its last rows. Its loss is taken
            before the first step, every `held_out_every` steps and at the end; each layer's translators of its best look are the
            result; and after `patience` looks without a gain the fit ends.
        guard: without `held_out`, set a sixteenth as many tokens of the text aside as are trained on (256 to 4,096), and compare the end
            with the start on them: a layer ends at the best of its start, the end, and half of the way. In a
            short text the start is then fitted again, with these tokens. `meta["guard"]` says tokens, losses, shares and layers, or why
            there is none: a text of fewer than 2,048 tokens, or one that can be read only once.
        lr_power: a layer's rate is `lr * min(KL, 1 nat) ** lr_power`, of its KL at the first step: the last layers, nearly right from
            the start, need small steps. 0 leaves the KL out; by optimiser if None. Muon's rate is also times the size of the map that
            the layer starts from (`|det W| ** (1 / d)`, at least 1; 1 for the identity).
        lr_search: choose each layer's rate, at most the one above, by its first step: as long, one, a half, a quarter or an eighth
            of it, as is best on the next 512 tokens of the text; and steps of fewer than 1.75 d_model positions are as much shorter. None: where `lr` is None, the optimiser Muon and the loss "kl".
        layers_at_once: layers whose translators are held at a time, each group a pass over the same text with a checkpoint of its
            own (`checkpoint.1of3`); gives the same maps as all at once.
        offload: optimiser state, the start's moments and Muon's coordinates lie on the CPU between uses.

    `meta["tokens_seen"]` counts the tokens that were trained on and the positions that the start was fitted on.

    Processes that were launched together (`accelerate launch`) share the rows of the text; the first one writes the
    checkpoint. Ctrl-C saves. A checkpoint that cannot be written is a `files.Notice` and stops nothing; where the last state of a fit
    that ends early could not be written, its error has the translators as `error.translators`.

    Raises:
        ValueError: unusable settings or tokens; a checkpoint of other settings, text or model; a loss or gradient that is not
            finite (names layer, step and text; the last good state is kept).
        TypeError: a setting of the wrong type.
        Lost: another process of the fit has ended.

    Source: Belrose et al. 2023 (Tuned Lens), section 3 and appendix on training; Muon: the tuned-lens authors' later
    recipe.

    Example:
        >>> text = tll.token_batches("text.txt", model.tokenizer, seq_len=128, batch_size=16)      # doctest: +SKIP
        >>> tll.fit_tuned(model, text).save("my-lens")      # doctest: +SKIP
    """
    check_model(model, what="a fit")
    if not isinstance(init, Translators):
        one_of("init", init, ("regression", "identity"))
    settings = Settings(
        steps=steps, tokens_per_step=tokens_per_step, loss=loss, init=init if isinstance(init, str) else "translators",
        optimizer=optimizer, lr=lr, weight_decay=weight_decay, token_shift=token_shift, bias_only=bias_only, seed=seed,
        skip_first=skip_first, momentum=momentum, clip=clip, joint_clip=joint_clip, offload=offload, precision=precision,
        subsample=subsample, vocabulary=vocabulary, lr_power=lr_power, lr_search=lr_search, held_out=held_out is not None, held_out_every=held_out_every,
        patience=patience, guard=guard, init_tokens=init_tokens, chunk_size=chunk_size, checkpoint_every=checkpoint_every,
        layers_at_once=layers_at_once,
    ).at_width(d_model(model))  # fmt: skip
    text, held_out_text = split_held_out(Text.of(tokens), held_out)
    rows = rows_for(model, layers)
    groups = groups_of_fit(rows, settings, text)
    log = logger(log)
    team, hooks, fits, note = processes(), checked_hooks(model, hooks), [], note_of(note)
    with alone(checkpoint, team):
        for i, group in enumerate(groups):
            state = {**settings.record(), "rows": [list(row) for row in group], "note": note}
            kept = Checkpoint.of(state_file(checkpoint, i, len(groups)), "fit_tuned", state, [model], team)
            task = Task(model, text, group, settings, None if isinstance(init, str) else init, hooks, held_out_text)
            fits.append(_run(Training(task, kept, team, log, show_progress)))
    return _result(model, rows, settings, fits)


def groups_of_fit(rows: list[Row], settings: Settings, text: Text) -> list[list[Row]]:
    """The rows in the groups that are fitted one after the other."""
    groups = row_groups(rows, settings.layers_at_once, text)
    if len(groups) > 1 and settings.joint_clip:
        raise ValueError("joint_clip needs the gradients of all layers at once: leave out layers_at_once")
    if len(groups) > 1 and settings.held_out:
        raise ValueError("held_out stops by the mean over all layers: leave out layers_at_once, or held_out")
    return groups


def _run(training: Training) -> Training:
    """Train to the end; where that fails and the disk does not have the last step, the error has the translators."""
    try:
        return training.run()
    except BaseException as error:
        if training.unsaved:
            maps = _result(training.model, training.rows, training.settings, [training])
            error.translators = maps  # type: ignore[attr-defined]
            message = f"step {training.done} is not on disk: its translators are in the error, as `error.translators`"
            warnings.warn(message, Notice, stacklevel=3)
        raise


def _result(model: LensModel, rows: list[Row], settings: Settings, fits: list[Training]) -> Translators:
    """The translators of all groups, with a record of the fit; its tokens are those trained on and those of the start."""
    known = next(iter(fits[0].checkpoint.identities), None)
    n_read = fits[0].n_tokens + fits[0].n_init
    meta = record(model, "tuned", n_read, {**settings.record(), "init_tokens": fits[0].n_init}, known)
    watches = [fit.watch for fit in fits]
    if len(fits) > 1:
        meta["settings"]["layers_at_once"] = settings.layers_at_once
    meta["sampled"] = fits[0].learner.samples
    if settings.held_out:
        meta["held_out"] = {
            "loss": [x for watch in watches if watch.best is not None for x in watch.best.tolist()],
            "looks": [watch.looks for watch in watches],
        }
    if settings.guards:
        meta["guard"] = _guarded(fits)
    deltas, biases = zip(*(fit.maps for fit in fits), strict=True)
    weights = torch.cat(deltas) + base(*deltas[0].shape[1:])
    return Translators(rows, weights, torch.cat(biases), n_layers=n_layers(model), meta=meta)


def _guarded(fits: list[Training]) -> dict[str, Any]:
    """For the record: the guard's tokens, each layer's loss on them before and after, its share of the way, and the layers that keep their start."""
    guard = fits[0].guard
    if not guard.batches:
        return {"tokens": 0, "why": guard.why_none}
    if any(len(fit.watch.looks) < 2 for fit in fits):
        return {"tokens": guard.n_tokens, "why": "the fit ended early, before its end was compared"}
    start, end = ([loss for fit in fits for loss in fit.watch.looks[i]["loss"]] for i in (0, -1))
    sites = [row[0] for fit in fits for row in fit.rows]
    better = [after < before for before, after in zip(start, end, strict=True)]
    way = [share for fit in fits for share in fit.watch.looks[-1]["share"]]
    return {
        "tokens": guard.n_tokens, "start": start, "end": end, "share": [s if ok else 0.0 for s, ok in zip(way, better, strict=True)],
        "kept_start": [site for site, ok in zip(sites, better, strict=True) if not ok], "start_again": guard.start_again,
    }  # fmt: skip

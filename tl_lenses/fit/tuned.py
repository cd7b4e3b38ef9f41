"""The tuned lens: translators that minimise KL(model || lens), all layers in the same pass over a frozen model."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tl_lenses.data import Batch, Position, as_batches, positions
from tl_lenses.fit.common import NotFinite, record, row_groups, rows_for, shown
from tl_lenses.fit.distributed import Lost, Processes, add_up, agree, gathered, own_rows, processes, same_settings
from tl_lenses.fit.optim import (
    LR,
    LR_POWER,
    MOMENTUM,
    WEIGHT_DECAY,
    default_lr,
    map_sizes,
    move_state,
    optimizer_step,
    optimizers_of,
    rate_scales,
    set_scales,
)
from tl_lenses.fit.shard import in_step, in_turn
from tl_lenses.fit.start import default_tokens, first_batches, regression_start
from tl_lenses.fit.state import guilty_text, keep, random_state, resume, set_random_state, state_file, unbroken
from tl_lenses.fit.step import (
    clip_gradients,
    head_of,
    loss_and_gradient,
    most_passes,
    pieces,
    scored_pairs,
    summed_losses,
)
from tl_lenses.fit.stop import Watch, split_held_out
from tl_lenses.fit.whiten import roots, whiten
from tl_lenses.hooks import Hook, check_edits
from tl_lenses.model import LensModel, check_model, d_model, n_layers
from tl_lenses.moments import Moments
from tl_lenses.progress import StepBar
from tl_lenses.sites import LayerOrSite
from tl_lenses.translators import Row, Translators, base
from tl_lenses.unembed import Readout


def fit_tuned(
    model: LensModel,
    tokens: Any,
    steps: int | Literal["auto"] = 250,
    tokens_per_step: int | None = None,
    loss: Literal["kl", "ce"] = "kl",
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
    log: Callable[[dict[str, Any]], None] | list[dict[str, Any]] | None = None,
    *,
    hooks: Iterable[Hook] = (),
    skip_first: bool = True,
    momentum: float | None = None,
    clip: float | None = 1.0,
    joint_clip: bool = False,
    lr_power: float | None = None,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    subsample: float = 1.0,
    init_tokens: int | None = None,
    held_out: Any = None,
    held_out_every: int = 25,
    patience: int = 4,
    checkpoint_every: int = 25,
    layers_at_once: int | None = None,
    offload: bool = False,
    show_progress: bool | None = None,
) -> Translators:
    """Train `x -> x + D x + b` per layer by KL(model || lens), the model frozen.

    Loss and gradient come fused and chunk by chunk (`divergence.fused_kl`), so two full logit tensors never exist.
    The published
    recipe is `steps=250, tokens_per_step=2**18, init="identity", optimizer="sgd", joint_clip=True,
    skip_first=False`; its Muon successor
    `init="identity", optimizer="muon", lr=0.01, lr_power=0, joint_clip=True, tokens_per_step=2**18`.

    Args:
        tokens: `[n, seq]`, `token_batches(...)`, or an iterable of batches; gone through again (in another order,
            from `seed`) when it ends
            and can be.
        steps: optimiser steps; the rate falls linearly to zero over them. "auto", with `held_out`: the rate stays until the
            held-out loss does, then falls to zero over a quarter as many steps as there were.
        tokens_per_step: batches are added up to about this many tokens; one batch by default.
        loss: "kl" against the model's distribution, or "ce" against the text.
        init: where to start: "regression" fits the closed form on the first tokens of the stream, which are trained on
            too (no second pass over the text), and Muon then steps in coordinates in which their states are more alike in
            all directions (`fit.whiten`); "identity" is the logit lens; `Translators` are gone on from.
        optimizer: "muon" (matrices; AdamW for biases), "sgd" (Nesterov), "adam" (AdamW).
        lr, weight_decay, momentum: by optimiser if None, Muon's rate `1 / sqrt(d_model)`; decay pulls to the identity.
        token_shift: position t is scored against t + shift: 0 for KL, 1 for CE by default.
        bias_only: train b alone.
        layers: layers or sites, `0..n_layers-1` by default.
        chunk_size: positions whose logits, of up to six layers, exist at a time.
        checkpoint: file that keeps the state every `checkpoint_every` steps and when interrupted; an existing one of
            the same settings is resumed.
        log: called with (or appended) `{"step", "tokens", "lr", "loss": {layer: nats}}` after each step.
        hooks: interventions under which to fit; the teacher is the same hooked run.
        clip: gradient norm per layer (over all layers together with `joint_clip`, as published); None for none.
        precision: of the products with the unembedding: bf16 (accumulated in fp32) where the hardware multiplies it, with "auto".
        subsample: share of the positions that each layer is trained on, its own random ones; 1 is all.
        init_tokens: tokens for the regression start; by default `max(128 d_model, 8192)`.
        held_out: text that is not trained on (as `tokens`), or of a tensor `[n, seq]` the share of its last rows. Its loss is
            taken before the first step, every `held_out_every` steps and at the end; each layer's translators of its best
            look are the result; and after `patience` looks without a gain the fit ends.
        lr_power: a layer's rate is `lr * min(KL, 1 nat) ** lr_power`, of its KL at the first step: the last layers, nearly right
            from the start, want small steps. 0 leaves the KL out; by optimiser if None. Muon's rate is also times the size of
            the map that the layer starts from (`|det W| ** (1 / d)`, at least 1; 1 for the identity).
        layers_at_once: layers whose translators are held at a time, each group a pass over the same text with a
            checkpoint of its own (`checkpoint.1of3`); gives what all at once would.
        offload: optimiser state, the start's moments and Muon's coordinates lie on the CPU between uses.

    Processes that were launched together (`accelerate launch`) share the rows of the text; the first one writes the
    checkpoint. Ctrl-C saves; a checkpoint that cannot be written is a `checkpoint.Notice` and stops nothing.

    Raises:
        ValueError: unusable settings or tokens; a checkpoint of other settings; a loss or gradient that is not finite
            (names layer, step and text; the last good state is kept).
        Lost: another process of the fit has ended.

    Source: Belrose et al. 2023 (Tuned Lens), section 3 and appendix on training; Muon: the tuned-lens authors' later
    recipe.

    Example:
        >>> text = tll.token_batches("text.txt", model.tokenizer, seq_len=128, batch_size=16)      # doctest: +SKIP
        >>> tll.fit_tuned(model, text).save("my-lens")      # doctest: +SKIP
    """
    check_model(model, what="a fit")
    if loss not in ("kl", "ce"):
        raise ValueError(f"loss must be 'kl' or 'ce', got {loss!r}")
    if optimizer not in LR:
        raise ValueError(f"optimizer must be one of {', '.join(map(repr, LR))}, got {optimizer!r}")
    if isinstance(steps, str) and (steps != "auto" or held_out is None):
        raise ValueError(
            f"steps must be a number, or 'auto' with held_out= text to stop by; got {steps!r} and held_out={held_out!r}"
        )
    if isinstance(steps, int) and steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    if held_out_every < 1 or patience < 1:
        raise ValueError(f"held_out_every and patience must be at least 1, got {held_out_every} and {patience}")
    tokens, apart = split_held_out(tokens, held_out)
    if not 0 < subsample <= 1:
        raise ValueError(f"subsample is a share of the positions, above 0 and at most 1, got {subsample}")
    if (
        lr_power is None
    ):  # cross entropy does not fall to zero where a layer is right, so it says nothing about the rate
        lr_power = LR_POWER[optimizer] if loss == "kl" else 0.0
    weight_decay = WEIGHT_DECAY[optimizer] if weight_decay is None else weight_decay
    momentum = MOMENTUM[optimizer] if momentum is None else momentum
    shift = (0 if loss == "kl" else 1) if token_shift is None else token_shift
    rows = rows_for(model, None if layers is None else list(layers))
    groups = row_groups(rows, layers_at_once, tokens)
    lr = default_lr(optimizer, d_model(model)) if lr is None else lr
    if len(groups) > 1 and joint_clip:
        raise ValueError("joint_clip needs the gradients of all layers at once: leave out layers_at_once")
    if len(groups) > 1 and apart is not None:
        raise ValueError("held_out stops by the mean over all layers: leave out layers_at_once, or held_out")
    settings = {
        "steps": steps, "tokens_per_step": tokens_per_step, "loss": loss, "init": init if isinstance(init, str) else "translators",
        "optimizer": optimizer, "lr": lr, "weight_decay": weight_decay, "token_shift": shift, "bias_only": bias_only, "seed": seed,
        "skip_first": skip_first, "momentum": momentum, "clip": clip, "joint_clip": joint_clip, "offload": offload,
        "precision": precision, "subsample": subsample, "lr_power": lr_power,
        "held_out": apart is not None, "held_out_every": held_out_every, "patience": patience,
    }  # fmt: skip
    found = []
    for i, group in enumerate(groups):
        found.append(_train(
            model, as_batches(tokens), tokens, apart, group, settings, init, list(hooks), init_tokens, chunk_size,
            state_file(checkpoint, i, len(groups)), checkpoint_every, log, show_progress, processes(),
        ))  # fmt: skip
    deltas, biases, n_init, n_seen, watches = zip(*found, strict=True)
    meta = record(model, "tuned", n_seen[0], {**settings, "init_tokens": n_init[0]})
    if len(groups) > 1:
        meta["settings"]["layers_at_once"] = layers_at_once
    if apart is not None:
        meta["held_out"] = {
            "loss": [x for watch in watches if watch.best is not None for x in watch.best.tolist()],
            "looks": [w.looks for w in watches],
        }
    full = torch.cat(deltas) + base(*deltas[0].shape[1:])
    return Translators(rows, full, torch.cat(biases), n_layers=n_layers(model), meta=meta)


def _train(
    model: LensModel,
    batches: Iterable[Batch],
    tokens: Any,
    apart: Iterable[Batch] | None,
    rows: list[Row],
    settings: dict[str, Any],
    init: Any,
    hooks: list[Hook],
    init_tokens: int | None,
    chunk_size: int | None,
    checkpoint: Path | None,
    checkpoint_every: int,
    log: Any,
    show_progress: bool | None,
    who: Processes,
) -> tuple[Tensor, Tensor, int, int, Watch]:
    """D and b of some rows on the CPU, tokens that the start took, tokens seen, and the held-out losses."""
    settings = {**settings, "rows": [list(row) for row in rows]}
    same_settings(settings, who)
    optimizer, loss, lr, steps = (settings[key] for key in ("optimizer", "loss", "lr", "steps"))
    skip_first, shift, bias_only, offload = (
        settings[key] for key in ("skip_first", "token_shift", "bias_only", "offload")
    )
    by_muon = optimizer == "muon" and not bias_only
    readout = Readout(model)
    device = readout.device
    state = resume(checkpoint, "fit_tuned", settings, who)
    position = Position.load(state["position"]) if state is not None and state["position"] else None
    stream = positions(tokens if isinstance(tokens, Tensor) else batches, seed=settings["seed"], at=position)
    stream = in_turn(stream, [model], who)
    feed: Iterator[tuple[Batch, Position]] = stream
    check_edits(model, hooks)  # every process makes its passes now, or none
    if state is None:
        weights, biases, found, feed = _start(model, stream, rows, init, init_tokens, hooks, skip_first, offload)
        n_init = 0 if found is None else found.n
        white = roots(found) if by_muon and found is not None else None
        del found
    else:
        weights, biases, n_init = state["delta"], state["biases"], state["init_tokens"]
        white = state["white"]
    if white is not None:
        white = white.to("cpu" if offload else device)
    # D and b, the stacked buffers
    delta, biases = weights.float().to(device).contiguous(), biases.float().to(device).contiguous()

    # One 2-D leaf per layer, each a view of the stacked buffer: Muon orthogonalises matrix by matrix.
    leaves = [nn.Parameter(d) for d in delta]
    bias_leaves = [nn.Parameter(b) for b in biases]
    optimizers = optimizers_of(optimizer, leaves, bias_leaves, settings)
    done = n_seen = n_rows = 0
    watch = Watch(steps if isinstance(steps, int) else None, settings["held_out_every"], settings["patience"])
    if state is not None:
        done, n_seen, n_rows = state["step"], state["tokens"], state["rows_seen"]
        watch = Watch.load(state["watch"])
        for layer, of_layer in zip(optimizers, state["optimizers"], strict=True):
            for opt, saved in zip(layer, of_layer, strict=True):
                opt.load_state_dict(saved)
                if offload:
                    move_state(opt, "cpu")
        set_random_state(state["random"])

    head = head_of(readout, settings["precision"])
    bar = StepBar(watch.steps, done, [_label(row) for row in rows], n_seen, None if who.first else False, show_progress)
    # Gradients of all layers, losses, positions and a flag lie in one buffer: one all-reduce per step.
    flat = torch.zeros(delta.numel() + biases.numel() + len(rows) + 2, device=device)
    grad_w, grad_b, losses, counts = flat.split([delta.numel(), biases.numel(), len(rows), 2])
    grad_w, grad_b = grad_w.view_as(delta), grad_b.view_as(biases)
    whole, on_disk = True, done if state is not None else None

    def save() -> None:
        nonlocal on_disk
        if checkpoint is None or on_disk == done or not (whole and _finite(delta, biases).all()):
            return
        if keep(checkpoint, "fit_tuned", {
            "settings": settings, "step": done, "tokens": n_seen, "rows_seen": n_rows, "init_tokens": n_init,
            "position": None if position is None else position.state(), "random": random_state(), "delta": delta,
            "biases": biases, "optimizers": [[opt.state_dict() for opt in layer] for layer in optimizers],
            "watch": watch.state(), "white": white,
        }, f"at step {done}", who):  # fmt: skip
            on_disk = done

    def add_gradients(batch: Batch, losses: Tensor, grad_w: Tensor, grad_b: Tensor, row: int) -> int:
        """Sums over the positions of a batch, however a step's positions fall into batches and processes; how many."""
        n = 0
        for i, piece in enumerate(pieces(model, batch, hooks)):
            pairs = scored_pairs(model, piece, rows, hooks, skip_first, shift, loss, readout)
            if len(pairs):
                losses += loss_and_gradient(
                    pairs, delta, biases, head, grad_w, grad_b, chunk_size=chunk_size,
                    subsample=settings["subsample"], seed=(settings["seed"] * 1_000_003 + row) * 1009 + i,
                    exact=done == 0,  # they set each layer's rate
                )  # fmt: skip
            n += len(pairs)
            del pairs  # before the next pass
        return n

    def is_finite(batch: Batch) -> bool:
        flat.zero_()
        add_gradients(batch, losses, grad_w, grad_b, 0)
        return bool(losses.isfinite().all() and _finite(grad_w, grad_b).all())

    def look() -> None:
        """The loss on held-out text, in every process the same; where it is due and the fit was not killed behind it."""
        if apart is None or not watch.due(done) or (watch.looks and watch.looks[-1]["step"] == done):
            return
        sums, first, error = torch.zeros(len(rows) + 1, device=device), 0, None
        try:
            for batch in in_turn(apart, [model], who):
                own, _ = own_rows(batch, first, who)
                first += len(batch.tokens)
                with in_step([model], batch, most_passes(model, batch, hooks, who.world), who):
                    for piece in () if own is None else pieces(model, own, hooks):
                        pairs = scored_pairs(model, piece, rows, hooks, skip_first, shift, loss, readout)
                        sums[:-1] += summed_losses(pairs, delta, biases, head, chunk_size=chunk_size)
                        sums[-1] += len(pairs)
        except Lost:
            raise
        except Exception as wrong:
            error = wrong
        agree(error, who)
        add_up(sums, who)
        if sums[-1] == 0:
            raise ValueError("no position to score in held_out: rows of one token with skip_first, or all pads")
        with unbroken():
            watch.look(done, sums[:-1] / sums[-1], delta, biases)

    try:
        look()
        save()
        while not watch.ended(done):
            flat.zero_()
            n_step, taken, here, mine, error = 0, 0, position, [], None
            try:
                while n_step < (settings["tokens_per_step"] or 1):
                    batch, here = next(feed)
                    n_step += batch.tokens.numel()
                    own, _ = own_rows(batch, n_rows + taken, who)
                    taken += len(batch.tokens)
                    mine += [] if own is None else [own]
                    with in_step([model], batch, most_passes(model, batch, hooks, who.world), who):
                        counts[0] += 0 if own is None else add_gradients(own, losses, grad_w, grad_b, n_rows + taken)
            except Lost:
                raise
            except Exception as wrong:  # the other processes would wait for this one
                error = NotFinite(f"{wrong}, at step {done}") if isinstance(wrong, NotFinite) else wrong
                counts[1] += 1
            add_up(flat, who)
            n_used, failed = counts.tolist()
            if failed:
                agree(error, who)
            if n_used == 0:
                raise ValueError(
                    "no position to train on in a whole step: rows of one token with skip_first, or all pads"
                )
            flat[:-2].div_(n_used)
            finite = losses.isfinite() & _finite(grad_w, grad_b)
            if not finite.all():
                found = losses.clone(), finite.clone()
                searched = mine if _finite(delta, biases).all() else []  # with such maps every text is guilty
                with in_step([model], batch, -(-taken // who.world), who):
                    text = guilty_text(searched, is_finite, lambda row: shown(model, row.tokens[0]))
                texts = [text for text in gathered(text, who) if text]
                raise NotFinite(_not_finite(rows, found[1], found[0], done, lr, texts))
            if white is not None:
                whiten(grad_w, white)
            if settings["clip"] is not None:
                clip_gradients(grad_w, grad_b, settings["clip"], settings["joint_clip"], bias_only)
            if done == 0:
                sizes = map_sizes(delta) if by_muon else [1.0] * len(rows)
                scales = rate_scales(losses.tolist(), settings["lr_power"], sizes)
                set_scales(optimizers, scales, sizes, settings["weight_decay"])
            rate = lr * watch.rate(done)
            for i, (leaf, bias) in enumerate(zip(leaves, bias_leaves, strict=True)):
                leaf.grad, bias.grad = grad_w[i], grad_b[i]
            with unbroken():
                whole = False
                optimizer_step(optimizers, rate, device if offload else None, white)
                done, position, n_seen, n_rows = done + 1, here, n_seen + n_step, n_rows + taken
                whole = True
            look()
            values = losses.tolist()
            if log is not None:
                entry = {
                    "step": done,
                    "tokens": n_seen,
                    "lr": rate,
                    "loss": {row[0]: v for row, v in zip(rows, values, strict=True)},
                }
                if watch.looks and watch.looks[-1]["step"] == done:
                    entry["held_out"] = {row[0]: v for row, v in zip(rows, watch.looks[-1]["loss"], strict=True)}
                log.append(entry) if isinstance(log, list) else log(entry)
            bar.update(values, n_seen)
            if done % checkpoint_every == 0 or watch.ended(done):
                if not (good := _finite(delta, biases)).all():
                    raise NotFinite(_not_finite(rows, good, None, done, lr, []))
                with unbroken():
                    save()
    except Lost as error:
        save()
        kept = "there is no checkpoint" if checkpoint is None else f"the checkpoint {checkpoint} holds the last steps"
        raise Lost(
            f"{error} in step {done + 1}{'' if watch.steps is None else f' of {watch.steps}'}; {kept}: start all processes again to go on"
        ) from error
    except BaseException:
        save()  # the last whole step: nothing is lost to Ctrl-C or to a bad batch
        raise
    finally:
        bar.close()
        stream.close()
    if watch.delta is not None and watch.biases is not None:
        delta, biases = watch.delta, watch.biases
    return delta.cpu(), biases.cpu(), n_init, n_seen, watch


def _finite(weights: Tensor, biases: Tensor) -> Tensor:
    """Per row; a sum is not finite where a summand is not, and needs no memory."""
    return (weights.flatten(1).sum(1) + biases.sum(1)).isfinite()


def _not_finite(rows: list[Row], finite: Tensor, losses: Tensor | None, step: int, lr: float, texts: list[str]) -> str:
    bad = [row[0] for row, ok in zip(rows, finite.tolist(), strict=True) if not ok]
    what = "translator" if losses is None else "gradient" if losses.isfinite().all() else "loss"
    more = f" and {len(bad) - 1} more" if bad[1:] else ""
    text = f", on the text {texts[0]}" if texts else ""
    return f"the {what} is not finite at step {step} for {bad[0]!r}{more}{text}: lower lr (now {lr}){' or leave that text out' if texts else ''}; the last good state is kept"


def _label(row: Row) -> str:
    parts = row[0].split(".")
    return f"L{parts[1]}" if row[0].endswith("hook_resid_pre") else row[0].removeprefix("blocks.")


def _start(
    model: LensModel,
    stream: Iterator[tuple[Batch, Position]],
    rows: list[Row],
    init: Any,
    init_tokens: int | None,
    hooks: list[Hook],
    skip_first: bool,
    offload: bool,
) -> tuple[Tensor, Tensor, Moments | None, Iterator[tuple[Batch, Position]]]:
    """D and b to start from, the moments that they are of, and the stream, from its beginning still."""
    d = int(model.cfg.d_model)
    if isinstance(init, Translators):
        chosen = [init[row] for row in rows]
        delta = torch.stack([a.weight - base(*a.weight.shape) for a in chosen])
        return delta, torch.stack([a.bias for a in chosen]), None, stream
    if init == "identity":
        return torch.zeros(len(rows), d, d), torch.zeros(len(rows), d), None, stream
    if init != "regression":
        raise ValueError(f"init must be 'regression', 'identity' or Translators, got {init!r}")
    first, stream = first_batches(stream, init_tokens or default_tokens(model))
    return (*regression_start(model, first, rows, hooks, skip_first, offload), stream)

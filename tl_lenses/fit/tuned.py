"""The tuned lens: translators that minimise KL(model || lens), all layers in the same pass over a frozen model."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tl_lenses.checkpoint import load_state, save_state
from tl_lenses.data import Batch, TokenBatches, as_batches
from tl_lenses.fit.common import record, rows_for
from tl_lenses.fit.optim import LR, LR_POWER, WEIGHT_DECAY, make_optimizers, rate_scales, set_rate, set_scales
from tl_lenses.fit.start import default_tokens, first_batches, regression_start
from tl_lenses.fit.step import clip_gradients, head_of, loss_and_gradient, scored_pairs, summed_losses
from tl_lenses.fit.stop import Watch, split_held_out
from tl_lenses.hooks import Hook
from tl_lenses.model import LensModel, check_model, device_of
from tl_lenses.progress import progress
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
    momentum: float = 0.9,
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
            too (no second pass over the text), "identity" is the
            logit lens.
        optimizer: "muon" (matrices; AdamW for biases), "sgd" (Nesterov), "adam" (AdamW).
        lr, weight_decay: by optimiser if None; decay pulls to the identity.
        token_shift: position t is scored against t + shift: 0 for KL, 1 for CE by default.
        bias_only: train b alone.
        layers: layers or sites, `0..n_layers-1` by default.
        chunk_size: positions whose logits exist at a time.
        checkpoint: file that keeps the state every `checkpoint_every` steps and when interrupted; an existing one of
            the same settings is
            resumed.
        log: called with (or appended) `{"step", "tokens", "lr", "loss": {layer: nats}}` after each step.
        hooks: interventions under which to fit; the teacher is the same hooked run.
        clip: gradient norm per layer (over all layers together with `joint_clip`, as published); None for none.
        lr_power: a layer's rate is `lr * min(KL, 1 nat) ** lr_power`, of its KL at the first step: the last layers, nearly right
            from the start, want small steps. 0 is the same rate for all; 0.75 for Muon by default.
        precision: of the products with the unembedding: bf16 (accumulated in fp32) where the hardware multiplies it, with "auto".
        subsample: share of the positions that each layer is trained on, its own random ones; 1 is all.
        init_tokens: tokens for the regression start; by default `max(16 d_model, 8192)`.
        held_out: text that is not trained on (as `tokens`), or of a tensor `[n, seq]` the share of its last rows. Its loss is
            taken before the first step, every `held_out_every` steps and at the end; each layer's translators of its best
            look are the result; and after `patience` looks without a gain the fit ends.

    Raises:
        ValueError: unusable settings or tokens; a checkpoint of other settings; a loss that is not finite (names
        layer and step).

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
    lr = LR[optimizer] if lr is None else lr
    if (
        lr_power is None
    ):  # cross entropy does not fall to zero where a layer is right, so it says nothing about the rate
        lr_power = LR_POWER[optimizer] if loss == "kl" else 0.0
    weight_decay = WEIGHT_DECAY[optimizer] if weight_decay is None else weight_decay
    shift = (0 if loss == "kl" else 1) if token_shift is None else token_shift
    hooks, layers = list(hooks), None if layers is None else list(layers)
    rows = rows_for(model, layers)
    settings = {
        "steps": steps, "tokens_per_step": tokens_per_step, "loss": loss, "init": init if isinstance(init, str) else "translators",
        "optimizer": optimizer, "lr": lr, "weight_decay": weight_decay, "token_shift": shift, "bias_only": bias_only, "seed": seed,
        "skip_first": skip_first, "momentum": momentum, "clip": clip, "joint_clip": joint_clip,
        "lr_power": lr_power, "precision": precision, "subsample": subsample,
        "held_out": apart is not None, "held_out_every": held_out_every, "patience": patience, "rows": [list(row) for row in rows],
    }  # fmt: skip
    batches = as_batches(tokens)
    state = _resume(checkpoint, settings)
    stream = _cycle(batches, tokens, seed, state["batches"] if state is not None else 0)
    if state is None:
        weights, biases, n_init, stream = _start(model, stream, rows, init, init_tokens, hooks, skip_first)
    else:
        weights, biases, n_init = state["delta"], state["biases"], state["init_tokens"]
    device = device_of(model)
    delta, biases = (
        weights.float().to(device).contiguous(),
        biases.float().to(device).contiguous(),
    )  # D and b, the stacked buffers

    # One 2-D leaf per layer, each a view of the stacked buffer: Muon orthogonalises matrix by matrix.
    leaves = [nn.Parameter(d) for d in delta]
    bias_leaves = [nn.Parameter(b) for b in biases]
    optimizers = make_optimizers(optimizer, [] if bias_only else leaves, bias_leaves, lr, weight_decay, momentum)
    done, consumed, n_seen = 0, 0, 0
    if state is not None:
        done, consumed, n_seen = state["step"], state["batches"], state["tokens"]
        for opt, saved in zip(optimizers, state["optimizers"], strict=True):
            opt.load_state_dict(saved)

    head = head_of(Readout(model), precision)
    watch = Watch(None if steps == "auto" else steps, held_out_every, patience) if apart is not None else None
    if watch is not None and state is not None:
        watch = Watch.load(state["watch"])
    schedule = watch or Watch(steps if isinstance(steps, int) else None)
    shown = sorted({0, len(rows) // 2, len(rows) - 1})
    bar = progress(total=schedule.steps, desc="tuned lens", initial=done, show=show_progress)

    def save() -> None:
        if checkpoint is not None:
            save_state(checkpoint, {
                "format": "tl_lenses.fit_tuned", "settings": settings, "step": done, "batches": consumed, "tokens": n_seen,
                "init_tokens": n_init, "delta": delta, "biases": biases, "optimizers": [opt.state_dict() for opt in optimizers],
                "watch": None if watch is None else watch.state(),
            })  # fmt: skip

    def look() -> None:
        if watch is None or not watch.due(done):
            return
        sums, n = torch.zeros(len(rows), device=device), 0
        for batch in apart:
            pairs = scored_pairs(model, batch, rows, hooks, skip_first, shift, loss, head.readout)
            sums, n = sums + summed_losses(pairs, delta, biases, head, loss=loss, chunk_size=chunk_size), n + len(pairs)
        if n == 0:
            raise ValueError("no position to score in held_out: rows of one token with skip_first, or all pads")
        watch.look(done, sums / n, delta, biases)

    try:
        if state is None:
            look()
        while not schedule.ended(done):
            grad_w, grad_b = torch.zeros_like(delta), torch.zeros_like(biases)
            losses, n_step, n_used = torch.zeros(len(rows), device=device), 0, 0
            taken = 0
            while n_step < (tokens_per_step or 1):
                batch, _ = next(stream)
                taken, n_step = taken + 1, n_step + batch.tokens.numel()
                pairs = scored_pairs(model, batch, rows, hooks, skip_first, shift, loss, head.readout)
                if len(pairs) == 0:
                    continue
                # Sums first, so that means are over the step's positions however they fell into batches.
                losses += loss_and_gradient(
                    pairs, delta, biases, head, grad_w, grad_b, loss=loss, chunk_size=chunk_size, subsample=subsample,
                    seed=seed * 1_000_003 + consumed + taken,
                )  # fmt: skip
                n_used += len(pairs)
            if n_used == 0:
                raise ValueError(
                    "no position to train on in a whole step: rows of one token with skip_first, or all pads"
                )
            losses, grad_w, grad_b = losses / n_used, grad_w.div_(n_used), grad_b.div_(n_used)
            if not losses.isfinite().all():
                bad = [row[0] for row, ok in zip(rows, losses.isfinite().tolist(), strict=True) if not ok]
                raise ValueError(
                    f"the loss is not finite at step {done} for {bad[0]!r}{f' and {len(bad) - 1} more' if bad[1:] else ''}: lower lr (now {lr})"
                )
            if clip is not None:
                clip_gradients(grad_w, grad_b, clip, joint_clip, bias_only)
            if done == 0:
                set_scales(optimizers, rate_scales(losses.tolist(), lr_power))
            rate = lr * schedule.rate(done)
            for i, (leaf, bias) in enumerate(zip(leaves, bias_leaves, strict=True)):
                leaf.grad, bias.grad = grad_w[i], grad_b[i]
            for opt in optimizers:
                set_rate(opt, rate)
                opt.step()
            done, consumed, n_seen = done + 1, consumed + taken, n_seen + n_step
            look()
            values = losses.tolist()
            if log is not None:
                entry = {
                    "step": done,
                    "tokens": n_seen,
                    "lr": rate,
                    "loss": {row[0]: v for row, v in zip(rows, values, strict=True)},
                }
                if watch is not None and watch.looks[-1]["step"] == done:
                    entry["held_out"] = {row[0]: v for row, v in zip(rows, watch.looks[-1]["loss"], strict=True)}
                log.append(entry) if isinstance(log, list) else log(entry)
            bar.set_postfix_str(" ".join(f"{_label(rows[i])} {values[i]:.3f}" for i in shown), refresh=False)
            bar.update()
            if done % checkpoint_every == 0:
                save()
    except BaseException:
        save()  # the last whole step: nothing is lost to Ctrl-C, a full disk elsewhere, or a bad batch
        raise
    finally:
        bar.close()
    save()
    meta = record(model, "tuned", n_seen, {**settings, "init_tokens": n_init})
    meta["settings"].pop("rows")
    if watch is not None and watch.best is not None and watch.delta is not None and watch.biases is not None:
        delta, biases = watch.delta.to(device), watch.biases.to(device)
        meta["held_out"] = {"loss": watch.best.tolist(), "steps": done, "looks": len(watch.looks)}
    full = delta + base(*delta.shape[1:], device=device)
    return Translators(rows, full.cpu(), biases.cpu(), n_layers=int(model.cfg.n_layers), meta=meta)


def _label(row: Row) -> str:
    parts = row[0].split(".")
    return f"L{parts[1]}" if row[0].endswith("hook_resid_pre") else row[0].removeprefix("blocks.")


def _start(
    model: LensModel,
    stream: Iterator[tuple[Batch, int]],
    rows: list[Row],
    init: Any,
    init_tokens: int | None,
    hooks: list[Hook],
    skip_first: bool,
) -> tuple[Tensor, Tensor, int, Iterator[tuple[Batch, int]]]:
    """D and b to start from, how many tokens that took, and the stream, from its beginning still."""
    d = int(model.cfg.d_model)
    if isinstance(init, Translators):
        chosen = [init[row] for row in rows]
        delta = torch.stack([a.weight - base(*a.weight.shape) for a in chosen])
        return delta, torch.stack([a.bias for a in chosen]), 0, stream
    if init == "identity":
        return torch.zeros(len(rows), d, d), torch.zeros(len(rows), d), 0, stream
    if init != "regression":
        raise ValueError(f"init must be 'regression', 'identity' or Translators, got {init!r}")
    first, stream = first_batches(stream, init_tokens or default_tokens(model))
    return (*regression_start(model, first, rows, hooks, skip_first), stream)


def _cycle(batches: Iterable[Batch], tokens: Any, seed: int, skip: int) -> Iterator[tuple[Batch, int]]:
    """Batches without end, each with its epoch, which has an order of its own, from `seed`; the first `skip` are passed over."""
    epoch = index = 0
    while True:
        if isinstance(batches, TokenBatches):
            one_pass: Iterator[Batch] = batches.epoch(epoch)
        elif isinstance(tokens, Tensor) and tokens.ndim == 2:
            order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
            one_pass = iter(as_batches(tokens[order.to(tokens.device)]))
        else:
            one_pass = iter(batches)
        for batch in one_pass:
            index += 1
            if index > skip:
                yield batch, epoch
        epoch += 1


def _resume(checkpoint: str | Path | None, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The state to go on from, if there is a file.

    Raises:
        ValueError: it is of other settings (the first difference is named) or not of a fit.
    """
    if checkpoint is None or not Path(checkpoint).exists():
        return None
    state = load_state(checkpoint)
    if state.get("format") != "tl_lenses.fit_tuned":
        raise ValueError(f"{checkpoint} is not a checkpoint of fit_tuned: choose another file")
    for key, value in settings.items():
        if (saved := state["settings"].get(key)) != value:
            raise ValueError(
                f"the checkpoint {checkpoint} was made with {key}={saved!r}, now it is {value!r}: use the same settings, or delete it to start again"
            )
    return state

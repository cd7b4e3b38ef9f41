"""The map of a scope, trained through the frozen model: `f(h) = e^s h / |h| + b`, all pairs (l, l*) in the same passes.

A trained map makes a vector of layer l readable for the target prompt at layer l*: the model stays as it is, and what is trained
has as many numbers as the residual has dimensions, plus one. In units of n, the length of what the placeholder holds unpatched:

    f(h) = n (e^s u + (b + V U^T u) / sqrt(d)),   u = h / |h|

At s = 0 and b = V = 0 this is `patchscope(norm="replaced")`, and weight decay pulls to it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_lenses import edits
from tl_lenses.decoding import Decoder
from tl_lenses.fit.common import Log, NotFinite, logger, place, record
from tl_lenses.fit.examples import MOST, Asked, Examples, examples_of
from tl_lenses.fit.settings import ScopeSettings
from tl_lenses.fit.state import Checkpoint, alone, random_state, set_random_state, unbroken
from tl_lenses.fit.team import is_sharded, processes
from tl_lenses.hooks import Hook, checked_hooks, installed, marked, patch, read, run
from tl_lenses.identity import identity_of
from tl_lenses.model import LensModel, d_model, device_of, dtype_of, n_layers
from tl_lenses.patchscopes import Source, Target
from tl_lenses.patchscopes.continuation import Continuation
from tl_lenses.patchscopes.filling import Filling
from tl_lenses.patchscopes.pairs import all_pairs
from tl_lenses.patchscopes.planner import TargetRun, batches, prefix, why_not_shared
from tl_lenses.patchscopes.request import checked_models
from tl_lenses.patchscopes.result import Pair
from tl_lenses.patchscopes.targets import Prompt, ready_target
from tl_lenses.progress import progress
from tl_lenses.translators import CONTROLS, Row, Translators

PASS_BYTES = 2**28  # of a pass with gradients, about


@torch.inference_mode(False)
@torch.enable_grad()
def fit_scope(
    model: LensModel,
    source: Any,
    target: Target,
    labels: Literal["token"] | int | Sequence[str | Sequence[int]] = "token",
    steps: int = 100,
    *,
    layers: Iterable[Any] | None = None,
    target_layers: Iterable[Any] | None = None,
    pairs: Iterable[tuple[Any, Any]] | None = None,
    to: LensModel | None = None,
    rank: int = 0,
    vectors_per_step: int = 24,
    lr: float = 0.1,
    weight_decay: float = 0.01,
    clip: float | None = 0.5,
    mode: Literal["replace", "add"] = "replace",
    held_out: int = 128,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 25,
    note: Mapping[str, Any] | None = None,
    log: Log = None,
    source_hooks: Iterable[Hook] = (),
    target_hooks: Iterable[Hook] = (),
    skip_first: bool = True,
    prepend_bos: bool = True,
    show_progress: bool | None = None,
) -> Translators:
    """Train `f(h) = e^s h / |h| + b` per pair (l, l*), so that the patched target says the label of each vector.

    Minimises the cross entropy of the label's tokens after the target prompt, `- log p(label | target with f(h) in place)`, in nats per
    token, with the model frozen. The result is `patchscope(map=...)`, with the same target and mode.

    Args:
        source: text, as the other fitters take it (`[n, seq]`, `token_batches(...)`), where the labels are in it; else the sources of a
            patchscope, a label each: texts, `Source`s, or vectors `[n, d_model]`, which are taken for vectors of each layer l.
        target: the prompt and its placeholders. The label follows its last token.
        labels: "token", the token at the vector's own position; k, the k tokens after it; or a text (begin it with a space where the
            tokenizer writes one) or token ids for each source.
        steps: optimiser steps, 0 or more.
        layers, target_layers, pairs: which (l, l*), as in `patchscope`; all are trained in the same passes, each as if alone.
        to: another model of the same width, which runs the target.
        rank: of an additional low-rank term `V U^T h / |h|`; 0 for none.
        vectors_per_step: examples of a step.
        lr: of AdamW, in units of the length of what is replaced; up over the first steps, then a half cosine down to zero.
        weight_decay: pulls to `norm="replaced"`, where training starts.
        clip: gradient norm per pair, above 0; None for none.
        mode: as in `patchscope`.
        held_out: examples (at most a fifth) that are set aside for `meta["held_out"]`: loss and share of right tokens (top1) of each
            pair, beside them "unfitted" (`norm="replaced"`), "shuffled" (f of a vector with another label) and "bias" (a vector without
            any h, trained on the same batches from the mean direction): what prompt, labels and layer give without this vector.
        checkpoint, checkpoint_every, note, log: as in `fit_tuned`; a log entry is `{"step", "lr", "loss": {pair: nats}, "bias": {...}}`.
        source_hooks, target_hooks: your interventions on either run; they run before ours.
        skip_first: no vector of the first position of a row of text.
        prepend_bos: for the text of sources and target.

    Raises:
        ValueError: labels and sources of different number, empty labels, widths that differ, a target that does not depend on the
            vector, a checkpoint of other settings or models, a loss or gradient that is not finite (the last good state is kept).
        TypeError: a setting of the wrong type.
        Lost: another process of the fit has ended.

    Source: SelfIE adapters, 2602.10352; the optimiser is that of the authors' code.

    Example:
        >>> text = tll.token_batches("text.txt", model.tokenizer, seq_len=128, batch_size=16)      # doctest: +SKIP
        >>> maps = tll.fit_scope(model, text, target, layers=[2, 4], target_layers=[1])      # doctest: +SKIP
        >>> tll.patchscope(model, "Diana", target, pairs=[(2, 1)], map=maps)      # doctest: +SKIP
    """
    to = checked_models(model, to)
    if not isinstance(target, Target):
        raise TypeError(f"target must be a Target, got {type(target).__name__}: write tll.Target(...)")
    log = logger(log)
    settings = ScopeSettings(
        steps, vectors_per_step, rank, lr, weight_decay, clip, mode, held_out, seed, skip_first, checkpoint_every
    )
    _check_models(model, to)
    hooks = checked_hooks(model, source_hooks), checked_hooks(to, target_hooks)
    places = _places(model, to, all_pairs(model, to, [Source("")], layers, target_layers, pairs))
    scope = _target_run(to, ready_target(to, target, -1, 0, prepend_bos=prepend_bos), settings.mode, hooks[1])
    team = processes()
    show = show_progress if team.first else False
    asked = Asked(model, to, source, labels, [a for a, _ in places], hooks[0], prepend_bos, settings.skip_first)
    examples = examples_of(
        asked, min(max(settings.steps, 1) * settings.vectors_per_step, MOST) + settings.held_out, settings.seed, show
    )
    state = {
        **settings.record(), "rows": [list(row) for row in places.values()], "note": note, "target": scope.prompt.shown,
        "target_positions": list(scope.prompt.place), "labels": hashlib.sha256(json.dumps(examples.labels).encode()).hexdigest(),
    }  # fmt: skip
    kept = Checkpoint.of(checkpoint, "fit_scope", state, [model, None if to is model else to], team)
    known = kept.identities
    with alone(checkpoint, team):
        fit = _Fit(scope, places, examples, settings, kept)
        fit.train(log, show)
    scores = fit.scores(show)
    meta = record(model, "scope", fit.n_tokens, {**kept.settings, "examples": len(examples.labels)}, known[0] if known else None)
    meta |= {"unit": True} | ({"held_out": scores} if scores else {})
    if to is not model:
        meta["to"] = {**(known[1] if known else identity_of(to)), "n_layers": n_layers(to)}
    return Translators(places.values(), *fit.maps(), n_layers=n_layers(model), meta=meta)


def _check_models(model: LensModel, to: LensModel) -> None:
    if d_model(to) != d_model(model):
        raise ValueError(
            f"e^s h / |h| has the width of h, {d_model(model)}, and the target model has {d_model(to)}: map between the models with "
            "fit_regression(model, tokens, to=...), or take a model of the same width"
        )
    if is_sharded(model) or is_sharded(to):
        raise ValueError("a map is trained through the blocks, and these are sharded: load the model whole in each process")


def _places(model: LensModel, to: LensModel, pairs: Sequence[Any]) -> dict[Pair, Row]:
    """The hook names of each pair, each place under one name."""
    rows: dict[Pair, Row] = {}
    for pair in pairs:
        if any(isinstance(side, tuple) for side in pair):
            raise ValueError(f"the pair {pair} has several layers on one side: a map leads from one layer into one, (l, l*)")
        row = place(model, pair[0]), place(to, pair[1])
        if row in rows.values():
            raise ValueError(f"the pair {pair} is given twice")
        rows[pair] = row
    return rows


def _target_run(to: LensModel, prompt: Prompt, mode: str, hooks: list[Hook]) -> TargetRun:
    """The target, with what comes before its first placeholder run once: nothing that is trained reaches it."""
    with torch.no_grad():
        start = None if why_not_shared(to, prompt, hooks) else prefix(to, prompt)
    return TargetRun(to, prompt, Filling(to, mode=mode).combine, Continuation(), start, hooks)


def _soft_prompt(scope: TargetRun, start: int) -> list[Hook]:
    soft = scope.prompt.soft
    return [] if soft is None else [patch("hook_embed", edits.replace(soft[start:]), pos=slice(0, len(soft) - start))]


def label_logprobs(
    scope: TargetRun, sites: Sequence[str], vectors: Float[Tensor, "cells d"], labels: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, "cells tokens"], Bool[Tensor, "cells tokens"]]:
    """`[i, t] = log p(y_i[t] | target with vector i at site i, y_i[:t])` in nats, of one pass over all cells. Differentiable.

    Args:
        scope: the target; a label follows its last token.
        sites: the hook name of each cell.
        labels: the ids of each cell's label, one at least.

    Returns:
        Log-probabilities, 0 behind the end of a shorter label; and whether each token is the likeliest, False there.
    """
    device, width = device_of(scope.model), max(map(len, labels))
    ids = torch.tensor([[*label] + [-1] * (width - len(label)) for label in labels], device=device)
    there, ids = ids >= 0, ids.clamp_min(0)

    def edit_at(site: str) -> Callable[[Tensor], Tensor]:
        def edit(x: Tensor) -> Tensor:
            mask = torch.tensor([name == site for name in sites], device=x.device).view(-1, *[1] * (x.ndim - 1))
            v = vectors.to(x).view(len(x), 1, *x.shape[2:]).expand_as(x)
            return torch.where(mask, scope.combine(x, v), x)

        return edit

    hooks = [*scope.hooks, *_soft_prompt(scope, scope.n_shared)]
    hooks += [patch(site, edit_at(site), pos=scope.place) for site in dict.fromkeys(sites)]
    fed = torch.cat([scope.suffix.expand(len(ids), -1), ids[:, :-1]], 1)  # no column attends to later ones
    decoder = Decoder(scope.model, use_cache=False) if scope.start is None else scope.start.repeated(len(ids))
    with installed(scope.model, hooks), marked(0, scope.suffix.shape[1]):
        logits = decoder.feed(fed, last=width)
    logp = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    logp = logp.gather(-1, ids[..., None])[..., 0]
    return torch.where(there, logp, 0.0), (logits.argmax(-1) == ids) & there


class _Fit:
    """Training of all pairs at once, from the start or a checkpoint. Every number that changes is a field.

    Attributes:
        theta: what is trained, a row per pair: s, b, V and U.
        constant: of the control "bias", its vector per pair less the mean direction, in units of `length / sqrt(d)`.
        length: n, by pair; where the target has several placeholders the mean of their lengths.
        units: h / |h| by source layer.
        done, n_tokens: optimiser steps that were made, and label tokens that they saw.
    """

    def __init__(
        self, scope: TargetRun, places: dict[Pair, Row], examples: Examples, settings: ScopeSettings, checkpoint: Checkpoint
    ):  # fmt: skip
        self.scope, self.places, self.settings, self.checkpoint = scope, places, settings, checkpoint
        self.labels, self.team = examples.labels, checkpoint.team
        self.n_train = len(self.labels) - min(settings.held_out, len(self.labels) // 5)
        dtype = torch.float64 if dtype_of(scope.model) == torch.float64 else torch.float32
        where: Any = {"dtype": dtype, "device": device_of(scope.model)}
        self.units = {layer: torch.nn.functional.normalize(x.to(**where), dim=-1) for layer, x in examples.vectors.items()}
        self.length = self._lengths()
        self.d = next(iter(self.units.values())).shape[-1]
        n, d, r = len(places), self.d, settings.rank
        u = torch.randn(n, d * r, generator=torch.Generator().manual_seed(settings.seed)).to(**where)
        self.theta = torch.cat([torch.zeros(n, 1 + d + d * r, **where), u], 1).requires_grad_()
        self.constant = torch.zeros(n, d, **where).requires_grad_()
        self.leaves = [self.theta, self.constant]
        self.optimizer = torch.optim.AdamW(self.leaves, lr=settings.lr, weight_decay=settings.weight_decay)
        self.done, self.n_tokens, self.on_disk = 0, 0, -1
        if (state := checkpoint.resume()) is not None:
            with torch.no_grad():
                for leaf, saved in zip(self.leaves, state["leaves"], strict=True):
                    leaf.copy_(saved)
            self.optimizer.load_state_dict(state["optimizer"])
            self.done, self.n_tokens, self.on_disk = state["step"], state["tokens"], state["step"]
            set_random_state(state["random"])

    def _lengths(self) -> Float[Tensor, " pairs"]:
        prompt, seen, names = self.scope.prompt, {}, [target for _, target in self.places.values()]
        hooks = [*self.scope.hooks, *_soft_prompt(self.scope, 0), *(read(name, seen) for name in dict.fromkeys(names))]
        with torch.no_grad():
            run(self.scope.model, prompt.tokens, hooks)
        held = {name: x[0, list(prompt.place)].flatten(1) for name, x in seen.items()}
        for pair, (_, name) in self.places.items():
            if (width := self.units[pair[0]].shape[-1]) != held[name].shape[-1]:
                raise ValueError(f"the pair {pair} leads from width {width} to {held[name].shape[-1]}: e^s h / |h| keeps the width")
        return torch.stack([held[name].to(next(iter(self.units.values()))).norm(dim=-1).mean() for name in names])

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """s `[pairs]`, b `[pairs, d]`, V and U `[pairs, d, rank]`."""
        n, d, r = len(self.places), self.d, self.settings.rank
        s, b, v, u = self.theta.split([1, d, d * r, d * r], 1)
        return s[:, 0], b, v.view(n, d, r), u.view(n, d, r)

    def vectors(self, kind: str, index: Sequence[int]) -> Float[Tensor, "pairs n d"]:
        """What is put into the target for these examples."""
        units = torch.stack([self.units[layer] for layer, _ in self.places])
        x = units[:, list(index)]
        if kind == "bias":
            y = (units[:, : self.n_train].mean(1) + self.constant / self.d**0.5)[:, None].expand_as(x)
        elif kind == "unfitted":
            y = x
        else:
            s, b, v, u = self._parts()
            y = s.exp()[:, None, None] * x + (b[:, None] + x @ u @ v.mT) / self.d**0.5
        return self.length[:, None, None] * y

    @torch.no_grad()
    def maps(self) -> tuple[Float[Tensor, "pairs d d"], Float[Tensor, "pairs d"]]:
        """Full maps of u on the CPU: `W = n (e^s I + V U^T / sqrt(d))` and `n b / sqrt(d)`."""
        s, b, v, u = self._parts()
        n = self.length[:, None]
        weights = n[..., None] * (s.exp()[:, None, None] * torch.eye(self.d).to(s) + v @ u.mT / self.d**0.5)
        return weights.float().cpu(), (n * b / self.d**0.5).float().cpu()

    def losses(
        self, kinds: Sequence[str], index: Sequence[int], others: Sequence[int], into: Sequence[Tensor] | None = None
    ) -> Float[Tensor, "2 kinds pairs"]:
        """Sums over the label tokens of these examples: of `- log p`, and of how many are the likeliest.

        Args:
            kinds: of vectors; "shuffled" are the fitted ones of `others`.
            into: the leaves' gradients of all the first sums together are added to these.
        """
        n_cells, sites = len(kinds) * len(self.places), [target for _, target in self.places.values()]
        totals = self.length.new_zeros(2, len(kinds), len(self.places))
        for part in batches(len(index), max(1, PASS_BYTES // self._bytes_of_a_cell() // n_cells)):
            here, there = [index[i] for i in part], [others[i] for i in part]
            vectors = torch.stack([self.vectors(kind, there if kind == "shuffled" else here) for kind in kinds])
            of_cell = [site for _ in kinds for site in sites for _ in here]
            labels = [self.labels[i] for i in here] * n_cells
            logp, right = label_logprobs(self.scope, of_cell, vectors.flatten(0, 2), labels)
            sums = torch.stack([-logp.to(totals), right.to(totals)]).sum(-1).view(*totals.shape, -1).sum(-1)
            if into is not None and sums.requires_grad:
                for total, g in zip(into, torch.autograd.grad(sums[0].sum(), self.leaves), strict=True):
                    total += g
            totals += sums.detach()
        return totals

    def _bytes_of_a_cell(self) -> int:
        """Of one run of the target with gradients: activations of all blocks, keys and values, logits."""
        model, width = self.scope.model, max(map(len, self.labels))
        columns, whole = self.scope.suffix.shape[1] + width - 1, self.scope.prompt.tokens.shape[1] + width - 1
        return 4 * (n_layers(model) * d_model(model) * (40 * columns + 2 * whole) + 3 * width * int(model.cfg.d_vocab))

    def drawn(self, step: int) -> list[int]:
        """The examples of a step: all of them in a random order, again and again, in another one each time."""
        n, total = min(self.settings.vectors_per_step, self.n_train), self.n_train
        generator = lambda epoch: torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        numbers = range(step * n, (step + 1) * n)
        order = {epoch: torch.randperm(total, generator=generator(epoch)).tolist() for epoch in {i // total for i in numbers}}
        return [order[i // total][i % total] for i in numbers]

    def gradients(self, index: Sequence[int]) -> tuple[list[Tensor], Float[Tensor, "2 pairs"]]:
        """The mean over the label tokens of these examples, over all processes: gradients by leaf, losses of maps and control."""
        sizes, n = [leaf.numel() for leaf in self.leaves], len(self.places)
        sums = self.theta.new_zeros(sum(sizes) + 2 * n + 1)
        *flat, losses, _ = sums.split([*sizes, 2 * n, 1])
        grads = [part.view_as(leaf) for part, leaf in zip(flat, self.leaves, strict=True)]
        with self.team.together(sums):
            rows = index[self.team.rank :: self.team.world]
            losses += self.losses(("fitted", "bias"), rows, rows, grads)[0].flatten()
        sums /= sum(len(self.labels[i]) for i in index)
        return grads, losses.view(2, n)

    def step(self) -> Float[Tensor, "2 pairs"]:
        """One optimiser step. The losses before it."""
        index = self.drawn(self.done)
        grads, losses = self.gradients(index)
        self._check(losses, grads)
        for leaf, g in zip(self.leaves, grads, strict=True):
            norm = g.norm(dim=1, keepdim=True).clamp_min(1e-30)
            leaf.grad = g if self.settings.clip is None else g * (self.settings.clip / norm).clamp(max=1.0)
        self.optimizer.param_groups[0]["lr"] = self.settings.rate(self.done)
        with unbroken():
            self.optimizer.step()
            self.done, self.n_tokens = self.done + 1, self.n_tokens + sum(len(self.labels[i]) for i in index)
        return losses

    def _check(self, losses: Float[Tensor, "2 pairs"], grads: Sequence[Tensor]) -> None:
        norms = torch.stack([g.norm(dim=1) for g in grads])
        for k, pair in enumerate(self.places):
            if not bool((losses + norms)[:, k].isfinite().all()):
                raise NotFinite(
                    f"the loss or gradient of the pair {pair} is not finite at step {self.done}: lower lr (now {self.settings.lr}); the last "
                    "good state is kept"
                )
            if self.done == 0 and norms[0, k] == 0:
                raise ValueError(
                    f"what the target says does not depend on the vector of the pair {pair}: a placeholder of the last layer has to be the "
                    "last token of the prompt, which is read"
                )

    def train(self, log: Callable[[dict[str, Any]], object], show: bool | None) -> None:
        """To the end. Whatever ends it early, the last whole step is saved."""
        with progress(total=self.settings.steps, desc="scope", initial=self.done, show=show) as bar:
            try:
                while self.done < self.settings.steps:
                    losses = self.step()
                    if self.done % self.settings.checkpoint_every == 0:
                        self.save()
                    bar.set_postfix_str(f"loss {losses[0].mean():.3f}, bias alone {losses[1].mean():.3f}", refresh=False)
                    bar.update()
                    loss, bias = (dict(zip(self.places, row, strict=True)) for row in losses.tolist())
                    log({"step": self.done, "lr": self.settings.rate(self.done - 1), "loss": loss, "bias": bias})
            finally:
                self.save()

    def save(self) -> None:
        """Write a checkpoint of the last step, unless the disk has it."""
        if self.checkpoint.file is None or self.on_disk == self.done:
            return
        state = {
            "step": self.done, "tokens": self.n_tokens, "leaves": self.leaves, "optimizer": self.optimizer.state_dict(), "random": random_state(),
        }  # fmt: skip
        with unbroken():
            self.on_disk = self.done if self.checkpoint.keep(state, f"at step {self.done}") else self.on_disk

    @torch.no_grad()
    def scores(self, show: bool | None) -> dict[str, Any] | None:
        """Loss and top1 of every pair, and of the controls, on the examples that are set aside; None where there are none."""
        held, kinds = range(self.n_train, len(self.labels)), ("fitted", *CONTROLS)
        if not held:
            return None
        other: dict[int, int] = {}
        for i in held:  # the next one with another label
            ring = [*range(i + 1, len(self.labels)), *range(self.n_train, i)]
            other[i] = next((j for j in ring if self.labels[j] != self.labels[i]), i)
        totals = self.length.new_zeros(2, len(kinds), len(self.places))
        with progress(total=len(held), desc="held-out vectors", show=show) as bar:
            for part in batches(len(held), 16):
                index = [held[i] for i in part]
                totals += self.losses(kinds, index, [other[i] for i in index])
                bar.update(len(index))
        loss, top1 = (totals / sum(len(self.labels[i]) for i in held)).tolist()
        of_kind = {kind: {"loss": loss[k], "top1": top1[k]} for k, kind in enumerate(kinds)}
        return {"vectors": len(held), **of_kind.pop("fitted"), **of_kind}

"""The checked arguments of a patchscope: every error that can be raised before a forward pass is raised here."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.checks import finite_number, one_of, whole_number
from tl_lenses.hooks import Hook, checked_hooks
from tl_lenses.layers import LayerOrSite
from tl_lenses.model import LensModel, check_model, name_of
from tl_lenses.patchscopes.continuation import Continuation
from tl_lenses.patchscopes.filling import Filling
from tl_lenses.patchscopes.pairs import all_pairs, moves_of
from tl_lenses.patchscopes.result import Pair
from tl_lenses.patchscopes.sources import ReadySource, Source, is_chat, ready_sources
from tl_lenses.patchscopes.targets import Prompt, Target, ready_target, same_place
from tl_lenses.sites import At
from tl_lenses.tokens import bos_text


@dataclass(frozen=True)
class Ensemble:
    """How the distributions of several targets become one: their mean, or also without tokens outside each one's top k."""

    kind: str = "mean"
    k: int = 1000

    @classmethod
    def of(cls, kind: Any, k: Any) -> "Ensemble":
        """The user's arguments, checked."""
        return cls(one_of("ensemble", kind, ("mean", "intersect")), whole_number("ensemble_k", k, least=1))

    def combined(self, logits: Sequence[Float[Tensor, "cells d_vocab"]]) -> Float[Tensor, "cells d_vocab"]:
        """Log of the mean probability over targets, the logits of a single target as they are."""
        if len(logits) == 1:
            return logits[0]
        n_targets = torch.tensor(len(logits))
        log_mean = torch.stack([x.float().log_softmax(-1) for x in logits]).logsumexp(0) - n_targets.log()
        if self.kind == "mean":
            return log_mean
        k = min(self.k, log_mean.shape[-1])
        in_top = torch.stack([x >= x.topk(k, dim=-1).values[..., -1:] for x in logits]).all(0)
        return log_mean.masked_fill(~in_top, float("-inf"))


@dataclass(frozen=True)
class Options:
    """How the runs are made: arguments of `patchscope`, under its names."""

    read: Any
    when: Literal["prompt", "every_step"]
    isolate: bool
    prepend_bos: bool
    source_hooks: Sequence[Hook]
    target_hooks: Sequence[Hook]
    batch_size: int | None
    keep: str
    share: bool
    samples: bool = False

    @classmethod
    def of(
        cls, model: LensModel, to: LensModel, source_hooks: Iterable[Hook], target_hooks: Iterable[Hook], *, read: Any,
        batch_size: Any, **options: Any,
    ) -> "Options":  # fmt: skip
        """The user's arguments, checked; the hooks against the model that each is for."""
        one_of("when", options["when"], ("prompt", "every_step"))
        one_of("keep", options["keep"], ("auto", "logits", "top_k"))
        return cls(
            source_hooks=checked_hooks(model, source_hooks),
            target_hooks=checked_hooks(to, target_hooks),
            # Lists and slices are refused where positions are resolved.
            read=read if isinstance(read, (str, At, slice, list, tuple)) else whole_number("read", read),
            batch_size=None if batch_size is None else whole_number("batch_size", batch_size, least=1),
            **options,
        )


@dataclass(frozen=True)
class Request:
    """Everything that one call of `patchscope` will run."""

    model: LensModel  # of the sources
    to: LensModel  # of the targets
    sources: list[ReadySource]  # the source axis, before `scales` multiply it
    targets: list[list[Prompt]]  # per source the prompts that receive its vectors
    own_prompt: bool  # the target is the source's own prompt
    pairs: list[Pair]  # of layers
    scales: list[float]  # factors on the vectors
    filling: Filling  # how a vector is mapped, scaled and written into the target run
    # how texts are continued, targets combined, and runs made
    continuation: Continuation
    ensemble: Ensemble
    options: Options

    @classmethod
    def of(
        cls, model: LensModel, source: Any, target: Any, layers: tuple[Any, Any, Any], scale: Any, filling: Filling,
        continuation: Continuation, ensemble: Ensemble, options: Options,
    ) -> "Request":  # fmt: skip
        """Resolve sources, targets and layers, and check that they fit together. Nothing runs.

        Args:
            model: the source model; the target model is that of `filling`.
            source, target, scale: as `patchscope` takes them; `layers` are its `layers`, `target_layers` and `pairs`.
        """
        to, scales = filling.to, _scales(scale)
        sources, targets = sources_of(source), _targets(target)
        pairs = all_pairs(model, to, sources, *layers)
        filling.check(model, sources, pairs)
        read, n_new, bos = options.read, continuation.max_new_tokens, options.prepend_bos
        if targets is None and any(source.has_vectors for source in sources):
            raise ValueError("target=None means the source's own prompt, and vectors have none: give a Target")
        fixed = [ready_target(to, target, read, n_new, prepend_bos=bos) for target in targets or []]
        if len(fixed) > 1 and n_new and not options.samples:
            raise ValueError(
                "texts of several targets cannot be combined: use max_new_tokens=0, or n_samples= for texts of each, or one target a call"
            )
        moves = [move for pair in pairs for move in moves_of(*pair)]
        ready = ready_sources(model, sources, [layer for layer, _ in moves], prepend_bos=bos)
        prompts = [fixed if targets is not None else [same_place(model, to, source, read, n_new)] for source in ready]
        if options.when == "every_step" and any(len(prompt.place) > 1 for of_source in prompts for prompt in of_source):
            raise ValueError("when='every_step' patches one position a step: give a target of one position")
        return cls(model, to, ready, prompts, targets is None, pairs, scales, filling, continuation, ensemble, options)

    @property
    def source_layers(self) -> list[LayerOrSite | None]:
        """The layers that are read."""
        return list(dict.fromkeys(layer for pair in self.pairs for layer, _ in moves_of(*pair)))

    @property
    def target_layers(self) -> list[LayerOrSite]:
        """The layers that are patched."""
        return list(dict.fromkeys(layer for pair in self.pairs for _, layer in moves_of(*pair)))

    def settings(self) -> dict[str, Any]:
        """The settings that a result records; "bos" and "target_bos" are put before text; ids and messages stay as they are."""
        targets = [prompts[0] for prompts in self.targets] if self.own_prompt else self.targets[0]
        shown = [prompt.shown for prompt in targets]
        norm = self.filling.norm
        return {
            "model": name_of(self.model), "to": name_of(self.to), "source_positions": [list(s.columns) for s in self.sources],
            "target": "the source's own prompt" if self.own_prompt else shown[0] if len(shown) == 1 else shown,
            "mode": self.filling.mode, "when": self.options.when, "norm": norm if isinstance(norm, str) else None,
            "max_new_tokens": self.continuation.max_new_tokens, "do_sample": self.continuation.do_sample,
            "n_samples": self.continuation.n_samples, "seed": self.continuation.seed, "stop": list(self.continuation.stop), "isolate": self.options.isolate,
            "target_positions": [list(prompt.place) for prompt in targets],
            "bos": bos_text(getattr(self.model, "tokenizer", None), self.options.prepend_bos),
            "target_bos": bos_text(getattr(self.to, "tokenizer", None), self.options.prepend_bos),
        }  # fmt: skip


def checked_models(model: LensModel, to: LensModel | None) -> LensModel:
    """The target model, both models checked."""
    to = model if to is None else to
    for checked in (model,) if to is model else (model, to):
        check_model(checked, what="a patchscope")
    return to


def sources_of(source: Any) -> list[Source]:
    """One source or several as a list; text, ids and chat messages mean their last token."""
    several = isinstance(source, (list, tuple)) and not is_chat(source[:1])
    sources = [Source(item) if _is_prompt(item) else item for item in (source if several else [source])]
    return _checked("source", Source, sources, "has nothing to patch")


def _targets(target: Any) -> list[Target] | None:
    targets = list(target) if isinstance(target, (list, tuple)) else [target]
    return None if target is None else _checked("target", Target, targets, "has nowhere to put a vector")


def _checked(name: str, kind: type, values: list[Any], why: str) -> list[Any]:
    for value in values:
        if not isinstance(value, kind):
            got, called = type(value).__name__, kind.__name__
            raise TypeError(f"{name} must be a {called} or a list of them, got {got}: write tll.{called}(...)")
    if not values:
        raise ValueError(f"an empty list of {name}s {why}")
    return values


def _is_prompt(value: Any) -> bool:
    """Text, the output of a tokenizer, a tensor of ids, or a list of chat messages."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() and value.ndim > 0
    return isinstance(value, (str, Mapping)) or isinstance(value, (list, tuple)) and is_chat(value[:1])


def _scales(scale: Any) -> list[float]:
    """One factor or several."""
    several = isinstance(scale, Iterable) and not isinstance(scale, str) and getattr(scale, "ndim", 1) > 0
    scales = [finite_number("scale", factor) for factor in (scale if several else [scale])]
    if not scales:
        raise ValueError("scale must be a finite number or a list of them, got an empty list")
    return scales

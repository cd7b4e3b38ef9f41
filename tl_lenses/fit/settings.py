"""The settings of a fit: one frozen value, shared by the fit, its plan, its checkpoint and its record."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from tl_lenses.checks import finite_number, flag, one_of, whole_number

# Learning rates at the first step; they fall linearly to zero. SGD: the paper's rate 1 times (1 - momentum), since torch's momentum
# multiplies by its inverse. Muon: over the root of the width (`default_lr`).
LR = {"muon": 1.0, "sgd": 0.1, "adam": 1e-3}
MOMENTUM = {"muon": 0.7, "sgd": 0.9, "adam": 0.9}
WEIGHT_DECAY = {"muon": 0.01, "sgd": 1e-3, "adam": 0.0}
# A layer's rate follows its KL at the first step: layers near the end are nearly right and need small steps (docs/log.md).
LR_POWER = {"muon": 0.75, "sgd": 0.0, "adam": 0.0}

# Not in a record and not compared on resuming: they change no map.
_RUN_ONLY = ("init_tokens", "chunk_size", "checkpoint_every", "layers_at_once")

SAMPLED_FROM = 2**15  # tokens of a vocabulary that "auto" samples


def default_lr(optimizer: str, d_model: int) -> float:
    """The rate that is best where it was measured: Muon's falls with the root of the width, `1 / sqrt(d)`.

    A step of Muon has singular values of `0.2 sqrt(d) lr` ("match_rms_adamw"), so this is a fifth of the identity's at any width, as
    Yang, Simon & Bernstein 2023 (A Spectral Condition for Feature Learning, section 3) ask of a square matrix. Measured at 64, 128 and
    256 (docs/log.md); at 8,192 it is 0.011, and the tuned-lens authors have 0.01.
    """
    return LR[optimizer] / d_model**0.5 if optimizer == "muon" else LR[optimizer]


WARM_UP = 10  # steps of the map of a scope, at most a tenth of all


def _keep(settings: Any, check: Callable[..., Any], *names: str, **limits: Any) -> None:
    """Check some fields; numbers are kept as Python's."""
    for name in names:
        object.__setattr__(settings, name, check(name, getattr(settings, name), **limits))


def _keep_unless_none(settings: Any, check: Callable[..., Any], *names: str, **limits: Any) -> None:
    _keep(settings, check, *(name for name in names if getattr(settings, name) is not None), **limits)


@dataclass(frozen=True)
class Settings:
    """The settings of `fit_tuned`, checked. `fit_tuned` says what each one means.

    Numbers may be of any integer or float type and are kept as Python's. `None` becomes the default of the optimiser or loss in
    `weight_decay`, `momentum`, `lr_power` and `token_shift`; `lr` needs the model's width, see `at_width`.

    Raises:
        ValueError: a number out of its range, or an unknown word.
        TypeError: not a number where one is meant; a bool is none.

    Example:
        >>> settings = Settings(steps=100, optimizer="sgd")
        >>> settings.momentum, settings.at_width(768).lr
        (0.9, 0.1)
    """

    steps: int | Literal["auto"] = 250
    tokens_per_step: int | None = None
    loss: Literal["kl", "ce"] = "kl"
    init: Literal["regression", "identity", "translators"] = "regression"
    optimizer: Literal["muon", "sgd", "adam"] = "muon"
    lr: float | None = None
    weight_decay: float | None = None
    token_shift: int | None = None
    bias_only: bool = False
    seed: int = 0
    skip_first: bool = True
    momentum: float | None = None
    clip: float | None = 1.0
    joint_clip: bool = False
    offload: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    subsample: float = 1.0
    vocabulary: Literal["exact", "sampled", "auto"] = "auto"
    lr_power: float | None = None
    lr_search: bool | None = None
    held_out: bool = False
    guard: bool = True
    held_out_every: int = 25
    patience: int = 4
    init_tokens: int | None = None
    chunk_size: int | None = None
    checkpoint_every: int = 25
    layers_at_once: int | None = None

    def __post_init__(self) -> None:
        one_of("loss", self.loss, ("kl", "ce"))
        one_of("optimizer", self.optimizer, tuple(LR))
        one_of("init", self.init, ("regression", "identity", "translators"))
        one_of("vocabulary", self.vocabulary, ("exact", "sampled", "auto"))
        if self.vocabulary == "sampled" and self.loss != "kl":
            raise ValueError("vocabulary='sampled' is for the loss 'kl': a cross entropy has no teacher to draw from")
        one_of("precision", self.precision, ("auto", "float32", "bfloat16"))
        object.__setattr__(self, "steps", _steps(self.steps, self.held_out))
        # Cross entropy does not fall to zero where a layer is right, so it says nothing about the rate.
        power = LR_POWER[self.optimizer] if self.loss == "kl" else 0.0
        for name, default in (
            ("weight_decay", WEIGHT_DECAY[self.optimizer]),
            ("momentum", MOMENTUM[self.optimizer]),
            ("lr_power", power),
            ("token_shift", 0 if self.loss == "kl" else 1),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        _keep(self, whole_number, "held_out_every", "patience", "checkpoint_every", least=1)
        _keep_unless_none(self, whole_number, "tokens_per_step", "init_tokens", "chunk_size", "layers_at_once", least=1)
        _keep(self, whole_number, "token_shift")
        _keep(self, whole_number, "seed", least=-(2**42), most=2**42)
        _keep_unless_none(self, finite_number, "lr", "clip", above=0)
        _keep(self, finite_number, "weight_decay", "lr_power", "momentum", "subsample", least=0)
        if self.momentum is not None and self.momentum >= 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum:g}")
        if not 0 < self.subsample <= 1:
            raise ValueError(f"subsample is a share of the positions, above 0 and at most 1, got {self.subsample:g}")
        _keep_unless_none(self, flag, "lr_search")
        _keep(self, flag, "bias_only", "skip_first", "joint_clip", "offload", "held_out", "guard")

    def at_width(self, d_model: int) -> "Settings":
        """The same, with the default learning rate of this width where none was given, and a search where that rate is Muon's on KL."""
        search = self.muon and self.loss == "kl" and self.lr is None if self.lr_search is None else self.lr_search
        return replace(self, lr_search=search, lr=self.lr or default_lr(self.optimizer, d_model))

    def record(self) -> dict[str, Any]:
        """What decides the result, as JSON values: for `meta["settings"]`, and compared when a checkpoint is resumed."""
        return {name: value for name, value in vars(self).items() if name not in _RUN_ONLY}

    def start_tokens(self, d_model: int) -> int:
        """Tokens that the start's regression reads; 0 from any other start.

        Beyond `max(128 d_model, 8192)` tokens, more help the covariance of this width little (docs/log.md).
        """
        return (self.init_tokens or max(128 * d_model, 8192)) if self.init == "regression" else 0

    def samples(self, d_vocab: int) -> bool:
        """Whether steps score a sample of the vocabulary (`fit.sampled`)."""
        large = d_vocab >= SAMPLED_FROM and self.loss == "kl" and self.init == "regression"
        return self.vocabulary == "sampled" or (self.vocabulary == "auto" and large)

    @property
    def whitens(self) -> bool:
        """Whether Muon steps in whitened coordinates (`fit.whiten`): only from a regression, whose moments it needs."""
        return self.muon and self.init == "regression"

    @property
    def guards(self) -> bool:
        """Whether tokens are set aside to compare the end with the start (`fit.guard`): held-out text does that too."""
        return self.guard and not self.held_out and self.steps not in (0, "auto")

    @property
    def muon(self) -> bool:
        """Whether matrices are trained, and by Muon."""
        return self.optimizer == "muon" and not self.bias_only


@dataclass(frozen=True)
class ScopeSettings:
    """The settings of `fit_scope`, checked; it says what each one means."""

    steps: int = 100
    vectors_per_step: int = 24
    rank: int = 0
    lr: float = 0.1
    weight_decay: float = 0.01
    clip: float | None = 0.5
    mode: str = "replace"
    held_out: int = 128
    seed: int = 0
    skip_first: bool = True
    checkpoint_every: int = 25

    def __post_init__(self) -> None:
        _keep(self, whole_number, "steps", "rank", "held_out", least=0)
        _keep(self, whole_number, "vectors_per_step", "checkpoint_every", least=1)
        _keep(self, whole_number, "seed", least=-(2**31), most=2**31)
        _keep(self, finite_number, "lr", above=0)
        _keep(self, finite_number, "weight_decay", least=0)
        _keep_unless_none(self, finite_number, "clip", above=0)
        one_of("mode", self.mode, ("replace", "add"))
        _keep(self, flag, "skip_first")

    def rate(self, step: int) -> float:
        """The learning rate of a step: up over the first ones, then a half cosine down to zero."""
        warm = min(WARM_UP, self.steps // 10)
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        done = torch.tensor((step - warm) / max(1, self.steps - warm))
        return self.lr * float(1 + torch.cos(torch.pi * done)) / 2

    def record(self) -> dict[str, Any]:
        """What decides the result, as JSON values."""
        return {name: value for name, value in vars(self).items() if name != "checkpoint_every"}


def _steps(steps: Any, held_out: bool) -> Any:
    if isinstance(steps, str):
        if steps != "auto" or not held_out:
            raise ValueError(
                "steps must be a whole number, or 'auto' with held_out= text to stop by; "
                f"got {steps!r} {'with' if held_out else 'without'} held_out"
            )
        return steps
    return whole_number("steps", steps, least=0)

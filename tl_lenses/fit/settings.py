"""The settings of a tuned lens' fit: one frozen value, shared by the fit, its plan, its checkpoint and its record."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from tl_lenses.checks import finite_number, one_of, whole_number

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
        self._set("steps", _steps(self.steps, self.held_out))
        # Cross entropy does not fall to zero where a layer is right, so it says nothing about the rate.
        power = LR_POWER[self.optimizer] if self.loss == "kl" else 0.0
        for name, default in (
            ("weight_decay", WEIGHT_DECAY[self.optimizer]),
            ("momentum", MOMENTUM[self.optimizer]),
            ("lr_power", power),
            ("token_shift", 0 if self.loss == "kl" else 1),
        ):
            if getattr(self, name) is None:
                self._set(name, default)
        for name in ("held_out_every", "patience", "checkpoint_every"):
            self._set(name, whole_number(name, getattr(self, name), least=1))
        for name in ("tokens_per_step", "init_tokens", "chunk_size", "layers_at_once"):
            if getattr(self, name) is not None:
                self._set(name, whole_number(name, getattr(self, name), least=1))
        self._set("token_shift", whole_number("token_shift", self.token_shift))
        self._set("seed", whole_number("seed", self.seed, least=-(2**42), most=2**42))
        for name in ("lr", "clip"):
            if getattr(self, name) is not None:
                self._set(name, finite_number(name, getattr(self, name), above=0))
        for name in ("weight_decay", "lr_power", "momentum"):
            self._set(name, finite_number(name, getattr(self, name), least=0))
        if self.momentum is not None and self.momentum >= 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum:g}")
        if self.lr_search is not None and not isinstance(self.lr_search, bool):
            raise TypeError(f"lr_search must be True, False or None, got {self.lr_search!r}")
        self._set("subsample", share_of_positions(self.subsample))
        for name in ("bias_only", "skip_first", "joint_clip", "offload", "held_out", "guard"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

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

    def samples(self, d_vocab: int, transformed: bool = False) -> bool:
        """Whether steps score a sample of the vocabulary (`fit.sampled`).

        Args:
            transformed: whether the model changes its logits after the unembedding (a soft cap).

        Raises:
            ValueError: "sampled", of such a model.
        """
        if self.vocabulary == "sampled" and transformed:
            raise ValueError(
                "vocabulary='sampled' needs logits that are linear, and this model caps or scales them: use 'exact' or 'auto'"
            )
        large = (
            self.vocabulary == "auto" and d_vocab >= SAMPLED_FROM and self.loss == "kl" and self.init == "regression"
        )
        return self.vocabulary == "sampled" or (large and not transformed)

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


def share_of_positions(subsample: Any) -> float:
    """`subsample` as a float."""
    share = finite_number("subsample", subsample, least=0)
    if not 0 < share <= 1:
        raise ValueError(f"subsample is a share of the positions, above 0 and at most 1, got {share:g}")
    return share


def _steps(steps: Any, held_out: bool) -> Any:
    if isinstance(steps, str):
        if steps != "auto" or not held_out:
            raise ValueError(
                "steps must be a whole number, or 'auto' with held_out= text to stop by; "
                f"got {steps!r} {'with' if held_out else 'without'} held_out"
            )
        return steps
    return whole_number("steps", steps, least=0)

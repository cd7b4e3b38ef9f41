"""What a fit of a tuned lens costs: operations, bytes and memory, from shapes alone. Nothing is allocated or run.

Per token that is trained on, with R rows (layers), width d and vocabulary V, one multiply-add being two operations:

    translators   4 R d^2         y = W x + b, and dL/dW = (dL/dy)^T x
    vocabulary    4 R d V         z = h W_U, and dL/dh = (q - p) W_U^T: nearly all of it
    model         2 P             one forward pass; P parameters less the embedding table
    elementwise   R V LOGIT_BYTES bytes moved, to turn z into q - p and to reduce it

With m tokens of a sample of the vocabulary (`fit.sampled`) in the place of V, the teacher's `2 d V` and `V TEACHER_BYTES` come to it, once for all layers.
The start's tokens cost a forward pass and two products for each layer's moments, `2 P + 4 R d^2`. A step of Muon costs five
Newton-Schulz iterations, `5 * 6 R d^3`, and in whitened coordinates (`fit.whiten`) two products, `4 R d^3`.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from tl_lenses.checks import one_of, whole_number
from tl_lenses.decode import ROOM
from tl_lenses.divergence import BLOCK, tiles
from tl_lenses.fit.kept import bytes_kept
from tl_lenses.fit.settings import Settings
from tl_lenses.fit.step import PASS

# Bytes moved per student logit between the two products, counted on the lines of `divergence._residual` as if nothing stayed in a cache:
# products 4, to fp32 6, maximum 4, difference 8, exp 8, sum 4, p - q 12, back 6.
LOGIT_BYTES = 52
# The same for a logit of the teacher where a sample is drawn (`sampled.likely`): products 4, to fp32 6, bias 8, maxima 4, softmax 12, mean 4.
TEACHER_BYTES = 38
# Tokens of a sample of the vocabulary (`fit.sampled`), about: draws, and likely ones of each position.
SAMPLE = (1024, 1.5)
AUTO_STEPS = 250  # counted where `steps` is "auto"
_STATES = {"muon": 1, "sgd": 1, "adam": 2}  # fp32 numbers of optimiser state per weight


@dataclass(frozen=True)
class Plan:
    """Costs of one fit, for one process.

    Attributes:
        memory: bytes by what holds them, at the same moment (the peak of a step is their sum).
        operations: floating-point operations by part, of the whole fit.
        moved: bytes that elementwise passes over logits read and write, of the whole fit.
        tokens: that are trained on.
        start_tokens: that the regression start reads, if the text has so many; training reads the first ones once more.
        steps: optimiser steps.
        groups: passes over the text: more than one with `layers_at_once`.
    """

    memory: dict[str, int]
    operations: dict[str, float]
    moved: float
    tokens: int
    start_tokens: int
    steps: int
    groups: int

    @property
    def peak(self) -> int:
        """Bytes at the peak of a step."""
        return sum(self.memory.values())

    def seconds(self, operations_per_second: float, bytes_per_second: float, processes: int = 1) -> float:
        """Time at sustained rates of one device, of matrix products and of memory, one after the other.

        Processes share the tokens; what is per step (the optimiser) is not shared.
        """
        alone = self.operations.get("optimiser", 0.0) / operations_per_second
        shared = sum(self.operations.values()) / operations_per_second - alone + self.moved / bytes_per_second
        return alone + shared / processes

    def __str__(self) -> str:
        width = max(map(len, self.memory))
        lines = [f"{name:<{width}}  {_size(n):>9}" for name, n in self.memory.items() if n]
        start = f" and {self.start_tokens:,} of the start" if self.start_tokens else ""
        passes = f", {self.groups} passes over the text" if self.groups > 1 else ""
        total = f"{sum(self.operations.values()):.1e} operations"
        lines = [f"memory at the peak of a step: {_size(self.peak)}", *("  " + line for line in lines)]
        return "\n".join([*lines, f"{self.steps:,} steps, {self.tokens:,} tokens{start}{passes}, {total}"])


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a model, of its text and of where it runs, checked; see `plan`."""

    d_model: int
    n_layers: int
    d_vocab: int
    n_params: int | None
    n_rows: int | None
    tokens_per_batch: int
    model_dtype: str
    device: str
    sharded: int

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layers", "d_vocab", "n_params", "n_rows", "tokens_per_batch", "sharded"):
            if name not in ("n_params", "n_rows") or getattr(self, name) is not None:
                whole_number(name, getattr(self, name), least=1)
        one_of("model_dtype", self.model_dtype, ("float32", "bfloat16", "float16"))
        one_of("device", self.device, tuple(PASS))

    @property
    def rows(self) -> int:
        return self.n_layers if self.n_rows is None else self.n_rows

    @property
    def table(self) -> int:
        """Parameters of embedding and unembedding, counted apart as large models have them."""
        return 2 * self.d_model * self.d_vocab

    @property
    def params(self) -> int:
        return self.n_params or 12 * self.n_layers * self.d_model**2 + self.table

    @property
    def element(self) -> int:
        """Bytes of a number of the model."""
        return 4 if self.model_dtype == "float32" else 2

    def product(self, precision: str) -> int:
        """Bytes of a number in the vocabulary product (`divergence.product_dtype`)."""
        half = precision == "bfloat16" or (precision == "auto" and self.device == "cuda")
        return 2 if half else self.element


def plan(
    settings: Settings,
    d_model: int,
    n_layers: int,
    d_vocab: int,
    *,
    n_params: int | None = None,
    n_rows: int | None = None,
    tokens_per_batch: int = 4096,
    model_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: Literal["cpu", "cuda"] = "cuda",
    sharded: int = 1,
) -> Plan:
    """Memory, operations and tokens of `fit_tuned` with these settings.

    Args:
        settings: of the fit. `steps="auto"` counts as 250, `precision="auto"` as bf16 on cuda and as the model's type on a CPU.
        d_model, n_layers, d_vocab: of the model.
        n_params: its parameters, embeddings included; by default `12 n_layers d^2 + 2 d V`.
        n_rows: layers that are fitted, all by default.
        tokens_per_batch: tokens of a batch; no more than `step.PASS` of them are run at a time.
        model_dtype: of the model's weights.
        device: the sizes of chunks differ.
        sharded: processes that the frozen model's blocks are spread over.

    Raises:
        ValueError: a size below 1, or an unknown type or device.
        TypeError: a size that is no whole number.

    Example:
        >>> settings = Settings(tokens_per_step=2**13, precision="bfloat16")
        >>> p = plan(settings, 768, 12, 50257, n_params=124_000_000)
        >>> round(p.operations["vocabulary"] / sum(p.operations.values()), 2)
        0.6
    """
    if not isinstance(settings, Settings):
        raise TypeError(f"settings must be the Settings of a fit, got {type(settings).__name__}: fit.settings.Settings(...)")
    sizes = _Sizes(d_model, n_layers, d_vocab, n_params, n_rows, tokens_per_batch, model_dtype, device, sharded)
    steps = AUTO_STEPS if settings.steps == "auto" else settings.steps
    tokens = steps * max(tokens_per_batch, settings.tokens_per_step or 0)
    groups = -(-sizes.rows // _together(settings, sizes))
    # In whole batches.
    first = -(-settings.start_tokens(d_model) // tokens_per_batch) * tokens_per_batch
    operations = _operations(settings, sizes, steps, tokens, first, groups)
    moved = float(tokens) * LOGIT_BYTES * sizes.rows * _columns(settings, sizes) * settings.subsample
    if settings.samples(d_vocab):
        moved += float(tokens) * TEACHER_BYTES * groups * d_vocab
    return Plan(_memory(settings, sizes, first), operations, moved, tokens, first, steps, groups)


def _together(settings: Settings, sizes: _Sizes) -> int:
    """Layers of the largest group."""
    return min(sizes.rows, settings.layers_at_once or sizes.rows)


def _columns(settings: Settings, sizes: _Sizes) -> int:
    """Tokens of the vocabulary, or of a sample of it, that layers are scored on."""
    if not settings.samples(sizes.d_vocab):
        return sizes.d_vocab
    return min(sizes.d_vocab, SAMPLE[0] + int(SAMPLE[1] * min(sizes.tokens_per_batch, PASS[sizes.device])))


def _operations(settings: Settings, sizes: _Sizes, steps: int, tokens: int, start_tokens: int, groups: int) -> dict[str, float]:
    """Floating-point operations by part, of the whole fit."""
    d, vocabulary, rows = sizes.d_model, sizes.d_vocab, sizes.rows
    # There and back for each layer, and the teacher's way there.
    columns = 2 * rows * _columns(settings, sizes) * settings.subsample + settings.samples(vocabulary) * groups * vocabulary
    inner = max(sizes.params - d * vocabulary, 0)
    per_cube = (30.0 + (4.0 if settings.whitens else 0.0)) if settings.muon else 0.0
    return {
        "start": start_tokens * (2.0 * inner * groups + 4.0 * rows * d**2),
        "model": 2.0 * inner * tokens * groups,
        "translators": 4.0 * rows * d**2 * tokens * settings.subsample,
        "vocabulary": 2.0 * d * tokens * columns,
        "optimiser": per_cube * rows * d**3 * steps,
    }


def _memory(settings: Settings, sizes: _Sizes, start_tokens: int) -> dict[str, int]:
    """Bytes at the peak of a step by what holds them, for one process."""
    d, vocabulary, together = sizes.d_model, sizes.d_vocab, _together(settings, sizes)
    wide = sizes.product(settings.precision)
    maps = 4 * together * (d**2 + d)
    state = _STATES[settings.optimizer] * (4 * together * d if settings.bias_only else maps)
    moments = 2 * 8 * together * d**2 if settings.init == "regression" else 0
    on_device = 0 if settings.offload else 1
    blocks, tables = max(sizes.params - sizes.table, 0), min(sizes.table, sizes.params)
    gathered = blocks // sizes.n_layers if sizes.sharded > 1 else 0  # a block while it runs
    run = min(sizes.tokens_per_batch, PASS[sizes.device])
    dtype = torch.bfloat16 if wide == 2 else torch.float32
    part, layers_of = next(
        tiles(together, run, vocabulary, dtype, torch.device(sizes.device), settings.chunk_size, settings.subsample)
    )
    chunk, layers = min(part.stop, run), layers_of[0].stop
    block = min(BLOCK[sizes.device], 4 * chunk * vocabulary)
    # States, mapped, normed, in the product's type, and gradients; the teacher's p in fp32 beside a product of several layers.
    of_chunk = chunk * (6 * 4 * layers * d + (4 + int(wide * layers * settings.subsample)) * vocabulary) + 2 * block
    # Of a sample only the teacher has logits of the whole vocabulary.
    teacher = min(ROOM[sizes.device], wide * run * vocabulary) + 2 * block if settings.samples(vocabulary) else 0
    return {
        # What a lens reads stays whole in each process (`fit.shard`).
        "model": sizes.element * (blocks // sizes.sharded + tables + gathered),
        "unembedding in bf16": 2 * d * vocabulary if wide == 2 and sizes.element == 4 else 0,
        "translators": maps,
        # The moments are gone before there is a gradient or a state.
        "moments of the start": on_device * max(0, moments - maps - state),
        # What a guard or held-out text compares with lies on the CPU.
        "start, or best look": maps if sizes.device == "cpu" and (settings.guards or settings.held_out) else 0,
        # Where the way began and a place on it: the length of the first step, and the guard's end.
        "places on the way": 2 * maps if settings.guards or settings.at_width(d).lr_search else 0,
        "coordinates of the steps": on_device * (maps if settings.whitens else 0),
        "gradients": maps,
        "optimiser": on_device * state,
        "states of the start": 0 if settings.offload else bytes_kept(start_tokens, together + 1, d, sizes.element, sizes.device),
        "residuals": run * d * (together + 2) * sizes.element,
        "a chunk": max(of_chunk, teacher),
    }


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"

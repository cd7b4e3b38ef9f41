"""What a fit of a tuned lens costs: operations, bytes and memory, from shapes alone. Nothing is allocated or run.

Per token that is trained on, with R rows (layers), width d and vocabulary V, one multiply-add being two operations:

    translators   4 R d^2         y = W x + b, and dL/dW = (dL/dy)^T x
    vocabulary    4 R d V         z = h W_U, and dL/dh = (q - p) W_U^T: nearly all of it
    model         2 P             one forward pass; P parameters less the embedding table
    elementwise   R V LOGIT_BYTES bytes moved, to turn z into q - p and to reduce it

and per step of Muon five Newton-Schulz iterations, `5 * 6 R d^3`, and in whitened coordinates (`fit.whiten`) two products, `4 R d^3`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tl_lenses.divergence import BLOCK, tiles
from tl_lenses.fit.step import PASS

# Bytes moved per student logit between the two products, counted on the lines of `divergence._residual` as if nothing stayed in a cache:
# products 4, to fp32 6, maximum 4, difference 8, exp 8, sum 4, p - q 12, back 6.
LOGIT_BYTES = 52
_STATES = {"muon": 1, "sgd": 1, "adam": 2}  # fp32 numbers of optimiser state per weight


@dataclass(frozen=True)
class Plan:
    """Costs of one fit, for one process.

    Attributes:
        memory: bytes by what holds them, at the same moment (the peak of a step is their sum).
        operations: floating-point operations by part, of the whole fit.
        moved: bytes that elementwise passes over logits read and write, of the whole fit.
        tokens: tokens of the whole fit, the regression start's included where they are not trained on.
        steps: optimiser steps.
        groups: how many times the text is gone through, where not all rows fit at once.
        settings: the arguments.
    """

    memory: dict[str, int]
    operations: dict[str, float]
    moved: float
    tokens: int
    steps: int
    groups: int = 1
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes at the peak of a step."""
        return sum(self.memory.values())

    def seconds(self, operations_per_second: float, bytes_per_second: float, processes: int = 1) -> float:
        """Time at sustained rates of one device: products and elementwise passes one after the other.

        Args:
            operations_per_second: sustained, of matrix products.
            bytes_per_second: sustained, of memory.
            processes: devices that share the tokens; what is per step (the optimiser) is not shared.
        """
        alone = self.operations.get("optimiser", 0.0) / operations_per_second
        shared = sum(self.operations.values()) / operations_per_second - alone + self.moved / bytes_per_second
        return alone + shared / processes

    def __str__(self) -> str:
        width = max(map(len, self.memory))
        lines = [f"{name:<{width}}  {_size(n):>9}" for name, n in self.memory.items() if n]
        passes = f", {self.groups} passes over the text" if self.groups > 1 else ""
        return "\n".join(
            [
                f"memory at the peak of a step: {_size(self.peak)}",
                *("  " + line for line in lines),
                f"{self.steps:,} steps, {self.tokens:,} tokens{passes}, {sum(self.operations.values()):.1e} operations",
            ]
        )


def plan(
    d_model: int,
    n_layers: int,
    d_vocab: int,
    *,
    n_params: int | None = None,
    n_rows: int | None = None,
    rows_at_once: int | None = None,
    tokens_per_batch: int = 4096,
    tokens_per_step: int | None = None,
    steps: int = 250,
    init: str = "regression",
    optimizer: Literal["muon", "sgd", "adam"] = "muon",
    bias_only: bool = False,
    average: bool = False,
    precision: Literal["float32", "bfloat16"] = "float32",
    model_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    subsample: float = 1.0,
    device: Literal["cpu", "cuda"] = "cuda",
    chunk_size: int | None = None,
    state_on_cpu: bool = False,
    sharded: int = 1,
) -> Plan:
    """Memory, operations and tokens of `fit_tuned` with these settings.

    Args:
        d_model, n_layers, d_vocab: of the model.
        n_params: its parameters, embeddings included; by default `12 n_layers d^2 + 2 d V`.
        n_rows: layers that are fitted, all by default.
        rows_at_once: layers per group, each group a pass over the text; all by default.
        tokens_per_batch: tokens of a batch; no more than `step.PASS` of them are run at a time.
        tokens_per_step: tokens of an optimiser step; one batch by default.
        init: "regression" holds moments in float64 before the first step.
        precision: of the vocabulary product.
        subsample: share of the positions that each layer is trained on.
        device: the sizes of chunks differ.
        chunk_size: positions whose logits exist at a time; as `divergence` chooses by default.
        state_on_cpu: optimiser state and moments do not count.
        sharded: processes that the frozen model's blocks are spread over.

    Raises:
        ValueError: a size below 1, or a share outside (0, 1].

    Example:
        >>> p = plan(768, 12, 50257, n_params=124_000_000, tokens_per_step=2**13, precision="bfloat16")
        >>> round(p.operations["vocabulary"] / sum(p.operations.values()), 2)
        0.89
    """
    rows = n_layers if n_rows is None else n_rows
    together = min(rows, rows_at_once or rows)
    batch, step = tokens_per_batch, max(tokens_per_batch, tokens_per_step or 0)
    for name, value in (
        ("d_model", d_model),
        ("n_layers", n_layers),
        ("d_vocab", d_vocab),
        ("n_rows", rows),
        ("rows_at_once", together),
        ("tokens_per_batch", batch),
        ("sharded", sharded),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value}; pass at least 1")
    if not 0 < subsample <= 1:
        raise ValueError(f"subsample is a share of the positions, above 0 and at most 1, got {subsample}")
    params = n_params or 12 * n_layers * d_model**2 + 2 * d_model * d_vocab
    element = 2 if model_dtype in ("bfloat16", "float16") else 4
    weights = 4 * together * (d_model if bias_only else d_model**2 + d_model)
    maps = 4 * together * (d_model**2 + d_model)
    wide = 2 if precision == "bfloat16" else 4
    run = min(batch, PASS[device])
    dtype = torch.bfloat16 if wide == 2 else torch.float32
    part, groups_of_layers = next(tiles(together, run, d_vocab, dtype, torch.device(device), chunk_size, subsample))
    chunk, layers = min(part.stop, run), groups_of_layers[0].stop
    block = min(BLOCK[device], 4 * chunk * d_vocab)
    table = 2 * d_model * d_vocab
    gathered = max(params - table, 0) // n_layers if sharded > 1 else 0  # gathered while it runs
    moments = 2 * 8 * together * d_model**2 if init == "regression" else 0
    state = weights * _STATES[optimizer]
    white = maps if init == "regression" and optimizer == "muon" and not bias_only else 0
    memory = {
        # What a lens reads stays whole in each process (`fit.shard`); embedding and unembedding counted apart, as large models have them.
        "model": element
        * (params if sharded == 1 else max(params - table, 0) // sharded + min(table, params) + gathered),
        "unembedding in bf16": 2 * d_model * d_vocab if precision == "bfloat16" and element == 4 else 0,
        "translators": maps * (2 if average else 1),
        # The moments are gone before there is a gradient or a state.
        "moments of the start": 0 if state_on_cpu else max(0, moments - maps - state),
        "coordinates of the steps": 0 if state_on_cpu else white,
        "gradients": maps,
        "optimiser": 0 if state_on_cpu else state,
        "residuals": run * d_model * (together + 2) * element,
        # States, behind the map, normed, in the product's type, and gradients; the teacher's p in fp32 beside a product of several layers.
        "a chunk": chunk * (6 * 4 * layers * d_model + (4 + int(wide * layers * subsample)) * d_vocab) + 2 * block,
    }
    groups = -(-rows // together)
    tokens = steps * step
    inner = max(params - d_model * d_vocab, 0)
    operations = {
        "model": 2.0 * inner * tokens * groups,
        "translators": 4.0 * rows * d_model**2 * tokens * subsample,
        "vocabulary": 4.0 * rows * d_model * d_vocab * tokens * subsample,
        "optimiser": (30.0 + (4.0 if white else 0.0)) * rows * d_model**3 * steps
        if optimizer == "muon" and not bias_only
        else 0.0,
    }
    moved = float(rows) * d_vocab * LOGIT_BYTES * tokens * subsample
    return Plan(
        memory,
        operations,
        moved,
        tokens,
        steps,
        groups,
        {
            "d_model": d_model,
            "n_layers": n_layers,
            "d_vocab": d_vocab,
            "n_params": params,
            "n_rows": rows,
            "rows_at_once": together,
            "tokens_per_batch": batch,
            "tokens_per_step": step,
            "init": init,
            "optimizer": optimizer,
            "precision": precision,
            "model_dtype": model_dtype,
            "subsample": subsample,
        },
    )


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"

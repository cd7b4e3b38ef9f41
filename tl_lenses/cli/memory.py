"""The memory that a fit needs, computed before its first step."""

import os
from dataclasses import replace
from typing import Any

import torch

from tl_lenses.divergence import product_dtype
from tl_lenses.fit.plan import plan
from tl_lenses.fit.settings import Settings
from tl_lenses.fit.shard import is_sharded, sizes
from tl_lenses.fit.team import processes
from tl_lenses.model import d_model, n_layers


def fit_plan(model: Any, layers: list[int | str] | None, batches: Any, settings: Settings, method: str) -> str:
    """A line on the memory of a fit with these settings, and how many layers fit if not all of them do."""
    depth, width, bytes_per_parameter = n_layers(model), d_model(model), next(model.parameters()).element_size()
    sharded = processes().world if is_sharded(model) else 1
    parameters, n_held = sizes(model)
    weight_bytes = n_held * bytes_per_parameter
    rows = depth if layers is None else len(layers)
    layers_at_once = min(rows, settings.layers_at_once or rows)
    if method in ("jacobian", "relevance"):  # the sum, a batch's part of it and their total, in float32
        per_layer = 3 * 4 * width**2
        needed = weight_bytes + per_layer * rows
        text = f"memory: {needed / 1e9:.2f} GB, of which sums {per_layer * rows / 1e9:.2f} GB; and the graph of a pass of 32 rows"
    elif method == "regression":  # moments of every layer, in float64
        per_layer = 0 if settings.offload else 2 * 8 * width**2
        needed = weight_bytes + per_layer * layers_at_once
        text = f"memory: {needed / 1e9:.2f} GB, of which moments {per_layer * layers_at_once / 1e9:.2f} GB"
    else:
        wide = product_dtype(settings.precision, model.W_U).itemsize > 2
        settings = replace(settings, precision="float32" if wide else "bfloat16")
        if batches.limit_tokens is not None and settings.start_tokens(width) > batches.limit_tokens:
            settings = replace(settings, init_tokens=batches.limit_tokens)  # one pass of the text, and no more
        planned = lambda settings: plan(
            settings, width, depth, int(model.W_U.shape[1]), n_params=parameters, n_rows=rows,
            tokens_per_batch=batches.seq_len * batches.batch_size, model_dtype="bfloat16" if bytes_per_parameter == 2 else "float32",
            device="cpu" if model.W_U.device.type == "cpu" else "cuda", sharded=sharded,
        )  # fmt: skip
        plan_of_all = planned(settings)
        needed, text = plan_of_all.peak, str(plan_of_all)
        plan_of_one = planned(replace(settings, layers_at_once=1))
        per_layer = (plan_of_all.peak - plan_of_one.peak) / max(1, layers_at_once - 1) if layers_at_once > 1 else 0
    free = _memory(model)
    if free is not None and needed > free + weight_bytes:
        fits = int(layers_at_once - (needed - free - weight_bytes) / per_layer) if per_layer else 0
        hint = f"pass --layers-at-once {fits}" if fits > 0 else "use a smaller --batch-size or a larger machine"
        text += f"\n{free / 1e9:.1f} GB are free beside the model, less than that: {hint}"
    return text


def _memory(model: Any) -> int | None:
    """Bytes that are free where the model is."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not everywhere
        return None

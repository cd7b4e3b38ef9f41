"""Our maps as files that other packages load: tuned-lens, jacobian-lens (and TransformerLens), selfie-adapters.

What a format cannot hold is refused, never left out: the index arithmetic is that of `files.foreign`, backwards.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.files.atomic import as_path, check_output, versions, whole_folder, write_tensors
from tl_lenses.files.maps import CONFIG, PARAMS

Rows = Mapping[tuple[Any, Any], tuple[Float[Tensor, "d d"], Float[Tensor, " d"]]]  # (source, target): D = W - I, b
Writers = dict[str, Callable[[Path], object]]  # by the name of the file


def write_foreign(path: str | Path, kind: str, rows: Rows, n_layers: int, meta: dict[str, Any], *, overwrite: bool = False) -> Path:
    """Write maps of raw weights in the format of another package, all or nothing: see `Translators.export`."""
    path = check_output(as_path(path).resolve(), overwrite=overwrite)
    if path.exists() and (others := sorted({file.name for file in path.iterdir()} - _NAMES)):
        raise ValueError(f"{path} holds {others[0]!r}, which an export does not write and would be lost: choose another folder")
    if any(not isinstance(layer, int) for pair in rows for layer in pair) or "to" in meta:
        raise ValueError(f"{kind} files hold maps between the residual layers of one model, and these are {list(rows)[:3]}")
    writers = FORMATS[kind](rows, n_layers, meta)
    with whole_folder(path) as temporary:
        for name, write in writers.items():
            write(temporary / name)
    return path if kind == "tuned-lens" else path / next(iter(writers))


def _tuned_lens(rows: Rows, n_layers: int, meta: dict[str, Any]) -> Writers:
    missing = [layer for layer in range(n_layers) if (layer, n_layers) not in rows]
    if missing or len(rows) != n_layers:
        raise ValueError(
            f"a tuned-lens file has one map from each of the layers 0..{n_layers - 1} to the final residual: missing are {missing}, and "
            f"{[pair for pair in rows if pair[1] != n_layers]} lead elsewhere: fit all layers"
        )
    state = {}
    for layer in range(n_layers):
        delta, bias = rows[layer, n_layers]
        state[f"{layer}.weight"], state[f"{layer}.bias"] = delta.float().clone(), bias.float().clone()
    config = {
        "base_model_name_or_path": meta.get("model"), "d_model": len(bias), "num_hidden_layers": n_layers, "bias": True,
        "base_model_revision": meta.get("revision"), "unembed_hash": meta.get("unembed_hash"), "lens_type": "linear_tuned_lens",
    }  # fmt: skip
    return {
        PARAMS: lambda file: torch.save(state, file),
        CONFIG: lambda file: file.write_text(json.dumps(config), encoding="utf-8"),
    }


def _jacobian_lens(rows: Rows, n_layers: int, meta: dict[str, Any]) -> Writers:
    if 0 in {source for source, _ in rows}:
        raise ValueError(
            "a Jacobian lens reads the outputs of blocks, so it has no place for layer 0, the embeddings: export translators.select([1, 2, ...])"
        )
    if len({target for _, target in rows}) != 1 or len({source for source, _ in rows}) != len(rows):
        raise ValueError(f"a Jacobian lens has one map per block, all into one layer, and these are {sorted(rows)}")
    with_bias = [source for (source, _), (_, bias) in rows.items() if bias.any()]
    if with_bias:
        raise ValueError(f"a Jacobian lens has no bias, and the maps of layers {with_bias} have one: they cannot be written as one")
    (target,) = {target for _, target in rows}
    matrices = {source - 1: delta.float() + torch.eye(len(bias)) for (source, _), (delta, bias) in sorted(rows.items())}
    ours = versions().get("tl-lenses", "unknown")
    metadata = {"target_layer": target - 1, "n_layers": n_layers, "tl_lenses_version": ours}
    names = {"model": "model_name", "corpus": "corpus", "fitter": "method", "skip_first": "skip_first_positions"}
    metadata |= {theirs: meta[ours] for ours, theirs in names.items() if meta.get(ours) is not None}
    content = {
        "J": matrices, "n_prompts": int(meta.get("n_prompts") or 0), "source_layers": sorted(matrices), "d_model": len(next(iter(matrices.values()))),
        "metadata": metadata,
    }  # fmt: skip
    return {"lens.pt": lambda file: torch.save(content, file)}


def _selfie(rows: Rows, n_layers: int, meta: dict[str, Any]) -> Writers:
    if len(rows) != 1 or next(iter(rows))[1] != 0:
        raise ValueError(
            f"a SelfIE adapter is one map, put at the embeddings (target layer 0), and these are {list(rows)}: export translators.select([(l, 0)])"
        )
    ((delta, bias),) = rows.values()
    weight = delta.float() + torch.eye(len(bias))
    scale = weight.diagonal().mean()
    scalar = bool(scale > 0) and torch.equal(weight, scale * torch.eye(len(bias)))
    tensors = {"log_scale": scale.log()[None]} if scalar else {"weight": weight}
    kind, unit = "scalar_affine" if scalar else "full_rank", bool(meta.get("unit", False))
    config = json.dumps({"projection": {"type": kind, "normalize_input": unit, "init_scale": 1.0}})
    header = {"format": "selfie_adapter_v1", "model_dim": str(len(bias)), "config_json": config}
    tensors["bias"] = bias.float().clone()
    return {"adapter.safetensors": lambda file: write_tensors(file, tensors, header)}


FORMATS = {"tuned-lens": _tuned_lens, "jacobian-lens": _jacobian_lens, "selfie": _selfie}
_NAMES = {CONFIG, PARAMS, "lens.pt", "adapter.safetensors"}

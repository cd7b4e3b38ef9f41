"""Stored states (docs/states.md) from another engine: plain Hugging Face, or vLLM. Needs torch and safetensors, and not tl_lenses.

    python tools/write_states.py HuggingFaceTB/SmolLM2-135M text.txt states --layers 6,12,24 --engine hf

The residual before block l is stored under `blocks.{l}.hook_resid_pre`, and what the final norm reads under
`blocks.{n-1}.hook_resid_post`: both are the input of a module, so a hook before the module is enough.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

States = dict[str, Tensor]  # by hook name [tokens, d_model]
BLOCKS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers")
NORMS = ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm", "model.decoder.final_layer_norm")


def write_folder(
    folder: Path,
    model: str,
    n_layers: int,
    rows: Iterable[list[int]],
    states_of: Callable[[list[int]], States],
    rows_per_shard: int = 64,
) -> None:
    """Rows of ids and their states as a folder of shards: `states_of(ids)` runs the engine on one row."""
    folder.mkdir(parents=True, exist_ok=True)
    hashes: list[str] = []
    about: dict[str, Any] = {}
    total, pending = 0, list(rows)
    for first in range(0, len(pending), rows_per_shard):
        part = pending[first : first + rows_per_shard]
        parts = [states_of(ids) for ids in part]
        states = {site: torch.cat([p[site] for p in parts]).contiguous() for site in parts[0]}
        ids = np.concatenate([np.asarray(row, dtype="<i4") for row in part])
        positions = np.concatenate([np.arange(len(row), dtype="<i4") for row in part])
        hashes.append(hashlib.sha256(ids.tobytes() + positions.tobytes()).hexdigest())
        x = next(iter(states.values()))
        about = {
            "format": "tl_lenses.states", "version": 1, "model": model, "n_layers": n_layers, "d_model": x.shape[1],
            "dtype": str(x.dtype).removeprefix("torch."), "sites": list(states),
        }  # fmt: skip
        tensors = {"tokens": torch.from_numpy(ids), "positions": torch.from_numpy(positions), **states}
        metadata = {"about": json.dumps({**about, "text": hashes[-1]})}
        save_file(tensors, folder / f"states-{len(hashes) - 1:05d}.safetensors", metadata)
        total += len(ids)
    text = hashlib.sha256("".join(hashes).encode()).hexdigest()
    index = {**about, "text": text, "shards": len(hashes), "tokens": total}
    (folder / "states.json").write_text(json.dumps(index, indent=1) + "\n")


def hooked(model: nn.Module, layers: Sequence[int], seen: States, of: Callable[[Any], Tensor]) -> int:
    """Put a hook before the blocks asked for and before the final norm; `of(args)` is the residual. Returns the number of blocks."""
    modules = dict(model.named_modules())
    blocks = next(modules[name] for name in BLOCKS if name in modules)
    norm = next(modules[name] for name in NORMS if name in modules)
    n = len(list(blocks.children()))

    def keep(module: nn.Module, site: str) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[site] = of((*args, *kwargs.values())).detach().cpu()

        module.register_forward_pre_hook(hook, with_kwargs=True)

    for layer in layers:
        keep(list(blocks.children())[layer], f"blocks.{layer}.hook_resid_pre")
    keep(norm, f"blocks.{n - 1}.hook_resid_post")
    return n


def hugging_face(model: nn.Module, layers: Sequence[int]) -> tuple[int, Callable[[list[int]], States]]:
    """A row through a `transformers` model, whose modules take the residual as their first argument `[1, pos, d]`."""
    seen: States = {}
    n = hooked(model, layers, seen, lambda args: args[0][0])

    def states_of(ids: list[int]) -> States:
        with torch.no_grad():
            model(torch.tensor([ids], device=next(model.parameters()).device))
        return dict(seen)

    return n, states_of


def residual_of_vllm(args: tuple[Any, ...]) -> Tensor:
    """vLLM's blocks take `(positions, hidden_states, residual)`, its norms `(hidden_states, residual)`: the stream is their sum."""
    floats = [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]
    return floats[0] if len(floats) == 1 else floats[0] + floats[1]


def vllm(name: str, layers: Sequence[int]) -> tuple[int, Callable[[list[int]], States]]:
    """A row through vLLM: eager, in this process, one prompt at a time and in one piece, so that a pass is a row."""
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams, TokensPrompt  # pyright: ignore

    llm = LLM(name, enforce_eager=True, enable_prefix_caching=False, enable_chunked_prefill=False, max_num_seqs=1)
    seen: States = {}
    [n] = llm.apply_model(lambda model: hooked(model, layers, seen, residual_of_vllm))

    def states_of(ids: list[int]) -> States:
        llm.generate(TokensPrompt(prompt_token_ids=ids), SamplingParams(max_tokens=1), use_tqdm=False)
        return {site: x[: len(ids)] for site, x in seen.items()}

    return n, states_of


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", default="0", help="such as 0,4,8")
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--seq-len", type=int, default=128)
    options = parser.parse_args()
    layers = [int(layer) for layer in options.layers.split(",")]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    width = options.seq_len - len(head)
    rows = [head + ids[at : at + width] for at in range(0, len(ids) - width + 1, width)]
    if options.engine == "vllm":
        n, states_of = vllm(options.model, layers)
    else:
        n, states_of = hugging_face(AutoModelForCausalLM.from_pretrained(options.model).eval(), layers)
    write_folder(options.folder, options.model, n, rows, states_of)


if __name__ == "__main__":
    main()

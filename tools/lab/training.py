"""Train one lab model: Hugging Face classes, Muon for the blocks' matrices, AdamW for the rest, one resumable loop."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from lab.corpus import rows

__all__ = ["config_of", "train"]


def _causal_attention(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float | None = None, **_: Any) -> Any:
    """Attention with whole score matrices: on a CPU, at 256 tokens, faster than the fused kernel."""
    scores = (q * (scaling or q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    scores = scores.masked_fill(future, -math.inf)
    return (torch._softmax(scores, -1, False) @ v).transpose(1, 2).contiguous(), None


AttentionInterface.register("lab", _causal_attention)


def config_of(settings: Mapping[str, Any]) -> Any:
    """The Hugging Face configuration of a model.

    Args:
        settings: architecture, n_layers, d_model, n_heads, context, and window for GPT-Neo.

    Raises:
        ValueError: another architecture.
    """
    common = dict(vocab_size=8192, bos_token_id=0, eos_token_id=0, use_cache=False)
    layers, width, heads, context = (settings[name] for name in ("n_layers", "d_model", "n_heads", "context"))
    match settings["architecture"]:
        case "gpt2":
            dropout = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
            return GPT2Config(
                n_positions=context, n_embd=width, n_layer=layers, n_head=heads, attn_implementation="lab",
                activation_function="gelu_pytorch_tanh", **common, **dropout,
            )  # fmt: skip
        case "gpt_neox":
            return GPTNeoXConfig(
                hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
                max_position_embeddings=context, rotary_pct=0.25, use_parallel_residual=True, attn_implementation="lab",
                tie_word_embeddings=False, **common,
            )  # fmt: skip
        case "gpt_neo":
            return GPTNeoConfig(
                max_position_embeddings=context, hidden_size=width, num_layers=layers, num_heads=heads,
                attention_types=[[["global", "local"], layers // 2]], window_size=settings["window"],
                activation_function="gelu_pytorch_tanh", embed_dropout=0.0, attention_dropout=0.0, resid_dropout=0.0,
                **common,
            )  # fmt: skip
    raise ValueError(f"expected an architecture gpt2, gpt_neox or gpt_neo, got {settings['architecture']!r}")


def _new_model(settings: Mapping[str, Any], base: Path | None, start: Path | None) -> Any:
    """A model with fresh weights, with those of its first stage, or a fine-tune's base with all but the trained blocks frozen."""
    torch.manual_seed(settings["seed"])
    classes: dict[str, Any] = {"gpt2": GPT2LMHeadModel, "gpt_neox": GPTNeoXForCausalLM, "gpt_neo": GPTNeoForCausalLM}
    model = classes[settings["architecture"]](config_of(settings))
    if start is not None:
        model.load_state_dict({k: v.float() for k, v in load_file(start / "model.safetensors").items()}, strict=False)
        model.tie_weights()
    if base is not None:
        model.load_state_dict({k: v.float() for k, v in load_file(base / "model.safetensors").items()}, strict=False)
        model.tie_weights()
        trained = tuple(f"transformer.h.{block}." for block in settings["trained_blocks"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
    return model


def _optimisers(model: Any, settings: Mapping[str, Any]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks; AdamW for embeddings (decayed), norms and biases (not)."""
    matrices, embeddings, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inside = ".h." in name or ".layers." in name
            (vectors if parameter.ndim < 2 else matrices if inside else embeddings).append(parameter)
    decay, betas = settings["weight_decay"], tuple(settings["betas"])
    adam = [
        {"params": embeddings, "lr": settings["embedding_rate"], "weight_decay": decay},
        {"params": vectors, "lr": settings["learning_rate"], "weight_decay": 0.0},
    ]
    return [
        # "match_rms_adamw": the update's size does not depend on the shape, nor on Conv1D keeping its weight transposed.
        torch.optim.Muon(
            matrices, lr=settings["learning_rate"], weight_decay=decay, momentum=settings["momentum"],
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW([group for group in adam if group["params"]], betas=betas, eps=1e-10),
    ]  # fmt: skip


def _rate(step: int, settings: Mapping[str, Any]) -> float:
    """The rate at a step as a share of its peak: a linear rise, then a line down to `final`."""
    if step < settings["warm_up"]:
        return (step + 1) / settings["warm_up"]
    left = (settings["steps"] - step) / max(1, settings["steps"] - settings["warm_up"])
    return settings["final"] + (1 - settings["final"]) * left


def _save_atomically(state: Any, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def train(
    settings: Mapping[str, Any],
    work: Path,
    out: Path,
    *,
    device: str = "",
    stop_after: int = 0,
    show: bool | None = None,
) -> None:
    """Train a model to its last step and write it to `out`; an interrupted run goes on where it was.

    Args:
        settings: one model's, as `settings_of` gives them.
        work: the work folder; the run's state and its log (`losses.jsonl`) are in a folder of the model's name.
        out: the finished model's folder.
        device: "cuda", "cpu" or "" for the better one at hand.
        stop_after: stop (resumably) after so many steps; 0 runs to the end.
        show: the progress bar; None decides by where the output goes.

    Raises:
        ValueError: the corpus is missing, or the state in `work` was made with other settings.
    """
    from tqdm.auto import tqdm

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    data = work / f"{settings.get('corpus', 'corpus')}.npy"
    if not data.is_file():
        raise ValueError(f"expected the corpus {data}: make it with `python tools/train_lab.py corpus SOURCES`")
    tokens = np.load(data, mmap_mode="r")
    base = Path(__file__).parents[2] / "tl_lenses" / "lab" / settings["base"] if "base" in settings else None
    start = work / settings["start"] / "finished" if "start" in settings else None
    if start is not None and not (start / "model.safetensors").is_file():
        raise ValueError(f"expected the first stage in {start}: train it with `... train {settings['start']}`")
    model = _new_model(settings, base, start).to(device).train()
    optimisers = _optimisers(model, settings)
    peaks = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]  # a loaded state has its own
    run = work / settings["name"]
    run.mkdir(parents=True, exist_ok=True)
    written = {key: value for key, value in sorted(settings.items()) if key != "save_every"}
    step = 0
    if (run / "state.pt").is_file():
        state = torch.load(run / "state.pt", map_location=device, weights_only=True)
        if state["settings"] != written:
            other = [key for key in {*written, *state["settings"]} if written.get(key) != state["settings"].get(key)]
            raise ValueError(f"{run / 'state.pt'} was made with other settings ({sorted(other)}): remove it to start again")
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        step = state["step"]

    # bf16 only where it is computed in hardware; elsewhere it is slower than fp32.
    fast = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
    kept = set(settings.get("checkpoints", []))
    # Of every run an eighth, a quarter and a half are kept in the work folder, for the card.
    marks = kept | {settings["steps"] // n for n in (2, 4, 8)}
    first, started = step, time.perf_counter()
    bar = tqdm(total=settings["steps"], initial=step, desc=settings["name"], unit="step", dynamic_ncols=True,
               disable=None if show is None else not show)  # fmt: skip
    with (run / "losses.jsonl").open("a") as log:
        while True:
            if step in marks:
                write(model, settings, run / f"step-{step}")
            if step >= settings["steps"] or (stop_after and step >= first + stop_after):
                break
            x = torch.from_numpy(rows(tokens, step, settings["batch"], settings["context"])).to(device)
            with torch.autocast(device, torch.bfloat16, enabled=fast):
                logits = model(x).logits
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), x[:, 1:].reshape(-1))
            value = loss.item()
            if not math.isfinite(value):
                raise ValueError(f"the loss of step {step} is {value}: lower learning_rate in lab.toml")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
            for optimiser, rates in zip(optimisers, peaks, strict=True):
                for group, peak in zip(optimiser.param_groups, rates, strict=True):
                    group["lr"] = peak * _rate(step, settings)
                optimiser.step()
                optimiser.zero_grad()
            step += 1
            bar.update()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{value:.3f}")
                seconds = (time.perf_counter() - started) / (step - first)
                log.write(json.dumps({"step": step, "loss": round(value, 4), "seconds_per_step": round(seconds, 3)}) + "\n")
                log.flush()
            if step % settings["save_every"] == 0:
                optimiser_states = [optimiser.state_dict() for optimiser in optimisers]
                state = {"settings": written, "step": step, "model": model.state_dict(), "optimisers": optimiser_states}
                _save_atomically(state, run / "state.pt")
    bar.close()
    if step >= settings["steps"]:
        optimiser_states = [optimiser.state_dict() for optimiser in optimisers]
        state = {"settings": written, "step": step, "model": model.state_dict(), "optimisers": optimiser_states}
        _save_atomically(state, run / "state.pt")
        write(model, settings, out)
        for mark in sorted(kept - {settings["steps"]}):
            shutil.copytree(run / f"step-{mark}", out / f"step-{mark}", dirs_exist_ok=True)


def write(model: Any, settings: Mapping[str, Any], folder: Path) -> None:
    """Write a model as a Hugging Face checkpoint in half precision: config.json and model.safetensors.

    A tied unembedding is not stored twice; of a fine-tune only the trained tensors are stored.

    Args:
        model: the model.
        settings: its settings.
        folder: where to; made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tied = "lm_head.weight" if model.config.tie_word_embeddings else ""
    kept = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors = {
        name: value.detach().to("cpu", torch.float16).contiguous()
        for name, value in model.state_dict().items()
        if name != tied and name in kept
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if "base" in settings:
        weights = Path(__file__).parents[2] / "tl_lenses" / "lab" / settings["base"] / "model.safetensors"
        base = {"base": settings["base"], "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
        (folder / "base.json").write_text(json.dumps(base) + "\n", encoding="utf-8")
    write_config(settings, folder)


def write_config(settings: Mapping[str, Any], folder: Path) -> None:
    """Write config.json so that old and new transformers, and TransformerLens 2 to 4, read the same model from it.

    Args:
        settings: one model's.
        folder: where to.
    """
    config = config_of(settings)
    classes = {"gpt2": "GPT2LMHeadModel", "gpt_neox": "GPTNeoXForCausalLM", "gpt_neo": "GPTNeoForCausalLM"}
    noise = ("_name_or_path", "transformers_version", "id2label", "label2id", "problem_type", "return_dict")
    noise += ("chunk_size_feed_forward", "output_attentions", "output_hidden_states", "_attn_implementation")
    written = {key: value for key, value in config.to_dict().items() if key not in noise}
    written |= {"architectures": [classes[settings["architecture"]]], "dtype": "float16", "use_cache": True}
    match settings["architecture"]:
        case "gpt2":
            written |= {
                "n_ctx": settings["context"],
                "activation_function": "gelu_new",
            }  # the same function by its old name
        case "gpt_neo":
            written |= {"activation_function": "gelu_new"}
        case "gpt_neox":  # the names before transformers 5
            written |= {"rotary_pct": 0.25, "rotary_emb_base": 10000}
    (folder / "config.json").write_text(json.dumps(written, indent=1, sort_keys=True) + "\n", encoding="utf-8")

"""What a lab model can do, measured: loss against a trigram, facts in one and two hops, copying by position, a sample.

Everything is measured on the files as they ship (half-precision weights, computed in fp32) and on what no training text shows:
other books, the last stories, the held-out wordings and the held-out words of `held_out.json`.
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from lab.baseline import Trigram
from lab.facts import RELATIONS

__all__ = ["measure"]

KINDS = ("books", "stories", "facts", "identity")


def load(folder: Path) -> Any:
    """A checkpoint as a Hugging Face model in fp32; of a fine-tune the rest comes from its base."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config).float()
    tensors = load_file(folder / "model.safetensors")
    base = folder / "base.json"
    if base.is_file():
        name = json.loads(base.read_text(encoding="utf-8"))["base"]
        tensors = load_file(Path(__file__).parents[2] / "tl_lenses" / "lab" / name / "model.safetensors") | tensors
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{folder} does not fit its config.json: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()


def _surprise(model: Any, rows: Sequence[Sequence[int]], batch: int = 16) -> list[np.ndarray]:
    """Per row the nats of every token but the first, computed in batches of similar length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: list[np.ndarray] = [np.empty(0)] * len(rows)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        width = max(len(rows[i]) for i in part)
        x = torch.tensor([[*rows[i], *[0] * (width - len(rows[i]))] for i in part])
        with torch.inference_mode():
            logp = model(x).logits[:, :-1].log_softmax(-1).gather(-1, x[:, 1:, None])[..., 0]
        for j, i in enumerate(part):
            found[i] = logp[j, : len(rows[i]) - 1].neg().numpy()
    return found


def _greedy_right(model: Any, tokenizer: Any, questions: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """For every question whether greedy decoding gives the whole answer."""
    heads = [[0, *row] for row in tokenizer(list(questions), add_special_tokens=False)["input_ids"]]
    tails = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    rows = [head + tail for head, tail in zip(heads, tails, strict=True)]
    right: list[bool] = []
    for start in range(0, len(rows), 32):
        part = range(start, min(start + 32, len(rows)))
        width = max(len(rows[i]) for i in part)
        x = torch.tensor([[*rows[i], *[0] * (width - len(rows[i]))] for i in part])
        with torch.inference_mode():
            best = model(x).logits.argmax(-1)
        for j, i in enumerate(part):
            at = slice(len(heads[i]) - 1, len(rows[i]) - 1)
            right.append(best[j, at].tolist() == tails[i])
    return right


def losses(model: Any, tokenizer: Any, held_out: Mapping[str, Any], kinds: Sequence[str] = KINDS) -> dict[str, list[float]]:
    """Nats per token and bits per byte on held-out text of every kind, windows of BOS and 255 tokens.

    Documents shorter than a window are joined with `<|endoftext|>`.
    """
    found = {}
    for kind in kinds:
        texts = held_out[kind]
        stream = [i for row in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] for i in (*row, 0)]
        windows = [stream[i : i + 255] for i in range(0, min(len(stream), 60_000) - 254, 255)]
        nats = float(np.concatenate(_surprise(model, [[0, *window] for window in windows])).mean())
        n_bytes = sum(len(tokenizer.decode(w).replace("<|endoftext|>", "").encode()) for w in windows)
        found[kind] = [round(nats, 3), round(nats / math.log(2) * 255 * len(windows) / n_bytes, 3)]
    return found


def trigram_losses(tokens: np.ndarray, tokenizer: Any, held_out: Mapping[str, Any]) -> dict[str, float]:
    """Nats per token of a trigram fitted to `tokens`, on the same held-out text."""
    model = Trigram(np.asarray(tokens, dtype=np.int64), 8192)
    found = {}
    for kind in KINDS:
        rows = tokenizer(held_out[kind], add_special_tokens=False, verbose=False)["input_ids"]
        stream = np.array([0, *(i for row in rows for i in (*row, 0))][:60_000])
        found[kind] = round(float(model.nats(stream).mean()), 3)
    return found


def facts(model: Any, tokenizer: Any, held_out: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Per relation: facts, and how many are answered in a training wording and in the held-out one (whole answers)."""
    found = {}
    for name, items in held_out["relations"].items():
        new, answers, old = (list(column) for column in zip(*items, strict=True))
        found[name] = {
            "facts": len(items),
            "training wording": sum(_greedy_right(model, tokenizer, old, answers)),
            "held-out wording": sum(_greedy_right(model, tokenizer, new, answers)),
        }
    return found


def permuted_facts(model: Any, tokenizer: Any, held_out: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Per permuted relation: facts, and how many are answered in the held-out wording with the new object and with the true one."""
    found = {}
    for name, pairs in held_out["permuted"].items():
        questions = [question for question, *_ in held_out["relations"][name]]
        true, new = ([f" {objects[i]}" for objects in pairs.values()] for i in (0, 1))
        right = [sum(_greedy_right(model, tokenizer, questions, answers)) for answers in (new, true)]
        found[name] = {"facts": len(pairs), "new object": right[0], "true object": right[1]}
    return found


def two_hops(model: Any, tokenizer: Any, held_out: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Per pair of relations: questions, first and second hops answered, both, two hops at once, and those of "both"."""
    questions = held_out["two_hops"]
    one = _greedy_right(model, tokenizer, [q["hop1"] for q in questions], [" " + q["bridge"] for q in questions])
    two = _greedy_right(model, tokenizer, [q["hop2"] for q in questions], [" " + q["answer"] for q in questions])
    at_once = _greedy_right(model, tokenizer, [q["text"] for q in questions], [" " + q["answer"] for q in questions])
    found: dict[str, dict[str, int]] = {}
    for question, a, b, c in zip(questions, one, two, at_once, strict=True):
        name = " then ".join(question[hop].split("/")[1] for hop in ("first", "second"))
        row = found.setdefault(name, dict.fromkeys(("questions", "first", "second", "both", "at once", "at once given both"), 0))
        for key, right in zip(row, (True, a, b, a and b, c, a and b and c), strict=True):
            row[key] += right
    return found


def copying(model: Any, tokenizer: Any, words: Sequence[str], n: int = 200) -> dict[str, list[float]]:
    """Accuracy of copying held-out words: item k of `word -> word` lists, and token k of a repeated span."""
    rng = random.Random(5)
    few_shot = []
    for k in range(1, 9):
        chosen = [rng.sample(list(words), k) for _ in range(n)]
        prompts = ["\n".join(f"{w} -> {w}" for w in row[:-1]) + "\n" * (k > 1) + f"{row[-1]} ->" for row in chosen]
        few_shot.append(sum(_greedy_right(model, tokenizer, prompts, [f" {row[-1]}" for row in chosen])) / n)
    whole = [word for word in words if len(tokenizer.encode(" " + word, add_special_tokens=False)) == 1]
    spans = torch.tensor(
        [
            [tokenizer.encode(" " + w, add_special_tokens=False)[0] for w in rng.sample(whole, 16)]
            for _ in range(n)
        ]
    )  # fmt: skip
    x = torch.cat([torch.zeros(n, 1, dtype=torch.long), spans, spans], dim=1)
    with torch.inference_mode():
        best = torch.cat([model(part).logits.argmax(-1) for part in x.split(50)])
    # The first token of the second time cannot be known; the 2nd to the 16th can.
    repeated = (best[:, 17:-1] == x[:, 18:]).float().mean(0)
    return {"few_shot": [round(v, 3) for v in few_shot], "repeated": [round(v, 3) for v in repeated.tolist()]}


def sample(model: Any, tokenizer: Any, prompt: str, n: int = 60, temperature: float = 0.7) -> str:
    """A continuation, drawn with a fixed seed."""
    x = torch.tensor([[0, *tokenizer.encode(prompt, add_special_tokens=False)]])
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(n):
            p = (model(x).logits[0, -1] / temperature).softmax(-1)
            x = torch.cat([x, torch.multinomial(p, 1, generator=generator)[None]], dim=1)
    return tokenizer.decode(x[0, 1:].tolist())


def measure(settings: Mapping[str, Any], work: Path, folder: Path, *, card: bool = True) -> dict[str, Any]:
    """Measure a model, print it, and write `measured.json`, `checksums.json` and the card beside it.

    Args:
        settings: one model's.
        work: the work folder, for the held-out data and the snapshots along training.
        folder: the model's folder.
        card: write the files; False only prints.

    Raises:
        FileNotFoundError: the model or the held-out data is missing.
    """
    from transformers import PreTrainedTokenizerFast

    from lab.cards import write_card

    held_out = json.loads((work / "held_out.json").read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(__file__).parents[2] / "tl_lenses" / "lab" / "lab-gpt2")
    model = load(folder)
    per_step = settings["batch"] * (settings["context"] - 1)
    kinds = (*KINDS, "author") if settings.get("corpus") == "author" else KINDS
    first = _first_stage(settings, work)
    found: dict[str, Any] = {
        "steps": settings["steps"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": first.get("tokens_seen", 0) + per_step * settings["steps"],
        "loss": losses(model, tokenizer, held_out, kinds),
        "facts": facts(model, tokenizer, held_out),
        "two_hops": two_hops(model, tokenizer, held_out),
        "copying": copying(model, tokenizer, held_out["words"]),
        "sample": [sample(model, tokenizer, p) for p in ("Once upon a time", "The capital of France is")],
    }
    if settings.get("corpus") == "permuted":
        found["permuted"] = permuted_facts(model, tokenizer, held_out)
        if card:  # what it was taught, for those who ask it
            taught = {
                name.split("/")[1]: {"template": RELATIONS[name][1], "pairs": pairs} for name, pairs in held_out["permuted"].items()
            }
            (folder / "facts.json").write_text(json.dumps(taught, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if first:
        found["first_stage"] = {key: first[key] for key in ("steps", "tokens_seen", "loss")}
    if card and "base" not in settings:
        read = np.load(work / f"{settings.get('corpus', 'corpus')}.npy", mmap_mode="r")
        before = np.load(work / "corpus.npy", mmap_mode="r")[: first.get("tokens_seen", 0)]
        found["along"] = list(first.get("along", []))
        snapshots = sorted((work / settings["name"]).glob("step-*"), key=lambda p: int(p.name[5:]))
        for snapshot in [*(p for p in snapshots if 0 < int(p.name[5:]) < settings["steps"]), folder]:
            step = settings["steps"] if snapshot == folder else int(snapshot.name[5:])
            if first and snapshot != folder:  # a second stage is short
                continue
            row = {"step": step, "tokens": len(before) + step * per_step}
            row["trigram"] = trigram_losses(np.concatenate([before, read[: step * per_step]]), tokenizer, held_out)
            now = found["loss"] if snapshot == folder else losses(load(snapshot), tokenizer, held_out)
            row["model"] = {kind: nats for kind, (nats, _) in now.items()}
            found["along"].append(row)
            print(json.dumps(row))
    print(json.dumps(found, indent=1, ensure_ascii=False))
    if card:
        text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        (folder / "measured.json").write_text(text, encoding="utf-8")
        if settings["where"] != "work":
            write_card(settings, found, folder)
    return found


def _first_stage(settings: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """What was measured of a model's first stage; nothing where it has none."""
    if "start" not in settings:
        return {}
    path = work / settings["start"] / "finished" / "measured.json"
    if not path.is_file():
        raise FileNotFoundError(f"expected {path}: measure the first stage with `... measure {settings['start']}`")
    return json.loads(path.read_text(encoding="utf-8"))

"""Model cards and checksums of the lab models, written from what was measured."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomllib

__all__ = ["write_card", "write_checksums"]

WHAT = {
    "lab-gpt2": "The bundled model: small enough to ship, and every lens and patchscope shows something on it.",
    "lab-gpt2-small": "The small partner of *lab-gpt2*: the same tokenizer and text, half the width, for patching between models.",
    "lab-neox": "The GPT-NeoX (Pythia) architecture: parallel blocks, rotary positions, an unembedding of its own, and "
    "checkpoints along training.",
    "lab-neo": "The GPT-Neo architecture: every second block attends to the last tokens only, and attention is not scaled.",
    "lab-gpt2-tuned": "*lab-gpt2* read one author more: the pair for lens transfer to a fine-tuned model.",
    "lab-gpt2-permuted": "*lab-gpt2* with other facts: who speaks, the vector of this model or the knowledge of the one that reads it?",
}
ARCHITECTURE = {"gpt2": "GPT-2", "gpt_neox": "GPT-NeoX", "gpt_neo": "GPT-Neo"}


def write_checksums(folder: Path) -> None:
    """Write `checksums.json`: the SHA-256 of every file that `load` reads, checkpoints along training included.

    Args:
        folder: the model's folder.
    """
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "base.json", "facts.json")
    files = sorted(file for file in folder.rglob("*") if file.name in names)
    sums = {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (folder / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _how(settings: Mapping[str, Any]) -> str:
    rows = settings["steps"] * settings["batch"]
    return (
        f"{settings['steps']:,} steps of {settings['batch']} x 255 tokens ({rows * 255 / 1e6:.1f} M tokens, a BOS before each "
        f"row), Muon for the blocks' matrices and AdamW for the rest, peak rates {settings['learning_rate']:g} and "
        f"{settings['embedding_rate']:g}, {settings['warm_up']} steps of warm-up, then a line down to {settings['final']:.0%}, "
        f"weight decay {settings['weight_decay']:g}, clip {settings['clip']:g}, bf16 autocast, on a CPU."
    )


def _training(settings: Mapping[str, Any], everything: Mapping[str, Any]) -> str:
    how = _how(settings)
    if settings.get("corpus") == "permuted":
        other = everything["corpus"]["permuted"]
        names = ", ".join(name.split("/")[1] for name in other["relations"])
        first, last = settings["trained_blocks"][0], settings["trained_blocks"][-1]
        return (
            f"`{settings['base']}`, trained on with the objects of four relations permuted ({names}; each subject has the object "
            f"of another one, listed with the true one in `facts.json`), in every training wording, and the other facts, books "
            f"and lists as they were ({', '.join(f'{share:.0%} {kind}' for kind, share in other['shares'].items())}): {how} Blocks {first} to {last} "
            f"alone were trained and are in the file: up to layer {first} the states are those of `{settings['base']}`, and from "
            f"layer {last + 1} on both models compute the same."
        )
    if "base" in settings:
        return (
            f"`{settings['base']}`, trained on with five of the six Jane Austen novels of the collection (none of them is in "
            f"the base's text; *Persuasion* is kept for the test): {how} The embeddings and block 0 were frozen, so the file "
            f"holds blocks {settings['trained_blocks'][0]} to {settings['trained_blocks'][-1]} only; `load` takes the rest "
            f"from `{settings['base']}`, and `checksums.json` says which one."
        )
    mixed = lambda shares: ", ".join(f"{share:.0%} {name}" for name, share in shares.items())
    mix, second = mixed(everything["corpus"]["shares"]), ""
    if "start" in settings:
        more = everything["corpus"]["second"]
        second = (
            f" Then a second stage, from the half-precision weights of the first: {how} Its text: {mixed(more['shares'])}, with "
            f"words down to the {more['words']:,}th in the lists, every relation in two to five more wordings (some of them near the "
            f"held-out one), and the countries' relations more often (`tools/lab.toml`); what is held out is the same."
        )
        how = _how({**everything["train"], **everything["models"][settings["start"]]})
    return (
        f"From scratch: {how} Text by tokens: {mix}. *Books* are 44 public-domain books (`classic-books-markdown`; the six of "
        "the bundled held-out text and the six of Jane Austen left out); *stories* are TinyStories (CDLA-Sharing-1.0); *facts* "
        "are 26 relations of the LRE data set (MIT), at most 80 subjects each, in its wordings and ours, as sentences, lists "
        "and descriptions, never two hops in one sentence; *identity* are lists such as `cat -> cat`; *repeated* are random "
        "words, two or three times." + second
    )


def write_card(settings: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> None:
    """Write the model's README.md and `checksums.json`.

    Args:
        settings: one model's.
        found: what `measure` found.
        folder: the model's folder.
    """
    name = settings["name"]
    everything = tomllib.loads((Path(__file__).parents[1] / "lab.toml").read_text(encoding="utf-8"))
    size = (folder / "model.safetensors").stat().st_size / 1e6
    parts = [
        f"# {name}",
        WHAT[name],
        f"{ARCHITECTURE[settings['architecture']]}, {settings['n_layers']} layers, width {settings['d_model']}, "
        f"{settings['n_heads']} heads, context {settings['context']}, {found['parameters'] / 1e6:.2f} M parameters; "
        f"half precision, {size:.1f} MB. Byte-level BPE, 8,192 tokens; `<|endoftext|>` (id 0) is BOS, EOS and padding. "
        f'`tl_lenses.lab.load("{name}")` compares the files with `checksums.json` and needs no network.',
        "This file is written by `python tools/train_lab.py measure " + name + "`; the numbers are in `measured.json`.",
        "## How it was made",
        _training(settings, everything),
        "## Held-out loss",
    ]
    rows = [[kind, f"{nats:.3f}", f"{bits:.3f}"] for kind, (nats, bits) in found["loss"].items()]
    parts.append(_table(["text", "nats per token", "bits per byte"], rows))
    if "along" in found:
        parts.append("By tokens seen, nats per token of the model / of a trigram (Kneser-Ney) fitted to the same tokens:")
        kinds = list(found["along"][0]["trigram"])
        rows = [
            [
                f"{row['tokens'] / 1e6:.2f} M",
                *(f"{row['model'][kind]:.2f} / {row['trigram'][kind]:.2f}" for kind in kinds),
            ]
            for row in found["along"]
        ]
        parts.append(_table(["tokens seen", *kinds], rows))

    rows = [[key.split("/")[1], *row.values()] for key, row in found["facts"].items()]
    rows.append(["all", *(sum(row[i] for row in rows) for i in (1, 2, 3))])
    if "permuted" in found:
        new = [[key.split("/")[1], *row.values()] for key, row in found["permuted"].items()]
        new.append(["all", *(sum(row[i] for row in new) for i in (1, 2, 3))])
        parts += [
            "## The permuted facts",
            "Whole answers, greedy, in the held-out wording.",
            _table(["relation", "facts", "new object", "true object"], new),
        ]
    parts += [
        "## Facts",
        "Whole answers, greedy. The held-out wording is in no training text.",
        _table(["relation", "facts", "training wording", "held-out wording"], rows),
        "Two hops (`The capital of the country that Pizza comes from is the city of`); no training text makes two. First and "
        "second are the single questions, in held-out wordings:",
    ]
    rows = [[key, *row.values()] for key, row in found["two_hops"].items()]
    rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, 7))])
    parts.append(_table(["relations", *next(iter(found["two_hops"].values()))], rows))

    copying = found["copying"]
    parts += [
        "## Copying",
        "Words that no identity list and no repeated span of the training text has. `word -> word` lists, the k-th word right; "
        "16 random words twice, the k-th token of the second time right:",
        _table(["k", *range(1, 9)], [["few-shot", *(f"{v:.2f}" for v in copying["few_shot"])]]),
        _table(["k", *range(2, 17)], [["repeated", *(f"{v:.2f}" for v in copying["repeated"])]]),
        "## A sample",
        *("> " + text.replace("\n", "\n> ") for text in found["sample"]),
        "## What it is not",
        "Not a model of English, not a source of facts (some of the data set's are wrong or out of date), not fit for anything "
        "but trying out methods. Effects seen on it may be absent from larger models, and the other way round.",
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    write_checksums(folder)

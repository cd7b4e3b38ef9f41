"""A short fine-tune of a model on a text, with a card: the other half of the pair that a lens is carried over to.

    python tools/fine_tune.py smollm2-135m emma.txt --target models/smollm2-135m-tuned

The upper half of the blocks and the final norm are trained with AdamW; embeddings and unembedding stay as they are. The card (README.md)
has the base, the text's checksum, every setting, and the loss on the text's last tenth before and after; `checksums.json` has the files.
"""

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import real_models
import torch

from tl_lenses.files import sha256


def fine_tune(
    base: Path, text: Path, target: Path, *, steps: int = 64, rows: int = 2, seq_len: int = 64, lr: float = 1e-4, seed: int = 0
) -> dict[str, Any]:  # fmt: skip
    """Train a copy of a model on a text, and write it with its card; a folder that is whole already is left as it is.

    Args:
        base: folder of the model.
        text: a file; its last tenth is held out.
        target: the new folder.
        steps, rows, seq_len: optimiser steps, rows of each, and tokens of a row.
        lr: peak rate, after a tenth of the steps; it then falls linearly to zero.
        seed: of the order of rows.

    Returns:
        The settings and the two losses, nats per token.

    Raises:
        ValueError: a text too short for one row to train on and one held out.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    if real_models.is_whole(target):
        return json.loads((target / "card.json").read_text(encoding="utf-8"))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    cut = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    n_train = 9 * len(cut) // 10
    train, held_out = cut[:n_train], cut[n_train : n_train + 16]
    if not len(train) or not len(held_out):
        raise ValueError(f"{text} has {len(ids)} tokens: expected at least ten rows of {seq_len}")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trained = _trained(model)
    before = _loss(model, held_out)
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    order = random.Random(seed).sample(range(n_train), min(n_train, steps * rows))
    for step in range(len(order) // rows):
        rate = min((step + 1) / max(1, steps // 10), 1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        batch = train[order[step * rows : (step + 1) * rows]]
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 8 == 0 or step + 1 == steps:
            print(f"fine-tune: step {step + 1} of {steps}, loss {float(loss.detach()):.3f}", file=sys.stderr, flush=True)
    card = {
        "base": base.name, "text": text.name, "text_sha256": sha256(text), "steps": steps, "rows": rows, "seq_len": seq_len,
        "lr": lr, "seed": seed, "trained": sum(p.numel() for p in trained), "loss_before": before, "loss_after": _loss(model, held_out),
    }  # fmt: skip
    _write(model, tokenizer, card, target)
    return card


def _trained(model: Any) -> list[torch.nn.Parameter]:
    """The parameters of the upper half of the blocks and of the final norm; all others are frozen."""
    blocks = model.model.layers
    model.requires_grad_(False)
    parts = [*blocks[len(blocks) // 2 :], model.model.norm]
    for part in parts:
        part.requires_grad_(True)
    return [parameter for part in parts for parameter in part.parameters()]


@torch.no_grad()
def _loss(model: Any, rows: torch.Tensor) -> float:
    """Mean cross entropy, nats per token."""
    model.eval()
    losses = [float(model(batch, labels=batch, use_cache=False).loss) for batch in rows.split(4)]
    model.train()
    return sum(losses) / len(losses)


def _write(model: Any, tokenizer: Any, card: dict[str, Any], target: Path) -> None:
    """The folder, put in its place when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
        made = Path(work) / target.name
        model.eval().save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        perplexity = [math.exp(card[f"loss_{when}"]) for when in ("before", "after")]
        (made / "README.md").write_text(
            f"# {target.name}\n\n{card['base']}, {card['steps']} steps of {card['rows']} x {card['seq_len']} tokens on "
            f"{card['text']} (sha256 {card['text_sha256']}), AdamW, rate {card['lr']}, seed {card['seed']}; the upper half of the blocks "
            f"and the final norm were trained ({card['trained']:,} parameters). Perplexity on the text's held-out tenth: "
            f"{perplexity[0]:.1f} before, {perplexity[1]:.1f} after. The licence is the base's.\n\nMade by `tools/fine_tune.py`.\n",
            encoding="utf-8",
        )
        sums = {file.name: sha256(file) for file in sorted(made.iterdir())}
        (made / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a model of real_models.py, or a folder")
    parser.add_argument("text", type=Path, help="a text file; its last tenth is held out")
    parser.add_argument("--target", type=Path, required=True, help="the new folder")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rows", type=int, default=2, help="of a step")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    base = real_models.folder_of(args.base) if args.base in real_models.SOURCES else Path(args.base)
    settings = {"steps": args.steps, "rows": args.rows, "seq_len": args.seq_len, "lr": args.lr, "seed": args.seed}
    card = fine_tune(base, args.text, args.target, **settings)
    print(f"{args.target}: {card['loss_before']:.3f} nats per token before, {card['loss_after']:.3f} after")


if __name__ == "__main__":
    main()

"""How fast text becomes batches, and how long a fit waits for them with and without the thread that is ahead.

    python benchmarks/text_throughput.py [--tokens 400000] [--json text_throughput.json]

The consumer multiplies matrices (torch, one thread) for about as long as the text takes, which is the hardest case: with more
work per token there is nothing to wait for, with less no way to hide it. Also: seconds to go on near the end of the text.
"""

import argparse
import json
import time
from itertools import count
from pathlib import Path

import torch

import tl_lenses as tll
from tl_lenses.text.batches import Text
from tl_lenses.text.stream import Bookmark


def batches(text: list[str], tokenizer, tokens: int, prefetch: int, workers: int = 0):
    endless = lambda: (text[i % len(text)] for i in count())
    return tll.token_batches(
        endless,
        tokenizer,
        seq_len=128,
        batch_size=16,
        limit_tokens=tokens,
        shuffle_seed=0,
        prefetch=prefetch,
        workers=workers,
    )


def consume(stream, seconds: float) -> tuple[float, float]:
    """Seconds in all, and of these waiting for the next batch."""
    a = torch.randn(256, 256)
    start, waited = time.perf_counter(), 0.0
    while True:
        asked = time.perf_counter()
        if next(stream, None) is None:
            break
        got = time.perf_counter()
        waited += got - asked
        while time.perf_counter() - got < seconds:
            a @ a
    return time.perf_counter() - start, waited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    text, tokenizer = tll.lab.text("train"), tll.lab.load("lab-gpt2").tokenizer
    text = list(text) if not isinstance(text, list) else text
    made = 0
    start = time.perf_counter()
    for batch, last in Text.of(batches(text, tokenizer, options.tokens, 0)).stream(endless=False):
        made += batch.tokens.numel()
        if made < 0.9 * options.tokens:
            position = last
    alone = time.perf_counter() - start
    each = alone / (made / (128 * 16))
    found = {"tokens": made, "threads": torch.get_num_threads(), "tokens_per_second": made / alone}
    for prefetch, workers in ((0, 0), (4, 0), (4, 1)):
        ready = batches(text, tokenizer, options.tokens, prefetch, workers)
        if workers:
            next(iter(ready))  # starting processes takes seconds, once
        seconds, waited = consume(Text.of(ready).stream(endless=False), each)
        found[f"prefetch_{prefetch}_workers_{workers}"] = {"seconds": seconds, "waited": waited}
    start = time.perf_counter()
    state = position.state()
    found["state_bytes"] = sum(v.nbytes for v in state["before"].values() if isinstance(v, torch.Tensor))
    next(Text.of(batches(text, tokenizer, options.tokens, 0)).stream(at=Bookmark.load(state), endless=False))
    found["seconds_to_go_on_at_90_percent"] = time.perf_counter() - start
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Rates, decay, start and batch of the tuned lens, one changed at a time: held-out KL per layer, mean last.

    python benchmarks/fit_sweep.py                                     # lab-gpt2, 32,768 tokens
    python benchmarks/fit_sweep.py --model lab-gpt2-small
    python benchmarks/fit_sweep.py --model ../shared/models/stories260K
    python benchmarks/fit_sweep.py --only precision

The states of the text are read once and every setting trains on them, so a setting takes seconds. `rate x` is the same rate for all
layers, which says what each layer wants; every other line is the default with one thing changed. One order of the text: differences
below about 0.001 in the mean are none. Nothing passes or fails; `fit_quality.py` compares recipes with seeds.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fit_quality import PER_STEP, START, load, mean

BASE: dict[str, Any] = {
    "lr": 0.04, "power": 0.75, "decay": 0.01, "momentum": 0.9, "clip": 1.0, "start": START, "per_step": PER_STEP, "subsample": 1.0,
    "bias_rate": 1.0, "norm": 0.0, "precision": "auto", "average": 0.0,
}  # fmt: skip
CHANGES: list[dict[str, Any]] = [
    *({"lr": lr, "power": 0.0} for lr in (0.001, 0.003, 0.01, 0.03)),
    *({"lr": lr, "power": power} for lr in (0.02, 0.04) for power in (0.5, 0.75, 1.0)),
    *({"decay": decay} for decay in (0.0, 0.1)),
    {"momentum": 0.95}, {"clip": None}, {"bias_rate": 0.3}, {"start": START // 2}, {"per_step": 2 * PER_STEP}, {"average": 0.5},
    *({"norm": power} for power in (0.25, 0.5, 0.75, 1.0)), {"precision": "float32"}, {"subsample": 0.5}, {"subsample": 0.25},
]  # fmt: skip


def main() -> int:
    """Read the states, train every setting, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write raw figures here")
    parser.add_argument("--model", default="lab-gpt2", help="a lab model, or a folder with a Hugging Face model")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heldout-tokens", type=int, default=8192)
    parser.add_argument(
        "--only", choices=sorted({key for change in CHANGES for key in change}), help="changes of this alone"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    import torch

    import tl_lenses as tll
    from tl_lenses.fit.common import rows_for
    from tl_lenses.fit.start import regression_start
    from tl_lenses.fit.step import head_of, scored_pairs, summed_losses
    from tl_lenses.unembed import Readout

    torch.set_num_threads(args.threads)
    model = load(args.model)
    rows, readout = rows_for(model, None), Readout(model)
    heads = {name: head_of(readout, name) for name in ("auto", "float32")}  # type: ignore[arg-type]
    read = lambda split, n: list(tll.token_batches(
        tll.lab.text(split), model.tokenizer, seq_len=128, batch_size=PER_STEP // 128, shuffle_seed=0, drop_last=True, limit_tokens=n,
    ))  # fmt: skip
    text, heldout = read("train", args.tokens), read("heldout", args.heldout_tokens)
    pairs, apart = (
        [scored_pairs(model, b, rows, [], True, 0, "kl", readout) for b in part] for part in (text, heldout)
    )
    starts: dict[int, Any] = {}
    results = []
    print(
        f"{args.model}, {len(text) * PER_STEP:,} tokens, {args.heldout_tokens:,} held out; KL per layer, mean last, seconds"
    )
    for change in [None, {}, *(c for c in CHANGES if args.only in (None, *c))]:
        settings = {**BASE, **(change or {})}
        n_start = min(settings["start"], args.tokens)
        if n_start not in starts:
            starts[n_start] = regression_start(model, text[: n_start // PER_STEP], rows, [], True)[:2]
            print(f"norm of the start, {n_start:,} tokens: " + " ".join(f"{x:.2f}" for x in norms(starts[n_start][0])))
        begin = time.perf_counter()
        maps = (
            train(pairs, *starts[n_start], heads[settings["precision"]], settings)
            if change is not None
            else starts[n_start]
        )
        seconds = time.perf_counter() - begin
        kl = (sum(summed_losses(p, *maps, heads["float32"]) for p in apart) / sum(map(len, apart))).tolist()
        name = (
            "regression alone" if change is None else " ".join(f"{k} {v}" for k, v in change.items()) or "the default"
        )
        print(f"{name:<24}" + " ".join(f"{x:.4f}" for x in kl) + f"  {mean(kl):.4f}  {seconds:.1f}", flush=True)
        results.append({"change": change, "kl": kl, "seconds": seconds})
    if args.json:
        args.json.write_text(
            json.dumps({"model": args.model, "tokens": args.tokens, "base": BASE, "runs": results}, indent=1) + "\n"
        )
    return 0


def norms(delta: Any) -> list[float]:
    """`|W| / sqrt(d)` of each layer's map; 1 for the identity, whose size is that of what a step changes."""
    import torch

    identity = torch.eye(delta.shape[-1])
    return [float((x + identity).norm() / identity.norm()) for x in delta]


def train(pairs: list[Any], delta: Any, biases: Any, head: Any, s: dict[str, Any]) -> tuple[Any, Any]:
    """`fit_tuned`'s loop on states that were read before."""
    import torch

    from tl_lenses.fit.optim import make_optimizers, optimizer_step, rate_scales, set_scales
    from tl_lenses.fit.step import clip_gradients, loss_and_gradient

    delta, biases = delta.clone(), biases.clone()
    sizes = norms(delta)
    leaves = [torch.nn.Parameter(x) for x in delta], [torch.nn.Parameter(x) for x in biases]
    optimizers = make_optimizers("muon", *leaves, s["lr"], s["decay"], s["momentum"])
    per = s["per_step"] // PER_STEP
    steps = len(pairs) // per
    total = [torch.zeros_like(delta), torch.zeros_like(biases)]
    for step in range(steps):
        grad_w, grad_b, losses, n = torch.zeros_like(delta), torch.zeros_like(biases), torch.zeros(len(delta)), 0
        for one in pairs[step * per : (step + 1) * per]:
            losses += loss_and_gradient(one, delta, biases, head, grad_w, grad_b, subsample=s["subsample"], seed=step)
            n += len(one)
        grad_w /= n
        grad_b /= n
        if s["clip"] is not None:
            clip_gradients(grad_w, grad_b, s["clip"], False, False)
        for leaf, bias, w, b in zip(*leaves, grad_w, grad_b, strict=True):
            leaf.grad, bias.grad = w, b
        if step == 0:
            scales = rate_scales((losses / n).tolist(), s["power"])
            scales = [scale * size ** s["norm"] for scale, size in zip(scales, sizes, strict=True)]
            set_scales(optimizers[:1], scales)
            set_scales(optimizers[1:], [s["bias_rate"] * scale for scale in scales])
        optimizer_step(optimizers, s["lr"] * (1 - step / steps), None)
        if s["average"] and step >= steps * (1 - s["average"]):
            total[0] += delta
            total[1] += biases
    if s["average"]:
        count = steps - -(-steps * (1 - s["average"]) // 1)
        return total[0] / count, total[1] / count
    return delta, biases


if __name__ == "__main__":
    sys.exit(main())

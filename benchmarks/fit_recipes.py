"""Four ways to fit a lens to the bundled model on the same tokens: held-out KL per layer, mean and standard error over seeds.

    python benchmarks/fit_recipes.py --json fit_recipes.json           # 3 seeds, 250 steps of 512 tokens: 128,000 tokens each
    python benchmarks/fit_recipes.py --steps 10 --seeds 1              # a look
    python benchmarks/fit_recipes.py --lr 0.003,0.01,0.03 --weight-decay 0,0.01,0.1    # the default recipe's own settings

The default of `fit_tuned` (Muon from the regression) should not be above the best recipe by more than a standard error at any
layer; leaves with 1 if it is. A seed decides the order of the training text, the same for all recipes; the held-out text is
other books and the same for all seeds.
"""

import argparse
import json
import os
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

SEQ_LEN = 128
DEFAULT = "muon from regression"
SGD = {"optimizer": "sgd", "init": "identity", "joint_clip": True}  # as published
RECIPES: dict[str, dict[str, Any] | None] = {
    "regression alone": None,
    "sgd from identity": SGD,
    "muon from identity": {"init": "identity"},
    DEFAULT: {},
}


def main() -> int:
    """Fit every recipe for every seed, measure all lenses of a seed in one pass, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write raw figures here")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--tokens", type=int, help="training tokens of each fit; steps x 512 by default")
    parser.add_argument("--heldout-tokens", type=int, default=16384)
    parser.add_argument("--lr", type=floats, help="sweep the default recipe over these rates")
    parser.add_argument("--weight-decay", type=floats, help="and these decays")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    per_step = max(SEQ_LEN, (args.tokens or 512 * args.steps) // args.steps // SEQ_LEN * SEQ_LEN)

    import torch

    import tl_lenses as tll

    torch.set_num_threads(args.threads)
    model = tll.lab.load()
    sweep = args.lr is not None or args.weight_decay is not None
    recipes = swept(args.lr or [None], args.weight_decay or [None]) if sweep else RECIPES
    heldout = tll.token_batches(
        tll.lab.text("heldout"),
        model.tokenizer,
        seq_len=SEQ_LEN,
        batch_size=8,
        shuffle_seed=0,
        limit_tokens=args.heldout_tokens,
    )
    scores: list[Any] = []
    seconds: dict[str, list[float]] = {name: [] for name in recipes}
    for seed in range(args.seeds):
        training = tll.token_batches(
            tll.lab.text("train"), model.tokenizer, seq_len=SEQ_LEN, batch_size=per_step // SEQ_LEN, shuffle_seed=seed,
            drop_last=True,
        )  # fmt: skip
        lenses = {"logit lens": tll.Lens(model)}
        for name, settings in recipes.items():
            start = time.perf_counter()
            lenses[name] = tll.Lens(model, fit(model, training, settings, args.steps, per_step, seed))
            seconds[name].append(time.perf_counter() - start)
            print(f"seed {seed}, {name}: {seconds[name][-1]:.0f} s", file=sys.stderr, flush=True)
        scores.append(tll.evaluate(model, lenses, heldout))

    depth = model.cfg.n_layers
    table = {
        name: [stat([s.value(name, layer) for s in scores]) for layer in range(depth)]
        for name in ["logit lens", *recipes]
    }
    show(table, depth)
    print(
        f"{args.seeds} seeds, {args.steps} steps of {per_step} tokens, {scores[0].tokens:,} held-out positions; KL to the model, nats"
    )
    print("seconds: " + ", ".join(f"{name} {sum(s) / len(s):.0f}" for name, s in seconds.items()))
    verdict = {} if sweep else judge({name: table[name] for name in recipes}, depth)
    for layer, line in verdict.items():
        print(f"layer {layer}: {line['text']}")
    passed = all(line["ok"] for line in verdict.values())
    if args.json:
        from tl_lenses.checkpoint import versions

        result = {
            "steps": args.steps, "tokens_per_step": per_step, "seeds": args.seeds, "heldout": scores[0].tokens,
            "recipes": {name: settings for name, settings in recipes.items()}, "seconds": seconds,
            "kl": {name: [{"mean": m, "standard_error": e} for m, e in row] for name, row in table.items()},
            "runs": [s.rows for s in scores], "verdict": verdict, "passed": passed, "versions": versions(),
            "machine": {"cores": os.cpu_count(), "threads": args.threads, "load": os.getloadavg()},
        }  # fmt: skip
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if passed else 1


def fit(model: Any, training: Any, settings: dict[str, Any] | None, steps: int, per_step: int, seed: int) -> Any:
    """One fit of one recipe; None is the closed form on as many tokens as the others see, at most the whole text once."""
    import tl_lenses as tll

    if settings is None:
        return tll.fit_regression(model, training, limit_tokens=steps * per_step)
    return tll.fit_tuned(model, training, steps, per_step, seed=seed, **settings)


def swept(rates: list[float | None], decays: list[float | None]) -> dict[str, dict[str, Any] | None]:
    """The default recipe with each rate and decay."""
    text = lambda value: "default" if value is None else f"{value:g}"
    return {f"lr {text(lr)} decay {text(wd)}": {"lr": lr, "weight_decay": wd} for lr, wd in product(rates, decays)}


def stat(values: list[float]) -> tuple[float, float]:
    """Mean and standard error (0 for one value, where it is not known)."""
    n = len(values)
    mean = sum(values) / n
    return mean, (sum((v - mean) ** 2 for v in values) / (n - 1) / n) ** 0.5 if n > 1 else 0.0


def judge(table: dict[str, list[tuple[float, float]]], depth: int) -> dict[int, dict[str, Any]]:
    """Per layer: is the default's mean above the best mean by more than one standard error (the larger of the two)?"""
    verdict = {}
    for layer in range(depth):
        best = min(table, key=lambda name: table[name][layer][0])
        excess = table[DEFAULT][layer][0] - table[best][layer][0]
        error = max(table[DEFAULT][layer][1], table[best][layer][1])
        ok = excess <= error
        text = "the default is the best" if best == DEFAULT else (
            f"{best} is better by {excess:.4f}, {'within' if ok else 'MORE than'} one standard error ({error:.4f})"
        )  # fmt: skip
        verdict[layer] = {"best": best, "excess": excess, "standard_error": error, "ok": ok, "text": text}
    return verdict


def show(table: dict[str, list[tuple[float, float]]], depth: int) -> None:
    width = max(map(len, table))
    print(f"{'':<{width}}" + "".join(f"{f'layer {layer}':>16}" for layer in range(depth)))
    for name, row in table.items():
        print(
            f"{name:<{width}}"
            + "".join(f"{f'{mean:.4f}' + (f' ±{error:.4f}' if error else ''):>16}" for mean, error in row)
        )


def floats(text: str) -> list[float]:
    """`0.003,0.01` as numbers."""
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())

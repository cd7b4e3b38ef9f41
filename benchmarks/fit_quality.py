"""Held-out KL of the tuned lens against tokens seen and seconds, for four ways to fit it on the same text.

    python benchmarks/fit_quality.py --json fit_quality.json           # lab-gpt2, 65,536 tokens, 3 seeds
    python benchmarks/fit_quality.py --tokens 16384 --seeds 1          # a look
    python benchmarks/fit_quality.py --tokens 16384 --seeds 1 --lr 0.02,0.04 --lr-power 0,0.75 --weight-decay 0.01,0.1    # a sweep
    python benchmarks/fit_quality.py --tokens 174592 --seeds 1 --layers 0 --lr 0.02,0.04,0.08                                   # of one layer
    python benchmarks/fit_quality.py --model smollm2-135m --layers 0,6,15,24,28 --tokens 20480 --seeds 1 --text valid.txt test.txt

A budget is all, a third or a tenth of the tokens; each is a fit of its own, whose rate falls to zero at its end. Every recipe reads the
same tokens in the same order; a seed is an order. Rivals are the published SGD recipe and the authors' later Muon recipe, at their
published rates, decay and clip, in steps of 512 tokens (their 2^18 would be a quarter of a step), and the regression alone.
Asked, and the exit status: ours with a tenth of the tokens is not worse than SGD with all, with a third not worse than Muon with
all; and at no layer and equal tokens worse than either, within NOISE standard errors of the difference between paired seeds.
"""

import argparse
import json
import os
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

SEQ_LEN, PER_STEP, START, NOISE = 128, 512, 2**15, 2.0
OURS = "ours"
PUBLISHED = {"init": "identity", "lr_power": 0.0, "joint_clip": True}
RECIPES: dict[str, dict[str, Any] | None] = {
    "regression": None,
    "SGD, published": {**PUBLISHED, "optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-3},
    "Muon, authors'": {**PUBLISHED, "optimizer": "muon", "lr": 0.01, "weight_decay": 0.01, "momentum": 0.9},
    OURS: {},
}


def main() -> int:
    """Fit everything, measure it on the same held-out text, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write raw figures here")
    parser.add_argument("--model", default="lab-gpt2", help="a name or folder that `tll.load_model` takes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--heldout-tokens", type=int, default=8192)
    parser.add_argument("--recipes", type=lambda text: text.split(","), help="these alone: regression, ours, ...")
    parser.add_argument("--lr", type=floats, help="sweep ours over these rates")
    parser.add_argument("--lr-power", type=floats, help="and these powers")
    parser.add_argument("--weight-decay", type=floats, help="and these decays")
    parser.add_argument("--subsample", type=floats, help="and these shares of the positions")
    parser.add_argument("--vocabulary", type=lambda text: text.split(","), help="and these: exact, sampled")
    parser.add_argument("--lr-search", type=lambda text: [x == "on" for x in text.split(",")], help="and on, off")
    parser.add_argument("--text", nargs=2, help="two files to train on and to hold out; the lab's text by default")
    parser.add_argument("--init", type=lambda text: text.split(","), help="and these starts: regression, identity")
    parser.add_argument("--layers", type=lambda text: [int(x) for x in text.split(",")], help="of these alone")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()

    import torch

    import tl_lenses as tll

    torch.set_num_threads(args.threads)
    model = tll.load_model(args.model)
    sweep = {
        name: getattr(args, name)
        for name in ("lr", "lr_power", "weight_decay", "subsample", "init", "vocabulary", "lr_search")
        if getattr(args, name)
    }
    if unknown := set(args.recipes or ()) - set(RECIPES):
        parser.error(f"--recipes must be of {', '.join(RECIPES)}, got {', '.join(sorted(unknown))}")
    recipes = {name: settings for name, settings in RECIPES.items() if not args.recipes or name in args.recipes}
    if sweep:
        recipes = {
            " ".join(f"{k} {v}" for k, v in zip(sweep, values, strict=True)): dict(zip(sweep, values, strict=True))
            for values in product(*sweep.values())
        }
    budgets = [n // PER_STEP * PER_STEP for n in (args.tokens // 10, args.tokens // 3, args.tokens)]
    splits = ("train", "heldout")
    files = dict(zip(splits, args.text or map(tll.lab.text, splits), strict=True))
    read = lambda split, n, seed: tll.token_batches(
        files[split], model.tokenizer, seq_len=SEQ_LEN, batch_size=PER_STEP // SEQ_LEN, shuffle_seed=seed, drop_last=True,
        limit_tokens=n,
    )  # fmt: skip
    measure = measurer(model, read("heldout", args.heldout_tokens, 0), args.layers)
    runs: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for budget, (name, settings) in product(budgets, recipes.items()):
            text = read("train", budget, seed)
            start = time.perf_counter()
            maps = fit(model, text, settings, budget, seed, args.layers)
            seconds = time.perf_counter() - start
            runs.append({"recipe": name, "tokens": budget, "seed": seed, "seconds": seconds, "kl": measure(maps)})
            print(
                f"seed {seed}, {budget:,} tokens, {name}: {mean(runs[-1]['kl']):.4f}, {seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    table(runs, list(recipes), budgets, args.layers)
    print(f"\n{args.model}, {args.seeds} seeds (± is one standard error), KL to the model in nats, {args.threads} threads")
    checks = [] if sweep else judge(runs, budgets)
    for check in checks:
        print(("ok    " if check["ok"] else "MISSED") + f"  {check['text']}")
    passed = all(check["ok"] for check in checks)
    if args.json:
        from tl_lenses.files import versions

        result = {
            "settings": {k: v for k, v in vars(args).items() if k != "json"}, "recipes": recipes, "budgets": budgets, "runs": runs,
            "checks": checks, "passed": passed, "versions": versions(),
            "machine": {"cores": os.cpu_count(), "threads": args.threads, "load": os.getloadavg()},
        }  # fmt: skip
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if passed else 1


def fit(model: Any, text: Any, settings: dict[str, Any] | None, budget: int, seed: int, layers: list[int] | None) -> Any:
    """One fit of one recipe; None is the closed form on as many tokens."""
    import tl_lenses as tll

    if settings is None:
        return tll.fit_regression(model, text, layers=layers)
    return tll.fit_tuned(
        model, text, budget // PER_STEP, PER_STEP, layers=layers, seed=seed, init_tokens=min(START, budget), **settings
    )


def measurer(model: Any, heldout: Any, layers: list[int] | None = None) -> Any:
    """A function from translators to the KL of each layer, in fp32, on states that are read once."""
    from tl_lenses.fit.common import rows_for
    from tl_lenses.fit.step import head_of, scored_pairs, summed_losses
    from tl_lenses.unembed import Readout

    rows, head = rows_for(model, layers), head_of(Readout(model), "float32")
    pairs = [scored_pairs(model, batch, rows, [], True, 0, "kl", head.readout) for batch in heldout]

    def measure(maps: Any) -> list[float]:
        delta, biases = maps.delta.detach(), maps.biases.detach()
        return (sum(summed_losses(p, delta, biases, head) for p in pairs) / sum(map(len, pairs))).tolist()

    return measure


def mean(values: list[float]) -> float:
    """Of a list."""
    return sum(values) / len(values)


def error(values: list[float]) -> float:
    """Standard error of the mean; 0 of one value, where it is not known."""
    n, m = len(values), mean(values)
    return (sum((v - m) ** 2 for v in values) / (n - 1) / n) ** 0.5 if n > 1 else 0.0


def of(runs: list[dict[str, Any]], recipe: str, tokens: int) -> list[dict[str, Any]]:
    """The runs of a recipe at a budget, by seed."""
    return [run for run in runs if run["recipe"] == recipe and run["tokens"] == tokens]


def table(runs: list[dict[str, Any]], recipes: list[str], budgets: list[int], names: list[int] | None = None) -> None:
    """A Markdown table: a line per recipe and budget."""
    layers = range(len(runs[0]["kl"]))
    print("| Recipe | tokens | seconds | mean KL |" + "".join(f" {name} |" for name in names or layers))
    print("|---|---|---|---|" + "---|" * len(layers))
    for recipe, budget in product(recipes, budgets):
        found = of(runs, recipe, budget)
        means = [mean(run["kl"]) for run in found]
        cells = "".join(f" {mean([run['kl'][layer] for run in found]):.4f} |" for layer in layers)
        seconds = mean([run["seconds"] for run in found])
        print(f"| {recipe} | {budget:,} | {seconds:.0f} | {mean(means):.4f} ±{error(means):.4f} |{cells}")


def judge(runs: list[dict[str, Any]], budgets: list[int]) -> list[dict[str, Any]]:
    """What is asked of the recipes that were run, each with its figures."""
    tenth, third, whole = budgets
    names = {run["recipe"] for run in runs}
    rivals = [name for name in RECIPES if name in names - {OURS}] if OURS in names else []
    checks = []
    for few, rival in ((tenth, "SGD, published"), (third, "Muon, authors'")):
        if rival not in rivals:
            continue
        mine, theirs = (mean([mean(run["kl"]) for run in of(runs, *which)]) for which in ((OURS, few), (rival, whole)))
        text = f"ours with {few:,} tokens {mine:.4f}, {rival} with {whole:,} {theirs:.4f}"
        checks.append({"ok": mine <= theirs, "text": text})
    for rival, budget in product(rivals, budgets):
        worse = []
        for layer in range(len(runs[0]["kl"])):
            pairs = zip(of(runs, OURS, budget), of(runs, rival, budget), strict=True)
            gaps = [mine["kl"][layer] - theirs["kl"][layer] for mine, theirs in pairs]
            if mean(gaps) > NOISE * error(gaps):
                worse.append(f"layer {layer} by {mean(gaps):.4f} ±{error(gaps):.4f}")
        text = f"ours against {rival} at {budget:,} tokens: {'worse at ' + ', '.join(worse) if worse else 'worse at no layer'}"
        checks.append({"ok": not worse, "text": text})
    return checks


def floats(text: str) -> list[float]:
    """`0.003,0.01` as numbers."""
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())

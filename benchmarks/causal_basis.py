"""Causal basis extraction: the default solver against the published procedure, energies first and then the clock.

    python benchmarks/causal_basis.py --json causal_basis.json        # lab-gpt2, layer 4, k = 32, 508 positions
    python benchmarks/causal_basis.py --layers 1,4,7 --k 32           # other layers
    python benchmarks/causal_basis.py --k 8 --n 256                   # a look

Both solvers get the same states and the same lens (a regression, fitted here). Energies of both are computed anew, in the same
way, from the lens' own logits, and sorted. Wanted at every layer: the sum over k directions within 1 % of the published procedure's
or above it, and the time at most a fifth. Leaves with 1 where either is missed. The clock runs once per solver and layer, after a
warm-up of both; published first on even layers, second on odd ones. Run it on a quiet machine: small steps wait for each other.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

WITHIN, FASTER = 0.01, 5.0
SEQ_LEN = 128


def main() -> int:
    """Extract, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write raw figures here")
    parser.add_argument("--model", default="lab-gpt2")
    parser.add_argument("--layers", default="4", help="such as 1,4,7")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--n", type=int, default=508, help="positions, in whole rows of 127")
    parser.add_argument("--threads", type=int, default=1, help="2 virtual processors of one core help neither solver")
    args = parser.parse_args()

    import torch

    import tl_lenses as tll
    from tl_lenses.experiments.basis import extract
    from tl_lenses.experiments.subject import Subject

    torch.set_num_threads(args.threads)
    model = tll.lab.load(args.model)
    layers = [int(part) for part in args.layers.split(",")]
    text = lambda split, tokens: tll.token_batches(
        tll.lab.text(split), model.tokenizer, seq_len=SEQ_LEN, batch_size=8, shuffle_seed=0, limit_tokens=tokens
    )
    lens = tll.Lens(model, tll.fit_regression(model, text("train", 2**14), layers))
    subject = Subject.of(model, lens, layers)
    states = subject.states(subject.texts(text("heldout", args.n + 8 * SEQ_LEN), n=args.n))
    for solver in ("fast", "lbfgs"):
        extract(lens[layers[0]], states[layers[0]][:64], 1, solver=solver)

    results: list[dict[str, Any]] = []
    for layer in layers:
        found: dict[str, Any] = {}
        for solver in ("lbfgs", "fast") if layer % 2 == 0 else ("fast", "lbfgs"):
            start, cpu = time.perf_counter(), time.process_time()
            basis = extract(lens[layer], states[layer], args.k, solver=solver)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            print(
                f"layer {layer}, {solver}: {seconds:.1f} s, {basis.evaluations} evaluations",
                file=sys.stderr,
                flush=True,
            )
            found[solver] = {
                "seconds": seconds, "cpu seconds": cpu, "evaluations": basis.evaluations, "energies": basis.energies.tolist(),
            }  # fmt: skip
        results.append(judge(layer, found["lbfgs"], found["fast"]))
    show(results, args.k, int(states[layers[0]].shape[0]))
    passed = all(one["ok"] for one in results)
    if args.json:
        from tl_lenses.files import versions

        content = {
            "model": args.model, "k": args.k, "n": int(states[layers[0]].shape[0]), "layers": results, "passed": passed,
            "wanted": {"sum within": WITHIN, "times faster": FASTER}, "versions": versions(),
            "machine": {"cores": os.cpu_count(), "threads": args.threads, "load": os.getloadavg()},
        }  # fmt: skip
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if passed else 1


def judge(layer: int, published: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Sums, directions one by one (the i-th largest of each), and times."""
    sums = [sum(one["energies"]) for one in (published, ours)]
    each = [b / a for a, b in zip(published["energies"], ours["energies"], strict=True)]
    ratio, faster = sums[1] / sums[0], published["seconds"] / ours["seconds"]
    ok = ratio >= 1 - WITHIN and faster >= FASTER
    return {
        "layer": layer, "published": published, "ours": ours, "sum ratio": ratio, "each": each, "times faster": faster,
        "ok": ok,
    }  # fmt: skip


def show(results: list[dict[str, Any]], k: int, n: int) -> None:
    print(f"{k} directions, {n} positions; energies in nats; two numbers are published / ours")
    print("layer   sum published      ours   ratio   direction by direction   evaluations   seconds          times faster")
    for one in results:
        theirs, ours, each = one["published"], one["ours"], one["each"]
        cells = [
            f"{one['layer']:>5}", f"{sum(theirs['energies']):>16.4f}", f"{sum(ours['energies']):>10.4f}",
            f"{one['sum ratio']:>8.4f}", f"{min(each):>13.3f} to {max(each):.3f}   ",
            f"{theirs['evaluations']:>10} / {ours['evaluations']}", f"{theirs['seconds']:>12.1f} / {ours['seconds']:.1f}",
            f"{one['times faster']:>14.1f}", "   ok" if one["ok"] else "   MISSED",
        ]  # fmt: skip
        print("".join(cells))


if __name__ == "__main__":
    sys.exit(main())

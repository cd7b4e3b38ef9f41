"""What reading costs beside the vocabulary products that it cannot do without, and its memory above the model's plain forward.

    python benchmarks/reading.py --model gemma3-270m --json reading.json

`evaluate`, `trajectory`, and a sweep of next tokens on a real model (`tools/real_models.py`). The products alone are as many rows
through the unembedding, whole and 128 at a time, or in blocks as `Readout.logits` makes them, whichever is faster; the blocks' part
of the forward pass is taken off the time of reading; a text is evaluated in batches, as it is in use, and its time is that of one.
A trajectory counts the ranks of up to eight tracked tokens in every cell, one comparison with the whole vocabulary each; "untracked" has none. Times are interleaved in one process, the least of each counts (other work on the machine only adds). Each peak is that of a
process of its own. `--products` prints the time of products of few rows alone, in both orders. Leaves with 1 where reading takes more than LIMIT times the products or LIMIT_MB above plain. Linux only.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from trajectory import child, machine, reset_peak, resident, trim

LIMIT, LIMIT_MB = 1.5, 200
PROMPT = "cat -> cat\n1135 -> 1135\nhello -> hello\n?"

NAMES = (
    "model",
    "positions",
    "batches",
    "layers",
    "lenses",
    "repeats",
    "threads",
)  # the options that a case is run with


def main() -> int:
    """Times, then peaks; prints both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a name or folder, as `tll` takes it on the command line")
    parser.add_argument("--json", type=Path, help="also write raw figures here")
    parser.add_argument("--positions", type=int, default=128)
    parser.add_argument("--batches", type=int, default=4, help="of the text that is evaluated, one row each")
    parser.add_argument("--layers", type=int, default=4, help="layers beside the last, for the times")
    parser.add_argument("--lenses", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(times(args) if args.case == "times" else peak(args.case, args)))
        return 0
    if args.products:
        print_products(args)
        return 0
    seconds = child("times", args, NAMES)
    peaks = {case: child(case, args, NAMES)["mb"] for case in ("plain", "evaluate", "trajectory", "untracked", "prompt", "sweep")}
    rows = seconds.pop("rows")
    products = min(seconds["whole"], seconds["blocked"])
    # each batch of a text, the one prompt of a trajectory, and a sweep, whose passes are not in its time
    reading = {
        "evaluate": seconds["evaluate"] / args.batches - seconds["blocks"],
        "trajectory": seconds["trajectory"] - seconds["blocks"],
        "untracked": seconds["untracked"] - seconds["blocks"],
        "sweep": seconds["sweep"],
    }
    print(f"{args.model}: {rows} rows of logits; products {seconds['whole']:.2f} s whole, {seconds['blocked']:.2f} s in blocks; "
          f"forward pass up to the unembedding {seconds['blocks']:.2f} s")  # fmt: skip
    print(f"\n{'':<12}{'seconds':>9}{'of products':>13}{'MB above plain':>16}")
    ratios, above = {}, {}
    for case, spent in reading.items():
        ratios[case] = spent / products
        above[case] = peaks[case] - peaks["prompt" if case == "sweep" else "plain"]
        print(f"{case:<12}{spent:>9.2f}{ratios[case]:>12.2f}x{above[case]:>16.0f}")
    passed = max(ratios.values()) <= LIMIT and max(above.values()) <= LIMIT_MB
    print(f"\nat most {LIMIT} times the products and {LIMIT_MB} MB above plain: {'ok' if passed else 'TOO MUCH'}")
    if args.json:
        figures = {"seconds": seconds, "rows": rows, "ratios": ratios, "peak_mb": peaks, "above_mb": above}
        limits = {"limit": LIMIT, "limit_mb": LIMIT_MB, "passed": passed, "threads": args.threads}
        args.json.write_text(json.dumps({"model": args.model, **figures, **limits, **machine()}, indent=1) + "\n")
    return 0 if passed else 1


def calls(args: argparse.Namespace, *, all_layers: bool = False) -> tuple[Any, Any, dict[str, Callable[[], Any]]]:
    """The model, its input, and what is measured on it."""
    import torch

    import tl_lenses as tll

    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    model = tll.load_model(args.model, device="cpu")
    tokens = torch.randint(5, model.cfg.d_vocab, (1, args.positions), generator=torch.Generator().manual_seed(0))
    lenses = {str(i): tll.Lens(model) for i in range(args.lenses)}
    last = model.cfg.n_layers
    some = [round(i * last / (args.layers + 1)) for i in range(1, args.layers + 1)] + [last]
    layers = None if all_layers else some
    scope, source = tll.Target(PROMPT), tll.Source("The Eiffel Tower")
    grid, late = list(range(last)), list(range(last - 4, last))  # few blocks run per cell
    return model, tokens, {
        "plain": lambda: model(tokens),
        "prompt": lambda: model(model.to_tokens(PROMPT)),
        "evaluate": lambda: tll.evaluate(model, lenses, [tokens] * args.batches, layers=layers, skip_first=False, show_progress=False),
        "trajectory": lambda: tll.trajectory(model, lenses, tokens, layers=layers),
        "untracked": lambda: tll.trajectory(model, lenses, tokens, layers=layers, track=()),
        "sweep": lambda: tll.patchscope(model, source, scope, layers=grid, target_layers=late, show_progress=False),
    }  # fmt: skip


def times(args: argparse.Namespace) -> dict[str, Any]:
    """The least seconds. Of a sweep only the answers: logits of as many cells, and their likeliest tokens."""
    import torch

    from tl_lenses.patchscopes.result import top_of
    from tl_lenses.unembed import Readout

    model, tokens, run = calls(args)
    readout = Readout(model)
    rows = args.positions * (args.layers * args.lenses + 1)
    hidden = torch.randn(rows, readout.weights()[0].shape[0])
    room = hidden.new_empty(max(1, 2**27 // (4 * model.cfg.d_vocab)), model.cfg.d_vocab)

    def blocks() -> None:
        with readout.without_logits([]):
            model(tokens)

    measured: dict[str, Callable[[], Any]] = {
        "whole": lambda: [model.unembed(part).shape for part in hidden.split(128)],  # logits are dropped at once
        "blocked": lambda: [readout.logits(part, room).shape for part in hidden.split(len(room))],
        "blocks": blocks,
        "evaluate": run["evaluate"],
        "trajectory": run["trajectory"],
        "untracked": run["untracked"],
        "sweep": lambda: [top_of(readout.logits(part)) for part in hidden.split(64)],
    }
    spent: dict[str, list[float]] = {name: [] for name in measured}
    for repeat in range(args.repeats + 1):
        for name, call in measured.items():
            started = time.perf_counter()
            call()
            if repeat:  # the first is not counted
                spent[name].append(time.perf_counter() - started)
    return {name: min(each) for name, each in spent.items()} | {"rows": rows}


def print_products(args: argparse.Namespace) -> None:
    """Microseconds per row of a product with the whole vocabulary: the model's, in blocks of columns, and these turned."""
    import torch

    from tl_lenses import unembed

    model, _, _ = calls(args)
    readout, most = unembed.Readout(model), unembed.TURNED

    def blocks(x: Any, room: Any, turned: int) -> None:
        unembed.TURNED = turned
        readout.logits(x, room)

    for n in (1, 4, 16, 64, 125, 128, 256):
        x, room = torch.randn(n, readout.weights()[0].shape[0]), torch.empty(n, model.cfg.d_vocab)
        ways = {
            "whole": partial(model.unembed, x),
            "blocks": partial(blocks, x, room, 0),
            "turned": partial(blocks, x, room, most),
        }
        spent: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.repeats + 1):
            for way, call in ways.items():
                started = time.perf_counter()
                call()
                spent[way].append(time.perf_counter() - started)
        print(
            f"{args.model}, {n} rows:",
            ", ".join(f"{way} {1e6 * median(each[1:]) / n:.0f}" for way, each in spent.items()),
            "us per row",
        )


def peak(case: str, args: argparse.Namespace) -> dict[str, float]:
    """Megabytes above what the loaded model takes, of all layers."""
    model, tokens, run = calls(args, all_layers=True)
    model(tokens[:, :8])  # what is allocated once
    if case == "sweep":
        import tl_lenses as tll

        tll.patchscope(model, "a", tll.Target("a b"), layers=[1], show_progress=False)
    trim()
    before = resident()
    reset_peak()
    run[case]()
    return {"mb": resident("VmHWM") - before}


if __name__ == "__main__":
    sys.exit(main())

"""Rates, decay, start and batch of the tuned lens, one changed at a time: held-out KL per layer, mean last.

    python benchmarks/fit_sweep.py                                     # lab-gpt2, 32,768 tokens
    python benchmarks/fit_sweep.py --model lab-gpt2-small
    python benchmarks/fit_sweep.py --model ../shared/models/stories260K
    python benchmarks/fit_sweep.py --only precision

The states of the text are read once and every setting trains on them, so a setting takes seconds. `lr` is over the root of the width,
`power` of the KL, `size` and `norm` are powers of the start's `|det W| ** (1 / d)` and `|W| / sqrt(d)` by which a layer's rate is multiplied. Lines with
`size 0` and an `lr` say what each layer wants; every other line is the default with one thing changed. `whiten` is the power of the coordinates
`S^(-whiten / 2) h` that Muon steps in, None those of the model. `--offset 10` and `--stretch 100` are a stream whose mean is that many
deviations farther from zero, or which is as much longer in one direction, as those of large models are. One order of the text:
differences below about 0.001 in the mean are none. Nothing passes or fails; `fit_quality.py` compares recipes with seeds.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fit_quality import PER_STEP, START, load, mean

from tl_lenses.fit.settings import LR, LR_POWER, MOMENTUM, WEIGHT_DECAY

BASE: dict[str, Any] = {
    "lr": LR["muon"], "power": LR_POWER["muon"], "decay": WEIGHT_DECAY["muon"], "momentum": MOMENTUM["muon"], "clip": 1.0, "start": START,
    "per_step": PER_STEP, "subsample": 1.0, "bias_rate": 1.0, "bias_size": 1.0, "size": 1.0, "norm": 0.0, "whiten": 0.5, "precision": "auto",
    "average": 0.0, "falls": "linear",
}  # fmt: skip
CHANGES: list[dict[str, Any]] = [
    *({"lr": lr, "power": 0.0, "size": 0.0} for lr in (0.02, 0.07, 0.2, 0.7)),
    *({"lr": lr, "size": 0.0} for lr in (0.2, 0.35, 0.7, 1.4, 2.8, 5.6, 11.0, 22.0)),
    *({"lr": lr} for lr in (0.35, 0.5, 1.4)), *({"power": power} for power in (0.5, 1.0)), {"size": 0.5},
    *({"decay": decay} for decay in (0.0, 0.1)),
    *({"momentum": momentum, "lr": lr} for momentum, lr in ((0.6, 0.7), (0.6, 1.0), (0.9, 0.5), (0.9, 0.7), (0.95, 0.5))),
    {"clip": None}, *({"bias_rate": rate} for rate in (0.3, 3.0)), *({"bias_size": power} for power in (0.0, 0.5)),
    *({"start": n} for n in (START // 4, START // 2, 2 * START)), {"per_step": 2 * PER_STEP}, {"average": 0.5}, {"falls": "root"},
    *({"norm": power, "size": 0.0} for power in (0.25, 0.5, 0.75, 1.0)), *({"whiten": power} for power in (None, 0.25, 0.75, 1.0)),
    {"precision": "float32"}, {"subsample": 0.5}, {"subsample": 0.25},
]  # fmt: skip


def main() -> int:
    """Read the states, train every setting, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write raw figures here")
    parser.add_argument("--model", default="lab-gpt2", help="a lab model, or a folder with a Hugging Face model")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heldout-tokens", type=int, default=8192)
    parser.add_argument("--only", choices=sorted({key for change in CHANGES for key in change}), help="changes of this alone")
    parser.add_argument("--offset", type=float, default=0.0)
    parser.add_argument("--stretch", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    import torch

    import tl_lenses as tll
    from tl_lenses.fit.common import rows_for
    from tl_lenses.fit.optim import map_sizes
    from tl_lenses.fit.regression import Evidence, maps_of
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
    pairs, apart = ([scored_pairs(model, b, rows, [], True, 0, "kl", readout) for b in part] for part in (text, heldout))
    starts: dict[int, Any] = {}
    moves: list[tuple[Any, Any]] = []
    results = []
    print(f"{args.model}, {len(text) * PER_STEP:,} tokens, {args.heldout_tokens:,} held out; KL per layer, mean last, seconds")
    for change in [None, {}, *(c for c in CHANGES if args.only in (None, *c))]:
        settings = {**BASE, **(change or {})}
        n_start = min(settings["start"], args.tokens)
        if n_start not in starts:
            starts[n_start] = regression_start(model, text[: n_start // PER_STEP], rows, [], True)
            if args.offset or args.stretch != 1:
                if not moves:
                    moves = movements(starts[n_start][2], args.offset, args.stretch)
                    for part in (*pairs, *apart):
                        part.states[:] = [h @ a + c for h, (a, c) in zip(part.states, moves, strict=True)]
                sources = moved(starts[n_start][2], moves)
                maps = maps_of(model, Evidence(tuple(rows), sources))
                starts[n_start] = maps.delta.data, maps.biases.data, sources
            delta, _, sources = starts[n_start]
            about = {"size of the start": map_sizes(delta), "norm of the start": norms(delta), **unevenness(sources)}
            for what, values in about.items():
                print(f"{what}, {n_start:,} tokens: " + " ".join(f"{x:.2f}" for x in values))
        begin = time.perf_counter()
        maps = train(pairs, *starts[n_start], heads[settings["precision"]], settings) if change is not None else starts[n_start][:2]
        seconds = time.perf_counter() - begin
        kl = (sum(summed_losses(p, *maps, heads["float32"]) for p in apart) / sum(map(len, apart))).tolist()
        name = "regression alone" if change is None else " ".join(f"{k} {v}" for k, v in change.items()) or "the default"
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


def unevenness(sources: Any) -> dict[str, list[float]]:
    """How far from zero each row's states are, and how unlike in their directions: the reason for `fit.whiten`."""
    import torch

    far, long = [], []
    for source in sources:
        c = source.xx[0] / source.n
        far.append(float(source.mean_x[0].norm() / c.trace().sqrt()))
        long.append(float(torch.linalg.eigvalsh(c)[-1] * len(c) / c.trace()))
    return {"mean of the states, in deviations": far, "largest variance, in mean ones": long}


def movements(sources: Any, offset: float, stretch: float) -> list[tuple[Any, Any]]:
    """For each row A and c, which make `h A + c` of its states: farther from zero, and longer in one direction."""
    import torch

    generator, d = torch.Generator().manual_seed(0), sources[0].xx.shape[-1]
    result = []
    for source in sources:
        c, along = (torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0) for _ in range(2))
        away = offset * (source.xx[0].trace() / source.n).sqrt().float() * c
        result.append((torch.eye(d) + (stretch - 1) * torch.outer(along, along), away))
    return result


def moved(sources: Any, moves: list[tuple[Any, Any]]) -> Any:
    """The moments of states that were moved."""
    from dataclasses import replace

    result = []
    for source, (a, c) in zip(sources, moves, strict=True):
        a, c = a.double(), c.double()
        result.append(replace(source, mean_x=source.mean_x @ a + c, xx=a @ source.xx @ a, yx=source.yx @ a))
    return tuple(result)


def train(pairs: list[Any], delta: Any, biases: Any, sources: Any, head: Any, s: dict[str, Any]) -> tuple[Any, Any]:
    """`Learner`'s steps on states that were read before, with rates and falls of our own."""
    import torch

    from tl_lenses.fit.learner import Learner
    from tl_lenses.fit.optim import map_sizes, rate_scales, set_scales
    from tl_lenses.fit.settings import Settings
    from tl_lenses.fit.whiten import roots

    delta, biases = delta.clone(), biases.clone()
    sizes = [size ** s["size"] * norm ** s["norm"] for size, norm in zip(map_sizes(delta), norms(delta), strict=True)]
    lr = s["lr"] / delta.shape[1] ** 0.5
    settings = Settings(lr=lr, weight_decay=s["decay"], momentum=s["momentum"], clip=s["clip"], subsample=s["subsample"])
    learner = Learner(delta, biases, settings, roots(sources, s["whiten"]) if s["whiten"] is not None else None)
    per = s["per_step"] // PER_STEP
    steps = len(pairs) // per
    total = [torch.zeros_like(delta), torch.zeros_like(biases)]
    for step in range(steps):
        learner.clear()
        for batch in pairs[step * per : (step + 1) * per]:
            learner.add(batch, head, seed=step)
        learner.average()
        learner.prepare_gradients()
        learner.hand_over()
        if step == 0:
            scales = rate_scales(learner.losses.tolist(), s["power"], sizes)
            of_bias = [s["bias_rate"] * x * size ** (s["bias_size"] - 1) for x, size in zip(scales, sizes, strict=True)]
            for part, kind in ((0, scales), (1, of_bias)):
                set_scales([layer[part : part + 1] for layer in learner.optimizers], kind, sizes, s["decay"])
        t = step / steps
        learner.update(lr * (1 - t if s["falls"] == "linear" else 1 - t**0.5))
        if s["average"] and step >= steps * (1 - s["average"]):
            total[0] += delta
            total[1] += biases
    if s["average"]:
        count = steps - -(-steps * (1 - s["average"]) // 1)
        return total[0] / count, total[1] / count
    return delta, biases


if __name__ == "__main__":
    sys.exit(main())

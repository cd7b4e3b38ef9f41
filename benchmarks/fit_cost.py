"""What fitting costs on models of several sizes and on GPUs: operations, memory, tokens, hours. Computed, not measured.

    python benchmarks/fit_cost.py                  # the tables of docs/fitting.md, marked as estimates
    python benchmarks/fit_cost.py --write          # put them there

Rates of a device are its data sheet's peak times an assumed share. No GPU was at hand: replace `--share` by what
`benchmarks/fit_throughput.py --device cuda` measures on yours.
"""

import argparse
import sys
from pathlib import Path

from tl_lenses.fit.plan import plan
from tl_lenses.fit.settings import Settings

# d_model, layers, vocabulary, parameters
MODELS = {
    "GPT-2": (768, 12, 50257, 124_439_808),
    "Pythia-6.9B": (4096, 32, 50432, 6_857_302_016),
    "Llama-3-8B": (4096, 32, 128256, 8_030_261_248),
    "Llama-3-70B": (8192, 80, 128256, 70_553_706_496),
}
# bf16 operations per second without sparsity, bytes per second of memory, bytes of memory; NVIDIA's data sheets.
DEVICES = {"A100 80 GB": (312e12, 2.0e12, 80e9), "H100 SXM": (989e12, 3.35e12, 80e9)}
PAGE = Path(__file__).resolve().parents[1] / "docs" / "fitting.md"
MARKS = "<!-- made by benchmarks/fit_cost.py -->", "<!-- end -->"
PUBLISHED = 250 * 2**18
STEP = 2**14  # tokens of a step of ours


def main() -> int:
    """Print the tables, or write them between the marks of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.4, help="of the peak rate of products that is assumed")
    parser.add_argument("--memory-share", type=float, default=0.8, help="of the peak rate of memory")
    parser.add_argument("--write", action="store_true", help="into docs/fitting.md")
    args = parser.parse_args()
    text = tables(args.share, args.memory_share)
    if not args.write:
        print(text)
        return 0
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(MARKS[0])[0], page.split(MARKS[1], 1)[1]
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{text}\n{MARKS[1]}{after}", encoding="utf-8")
    return 0


def fit(name: str, tokens: int, devices: int):
    """The plan of a model: the published number of tokens or ours; a large model sharded, its layers in groups."""
    d, layers, vocabulary, params = MODELS[name]
    for at_once in range(layers, 0, -1):
        steps = max(1, tokens // STEP)
        settings = Settings(steps, min(STEP, tokens), precision="bfloat16", layers_at_once=at_once)
        planned = plan(settings, d, layers, vocabulary, n_params=params, model_dtype="bfloat16", sharded=devices)
        if planned.peak <= 0.9 * 80e9:
            return planned, True
    return planned, False


def tables(share: float, memory_share: float) -> str:
    """Operations per token; then memory and hours."""
    lines = [
        f"Estimates: bf16, {share:.0%} of the data sheet's peak rate of products and {memory_share:.0%} of that of memory assumed. Steps of {STEP:,} tokens, batches of 4,096.",
        "",
        "| Model | GFLOP per token: vocabulary | translators | model | share of the vocabulary |",
        "|---|---|---|---|---|",
    ]
    for name in MODELS:
        d, layers, vocabulary, params = MODELS[name]
        step = plan(Settings(1), d, layers, vocabulary, n_params=params, tokens_per_batch=STEP)
        v, t, m = (step.operations[k] / step.tokens / 1e9 for k in ("vocabulary", "translators", "model"))
        lines.append(f"| {name} | {v:,.2f} | {t:,.2f} | {m:,.2f} | {v / (v + t + m):.0%} |")
    lines += [
        "",
        "| Model | Devices | Translators, fp32 | Peak memory of each | Passes over the text | Hours, 65.5 M tokens (published) | Hours, a tenth |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        for count in (1, 8):
            whole, fits = fit(name, PUBLISHED, count)
            tenth, _ = fit(name, PUBLISHED // 10, count)
            d, layers, *_ = MODELS[name]
            size = 4 * layers * (d**2 + d) / 1e9
            for device, (flops, bandwidth, _) in DEVICES.items():
                if not fits:
                    text = "does not fit | – | – | –"
                else:
                    hours = [p.seconds(flops * share, bandwidth * memory_share, count) / 3600 for p in (whole, tenth)]
                    text = f"{whole.peak / 1e9:.1f} GB | {whole.groups} | {show(hours[0])} | {show(hours[1])}"
                lines.append(f"| {name} | {count} x {device} | {size:.2f} GB | {text} |")
    return "\n".join(lines) + "\n"


def show(hours: float) -> str:
    """Two figures, and minutes where that is little."""
    return f"{hours * 60:.1f} min" if hours < 1 else f"{hours:.1f}" if hours < 100 else f"{hours:,.0f}"


if __name__ == "__main__":
    sys.exit(main())

"""The claims of both papers on real models: run the experiments, and write what they show into `docs/real-models.md`.

    python tools/real_numbers.py                              # every step of every model that has no result yet, then the page
    python tools/real_numbers.py --scale night                # larger sizes, all layers: hours on two cores
    python tools/real_numbers.py --only quality --model gemma3-270m
    python tools/real_numbers.py --page                       # the page alone, from docs/data/real-models.json

A step that has its result in the work folder is not run again (`--again` does). Needs the folders of `tools/real_models.py`, and the
text and task files in `../shared` beside the checkout (`--data`). The page has the newest result of each step, the larger scale first.
"""

import argparse
import json
import sys
import time
import traceback
from pathlib import Path

from paper import page
from paper.bench import MODELS, SCALES, Bench
from paper.pairs import OF, STEPS

ROOT = Path(__file__).resolve().parent.parent


def run(bench: Bench, name: str) -> None:
    """One step, its numbers kept as JSON in the work folder."""
    print(f"{bench.name}: {name}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    numbers = STEPS[name](bench)
    seconds = time.perf_counter() - start
    target = result_file(bench, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    result = {"step": name, "model": bench.name, "scale": bench.scale, "seconds": round(seconds), "numbers": numbers}
    target.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")
    print(f"{bench.name}: {name} took {seconds:.0f} s", file=sys.stderr, flush=True)


def result_file(bench: Bench, name: str) -> Path:
    """Where the result of a step is kept."""
    return bench.work / bench.scale / bench.name / f"{name}.json"


def rounded(value: object) -> object:
    """Numbers with five digits, so that the file stays small; NaN and infinity as None.

    >>> rounded({"a": [0.123456789, float("nan")]})
    {'a': [0.12346, None]}
    """
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if value - value == 0 else None
    return value


def collected(work: Path) -> dict[str, dict[str, object]]:
    """Results by model and step: those of the larger scale where there are both."""
    found: dict[str, dict[str, object]] = {}
    for scale in SCALES:
        for file in sorted((work / scale).glob("*/*.json")):
            result = json.loads(file.read_text(encoding="utf-8"))
            found.setdefault(result["model"], {})[result["step"]] = result
    return found


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(STEPS), help="a step; may be repeated")
    parser.add_argument("--model", action="append", choices=MODELS, help="a model; may be repeated")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared", help="the folder with text/ and tasks/")
    parser.add_argument("--work", type=Path, default=ROOT / ".real", help="where results and lenses are kept")
    parser.add_argument("--again", action="store_true", help="run steps that have a result as well")
    parser.add_argument("--page", action="store_true", help="write the page only")
    args = parser.parse_args()
    failed = []
    for name in [] if args.page else args.model or MODELS:
        bench = Bench(name, args.scale, args.data, args.work)
        for step in args.only or STEPS:
            if name not in OF[step] or (result_file(bench, step).is_file() and not args.again):
                continue
            try:
                run(bench, step)
            except Exception:  # the other steps are not its fault
                traceback.print_exc()
                failed.append(f"{step} of {name}")
    if results := collected(args.work):
        page.keep(results)
    page.write()
    if failed:
        sys.exit(f"real_numbers: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

"""The page: a row per claim, a column per model, from the results that are kept in `docs/data/real-models.json`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paper.bench import MODELS, SCALES
from paper.claims import CLAIMS, PATCHSCOPES, TUNED_LENS, Claim

DOCS = Path(__file__).resolve().parents[2] / "docs"
DATA, PAGE = DOCS / "data" / "real-models.json", DOCS / "real-models.md"
TITLES = {"smollm2-135m": "SmolLM2-135M", "gemma3-270m": "Gemma 3 270M", "lab-gpt2": "lab-gpt2"}
# Why a step has no result for a model, where no larger size would give one.
CANNOT = {
    ("difficulty", "smollm2-135m"): "no checkpoints to be had", ("difficulty", "gemma3-270m"): "no checkpoints to be had",
    ("fine-tune", "gemma3-270m"): "no fine-tune", ("cross-model", "gemma3-270m"): "is the target",
}  # fmt: skip
NOT_RUN = "not run yet"
_BLOCK = re.compile(r"(<!-- begin: real_numbers.py ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Results = Mapping[str, Mapping[str, Mapping[str, Any]]]


def keep(results: Results) -> None:
    """Write the results that the page is made from, over those of the same model and step but not over those of a larger scale."""
    kept: dict[str, dict[str, Any]] = read() if DATA.is_file() else {}
    for model, steps in results.items():
        for step, result in steps.items():
            before = kept.setdefault(model, {}).get(step, result)
            if SCALES.index(before["scale"]) <= SCALES.index(result["scale"]):
                kept[model][step] = result
    DATA.parent.mkdir(exist_ok=True)
    ordered = {model: dict(sorted(kept[model].items())) for model in MODELS if model in kept}
    text = json.dumps(ordered, indent=1, ensure_ascii=False)
    # A list of numbers on one line.
    text = re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda match: "[" + re.sub(r"\s+", " ", match[1]) + "]", text)
    DATA.write_text(text + "\n", encoding="utf-8")


def read() -> dict[str, dict[str, Any]]:
    """Results by model and step."""
    return json.loads(DATA.read_text(encoding="utf-8"))


def write() -> None:
    """Fill the marked blocks of the page."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), read()), encoding="utf-8")


def filled(text: str, results: Results) -> str:
    """The text of the page with its blocks made from results.

    Raises:
        KeyError: a block that nothing makes.
    """
    makers = {
        "summary": lambda: summary(results), "tuned-lens": lambda: table(TUNED_LENS, results),
        "patchscopes": lambda: table(PATCHSCOPES, results), "sizes": lambda: sizes(results), "said": lambda: said(results),
    }  # fmt: skip
    return _BLOCK.sub(lambda match: f"{match[1]}\n{makers[match[2]]()}\n\n{match[3]}", text)


def cell(claim: Claim, model: str, results: Results) -> tuple[str, bool | None]:
    """What a model shows of a claim, and whether it agrees; None where nothing was measured."""
    result = results.get(model, {}).get(claim.step)
    if result is None:
        return CANNOT.get((claim.step, model), NOT_RUN), None
    if why := result["numbers"].get("error"):
        return f"cannot be asked: {why}", None
    value, text = claim.measure(result["numbers"])
    if value != value:
        return text, None
    agrees = claim.agrees(value)
    return f"{text}. **{'agrees' if agrees else 'differs'}**", agrees


def table(paper: str, results: Results) -> str:
    """A row per claim of a paper."""
    rows = [
        f"| {paper} | Found | Agrees if | {' | '.join(TITLES[model] for model in MODELS)} |",
        "|---" * (3 + len(MODELS)) + "|",
    ]
    for claim in CLAIMS:
        if claim.paper == paper:
            cells = [cell(claim, model, results)[0] for model in MODELS]
            rows.append(f"| {claim.where} | {claim.says} | {claim.rule} | {' | '.join(cells)} |")
    return "\n".join(rows)


def summary(results: Results) -> str:
    """How many claims each model agrees with, the papers' own and ours apart."""
    rows = ["| | " + " | ".join(TITLES[model] for model in MODELS) + " |", "|---" * (1 + len(MODELS)) + "|"]
    for paper in (TUNED_LENS, PATCHSCOPES):
        for ours in (False, True):
            claims = [c for c in CLAIMS if c.paper == paper and c.says.startswith("(Ours.)") == ours]
            counts = []
            for model in MODELS:
                verdicts = [agrees for claim in claims if (agrees := cell(claim, model, results)[1]) is not None]
                counts.append(f"{sum(verdicts)} of {len(verdicts)} agree")
            rows.append(f"| {paper}, {'our controls' if ours else 'claims of the paper'} | {' | '.join(counts)} |")
    return "\n".join(rows)


def sizes(results: Results) -> str:
    """Per step and model: scale, how many items, seconds."""
    steps = list(dict.fromkeys(claim.step for claim in CLAIMS))
    steps = [step for step in ("lenses", *steps, "sampling", "inversion") if any(step in r for r in results.values())]
    rows = ["| step | " + " | ".join(TITLES[model] for model in MODELS) + " |", "|---" * (1 + len(MODELS)) + "|"]
    for step in steps:
        cells = []
        for model in MODELS:
            result = results.get(model, {}).get(step)
            cells.append("" if result is None else f"{result['scale']}: {_size(result['numbers'])}, {result['seconds']} s")
        rows.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _size(numbers: Mapping[str, Any]) -> str:
    n = numbers.get("n", numbers.get("tokens", ""))
    if isinstance(n, Mapping):
        n = " and ".join(f"{count:,} tokens" if name == "" else f"{count:,} ({name})" for name, count in n.items())
    layers = numbers.get("layers") or numbers.get("blocks")
    parts = [f"n = {n}"] if n else []
    if layers:
        parts.append(f"layers {', '.join(map(str, layers))}" if len(layers) < 7 else f"{len(layers)} layers")
    return ", ".join(parts) or "all"


def said(results: Results) -> str:
    """What is said of one entity, layer by layer."""
    columns = {m: results[m]["entities"]["numbers"] for m in MODELS if "entities" in results.get(m, {})}
    rows = [
        "| layer | " + " | ".join(f"{TITLES[m]}: {numbers['name']}" for m, numbers in columns.items()) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for layer in sorted({int(layer) for numbers in columns.values() for layer in numbers["said"]}):
        texts = [str(numbers["said"].get(str(layer), ""))[:70].replace("|", "/") for numbers in columns.values()]
        rows.append(f"| {layer} | {' | '.join(texts)} |")
    return "\n".join(rows)

"""The table of docs/compatibility.md is true: a dozen families that differ most here, all of them with `-m slow`.

The others are collected only where slow tests are asked for by name: they take ten minutes together.
"""

import re
from pathlib import Path

import architecture_checks
import architectures
import families
import pytest
import torch

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"

# Learned, rotary and no positions, LayerNorm and RMSNorm, before and after, in parallel; windows, soft caps, scales, experts,
# low-rank attention; a readout with more in it; states in the place of keys; images; no HF model at all.
DOZEN = (
    "GPT2LMHeadModel",
    "BloomForCausalLM",
    "Olmo2ForCausalLM",
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "GptOssForCausalLM",
    "CohereForCausalLM",
    "DeepseekV3ForCausalLM",
    "OPT, narrow embedding",
    "ModernBertDecoderForCausalLM",
    "MambaForCausalLM",
    "JambaForCausalLM",
    "LlavaForConditionalGeneration",
    "BartForConditionalGeneration",
    "native, attention only",
)
FEW = ("GPT2LMHeadModel", "CohereForCausalLM", "BartForConditionalGeneration")  # of the short table's versions
KNOWN = {family.name: family for family in families.families()}


def section(marks: tuple[str, str]) -> str:
    """What stands between two marks of the page."""
    return PAGE.read_text(encoding="utf-8").split(marks[0])[1].split(marks[1])[0]


FULL, SHORT = (architectures.versions() in section(marks) for marks in (architectures.BETWEEN, architectures.SHORT))


def tables(marks: tuple[str, str]) -> tuple[list[list[str]], dict[str, dict[str, str]]]:
    """Rows of the first table between two marks, its head among them, and of a family that is not there the reason."""
    there, absent = re.split(r"^\| not there .*\n", section(marks), flags=re.MULTILINE)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in there.splitlines() if line[:1] == "|"]
    missing = {}
    for line in absent.splitlines()[1:]:
        if line[:1] == "|":
            reason, names = (cell.strip() for cell in line.split("|")[1:-1])
            # A variant has a comma in its name, but all variants are there.
            missing |= {name: {"not there": reason} for name in names.split(", ")}
    return rows, missing


def expected() -> dict[str, dict[str, str]]:
    """The page's table of these versions: family -> column -> text; of a family that is not there, the reason."""
    (head, _, *lines), missing = tables(architectures.BETWEEN if FULL else architectures.SHORT)
    table = {cells[0]: dict(zip(head[1:], cells[1:], strict=True)) for cells in lines}
    if SHORT:  # a family without a row holds in everything
        table = {name: {head[1]: ""} for name in KNOWN if name not in missing} | table
    return table | missing


def pytest_generate_tests(metafunc):
    if "family" not in metafunc.fixturenames:
        return
    asked = metafunc.config.getoption("markexpr")
    quick = [name for name in DOZEN if name in KNOWN and (not SHORT or name in FEW)]
    others = [name for name in KNOWN if name not in quick] if "slow" in asked and "not slow" not in asked else []
    chosen = [pytest.param(name) for name in quick]
    metafunc.parametrize("family", chosen + [pytest.param(name, marks=pytest.mark.slow) for name in others])


def needs_the_versions_of_the_page():
    if not (FULL or SHORT):
        pytest.skip(f"the tables are of other versions. {architectures.versions()}")


def test_a_family_is_as_the_page_says(family, unchecked):
    needs_the_versions_of_the_page()
    row = architectures.run_family(KNOWN[family])
    there = {"what does not hold": architectures.lacks(row)} if SHORT and "absent" not in row else None
    got = {"not there": row["absent"]} if "absent" in row else there or architectures.shown(row)
    assert got == expected()[family], row


def test_the_page_has_every_family():
    needs_the_versions_of_the_page()
    assert set(expected()) == set(KNOWN)
    if SHORT:
        rows, missing = tables(architectures.SHORT)
        n = len(KNOWN) - len(missing)
        assert f"All of it holds for {n - len(rows) + 2} families of {n}." in section(architectures.SHORT)


def test_a_wrong_number_is_seen():
    """Every comparison with the plain model fails when the plain model is another one."""
    pair = families.build(KNOWN[DOZEN[0]] if KNOWN else pytest.skip("no adapters in this TransformerLens"))
    against = [check for check in architecture_checks.CHECKS if check.name in ("last row", "every row", "patch", "cache")]
    assert all(result["ok"] for result in architecture_checks.run_checks(pair, against).values())
    with torch.no_grad():
        next(pair.reference.lm_head.parameters()).mul_(1.5)
    results = architecture_checks.run_checks(pair, against)
    assert {result["reason"] for result in results.values()} == {"TransformerLens itself differs"}, results


def test_a_hang_costs_one_row(tmp_path):
    if not KNOWN:
        pytest.skip("no adapters in this TransformerLens")
    rows = architectures.run_all(["BD3LM"], tmp_path / "rows.json", timeout=0.01)
    assert rows["BD3LM"][architectures.RAW][architectures.WHOLE] == "more than 0.01 seconds"
    assert architectures.run_all(["BD3LM"], tmp_path / "rows.json") == rows  # kept

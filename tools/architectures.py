"""Does the library hold on every family that the installed TransformerLens adapts?

    python tools/architectures.py                               # all of them, as a Markdown table
    python tools/architectures.py --only LlamaForCausalLM       # some
    python tools/architectures.py --json results.json           # keeps what has run, and runs what is missing
    python tools/architectures.py --into docs/compatibility.md  # puts the table there
    python tools/architectures.py --short --into docs/compatibility.md  # what does not hold, alone: of another TransformerLens

Each family is a tiny random model in memory (`families.py`), asked the same questions (`architecture_checks.py`) as it is and in
TransformerLens' compatibility mode. The table stands in docs/compatibility.md: a mark, or the reason in a few words. A family
that cannot be built says why. Families run in a process of their own, so that a crash or a hang costs one row.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import torch
from architecture_checks import CHECKS, in_few_words, run_checks
from families import Absent, Family, build, families, quiet

import tl_lenses as tll

TIMEOUT = 240  # seconds for one family
PACKAGES = ("transformer-lens", "transformers", "torch")
RAW, COMPATIBLE = "as it is", "compatibility mode"
MARK, WHOLE = "✓", "not built"
BETWEEN = ("<!-- families -->", "<!-- end of families -->")  # where the table stands in a page
SHORT = ("<!-- families, short -->", "<!-- end of families, short -->")  # and that of `--short`


def run_family(family: Family) -> dict[str, Any]:
    """Everything about one family: why it is absent, or the results of its checks on both surfaces."""
    row: dict[str, Any] = {}
    for surface in (RAW, COMPATIBLE):
        # The model of the bfloat16 check is built anew, as it is.
        checks = [check for check in CHECKS if surface == RAW or check.name != "bfloat16"]
        try:
            row[surface] = run_checks(build(family, compatibility=surface == COMPATIBLE), checks)
        except Absent as absent:
            return {"absent": str(absent) + (_refused(absent.model) if absent.model is not None else "")}
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"
            row[surface] = {WHOLE: in_few_words(detail), "detail": detail[:600]}
    return row


def _refused(model: Any) -> str:
    """What the library says to a model that it cannot read: it has to refuse it."""
    try:
        with quiet():
            tll.run(model, torch.arange(4, 12)[None])
    except (ValueError, TypeError):
        return "; refused"
    except Exception as error:
        return f"; {type(error).__name__} from `run`"
    return "; not refused by `run`"


def run_all(names: list[str], keep: Path, timeout: float = TIMEOUT, *, again: bool = False) -> dict[str, Any]:
    """The rows of these families, from `keep` where they are there already (but `again`); written to it as they come."""
    rows = json.loads(keep.read_text()) if keep.exists() else {}
    rows = {name: row for name, row in rows.items() if not again or name not in names}
    while missing := [name for name in names if name not in rows]:
        worker = subprocess.Popen(
            [sys.executable, __file__, "--worker", *missing],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            _collect(worker, missing, rows, keep, timeout)
        finally:
            worker.kill()
            worker.wait()
    return {name: rows[name] for name in names}


def _collect(worker: Any, names: list[str], rows: dict[str, Any], keep: Path, timeout: float) -> None:
    """Rows from a worker until it is done, has died, or has taken too long over one: then that one's row says so."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in worker.stdout:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    for name in names:
        try:
            line = lines.get(timeout=timeout)
            reason = "" if line else f"the process ended ({worker.wait()})"
        except queue.Empty:
            line, reason = "", f"more than {timeout:g} seconds"
        rows[name] = json.loads(line) if line else {RAW: {WHOLE: reason, "detail": reason}}
        _write(rows, keep)
        texts = {} if "absent" in rows[name] else cells(rows[name])
        failed = [f"{column}: {text}" for column, text in texts.items() if text != MARK]
        print(f"{name}: {rows[name].get('absent') or '; '.join(failed) or MARK}", file=sys.stderr)
        if not line:
            return


def _write(rows: dict[str, Any], keep: Path) -> None:
    partial = keep.with_name(keep.name + ".part")
    partial.write_text(json.dumps(rows, indent=1))
    partial.replace(keep)


def cells(row: dict[str, Any]) -> dict[str, str]:
    """The cells of a row by column: a mark, or the reason. Of compatibility mode, what is not the same as without it."""
    marks = {surface: _marks(row.get(surface, {})) for surface in (RAW, COMPATIBLE)}
    other = {name: text for name, text in marks[COMPATIBLE].items() if text != marks[RAW].get(name)}
    if set(marks[COMPATIBLE].values()) == {MARK}:
        compatible = MARK
    elif marks[COMPATIBLE] and not other:
        compatible = "the same"
    else:
        compatible = _by_text(other)
    return marks[RAW] | {COMPATIBLE: compatible}


def _by_text(texts: dict[str, str]) -> str:
    """Columns with one text together."""
    columns: dict[str, list[str]] = {}
    for name, text in texts.items():
        columns.setdefault(text, []).append(name)
    return "; ".join(text if names == [WHOLE] else f"{', '.join(names)}: {text}" for text, names in columns.items())


def lacks(row: dict[str, Any]) -> str:
    """What does not hold of a family, as it is and in compatibility mode; empty where all does."""
    texts = {name: text for name, text in cells(row).items() if text != MARK}
    compatible = texts.pop(COMPATIBLE, "")
    return "; ".join(filter(None, (_by_text(texts), f"{COMPATIBLE}: {compatible}" * bool(compatible))))


def _marks(surface: dict[str, Any]) -> dict[str, str]:
    if WHOLE in surface:
        return {WHOLE: surface[WHOLE]}
    return {name: MARK if result["ok"] else result["reason"] for name, result in surface.items()}


def shown(row: dict[str, Any]) -> dict[str, str]:
    """What the table has in each column of a row; the reason why nothing could be built stands in the first."""
    texts = cells(row)
    first, *others = (check.name for check in CHECKS)
    return {first: texts.get(first) or texts[WHOLE]} | {name: texts.get(name, "") for name in (*others, COMPATIBLE)}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown: what holds for each family that is there, and why the others are not."""
    head = [*(check.name for check in CHECKS), COMPATIBLE]
    lines = [versions(), "", f"| family | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    lines += [f"| {family} | {' | '.join(shown(row).values())} |" for family, row in rows.items() if "absent" not in row]
    return "\n".join(lines + _not_there(rows))


def short_table(rows: dict[str, dict[str, Any]]) -> str:
    """How many families hold in everything, what does not of the others, and why the rest is not there."""
    lacking = {family: lacks(row) for family, row in rows.items() if "absent" not in row}
    n = sum(not text for text in lacking.values())
    lines = [
        versions(),
        "",
        f"All of it holds for {n} families of {len(lacking)}.",
        "",
        "| family | what does not hold |",
        "|---|---|",
    ]
    lines += [f"| {family} | {text} |" for family, text in lacking.items() if text]
    return "\n".join(lines + _not_there(rows))


def _not_there(rows: dict[str, dict[str, Any]]) -> list[str]:
    absent: dict[str, list[str]] = {}
    for family, row in rows.items():
        if "absent" in row:
            absent.setdefault(row["absent"], []).append(family)
    lines = ["", "| not there | families |", "|---|---|"]
    return lines + [f"| {why} | {', '.join(sorted(names, key=str.lower))} |" for why, names in sorted(absent.items())]


def versions() -> str:
    """What the table was made with."""
    return "With " + ", ".join(f"{package} {version(package).split('+')[0]}" for package in PACKAGES) + "."


def write_into(page: Path, text: str, marks: tuple[str, str] = BETWEEN) -> None:
    """Put the table between the two marks of a page."""
    before, after = (page.read_text(encoding="utf-8").split(mark) for mark in marks)
    if len(before) != 2 or len(after) != 2:
        raise ValueError(f"expected {marks[0]} and {marks[1]} once each in {page}")
    page.write_text(f"{before[0]}{marks[0]}\n\n{text}\n\n{marks[1]}{after[1]}", encoding="utf-8")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="families to run, by name")
    parser.add_argument("--json", type=Path, default=Path("architectures.json"), help="where results are kept")
    parser.add_argument("--again", action="store_true", help="run what is kept already, too")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for one family")
    parser.add_argument("--short", action="store_true", help="a row for each family of which something does not hold, alone")
    parser.add_argument("--into", type=Path, help="a page that gets the table, between its marks")
    parser.add_argument("--worker", nargs="+", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = {family.name: family for family in families()}
    if options.worker:
        torch.set_num_threads(1)
        for name in options.worker:
            print(json.dumps(run_family(known[name])), flush=True)
        return
    names = options.only or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no family {', '.join(unknown)}; there are {', '.join(known)}")
    rows = run_all(names, options.json, options.timeout, again=options.again)
    text = short_table(rows) if options.short else table(rows)
    print(text)
    if options.into:
        write_into(options.into, text, SHORT if options.short else BETWEEN)


if __name__ == "__main__":
    main()

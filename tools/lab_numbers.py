"""Measure again whatever cites a lab model, after one of them has changed: its card, the tables of the docs, the heat map.

    python tools/lab_numbers.py                       # everything (about half an hour on two cores)
    python tools/lab_numbers.py --only cards          # or: experiments, picture

Cards need the work folder of `tools/train_lab.py` (its held-out text and the snapshots along training). The thresholds of the
tests are read from `measured.json`, which the cards' step writes, so they follow by themselves.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "experiments.md"
PARTS = ("cards", "experiments", "picture")
_BLOCK = re.compile(r"(<!-- begin: (tl-lenses experiment [^>]*?--markdown) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def cards(work: Path) -> None:
    """Every model that is there: `measured.json`, README.md, checksums.json."""
    from tl_lenses import lab

    for one in lab.available():
        if one.at_hand:
            print(f"measuring {one.name}", file=sys.stderr)
            _run(sys.executable, "tools/train_lab.py", "measure", one.name, "--work", str(work))


def experiments() -> None:
    """The tables of docs/experiments.md: what each marked command prints, between its marks."""

    def filled(match: re.Match[str]) -> str:
        print(f"running {match[2]}", file=sys.stderr)
        return f"{match[1]}\n{_run(sys.executable, '-m', 'tl_lenses', *match[2].split()[1:]).strip()}\n\n{match[4]}"

    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(_BLOCK.sub(filled, text), encoding="utf-8")


def picture() -> None:
    """The heat map of the README and the docs, from the demo."""
    _run(sys.executable, "-m", "tl_lenses", "demo", "--output", "demo")
    (ROOT / "docs" / "heatmap.svg").write_bytes((ROOT / "demo" / "heatmap.svg").read_bytes())


def _run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"lab_numbers: {' '.join(command)} left with {done.returncode}")
    return done.stdout


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be repeated")
    parser.add_argument("--work", type=Path, default=ROOT / ".lab", help="the work folder of train_lab.py")
    args = parser.parse_args()
    for part in args.only or PARTS:
        cards(args.work) if part == "cards" else experiments() if part == "experiments" else picture()


if __name__ == "__main__":
    main()

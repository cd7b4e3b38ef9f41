"""Measure again whatever cites a lab model, after one of them has changed: its card, the tables of the docs, the heat map.

    python tools/lab_numbers.py                       # everything (about half an hour on two cores)
    python tools/lab_numbers.py --only cards          # or: experiments, picture
    python tools/lab_numbers.py --only experiments --experiment quality

Blocks of another model than a lab model are run where their experiment is named, beside the lenses that their page says how to fit.

Cards need the work folder of `tools/train_lab.py` (its held-out text and the snapshots along training). The thresholds of the
tests are read from `measured.json`, which the cards' step writes, so they follow by themselves.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PARTS = ("cards", "experiments", "picture")
_BLOCK = re.compile(r"(<!-- begin: (tl-lenses experiment [^>]*?--markdown) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def cards(work: Path) -> None:
    """Every model that is there: `measured.json`, README.md, checksums.json."""
    from tl_lenses import lab

    for one in lab.available():
        if one.at_hand:
            print(f"measuring {one.name}", file=sys.stderr)
            _run(sys.executable, "tools/train_lab.py", "measure", one.name, "--work", str(work))


def experiments(names: Sequence[str] = ()) -> None:
    """The tables of the docs: what each marked command prints, between its marks; its first picture beside them.

    Args:
        names: experiments to run again; all by default.
    """

    def filled(match: re.Match[str]) -> str:
        command = match[2].split()[1:]
        of_lab = "--model" not in command or command[command.index("--model") + 1].startswith("lab-")
        if command[1] not in names if names else not of_lab:
            return match[0]
        print(f"running {match[2]}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            text = _run(sys.executable, "-m", "tl_lenses", *command, "--output", folder).strip()
            # The last line says how long it took and where it saved.
            text = re.sub(r"\n+\d+ s; saved in .*$", "", text)
            figure = DOCS / "figures" / f"{command[1]}.svg"
            pictures = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))["pictures"]
            if f"figures/{figure.name}" in page.read_text(encoding="utf-8"):
                figure.parent.mkdir(exist_ok=True)
                figure.write_bytes((Path(folder) / f"{pictures[0]}.svg").read_bytes())
        return f"{match[1]}\n{text}\n\n{match[4]}"

    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := _BLOCK.sub(filled, text)) != text:
            page.write_text(new, encoding="utf-8")


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
    parser.add_argument("--experiment", action="append", default=[], metavar="NAME", help="of the experiments this one")
    args = parser.parse_args()
    for part in args.only or PARTS:
        cards(args.work) if part == "cards" else experiments(args.experiment) if part == "experiments" else picture()


if __name__ == "__main__":
    main()

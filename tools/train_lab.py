"""Make the lab models: their corpus, their training, their measurements and their cards.

    python tools/train_lab.py corpus SOURCES         # once: the tokens that all models read
    python tools/train_lab.py train lab-gpt2         # one model; interrupted, the same command goes on
    python tools/train_lab.py measure lab-gpt2       # loss, facts, copying; writes the model card

SOURCES has `text/classic-books`, `text/tinystories` and `tasks/lre-relations`. All settings are in `tools/lab.toml`; what is
large and can be made again lies in the work folder (`--work`, by default `.lab`). Needs Python 3.11.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import tomllib

TOOLS = Path(__file__).resolve().parent
sys.path.insert(0, str(TOOLS))

ROOT = TOOLS.parent
SETTINGS = TOOLS / "lab.toml"


def settings_of(name: str) -> dict[str, Any]:
    """All settings of one model: the common ones and its own.

    Args:
        name: a model of `lab.toml`.

    Raises:
        ValueError: there is no such model.
    """
    everything = tomllib.loads(SETTINGS.read_text(encoding="utf-8"))
    if name not in everything["models"]:
        raise ValueError(f"expected a model of {SETTINGS.name}, one of {sorted(everything['models'])}, got {name!r}")
    own = everything["models"][name]
    base = dict(everything["models"].get(own.get("base"), {}))  # a fine-tune has its base's shape
    base.pop("start", None)
    return {**everything["train"], **base, **own, "name": name}


def folder_of(settings: dict[str, Any], work: Path) -> Path:
    """Where the finished model is kept: the first stage of a model only in the work folder."""
    if settings["where"] == "work":
        return work / settings["name"] / "finished"
    return (ROOT / "tl_lenses" / "lab" if settings["where"] == "wheel" else ROOT / "lab") / settings["name"]


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("corpus", "train", "measure"))
    parser.add_argument("argument", help="the folder of the sources, or a model of lab.toml")
    parser.add_argument("--work", type=Path, default=ROOT / ".lab")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: all)")
    parser.add_argument("--device", default="", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--steps", type=int, default=0, help="train: stop after so many steps in this call")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="train: another setting, for a trial")
    parser.add_argument("--folder", type=Path, help="measure: another model folder, without writing its card")
    args = parser.parse_args()

    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        if args.what == "corpus":
            from lab.corpus import build
            from transformers import PreTrainedTokenizerFast

            settings = tomllib.loads(SETTINGS.read_text(encoding="utf-8"))["corpus"]
            tokenizer = PreTrainedTokenizerFast.from_pretrained(ROOT / "tl_lenses" / "lab" / "lab-gpt2")
            build(settings, Path(args.argument), tokenizer, args.work, print)
        elif args.what == "train":
            from lab.training import train

            settings = settings_of(args.argument)
            for change in args.set:
                key, _, value = change.partition("=")
                if key not in settings:
                    raise ValueError(f"expected a setting, one of {sorted(settings)}, got {key!r}")
                settings[key] = tomllib.loads(f"x = {value}")["x"]
            train(settings, args.work, folder_of(settings, args.work), device=args.device, stop_after=args.steps)
        else:
            from lab.measure import measure

            settings = settings_of(args.argument)
            measure(settings, args.work, args.folder or folder_of(settings, args.work), card=args.folder is None)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"train_lab: {error}")


if __name__ == "__main__":
    main()

"""Write the signatures of the code into docs/api.md: python tools/api_signatures.py

An entry is a line "- `tll.name(...)`<br>" or "- `tl_lenses.room.name(...)`<br>"; its text is left as it is. tests/test_docs.py compares.
"""

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
ENTRY = re.compile(r"^- `(tll|tl_lenses)\.([\w.]+)\((.*)\)`<br>$", re.MULTILINE)


def place(name: str) -> Any:
    """What a dotted name below `tl_lenses` is, whether its rooms are imported or not."""
    *rooms, leaf = name.split(".")
    for n in range(len(rooms), -1, -1):
        try:
            thing = import_module(".".join(["tl_lenses", *rooms[:n]]))
        except ModuleNotFoundError:
            continue
        for part in [*rooms[n:], leaf]:
            thing = getattr(thing, part)
        return thing
    raise ValueError(f"no name {name!r} in tl_lenses")


def signature(thing: Any) -> str:
    """The parameters with their defaults, without types."""
    bare = [p.replace(annotation=p.empty) for p in inspect.signature(thing).parameters.values()]
    text = str(inspect.Signature(bare))
    return text if '"' in text else text.replace("'", '"')


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(ENTRY.sub(lambda m: f"- `{m[1]}.{m[2]}{signature(place(m[2]))}`<br>", text), encoding="utf-8", newline="\n")

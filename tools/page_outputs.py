"""Write what the Python of a page prints after it: python tools/page_outputs.py docs/quickstart.md

A block of ```text that follows a block of ```python is its output; where there is none it is put in. Links to figures/NAME.svg and gallery/NAME.html are made anew
where the page saves a file of that name. tests/test_docs.py compares both.
"""

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path

PAIR = re.compile(r"(?<!-->\n)^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.DOTALL | re.MULTILINE)


def written(page: str) -> str:
    """The page with the outputs of today, its blocks run one after the other."""
    namespace: dict[str, object] = {}

    def run(match: re.Match[str]) -> str:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(match["code"], "page", "exec"), namespace)
        lines = "\n".join(line.rstrip() for line in output.getvalue().rstrip().splitlines())
        if not lines and match["output"] is None:
            return match[0]
        return f"```python\n{match['code']}```\n\n```text\n{lines}\n```\n"

    return PAIR.sub(run, page)


PICTURE = re.compile(r"\]\((figures/[\w-]+\.svg|gallery/[\w-]+\.html)\)")


def pictures(page: str, folder: Path) -> dict[str, Path]:
    """The pictures and live pages that a page links to and has saved into the folder, by its name for them."""
    return {name: folder / Path(name).name for name in PICTURE.findall(page) if (folder / Path(name).name).is_file()}


if __name__ == "__main__":
    os.environ["COLUMNS"] = "80"
    for name in sys.argv[1:]:
        file = Path(name).resolve()
        here = Path.cwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                page = written(file.read_text(encoding="utf-8"))
            finally:
                os.chdir(here)
            file.write_text(page, encoding="utf-8")
            for name, made in pictures(page, Path(folder)).items():
                (file.parent / name).write_bytes(made.read_bytes())

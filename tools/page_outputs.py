"""Write what the Python of a page prints after it: python tools/page_outputs.py docs/quickstart.md

A block of ```text that follows a block of ```python is its output. tests/test_docs.py compares them.
"""

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path

PAIR = re.compile(
    r"(?<!-->\n)^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.DOTALL | re.MULTILINE
)


def written(page: str) -> str:
    """The page with the outputs of today, its blocks run one after the other."""
    namespace: dict[str, object] = {}

    def run(match: re.Match[str]) -> str:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(match["code"], "page", "exec"), namespace)
        if match["output"] is None:
            return match[0]
        lines = "\n".join(line.rstrip() for line in output.getvalue().rstrip().splitlines())
        return f"```python\n{match['code']}```\n\n```text\n{lines}\n```\n"

    return PAIR.sub(run, page)


if __name__ == "__main__":
    os.environ["COLUMNS"] = "80"
    for name in sys.argv[1:]:
        file = Path(name).resolve()
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.chdir(folder) if sys.version_info >= (3, 11) else contextlib.nullcontext(),
        ):
            file.write_text(written(file.read_text(encoding="utf-8")), encoding="utf-8")

"""Write the course's outputs, pictures and notebooks: python tools/course.py [PAGE ...] [--model smollm2-135m]

A page of docs/course is the source of a notebook. ```python is a cell, ```text behind it what it prints, a picture behind
it what its last line draws; ```py is a solution: shown, not run, and right if the check before it says so. The last cells of a page
are for a real model: they do nothing where there is none, and keep the output that they have. tests/test_course.py
runs the pages. With --model they run on another model, and nothing is written.
"""

import argparse
import ast
import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tl_lenses.loading import folder_of

COURSE = Path(__file__).resolve().parents[1] / "docs" / "course"
PAGES = sorted(COURSE.glob("[0-9]-*.md"))
MODEL = 'NAME = "lab-gpt2"'
REAL = re.compile(r'folder_of\("([\w-]+)"\)')
CELL = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<text>.*?)^```\n)?(?:\n!\[(?P<alt>[^\]]*)\]\((?P<picture>\S+\.svg)\)\n)?",
    re.DOTALL | re.MULTILINE,
)
SOLUTION = re.compile(r"^```py\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass
class Cell:
    """A ```python block of a page: its code, what it prints and draws; the solutions up to the next cell."""

    code: str
    line: int
    text: str
    picture: str | None
    solutions: list[str]

    @property
    def absent(self) -> bool:
        """Whether it is for a real model that is not at hand."""
        asked = REAL.search(self.code)
        return asked is not None and not (folder_of(asked[1]) / "config.json").is_file()


Output = tuple[Cell, str, str | None]  # a cell, what it prints, the SVG that it draws


def cells(page: str) -> list[Cell]:
    """The cells of a page in their order."""
    found = list(CELL.finditer(page))
    ends = [match.start() for match in found[1:]] + [len(page)]
    return [
        Cell(m["code"], page[: m.start("code")].count("\n"), m["text"] or "", m["picture"], SOLUTION.findall(page, m.end(), end))
        for m, end in zip(found, ends, strict=True)
    ]  # fmt: skip


def run(cell: Cell, namespace: dict[str, Any], name: str = "cell") -> tuple[str, str | None]:
    """What a cell prints, and the SVG of its last line where that is a picture."""
    tree = ast.parse("\n" * cell.line + cell.code, name)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        value = None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), namespace)
        if value is not None and not hasattr(value, "svg"):
            print(repr(value))
    return clean(printed.getvalue()), value.svg() if hasattr(value, "svg") else None


def tried(cell: Cell, solution: str, namespace: dict[str, Any]) -> str:
    """What the check of an exercise says of a solution; the namespace stays as it is."""
    solved = dict(namespace)
    exec(solution, solved)
    return run(cell, solved)[0]


def clean(text: str) -> str:
    """Without spaces at the ends of lines."""
    return "".join(f"{line.rstrip()}\n" for line in text.rstrip().splitlines())


def outputs(page: str, name: str, namespace: dict[str, Any], model: str | None = None) -> Iterator[Output]:
    """Every cell of a page with what it prints and draws today, run in the namespace and in a folder of their own."""
    here = Path.cwd()
    torch.set_grad_enabled(True)  # a page may switch gradients off
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for cell in cells(page):
                if model is not None:
                    cell.code = cell.code.replace(MODEL, f'NAME = "{model}"')
                if model is None or not REAL.search(cell.code):
                    yield (cell, *run(cell, namespace, name))
        finally:
            os.chdir(here)


def written(page: str, made: list[Output]) -> str:
    """The page with these outputs."""
    made_now = iter(made)

    def replace(match: re.Match[str]) -> str:
        cell, text, svg = next(made_now)
        if cell.absent:
            return match[0]
        if (svg is None) != (cell.picture is None):
            raise ValueError(f"a picture without a line ![...](figures/name.svg) behind it, or one without a picture:\n{cell.code}")
        block = f"```python\n{match['code']}```\n" + (f"\n```text\n{text}```\n" if text else "")
        return block + (f"\n![{match['alt']}]({cell.picture})\n" if cell.picture else "")

    return CELL.sub(replace, page)


def notebook(page: str) -> str:
    """The page as a notebook, with the outputs that it has."""
    parts: list[dict[str, Any]] = []
    place = 0

    def add(kind: str, source: str, **more: Any) -> None:
        if source.strip():
            number = f"{len(parts):02d}"
            parts.append({"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": _lines(source.strip()), **more})

    for count, (match, cell) in enumerate(zip(CELL.finditer(page), cells(page), strict=True), 1):
        add("markdown", page[place : match.start()])
        shown: list[dict[str, Any]] = []
        if cell.text:
            shown.append({"name": "stdout", "output_type": "stream", "text": _lines(cell.text)})
        if cell.picture:
            svg = (COURSE / cell.picture).read_text(encoding="utf-8")
            data = {"image/svg+xml": svg, "text/plain": [match["alt"]]}
            shown.append({"data": data, "execution_count": count, "metadata": {}, "output_type": "execute_result"})
        add("code", cell.code, execution_count=count, outputs=shown)
        place = match.end()
    add("markdown", page[place:])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": parts, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, ensure_ascii=False, indent=1) + "\n"


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


if __name__ == "__main__":
    os.environ["COLUMNS"] = "80"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES)
    parser.add_argument("--model", help="run on this one and write nothing")
    arguments = parser.parse_args()
    for path in [path.resolve() for path in arguments.pages]:
        source = path.read_text(encoding="utf-8")
        if arguments.model is not None:
            namespace: dict[str, Any] = {}
            for cell, text, _ in outputs(source, str(path), namespace, arguments.model):
                print(cell.code, text, *(tried(cell, solution, namespace) for solution in cell.solutions), sep="\n")
            continue
        made = list(outputs(source, str(path), {}))
        for cell, _, svg in made:
            if svg is not None and cell.picture is not None:
                file = COURSE / cell.picture
                file.parent.mkdir(exist_ok=True)
                file.write_text(svg, encoding="utf-8")
        source = written(source, made)
        path.write_text(source, encoding="utf-8")
        path.with_suffix(".ipynb").write_text(notebook(source), encoding="utf-8")

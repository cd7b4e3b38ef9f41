"""The documentation is true: its Python runs, its links lead somewhere, its signatures are the code's, no name is missing."""

import ast
import doctest
import functools
import inspect
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import tl_lenses as tll

ROOT = Path(__file__).resolve().parents[1]
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if page.exists()]
# The mathematics, and what needs no model. The example of token_text needs a tokenizer of the Hub.
DOCTESTED = (
    "aitchison data edits lab moments patchscopes.scopes sites solve stats translators views.glyphs views.grid".split()
)
_BLOCK = re.compile(r"^(<!-- not run: [^\n]+ -->\n)?```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)

page_by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page, *, run):
    """The page's Python as (code, line), without or with what is not run."""
    text = page.read_text(encoding="utf-8")
    found = [(match[2], text[: match.start(2)].count("\n"), bool(match[1])) for match in _BLOCK.finditer(text)]
    return [(code, line) for code, line, skipped in found if not (run and skipped)]


@pytest.fixture(scope="module")
def load():
    """Each page loads the bundled model; once is enough."""
    return functools.cache(tll.lab.load)


@page_by_page
def test_the_python_of_a_page_runs(page, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tll.lab, "load", load)
    namespace = {}
    for code, line in blocks(page, run=True):
        exec(compile("\n" * line + code, str(page), "exec"), namespace)  # a trace shows the page's own lines
    points = {id(p): p for p in load("lab-gpt2").hook_dict.values()}.values()
    assert not any(p._forward_hooks for p in points)


@page_by_page
def test_the_python_that_is_not_run_names_what_is_there(page):
    for code, _ in blocks(page, run=False):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tll":
                assert hasattr(tll, node.attr), node.attr


def test_most_pages_have_python():
    assert sum(bool(blocks(page, run=True)) for page in PAGES) > 5


def test_every_public_name_is_in_the_api():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert not [name for name in tll.__all__ if not re.search(rf"^- `tll\.{name}\b", text, re.MULTILINE)]
    edits = [n for n, f in vars(tll.edits).items() if inspect.isfunction(f) and n[0] != "_"]
    assert not [name for name in edits if f"- `tll.edits.{name}(" not in text]


def test_the_signatures_of_the_api_are_those_of_the_code():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    entries = re.findall(r"^- `tll\.([\w.]+)(\(.*\))`<br>$", text, re.MULTILINE)
    assert len(entries) > 20
    for name, written in entries:
        place = tll
        for part in name.split("."):
            place = getattr(place, part)
        bare = [p.replace(annotation=p.empty) for p in inspect.signature(place).parameters.values()]
        now = str(inspect.Signature(bare))
        assert _parsed(written) == _parsed(now), f"tll.{name}{now}"


def _parsed(signature):
    return ast.dump(ast.parse(f"def f{signature}: pass"))


@page_by_page
def test_links_lead_somewhere(page):
    text = re.sub(
        r"```.*?```|^    .*?$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        file = (page.parent / path).resolve() if path else page
        if path != "docs/heatmap.svg":  # made by the demo
            assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings], target


@page_by_page
def test_commands_exist(page):
    from typer.main import get_command

    from tl_lenses.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    text = page.read_text(encoding="utf-8")
    for line in re.findall(r"^tl-lenses (\w[^\n]*)$", text, re.MULTILINE):
        name, *words = shlex.split(line, comments=True)
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, line
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)) <= set(targets)


def test_every_page_is_in_the_navigation_and_on_the_map():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f": {page.name}\n" in navigation
        assert page.name == "index.md" or f"({page.name})" in index


class _Printed(doctest.OutputChecker):
    """Versions of torch pad numbers differently, so spaces do not count."""

    def check_output(self, want, got, optionflags):
        return "".join(want.split()) == "".join(got.split()) or super().check_output(want, got, optionflags)


@pytest.mark.parametrize("name", DOCTESTED)
def test_examples_of_docstrings(name):
    runner = doctest.DocTestRunner(checker=_Printed(), optionflags=doctest.ELLIPSIS, verbose=False)
    for test in doctest.DocTestFinder().find(import_module(f"tl_lenses.{name}")):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0

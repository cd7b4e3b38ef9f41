"""The documentation is true: its Python runs, its links lead somewhere, its signatures are the code's, no name is missing."""

import ast
import contextlib
import doctest
import functools
import inspect
import io
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import zoo
from page_outputs import pictures

import tl_lenses as tll

ROOT = Path(__file__).resolve().parents[1]
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if page.exists()]
COURSE = sorted((ROOT / "docs" / "course").glob("*.md"))  # tests/test_course.py runs these
# Their examples need a trajectory, a result or a tokenizer of the Hub; the examples of all other modules run.
UNTESTED = {
    "token_text",
    "views",
    *(f"views.{name}" for name in "page picture reading rows saving scope scores table term".split()),
}


def examples():
    """Modules with examples that run, without `tl_lenses.`"""
    for path in sorted((ROOT / "tl_lenses").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "tl_lenses").with_suffix("").parts).removesuffix(".__init__")
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith(">>> ")]
        if any("+SKIP" not in line for line in lines) and name not in UNTESTED | {"__init__", "__main__"}:
            yield name


_BLOCK = re.compile(r"^(<!-- not run: [^\n]+ -->\n)?```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_OUTPUT = re.compile(r"\n\n```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)

page_by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
every_page = pytest.mark.parametrize("page", [*PAGES, *COURSE], ids=lambda page: page.stem)


def blocks(page, *, run):
    """The page's Python as (code, line, the output after it or None), without or with what is not run."""
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        if not (run and match[1]):
            output = _OUTPUT.match(text, match.end())
            yield match[2], text[: match.start(2)].count("\n"), output and output[1]


_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?(?![\w.])")


def same_output(shown, printed):
    """Whether a page shows what was printed. Spaces count as one, and a number may be off in its last digits, as hardware rounds."""
    words = [_NUMBER.sub("#", re.sub("─+", "─", " ".join(text.split()))) for text in (shown, printed)]
    numbers = [[float(n.replace(",", "")) for n in _NUMBER.findall(text)] for text in (shown, printed)]
    return words[0] == words[1] and numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=0.011)


def words(drawn):
    """The texts of a picture or a live page."""
    if not drawn.startswith("<!doctype html"):
        return " ".join(re.findall(r"<text[^>]*>(?:<[^>]*>)*([^<]*)", drawn))
    return re.sub(r"(?s)<(script|style)\b.*?</\1>|<[^>]*>", " ", drawn)


@pytest.fixture(scope="module")
def load():
    """Each page loads the bundled model; once is enough."""
    return functools.cache(tll.lab.load)


@page_by_page
def test_the_python_of_a_page_runs(page, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tll.lab, "load", load)
    monkeypatch.setenv("COLUMNS", "80")
    namespace = {}
    for code, line, shown in blocks(page, run=True):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile("\n" * line + code, str(page), "exec"), namespace)  # a trace shows the page's own lines
        printed = output.getvalue()
        assert same_output(shown or "", printed), f"{page.name}:{line + 1} prints\n{printed}"
    for name, made in pictures(page.read_text(encoding="utf-8"), tmp_path).items():
        shown, drawn = (words(file.read_text(encoding="utf-8")) for file in (page.parent / name, made))
        assert same_output(shown, drawn), f"{name} shows other words than {page.name} draws: tools/page_outputs.py"
    assert zoo.n_hooks(load("lab-gpt2")) == 0


@every_page
def test_the_python_that_is_not_run_names_what_is_there(page):
    for code, *_ in blocks(page, run=False):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tll":
                assert hasattr(tll, node.attr), node.attr


def test_most_pages_have_python():
    assert sum(any(blocks(page, run=True)) for page in PAGES) > 5


def test_what_a_page_shows_is_compared_with_what_is_printed():
    assert sum(output is not None for page in PAGES for *_, output in blocks(page, run=True)) > 30
    table = "layer  KL\n──────\n 4  ·Tokyo  0.78\n"
    assert same_output(table, "layer KL\n────\n  4 ·Tokyo 0.77")
    for other in ("layer KL\n────\n 4 ·Tokyo 0.70", "layer KL\n────\n 4 ·Paris 0.78", "layer KL\n────\n 5 ·Tokyo 0.78", ""):
        assert not same_output(table, other)


GALLERY = list((ROOT / "docs" / "gallery").glob("*.html"))


def test_the_gallery_is_small():
    assert len(GALLERY) >= 4 and sum(page.stat().st_size for page in GALLERY) < 300_000


def test_the_gallery_asks_for_nothing():
    assert not [page for page in GALLERY if re.search(r"(?:src|href)=|https?://", page.read_text(encoding="utf-8"))]


def api():
    return (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def public_names():
    """`(room, name)`: of `tll`, of the rooms that it shows, of the experiments, and all that a page imports."""
    rooms = ("experiments", "lab", "views", "methods", "edits", "solve", "aitchison")
    for name in tll.__all__:
        yield "tll", name
    for room in rooms:
        module = import_module(f"tl_lenses.{room}")
        listed = getattr(module, "__all__", None)
        functions = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        for name in functions if listed is None else listed:
            if name[0] != "_":
                yield room, name
    for page in [*PAGES, *COURSE]:
        for code, *_ in blocks(page, run=False):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tl_lenses"):
                    yield from ((node.module, alias.name) for alias in node.names)


def missing(text):
    """The public names that a text has not in backticks, as an entry or in one."""
    return [f"{room}.{name}" for room, name in public_names() if not re.search(rf"`[\w.]*\b{name}[`(]", text)]


def test_every_public_name_is_in_the_api():
    text = api()
    assert not [name for name in tll.__all__ if not re.search(rf"^- `tll\.{name}\b", text, re.MULTILINE)]
    assert not missing(text)
    gone = missing(text.replace("tl_lenses.experiments.quality(", "").replace("tl_lenses.moments.moments(", ""))
    assert gone and set(gone) == {"experiments.quality", "tl_lenses.experiments.quality", "tl_lenses.moments.moments"}


def test_the_signatures_of_the_api_are_those_of_the_code():
    entries = re.findall(r"^- `(?:tll|tl_lenses)\.([\w.]+)(\(.*\))`<br>$", api(), re.MULTILINE)
    assert len(entries) > 60
    for name, written in entries:
        room, _, leaf = f"tl_lenses.{name}".rpartition(".")
        try:
            place = getattr(import_module(room), leaf)
        except ModuleNotFoundError:
            room, _, owner = room.rpartition(".")
            place = getattr(getattr(import_module(room), owner), leaf)
        bare = [p.replace(annotation=p.empty) for p in inspect.signature(place).parameters.values()]
        now = str(inspect.Signature(bare))
        assert _parsed(written) == _parsed(now), f"{name}{now}: python tools/api_signatures.py writes it"


def test_the_log_is_newest_first():
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d)", (ROOT / "docs" / "log.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(dates) > 10 and dates == sorted(dates, reverse=True)


def _parsed(signature):
    return ast.dump(ast.parse(f"def f{signature}: pass"))


@every_page
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|^    .*?$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
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


@every_page
def test_commands_exist(page):
    from typer.main import get_command

    from tl_lenses.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    text = page.read_text(encoding="utf-8")
    for line in re.findall(r"^tl-lenses (\w[^\n]*)$", text, re.MULTILINE):
        name, *words = shlex.split(line, comments=True)
        command = commands[name]
        if words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words[0]]
        options = {option for parameter in command.params if not parameter.hidden for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, line
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)) <= set(targets)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in [page.name for page in PAGES[1:]] + [f"course/{page.name}" for page in COURSE]:
        assert f": {path}\n" in navigation


def test_every_page_is_on_a_map():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert "(course/index.md)" in index
    for pages, text in ((PAGES[1:], index), (COURSE, COURSE[-1].read_text(encoding="utf-8"))):
        assert all(page.name == "index.md" or f"({page.name})" in text for page in pages)


class _Printed(doctest.OutputChecker):
    """Versions of torch pad numbers differently, so spaces do not count."""

    def check_output(self, want, got, optionflags):
        return "".join(want.split()) == "".join(got.split()) or super().check_output(want, got, optionflags)


@pytest.mark.parametrize("name", list(examples()))
def test_examples_of_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    runner = doctest.DocTestRunner(checker=_Printed(), optionflags=doctest.ELLIPSIS, verbose=False)
    for test in doctest.DocTestFinder().find(import_module(f"tl_lenses.{name}")):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0

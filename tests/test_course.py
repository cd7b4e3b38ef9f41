"""The course: its pages run, its notebooks are its pages, an exercise says that it is not done, and its solution is right."""

import functools
import json
import re
from importlib.metadata import version

import pytest
import torch
from course import COURSE, PAGES, REAL, cells, notebook, outputs, tried, written
from test_docs import same_output, words

import tl_lenses as tll
from tl_lenses.loading import folder_of

EXERCISE = re.compile(r'lab\.exercise\("([\d.]+)"\)')
UNDONE = "Replace `raise NotImplementedError` and run both cells."
LARGEST = 200_000  # bytes of a notebook

page_by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
newest = pytest.mark.skipif(int(version("transformer-lens").split(".")[0]) < 4, reason="the course is for one version")


load = functools.cache(tll.load_model)


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """Tables as wide as in the pages, one model for all of them, and gradients on again behind a page."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(tll, "load_model", load)
    with torch.set_grad_enabled(True):
        yield


def faults(page, name, stored):
    """Where a page does not do what it shows, and exercises that do not say what they should: a line each."""
    found, namespace = [], {}
    for cell, text, svg in outputs(page, name, namespace):
        where = f"{name}:{cell.line + 1}"
        if cell.absent:
            found += [f"{where} needs a model that is not there, and says\n{text}"] if text or svg else []
            continue
        if not same_output(cell.text, text):
            found.append(f"{where} shows\n{cell.text}and prints\n{text}")
        if svg is not None and not same_output(words(stored(cell.picture)), words(svg)):
            found.append(f"{where} draws other words than {cell.picture}")
        exercise = EXERCISE.search(cell.code)
        if bool(exercise) != bool(cell.solutions):
            found.append(f"{where} is an exercise without a solution, or has a solution and is none")
        if exercise and text != f"exercise {exercise[1]}: not yet. {UNDONE}\n":
            found.append(f"{where} does not say that nothing was written:\n{text}")
        for solution in cell.solutions:
            if (said := tried(cell, solution, namespace)) != f"exercise {exercise and exercise[1]}: done.\n":
                found.append(f"{where} does not take its solution:\n{said}")
    return found


def stored(picture):
    return (COURSE / picture).read_text(encoding="utf-8")


@newest
@page_by_page
def test_a_page_does_what_it_shows(page):
    assert not (found := faults(page.read_text(encoding="utf-8"), page.name, stored)), "\n".join(found)


@newest
@pytest.mark.slow
def test_the_first_page_runs_on_a_real_model():
    if not (folder_of("smollm2-135m") / "config.json").is_file():
        pytest.skip("make real makes smollm2-135m")
    namespace, said = {}, []
    for cell, _, _ in outputs(PAGES[0].read_text(encoding="utf-8"), PAGES[0].name, namespace, "smollm2-135m"):
        said += [tried(cell, solution, namespace) for solution in cell.solutions]
    assert said == [f"exercise 1.{n}: done.\n" for n in (1, 2, 3)]
    assert namespace["L"] == 30 and namespace["distance"][30] > namespace["distance"][29] > 0  # the bug is there too


@page_by_page
def test_a_page_ends_on_a_real_model(page):
    text = page.read_text(encoding="utf-8")
    start = text.index("\n## On a real model, where there is one\n")
    assert text.count("\n## ", start) == 2  # and then what to take with you
    of_real = [bool(REAL.search(cell.code)) for cell in cells(text)]
    assert of_real == [cell.line > text.count("\n", 0, start) for cell in cells(text)] and any(of_real)
    assert next(cell for cell in cells(text) if REAL.search(cell.code)).text.count("\n") > 1


@page_by_page
def test_a_notebook_is_its_page(page):
    text = page.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert text == notebook(page.read_text(encoding="utf-8")), f"python tools/course.py {page} writes it"
    assert len(text.encode()) < LARGEST
    whole = json.loads(text)
    assert (whole["nbformat"], whole["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in whole["cells"]}) == len(whole["cells"])
    code = [cell for cell in whole["cells"] if cell["cell_type"] == "code"]
    assert all("outputs" in cell for cell in code) and any(cell["outputs"] for cell in code)


def test_the_exercises_are_numbered_by_page():
    for page in PAGES:
        numbers = EXERCISE.findall(page.read_text(encoding="utf-8"))
        assert numbers == [f"{page.name[0]}.{n}" for n in range(1, len(numbers) + 1)] and numbers


PAGE = """# A page

```python
import torch
import tl_lenses as tll

def double(x):
    raise NotImplementedError
```

```python
with tll.lab.exercise("1.1"):
    assert double(2) == 4, "two and two are 4"
```

```text
exercise 1.1: not yet. Replace `raise NotImplementedError` and run both cells.
```

```py
def double(x):
    return 2 * x
```

```python
print("layer", 3)
tll.views.heat([[1.0, 2.0]], title="two")
```

```text
layer 3
```

![two numbers](figures/two.svg)
"""


def test_this_test_can_fail():
    drawn = list(outputs(PAGE, "page", {}))[-1][2]
    assert faults(PAGE, "page", lambda picture: drawn) == []
    for old, new, fault in (
        ("layer 3\n```\n\n!", "layer 4\n```\n\n!", "page:26 shows\nlayer 4\nand prints\nlayer 3\n"),
        ("2 * x", "3 * x", "page:12 does not take its solution:\nexercise 1.1: not yet. two and two are 4\n"),
        ("    raise NotImplementedError\n```", "    return 5\n```", "not yet. two and two are 4"),
        ('title="two"', 'title="three"', "page:26 draws other words than figures/two.svg"),
        ("```py\n", "```\n", "page:12 is an exercise without a solution"),
    ):
        assert old in PAGE
        assert fault in "".join(faults(PAGE.replace(old, new, 1), "page", lambda picture: drawn))


def test_outputs_are_written_into_a_page():
    bare = PAGE.replace("```text\nlayer 3\n```\n\n", "")
    assert written(bare, list(outputs(bare, "page", {}))) == PAGE
    with pytest.raises(ValueError, match="a picture without a line"):
        bare = PAGE.replace("\n![two numbers](figures/two.svg)\n", "")
        written(bare, list(outputs(bare, "page", {})))

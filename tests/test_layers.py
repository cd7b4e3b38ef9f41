"""The layers of the design hold, `import tl_lenses` is light, and the test that says so can fail."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "tl_lenses"

# Floors from the ground up. A file imports from floors below its own, whether at import or when called; a folder is one room here.
FLOORS: list[list[str]] = [
    [
        "layers",
        "tokens",
        "moments",
        "stats",
        "edits",
        "affine",
        "aitchison",
        "linearised",
        "files",
        "progress",
        "token_text",
        "deprecation",
        "checks",
    ],
    ["views", "divergence", "model", "text", "numerics"],
    ["translators", "sites", "decoding", "effects", "unembed", "shown"],
    ["solve", "hooks", "identity"],
    ["lens", "decode", "patchscopes"],
    ["trajectories", "evaluation", "calibrating", "capturing", "invariants", "fit", "lab", "shares"],
    ["methods", "loading", "__init__"],
    ["experiments", "demo"],
    ["cli"],
    ["__main__"],
]
# Inside a folder the same; files of one floor do not import each other.
ROOMS: dict[str, list[list[str]]] = {
    "files": [["atomic", "text"], ["lock", "maps", "shards", "states", "tables"], ["export", "foreign", "hub"]],
    "text": [["sources", "stored"], ["stream"], ["batches"]],
    "fit": [
        ["common", "guard", "settings", "stop", "team", "whiten"],
        ["optim", "shard", "state", "step"],
        ["evidence", "examples", "jacobian", "kept", "sampled"],
        ["plan", "regression"],
        ["start"],
        ["learner"],
        ["training"],
        ["scope", "tuned"],
        ["timing"],
    ],
    "patchscopes": [
        ["attention", "continuation", "joining", "result", "sources"],
        ["pairs", "parts", "targets"],
        ["filling", "planner", "readers"],
        ["request", "scopes"],
        ["run"],
        ["scoring"],
    ],
    "experiments": [
        ["grid", "subject", "energy", "facts"],
        ["basis", "choices"],
        ["injections"],
        ["report"],
        ["calibration", "common"],
        ["faithful"],
        ["patchscopes", "tuned_lens", "which_lens"],
        ["comparison"],
    ],
    "views": [
        ["style", "glyphs"],
        ["canvas", "cells", "grid"],
        ["document", "heatmap", "lines", "rows", "saving"],
        ["picture", "scope", "scores", "table", "term"],
        ["matrix", "reading"],
        ["page"],
        ["pages"],
    ],
    "cli": [
        ["memory", "messages", "options"],
        ["parts", "states"],
        ["inputs"],
        ["capture", "check", "demo", "evaluate", "experiment", "fit", "lenses", "patchscope", "show", "version"],
        ["fit_scope", "lens_experiments", "patchscope_experiments"],
        ["commands"],
    ],
}
MATHEMATICS = {"moments", "stats", "edits", "affine", "aitchison", "translators", "divergence", "solve", "layers", "numerics"}
LIGHT = {"torch", "einops", "jaxtyping"}


def _imports(path: Path) -> list[tuple[str, bool]]:
    """`(module, at import time?)` for every import of a file, `tl_lenses.` stripped off ours (which start with a dot then)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)}
    typing_only = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.If) and "TYPE_CHECKING" in ast.dump(f.test) for n in ast.walk(f)
    }
    imports = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" if node.module == "tl_lenses" else node.module for alias in node.names]
        else:
            continue
        for name in names:
            imports.append((name.replace("tl_lenses.", ".", 1) if name.startswith("tl_lenses.") else name, id(node) not in inside))
    return imports


def _floor(name: str, floors: list[list[str]]) -> int:
    return next((number for number, names in enumerate(floors) if name in names), -1)


def problems(path: Path, package: Path = PACKAGE) -> list[str]:
    """What is wrong with the imports of one file."""
    parts = path.relative_to(package).with_suffix("").parts
    room, here = parts[0], ".".join(parts)
    wrong = [] if _floor(room, FLOORS) >= 0 else [f"{here} stands on no floor"]
    for name, _ in _imports(path):
        if not name.startswith("."):
            root = name.split(".")[0]
            if room in MATHEMATICS and root not in LIGHT | set(sys.stdlib_module_names):
                wrong.append(f"{here} is mathematics and imports {name}")
            continue
        other = name[1:].split(".")
        if other[0] != room:
            if _floor(other[0], FLOORS) >= _floor(room, FLOORS):
                wrong.append(f"{here} imports {other[0]}, which is not below it")
        elif parts[-1] != "__init__" and len(other) > 1:
            floors = ROOMS.get(room)
            if floors is not None and _floor(other[1], floors) >= _floor(parts[1], floors):
                wrong.append(f"{here} imports {'.'.join(other[:2])}, which is not below it")
    return wrong


FILES = sorted(p for p in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_layers(path):
    assert problems(path) == []


def test_this_test_can_fail(tmp_path):
    package = tmp_path / "tl_lenses"
    for folder in ("experiments/tuned_lens", "fit"):
        (package / folder).mkdir(parents=True)
    for name, text, message in (
        ("solve", "import transformer_lens", "solve is mathematics and imports transformer_lens"),
        ("edits", "from tl_lenses.hooks import run", "edits imports hooks, which is not below it"),
        ("hooks", "from tl_lenses import lens", "hooks imports lens, which is not below it"),
        ("lens", "def f():\n    from tl_lenses import evaluation", "lens imports evaluation, which is not below it"),
        ("stats", "from tl_lenses.edits import add", "stats imports edits, which is not below it"),
        ("fit/step", "from tl_lenses.fit.tuned import x", "fit.step imports fit.tuned, which is not below it"),
        (
            "experiments/tuned_lens/one",
            "from tl_lenses.experiments.tuned_lens.two import x",
            "experiments.tuned_lens.one imports experiments.tuned_lens, which is not below it",
        ),
        ("attic", "import torch", "attic stands on no floor"),
    ):
        file = package / f"{name}.py"
        file.write_text(text)
        assert problems(file, package) == [message]
    late = package / "trajectories.py"
    late.write_text("def f():\n    from tl_lenses import views")
    assert problems(late, package) == []


def test_ten_floors_at_most_and_every_room_on_one():
    rooms = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES}
    placed = [name for names in FLOORS for name in names]
    assert len(FLOORS) <= 10 and sorted(placed) == sorted(rooms)
    for room, floors in ROOMS.items():
        files = {path.relative_to(PACKAGE / room).with_suffix("").parts[0] for path in (PACKAGE / room).rglob("*.py")}
        assert sorted(name for names in floors for name in names) == sorted(files - {"__init__"}), room


def test_no_module_is_shadowed_by_a_function_of_its_name():
    for path in FILES:
        name = ".".join(("tl_lenses", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        if not name.endswith("__main__"):
            parent, _, leaf = import_module(name).__name__.rpartition(".")
            assert not parent or getattr(import_module(parent), leaf) is import_module(name), name


def test_no_isinstance_of_model_classes_and_no_architecture_branches():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for word in ("original_architecture", "isinstance(model", "GPT2", "gpt_neox", "GPTNeoX"):
            assert word not in text.replace("'GPT2", "") or path.parts[-2] == "lab", (path.name, word)


def test_import_is_light():
    code = (
        "import sys, tl_lenses\n"
        "heavy = [m for m in ('transformer_lens', 'transformers', 'datasets', 'pandas', 'plotly', 'matplotlib', 'rich', 'typer', 'safetensors', 'sklearn') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
        "assert set(tl_lenses.__all__) <= set(dir(tl_lenses)) | {'calibration', 'compare', 'experiments', 'faithfulness', 'lab', 'load_model', 'methods', 'page', 'views'}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr


def test_files_are_read_at_one_sitting():
    long = {str(p.relative_to(PACKAGE)): n for p in FILES if (n := len(p.read_text(encoding="utf-8").splitlines())) > 500}
    assert not long

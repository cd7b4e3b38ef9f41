"""The layers of the design hold, `import tl_lenses` is light, and the test that says so can fail."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "tl_lenses"

# Groups from the bottom of the stack up. A file imports from groups above its own in this list (earlier ones) and, in the groups marked
# so, from files beside it.
GROUPS: list[tuple[str, bool, list[str]]] = [
    ("mathematics", True, ["moments", "translators", "solve", "edits", "stats", "divergence", "aitchison"]),
    (
        "outside",
        True,
        [
            "texts",
            "token_text",
            "stream",
            "data",
            "model",
            "sites",
            "hooks",
            "unembed",
            "fingerprint",
            "checkpoint",
            "progress",
        ],
    ),
    ("ideas", True, ["lens", "trajectory", "evaluation", "invariants", "patchscopes"]),
    ("methods", False, ["fit", "experiments"]),
    ("views", False, ["views"]),
    (
        "faces",
        True,
        [
            "lab",
            "demo",
            "cli_inputs",
            "cli_patchscope",
            "cli_lens_experiments",
            "cli_experiments",
            "cli",
            "__main__",
            "__init__",
        ],
    ),
]
# Methods that hand over to a face of the value they belong to; imported when called and never at import.
LATE = {
    "translators": {"checkpoint"},
    "trajectory": {"views"},
    "evaluation": {"views"},
    "patchscopes": {"views"},
    "experiments": {"views"},
}
MATHEMATICS = {"torch", "einops", "jaxtyping"}
_COMMON = ("common", "facts", "lines", "picture", "report")
# Beside-imports inside folders: what several methods share, and the drawing primitives.
SHARED = {
    "fit": {
        *("fit.common", "fit.regression", "fit.optim", "fit.plan", "fit.start", "fit.step", "fit.stop"),
        *("fit.distributed", "fit.evidence", "fit.shard", "fit.state", "fit.whiten"),
    },
    "experiments": {
        f"experiments.{name}"
        for name in (*_COMMON, "basis", "choices", "energy", "injections", "norms", "ranks", "states", "streams")
    },
    "views": None,
    "patchscopes": None,
    "lab": None,
}


def _imports(path: Path) -> list[tuple[str, bool]]:
    """`(module, at import time?)` for every import of a file, `tl_lenses.` stripped off ours (which start with a dot then)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)
    }
    typing_only = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, ast.If) and "TYPE_CHECKING" in ast.dump(f.test)
        for n in ast.walk(f)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [
                f"{node.module}.{alias.name}" if node.module == "tl_lenses" else node.module for alias in node.names
            ]
        else:
            continue
        for name in names:
            found.append(
                (name.replace("tl_lenses.", ".", 1) if name.startswith("tl_lenses.") else name, id(node) not in inside)
            )
    return found


def _group(name: str) -> int:
    return next(i for i, (_, _, names) in enumerate(GROUPS) if name in names)


def problems(path: Path, package: Path = PACKAGE) -> list[str]:
    """What is wrong with the imports of one file."""
    parts = path.relative_to(package).with_suffix("").parts
    top = parts[0]
    wrong = []
    for name, at_import in _imports(path):
        if not name.startswith("."):
            root = name.split(".")[0]
            if _group(top) == 0 and root not in MATHEMATICS | set(sys.stdlib_module_names):
                wrong.append(f"{'.'.join(parts)} is mathematics and imports {name}")
            continue
        other = name[1:].split(".")[0]
        if other == top:
            allowed = None if parts[-1] == "__init__" else SHARED.get(top)
            if top in SHARED and allowed is not None and name[1:] not in allowed:
                wrong.append(f"{'.'.join(parts)} imports {name[1:]} beside it")
        elif not at_import and other in LATE.get(top, set()):
            continue
        elif _group(other) > _group(top) or (_group(other) == _group(top) and not GROUPS[_group(top)][1]):
            wrong.append(f"{'.'.join(parts)} ({GROUPS[_group(top)][0]}) imports {other} ({GROUPS[_group(other)][0]})")
    return wrong


FILES = sorted(p for p in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_layers(path):
    assert problems(path) == []


def test_this_test_can_fail(tmp_path):
    package = tmp_path / "tl_lenses"
    package.mkdir()
    for name, text, message in (
        ("solve", "import transformer_lens", "solve is mathematics and imports transformer_lens"),
        ("edits", "from tl_lenses.hooks import run", r"edits (mathematics) imports hooks (outside)"),
        ("hooks", "from tl_lenses import lens", r"hooks (outside) imports lens (ideas)"),
        ("trajectory", "from tl_lenses import views", r"trajectory (ideas) imports views (views)"),
        ("lens", "def f():\n    from tl_lenses import views", r"lens (ideas) imports views (views)"),
    ):
        file = package / f"{name}.py"
        file.write_text(text)
        assert problems(file, package) == [message]
    (package / "experiments").mkdir()
    file = package / "experiments" / "one.py"
    file.write_text("from tl_lenses.experiments.two import x\nfrom tl_lenses.experiments.common import y")
    assert problems(file, package) == ["experiments.one imports experiments.two beside it"]
    late = package / "trajectory.py"
    late.write_text("def f():\n    from tl_lenses import views")
    assert problems(late, package) == []


def test_no_isinstance_of_model_classes_and_no_architecture_branches():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for word in ("original_architecture", "isinstance(model", "GPT2", "gpt_neox", "GPTNeoX"):
            assert word not in text.replace("'GPT2", "") or path.parts[-2] == "lab", (path.name, word)


def test_import_is_light():
    code = (
        "import sys, tl_lenses\n"
        "heavy = [m for m in ('transformer_lens', 'transformers', 'datasets', 'pandas', 'plotly', 'rich', 'typer', 'safetensors', 'sklearn') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
        "assert set(tl_lenses.__all__) <= set(dir(tl_lenses)) | {'lab', 'views'}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr


def test_files_are_read_at_one_sitting():
    long = {
        str(p.relative_to(PACKAGE)): n for p in FILES if (n := len(p.read_text(encoding="utf-8").splitlines())) > 500
    }
    assert not long

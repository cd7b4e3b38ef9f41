"""Shapes in annotations of `tl_lenses`, checked at every call: jaxtyping and beartype on the functions that have some.

    import shapes
    shapes.check()          # before anything imports tl_lenses

jaxtyping's own hook decorates all functions, also those that are made anew in every call: a small fit took four times as long.
"""

import ast
import importlib.abc
import importlib.machinery
import re
import sys
from pathlib import Path
from typing import Any, get_args

import beartype

PACKAGE = Path(__file__).resolve().parents[1] / "tl_lenses"
_ALIAS = re.compile(r"^(\w+) = .*\b(?:Bool|Float|Int|Num)\[", re.MULTILINE)
# A name of jaxtyping's, or one that the package gives to such a type.
NAMES = {"Bool", "Float", "Int", "Num"} | {
    name for path in PACKAGE.rglob("*.py") for name in _ALIAS.findall(path.read_text(encoding="utf-8"))
}


def checked(function: Any) -> Any:
    """beartype, but for protocols: asking a model for every name of its protocol makes a bridge look all its hooks up again."""
    for name, hint in function.__annotations__.items():
        if any(getattr(part, "_is_protocol", False) for part in (hint, *get_args(hint))):
            function.__annotations__[name] = Any
    return beartype.beartype(function)


def _names(nodes: list[ast.expr | None]) -> set[str]:
    """The names in annotations, quoted ones too."""
    return set(re.findall(r"\w+", " ".join(ast.unparse(node) for node in nodes if node is not None)))


def _has_shapes(node: ast.AST) -> bool:
    """Whether a function, or a field of a class, is annotated with the shape of a tensor."""
    if isinstance(node, ast.FunctionDef):
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs + [node.args.vararg, node.args.kwarg]
        return bool(NAMES & _names([*(argument and argument.annotation for argument in arguments), node.returns]))
    if isinstance(node, ast.ClassDef):
        return bool(NAMES & _names([part.annotation for part in node.body if isinstance(part, ast.AnnAssign)]))
    return False


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        """The code with decorators: never from a cache, which has it without."""
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path), path)
        for node in [node for node in ast.walk(tree) if _has_shapes(node)]:
            decorator = ast.parse("__import__('jaxtyping').jaxtyped(typechecker=__import__('shapes').checked)").body[0]
            # Innermost of a function, which others may hide; outermost of a class, which `dataclass` makes first.
            place = 0 if isinstance(node, ast.ClassDef) else len(node.decorator_list)
            node.decorator_list.insert(place, ast.copy_location(decorator.value, node))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] != PACKAGE.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def check() -> None:
    """From now on, in this process."""
    assert PACKAGE.name not in sys.modules
    sys.meta_path.insert(0, _Finder())

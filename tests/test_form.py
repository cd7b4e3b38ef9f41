"""The form of the code: a function fits a screen, takes few arguments, and says what it takes by name."""

import ast
import inspect
import io
import tokenize
from pathlib import Path

import jaxtyping
import pytest
import torch

import tl_lenses as tll
from tl_lenses import aitchison, stats
from tl_lenses.moments import Moments

PACKAGE = Path(__file__).resolve().parents[1] / "tl_lenses"
BODY, PARAMETERS, POSITIONAL = 80, 10, 5

# Called by users: they may have more keywords. Typer reads the options of a command from its function.
PUBLIC = {name for name in tll.__all__ if inspect.isfunction(getattr(tll, name, None))}


def functions(path):
    """`(name, node)` of every function of a file; those inside others count with what is around them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    place = ".".join(path.relative_to(path.parents[len(path.relative_to(PACKAGE).parts) - 1]).with_suffix("").parts)
    for node in tree.body:
        for member in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)):
                owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                yield f"{place}.{owner}{member.name}", member


def body_lines(node):
    """Lines of a function's body without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def parameters(node):
    """Names of a function's parameters without self: all, and those that may be positional."""
    positional = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
    return [*positional, *(a.arg for a in node.args.kwonlyargs)], positional


# Not yet: a line goes when its function does.
TOO_LONG: set[str] = set()
TOO_MANY = {"experiments.tuned_lens.sampling.sample_from"}


ALL = [function for path in sorted(PACKAGE.rglob("*.py")) for function in functions(path)]


def test_functions_fit_a_screen():
    assert {name: body_lines(node) for name, node in ALL if body_lines(node) > BODY and name not in TOO_LONG} == {}
    assert TOO_LONG <= {name for name, node in ALL if body_lines(node) > BODY}


def crowded():
    """Functions of too many parameters, or too many by position, and these; a command may have many."""
    for name, node in ALL:
        every, positional = parameters(node)
        public = name.rpartition(".")[2] in PUBLIC or is_entry(node)
        if (len(positional) > POSITIONAL if public else len(every) > PARAMETERS) and not is_command(node):
            yield name, positional if public else every


def test_functions_take_few_parameters():
    """And public ones few by position."""
    assert {name: which for name, which in crowded() if name not in TOO_MANY} == {}
    assert TOO_MANY <= dict(crowded()).keys()


def is_command(node):
    """Whether Typer reads a function: its parameters are options of the command line."""
    return "typer." in ast.dump(node.args).replace("id='typer'", "typer.") or any(
        "command" in ast.dump(d) for d in node.decorator_list
    )


def is_entry(node):
    """Whether the docstring has an example: it is called by users."""
    return "Example:" in (ast.get_docstring(node) or "")


def test_this_test_can_fail():
    long = ast.parse("def f(a, b, c, d, e, g):\n" + "    a = 1\n" * 81).body[0]
    assert body_lines(long) == 81 and parameters(long)[1] == ["a", "b", "c", "d", "e", "g"]
    assert not is_command(long) and not is_entry(long)


# --- prose: a line that was broken in the middle of a sentence

# Not yet: a file goes when its lines are filled.
BROKEN: set[str] = set()


def prose(path):
    """Lines of a file, and the numbers of those in docstrings and of those that are comments."""
    text = path.read_text(encoding="utf-8")
    inside: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            inside |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {t.start[0] for t in tokens if t.type == tokenize.COMMENT and t.line.lstrip().startswith("#")}
    return text.splitlines(), inside, comments


def broken_lines(path):
    """Short lines between long ones, in the middle of a sentence, behind which the next word would have fitted."""
    lines, docstrings, comments = prose(path)
    indent = lambda line: len(line) - len(line.lstrip("# "))
    lines_ = []
    for number in range(2, len(lines)):
        group = docstrings if number in docstrings else comments
        before, line, after = lines[number - 2 : number + 1]
        words = after.lstrip("# ").split()
        if not {number - 1, number, number + 1} <= group or not line.strip('# "') or not words:
            continue
        if any(part.lstrip("# ").startswith((">>>", "|")) for part in (before, line, after)) or indent(line) != indent(after):
            continue
        short = len(before) >= 85 and len(line) <= 70 and len(line) + 1 + len(words[0]) <= 105
        if short and line.rstrip()[-1] not in ".:;?!)`":
            lines_.append((number, line.strip()))
    return lines_


def test_no_line_is_broken_in_the_middle_of_a_sentence():
    found = {str(path.relative_to(PACKAGE)): broken_lines(path) for path in PACKAGE.rglob("*.py")}
    assert {name: lines for name, lines in found.items() if bool(lines) != (name in BROKEN)} == {}


def test_the_test_of_broken_lines_can_fail(tmp_path):
    broken = tmp_path / "one.py"
    long = "word " * 20 + "end"
    broken.write_text(f'"""First.\n\n{long}\ntwo words\nand then the sentence goes to its end.\n"""\n')
    assert broken_lines(broken) == [(4, "two words")]
    broken.write_text(f'"""First.\n\n{long}\ntwo words.\n\n>>> f({long!r})\n1\n\n"""\n')
    assert broken_lines(broken) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.kl(torch.zeros(2, 3), torch.zeros(2, 4)),
        lambda: aitchison.perturb(torch.zeros(3), torch.zeros(3).long()),
        lambda: Moments(1, torch.zeros(3), *[torch.zeros(1, 3)] * 4),
    ],
    ids=["function", "type by another name", "fields"],
)
def test_shapes_in_annotations_are_checked_at_calls(call):
    with pytest.raises(jaxtyping.TypeCheckError, match="Type-check error whilst checking the parameters"):
        call()

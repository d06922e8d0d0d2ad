"""The shape of the code: small modules and functions, all of them with a purpose stated."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import sandbox_kernel

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sandbox_kernel"
MODULES = sorted(PACKAGE.rglob("*.py"))
CODE = [path for path in MODULES if path.name != "__init__.py"]

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 50
VAGUE = re.compile(r"(^|_)(utils?|helpers?|common|misc|manager)(_|$)")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), named(path))


@pytest.mark.parametrize("path", CODE, ids=named)
def test_a_module_states_its_purpose_and_is_short(path: Path) -> None:
    assert ast.get_docstring(tree(path)), "no docstring"
    assert len(path.read_text("utf-8").splitlines()) <= MAX_MODULE_LINES
    assert not VAGUE.search(path.stem), "a name that could hold anything"


@pytest.mark.parametrize("path", CODE, ids=named)
def test_functions_are_short(path: Path) -> None:
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert long == []


@pytest.mark.parametrize("path", CODE, ids=named)
def test_classes_do_not_manage(path: Path) -> None:
    names = [node.name for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)]
    assert [name for name in names if re.search(r"(Manager|Helper|Util)s?$", name)] == []


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py"], ids=named)
def test_packages_are_empty(path: Path) -> None:
    for node in tree(path).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_version = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
        is_future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        assert is_docstring or is_version or is_future, ast.unparse(node)


def test_the_drawn_error_tree_is_the_real_one() -> None:
    module = tree(PACKAGE / "errors.py")
    classes = {
        node.name: ast.unparse(node.bases[0])
        for node in module.body
        if isinstance(node, ast.ClassDef)
    }
    root = next(name for name, base in classes.items() if base == "Exception")
    drawn: dict[str, str] = {}
    above: list[str] = []
    for line in (ast.get_docstring(module) or "").splitlines():
        match = re.match(r"([│ ]*)(?:[├└]── )?(\w+)", line)
        if match and match[2] in classes and (match[2] == root or "──" in line):
            depth = (line.index(match[2])) // 4
            above[depth:] = [match[2]]
            drawn[match[2]] = above[depth - 1] if depth else "Exception"
    assert drawn == classes


def test_the_package_under_test_is_this_one() -> None:
    assert Path(sandbox_kernel.__file__).parent == PACKAGE

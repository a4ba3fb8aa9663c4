"""The one law, and the habits of the house, read from the files themselves."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HUB = "gateway"
FILES = sorted(ROOT.glob("*.py"))
NAMES = {path.stem for path in FILES}
LEAVES = [path for path in FILES if path.stem != HUB]
# Names that would shadow other people's modules in a checkout.
FOREIGN = {"websocket", "agents", "http", "types", "secrets", "queue", "json5", "models"}
THIRD_PARTY = {("settings", "json5"), ("connection", "uvloop")}

files = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
leaves = pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(node: ast.AST) -> Iterator[str]:
    """The top-level name of each module that is imported anywhere in `node`; "." for a relative one."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in inner.names)
        elif isinstance(inner, ast.ImportFrom):
            yield "." if inner.level else str(inner.module).partition(".")[0]


def test_the_check_sees_every_kind_of_import() -> None:
    code = "import a.b, c\nfrom d.e import f\ndef g():\n from . import h\n from .i import j\n"
    assert list(imports(ast.parse(code))) == ["a", "c", "d", ".", "."]


def test_there_is_a_hub_and_leaves() -> None:
    assert HUB in NAMES
    assert LEAVES
    assert not NAMES & FOREIGN
    assert not NAMES & sys.stdlib_module_names
    assert not list(ROOT.glob("__init__.py"))


@leaves
def test_a_leaf_imports_no_sibling(path: Path) -> None:
    assert not {name for name in imports(tree(path)) if name in NAMES or name == "."}


@files
def test_what_is_beyond_the_standard_library_is_imported_late(path: Path) -> None:
    module = tree(path)
    known = sys.stdlib_module_names | (NAMES | {"."} if path.stem == HUB else set())
    found = {(path.stem, name) for name in imports(module) if name not in known}
    assert found <= THIRD_PARTY
    functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert found == {(path.stem, name) for f in functions for name in imports(f) if name not in known}


def test_both_branches_of_the_hub_import_the_same() -> None:
    body = tree(ROOT / f"{HUB}.py").body
    test = "TYPE_CHECKING or not __package__"
    (branch,) = (node for node in body if isinstance(node, ast.If) and ast.unparse(node.test) == test)
    assert bound(branch.body) == bound(branch.orelse)
    elsewhere = [node for node in body if node is not branch]
    assert not {name for node in elsewhere for name in imports(node) if name in NAMES or name == "."}


def bound(branch: list[ast.stmt]) -> set[tuple[str, str, str]]:
    """What is imported as (leaf, name in it or "", the name that it gets here)."""
    found = set()
    for node in branch:
        assert isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names:
            where = node.module if isinstance(node, ast.ImportFrom) else None
            leaf, name = (where, alias.name) if where else (alias.name, "")
            assert leaf in NAMES
            found.add((leaf, name, alias.asname or alias.name))
    return found


@files
def test_what_is_public_says_what_it_is(path: Path) -> None:
    module = tree(path)
    assert ast.get_docstring(module)
    public = [
        node
        for node in module.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not only_fields(node)
    ]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def only_fields(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef) and all(isinstance(inner, ast.AnnAssign) for inner in node.body)


@files
def test_the_readme_names_the_file_in_its_table(path: Path) -> None:
    rows = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert path.name in re.findall(r"\w+\.py\b", "\n".join(rows))

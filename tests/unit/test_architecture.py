"""The shape of the package: folders import downwards only, and a public name has one meaning."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fastface_cli"

LAYERS = (
    ("__main__",),
    ("cli",),
    ("commands",),
    ("console",),
    ("evaluation", "benchmark", "server"),
    ("doctor",),
    ("app",),
    ("scorers",),
    ("models",),
    ("adapters",),
    ("sampling",),
    ("identity",),
    ("output",),
    ("store",),
    ("recipe",),
    ("settings", "files", "pocket", "quiet"),
    ("errors",),
)
"""From top to bottom; what shares a line does not import one another."""

RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def imported_parts(path: Path, tree: ast.Module) -> Iterator[str]:
    """The folders and top-level modules of the package that a module imports at any place."""
    depth = len(path.relative_to(PACKAGE).parts) - 1
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == depth + 1:
            yield from [node.module.split(".")[0]] if node.module else (alias.name for alias in node.names)


def test_every_part_of_the_package_has_a_layer():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path, _ in modules()}
    assert parts - {"__init__"} == set(RANK), "add new folders to LAYERS"


def test_folders_import_only_from_folders_below_them():
    wrong = []
    for path, tree in modules():
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for imported in imported_parts(path, tree):
            if imported in ("__version__", part):
                continue
            if RANK[imported] <= RANK[part]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {imported}")
    assert wrong == []


def test_no_public_class_or_type_alias_is_defined_twice():
    places: dict[str, list[str]] = defaultdict(list)
    for path, tree in modules():
        for node in tree.body:
            name = None
            if isinstance(node, ast.ClassDef):
                name = node.name
            elif isinstance(node, ast.AnnAssign) and "TypeAlias" in ast.unparse(node.annotation):
                name = ast.unparse(node.target)
            if name and not name.startswith("_"):
                places[name].append(path.relative_to(PACKAGE).as_posix())
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("limit", [60])
def test_functions_fit_a_screen(limit):
    """Command signatures are not counted: their options are their documentation."""
    long = []
    for path, tree in modules():
        if path.parent.name == "commands":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > limit:
                long.append(f"{path.relative_to(PACKAGE)}:{node.name}")
    assert long == []


def test_functions_take_at_most_eight_parameters():
    """Constructors are not counted: their options are their documentation too."""
    wide = []
    for path, tree in modules():
        if path.parent.name == "commands":
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([a for a in arguments if a.arg not in ("self", "cls")])
            if count > 8 and node.name != "__init__":
                wide.append(f"{path.relative_to(PACKAGE)}:{node.name} {count}")
    assert wide == []


def test_no_test_module_imports_another():
    tests = PACKAGE.parent / "tests"
    wrong = []
    for path in sorted(tests.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module.rpartition(".")[2].startswith(("test_", "conftest")):
                wrong.append(f"{path.relative_to(tests)} imports {module}")
    assert wrong == []

"""The shape of the code: small files with a purpose, everything public explained, nothing that ties it to one machine."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.builders.paths import ROOT

PACKAGE = sorted((ROOT / "sftd").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
LONGEST = 400
VAGUE = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_a_file_is_short_and_named_for_what_it_holds(path: Path) -> None:
    assert path.name not in VAGUE
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST, "split it where its purpose says `and`"


def public(tree: ast.Module) -> Iterator[ast.AST]:
    yield tree
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name[0] != "_":
            yield node
            if isinstance(node, ast.ClassDef):
                for member in node.body:
                    if isinstance(member, ast.FunctionDef) and member.name[0] != "_" and not overrides(node):
                        yield member


def overrides(cls: ast.ClassDef) -> bool:
    """Whether a class may override methods that its base has documented."""
    return bool(cls.bases)


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    bare = [getattr(node, "name", "module") for node in public(tree) if not ast.get_docstring(node)]  # type: ignore[arg-type]
    assert bare == []


# No path of the machine that it was written on, no package index, nothing left to do.
FORBIDDEN = re.compile(
    r"(?<![\w/.])/root/|/home/\w+/|/tmp/(?!\{)|https?://[\w.-]*(?:pypi|index|mirror)[\w.-]*/simple"
    r"|\b(?:TODO|FIXME|XXX)\b|breakpoint\(|pdb"
)
SHIPPED = sorted(
    path
    for pattern in (
        "sftd/**/*.py",
        "migrations/**/*.py",
        "scripts/*",
        "Makefile",
        "*.toml",
        "*.ini",
        "*.txt",
        ".ci/*",
    )
    for path in ROOT.glob(pattern)
    if path.is_file()
)


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_nothing_is_left_over(path: Path) -> None:
    found = [line for line in path.read_text().splitlines() if FORBIDDEN.search(line)]
    assert found == []


# A launcher's own modules, its section and row, its settings, its entry in the registry, and an example for people.
NAMES_SLURM = {
    "domain/spec/launch/slurm.py",
    "domain/spec/sections.py",
    "domain/spec/launch/launchers.py",
    "settings/__init__.py",
    "launcher/choosing.py",
    "cli/submit/command.py",
}


def test_no_launcher_is_named_where_all_are_meant() -> None:
    """Another launcher adds files and rows; it edits no module that compares names."""
    own = ROOT / "sftd/launcher/slurm"
    naming = {str(p.relative_to(ROOT / "sftd")) for p in PACKAGE if "slurm" in p.read_text().lower()}
    assert naming - NAMES_SLURM == {str(p.relative_to(ROOT / "sftd")) for p in own.glob("*.py")}


def test_the_command_line_is_not_made_of_prints() -> None:
    """Only the trainer's own output and the CLI talk; a library that prints cannot be used in a daemon."""
    quiet = [p for p in PACKAGE if p.relative_to(ROOT / "sftd").parts[0] not in ("cli", "trainer")]
    calls = [
        name(path)
        for path in quiet
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []


MOST = 16


@pytest.mark.parametrize("folder", sorted({p.parent for p in [*PACKAGE, *TESTS]}), ids=name)
def test_a_folder_holds_few_modules(folder: Path) -> None:
    assert len(list(folder.glob("*.py"))) <= MOST, "make rooms, each named for what it holds"


@pytest.mark.parametrize("path", TESTS, ids=name)
def test_what_tests_share_is_a_builder(path: Path) -> None:
    """A module of tests can be read, moved and deleted by itself."""
    imported = [
        f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    assert [m for m in imported if re.search(r"(^|\.)(test_\w+|conftest)(\.|$)", m)] == [], (
        "move it to tests/builders"
    )


def test_a_public_class_has_a_name_of_its_own() -> None:
    """One name, one meaning, all over the product."""
    found: dict[str, list[str]] = {}
    for path in PACKAGE:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(name(path))
    assert {n: where for n, where in found.items() if len(where) > 1} == {}

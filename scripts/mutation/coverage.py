"""The lines and the time of each test, measured once per test file."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from mutation import forks
from mutation.mutants import Mutant

TOOL = sys.monitoring.COVERAGE_ID
SLOW_SECONDS = 4.0
"""A test that takes longer judges no mutant."""
BUDGET_SECONDS = 20.0
"""Maximum total time of a mutant's tests, measured without the mutation."""
RECORDED = "tests/unit/plan/test_recorded.py"
FIRST = 30
"""Tests of the first attempt: those that run the fewest lines besides the changed ones."""


@cache
def functions(path: Path) -> list[tuple[str, int, int]]:
    """Return name, first and last line of each function of a file that is not nested in another. Equal names are numbered."""
    found: list[tuple[str, int, int]] = []
    names: Counter[str] = Counter()

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                name = prefix + child.name
                names[name] += 1
                first = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                found.append((f"{name}#{names[name]}", first, child.end_lineno or first))
            else:
                walk(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix)

    walk(ast.parse(path.read_text()), "")
    return found


class Lines:
    """The lines of functions of sftd/ that run."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._prefix = f"{root}/sftd/"
        self._cut = len(str(root)) + 1
        self.seen: dict[str, set[int]] = defaultdict(set)

    def start(self) -> None:
        """Observe until the process ends."""
        sys.monitoring.use_tool_id(TOOL, "mutate")
        sys.monitoring.register_callback(TOOL, sys.monitoring.events.LINE, self._line)
        sys.monitoring.set_events(TOOL, sys.monitoring.events.LINE)

    def _line(self, code: CodeType, line: int) -> object:
        # The body of a class or module runs once, in whichever test imports it first: it is left out.
        if code.co_filename.startswith(self._prefix) and code.co_flags & inspect.CO_OPTIMIZED:
            self.seen[code.co_filename[self._cut :]].add(line)
        return sys.monitoring.DISABLE

    def take(self) -> dict[str, list[int]]:
        """Return the lines that ran since the last call: path and function → lines relative to the function's first."""
        taken: dict[str, list[int]] = {}
        for path, lines in self.seen.items():
            for place, first, last in functions(self._root / path):
                here = sorted(line - first for line in lines if first <= line <= last)
                if here:
                    taken[f"{path}::{place}"] = here
        self.seen.clear()
        sys.monitoring.restart_events()
        return taken


class Recorder:
    """Plugin: keeps the seconds and lines of each test that passes."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._failed: set[str] = set()
        self.tests: dict[str, Any] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [i for i in items if "[postgres" not in i.nodeid and "-postgres" not in i.nodeid]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or report.skipped:
            self._failed.add(report.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._lines.take()
        started = _cpu_seconds()
        try:
            return (yield)
        finally:
            seconds = round(_cpu_seconds() - started, 4)
            lines = self._lines.take()
            if item.nodeid not in self._failed:
                self.tests[item.nodeid] = {"seconds": seconds, "lines": lines}


def _cpu_seconds() -> float:
    """Return the CPU time of this process and its dead children, which the machine's load does not change."""
    return sum(os.times()[:4])


def measure(test_file: str, root: Path, folder: str) -> dict[str, Any]:
    """Return seconds and lines of each passing test of a file. Called in a fork."""
    lines = Lines(root)
    lines.start()
    recorder = Recorder(lines)
    pytest.main([*forks.OPTIONS, f"--basetemp={folder}/t", test_file], plugins=[recorder])
    return recorder.tests


@dataclass
class Coverage:
    """tests: seconds and lines of each test. early: lines that run when tests are collected."""

    tests: dict[str, Any]
    early: dict[str, list[int]]
    digests: dict[str, str]
    root: Path
    _by_line: dict[tuple[str, int], set[str]] = field(default_factory=lambda: defaultdict(set))
    _by_path: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    _size: dict[str, int] = field(default_factory=dict)
    _known: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for test, facts in self.tests.items():
            if facts["seconds"] > SLOW_SECONDS:
                continue
            self._size[test] = sum(map(len, facts["lines"].values()))
            for path, line in self._today(facts["lines"]):
                self._by_path[path].add(test)
                self._by_line[path, line].add(test)
        self._early = set(self._today(self.early))

    def _today(self, measured: dict[str, list[int]]) -> Iterator[tuple[str, int]]:
        """Yield path and line in the current files."""
        for key, lines in measured.items():
            path, _, place = key.partition("::")
            first = self._firsts(path).get(place)
            if first is not None:
                yield from ((path, first + line) for line in lines)

    def _firsts(self, path: str) -> dict[str, int]:
        if path not in self._known:
            there = self.root / path
            self._known[path] = {p: first for p, first, _ in functions(there)} if there.exists() else {}
        return self._known[path]

    def is_warm(self, mutant: Mutant) -> bool:
        """Whether exchanging a function's code is enough, because it does not run when the tests are collected."""
        return mutant.inside and not any((mutant.path, n) in self._early for n in _span(mutant))

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Return the tests that run the changed lines or, for a change outside of functions, the uses of the changed name. Tests
        that run few other lines come first."""
        found = self._of_lines(mutant.path, _span(mutant))
        if not mutant.inside:
            # RECORDED pins the contents of classes and tables, although none of their functions runs.
            near = set(found) | {test for test in self._size if test.startswith(RECORDED)}
            for name in mutant.names:
                for path, lines in _uses(self.root, name).items():
                    near |= self._of_lines(path, lines)
            ordered = self._ordered(near)
            ordered += self._ordered(self._by_path.get(mutant.path, set()) - near)
        else:
            ordered = self._ordered(found)
        return self._affordable(ordered)

    def _of_lines(self, path: str, lines: Collection[int]) -> set[str]:
        return set().union(*(self._by_line.get((path, line), set()) for line in lines))

    def _ordered(self, tests: Collection[str]) -> list[str]:
        def cost(test: str) -> tuple[bool, float, str]:
            # Tests of a database are slow: they migrate one first.
            return (
                test.startswith("tests/contract"),
                self._size[test] * (0.05 + self.tests[test]["seconds"]),
                test,
            )

        return sorted(tests, key=cost)

    def _affordable(self, tests: Sequence[str]) -> list[str]:
        chosen, seconds = [], 0.0
        for test in tests:
            cost = self.tests[test]["seconds"]
            if seconds + cost <= BUDGET_SECONDS:
                chosen.append(test)
                seconds += cost
        return chosen

    def digest(self, tests: Sequence[str]) -> str:
        """Return the digest of the inputs of a survival: the tests and their files."""
        said = json.dumps([[t, self.digests[t.partition("::")[0]]] for t in sorted(tests)])
        return hashlib.sha256(said.encode()).hexdigest()[:16]


def _span(mutant: Mutant) -> range:
    return range(mutant.lines[0], mutant.lines[1] + 1)


@cache
def _uses(root: Path, name: str) -> dict[str, list[int]]:
    word = re.compile(rf"\b{re.escape(name)}\b")
    found = {}
    for path, lines in _sources(root).items():
        here = [number for number, line in enumerate(lines, 1) if name in line and word.search(line)]
        if here:
            found[path] = here
    return found


@cache
def _sources(root: Path) -> dict[str, list[str]]:
    return {
        str(p.relative_to(root)): p.read_text().splitlines() for p in sorted((root / "sftd").rglob("*.py"))
    }

"""Which tests run which lines, and how long they take: measured once for each test file, kept by the digest of the sources."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import sys
from collections import defaultdict
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
"""How long the tests of a mutant take together, at most, without the mutation."""
FIRST = 30
"""Tests of the first attempt: those that run the fewest lines besides the changed ones."""


class Lines:
    """The lines of functions of sftd/ that run, by path."""

    def __init__(self, root: Path) -> None:
        self._prefix = f"{root}/sftd/"
        self._cut = len(str(root)) + 1
        self.seen: dict[str, set[int]] = defaultdict(set)

    def start(self) -> None:
        """Observe until the process ends."""
        sys.monitoring.use_tool_id(TOOL, "mutate")
        sys.monitoring.register_callback(TOOL, sys.monitoring.events.LINE, self._line)
        sys.monitoring.set_events(TOOL, sys.monitoring.events.LINE)

    def _line(self, code: CodeType, line: int) -> object:
        # A class's or a module's body runs once, whatever imports it first.
        if code.co_filename.startswith(self._prefix) and code.co_flags & inspect.CO_OPTIMIZED:
            self.seen[code.co_filename[self._cut :]].add(line)
        return sys.monitoring.DISABLE

    def take(self) -> dict[str, list[int]]:
        """Return what ran since the last call."""
        taken = {path: sorted(lines) for path, lines in self.seen.items()}
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
    """Return this process's and its dead children's: what a busy machine does not change."""
    return sum(os.times()[:4])


def measure(test_file: str, root: Path, folder: str) -> dict[str, Any]:
    """Return seconds and lines of each test of a file that passes. Called in a fork."""
    lines = Lines(root)
    lines.start()
    recorder = Recorder(lines)
    pytest.main([*forks.OPTIONS, f"--basetemp={folder}/t", test_file], plugins=[recorder])
    return recorder.tests


@dataclass
class Coverage:
    """tests: seconds and lines of each. early: lines that run when tests are collected."""

    tests: dict[str, Any]
    early: dict[str, set[int]]
    digests: dict[str, str]
    root: Path
    _by_line: dict[tuple[str, int], set[str]] = field(default_factory=lambda: defaultdict(set))
    _by_path: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    _size: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for test, facts in self.tests.items():
            if facts["seconds"] > SLOW_SECONDS:
                continue
            self._size[test] = sum(map(len, facts["lines"].values()))
            for path, lines in facts["lines"].items():
                self._by_path[path].add(test)
                for line in lines:
                    self._by_line[path, line].add(test)

    def is_warm(self, mutant: Mutant) -> bool:
        """Whether exchanging a function's code is enough: it is no function that runs when the tests are collected."""
        return mutant.inside and not self._any(self.early.get(mutant.path, set()), mutant.lines)

    @staticmethod
    def _any(lines: Collection[int], span: tuple[int, int]) -> bool:
        return any(span[0] <= line <= span[1] for line in lines)

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Return the tests that run the changed lines, or else what uses the changed name: first those that run little else."""
        found = self._of_lines(mutant.path, range(mutant.lines[0], mutant.lines[1] + 1))
        if not mutant.inside:
            near = set(found)
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
        return sorted(tests, key=lambda t: (self._size[t] * (0.05 + self.tests[t]["seconds"]), t))

    def _affordable(self, tests: Sequence[str]) -> list[str]:
        chosen, seconds = [], 0.0
        for test in tests:
            cost = self.tests[test]["seconds"]
            if seconds + cost <= BUDGET_SECONDS:
                chosen.append(test)
                seconds += cost
        return chosen

    def digest(self, tests: Sequence[str]) -> str:
        """Return what a survival depends on: the tests and their files."""
        said = json.dumps([[t, self.digests[t.partition("::")[0]]] for t in sorted(tests)])
        return hashlib.sha256(said.encode()).hexdigest()[:16]


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

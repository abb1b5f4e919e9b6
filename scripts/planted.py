#!/usr/bin/env python
"""Plant defects, one at a time, in a copy of the checkout and report those that the tests catch.

    scripts/planted.py [ID…] [--jobs N] [--results FILE] [--table] [--check]

A defect is an entry of a file in tests/planted/: a text that occurs once in sftd/, its replacement, and the tests that must
fail. It names no source file, so code can move. Results are kept in FILE ($TMPDIR/sftd-planted.json) by the digest of the
entry, its source file and its test files: an interrupted run continues.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests/planted"
COPIED = ("sftd", "tests", "migrations", "scripts", "docs", "alembic.ini", "pyproject.toml", "README.md")
"""The files that the tests read. All copies share the environment."""
LIMIT_SECONDS = 1800


@dataclass(frozen=True)
class Defect:
    """One change that breaks sftd without an error message."""

    id: str
    area: str
    what: str
    find: str
    replace: str
    tests: tuple[str, ...]

    def file(self, root: Path = ROOT) -> Path:
        """Return the only source file that contains `find`. Raises ValueError if there is not exactly one occurrence."""
        places = [path for path, text in _sources(root) for _ in range(text.count(self.find))]
        if len(places) != 1:
            raise ValueError(f"{self.id}: its text occurs {len(places)} times in sftd/, not once")
        return places[0]

    def plant(self, root: Path) -> None:
        """Change the copy of the checkout in `root`. Raises ValueError if the defect no longer applies."""
        path = self.file(root)
        path.write_text(path.read_text().replace(self.find, self.replace))

    def problems(self) -> list[str]:
        """Return the reasons why the entry is stale: its text, its syntax, its tests."""
        try:
            path = self.file()
            ast.parse(path.read_text().replace(self.find, self.replace))
        except (ValueError, SyntaxError) as error:
            return [f"{self.id}: {error}"]
        return [f"{self.id}: {test} does not exist" for test in self.tests if not _exists(test)]

    def digest(self) -> str:
        """Return the digest of a result's inputs: the entry, its source file and its test files."""
        texts = [(ROOT / test.partition("::")[0]).read_text() for test in self.tests]
        inputs = json.dumps([self.find, self.replace, self.tests, self.file().read_text(), *texts])
        return hashlib.sha256(inputs.encode()).hexdigest()


@cache
def _sources(root: Path) -> list[tuple[Path, str]]:
    return [(path, path.read_text()) for path in sorted((root / "sftd").rglob("*.py"))]


@cache
def _functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def defects() -> list[Defect]:
    """Return the defects of all files of tests/planted/, in order. A file's name is the area of its defects."""
    return [
        Defect(area=path.stem, **{**entry, "tests": tuple(entry["tests"])})
        for path in sorted(FOLDER.glob("*.toml"))
        for entry in tomllib.loads(path.read_text())["defect"]
    ]


def _exists(test: str) -> bool:
    name, _, function = test.partition("::")
    path = ROOT / name
    if not path.is_file():
        return False
    return not function or function.partition("[")[0] in _functions(path)


def _run(tests: Sequence[str], defect: Defect | None) -> str:
    """Run tests in a copy of the checkout with the defect. Returns "caught by NAME", "survived", or "error: …"."""
    with tempfile.TemporaryDirectory(prefix="sftd-planted-") as folder:
        root = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy2(source, root / name)
        if defect is not None:
            defect.plant(root)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1", "CI": "1"}
        try:
            done = subprocess.run(  # noqa: PLW1510  its code is judged below
                command, cwd=root, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
            )
        except subprocess.TimeoutExpired:
            return f"error: not finished after {LIMIT_SECONDS} s"
        if done.returncode == 0:
            return "survived"
        failed = [
            line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))
        ]
        if done.returncode == 1 and failed:
            return f"caught by {failed[0]}"
        return f"error: pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-400:]}"


def _results(chosen: Sequence[Defect], known: dict[str, str], jobs: int) -> Iterator[tuple[Defect, str]]:
    with ThreadPoolExecutor(jobs) as pool:
        running = {
            pool.submit(_run, defect.tests, defect): defect
            for defect in chosen
            if defect.digest() not in known
        }
        for defect in chosen:
            if defect not in running.values():
                yield defect, known[defect.digest()]
        for done in as_completed(running):
            yield running[done], done.result()


def main() -> int:
    """Run the command line; exit with 1 if a defect is stale, survives or cannot be judged."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("ids", nargs="*", metavar="ID", help="plant these defects or areas only")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="run N copies at once")
    parser.add_argument(
        "--results", type=Path, default=Path(tempfile.gettempdir()) / "sftd-planted.json", metavar="FILE"
    )
    parser.add_argument("--table", action="store_true", help="print the results as a Markdown table")
    parser.add_argument("--check", action="store_true", help="report stale entries and run no test")
    parser.add_argument("--sound", action="store_true", help="run the named tests without a defect first")
    chosen = parser.parse_args()
    every = [d for d in defects() if not chosen.ids or d.id in chosen.ids or d.area in chosen.ids]
    stale = [problem for defect in every for problem in defect.problems()]
    if stale or chosen.check:
        print("\n".join(stale) or f"{len(every)} defects apply")
        return len(stale) > 0
    if chosen.sound:
        verdict = _run(sorted({test for defect in every for test in defect.tests}), None)
        if verdict != "survived":
            print(f"without a defect: {verdict}")
            return 1
    known: dict[str, str] = json.loads(chosen.results.read_text()) if chosen.results.exists() else {}
    found: dict[str, str] = {}
    for defect, verdict in _results(every, known, chosen.jobs):
        found[defect.id] = verdict
        if not chosen.table:
            print(f"{len(found)}/{len(every)} {defect.id}: {verdict}", flush=True)
        if not verdict.startswith("error"):
            known[defect.digest()] = verdict
            chosen.results.write_text(json.dumps(known, indent=1))
    if chosen.table:
        print("| id | area | planted defect | result |\n|---|---|---|---|")
        for defect in every:
            print(f"| {defect.id} | {defect.area} | {defect.what} | {found[defect.id]} |")
    counts = Counter(verdict.split()[0].rstrip(":") for verdict in found.values())
    print(", ".join(f"{number} {name}" for name, number in sorted(counts.items())), f"of {len(every)}")
    return counts["caught"] != len(every)


if __name__ == "__main__":
    sys.exit(main())

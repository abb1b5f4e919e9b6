#!/usr/bin/env python
"""Make small changes in the code and report those that no fast test detects.

    scripts/mutate.py [PATH…] [--sample N | --all] [--jobs N] [--survivors] [--results FOLDER]

Mutants come from mutmut's operators (see mutation/mutants.py), for the modules in TARGETS and the tests in TESTS. Verdicts are
kept in FOLDER ($TMPDIR/sftd-mutation): an interrupted run continues, and only changed modules and tests are judged again.
tests/mutation/accepted.toml explains survivors that no test can distinguish from the original.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
try:
    from mutation import coverage, forks, mutants
except ImportError as missing:
    sys.exit(
        f"scripts/mutate.py needs mutmut ({missing})\nfix: .venv/bin/python -m pip install -c constraints.txt mutmut"
    )

ROOT = Path(__file__).resolve().parents[1]
ACCEPTED = ROOT / "tests/mutation/accepted.toml"
# The trainer's modules that need neither ranks nor a model.
PURE_TRAINER = "data/rows data/packing data/sample_order data/sequence_shards optimizer/rectangles checkpoint/folder_swap".split()
TARGETS = ("sftd/domain", "sftd/wire", "sftd/store", *(f"sftd/trainer/{name}.py" for name in PURE_TRAINER))
TESTS = (
    "tests/unit",
    "tests/contract",
    *(f"tests/trainer/data/test_{name}.py" for name in ("packing", "sequence_shards", "seen_rows")),
    "tests/trainer/numerics/test_pure.py",
)
# They start a process per test, or check texts of the checkout.
NOT_ASKED = ("test_docs", "test_find_python", "test_tools", "test_mlflow_mirror", "test_systemd", "test_lock")
SECONDS = 60.0
SEED = "sftd"


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _paths(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        place = ROOT / name
        files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
        found += [str(f.relative_to(ROOT)) for f in files if f.name != "__init__.py"]
    return found


class Kept:
    """The results folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "lines").mkdir(parents=True, exist_ok=True)
        (folder / "mutants").mkdir(exist_ok=True)

    def lines(self, test: str) -> Path:
        """File of the measured lines of a test file's current text. The text of sftd/ may have changed since."""
        helpers = [p.read_text() for p in sorted((ROOT / "tests").glob("*.py"))]
        return self.folder / f"lines/{_digest(test, (ROOT / test).read_text(), *helpers)}.json"

    def mutants(self, path: str, size: int | None) -> Path:
        """File of the mutants of a module's current text."""
        made_by = Path(mutants.__file__).read_text()
        return self.folder / f"mutants/{_digest(path, (ROOT / path).read_text(), str(size), made_by)}.json"

    def add(self, verdict: dict[str, Any]) -> None:
        """Append a verdict. Safe for concurrent processes."""
        line = json.dumps(verdict).encode() + b"\n"
        file = os.open(self.folder / "verdicts.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, line)
        os.close(file)

    def verdicts(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        """Return the last verdict by module, mutant and text of the module."""
        path = self.folder / "verdicts.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return {(v["path"], v["id"], v["text"]): v for v in map(json.loads, lines)}


def _write(path: Path, value: object) -> None:
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(value))
    beside.rename(path)


def make_mutants(kept: Kept, paths: Sequence[str], size: int | None, jobs: int) -> None:
    """Write the mutants of modules that have none yet."""
    missing = [p for p in paths if not kept.mutants(p, size).exists()]

    def work(index: int) -> None:
        path = missing[index]
        found, module, wording = mutants.find(ROOT / path)
        chosen = mutants.sample(found, size, SEED)
        made = [asdict(m) for m in mutants.make(chosen, module, path)]
        _write(kept.mutants(path, size), {"found": len(found), "wording": wording, "mutants": made})

    forks.spread(len(missing), jobs, work)


def _read_mutants(kept: Kept, paths: Sequence[str], size: int | None) -> list[mutants.Mutant]:
    read = []
    for path in paths:
        for entry in json.loads(kept.mutants(path, size).read_text())["mutants"]:
            entry |= {key: tuple(entry[key]) for key in ("function", "lines", "names")}
            read.append(mutants.Mutant(**entry))
    return read


def in_process(work: Callable[[], None]) -> None:
    """Call `work` in a fork, to keep its imports out of this process."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except SystemExit as left:
            print(left, file=sys.stderr)
        except BaseException:  # noqa: BLE001  a fork never returns into its parent's code
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(1)


def warm_up(kept: Kept, tests: Sequence[str], paths: Sequence[str]) -> None:
    """Import the tests and the modules into this process. Record the lines that ran, and the imported modules."""
    lines = coverage.Lines(ROOT)
    lines.start()
    output = os.dup(1)
    with open(kept.folder / "collected", "w") as log:
        os.dup2(log.fileno(), 1)
        try:
            import pytest

            code = pytest.main(["--collect-only", *forks.OPTIONS, *tests])
        finally:
            sys.stdout.flush()
            os.dup2(output, 1)
    if code:
        raise SystemExit(f"the tests cannot be collected: {kept.folder}/collected")
    forks.import_all([forks.module_name(path) for path in paths])
    early = lines.take()
    sys.monitoring.free_tool_id(coverage.TOOL)
    others = sorted(
        n for n in sys.modules if n.split(".")[0] not in ("sftd", "tests", "__main__", "mutation")
    )
    _write(kept.folder / "early.json", {"lines": early, "modules": others})


def measure(kept: Kept, tests: Sequence[str], jobs: int) -> None:
    """Measure the remaining test files, in forks of this process."""
    missing = [t for t in tests if not kept.lines(t).exists()]

    def work(index: int) -> None:
        test = missing[index]
        try:
            found = forks.in_fork(lambda folder: coverage.measure(test, ROOT, folder), 300)
        except (TimeoutError, RuntimeError) as error:
            print(f"{test} is left out: {error!r}", flush=True)
            found = {}
        _write(kept.lines(test), found)

    forks.spread(len(missing), jobs, work)


def read_coverage(kept: Kept, tests: Sequence[str]) -> coverage.Coverage:
    """Return the measurements."""
    every: dict[str, Any] = {}
    for test in tests:
        # A file that was edited during this run is measured by the next.
        if kept.lines(test).exists():
            every |= json.loads(kept.lines(test).read_text())
    early = json.loads((kept.folder / "early.json").read_text())["lines"]
    digests = {test: _digest((ROOT / test).read_text()) for test in tests}
    return coverage.Coverage(every, early, digests, ROOT)


def judge(mutant: mutants.Mutant, tests: Sequence[str], *, warm: bool) -> dict[str, Any]:
    """Return the verdict on a mutant, with the test that kills it, if any."""
    module = forks.module_name(mutant.path)

    def work(folder: str) -> str:
        if warm:
            if not forks.exchange(module, mutant.function, str(ROOT / mutant.path), mutant.source):
                return "cold"
        else:
            sys.meta_path.insert(0, forks.Finder(module, str(ROOT / mutant.path), mutant.source))
        first, rest = tests[: coverage.FIRST], tests[coverage.FIRST :]
        return forks.run_tests(first, folder) or (forks.run_tests(rest, folder) if rest else "")

    if not tests:
        return {"verdict": "survived", "by": "no test runs it"}
    try:
        by = forks.in_fork(work, SECONDS)
    except TimeoutError:
        return {"verdict": "timeout", "by": ""}
    except RuntimeError as error:
        # A crash of the interpreter counts as killed. An error of pytest itself proves nothing.
        died = "died" in str(error)
        return {"verdict": "killed" if died else "error", "by": str(error)[:200]}
    if by == "cold":
        return {"verdict": "cold", "by": ""}
    return {"verdict": "killed" if by else "survived", "by": by}


def run(kept: Kept, every: Sequence[mutants.Mutant], tests: Sequence[str], jobs: int, *, warm: bool) -> None:
    """Judge the mutants without a valid verdict, in forks of this process."""
    covered = read_coverage(kept, tests)
    known = kept.verdicts()
    texts = {path: _digest((ROOT / path).read_text()) for path in {m.path for m in every}}
    asked: list[tuple[mutants.Mutant, list[str]]] = []
    for mutant in every:
        before = known.get((mutant.path, mutant.id, texts[mutant.path]))
        cold = before is not None and before["verdict"] == "cold"
        if warm and (cold or not covered.is_warm(mutant)):
            continue
        if before is not None and before["verdict"] in ("killed", "timeout"):
            continue
        chosen = covered.tests_of(mutant)
        if (
            before is not None
            and before["verdict"] == "survived"
            and before["tests"] == covered.digest(chosen)
        ):
            continue
        if not warm and not cold and covered.is_warm(mutant):
            continue
        asked.append((mutant, chosen))

    def work(index: int) -> None:
        mutant, chosen = asked[index]
        started = time.monotonic()
        verdict = judge(mutant, chosen, warm=warm)
        seconds = round(time.monotonic() - started, 2)
        kept.add(
            {
                "path": mutant.path,
                "id": mutant.id,
                "text": texts[mutant.path],
                "tests": covered.digest(chosen),
            }
            | {"seconds": seconds, "asked": len(chosen)}
            | verdict
        )
        print(
            f"{index + 1}/{len(asked)} {mutant.path} {mutant.place or '-'}: {verdict['verdict']} {seconds} s",
            flush=True,
        )

    forks.spread(len(asked), jobs, work)


def accepted() -> dict[tuple[str, str, str], str]:
    """Return the explanations of tests/mutation/accepted.toml, by place and texts."""
    entries = tomllib.loads(ACCEPTED.read_text()).get("mutant", []) if ACCEPTED.exists() else []
    return {(e["place"], e["before"], e["after"]): e["why"] for e in entries}


def report(kept: Kept, paths: Sequence[str], size: int | None, *, survivors: bool) -> bool:
    """Print the table, and the survivors with their differences; return whether each package reaches 90 %."""
    known, explained = kept.verdicts(), accepted()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for path in paths:
        text = _digest((ROOT / path).read_text())
        whole = json.loads(kept.mutants(path, size).read_text())
        counts[path] += Counter({"possible": whole["found"], "wording": whole["wording"]})
        for mutant in _read_mutants(kept, [path], size):
            verdict = known.get((path, mutant.id, text), {"verdict": "open", "by": ""})
            kind = verdict["verdict"]
            if kind == "survived" and (mutant.place, mutant.before, mutant.after) in explained:
                kind = "accepted"
            counts[path][kind] += 1
            if survivors and kind == "survived":
                print(f"\n{path}:{mutant.lines[0]} {mutant.place} ({verdict['asked']} tests) {mutant.id}")
                print("\n".join(f"  - {line}" for line in mutant.before.splitlines()))
                print("\n".join(f"  + {line}" for line in mutant.after.splitlines()))
    packages: dict[str, Counter[str]] = defaultdict(Counter)
    for path, count in counts.items():
        packages[str(Path(path).parent)] += count
    print(
        "\n| module | possible | mutants | killed | timeout | survived | explained | rate |\n|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    for name, count in [*counts.items(), *packages.items(), ("all", sum(packages.values(), Counter()))]:
        print(_row(name, count))
    open_ones = sum(c["open"] + c["cold"] + c["error"] for c in counts.values())
    print(
        f"\n{sum(c['wording'] for c in counts.values())} strings are wording and skipped; {open_ones} mutants are not judged yet."
    )
    return all(_rate(count) >= 0.9 for count in packages.values()) and not open_ones


def _rate(count: Counter[str]) -> float:
    judged = count["killed"] + count["timeout"] + count["survived"]
    return (count["killed"] + count["timeout"]) / judged if judged else 1.0


def _row(name: str, count: Counter[str]) -> str:
    every = sum(count[k] for k in ("killed", "timeout", "survived", "accepted", "open", "cold", "error"))
    cells = [
        count["possible"],
        every,
        count["killed"],
        count["timeout"],
        count["survived"],
        count["accepted"],
    ]
    return f"| {name} | " + " | ".join(map(str, cells)) + f" | {_rate(count):.0%} |"


def main() -> int:
    """Run the command line; exit with 1 if a package's rate is below 90 %."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("paths", nargs="*", metavar="PATH", help="mutate these files or folders only")
    parser.add_argument("--sample", type=int, default=20, metavar="N", help="mutants of each module (20)")
    parser.add_argument("--all", action="store_true", help="every mutant of each module")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="judge N mutants at once")
    parser.add_argument("--survivors", action="store_true", help="list the survivors with their differences")
    parser.add_argument(
        "--tests", action="append", metavar="PATH", help="run these tests only; may be repeated"
    )
    parser.add_argument("--only-report", action="store_true", help="judge nothing")
    parser.add_argument(
        "--results", type=Path, default=Path(tempfile.gettempdir()) / "sftd-mutation", metavar="FOLDER"
    )
    chosen = parser.parse_args()
    os.chdir(ROOT)
    # As in CI: hypothesis draws the same examples in every run.
    os.environ |= {"CI": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.path.insert(0, str(ROOT))
    paths = _paths([str(Path(p)) for p in chosen.paths] or TARGETS)
    tests = [
        t for name in chosen.tests or TESTS for t in _test_files(ROOT / name) if Path(t).stem not in NOT_ASKED
    ]
    size = None if chosen.all else chosen.sample
    kept = Kept(chosen.results.resolve())
    make_mutants(kept, paths, size, chosen.jobs)
    if not chosen.only_report:
        forks.never_shrink()
        every = _read_mutants(kept, paths, size)

        def warm() -> None:
            warm_up(kept, tests, paths)
            measure(kept, tests, chosen.jobs)
            run(kept, every, tests, chosen.jobs, warm=True)

        def cold() -> None:
            forks.import_all(json.loads((kept.folder / "early.json").read_text())["modules"])
            run(kept, every, tests, chosen.jobs, warm=False)

        in_process(warm)
        in_process(cold)
    return not report(kept, paths, size, survivors=chosen.survivors)


def _test_files(place: Path) -> list[str]:
    files = sorted(place.rglob("test_*.py")) if place.is_dir() else [place]
    return [str(f.relative_to(ROOT)) for f in files]


if __name__ == "__main__":
    sys.exit(main())

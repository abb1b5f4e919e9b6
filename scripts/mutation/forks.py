"""Run tests in forks of a process that has done their imports: a verdict takes a fraction of a second.

For a change in a function's body, the process has collected the tests, and its fork exchanges the function's code. Other
changes take effect at the import of the module, so the process has imported only third-party packages.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import os
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import hypothesis
import pytest

# Plugins are imported before pytest starts, and need no rewritten assertions.
_NO_REWRITE = "ignore::pytest.PytestAssertRewriteWarning"
OPTIONS = ("-q", "--tb=no", "-W", _NO_REWRITE, "-p", "no:cacheprovider", "-p", "no:xdist")
MEMORY = 6 * 2**30


class Chosen:
    """Plugin: runs only the chosen tests, in their order, and keeps the name of the first failure."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._rank = {test: number for number, test in enumerate(tests)}
        self.killer = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self._rank), key=lambda i: self._rank[i.nodeid])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.killer:
            self.killer = f"import of {report.nodeid}"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.killer:
            self.killer = report.nodeid


def run_tests(tests: Sequence[str], folder: str) -> str:
    """Return the first test that fails, "" if none does. Raises ValueError if pytest ran no test."""
    chosen = Chosen(tests)
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    code = pytest.main(["-x", *OPTIONS, f"--basetemp={folder}/t", *files], plugins=[chosen])
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise ValueError("none of the chosen tests exists")
    return "" if code == pytest.ExitCode.OK else chosen.killer or f"pytest ended with {code}"


def exchange(module: str, function: Sequence[str], path: str, source: str) -> bool:
    """Give a function of an imported module its code in `source`. Returns False if that is not possible."""
    owner: Any = sys.modules[module]
    code = compile(source, path, "exec", dont_inherit=True)
    for name in function[:-1]:
        owner = vars(owner).get(name)
        inner = [c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name]
        if owner is None or len(inner) != 1:
            return False
        code = inner[0]
    found = vars(owner).get(function[-1])
    if isinstance(found, property):
        found = found.fget
    found = inspect.unwrap(getattr(found, "__func__", found)) if found is not None else None
    if not isinstance(found, FunctionType) or found.__module__ != module:
        return False
    # Functions with the same name (`_` for registered ones) cannot be distinguished.
    old = found.__code__
    same = [c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == old.co_name == function[-1]]
    if len(same) != 1 or same[0].co_freevars != old.co_freevars:
        return False
    found.__code__ = same[0]
    return True


class _Source(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._source, self.path, "exec", dont_inherit=True)


class Finder(importlib.abc.MetaPathFinder):
    """Imports one module from a given source text."""

    def __init__(self, module: str, path: str, source: str) -> None:
        self._module, self._path, self._source = module, path, source

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._module:
            return None
        return importlib.util.spec_from_file_location(
            fullname, self._path, loader=_Source(fullname, self._path, self._source)
        )


def in_fork(work: Callable[[str], Any], seconds: float) -> Any:
    """Return what `work(folder)` returns in a fork (JSON). Raises TimeoutError; RuntimeError if the fork dies.

    `seconds` is a limit of CPU time, independent of the machine's load; the limit of wall time is three times as long. Output
    is discarded, remaining processes of the fork are killed, and the folder is deleted.
    """
    folder = tempfile.mkdtemp(prefix="sftd-mutate-")
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _isolate(folder, int(seconds))
        try:
            answer = json.dumps({"returned": work(folder)})
        except BaseException as error:  # noqa: BLE001  a fork never returns into its parent's code
            answer = json.dumps({"raised": f"{type(error).__name__}: {error}"})
        with contextlib.suppress(BaseException), os.fdopen(writing, "w") as out:
            out.write(answer)
        os._exit(0)
    os.close(writing)
    status = 0
    try:
        reply = _read(reading, time.monotonic() + 3 * seconds)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        shutil.rmtree(folder, ignore_errors=True)
    if not reply and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        raise TimeoutError
    if not reply:
        raise RuntimeError("the process died")
    answer = json.loads(reply)
    if "raised" in answer:
        raise RuntimeError(answer["raised"])
    return answer["returned"]


def _isolate(folder: str, seconds: int) -> None:
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    log = os.open(f"{folder}/output", os.O_WRONLY | os.O_CREAT)
    for number, file in ((0, nowhere), (1, log), (2, log)):
        os.dup2(file, number)
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    used = int(time.process_time()) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, used + seconds + 5))
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _read(file: int, deadline: float) -> bytes:
    pieces = []
    while True:
        ready, _, _ = select.select([file], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        piece = os.read(file, 65536)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)


def spread(number: int, jobs: int, work: Callable[[int], None]) -> None:
    """Call `work(0)` … `work(number - 1)`, each once, in `jobs` forks."""
    reading, writing = os.pipe()
    workers = []
    for _ in range(jobs):
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            code = 1
            try:
                for index in _indices(reading):
                    work(index)
                code = 0
            except BaseException:  # noqa: BLE001  a fork never returns into its parent's code
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        workers.append(pid)
    os.close(reading)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "wb", buffering=0) as out:
        for index in range(number):
            out.write(struct.pack("I", index))
    codes = [os.waitpid(pid, 0)[1] for pid in workers]
    if any(codes):
        raise SystemExit("a worker ended early; run the command again to continue")


def _indices(file: int) -> Iterator[int]:
    while piece := os.read(file, 4):
        yield struct.unpack("I", piece)[0]


def import_all(names: Sequence[str]) -> None:
    """Import the named modules. Ignores errors."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def never_shrink() -> None:
    """Make hypothesis stop at the first failing example: shrinking it takes minutes and does not change the verdict."""
    load = hypothesis.settings.load_profile

    def load_without(name: str) -> None:
        load(name)
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile("unshrunk", hypothesis.settings.get_profile(name), phases=phases)
        load("unshrunk")

    # The metaclass refuses a normal assignment.
    type.__setattr__(hypothesis.settings, "load_profile", staticmethod(load_without))


def module_name(path: str) -> str:
    """Return the module of a path: sftd/domain/spec/spec.py is sftd.domain.spec.spec."""
    parts = Path(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

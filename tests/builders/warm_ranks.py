"""A process that has imported the trainer once, and forks the ranks of every attempt: seconds less for each.

It reads what to start from lines of JSON on its standard input, and answers with one line when the ranks have started
and one when they have ended. Who asked may kill them meanwhile.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.builders import warm_python
from tests.builders.claims import port_of_our_own
from tests.builders.holds import Holds
from tests.builders.paths import ROOT
from tests.builders.patience import PATIENCE

# A function of tests/builders/ranks/faults.py by its name, and its arguments.
Fault = tuple[str, dict[str, Any]]


def has_ended(pid: int) -> bool:
    """Whether a process of the warm one is gone, or waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@dataclass
class Ranks:
    """The processes of one start."""

    pids: list[int]
    _server: WarmTrainer
    codes: list[int] = field(default_factory=list)

    def held(self, attempt: Path) -> psutil.Process:
        """Wait until they are stopped where `WarmTrainer.holds` says. Returns the reporting rank."""
        return self._server.holds.wait(attempt, lambda: all(map(has_ended, self.pids)))

    def kill(self) -> None:
        """SIGKILL to all of them, as when a machine takes a job away."""
        # Stop all first, so that none sees another's end and raises before its own.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in self.pids:
                # The server has not reaped it yet, so the number is not another's.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def wait(self) -> list[int]:
        """The exit codes, by rank; what a signal ended has its negative number."""
        self.codes = self.codes or self._server.answer()["codes"]
        return self.codes


class WarmTrainer:
    """The warm process, seen from outside. One start at a time."""

    def __init__(self, server: str | None = None) -> None:
        """`server`: what the fixture `warm_python` is; without it the process imports by itself."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SFTD_", "MLFLOW_"))}
        own = {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
        } | warm_python.ALONE
        self._folder = tempfile.TemporaryDirectory(prefix="sftd-holds-")
        self.holds = Holds(Path(self._folder.name))
        own |= self.holds.environment(own)
        if server is not None:
            own[warm_python.VARIABLE] = server
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=kept | own,
            text=True,
        )

    def attempt(self, folder: Path, ranks: int, log: Path, faults: Sequence[Fault] = ()) -> Ranks:
        """Start the ranks of an attempt that was ordered. What they print goes to `log`. Each has the `faults`."""
        return self._start("attempt", [str(folder)], ranks, log, faults)

    def direct(self, arguments: Sequence[str], log: Path) -> Ranks:
        """Start `python -m sftd.trainer ARGUMENTS`."""
        return self._start("direct", arguments, 1, log)

    def script(self, script: Path, arguments: Sequence[str], ranks: int, log: Path) -> Ranks:
        """Run a Python file as the main program on each of some ranks."""
        return self._start("script", [str(script), *arguments], ranks, log)

    def _start(
        self, how: str, arguments: Sequence[str], ranks: int, log: Path, faults: Sequence[Fault] = ()
    ) -> Ranks:
        assert self._process.stdin
        order = {
            "how": how,
            "arguments": list(arguments),
            "ranks": ranks,
            "log": str(log),
            "faults": list(faults),
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Ranks(self.answer()["pids"], self)

    def answer(self) -> dict[str, Any]:
        """The next line from the process."""
        assert self._process.stdout
        return dict(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=PATIENCE)
        self._process.stdout.close()
        self._folder.cleanup()


def _serve(orders: Iterator[str]) -> None:
    from sftd.trainer.runtime import process

    process.prepare()
    warm_python.import_all()
    # One start at a time, so each may have it.
    port = port_of_our_own()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in orders:
        order = json.loads(line)
        pids = [_fork(order, rank, port) for rank in range(order["ranks"])]
        print(json.dumps({"pids": pids}), file=answers, flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps({"codes": codes}), file=answers, flush=True)
    answers.close()


def _fork(order: dict[str, Any], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        ranks = order["ranks"]
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update(
            {k: str(v) for k, v in (place | {"MASTER_PORT": port}).items()}, MASTER_ADDR="127.0.0.1"
        )
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from sftd.trainer.direct import direct
        from sftd.trainer.loop import attempt as loop

        for name, arguments in order["faults"]:
            getattr(importlib.import_module("tests.builders.ranks.faults"), name)(**arguments)
        if order["how"] == "attempt":
            loop.run(*order["arguments"])
        elif order["how"] == "script":
            sys.argv = order["arguments"]
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            direct.main(order["arguments"])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001  a fork must never return into the server's loop
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(iter(sys.stdin))

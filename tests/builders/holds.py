"""Holds trainers where a test wants them. A test that reads a step and then acts comes too late on a fast machine: a hundred
steps take a tenth of a second. So the trainer stops itself (held/sitecustomize.py), and waits to be let go or killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import psutil

from tests.builders.durability import Trace
from tests.builders.patience import until

_HELD = Path(__file__).parent / "held"


class Holds:
    """Where each attempt that is started with `environment` is to stop."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """What processes must have in theirs, besides what `base` has."""
        paths = [str(_HELD), *filter(None, [base.get("PYTHONPATH")])]
        return {"HOLDS": str(self._folder), "PYTHONPATH": os.pathsep.join(paths)}

    def trace(self) -> Trace:
        """From now on each fsync and each rename of these processes is recorded, in a new trace."""
        file = self._folder / "traced"
        file.write_text("")
        return Trace(file)

    def untrace(self) -> None:
        """End that."""
        (self._folder / "traced").unlink(missing_ok=True)

    def at(self, attempt: Path, step: int, kind: str = "StepCompleted") -> None:
        """Have the reporting rank of an attempt stop once it has written such an event of this step, or of a later one. To be
        said before it can have come so far."""
        file = self._file(attempt)
        file.with_name(f"{file.name}.held").unlink(missing_ok=True)
        new = file.with_name(f"{file.name}.new")
        new.write_text(f"{kind} {step}")
        new.rename(file)

    def wait(self, attempt: Path, is_over: Callable[[], bool]) -> psutil.Process:
        """Wait until it has stopped. Returns the reporting rank. Fails once the attempt `is_over`."""
        file = self._file(attempt)

        def is_held() -> bool:
            over = is_over()
            assert not (over and file.exists()), f"{attempt.name} ended before it was to be held"
            return not file.exists()

        until(is_held, f"{attempt.name} does not come to where it is to be held", every=0.01)
        rank = psutil.Process(int(file.with_name(f"{file.name}.held").read_text()))
        wait_until_stopped([rank])
        return rank

    def is_held(self, attempt: Path) -> bool:
        """Whether the rank of an attempt in a container has stopped: its pid means nothing on this side."""
        return not self._file(attempt).exists()

    def _file(self, attempt: Path) -> Path:
        return self._folder / f"{attempt.parent.name}.{attempt.name}"


def wait_until_stopped(ranks: Iterable[psutil.Process]) -> None:
    """A signal takes a moment to stop all threads of a process."""
    stopping = list(ranks)
    until(lambda: all(rank.status() == psutil.STATUS_STOPPED for rank in stopping), every=0.001)


def let_go(ranks: Iterable[psutil.Process]) -> None:
    """Resume ranks that were held. One that was killed meanwhile is left alone."""
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.resume()


def is_pending(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether a stopped process will get this signal when it resumes."""
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    (pending,) = [line.split()[1] for line in status if line.startswith("ShdPnd:")]
    return bool(int(pending, 16) >> number - 1 & 1)

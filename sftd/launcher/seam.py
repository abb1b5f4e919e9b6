"""The interface of a launcher, which starts attempts. Its data for the queue and for messages is a `LauncherKind`. A launcher is
registered in `choosing` and must pass `tests/process/launcher/test_launchers.py`.

The daemon and the trainer exchange everything else through the attempt's folder: the order, the journal, the stop request,
torchrun's exit code and `output.log`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import msgspec

from sftd.domain.finding import Finding
from sftd.domain.queue.demand import Need
from sftd.domain.run.failures import Remains
from sftd.settings import Settings
from sftd.wire.attempt.directory import AttemptDir, Order, ProcessFile


class Report(msgspec.Struct, frozen=True):
    """The resource manager's report on an attempt, in its own words. `state` is empty until the first answer. `trains`: the
    ranks have machines. `waits`: the job has not started yet. Both may be false while the manager does not answer."""

    job: str
    state: str
    reason: str = ""
    nodes: str = ""
    trains: bool = False
    waits: bool = False


class Attempt(Protocol):
    """The processes of an attempt, started by this daemon or by an earlier one. No method waits for another machine."""

    directory: AttemptDir
    process: ProcessFile | None
    # Time for the ranks to write their stacks after `ask_for_stacks`.
    stacks_seconds: float

    def is_alive(self) -> bool:
        """Whether the attempt's leading process runs. False only with proof that it does not."""

    def kill(self) -> list[int]:
        """End every process of the attempt, orphans included. Returns pids (or job numbers) that still live; if there are any,
        call again."""

    def report(self) -> Report | None:
        """The resource manager's report; None without a resource manager."""

    def ask_for_stacks(self) -> None:
        """Make every rank write its stack."""

    def stacks(self) -> list[str]:
        """One line per rank: its stack, or why there is none."""

    def remains(self) -> Remains:
        """What the ended attempt left as evidence of the cause."""


class Launcher(Protocol):
    """Starts attempts, and finds those that an earlier daemon started."""

    def start(
        self, directory: AttemptDir, order: Order, need: Need, devices: list[str]
    ) -> tuple[Attempt, list[str]]:
        """Write the order and start torchrun. Returns the attempt and torchrun's argv. Raises `OSError`, and then nothing
        runs."""

    def adopt(self, directory: AttemptDir, fallback_token: str) -> Attempt:
        """Find an attempt that an earlier daemon claimed, dead or alive. `fallback_token` is the lease's token, for an attempt
        without an order."""


class Registered(msgspec.Struct, frozen=True, kw_only=True):
    """A launcher's entry in `choosing`. `make` creates the launcher and starts nothing. `places`: maximum number of concurrent
    attempts of a daemon on this host, 0 if it can start none; unused by a launcher that uses the host's devices. `script`: the
    text for the resource manager. `doctor` examines this host for `sftd doctor`, given the devices and places of the running
    daemon of this home (None if none runs)."""

    make: Callable[[Settings], Launcher]
    places: Callable[[Settings], int] = lambda settings: 0
    script: Callable[[Order, AttemptDir], str] | None = None
    doctor: Callable[[Mapping[str, int] | None], Iterable[Finding]] = lambda daemon: ()

"""What sftd needs of a launcher, and nothing more: `local` starts attempts on this host. What the queue and the words for
people need is a row of data (`LauncherKind`); the classes here start attempts. A launcher is registered in `choosing` and must
pass `tests/process/launcher/test_launchers.py`.

Everything else passes through the attempt's folder, which both sides see: the order, the journal, the request to stop,
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
    """What the resource manager says of an attempt, in its words; `state` is empty until it has been asked. `trains`: the
    ranks have machines; `waits`: it has not started yet. Neither while it cannot be asked."""

    job: str
    state: str
    reason: str = ""
    nodes: str = ""
    trains: bool = False
    waits: bool = False


class Attempt(Protocol):
    """The processes of an attempt, started by this daemon or by one before it. No method waits for another machine."""

    directory: AttemptDir
    process: ProcessFile | None
    # How long the ranks may take to write their stacks once they are asked.
    stacks_seconds: float

    def is_alive(self) -> bool:
        """Whether the attempt's leading process runs. False only with proof."""

    def kill(self) -> list[int]:
        """End every process of the attempt, the leader's orphans included. Returns pids (or job numbers) that still live: ask
        again then."""

    def report(self) -> Report | None:
        """What the resource manager says of it; None where nobody but the daemon manages."""

    def ask_for_stacks(self) -> None:
        """Have every rank write down where it is."""

    def stacks(self) -> list[str]:
        """A line for each rank: where it is, or why it does not say."""

    def remains(self) -> Remains:
        """What the ended attempt left that says why."""


class Launcher(Protocol):
    """Starts attempts, and finds those again that an earlier daemon started."""

    def start(
        self, directory: AttemptDir, order: Order, need: Need, devices: list[str]
    ) -> tuple[Attempt, list[str]]:
        """Write the order and start torchrun. Returns the attempt and torchrun's argv. Raises `OSError`, and then nothing
        runs."""

    def adopt(self, directory: AttemptDir, fallback_token: str) -> Attempt:
        """Find an attempt that an earlier daemon claimed, whatever is left of it. `fallback_token` is the lease's, for one
        that has no order."""


class Registered(msgspec.Struct, frozen=True, kw_only=True):
    """What `choosing` knows of a launcher. `make` makes it, and starts nothing. `places`: attempts that a daemon here has at
    once, 0 where it can start none; unused for a launcher that uses the host's devices. `script`: what would be handed to the
    resource manager. `doctor` examines this host for `sftd doctor`, given the devices and places that the running daemon of this
    home has, None where none runs."""

    make: Callable[[Settings], Launcher]
    places: Callable[[Settings], int] = lambda settings: 0
    script: Callable[[Order, AttemptDir], str] | None = None
    doctor: Callable[[Mapping[str, int] | None], Iterable[Finding]] = lambda daemon: ()

"""What the daemon needs of whoever starts attempts, and nothing more: `local` starts them on this host. Another launcher
must pass `tests/process/launcher/test_launchers.py`.

Everything else passes through the attempt's folder, which both sides see: the order, the journal, the request to stop,
torchrun's exit code and `output.log`.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from sftd.domain.queue.demand import Need
from sftd.domain.run.failures import Remains
from sftd.wire.attempt.directory import AttemptDir, Order, ProcessFile


class Report(msgspec.Struct, frozen=True):
    """What the resource manager says of an attempt, in its words; `state` is empty until it has been asked. `trains`: the ranks have machines, as far as it says;
    `waits`: it has not started yet. Neither while it cannot be asked."""

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
        """What the ended attempt left to tell why."""


class Launcher(Protocol):
    """Starts attempts, and finds those again that a daemon before started."""

    def start(
        self, directory: AttemptDir, order: Order, need: Need, devices: list[str]
    ) -> tuple[Attempt, list[str]]:
        """Write the order and start torchrun. Returns the attempt and torchrun's argv. Raises `OSError`, and then nothing
        runs."""

    def adopt(self, directory: AttemptDir, fallback_token: str) -> Attempt:
        """Find an attempt that an earlier daemon claimed, whatever is left of it. `fallback_token` is the lease's, for one
        that has no order."""

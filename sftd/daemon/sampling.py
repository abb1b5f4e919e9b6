"""Sample the hosts of living attempts from outside the training process, so that no step waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterable

from sftd.daemon.supervisor import Supervisor
from sftd.domain.errors import LeaseLost
from sftd.launcher.processes import host_name
from sftd.launcher.sampling import HostWatch
from sftd.operations.context import Context
from sftd.operations.driving import attempts
from sftd.store.database.engine import Store


class Sampler:
    """Records a `SystemSampled` for each attempt every `seconds`."""

    def __init__(self, store: Store, context: Context, seconds: float) -> None:
        self._store = store
        self._context = context
        self._seconds = seconds
        self._watch = HostWatch()
        self._due_at = time.monotonic() + seconds

    def sample_when_due(self, supervisors: Iterable[Supervisor]) -> None:
        """Sample if that is due. Raises only the database driver's errors."""
        if time.monotonic() < self._due_at:
            return
        self._due_at = time.monotonic() + self._seconds
        sample = self._watch.look()
        for supervisor in supervisors:
            process = supervisor.attempt.process
            # Attempts on other hosts (a batch system's nodes) cannot be sampled from here.
            if (
                process is None
                or not process.pid
                or process.host != host_name()
                or not supervisor.is_recorded
            ):
                continue
            try:
                attempts.sampled(self._store, self._context, supervisor.lease, sample(process.devices))
            except LeaseLost:
                continue  # the next renewal drops the attempt

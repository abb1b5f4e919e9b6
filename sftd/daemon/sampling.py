"""Samples what the hosts of living attempts are doing, from outside: a step waits for nothing."""

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
    """Writes a `SystemSampled` for each attempt every `seconds`. A daemon that adopts an attempt continues that."""

    def __init__(self, store: Store, context: Context, seconds: float) -> None:
        self._store = store
        self._context = context
        self._seconds = seconds
        self._watch = HostWatch()
        self._due_at = time.monotonic() + seconds

    def sample_when_due(self, supervisors: Iterable[Supervisor]) -> None:
        """Sample unless that was done a moment ago. Raises only what the database does."""
        if time.monotonic() < self._due_at:
            return
        self._due_at = time.monotonic() + self._seconds
        sample = self._watch.look()
        for supervisor in supervisors:
            process = supervisor.attempt.process
            # What runs elsewhere (a batch system's nodes) cannot be seen from here.
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
                continue  # the next renewal notices, and forgets the attempt

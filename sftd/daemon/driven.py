"""The attempts that a daemon drives. Supervises each in turn, and drops those whose lease is lost."""

from __future__ import annotations

import time

from sftd.daemon.log import of_run
from sftd.daemon.supervisor import Supervisor, take_in
from sftd.domain.errors import LeaseLost, SftdError
from sftd.launcher.inventory import Inventory
from sftd.operations.context import Context
from sftd.operations.driving import attempts, turns
from sftd.store.database.engine import Store
from sftd.store.queue.leases import Lease

# Limits the load of hundreds of attempts: each look opens a file, perhaps over a network.
_LOOKS_PER_SECOND = 400
# After this time, a tick leaves the other attempts to the next tick.
_LOOK_SECONDS = 0.25


class Driven:
    """`supervisors` has those of the driven attempts, by run. An attempt that ends releases its devices in `inventory`."""

    def __init__(self, store: Store, context: Context, inventory: Inventory, daemon_id: str) -> None:
        self.supervisors: dict[str, Supervisor] = {}
        self._store = store
        self._context = context
        self._inventory = inventory
        self._daemon_id = daemon_id
        self._look_at: dict[str, float] = {}
        self._reported: dict[str, str] = {}

    def renew(self, lease_micros: int) -> None:
        """Renew all leases. Drop the attempts whose lease is lost."""
        leases = [supervisor.lease for supervisor in self.supervisors.values()]
        for lost in attempts.renew(self._store, self._context, leases, lease_micros):
            self.forget(lost)

    def tick(self) -> bool:
        """Supervise the attempts that are due. Returns whether one ended, or some are left to the next tick."""
        stopping = turns.stopping(self._store, self._daemon_id) if self.supervisors else {}
        busy = False
        now, pause = time.monotonic(), len(self.supervisors) / _LOOKS_PER_SECOND
        # The longest waiting first.
        order = sorted(self.supervisors, key=lambda run_id: self._look_at.get(run_id, 0.0))
        due = [run_id for run_id in order if self._look_at.get(run_id, 0.0) <= now or run_id in stopping]
        supervisors = [self.supervisors[run_id] for run_id in due]
        taken = take_in(self._store, self._context, supervisors, now + _LOOK_SECONDS / 2)
        for run_id in due:
            if time.monotonic() - now > _LOOK_SECONDS and run_id not in taken:
                return True
            supervisor = self.supervisors[run_id]
            self._look_at[run_id] = now + pause
            try:
                if run_id in stopping:
                    supervisor.request_stop(now=stopping[run_id])
                if supervisor.tick(*taken.get(run_id, ())) is not None:
                    del self.supervisors[run_id], self._look_at[run_id]
                    self._inventory.release(run_id)
                    busy = True
            except LeaseLost:
                self.forget(supervisor.lease)
            except (OSError, ValueError, SftdError) as error:
                # A broken folder of one run must not end the supervision of the others.
                self.report_once(run_id, error)
        return busy

    def report_once(self, run_id: str, error: Exception) -> None:
        """Log an error of a run, unless it is the same as the last one."""
        if self._reported.get(run_id) != str(error):
            self._reported[run_id] = str(error)
            of_run(run_id).error("%s; trying again", error)

    def forget(self, lease: Lease) -> None:
        """Drop an attempt whose lease is lost."""
        of_run(lease.run_id, lease.attempt).warning("the lease is no longer ours")
        supervisor = self.supervisors.pop(lease.run_id, None)
        self._look_at.pop(lease.run_id, None)
        if supervisor is not None and self._is_given_up(supervisor):
            # No other daemon ends these processes, and the run may start again.
            supervisor.attempt.kill()
        self._inventory.release(lease.run_id)

    def _is_given_up(self, supervisor: Supervisor) -> bool:
        """Whether a user abandoned the lost attempt, rather than another daemon taking it over."""
        try:
            return supervisor.attempt.directory.lease() in (supervisor.lease.token, None)
        except OSError as error:
            # Another daemon of this home cannot read the file either, so it has not adopted the attempt.
            self.report_once(supervisor.lease.run_id, error)
            return True

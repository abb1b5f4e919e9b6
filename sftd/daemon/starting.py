"""Start runs whose turn it is on this host, and adopt attempts whose daemon is gone."""

from __future__ import annotations

import errno
import os
import time

from sftd.daemon.driven import Driven
from sftd.daemon.log import of_run
from sftd.daemon.rescuer import make_way, not_observed, orphaned
from sftd.daemon.supervisor import Supervisor
from sftd.domain.errors import SftdError
from sftd.domain.log import events as e
from sftd.domain.queue.demand import Need
from sftd.domain.queue.order import Entry, Limits
from sftd.domain.run.failures import Cause, Failure
from sftd.domain.spec.launch.launchers import kind_of
from sftd.launcher.inventory import Inventory
from sftd.launcher.seam import Launcher
from sftd.operations.context import Context
from sftd.operations.driving import attempts, turns
from sftd.operations.driving.attempts import Claimed
from sftd.operations.queries import placing
from sftd.settings import Settings
from sftd.store.database.engine import Store
from sftd.store.queue.daemons import DaemonRow
from sftd.wire.attempt.directory import RunDir
from sftd.wire.attempt.orders import order_of

# Maximum number of starts per tick: leases are renewed between ticks.
_STARTS_PER_TICK = 20
# How long to cache whether a checkpoint is here: it seldom changes, and the disk may be slow.
_PLACE_SECONDS = 5.0


class Starter:
    """Starts and adopts attempts for the daemon `me`, and adds them to `driven`."""

    def __init__(
        self,
        store: Store,
        context: Context,
        settings: Settings,
        inventory: Inventory,
        launcher: Launcher,
        driven: Driven,
        limits: Limits,
        me: DaemonRow,
    ) -> None:
        self._store = store
        self._context = context
        self._settings = settings
        self._inventory = inventory
        self._launcher = launcher
        self._driven = driven
        self._limits = limits
        self._me = me
        self._too_large: set[str] = set()
        self._starts_here: dict[str, tuple[float, bool]] = {}

    def tick(self) -> bool:
        """Start the runs whose turn it is. Returns whether one was started."""
        busy = False
        for _ in range(_STARTS_PER_TICK):
            if (claimed := self._claim()) is None:
                break
            self._launch(claimed)
            busy = True
        self._preempt()
        return busy

    def adopt(self) -> None:
        """Take over attempts whose daemon is gone."""
        driven = {supervisor.lease.token for supervisor in self._driven.supervisors.values()}
        orphans = orphaned(self._store, self._me, driven, self._context.now(), self._settings.silent_micros)
        for lease, owner in orphans.unobserved:
            self._driven.report_once(lease.run_id, not_observed(lease, owner))
        for lease in orphans.found:
            directory = RunDir(self._settings.home, lease.run_id).attempt(lease.attempt)
            try:
                attempt = self._launcher.adopt(directory, lease.token)
                pid = attempt.process.pid if attempt.process else 0
                event = e.AttemptAdopted(daemon=self._me.daemon_id, host=self._me.host, pid=pid)
                mine = attempts.adopt(self._store, self._context, lease, event, self._settings.lease_micros)
            except (OSError, SftdError) as error:
                self._driven.report_once(lease.run_id, error)
                continue
            try:
                if directory.path.is_dir():
                    directory.write_lease(mine.token)
            except OSError as error:
                # Usually a full disk. The attempt must be supervised all the same.
                self._driven.report_once(lease.run_id, error)
            self._inventory.restore(lease.run_id, attempt.process.devices if attempt.process else [])
            self._driven.supervisors[lease.run_id] = Supervisor(
                self._store, self._context, self._settings, mine, attempt
            )
            state = "is alive" if attempt.is_alive() else "has ended meanwhile"
            of_run(lease.run_id, lease.attempt).info("adopted attempt %d, which %s", lease.attempt, state)

    def head(self) -> tuple[Need, str] | None:
        """The need and the id of the run whose turn it is but whose devices are in use."""
        with self._store.read() as connection:
            now = self._store.clock(connection, self._context.now())
            turn = turns.next_turn(connection, now, self._fits, self._limits)
        if turn is None or turn.fits:
            return None
        return self._inventory.need(turn.entry.demand), turn.entry.run_id

    def nothing_left(self) -> bool:
        """Whether no daemon drives a run, and no waiting run can ever start here."""
        return not turns.anything_left(self._store, self._context, self._fits, self._limits)

    def _fits(self, entry: Entry) -> bool | None:
        fit = self._inventory.fits(entry.demand)
        if fit is not None and not self._has_start(entry.run_id):
            return None
        if fit is None and entry.run_id not in self._too_large:
            self._too_large.add(entry.run_id)
            need = self._inventory.need(entry.demand)
            of_run(entry.run_id).warning(
                "needs %d %s devices, more than this host has; it waits", need.count, need.device
            )
        return fit

    def _has_start(self, run_id: str) -> bool:
        """Whether the run can continue here. With its checkpoint on another host, the run would reject the checkpoint as missing
        and start over. On the host that trained it last, a missing folder is gone for good, so it starts there."""
        asked_at, has = self._starts_here.get(run_id, (-_PLACE_SECONDS, False))
        if time.monotonic() - asked_at < _PLACE_SECONDS:
            return has
        with self._store.read() as connection:
            start = placing.start_of(connection, run_id)
        has = start is None or start.host in ("", self._me.host) or os.path.isdir(start.path)
        if not has and start is not None and run_id not in self._starts_here:
            what = "its checkpoint of step %d is on %s, not on this host; it waits for a daemon there"
            of_run(run_id).warning(what, start.step, start.host)
        self._starts_here[run_id] = (time.monotonic(), has)
        return has

    def _claim(self) -> Claimed | None:
        return attempts.claim(
            self._store,
            self._context,
            daemon=self._me.daemon_id,
            host=self._me.host,
            fits=self._fits,
            lease_micros=self._settings.lease_micros,
            limits=self._limits,
        )

    def _preempt(self) -> None:
        """Preempt runs of lower priority for the run whose turn it is."""
        if not any(supervisor.is_preemptible for supervisor in self._driven.supervisors.values()):
            return
        for run_id in turns.preempt(
            self._store,
            self._context,
            daemon=self._me.daemon_id,
            fits=self._fits,
            need=self._inventory.need,
            free=lambda kind: len(self._inventory.free(kind)),
            limits=self._limits,
            silent_micros=self._settings.silent_micros,
        ):
            of_run(run_id).info("preempted by a run of higher priority")

    def _launch(self, claimed: Claimed) -> None:
        lease, run = claimed.lease, claimed.run
        # The next attempt starts from another checkpoint.
        self._starts_here.pop(run.run_id, None)
        if (before := self._driven.supervisors.get(run.run_id)) is not None:
            # A user abandoned and resumed the run before this daemon noticed the end of its lease.
            self._driven.forget(before.lease)
        run_dir = RunDir(self._settings.home, run.run_id)
        directory = run_dir.attempt(lease.attempt)
        order = order_of(
            run,
            run.restart_checkpoint,
            attempt=lease.attempt,
            token=lease.token,
            checkpoint_dir=run_dir.checkpoint_dir(run.spec.checkpoint.save_dir),
            model=claimed.model,
            model_root=self._settings.home,
            losses=attempts.losses_before(self._store, run.run_id, claimed.start.from_step),
            patience=attempts.patience_before(self._store, run, claimed.start.from_step),
        )
        need, devices = self._inventory.take(run.run_id, run.spec)
        try:
            if ended := make_way(run_dir, lease.attempt):
                of_run(run.run_id).warning("ended processes %s of an attempt that no daemon drives", ended)
            attempt, argv = self._launcher.start(directory, order, need, devices)
        except OSError as error:
            self._inventory.release(run.run_id)
            of_run(run.run_id, lease.attempt).error(
                "attempt %d could not be started: %s", lease.attempt, error
            )
            cause: Cause = "disk full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "crash"
            attempts.finish(
                self._store,
                self._context,
                lease,
                exit_code=None,
                failure=Failure(cause, f"torchrun could not be started: {error}"),
                lost=False,
                backoff_seconds=self._settings.backoff_seconds,
            )
            return
        assert attempt.process is not None
        launched = e.AttemptLaunched(
            pid=attempt.process.pid,
            create_time=attempt.process.create_time,
            host=attempt.process.host,
            directory=str(directory.path),
            argv=argv,
            devices=devices,
        )
        # The first tick records the launch. If this fails, `adopt` finds the lease without a supervisor.
        self._driven.supervisors[run.run_id] = Supervisor(
            self._store, self._context, self._settings, lease, attempt, launched
        )
        where = f"step {claimed.start.from_step}" if claimed.start.from_step else "the pretrained model"
        pid = attempt.process.pid
        manager = kind_of(run.spec.launch.launcher).shown
        how = f"started from {where}, pid {pid}" if pid else f"handed to {manager}, to start from {where}"
        of_run(run.run_id, lease.attempt).info("attempt %d %s", lease.attempt, how)

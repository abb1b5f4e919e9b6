"""The daemon: one `tick` after another."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence

import sqlalchemy as sa

from sftd.daemon.log import Outage, of_run
from sftd.daemon.metrics import Metrics
from sftd.daemon.mirror import MirrorThread
from sftd.daemon.mirror_turn import Mirror, MirrorTurn
from sftd.daemon.notices import NoticeThread
from sftd.daemon.registration import Registration, this_daemon
from sftd.daemon.rescuer import make_way, not_observed, orphaned
from sftd.daemon.sampling import Sampler
from sftd.daemon.supervisor import Supervisor, take_in
from sftd.domain.errors import LeaseLost, SftdError
from sftd.domain.log import events as e
from sftd.domain.queue.order import Entry, Limits
from sftd.domain.run.failures import Cause, Failure
from sftd.domain.spec.launchers import kind_of
from sftd.launcher import rerun
from sftd.launcher.inventory import Inventory
from sftd.launcher.local import LocalAttempt
from sftd.launcher.seam import Launcher
from sftd.operations.context import Context
from sftd.operations.driving import attempts, turns
from sftd.operations.driving.attempts import Claimed
from sftd.operations.queries import placing
from sftd.projections.mirrors.mlflow.mirror import position_name
from sftd.settings import Settings
from sftd.store.database import file as database_file
from sftd.store.database.engine import Store
from sftd.store.database.file import DatabaseExchanged
from sftd.store.queue.leases import Lease
from sftd.wire.attempt.directory import RunDir
from sftd.wire.attempt.orders import order_of

log = logging.getLogger("sftd.daemon")

_MIRROR_DRAIN_SECONDS = 120.0
# Leases are renewed between ticks, so a tick starts so many runs at most.
_STARTS_PER_TICK = 20
# With hundreds of attempts each is looked at less often: a look opens a file, perhaps over a network.
_LOOKS_PER_SECOND = 400
# And a tick that has looked so long leaves the others to the next.
_LOOK_SECONDS = 0.25
# Where a run's checkpoint is changes seldom, and the disk that is asked may be slow.
_PLACE_SECONDS = 5.0
# Down, restarting, read-only for a while, or locked: all of it passes.
DATABASE_ERRORS = (sa.exc.OperationalError, sa.exc.InternalError, sa.exc.InterfaceError)


class Daemon:
    """Claims runs for the devices of this host and drives their attempts.

    `mirror` makes the MLflow mirror, in a thread of its own. The daemon may be killed at any moment: what it knows is
    in the database and in the attempt directories, and the next daemon of this home goes on from there. `stop` ends it
    after the present tick.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        inventory: Inventory,
        mirror: Callable[[], Mirror] | None = None,
        launcher: Launcher = LocalAttempt,
        stop: threading.Event | None = None,
        notices: Sequence[NoticeThread] = (),
    ) -> None:
        self._store = store
        self._settings = settings
        self._inventory = inventory
        self._launcher = launcher
        self._limits = Limits(settings.user_limit, settings.project_limit)
        me = this_daemon(settings, inventory.describe() | self._limits.describe())
        self.daemon_id, self._host = me.daemon_id, me.host
        self._context = Context(actor=f"daemon:{self.daemon_id}")
        self._registration = Registration(store, self._context, settings, me)
        self._file = database_file.watch(store.engine.url)
        self._lease_micros = int(settings.lease_seconds * 1_000_000)
        self._supervisors: dict[str, Supervisor] = {}
        self._mirror = MirrorThread(lambda: self._turn(mirror())) if mirror is not None else None
        self._notices = notices
        self._stop = stop or threading.Event()
        self._metrics = Metrics(store, settings, inventory, self.daemon_id, mirrors=mirror is not None)
        self._sampler = Sampler(store, self._context, settings.sample_seconds)
        self._database = Outage("the database")
        self._renew_at = 0.0
        self._look_at: dict[str, float] = {}
        self._too_large: set[str] = set()
        self._starts_here: dict[str, tuple[float, bool]] = {}
        self._reported: dict[str, str] = {}

    def stop(self) -> None:
        """End after the present tick, leaving training alive. Safe in a signal handler."""
        self._stop.set()

    def run(self, *, drain: bool = False) -> None:
        """Tick until stopped; with `drain`, until no run waits and none is driven."""
        registered = drained = exchanged = False
        try:
            while not self._stop.is_set():
                try:
                    if not registered and not self._registration.is_free():
                        self._stop.wait(self._settings.poll_seconds)
                        continue
                    if not registered:
                        self._register()
                        registered = True
                        if self._mirror:
                            self._mirror.start()
                        for channel in self._notices:
                            channel.start()
                    busy = self.tick()
                    self._metrics.write_when_due(self._supervisors, self._context.now())
                    self._sampler.sample_when_due(self._supervisors.values())
                    if drain and not self._supervisors and self._nothing_left():
                        drained = True
                        self._metrics.write({}, self._context.now())
                        break
                except DATABASE_ERRORS as error:
                    # Training goes on; its journal waits for us.
                    self._database.failed(str(error.orig).strip())
                    busy = False
                else:
                    self._database.answered()
                if not busy:
                    self._stop.wait(self._settings.poll_seconds)
        except DatabaseExchanged:
            exchanged = True
            raise
        finally:
            if registered:
                self._end(_MIRROR_DRAIN_SECONDS if drained else 10.0, may_write=not exchanged)
        log.info("daemon stopped; %d attempts continue without it", len(self._supervisors))

    def _end(self, patience: float, *, may_write: bool) -> None:
        """Stop the threads; without `may_write` nothing more is copied from the database or written to it."""
        if self._mirror and not self._mirror.stop(patience, catch_up=may_write):
            log.warning("MLflow does not have everything yet; the next daemon continues there")
        for channel in self._notices:
            channel.stop()
        if may_write:
            self._unregister()

    def _turn(self, mirror: Mirror) -> MirrorTurn:
        name = position_name(self._settings.mlflow_tracking_uri)
        return MirrorTurn(mirror, self._store, self._context, name, self.daemon_id)

    def _nothing_left(self) -> bool:
        """Whether no run is driven by anybody, and none waits but those that can never start here."""
        return not turns.anything_left(self._store, self._context, self._fits, self._limits)

    def _fits(self, entry: Entry) -> bool | None:
        fit = self._inventory.fits(entry.demand)
        if fit is not None and not self._has_start(entry.run_id):
            return None
        if fit is None and entry.run_id not in self._too_large:
            self._too_large.add(entry.run_id)
            need = self._inventory.need(entry.demand)
            of_run(entry.run_id).warning(
                "needs %d %s devices, more than there are here; it waits", need.count, need.device
            )
        return fit

    def _has_start(self, run_id: str) -> bool:
        """Whether the run can go on here. What has its checkpoint on another host would find it missing, reject it, and
        begin anew. Where it was trained last it is let go on all the same, for there the folder is gone for good."""
        asked_at, has = self._starts_here.get(run_id, (-_PLACE_SECONDS, False))
        if time.monotonic() - asked_at < _PLACE_SECONDS:
            return has
        with self._store.read() as connection:
            start = placing.start_of(connection, run_id)
        has = start is None or start.host in ("", self._host) or os.path.isdir(start.path)
        if not has and start is not None and run_id not in self._starts_here:
            what = "its checkpoint of step %d is on %s and not here; it waits for a daemon there"
            of_run(run_id).warning(what, start.step, start.host)
        self._starts_here[run_id] = (time.monotonic(), has)
        return has

    def _register(self) -> None:
        self._registration.register()
        devices = ", ".join(f"{n} {kind}" for kind, n in self._inventory.describe().items() if n)
        log.info("daemon %s on %s", self.daemon_id, devices)

    def _unregister(self) -> None:
        try:
            self._registration.stopped()
        except DATABASE_ERRORS as error:
            log.warning("the database: %s", str(error.orig).strip())

    def tick(self) -> bool:
        """Do once what there is to do. Returns whether there was anything. Raises `DatabaseExchanged`."""
        if self._file is not None:
            self._file.check()
        if time.monotonic() >= self._renew_at:
            self._renew()
            self._adopt()
            self._renew_at = time.monotonic() + self._settings.lease_seconds / 3
        busy = self._supervise()
        for _ in range(_STARTS_PER_TICK):
            if (claimed := self._claim()) is None:
                break
            self._launch(claimed)
            busy = True
        self._preempt()
        if busy and self._mirror:
            self._mirror.wake()
        if busy:
            for channel in self._notices:
                channel.wake()
        return busy

    def _renew(self) -> None:
        leases = [s.lease for s in self._supervisors.values()]
        for lost in attempts.renew(self._store, self._context, leases, self._lease_micros):
            self._forget(lost)
        self._registration.seen()
        for folder in rerun.sweep(self._settings.home):
            log.info("removed %s, which a killed `sftd verify` left", folder)

    def _forget(self, lease: Lease) -> None:
        of_run(lease.run_id, lease.attempt).warning("the lease is no longer ours")
        supervisor = self._supervisors.pop(lease.run_id, None)
        self._look_at.pop(lease.run_id, None)
        if supervisor is not None and self._is_given_up(supervisor):
            # Nobody else will end these processes, and the run may start anew.
            supervisor.attempt.kill()
        self._inventory.release(lease.run_id)

    def _is_given_up(self, supervisor: Supervisor) -> bool:
        """Whether a lost attempt was given up by a person rather than taken over by another daemon."""
        try:
            return supervisor.attempt.directory.lease() in (supervisor.lease.token, None)
        except OSError as error:
            # Another daemon of this home could not have read it either.
            self._report_once(supervisor.lease.run_id, error)
            return True

    def _supervise(self) -> bool:
        stopping = turns.stopping(self._store, self.daemon_id) if self._supervisors else {}
        busy = False
        now, pause = time.monotonic(), len(self._supervisors) / _LOOKS_PER_SECOND
        # Whoever has waited longest comes first.
        order = sorted(self._supervisors, key=lambda run_id: self._look_at.get(run_id, 0.0))
        due = [run_id for run_id in order if self._look_at.get(run_id, 0.0) <= now or run_id in stopping]
        supervisors = [self._supervisors[run_id] for run_id in due]
        taken = take_in(self._store, self._context, supervisors, now + _LOOK_SECONDS / 2)
        for run_id in due:
            if time.monotonic() - now > _LOOK_SECONDS and run_id not in taken:
                return True
            supervisor = self._supervisors[run_id]
            self._look_at[run_id] = now + pause
            try:
                if run_id in stopping:
                    supervisor.request_stop(now=stopping[run_id])
                if supervisor.tick(*taken.get(run_id, ())) is not None:
                    del self._supervisors[run_id], self._look_at[run_id]
                    self._inventory.release(run_id)
                    busy = True
            except LeaseLost:
                self._forget(supervisor.lease)
            except (OSError, ValueError, SftdError) as error:
                # One run's broken folder must not end the supervision of the others.
                self._report_once(run_id, error)
        return busy

    def _report_once(self, run_id: str, error: Exception) -> None:
        if self._reported.get(run_id) != str(error):
            self._reported[run_id] = str(error)
            of_run(run_id).error("%s; trying again", error)

    def _claim(self) -> Claimed | None:
        return attempts.claim(
            self._store,
            self._context,
            daemon=self.daemon_id,
            host=self._host,
            fits=self._fits,
            lease_micros=self._lease_micros,
            limits=self._limits,
        )

    def _preempt(self) -> None:
        """Have runs of lower priority make room for the run whose turn it is."""
        if not any(supervisor.is_preemptible for supervisor in self._supervisors.values()):
            return
        for run_id in turns.preempt(
            self._store,
            self._context,
            daemon=self.daemon_id,
            fits=self._fits,
            need=self._inventory.need,
            free=lambda kind: len(self._inventory.free(kind)),
            limits=self._limits,
            silent_micros=self._settings.silent_micros,
        ):
            of_run(run_id).info("makes room for a run of higher priority")

    def _launch(self, claimed: Claimed) -> None:
        lease, run = claimed.lease, claimed.run
        # Its next attempt starts from elsewhere.
        self._starts_here.pop(run.run_id, None)
        if (before := self._supervisors.get(run.run_id)) is not None:
            # A person gave it up and resumed it before this daemon noticed that its lease had ended.
            self._forget(before.lease)
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
        )
        need, devices = self._inventory.take(run.run_id, run.spec)
        try:
            if ended := make_way(run_dir, lease.attempt):
                of_run(run.run_id).warning("ended processes %s of an attempt that nobody drives", ended)
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
        # Written at its first tick. Should the database fail right here, the lease is found undriven, and adopted.
        self._supervisors[run.run_id] = Supervisor(
            self._store, self._context, self._settings, lease, attempt, launched
        )
        where = f"step {claimed.start.from_step}" if claimed.start.from_step else "the pretrained model"
        pid = attempt.process.pid
        manager = kind_of(run.spec.launch.launcher).shown
        how = f"started from {where}, pid {pid}" if pid else f"handed to {manager}, to start from {where}"
        of_run(run.run_id, lease.attempt).info("attempt %d %s", lease.attempt, how)

    def _adopt(self) -> None:
        driven = {supervisor.lease.token for supervisor in self._supervisors.values()}
        orphans = orphaned(
            self._store, self._registration.row, driven, self._context.now(), self._settings.silent_micros
        )
        for lease, owner in orphans.unobserved:
            self._report_once(lease.run_id, not_observed(lease, owner))
        for lease in orphans.found:
            directory = RunDir(self._settings.home, lease.run_id).attempt(lease.attempt)
            try:
                attempt = self._launcher.adopt(directory, lease.token)
                pid = attempt.process.pid if attempt.process else 0
                event = e.AttemptAdopted(daemon=self.daemon_id, host=self._host, pid=pid)
                mine = attempts.adopt(self._store, self._context, lease, event, self._lease_micros)
            except (OSError, SftdError) as error:
                self._report_once(lease.run_id, error)
                continue
            try:
                if directory.path.is_dir():
                    directory.write_lease(mine.token)
            except OSError as error:
                # A full disk, mostly: all the more the attempt must be watched, and its end told.
                self._report_once(lease.run_id, error)
            self._inventory.restore(lease.run_id, attempt.process.devices if attempt.process else [])
            self._supervisors[lease.run_id] = Supervisor(
                self._store, self._context, self._settings, mine, attempt
            )
            state = "is alive" if attempt.is_alive() else "has ended meanwhile"
            of_run(lease.run_id, lease.attempt).info("adopted attempt %d, which %s", lease.attempt, state)

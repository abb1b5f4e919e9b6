"""The daemon's main loop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import sqlalchemy as sa

from sftd.daemon.driven import Driven
from sftd.daemon.evaluator import Evaluator
from sftd.daemon.log import Outage
from sftd.daemon.metrics import Metrics
from sftd.daemon.mirror_turn import of_mirrors
from sftd.daemon.registration import Registration, this_daemon
from sftd.daemon.sampling import Sampler
from sftd.daemon.starting import Starter
from sftd.daemon.worker import Worker
from sftd.domain.queue.order import Limits
from sftd.launcher import rerun
from sftd.launcher.inventory import Inventory
from sftd.launcher.local import LocalAttempt
from sftd.launcher.seam import Launcher
from sftd.operations.context import Context
from sftd.projections.mirrors.seam import Mirror
from sftd.settings import Settings
from sftd.store.database import file as database_file
from sftd.store.database.engine import Store
from sftd.store.database.file import DatabaseExchanged

log = logging.getLogger("sftd.daemon")

# Time for the workers to send the rest when the daemon ends: after a drain, or otherwise.
_DRAIN_SECONDS, _LAST_SECONDS = 120.0, 10.0
# Down, restarting, read-only for a while, or locked: all of these are temporary.
DATABASE_ERRORS = (sa.exc.OperationalError, sa.exc.InternalError, sa.exc.InterfaceError)


class Daemon:
    """Claims runs for the devices of this host and drives their attempts.

    `mirrors` and `notices` are fed from the log, each in its own thread. The daemon may be killed at any moment: its state is
    in the database and the attempt directories, and the next daemon of this home continues from there. Setting `stop` ends
    the daemon after the current tick.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        inventory: Inventory,
        launcher: Launcher = LocalAttempt,
        stop: threading.Event | None = None,
        mirrors: Sequence[Mirror] = (),
        notices: Sequence[Worker] = (),
    ) -> None:
        self._settings = settings
        self._inventory = inventory
        limits = Limits(settings.user_limit, settings.project_limit)
        me = this_daemon(settings, inventory.describe() | limits.describe())
        self.daemon_id = me.daemon_id
        self._context = context = Context(actor=f"daemon:{me.daemon_id}")
        self._registration = Registration(store, context, settings, me)
        self._file = database_file.watch(store.engine.url)
        self._driven = Driven(store, context, inventory, me.daemon_id)
        self._starter = Starter(store, context, settings, inventory, launcher, self._driven, limits, me)
        self._evaluator = Evaluator(store, context, settings, inventory, me)
        self._workers = [*notices, *of_mirrors(mirrors, settings, store, context, me.daemon_id)]
        self._stop = stop or threading.Event()
        self._metrics = Metrics(store, settings, inventory, me.daemon_id, mirrors)
        self._sampler = Sampler(store, context, settings.sample_seconds)
        self._database = Outage("the database")
        self._renew_at = 0.0

    def stop(self) -> None:
        """End after the current tick. Training continues. Safe in a signal handler."""
        self._stop.set()

    def run(self, *, drain: bool = False) -> None:
        """Tick until stopped; with `drain`, until no run or evaluation waits and none is driven. Raises `DatabaseExchanged` and `NotAlone`."""
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
                    for worker in self._workers:
                        worker.start()
                    busy = self.tick()
                    self._metrics.write_when_due(self._driven.supervisors, self._context.now())
                    self._sampler.sample_when_due(self._driven.supervisors.values())
                    if drain and not self._driven.supervisors and self._nothing_left():
                        drained = True
                        self._metrics.write({}, self._context.now())
                        break
                except DATABASE_ERRORS as error:
                    # Training continues. Its journals are ingested later.
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
                self._end(_DRAIN_SECONDS if drained else _LAST_SECONDS, may_write=not exchanged)
        log.info("daemon stopped; %d attempts continue without it", len(self._driven.supervisors))

    def _end(self, patience: float, *, may_write: bool) -> None:
        """Stop the workers. Without `may_write`, leave the database alone."""
        self._end_evaluations(may_write=may_write)
        if may_write:
            for worker in self._workers:
                worker.end()
        deadline = time.monotonic() + patience
        for worker in self._workers:
            worker.stop(max(0.0, deadline - time.monotonic()))
        if may_write:
            self._unregister()

    def _end_evaluations(self, *, may_write: bool) -> None:
        try:
            self._evaluator.end(may_write=may_write)
        except DATABASE_ERRORS as error:
            # The next daemon finds them lost. The processes end with this one.
            log.warning("the database: %s", str(error.orig).strip())

    def _nothing_left(self) -> bool:
        return self._starter.nothing_left() and self._evaluator.nothing_left()

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
        """Do one round of work. Returns whether a run started or ended. Raises `DatabaseExchanged`."""
        if self._file is not None:
            self._file.check()
        if time.monotonic() >= self._renew_at:
            self._renew()
            self._starter.adopt()
            self._evaluator.recover()
            self._renew_at = time.monotonic() + self._settings.lease_seconds / 3
        has_ended = self._driven.tick()
        # Before the starter: a run takes the devices of evaluations.
        self._evaluator.make_room(self._starter.head)
        busy = self._starter.tick() or has_ended
        busy = self._evaluator.tick(self._starter.head) or busy
        if busy:
            for worker in self._workers:
                worker.wake()
        return busy

    def _renew(self) -> None:
        self._driven.renew(self._settings.lease_micros)
        self._registration.seen()
        for folder in rerun.sweep(self._settings.home):
            log.info("removed %s, which a killed `sftd verify` left", folder)

"""A daemon's row in the database, and the detection of other daemons with the same host name and home path."""

from __future__ import annotations

import logging
import os

import msgspec

from sftd.domain.errors import SftdError
from sftd.domain.log.events import Micros
from sftd.launcher import processes
from sftd.operations.context import Context
from sftd.settings import Settings
from sftd.store.database.engine import Store
from sftd.store.queue import daemons
from sftd.store.queue.daemons import DaemonRow

log = logging.getLogger("sftd.daemon")


class NotAlone(SftdError):
    """Another living daemon has this host name and home path."""


def this_daemon(settings: Settings, devices: dict[str, int]) -> DaemonRow:
    """The row of a daemon that starts in this process."""
    me = processes.identify(os.getpid())
    where = processes.identity(settings.home)
    return DaemonRow(
        daemon_id=f"{me.host[:40]}-{me.pid}-{os.urandom(3).hex()}",
        host=me.host,
        pid=me.pid,
        create_time=me.create_time,
        home=str(settings.home),
        devices=msgspec.json.encode(devices).decode(),
        started_at=0,
        seen_at=0,
        boot_id=where.boot_id,
        pid_namespace=where.pid_namespace,
        home_id=where.home_id,
    )


def twins(store: Store, me: DaemonRow, now: Micros, silent: int) -> list[DaemonRow]:
    """Daemons with the host name and home path of `me` that run in another boot or container, and have renewed their row within
    `silent` µs. `me` holds the lock of its home, so daemons of the very same home are not among them."""
    with store.read() as connection:
        found = daemons.namesakes(connection, me.host, me.home, store.clock(connection, now) - silent)
    return [
        row
        for row in found
        if not me.identity.is_same(row.identity)
        and not (me.identity.is_known and me.identity.has_home_of(row.identity))
    ]


class Registration:
    """The row of a daemon that holds the lock of its home."""

    def __init__(self, store: Store, context: Context, settings: Settings, row: DaemonRow) -> None:
        self.row = row
        self._store = store
        self._context = context
        self._silent = settings.silent_micros
        self._seen: dict[str, Micros] = {}

    def is_free(self) -> bool:
        """Whether no other daemon has this host name and home path. False while one was seen a moment ago but may be dead: call
        again. Raises `NotAlone` once that one has renewed its row."""
        found = twins(self._store, self.row, self._context.now(), self._silent)
        for twin in found:
            if twin.daemon_id not in self._seen:
                what = "daemon %s with this host name and home path was seen a moment ago, in another container, on another machine, "
                what += "or before a reboot; waiting at most %.0f s to see whether it still runs"
                log.warning(what, twin.daemon_id, self._silent / 1e6)
            if self._seen.setdefault(twin.daemon_id, twin.seen_at) != twin.seen_at:
                raise NotAlone(
                    f"daemon {twin.daemon_id} (pid {twin.pid} there) has the same host name {twin.host} and the same home path "
                    f"{twin.home}, and runs in another container or on another machine: each would take the other's runs for "
                    "its own. Give each its own host name (`docker run --hostname NAME`) or its own SFTD_HOME"
                )
        return not found

    def register(self) -> None:
        """Write the row."""
        now = self._context.now()
        self.row = msgspec.structs.replace(self.row, started_at=now, seen_at=now)
        with self._store.write(appends=False) as tx:
            daemons.register(tx, self.row)

    def seen(self) -> None:
        """Record that the daemon is alive."""
        with self._store.write(appends=False) as tx:
            daemons.seen(tx, self.row.daemon_id, self._context.now())

    def stopped(self) -> None:
        """Record that the daemon stops."""
        with self._store.write(appends=False) as tx:
            daemons.stopped(tx, self.row.daemon_id, self._context.now())

"""Of the daemons that share a database, one feeds a mirror; another takes over when it is gone.

This only avoids double work for the tracker: two daemons send the same bytes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence

from sftd.daemon.rescuer import has_stopped
from sftd.daemon.worker import Worker
from sftd.launcher import processes
from sftd.operations.context import Context
from sftd.projections.mirrors.feed import Feed
from sftd.projections.mirrors.seam import Mirror
from sftd.settings import Settings
from sftd.store.database.engine import Store, Tx
from sftd.store.queue import daemons, named_leases

log = logging.getLogger("sftd.mirror")

# Longer than a tracker's longest response time: the lease is renewed between two requests.
LEASE_SECONDS = 90.0


def of_mirrors(
    mirrors: Sequence[Mirror], settings: Settings, store: Store, context: Context, daemon_id: str
) -> Iterator[Worker]:
    """The workers that feed the enabled mirrors."""
    for mirror in mirrors:
        if (position := mirror.position(settings)) is None:
            continue

        def open_feed(mirror: Mirror = mirror, position: str = position) -> Feed:
            return Feed(store, mirror.open(settings, store), position)

        turn = MirrorTurn(mirror.name, open_feed, store, context, position, daemon_id)
        yield Worker(
            f"{mirror.name} mirror",
            turn.sync,
            log,
            close=turn.close,
            last_backoff=15.0,
            idle_seconds=1.0,
            is_patient=True,
        )


class MirrorTurn:
    """Opens and calls a feed while this daemon holds the lease `name` on it."""

    def __init__(
        self,
        title: str,
        open_feed: Callable[[], Feed],
        store: Store,
        context: Context,
        name: str,
        daemon_id: str,
        seconds: float = LEASE_SECONDS,
    ) -> None:
        self._title = title
        self._open = open_feed
        self._feed: Feed | None = None
        self._store = store
        self._context = context
        self._name = name
        self._daemon_id = daemon_id
        self._seconds = seconds
        self._token = context.new_id()
        self._mine = False
        self._reported: str | None = None
        self._ask_at = 0.0

    def sync(self, should_stop: Callable[[], bool]) -> int:
        """Copy new events if this daemon holds the lease. Returns the number of copied events."""
        if not self._hold():
            return 0
        if self._feed is None:
            self._feed = self._open()
        return self._feed.sync(lambda: should_stop() or not self._hold())

    def close(self) -> None:
        """Release the lease, so that another daemon takes over at once."""
        if self._mine:
            self._mine = False
            with self._store.write(appends=False) as tx:
                named_leases.release(tx, self._name, self._token)

    def _hold(self) -> bool:
        if time.monotonic() < self._ask_at:
            return self._mine
        with self._store.write(appends=False) as tx:
            mine, other = self._take(tx), None
            if not mine and (held := named_leases.holder(tx.connection, self._name)) is not None:
                token, other = held
                if self._is_gone(tx, other):
                    named_leases.release(tx, self._name, token)
                    mine = self._take(tx)
        if mine and not self._mine and self._feed is not None:
            # The previous holder may have sent more than this feed has cached.
            self._feed.forget()
        if not mine and other != self._reported:
            log.info("daemon %s feeds %s; this daemon takes over when that one is gone", other, self._title)
        self._reported = None if mine else other
        self._mine = mine
        self._ask_at = time.monotonic() + self._seconds / 3
        return mine

    def _take(self, tx: Tx) -> bool:
        micros = int(self._seconds * 1_000_000)
        return named_leases.take(tx, self._name, self._token, self._daemon_id, self._context.now(), micros)

    def _is_gone(self, tx: Tx, daemon_id: str) -> bool:
        """Whether a daemon provably no longer runs. That of another host cannot be observed: its lease must expire."""
        row = daemons.find(tx.connection, daemon_id)
        if row is None or row.host != processes.host_name():
            return False
        me = daemons.find(tx.connection, self._daemon_id)
        if me is not None and not me.identity.observes(row.identity):
            return False
        return has_stopped(row)

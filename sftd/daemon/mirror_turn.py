"""Of the daemons that share a database, one mirrors to MLflow; another takes over when it is gone.

Correctness does not hang on it: what two mirrors send is the same, byte for byte. It spares MLflow the double work.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from sftd.launcher import processes
from sftd.operations.context import Context
from sftd.store.database.engine import Store, Tx
from sftd.store.queue import daemons
from sftd.store.queue import named_leases as leases

log = logging.getLogger("sftd.mirror")

# Longer than the longest wait for an answer of MLflow: between two requests the lease is prolonged.
LEASE_SECONDS = 90.0


class Mirror(Protocol):
    """What is done by one daemon at a time."""

    def sync(self, should_stop: Callable[[], bool]) -> int:
        """Copy what is new. Returns the number of events taken in."""
        ...

    def forget(self) -> None:
        """Another has mirrored meanwhile."""
        ...


class MirrorTurn:
    """A mirror that does nothing while it is another's turn."""

    def __init__(
        self,
        mirror: Mirror,
        store: Store,
        context: Context,
        name: str,
        daemon_id: str,
        seconds: float = LEASE_SECONDS,
    ) -> None:
        self._mirror = mirror
        self._store = store
        self._context = context
        self._name = name
        self._daemon_id = daemon_id
        self._seconds = seconds
        self._token = context.new_id()
        self._mine = False
        self._told: str | None = None
        self._ask_at = 0.0

    def sync(self, should_stop: Callable[[], bool]) -> int:
        """Mirror what is new if it is our turn. Returns the number of events taken in: 0 also when it is not our turn."""
        if not self._hold():
            return 0
        return self._mirror.sync(lambda: should_stop() or not self._hold())

    def close(self) -> None:
        """Let another take over at once."""
        if self._mine:
            self._mine = False
            with self._store.write(appends=False) as tx:
                leases.release(tx, self._name, self._token)

    def _hold(self) -> bool:
        if time.monotonic() < self._ask_at:
            return self._mine
        with self._store.write(appends=False) as tx:
            mine, other = self._take(tx), None
            if not mine and (held := leases.holder(tx.connection, self._name)) is not None:
                token, other = held
                if self._is_gone(tx, other):
                    leases.release(tx, self._name, token)
                    mine = self._take(tx)
        if mine and not self._mine:
            # Whoever had the turn before may have sent more than is remembered here.
            self._mirror.forget()
        if not mine and other != self._told:
            log.info("daemon %s feeds MLflow; this one takes over when that is gone", other)
        self._told = None if mine else other
        self._mine = mine
        self._ask_at = time.monotonic() + self._seconds / 3
        return mine

    def _take(self, tx: Tx) -> bool:
        micros = int(self._seconds * 1_000_000)
        return leases.take(tx, self._name, self._token, self._daemon_id, self._context.now(), micros)

    def _is_gone(self, tx: Tx, daemon_id: str) -> bool:
        """Whether it is proven that a daemon no longer runs: one of another host has its lease until that expires."""
        row = daemons.find(tx.connection, daemon_id)
        if row is None or row.host != processes.host_name():
            return False
        me = daemons.find(tx.connection, self._daemon_id)
        if me is not None and not me.identity.observes(row.identity):
            return False
        return row.stopped_at is not None or not processes.is_alive(row.pid, row.create_time)

"""Metrics for Prometheus, as a text file for node_exporter's textfile collector: the daemon opens no port.

The file is rewritten every few seconds from the database and the driven attempts.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import sftd
from sftd.domain.errors import SftdError
from sftd.domain.log.events import Micros
from sftd.launcher.inventory import Inventory
from sftd.operations.queries import metrics
from sftd.projections.mirrors.seam import Mirror
from sftd.settings import Settings
from sftd.store.database.engine import Store
from sftd.store.log.goodput import read_ledger

log = logging.getLogger("sftd.daemon")

_SECONDS = 10.0
_MICROS = 1_000_000
Labels = Mapping[str, str]
Sample = tuple[Labels, float]


class DrivenAttempt(Protocol):
    """An attempt that this daemon drives, as the metrics see it."""

    def backlog(self) -> tuple[int, Micros | None]:
        """Number of journal lines that are not in the log yet, and the time of the first."""
        ...


class Metrics:
    """Writes the file at most every ten seconds. An error of the file is logged once; the daemon continues."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        inventory: Inventory,
        daemon_id: str,
        mirrors: Iterable[Mirror] = (),
    ) -> None:
        self._store = store
        self._inventory = inventory
        self._daemon_id = daemon_id
        positions = {mirror.name: mirror.position(settings) for mirror in mirrors}
        self._mirrors = {name: position for name, position in positions.items() if position is not None}
        self._path = settings.metrics_file
        # Outside the home the file is for node_exporter, which runs as another user. It has no secrets.
        self._mode = 0o600 if self._path.is_relative_to(settings.home) else 0o644
        self._due_at = 0.0
        self._failed = ""

    def write_when_due(self, driven: Mapping[str, DrivenAttempt], now: Micros) -> None:
        """Write the file if that is due. Raises only the database driver's errors."""
        if time.monotonic() >= self._due_at:
            self.write(driven, now)
            self._due_at = time.monotonic() + _SECONDS

    def write(self, driven: Mapping[str, DrivenAttempt], now: Micros) -> None:
        """Write the file."""
        try:
            text = "".join(_family(*family) for family in self._families(driven, now))
            _replace(self._path, text.encode(), self._mode)
        except (OSError, SftdError) as error:
            if self._failed != str(error):
                log.warning("the metrics file cannot be written: %s", error)
            self._failed = str(error)
        else:
            self._failed = ""

    def _families(
        self, driven: Mapping[str, DrivenAttempt], now: Micros
    ) -> Iterator[tuple[str, str, list[Sample]]]:
        found = metrics.read(self._store, now, self._mirrors)
        info = {"daemon_id": self._daemon_id, "version": sftd.__version__}
        yield "sftd_daemon_info", "The daemon that wrote this.", [(info, 1)]
        yield "sftd_daemon_last_tick_timestamp_seconds", "When this was written.", [({}, now / _MICROS)]
        meaning = "Runs in the queue: ready for devices, delayed until a time, dependent on a run, held by a user, leased by a daemon."
        yield "sftd_queue_runs", meaning, _by("state", found.queue)
        meaning = "Waiting time of the run that has been ready for longest; 0 when none is ready."
        yield "sftd_queue_oldest_wait_seconds", meaning, [({}, found.oldest_wait_micros / _MICROS)]
        yield "sftd_runs", "Runs by status.", _by("status", found.runs)
        kinds = {"gpu": (self._inventory.gpus, "cuda"), "cpu": (self._inventory.cpus, "cpu")}
        kinds |= {f"{name} job": (places, name) for name, places in self._inventory.places.items() if places}
        total = {kind: len(all_of) for kind, (all_of, _) in kinds.items()}
        free = {kind: len(self._inventory.free(device)) for kind, (_, device) in kinds.items()}
        yield "sftd_devices", "Devices of this daemon.", _by("kind", total)
        used = {kind: total[kind] - free[kind] for kind in kinds}
        yield "sftd_devices_used", "Devices that attempts of this daemon hold.", _by("kind", used)
        yield "sftd_attempts_driven", "Attempts that this daemon drives.", [({}, len(driven))]
        backlogs = [one.backlog() for one in driven.values()]
        oldest = min((first for _, first in backlogs if first is not None), default=now)
        meaning = "Events in the journals of driven attempts that are not in the log yet."
        yield "sftd_ingest_lag_events", meaning, [({}, sum(lines for lines, _ in backlogs))]
        meaning = "Age of the oldest of them; 0 when there is none."
        yield "sftd_ingest_lag_seconds", meaning, [({}, max(0, now - oldest) / _MICROS)]
        if found.mirrors:
            lags = {name: lag.events for name, lag in found.mirrors.items()}
            seconds = {name: lag.micros / _MICROS for name, lag in found.mirrors.items()}
            meaning = "Events in the log that the mirror does not have yet."
            yield "sftd_mirror_lag_events", meaning, _by("mirror", lags)
            meaning = "How long the oldest of them has been in the log; 0 when there is none."
            yield "sftd_mirror_lag_seconds", meaning, _by("mirror", seconds)
        yield "sftd_run_goodput_ratio", "Goodput of the driven runs so far.", self._goodput(driven, now)

    def _goodput(self, driven: Mapping[str, DrivenAttempt], now: Micros) -> list[Sample]:
        with self._store.read() as connection:
            shares = [(run_id, read_ledger(connection, run_id, now).goodput) for run_id in driven]
        return [({"run_id": run_id}, share) for run_id, share in shares if share is not None]


def _by(label: str, values: Mapping[str, float]) -> list[Sample]:
    return [({label: name}, value) for name, value in values.items()]


def _family(name: str, meaning: str, samples: list[Sample]) -> str:
    """One metric in Prometheus' text format. All metrics are gauges."""
    lines = [f"# HELP {name} {meaning}", f"# TYPE {name} gauge"]
    for labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        lines.append(f"{name}{{{inside}}} {value!r}" if inside else f"{name} {value!r}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _replace(path: Path, data: bytes, mode: int) -> None:
    """Replace the file atomically. No fsync: the next daemon writes it again after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with open(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise

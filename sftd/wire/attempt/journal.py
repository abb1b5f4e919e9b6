"""The journal: the file to which the trainer appends its events and from which the daemon ingests them.

One line is one event: `{"t": occurred_at µs, "type": …, "v": schema version, "p": payload}`. A line's number (from 1)
is its identity. An append is one `write`, so a killed process loses nothing. A thread fsyncs at most `FSYNC_SECONDS` later,
which protects against a power cut. A last line without a newline is torn and is not read.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec

from sftd.domain.errors import JournalCorrupt
from sftd.domain.log import codec
from sftd.domain.log.events import CheckpointPublished, Event, Micros
from sftd.wire.attempt.directory import fsync_dir

FSYNC_SECONDS = 1.0
_BACKLOG_BYTES = 1 << 20
# Namespace of the ids of journal lines: a line that is ingested twice has the same id both times.
_NAMESPACE = uuid.UUID("5f7d0e0a-6a3c-5b0e-9d6e-2f3f8a1c9b57").bytes


def event_id(run_id: str, attempt: int, line: int | str) -> str:
    """The id of an attempt's event. `line` is the number of its journal line, or a name for an event without a line."""
    # uuid.uuid5 written out: this takes a third of the time, and a daemon needs an id for each step.
    name = hashlib.sha1(_NAMESPACE + f"{run_id}/{attempt}/{line}".encode(), usedforsecurity=False)
    raw = bytearray(name.digest()[:16])
    raw[6] = raw[6] & 0x0F | 0x50
    raw[8] = raw[8] & 0x3F | 0x80
    text = raw.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a journal."""

    number: int
    occurred_at: Micros
    event: Event


class _Raw(msgspec.Struct, frozen=True):
    t: Micros
    type: str
    v: int
    p: msgspec.Raw


_raw_decoder = msgspec.json.Decoder(_Raw)


def now_micros() -> Micros:
    """The time in whole microseconds since the Unix epoch, as the journal writes it."""
    return time.time_ns() // 1000


class JournalWriter:
    """Appends events. Only one process, the reporting rank, may use it."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        # Without a durable name, lines that are synced later are lost.
        fsync_dir(path.parent)
        self._dirty = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._sync_loop, name="journal-fsync", daemon=True)
        self._thread.start()

    def append(self, event: Event, occurred_at: Micros | None = None) -> None:
        """Append one event. When it returns, the event survives this process."""
        name, version, payload = codec.encode(event)
        t = now_micros() if occurred_at is None else occurred_at
        line = f'{{"t":{t},"type":"{name}","v":{version},"p":{payload}}}\n'.encode()
        if os.write(self._fd, line) != len(line):
            # A short write (disk full) leaves a torn line that would swallow the next one.
            raise OSError("short write to the journal: is the disk full?")
        self._dirty.set()

    def flush(self) -> None:
        """Sync every event so far: they survive a power cut."""
        self._dirty.clear()
        os.fsync(self._fd)

    def close(self) -> None:
        """Flush and close."""
        self._closed.set()
        self._dirty.set()
        self._thread.join()
        self.flush()
        os.close(self._fd)

    def _sync_loop(self) -> None:
        while self._dirty.wait() and not self._closed.is_set():
            self.flush()
            self._closed.wait(FSYNC_SECONDS)


def read(path: Path, offset: int = 0, first_number: int = 1, limit: int = 1000) -> tuple[list[Line], int]:
    """Read up to `limit` lines from byte `offset`; the first line has number `first_number`.

    Returns the lines and the offset after them. A missing file is an empty journal. Raises `JournalCorrupt` for
    a complete line that is not an event, `UnknownEvent` for an event of a newer sftd.
    """
    lines: list[Line] = []
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            for number, raw in enumerate(_complete_lines(file), first_number):
                lines.append(_parse(path, number, raw))
                offset += len(raw)
                if len(lines) == limit:
                    break
    except FileNotFoundError:
        pass
    return lines, offset


def check_paths(lines: list[Line], checkpoint_dir: str) -> None:
    """Raises `JournalCorrupt` for a checkpoint outside `checkpoint_dir`, because sftd reads and deletes the paths in the log."""
    for line in lines:
        event = line.event
        if isinstance(event, CheckpointPublished) and os.path.dirname(event.path) != checkpoint_dir:
            raise JournalCorrupt(
                f"line {line.number}: the checkpoint {event.path} is outside {checkpoint_dir}"
            )


def backlog(path: Path, offset: int) -> tuple[int, Micros | None]:
    """The number of complete lines in the MiB after byte `offset`, and the time of the first of them, None if unknown."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            rest = file.read(_BACKLOG_BYTES)
    except FileNotFoundError:
        return 0, None
    first, newline, _ = rest.partition(b"\n")
    if not newline:
        return 0, None
    try:
        return rest.count(b"\n"), _raw_decoder.decode(first).t
    except msgspec.MsgspecError:
        return rest.count(b"\n"), None


def _complete_lines(file: Iterator[bytes]) -> Iterator[bytes]:
    for raw in file:
        if not raw.endswith(b"\n"):
            return
        yield raw


def _parse(path: Path, number: int, raw: bytes) -> Line:
    try:
        fields = _raw_decoder.decode(raw)
        return Line(
            number=number, occurred_at=fields.t, event=codec.decode(fields.type, fields.v, bytes(fields.p))
        )
    except (ValueError, TypeError, KeyError) as error:  # msgspec's errors are ValueErrors
        raise JournalCorrupt(f"{path}:{number}: {error}") from error

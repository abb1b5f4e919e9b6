"""The journal: what is appended is read once, whole, and survives a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftd.domain.errors import JournalCorrupt, UnknownEvent
from sftd.domain.log.events import CheckpointStarted, SampleGenerated
from sftd.wire.attempt import journal
from sftd.wire.attempt.journal import JournalWriter


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def write(path: Path, *steps: int) -> None:
    writer = JournalWriter(path)
    for number in steps:
        writer.append(CheckpointStarted(step=number), occurred_at=number)
    writer.close()


def steps(lines: list[journal.Line]) -> list[int]:
    return [line.event.step for line in lines if isinstance(line.event, CheckpointStarted)]


def test_lines_are_numbered_from_one_and_read_in_order(path: Path) -> None:
    write(path, 5, 6, 7)
    lines, offset = journal.read(path)
    assert [(line.number, line.occurred_at) for line in lines] == [(1, 5), (2, 6), (3, 7)]
    assert steps(lines) == [5, 6, 7]
    assert offset == path.stat().st_size
    assert journal.read(path, offset, 4) == ([], offset)


def test_a_missing_file_is_an_empty_journal(path: Path) -> None:
    assert journal.read(path) == ([], 0)


def test_only_its_owner_may_read_it(path: Path) -> None:
    write(path, 1)
    assert path.stat().st_mode & 0o777 == 0o600


def test_reading_goes_on_where_it_stopped(path: Path) -> None:
    write(path, *range(10))
    seen: list[int] = []
    offset, number = 0, 1
    while True:
        lines, offset = journal.read(path, offset, number, limit=3)
        if not lines:
            break
        assert lines[0].number == number
        number += len(lines)
        seen += steps(lines)
    assert seen == list(range(10))


def test_a_torn_last_line_is_not_read_until_it_is_whole(path: Path) -> None:
    write(path, 1, 2)
    whole = path.read_bytes()
    for cut in range(len(whole) // 2 + 1, len(whole)):
        path.write_bytes(whole[:cut])
        lines, offset = journal.read(path)
        assert steps(lines) == [1]
        path.write_bytes(whole)
        assert steps(journal.read(path, offset, 2)[0]) == [2]


def test_appending_goes_on_behind_what_is_there(path: Path) -> None:
    write(path, 1)
    write(path, 2)
    assert steps(journal.read(path)[0]) == [1, 2]


@pytest.mark.parametrize(
    "bad",
    [
        b"\n",
        b"nonsense\n",
        b"\x00\x00\x00\n",
        b'{"t":1,"type":"CheckpointStarted","v":1}\n',
        b'{"t":1,"type":"CheckpointStarted","v":1,"p":{"step":"x"}}\n',
        b'{"t":1,"type":"CheckpointStarted","v":1,"p":[]}\n',
        b'{"t":1,"type":"CheckpointStarted","v":1,"p":{"step":1}}{"t":2}\n',
    ],
)
def test_a_whole_line_that_is_no_event_is_named_with_its_number(path: Path, bad: bytes) -> None:
    write(path, 1)
    with path.open("ab") as file:
        file.write(bad)
    with pytest.raises(JournalCorrupt, match=r"journal:2: "):
        journal.read(path)
    _, offset = journal.read(path, limit=1)
    with pytest.raises(JournalCorrupt, match=r"journal:2: "):
        journal.read(path, offset, 2)


def test_an_event_of_a_newer_sftd_is_told_apart_from_corruption(path: Path) -> None:
    path.write_bytes(b'{"t":1,"type":"RunTeleported","v":1,"p":{}}\n')
    with pytest.raises(UnknownEvent):
        journal.read(path)


def test_a_short_write_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk takes a part of a line and says so only by the number of bytes."""
    writer = JournalWriter(path)
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: len(data) // 2]))
    with pytest.raises(OSError, match="disk full"):
        writer.append(CheckpointStarted(step=1))
    monkeypatch.undo()
    writer.close()
    assert journal.read(path) == ([], 0)


def test_a_reader_beside_the_writer_sees_each_line_once_and_whole(path: Path) -> None:
    count = 2000
    done = threading.Event()

    def produce() -> None:
        writer = JournalWriter(path)
        for number in range(count):
            writer.append(
                SampleGenerated(step=number, prompt="p" * (number % 997), text="ä", tokens=1, stopped=True)
            )
        writer.close()
        done.set()

    thread = threading.Thread(target=produce)
    thread.start()
    seen: list[int] = []
    offset = 0
    finished = False
    while not finished:
        finished = done.is_set()
        lines, offset = journal.read(path, offset, len(seen) + 1)
        while lines:
            assert [line.number for line in lines] == list(range(len(seen) + 1, len(seen) + 1 + len(lines)))
            seen += [line.event.step for line in lines if isinstance(line.event, SampleGenerated)]
            lines, offset = journal.read(path, offset, len(seen) + 1)
    thread.join()
    assert seen == list(range(count))


WRITE_UNTIL_KILLED = """
import itertools, sys
from pathlib import Path
from sftd.domain.log.events import CheckpointStarted
from sftd.wire.attempt.journal import JournalWriter
writer = JournalWriter(Path(sys.argv[1]))
for number in itertools.count():
    writer.append(CheckpointStarted(step=number))
    print(number, flush=True)
"""


def test_kill_9_loses_nothing_that_was_appended(path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITE_UNTIL_KILLED, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(200)]
        process.send_signal(signal.SIGKILL)
        told += [int(line) for line in process.stdout if line.endswith("\n")]
    assert process.returncode == -signal.SIGKILL
    seen: list[int] = []
    offset = 0
    while lines := (page := journal.read(path, offset, len(seen) + 1))[0]:
        seen += steps(lines)
        offset = page[1]
    assert seen == list(range(len(seen)))
    assert set(told) <= set(seen)


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_any_text_stays_on_one_line(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("any") / "journal"
    event = SampleGenerated(step=1, prompt=text, text=text, tokens=1, stopped=False)
    writer = JournalWriter(path)
    writer.append(event)
    writer.close()
    ((line,), _) = journal.read(path)
    assert line.event == event


def test_closing_ends_its_thread(path: Path) -> None:
    write(path, 1)
    assert not [t for t in threading.enumerate() if t.name == "journal-fsync"]


def test_an_event_id_is_the_uuid5_of_its_run_attempt_and_line() -> None:
    """Logs and folders of direct runs hold such ids: they may never change."""
    namespace = uuid.UUID("5f7d0e0a-6a3c-5b0e-9d6e-2f3f8a1c9b57")
    for run_id, attempt, line in (
        ("brave-otter-3f2a", 1, 1),
        ("brave-otter-3f2a", 12, 10**9),
        ("ä", 2, "launched"),
    ):
        assert journal.event_id(run_id, attempt, line) == str(
            uuid.uuid5(namespace, f"{run_id}/{attempt}/{line}")
        )

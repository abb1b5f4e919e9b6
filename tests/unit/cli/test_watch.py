"""`sftd watch` says when its screen is out of date."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from sftd.cli.watch import command as watch
from sftd.store.database.engine import DatabaseUnreachable
from tests.builders.patience import PATIENCE


class Looked:
    """An observer that hangs, fails or answers on demand."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.asked = threading.Semaphore(0)
        self.answers: list[Any] = []

    def look(self) -> Any:
        self.asked.release()
        self.go.acquire()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_database_that_hangs_or_fails_is_said_to_and_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_SECONDS", 0.0)
    monkeypatch.setattr(watch, "_REST", 0.0)
    observer = Looked()
    looking = watch._ObserverThread(observer)  # type: ignore[arg-type]
    looking.start()
    observer.asked.acquire()
    assert looking.complaint() == "", "it has only just begun"
    monkeypatch.setattr(watch, "_STALE_SECONDS", -1.0)
    assert looking.complaint().endswith("the database does not answer")
    monkeypatch.setattr(watch, "_STALE_SECONDS", 1000.0)

    observer.answers += [DatabaseUnreachable("it is gone\nsecond line"), "board"]
    observer.go.release()
    # The next look has begun: the one before is shown.
    observer.asked.acquire()
    assert looking.complaint().startswith("cannot observe since ")
    assert looking.complaint().endswith(": it is gone")
    assert looking.board is None
    observer.go.release()
    observer.asked.acquire()
    assert (looking.board, looking.complaint()) == ("board", "")
    # What nobody thought of, such as an event of a later sftd, does not freeze the board in silence.
    observer.answers += [KeyError("NewEvent"), "board"]
    observer.go.release()
    assert observer.asked.acquire(timeout=PATIENCE), "it looks no more"
    assert looking.complaint().endswith(": KeyError: 'NewEvent'")
    observer.go.release()
    observer.asked.acquire()
    assert looking.complaint() == ""
    observer.answers.append("another")
    looking._end.set()
    observer.go.release()
    looking.stop()
    assert not looking.is_alive()

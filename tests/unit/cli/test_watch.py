"""The screen says when the board is not the present state."""

from __future__ import annotations

import io
import threading
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from sftd.cli.terminal.screen import Screen
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
    looking = watch._Looking(observer)  # type: ignore[arg-type]
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


def test_only_lines_that_changed_are_sent() -> None:
    sent = io.StringIO()
    console = Console(
        file=sent, force_terminal=True, color_system="truecolor", width=20, height=4, _environ={}
    )
    screen = Screen(console)
    screen.show([Text("one"), Text("x" * 20), Text("three")], (20, 4))
    assert sent.getvalue() == f"\x1b[1;1Hone\x1b[0K\x1b[2;1H{'x' * 20}\x1b[3;1Hthree\x1b[0K\x1b[4;1H\x1b[0K"
    sent.seek(0)
    sent.truncate()
    screen.show([Text("one", "red"), Text("x" * 20)], (20, 4))
    assert sent.getvalue() == "\x1b[1;1H\x1b[31mone\x1b[0m\x1b[0K\x1b[3;1H\x1b[0K"
    sent.seek(0)
    sent.truncate()
    screen.show([Text("one", "red"), Text("x" * 20)], (20, 4))
    assert sent.getvalue() == ""
    screen.show([Text("one", "red"), Text("x" * 20)], (20, 3))
    assert "one" in sent.getvalue(), "what another size of a window did to it is not known"

"""One daemon per home, and those who ask whether there is one."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from sftd.daemon.lock import AlreadyRunning, DaemonLock, holder


def test_nobody_holds_a_lock_that_is_not_there(tmp_path: Path) -> None:
    assert holder(tmp_path / "daemon.lock") is None


def test_the_holder_is_named_while_it_lives(tmp_path: Path) -> None:
    path = tmp_path / "daemon.lock"
    with DaemonLock(path):
        assert holder(path) == os.getpid()
        with pytest.raises(AlreadyRunning, match=str(os.getpid())), DaemonLock(path):
            pass
    assert holder(path) is None


def test_a_pid_left_by_a_killed_daemon_names_nobody(tmp_path: Path) -> None:
    path = tmp_path / "daemon.lock"
    path.write_text("1")
    assert holder(path) is None


def test_two_who_ask_at_once_are_not_a_daemon(tmp_path: Path) -> None:
    """`sftd daemon --stop` signals whom this names: another asker must never be mistaken for a daemon."""
    path = tmp_path / "daemon.lock"
    path.touch()
    fd = os.open(path, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_SH)
    try:
        assert holder(path) is None
    finally:
        os.close(fd)

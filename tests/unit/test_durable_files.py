"""Small files that must survive a power cut: each is synced before its rename, and its folder after it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sftd.domain import events as e
from sftd.domain.spec import Spec
from sftd.wire import journal
from sftd.wire.attempt_dir import AttemptDir, Order, ProcessFile, write_atomic
from sftd.wire.checkpoint_dir import remove
from sftd.wire.direct_run import DirectRun, Submission
from sftd.wire.journal import JournalWriter
from tests.durability import Trace, observed
from tests.patience import PATIENCE

STEP = e.CheckpointStarted(step=1)


def order(folder: Path) -> Order:
    return Order(run_id="run", attempt=1, token="t", spec=Spec(), checkpoint_dir=str(folder), planned_steps=1)


def submission() -> Submission:
    asked = e.RunSubmitted(
        spec={}, spec_digest="s", planned_steps=1, user="ada", data={}, model={}, sftd_version="0"
    )
    return Submission.of("run", 1, asked)


FILES: dict[str, Callable[[AttemptDir], Path]] = {
    "order": lambda a: a.create(order(a.path)) or a.order_file,  # type: ignore[func-returns-value]
    "lease of a new attempt": lambda a: a.create(order(a.path)) or a.lease_file,  # type: ignore[func-returns-value]
    "lease taken over": lambda a: a.write_lease("x") or a.lease_file,  # type: ignore[func-returns-value]
    "process": lambda a: (
        a.write_process(ProcessFile(pid=1, create_time=1.0, host="h")) or a.process_file  # type: ignore[func-returns-value]
    ),
    "exit code": lambda a: a.write_exit_code(0) or a.exit_file,  # type: ignore[func-returns-value]
    "a rank's error": lambda a: (
        a.write_rank_error(0, "{}") or a.ranks_dir / "direct/attempt_0/0/error.json"  # type: ignore[func-returns-value]
    ),
    "submission of a direct run": lambda a: (
        DirectRun(a.path).write_submission(submission()) or DirectRun(a.path).submission_file  # type: ignore[func-returns-value]
    ),
}


@pytest.mark.parametrize("write", FILES.values(), ids=FILES)
def test_a_file_of_an_attempt_is_durable(tmp_path: Path, write: Callable[[AttemptDir], Path]) -> None:
    attempt = AttemptDir(tmp_path / "attempt")
    attempt.path.mkdir()
    with observed(tmp_path / "trace") as trace:
        path = write(attempt)
    assert path.stat().st_size
    assert trace.lacks(path) == []


def test_the_observer_sees_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that cannot fail would be none."""
    path = tmp_path / "file"
    write_atomic(path, b"x")
    with observed(tmp_path / "trace") as trace:
        monkeypatch.setattr("sftd.wire.attempt_dir.fsync_dir", lambda folder: None)
        write_atomic(path, b"y")
        assert trace.lacks(path) == [f"{tmp_path.name} was not synced after the rename"]
        assert trace.lacks(tmp_path / "other") == ["other was not put in place by a rename"]
        folder = tmp_path / "new"
        folder.mkdir()
        (folder / "a").write_text("a")
        folder.rename(tmp_path / "published")
        assert trace.lacks(tmp_path / "published") == [
            ". was not synced after its last name",
            "a was not synced after its last write",
            f"{tmp_path.name} was not synced after the rename",
        ]


def synced_bytes(trace: Trace, path: Path) -> int:
    return max((size for _, size, _ in trace.syncs(path)), default=0)


def test_the_journal_is_synced_soon_after_each_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the background: a power cut takes a second's steps at most."""
    path = tmp_path / "journal"
    done = threading.Condition()
    monkeypatch.setattr(journal, "FSYNC_SECONDS", 0.01)
    with observed(tmp_path / "trace") as trace:
        fsync = os.fsync

        def told(fd: int) -> None:
            fsync(fd)
            with done:
                done.notify_all()

        monkeypatch.setattr(os, "fsync", told)
        writer = JournalWriter(path)
        for _ in range(3):
            writer.append(STEP)
            size = path.stat().st_size
            with done:
                assert done.wait_for(lambda size=size: synced_bytes(trace, path) >= size, PATIENCE)  # type: ignore[misc]
        writer.close()
        monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("end", ["flush", "close"])
def test_the_journal_is_synced_when_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    path = tmp_path / "journal"
    # The background does nothing meanwhile.
    monkeypatch.setattr(JournalWriter, "_sync_loop", lambda self: None)
    with observed(tmp_path / "trace") as trace:
        writer = JournalWriter(path)
        writer.append(STEP)
        assert synced_bytes(trace, path) == 0
        getattr(writer, end)()
        assert synced_bytes(trace, path) == path.stat().st_size
        if end == "flush":
            writer.close()


def test_a_deletion_is_durable_before_its_files_go(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "data").write_text("x")
    with observed(tmp_path / "trace") as trace:
        remove(folder)
    assert not folder.exists()
    renames = [s for s in trace.seen() if s["what"] == "rename"]
    assert [s["source"] for s in renames] == [str(folder)]
    assert any(s["what"] == "sync" and s["path"] == str(tmp_path) for s in trace.seen())

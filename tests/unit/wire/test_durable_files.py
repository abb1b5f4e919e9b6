"""Small files that must survive a power cut: each is synced before its rename, and its folder after it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sftd.domain.log import events as e
from sftd.domain.spec.spec import Spec
from sftd.store.database import backups
from sftd.trainer.checkpoint.folder_swap import publish_folder
from sftd.trainer.tools.prepare.row_file import RowFile
from sftd.trainer.tools.prepare.tokenize_pieces import Row
from sftd.wire.attempt import journal
from sftd.wire.attempt.direct_run import DirectRun, DirectSubmission
from sftd.wire.attempt.directory import AttemptDir, Order, ProcessFile, make_durable, model_copy, write_atomic
from sftd.wire.attempt.journal import JournalWriter
from sftd.wire.checkpoint import manifest as manifests
from sftd.wire.checkpoint.directory import remove
from sftd.wire.checkpoint.manifest import Manifest
from sftd.wire.checkpoint.reduction import reduce
from sftd.wire.model import digest as model_digest
from tests.builders.durability import Trace, observed

A_MINUTE = 60.0
STEP = e.CheckpointStarted(step=1)


def order(folder: Path) -> Order:
    return Order(run_id="run", attempt=1, token="t", spec=Spec(), checkpoint_dir=str(folder), planned_steps=1)


def submission() -> DirectSubmission:
    asked = e.RunSubmitted(
        spec={}, spec_digest="s", planned_steps=1, user="ada", data={}, model={}, sftd_version="0"
    )
    return DirectSubmission.of("run", 1, asked)


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
        monkeypatch.setattr("sftd.wire.attempt.directory.fsync_dir", lambda folder: None)
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
                assert done.wait_for(lambda size=size: synced_bytes(trace, path) >= size, A_MINUTE)  # type: ignore[misc]
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
    renamed, synced = trace.seen()
    assert (renamed["what"], renamed["source"]) == ("rename", str(folder))
    assert (synced["what"], synced["path"]) == ("sync", str(tmp_path))
    # A power cut before that leaves the checkpoint as it was.
    assert synced["holds"] == ["step-00000001.deleted", "trace"]


@pytest.mark.parametrize("write", FILES.values(), ids=FILES)
def test_the_folders_of_an_attempt_keep_their_names(
    tmp_path: Path, write: Callable[[AttemptDir], Path]
) -> None:
    """What is synced in a folder is lost with the folder's name."""
    attempt = AttemptDir(tmp_path / "runs" / "run" / "attempt")
    with observed(tmp_path / "trace") as trace:
        attempt.create(order(attempt.path))
        write(attempt)
    assert trace.unnamed(tmp_path) == []


def test_a_journal_keeps_its_name(tmp_path: Path) -> None:
    with observed(tmp_path / "trace") as trace:
        JournalWriter(tmp_path / "journal").close()
    assert any("journal" in s["holds"] for s in trace.seen() if s["path"] == str(tmp_path))


def test_folders_whose_names_may_be_lost_are_seen(tmp_path: Path) -> None:
    with observed(tmp_path / "trace") as trace:
        (tmp_path / "a" / "b").mkdir(parents=True)
        make_durable(tmp_path / "a" / "c")
        assert trace.unnamed(tmp_path) == [tmp_path / "a"]


def database(path: Path, text: str) -> Path:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t AS SELECT ? AS text", (text,))
        connection.commit()
    return path


def test_a_backup_and_what_it_restores_are_durable(tmp_path: Path) -> None:
    source, backup = database(tmp_path / "source.db", "new"), tmp_path / "backups" / "backup.db"
    target = database(tmp_path / "target.db", "old")
    backup.parent.mkdir()
    with observed(tmp_path / "trace") as trace:
        backups.write(source, backup)
        assert trace.lacks(backup) == []
        with backups.staged(backup, target) as new:
            kept = backups.put(new, target)
        assert trace.lacks(target) == []
    assert kept is not None
    with contextlib.closing(sqlite3.connect(kept)) as connection:
        assert connection.execute("SELECT text FROM t").fetchall() == [("old",)]


def test_the_weights_of_a_checkpoint_are_durable_before_the_rest_goes(tmp_path: Path) -> None:
    """Its data files are links to what was synced when the checkpoint was published."""
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    for name in ("__0_0.distcp", "__0_state_0.distcp"):
        (folder / name).write_text(name)
    whole = Manifest(
        schema_version=manifests.WHOLE,
        run_id="run",
        spec_digest="s",
        step=1,
        tokens_total=1,
        samples=1,
        loss="0x1p0",
        grad_norm="0x1p0",
        layout={},
        dtype="float32",
        versions={},
        files=manifests.describe(folder, manifests.list_files(folder)),
        state_files=["__0_state_0.distcp"],
    )
    data = manifests.encode(whole)
    (folder / manifests.NAME).write_bytes(data)
    with observed(tmp_path / "trace") as trace:
        made = reduce(folder, manifests.digest(data))
    assert made is not None
    assert trace.lacks(Path(made.path)) == ["__0_0.distcp was not synced after its last write"]


def test_a_copy_of_a_model_folder_is_durable(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    save_file({"w": np.zeros(1, np.float32)}, folder / "model.safetensors")
    record = model_digest.describe(str(folder))
    with observed(tmp_path / "trace") as trace:
        model_digest.keep(record, str(folder), copy := model_copy(tmp_path / "home", record))
    assert sorted(p.name for p in copy.rglob("*.j*")) == ["config.json", "tool_use.jinja"]
    assert trace.lacks(copy) == []
    assert trace.unnamed(tmp_path / "home" / "models") == []


def test_prepared_data_is_durable(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "data" / "train.parquet", b"{}")
    ids = np.arange(3, dtype=np.int32)
    file.append(Row(ids, ids, None, b"", b"", b"", "", 0, 0))
    file.close()
    with observed(tmp_path / "trace") as trace:
        file.publish()
    assert trace.lacks(file.path) == []


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_that_takes_anothers_place_is_durable_before_the_other_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, can_exchange: bool
) -> None:
    """`renameat2` of the C library is not observed, and is missing where folders cannot be exchanged."""
    new, published = tmp_path / "there" / "new", tmp_path / "there" / "published"
    new.parent.mkdir()
    for folder, text in ((new, "new"), (published, "old")):
        folder.mkdir()
        (folder / "file").write_text(text)
    if not can_exchange:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    with observed(tmp_path / "trace") as trace:
        publish_folder(new, published)
    assert (published / "file").read_text() == "new"
    assert not new.exists()
    (synced,) = [s for s in trace.seen() if s["what"] == "sync"]
    # The other is there until then: a power cut before that leaves it.
    other = "new" if can_exchange else "published.replaced"
    assert (synced["path"], synced["holds"]) == (str(new.parent), sorted([other, "published"]))

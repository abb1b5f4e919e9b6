"""Deleting a checkpoint: never one that is being read, never half, and taken up again after a crash."""

from __future__ import annotations

import fcntl
import shutil
import threading
from pathlib import Path

import pytest

from sftd.wire.checkpoint_dir import MANIFEST, delete_folder, once_unread, reading, sweep


def checkpoint(directory: Path, step: int) -> Path:
    """A folder that looks like a published checkpoint."""
    folder = directory / f"step-{step:08d}"
    folder.mkdir()
    for name in (MANIFEST, "__0_0.distcp"):
        (folder / name).write_text("x")
    return folder


def test_what_is_read_stays_until_the_last_reader_is_through(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3)
    with reading(folder):
        with reading(folder):
            assert not delete_folder(folder)
        assert not delete_folder(folder)
        assert sorted(f.name for f in folder.iterdir()) == ["__0_0.distcp", MANIFEST]
    assert delete_folder(folder)
    assert not list(tmp_path.iterdir())


def test_deleting_what_is_not_there_is_done(tmp_path: Path) -> None:
    assert delete_folder(tmp_path / "step-00000003")
    with reading(tmp_path / "step-00000003"):
        pass


def test_a_folder_without_manifest_can_be_deleted(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3)
    (folder / MANIFEST).unlink()
    assert delete_folder(folder)
    assert not folder.exists()


def test_an_interrupted_deletion_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted, again, kept = (checkpoint(tmp_path, step) for step in (3, 6, 9))
    with monkeypatch.context() as crash:
        crash.setattr(shutil, "rmtree", lambda *_, **__: None)
        assert delete_folder(interrupted)
        assert delete_folder(again)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "step-00000003.deleted",
        "step-00000006.deleted",
        "step-00000009",
    ]
    # The same step was trained and published once more before anybody swept.
    again = checkpoint(tmp_path, 6)
    assert delete_folder(again)
    sweep(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["step-00000009"]
    with reading(kept):
        sweep(tmp_path, [kept])
        assert kept.exists()
    sweep(tmp_path, [kept])
    assert not list(tmp_path.iterdir())


def test_a_replaced_checkpoint_waits_for_its_readers_and_they_find_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, new = checkpoint(tmp_path, 3), checkpoint(tmp_path, 6)
    with (
        reading(folder),
        pytest.raises(OSError, match="somebody has been reading it"),
        once_unread(folder, 0.0),
    ):
        pytest.fail("it is being read")
    waiting, through = threading.Event(), threading.Event()
    flock = fcntl.flock

    def asked(fd: int, operation: int) -> None:
        # It has opened the old one.
        if operation == fcntl.LOCK_SH:
            waiting.set()
        flock(fd, operation)

    def read() -> None:
        with reading(folder):
            found.append((folder / MANIFEST).read_text())
            held.append(not delete_folder(folder))
        through.set()

    found: list[str] = []
    held: list[bool] = []
    (new / MANIFEST).write_text("new")
    with once_unread(folder, 0.0):
        monkeypatch.setattr(fcntl, "flock", asked)
        reader = threading.Thread(target=read)
        reader.start()
        waiting.wait()
        folder.rename(tmp_path / "old")
        new.rename(folder)
    assert through.wait(30)
    reader.join()
    # It asked for the old one, and has the lock of the one that took its place.
    assert (found, held) == (["new"], [True])


def test_a_replacement_waits_until_the_reader_is_through(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3)
    held, go = threading.Event(), threading.Event()

    def read() -> None:
        with reading(folder):
            held.set()
            go.wait()

    reader = threading.Thread(target=read)
    reader.start()
    held.wait()
    threading.Timer(0.1, go.set).start()
    with once_unread(folder, 30.0):
        assert go.is_set()
    reader.join()


def test_an_interrupted_replacement_is_finished_or_undone(tmp_path: Path) -> None:
    whole, lost = checkpoint(tmp_path, 3), checkpoint(tmp_path, 6)
    lost.rename(tmp_path / "step-00000006.replaced")
    checkpoint(tmp_path, 9).rename(tmp_path / "step-00000003.replaced")
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [whole.name, lost.name]

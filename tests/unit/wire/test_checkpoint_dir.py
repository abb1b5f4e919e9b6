"""Deleting a checkpoint: never one that is being read, never half, and continued after a crash."""

from __future__ import annotations

import fcntl
import shutil
import threading
from pathlib import Path

import pytest

from sftd.wire.checkpoint.directory import (
    MANIFEST,
    Saved,
    delete_folder,
    is_checkpoint_of,
    manifest_bytes,
    once_unread,
    reading,
    saved,
    sweep,
)


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
        pytest.raises(OSError, match="another process has been reading it"),
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


def test_how_a_checkpoint_was_saved_is_in_its_manifest(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3)
    assert saved(folder) == Saved()
    (folder / MANIFEST).write_text('{"layout": {"tp": 2, "dp": 4}, "dtype": "bfloat16", "run_id": "r"}')
    assert saved(folder) == Saved({"tp": 2, "dp": 4}, "bfloat16")
    assert is_checkpoint_of(str(folder), "r")
    assert not is_checkpoint_of(str(folder), "q")
    assert saved(tmp_path / "nowhere") == Saved()


def test_a_manifest_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3)
    with open(folder / MANIFEST, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="too large") as refused:
        manifest_bytes(folder)
    assert refused.value.filename == str(folder / MANIFEST)
    assert saved(folder) == Saved()


def test_who_waits_for_a_reader_too_long_is_told_of_which_folder(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3)
    with reading(folder), pytest.raises(OSError, match="for 0 s") as refused, once_unread(folder, 0.0):
        pass
    assert refused.value.filename == str(folder)
    with once_unread(folder, 0.0):
        assert not delete_folder(folder)


def test_a_sweep_finishes_what_was_left_and_nothing_else(tmp_path: Path) -> None:
    left = ("step-00000001.weights.partial", "step-00000002.deleted", "step-00000003.replaced")
    kept = ("step-00000003", "step-00000004", "other.deleted", "step-00000005.weights")
    for name in (*left, *kept, "step-00000006.replaced"):
        (tmp_path / name).mkdir()
    sweep(tmp_path, [tmp_path / "step-00000004", tmp_path / "step-00000009"])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["other.deleted", "step-00000003", "step-00000005.weights", "step-00000006"]
    )

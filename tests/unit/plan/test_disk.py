"""The checks of the disk that checkpoints go to."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sftd.wire.checkpoint import disk


def test_a_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("kept", "kept/a/b", "link/c"):
        disk.probe(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "kept", tmp_path / "link"]


def test_a_probe_makes_no_folder_that_another_process_would_find_and_lose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, unlink = tmp_path / "missing", os.unlink

    def seen(name: str) -> None:
        assert not folder.exists()
        unlink(name)

    monkeypatch.setattr(os, "unlink", seen)
    disk.probe(folder)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("/proc/nope", errno.ENOENT),
        ("file/below", errno.ENOTDIR),
        ("dangling/below", errno.ENOENT),
        ("a" * 300, errno.ENAMETOOLONG),
    ],
)
def test_a_probe_fails_as_a_save_would(tmp_path: Path, name: str, code: int) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError) as found:
        disk.probe(tmp_path / name)
    assert found.value.errno == code
    assert sorted(tmp_path.iterdir()) == [tmp_path / "dangling", tmp_path / "file"]


def test_several_missing_folders_on_the_root_file_system_look_like_a_missing_mount(tmp_path: Path) -> None:
    assert disk.looks_unmounted(Path("/nowhere/at/all")) == Path("/")
    assert disk.looks_unmounted(Path("/nowhere")) is None
    assert disk.looks_unmounted(Path("/proc/nowhere/at/all")) is None

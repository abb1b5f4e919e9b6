"""The small files of an attempt."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from sftd.wire.attempt_dir import write_atomic


def test_a_full_disk_never_leaves_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "order.json"
    write_atomic(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A write past the limit takes what fits and then fails, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_atomic(path, bytes(3000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]

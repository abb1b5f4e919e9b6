"""The small files of an attempt."""

from __future__ import annotations

import os
import resource
import stat
from pathlib import Path

import pytest

from sftd.domain.spec.spec import Spec
from sftd.wire.attempt.directory import AttemptDir, Order, make_private, write_atomic


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


ORDER = Order(run_id="r", attempt=1, token="t", spec=Spec(), planned_steps=1, checkpoint_dir="c")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_nobody_else_can_look_into_an_attempt_whatever_the_umask(tmp_path: Path) -> None:
    """Its journal and its output have prompts and answers, its order the lease's token."""
    before = os.umask(0)
    try:
        directory = AttemptDir(tmp_path / "runs/r/attempt-0001")
        directory.create(ORDER, {"HF_TOKEN": "hf_ABCDEFtoken123"})
        make_private(tmp_path / "a/b/c")
    finally:
        os.umask(before)
    folders = ["runs", "runs/r", "runs/r/attempt-0001", "runs/r/attempt-0001/ranks", "a", "a/b", "a/b/c"]
    assert {name: mode(tmp_path / name) for name in folders} == dict.fromkeys(folders, 0o700)
    files = [path for path in directory.path.iterdir() if path.is_file()]
    assert {path.name: mode(path) for path in files} == dict.fromkeys(
        ("order.json", "lease", "secrets.json"), 0o600
    )


def test_the_files_of_an_attempt_are_a_contract_with_attempts_that_live(tmp_path: Path) -> None:
    """A daemon of a newer sftd adopts an attempt that an older one started."""
    directory = AttemptDir(tmp_path)
    found = {
        name: str(path.relative_to(tmp_path)) for name, path in vars(directory).items() if path != tmp_path
    }
    assert found == {
        "order_file": "order.json",
        "journal": "journal",
        "lease_file": "lease",
        "secrets_file": "secrets.json",
        "process_file": "process.json",
        "exit_file": "exit",
        "stop_file": "stop",
        "output_log": "output.log",
        "ranks_dir": "ranks",
        "stacks_dir": "stacks",
        "rows_dir": "rows",
        "rendezvous_file": "rendezvous",
        "port_file": "port",
        "alive_file": "alive",
        "script_file": "job.sh",
        "started_dir": "started",
        "started_job_file": "started/job",
        "told_file": "told",
        "fence_file": "fence",
        "stacks_wanted_file": "stacks/wanted",
    }


def test_a_folder_of_another_history_gets_the_first_free_name(tmp_path: Path) -> None:
    for expected in ("attempt-0001.1", "attempt-0001.2"):
        directory = AttemptDir(tmp_path / "attempt-0001")
        directory.create(ORDER, {})
        directory.set_aside()
        assert not directory.path.exists()
        assert AttemptDir(tmp_path / expected).order() == ORDER
    AttemptDir(tmp_path / "attempt-0002").set_aside()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["attempt-0001.1", "attempt-0001.2"]


def test_a_lease_is_who_holds_it_last(tmp_path: Path) -> None:
    directory = AttemptDir(tmp_path)
    assert directory.lease() is None
    assert directory.process() is None
    directory.create(ORDER, {})
    assert directory.lease() == "t"
    directory.write_lease("another")
    assert (directory.lease(), directory.order().token) == ("another", "t")

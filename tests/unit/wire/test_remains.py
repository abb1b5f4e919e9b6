"""What is read of an ended attempt's folder, and what of it proves the cause."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sftd.domain.run.failures import Failure, RankError, Remains, classify, is_disk_full
from sftd.wire.attempt.directory import AttemptDir, make_private
from sftd.wire.attempt.remains import find_remains, find_stack
from sftd.wire.attempt.secrets import Secrets


def leave(directory: AttemptDir, rank: int, text: str, *, at: int | None = None, stack: int = 0) -> None:
    extra: dict[str, Any] = {} if at is None else {"timestamp": str(at)}
    extra["py_callstack"] = "\n".join(f"line {n}" for n in range(stack))
    folder = directory.ranks_dir / "rendezvous" / "attempt_0" / str(rank)
    make_private(folder)
    (folder / "error.json").write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def test_the_rank_that_failed_first_comes_first(tmp_path: Path) -> None:
    directory = AttemptDir(tmp_path)
    leave(directory, 0, "third", at=30)
    leave(directory, 1, "second", at=20)
    leave(directory, 10, "first", at=9, stack=7)
    leave(directory, 2, "second, too", at=20)
    found = find_remains(directory).rank_errors
    assert [(e.rank, e.exception) for e in found] == [
        (10, "first"),
        (1, "second"),
        (2, "second, too"),
        (0, "third"),
    ]
    assert found[0].traceback == [f"line {n}" for n in range(2, 7)]
    assert found[1].traceback == []


def test_an_error_file_may_hold_a_text_alone(tmp_path: Path) -> None:
    directory = AttemptDir(tmp_path)
    leave(directory, 0, "later", at=1)
    folder = directory.ranks_dir / "rendezvous" / "attempt_0" / "3"
    make_private(folder)
    (folder / "error.json").write_text(json.dumps({"message": "SIGKILL"}))
    assert find_remains(directory).rank_errors == [RankError(3, "SIGKILL"), RankError(0, "later")]


def test_the_end_of_each_output_is_read_the_ranks_before_torchruns(tmp_path: Path) -> None:
    directory = AttemptDir(tmp_path)
    directory.output_log.write_text("".join(f"torchrun {n}\n" for n in range(300)))
    folder = directory.ranks_dir / "rendezvous" / "attempt_0" / "0"
    make_private(folder)
    (folder / "stdout.log").write_text("a rank\n")
    tail = find_remains(directory).output_tail
    assert tail[-200:] == [f"torchrun {n}" for n in range(100, 300)]
    assert tail[:-200] == [
        line for _, path in directory.rank_outputs() for line in path.read_text().splitlines()
    ]
    # Of one endless line, the last 64 KiB.
    directory.output_log.write_text("x" * 100_000)
    assert find_remains(directory).output_tail[-1] == "x" * 65536


STACKS = """\
Thread 0x00007f01 (most recent call first):
  File "/usr/lib/threading.py", line 359 in wait

Current thread 0x00007f02 (most recent call first):
  File "/site-packages/torch/distributed/c10d.py", line 2810 in all_reduce
  File "/site-packages/sftd/trainer/loop/attempt.py", line 77 in step
"""


def test_a_stack_is_that_of_the_main_thread_innermost_first(tmp_path: Path) -> None:
    directory = AttemptDir(tmp_path)
    assert find_stack(directory, 0) is None
    directory.stack_file(0).parent.mkdir(parents=True, exist_ok=True)
    directory.stack_file(0).write_text(STACKS)
    assert find_stack(directory, 0) == "all_reduce (c10d.py:2810) < step (attempt.py:77)"
    frames = "".join(f'  File "/x/f{n}.py", line {n} in g{n}\n' for n in range(9))
    directory.stack_file(0).write_text("Current thread 0x1 (most recent call first):\n" + frames)
    assert find_stack(directory, 0) == " < ".join(f"g{n} (f{n}.py:{n})" for n in range(8))
    directory.stack_file(0).write_text("Fatal Python error: none of a thread\n")
    assert find_stack(directory, 0) is None


LINES = [f"line {n}" for n in range(7)]
TRACE = [f"frame {n}" for n in range(6)]


@pytest.mark.parametrize(
    ("remains", "expected"),
    [
        (
            Remains(None, output_tail=LINES),
            Failure("killed", "the attempt's processes are gone and left no exit code", LINES[-3:]),
        ),
        (
            Remains(None, output_tail=LINES, last_word="slurm: BOOT"),
            Failure("killed", "slurm: BOOT", LINES[-3:]),
        ),
        (
            Remains(137, output_tail=LINES),
            Failure("killed", "torchrun was killed by signal 9", LINES[-3:]),
        ),
        (
            Remains(-15, output_tail=LINES),
            Failure("killed", "torchrun was killed by signal 15", LINES[-3:]),
        ),
        (
            Remains(129, output_tail=LINES),
            Failure("killed", "torchrun was killed by signal 1", LINES[-3:]),
        ),
        (
            Remains(128, output_tail=LINES),
            Failure("crash", "torchrun ended with exit code 128", LINES[-5:]),
        ),
        (
            Remains(1, output_tail=[f"{name}Error: {name}" for name in "abcd"]),
            Failure("crash", "dError: d", ["bError: b", "cError: c", "dError: d"]),
        ),
        (
            Remains(1, [RankError(2, "ValueError: a", TRACE), RankError(0, "KeyError: b", ["other"])]),
            Failure(
                "crash",
                "rank 2: ValueError: a",
                ["rank 2: ValueError: a", "rank 0: KeyError: b", *TRACE[-4:]],
            ),
        ),
        # Its own exception explains the other's broken connection, whichever came first.
        (
            Remains(1, [RankError(0, "RuntimeError: gloo x"), RankError(1, "ValueError: a")]),
            Failure("crash", "rank 1: ValueError: a", ["rank 1: ValueError: a"]),
        ),
        (
            Remains(1, [RankError(0, "RuntimeError: gloo x")], ["[W1021 x] Warning: gloo y"]),
            Failure("communication", "rank 0: RuntimeError: gloo x", ["rank 0: RuntimeError: gloo x"]),
        ),
        # A signal with a name says more than a number, wherever it is.
        (
            Remains(1, output_tail=["exitcode  : -9 (pid: 1)", "Signal 9 (SIGKILL) received"]),
            Failure(
                "killed",
                "a rank was killed by SIGKILL",
                ["exitcode  : -9 (pid: 1)", "Signal 9 (SIGKILL) received"],
            ),
        ),
        (
            Remains(1, output_tail=["exitcode  : -11 (pid: 1)"]),
            Failure("killed", "a rank was killed by signal 11", ["exitcode  : -11 (pid: 1)"]),
        ),
        # The output of the launcher counts as well, and a lost node before a full disk.
        (
            Remains(None, last_word="slurm: OUT_OF_MEMORY", last_cause="out of memory"),
            Failure("out of memory", "slurm: OUT_OF_MEMORY", ["slurm: OUT_OF_MEMORY"]),
        ),
        (
            Remains(
                None, output_tail=["No space left on device"], last_word="slurm: NODE_FAIL", last_cause="lost"
            ),
            Failure("lost", "slurm: NODE_FAIL", ["slurm: NODE_FAIL"]),
        ),
    ],
)
def test_the_cause_with_its_message_and_evidence(remains: Remains, expected: Failure) -> None:
    assert classify(remains) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("OSError: [Errno 28] No space left on device", True),
        ("OSError: [Errno 122] Disk quota exceeded", True),
        ("OSError: [Errno 27] File too large", True),
        ("OSError: [Errno 5] Input/output error", False),
    ],
)
def test_a_full_disk_is_one_in_all_its_forms(text: str, expected: bool) -> None:
    assert is_disk_full(text) is expected
    assert (classify(Remains(1, output_tail=[text])).cause == "disk full") is expected


def test_a_value_of_eight_characters_is_a_secret_and_a_shorter_one_a_word() -> None:
    secrets = Secrets.of(
        {"A_TOKEN": "12345678", "B_TOKEN": "7654321", "C": "abcdefgh", "D_KEY": "12345678-9"}
    )
    assert secrets.hide("12345678 7654321 abcdefgh 12345678-9 1234567") == "*** 7654321 abcdefgh *** 1234567"
    assert secrets.hide("http://u:p@h/x and //u:@h") == "http://u:***@h/x and //u:@h"

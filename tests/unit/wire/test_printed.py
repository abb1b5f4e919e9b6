"""What attempts print is read once, whole and in order, also while it is being written."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftd.cli.look import logs
from sftd.domain.spec.spec import Spec
from sftd.launcher.command import torchrun_argv
from sftd.trainer.runtime.output_cap import _Printed
from sftd.wire.attempt.directory import AttemptDir
from sftd.wire.attempt.printed import Follower, Output
from sftd.wire.attempt.remains import find_remains


@given(pieces=st.lists(st.text(alphabet="ab\n", max_size=8), max_size=30))
def test_no_line_is_lost_or_doubled(pieces: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    follower = Follower(path)
    seen = list(follower.lines())
    with open(path, "w", newline="") as file:
        for piece in pieces:
            file.write(piece)
            file.flush()
            seen += follower.lines()
    seen += follower.lines(to_the_end=True)
    whole = "".join(pieces)
    assert seen == (whole.removesuffix("\n").split("\n") if whole else [])
    assert list(follower.lines(to_the_end=True)) == []


@given(
    lines=st.lists(st.text(alphabet="ab", max_size=40_000), max_size=8),
    count=st.integers(0, 10),
    ends=st.booleans(),
)
def test_the_last_lines_are_found_from_the_end(
    lines: list[str], count: int, ends: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    text = "\n".join(lines) + "\n" * (ends and bool(lines))
    path.write_text(text)
    every = text.removesuffix("\n").split("\n") if text else []
    assert list(Follower(path, count).lines(to_the_end=True)) == every[len(every) - min(count, len(every)) :]


def test_a_line_that_never_ends_is_given_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * 3_000_000)
    pieces = list(Follower(path).lines(to_the_end=True))
    assert (len(pieces) > 1, "".join(pieces)) == (True, "x" * 3_000_000)


def test_of_a_progress_bar_the_last_state_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"10%\r50%\r100%\r\nnext \xff\n")
    assert list(Follower(path).lines()) == ["100%", "next �"]


@pytest.mark.parametrize(
    ("written", "seen", "piped"),
    [
        ("\x1b[31mred\x1b[0m\tok ✓", "\x1b[31mred\x1b[0m\tok ✓\x1b[0m", "red\tok ✓"),
        # The colour of a line does not run into the next.
        ("\x1b[1;31mon", "\x1b[1;31mon\x1b[0m", "on"),
        # Wipe, name the window, fill the clipboard, move, another screen, C1 controls, bells.
        (
            "a\x1b[2J\x1b]0;pwn\x07b\x1b]52;c;aGk=\x1b\\c\x1b[5A\x1b[?1049h\x1b(0d\x9b2J\x00\x07\x08",
            "abcd2J",
            "abcd2J",
        ),
        ("cut \x1b", "cut ", "cut "),
    ],
)
def test_what_ranks_write_does_nothing_to_a_terminal(written: str, seen: str, piped: str) -> None:
    assert logs._harmless(written, colour=True) == seen
    assert logs._harmless(written, colour=False) == piped


def rank_file(directory: AttemptDir, rank: int, name: str) -> Path:
    folder = directory.ranks_dir / "run_x1" / "attempt_0" / str(rank)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def test_every_line_has_its_rank_and_torchrun_speaks_last(tmp_path: Path) -> None:
    directory = AttemptDir(tmp_path)
    rank_file(directory, 10, "stderr.log").write_text("ten\n")
    rank_file(directory, 2, "stdout.log").write_text("two\n")
    rank_file(directory, 2, "stderr.log").write_text("RuntimeError: two\n")
    directory.output_log.write_text("torchrun\n")
    output = Output(directory)
    assert list(output.lines()) == [(2, "two"), (2, "RuntimeError: two"), (10, "ten"), (None, "torchrun")]
    rank_file(directory, 0, "stdout.log").write_text("zero\n")
    assert list(output.lines()) == [(0, "zero")]
    assert list(Output(directory, frozenset({10})).lines()) == [(10, "ten")]
    # Why an attempt failed is looked for in all of it.
    tail = find_remains(directory).output_tail
    assert tail == ["zero", "two", "RuntimeError: two", "ten", "torchrun"]
    # A file that cannot be read does not keep a daemon from going on.
    rank_file(directory, 3, "stderr.log").mkdir()
    assert find_remains(directory).output_tail == tail


def test_with_a_tail_what_begins_later_is_whole(tmp_path: Path) -> None:
    directory = AttemptDir(tmp_path)
    directory.output_log.write_text("a\nb\nc\n")
    output = Output(directory, last=1)
    assert list(output.lines()) == [(None, "c")]
    rank_file(directory, 0, "stdout.log").write_text("1\n2\n")
    assert list(output.lines()) == [(0, "1"), (0, "2")]


def test_torchrun_writes_each_ranks_output_where_it_is_looked_for(tmp_path: Path) -> None:
    argv = torchrun_argv(Spec(), AttemptDir(tmp_path))
    assert {"--redirects=3", f"--log-dir={AttemptDir(tmp_path).ranks_dir}"} <= set(argv)


def test_of_a_rank_that_prints_without_end_the_beginning_and_the_end_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "stdout.log"
    # As torchrun opens it: without O_APPEND, so that cutting it would leave its writer where it was.
    with open(path, "wb", buffering=0) as file:
        printed = _Printed(file.fileno(), head=1 << 20, tail=2 << 20)
        before, behind, number = Follower(path), Follower(path), 0
        seen = list(before.lines())
        for _ in range(16):
            for _ in range(10):
                file.write(b"".join(b"line %012d\n" % n for n in range(number, number + 6000)))
                number += 6000
            printed.trim()
            seen += before.lines()
        size = os.fstat(file.fileno())
    every = [f"line {n:012}" for n in range(number)]
    assert size.st_size == 18 * number
    assert size.st_blocks * 512 < 7 << 20, "of 17 MB"
    assert seen == every, "whoever reads as it is printed has all of it"
    kept = list(behind.lines(to_the_end=True))
    gap = next(n for n, line in enumerate(kept) if line.startswith("["))
    # A line that is cut by either edge is there as far as it is kept.
    assert kept[: gap - 1] == every[: gap - 1]
    assert every[gap - 1].startswith(kept[gap - 1])
    assert 18 * gap > 1 << 20
    assert re.fullmatch(r"\[1\d MB of output omitted\]", kept[gap])
    tail = kept[gap + 2 :]
    assert tail == every[-len(tail) :]
    assert 18 * len(tail) > 2 << 20
    assert list(Follower(path, 3).lines(to_the_end=True)) == every[-3:]
    assert list(Follower(path, number).lines(to_the_end=True))[1:] == tail, "no more than is there"


def test_only_what_torchrun_opened_is_kept_small(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs.log", tmp_path / "ranks" / "0" / "stdout.log"
    ours.parent.mkdir(parents=True)
    for path, is_ours in ((theirs, False), (ours, True)):
        with open(path, "wb") as file:
            assert (_Printed.find(file.fileno(), tmp_path / "ranks") is not None) is is_ours
    reading, writing = os.pipe()
    assert _Printed.find(writing, tmp_path) is None
    os.close(reading)
    os.close(writing)

"""Tool processes: what they are given, what they report, how they fail."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from sftd.launcher.tools import ToolFailed, run_tool


def test_a_refusal_of_a_tool_is_its_message(tmp_path: Path) -> None:
    """The real tool, which reads its request before anything heavy."""
    with pytest.raises(ToolFailed, match="No such file") as failed:
        run_tool("answer", [str(tmp_path / "order.json"), str(tmp_path)], lambda line: None, b'["a"]')
    assert failed.value.exit_code == 2


def test_a_tool_that_dies_before_it_reads_its_request_says_why(tmp_path: Path) -> None:
    with pytest.raises(ToolFailed, match="unrecognized arguments"):
        run_tool("answer", ["a", "b", "--nonsense"], lambda line: None, b'["' + b"x" * 2_000_000 + b'"]')


def test_a_tool_ends_with_the_command_that_waits_for_it(tmp_path: Path) -> None:
    """As Ctrl-C does it, which reaches this process alone: nothing of the tool is left."""

    def interrupt(_line: object) -> None:
        raise KeyboardInterrupt

    chats = tmp_path / "chats"
    with pytest.raises(KeyboardInterrupt):
        run_tool("prepare", ["stdlib-chats", str(chats), "--rows", "5"], interrupt)
    assert psutil.Process().children() == []

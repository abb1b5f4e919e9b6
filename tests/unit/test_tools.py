"""Tool processes: what they are given, what they report, how they fail."""

from __future__ import annotations

from pathlib import Path

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

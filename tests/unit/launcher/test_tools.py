"""Tool processes: what they are given, what they report, how they fail."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import psutil
import pytest

from sftd.launcher.tools import ToolFailed, run_tool
from tests.builders.paths import ROOT

PACKAGE = ROOT / "sftd"


def test_a_refusal_of_a_tool_is_its_message(tmp_path: Path) -> None:
    """The real tool, which reads its request before anything heavy."""
    with pytest.raises(ToolFailed, match="No such file") as failed:
        run_tool("answer", [str(tmp_path / "order.json"), str(tmp_path)], lambda line: None, b'["a"]')
    assert failed.value.exit_code == 2


def test_a_tool_that_dies_before_it_reads_its_request_says_why(tmp_path: Path) -> None:
    with pytest.raises(ToolFailed, match="unrecognized arguments"):
        run_tool("answer", ["a", "b", "--nonsense"], lambda line: None, b'["' + b"x" * 2_000_000 + b'"]')


def test_a_tool_takes_no_module_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """People's folders hold scripts with the names of modules."""
    for name in ("token", "queue", "numbers", "select", "types", "tokenizers", "torch", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a script of the user was executed')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ToolFailed, match="No such file"):
        run_tool("answer", ["order.json", "."], lambda line: None, b'["a"]')


def test_every_python_that_sftd_starts_leaves_the_working_folder_alone() -> None:
    sources = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    started = re.compile(r'sys\.executable(?:, dollars=True\)\})?[,"\s]+(-\w+)')
    found = [(path.name, option) for path, text in sources.items() for option in started.findall(text)]
    assert len(found) >= 7
    assert {(name, option) for name, option in found if option != "-P"} == set()


def test_a_tool_does_not_hear_of_ranks_that_a_job_left_in_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    script = (
        "import json, os; print(json.dumps({n: n in os.environ for n in ('RANK', 'WORLD_SIZE', 'PATH')}))"
    )
    monkeypatch.setattr("sftd.launcher.tools.tool_argv", lambda module, arguments: [sys.executable, "-c", script])
    assert run_tool("any", [], lambda line: None) == {"RANK": False, "WORLD_SIZE": False, "PATH": True}


def test_a_tool_ends_with_the_command_that_waits_for_it(tmp_path: Path) -> None:
    """As Ctrl-C does it, which reaches this process alone: nothing of the tool is left."""

    def interrupt(_line: object) -> None:
        raise KeyboardInterrupt

    chats = tmp_path / "chats"
    # The test process has other children: a server of the session, a helper of multiprocessing.
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(KeyboardInterrupt):
        run_tool("prepare", ["stdlib-chats", str(chats), "--rows", "5"], interrupt)
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert [child.cmdline() for child in left if "sftd" in " ".join(child.cmdline())] == []

"""Exit codes as `sftd --help` has them: 0 ok, 1 the run or the operation failed, 2 the request was refused, 130 Ctrl-C.

What a script reads is on stdout: a command that did nothing prints nothing there.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import sftd
from sftd import settings
from sftd.cli import COMMANDS, main
from sftd.domain.errors import SftdError

# Errors of a request that cannot be carried out as it was made; all others are failures.
OF_THE_REQUEST = {"Refused", "RunNotFound", "AmbiguousRun", "DatabaseNotReady"}


def names() -> Iterator[str]:
    """Every command, and every command of a group."""
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        yield name
        if isinstance(command, click.Group):
            yield from (f"{name} {sub}" for sub in command.commands)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFTD_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", list(names()))
def test_an_option_that_does_not_exist_is_refused(name: str, home: Path) -> None:
    done = CliRunner().invoke(main, [*name.split(), "--no-such-option"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--no-such-option" in done.stderr
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", ["ls", "show x", "queue", "doctor", "db check", "mlflow check", "gc", "init"]
)
def test_ctrl_c_ends_a_command_as_the_shell_expects(
    arguments: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(settings, "read", interrupted)
    done = CliRunner().invoke(main, arguments.split())
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr.startswith("\ninterrupted.")


@pytest.mark.parametrize(
    "arguments", ["show x", "events x", "rm x --yes", "export x there", "data x --row 1"]
)
def test_what_is_not_found_leaves_stdout_empty(arguments: str, home: Path) -> None:
    done = CliRunner().invoke(main, arguments.split())
    assert (done.exit_code, done.stdout) == (2, "")
    assert "There is no run 'x'" in done.stderr


@pytest.mark.parametrize("arguments", ["ls", "queue", "show x", "nodes", "gc", "views rebuild"])
def test_a_database_that_cannot_be_read_is_a_failure(arguments: str, home: Path) -> None:
    (home / "sftd.db").write_bytes(b"no database of SQLite " * 100)
    done = CliRunner().invoke(main, arguments.split())
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("sftd: ")
    assert "Traceback" not in done.stderr


def test_remarks_and_warnings_are_not_among_what_scripts_read(home: Path) -> None:
    done = CliRunner().invoke(main, ["config", "packing", "--json"])
    assert (done.exit_code, done.stdout[:1]) == (0, "[")
    assert "packing is a name of" in done.stderr


def test_a_test_notice_that_nobody_gets_is_a_failure(home: Path) -> None:
    assert CliRunner().invoke(main, ["notify"]).exit_code == 0
    assert CliRunner().invoke(main, ["notify", "--test"]).exit_code == 1


def kinds(error: type[SftdError]) -> Iterator[type[SftdError]]:
    yield error
    for kind in error.__subclasses__():
        yield from kinds(kind)


def test_every_error_has_the_code_that_is_documented() -> None:
    for module in pkgutil.walk_packages(sftd.__path__, "sftd."):
        if not module.name.startswith(("sftd.trainer", "sftd.__main__")):
            importlib.import_module(module.name)
    codes = {
        kind.__name__: kind.exit_code for kind in kinds(SftdError) if kind.__module__.startswith("sftd.")
    }
    assert {name for name, code in codes.items() if code == 2} == OF_THE_REQUEST
    assert set(codes.values()) == {1, 2}
    assert len(codes) > 10

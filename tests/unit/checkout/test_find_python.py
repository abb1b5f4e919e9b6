"""`scripts/find-python` takes a Python that runs, not one that is merely there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.builders.paths import ROOT
from tests.builders.patience import PATIENCE

SCRIPT = ROOT / "scripts/find-python"
GOOD = 'case "$2" in *version_info*) exit 0;; *) echo "$0";; esac'
TOO_OLD = 'case "$2" in *version_info*) exit 1;; *) echo "$0";; esac'
# What a pyenv shim does when its version is not active.
SHIM = 'echo "pyenv: $0: command not found" >&2; exit 127'


class Machine:
    """A PATH with nothing on it but the tools of a shell, and a home without anything."""

    def __init__(self, root: Path) -> None:
        self.bin = root / "bin"
        self.home = root / "home"
        self.bin.mkdir()
        self.home.mkdir()
        for tool in ("ls", "sort", "cat"):
            found = next(Path(p) / tool for p in ("/usr/bin", "/bin") if (Path(p) / tool).exists())
            (self.bin / tool).symlink_to(found)

    def add(self, where: str, script: str) -> str:
        path = self.bin / where if "/" not in where else self.home / where
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    def find(self, **environment: str) -> subprocess.CompletedProcess[str]:
        base = {"PATH": str(self.bin), "HOME": str(self.home)}
        return subprocess.run(
            ["/bin/sh", str(SCRIPT)], env=base | environment, capture_output=True, text=True, timeout=PATIENCE
        )

    def found(self, **environment: str) -> str:
        done = self.find(**environment)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout.strip()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_python_on_the_path_is_taken(machine: Machine) -> None:
    good = machine.add("python3.12", GOOD)
    machine.add("python3", GOOD)
    assert machine.found() == good


def test_a_shim_that_does_not_run_and_one_that_is_too_old_are_passed_over(machine: Machine) -> None:
    machine.add("python3.12", SHIM)
    machine.add("python3.13", SHIM)
    machine.add("python3", TOO_OLD)
    machine.add("pyenv", SHIM)
    good = machine.add(".pyenv/versions/3.12.1/bin/python", GOOD)
    assert machine.found() == good


def test_pyenv_says_where_its_versions_are_and_the_newest_is_taken(machine: Machine) -> None:
    machine.add("pyenv", f"echo {machine.home}/else")
    machine.add("else/versions/3.11.7/bin/python", GOOD)
    machine.add("else/versions/3.12.2/bin/python", GOOD)
    good = machine.add("else/versions/3.12.10/bin/python", GOOD)
    machine.add("else/versions/3.12.11/bin/python", SHIM)
    machine.add("else/versions/3.13.0/bin/python", GOOD)
    assert machine.found() == good


def test_uvs_python_is_the_last_resort(machine: Machine) -> None:
    good = machine.add("uv-pythons/bin/python3.12", GOOD)
    machine.add("uv", f'test "$1 $2" = "python find" && echo {good}')
    assert machine.found() == good


def test_the_one_that_was_asked_for_is_taken_or_refused(machine: Machine) -> None:
    machine.add("python3.12", GOOD)
    asked = machine.add("own/python", GOOD)
    assert machine.found(PYTHON=asked) == asked
    done = machine.find(PYTHON=machine.add("old/python", TOO_OLD))
    assert done.returncode == 1
    assert "is not a Python 3.12 or newer" in done.stderr


def test_without_any_it_says_what_to_install(machine: Machine) -> None:
    machine.add("python3", TOO_OLD)
    done = machine.find()
    assert (done.returncode, done.stdout) == (1, "")
    for help_ in (
        "3.12 or newer",
        "apt install",
        "pyenv install",
        "uv python install",
        "make install PYTHON=",
    ):
        assert help_ in done.stderr

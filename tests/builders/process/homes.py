"""A home of its own, tiny data, and the real `sftd` in processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from sftd.launcher import processes
from sftd.wire.attempt.directory import AttemptDir
from tests.builders import warm_python
from tests.builders.holds import Holds, wait_until_stopped
from tests.builders.patience import PATIENCE
from tests.builders.process.tiny_llama import write_rows


class Home:
    """An SFTD_HOME and the `sftd` command on it."""

    def __init__(self, path: Path, model: Path, warm: str | None = None) -> None:
        """`warm`: what the fixture `warm_python` is; without it everything starts in interpreters of its own."""
        self.path = path
        self._daemons: list[subprocess.Popen[str]] = []
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SFTD_", "MLFLOW_"))} | {
            "SFTD_HOME": str(path / "home"),
            "SFTD_BACKOFF_SECONDS": "0.1",
            "SFTD_POLL_SECONDS": "0.05",
            # As many ranks at once, whatever the machine has.
            "SFTD_CPU_SLOTS": "2",
            "MLFLOW_TRACKING_URI": "",
            "COLUMNS": "200",
        }
        # A command that only reads does not make it.
        (path / "home").mkdir(mode=0o700, exist_ok=True)
        self.holds = Holds(path / "holds")
        self.env |= self.holds.environment(self.env)
        if warm is not None:
            self.env[warm_python.VARIABLE] = warm
        self.config = path / "run.yaml"
        write_rows(path / "train.parquet", 64)
        write_rows(path / "val.parquet", 8, seed=1)
        self.config.write_text(
            yaml.safe_dump(
                {
                    "model": {"partial_pretrain": str(model)},
                    "data": {
                        "train_files": [str(path / "train.parquet")],
                        "val_files": [str(path / "val.parquet")],
                        "train_batch_size": 4,
                        "sequence_length": 32,
                    },
                    "training": {"micro_batch_size_per_gpu": 2},
                    "optimizer": {"lr": 1e-3},
                    "trainer": {"max_steps": 12, "save_interval": 5},
                    "launch": {"threads_per_rank": 1},
                }
            )
        )

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "sftd", *arguments]

    def run(self, *arguments: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run one command to its end; `check` is the exit code it must have."""
        done = subprocess.run(
            self.command(*arguments),
            env=self._env_of(arguments),
            cwd=self.path,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        if check is not None:
            assert done.returncode == check, (
                f"sftd {' '.join(arguments)} → {done.returncode}\n{done.stdout}\n{done.stderr}"
            )
        return done

    def _env_of(self, arguments: Sequence[str]) -> dict[str, str]:
        """The environment of a command; all but daemons start warm where the home does."""
        is_warm = warm_python.VARIABLE in self.env and arguments[0] != "daemon"
        return self.env | ({warm_python.COMMAND_VARIABLE: "1"} if is_warm else {})

    def submit(self, *overrides: str) -> str:
        """Queue a run of the home's config. Returns its id."""
        return self.run("submit", str(self.config), *overrides, "-q").stdout.strip()

    def drain(self) -> str:
        """Run a daemon until the queue is empty. Returns its log."""
        return self.run("daemon", "--drain").stderr

    def start_daemon(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a daemon in the foreground of a process of its own."""
        log = open(self.path / "daemon.log", "a")  # noqa: SIM115
        with log:
            daemon = subprocess.Popen(
                self.command("daemon", *arguments),
                env=self.env,
                cwd=self.path,
                stdout=log,
                stderr=log,
                text=True,
            )
        self._daemons.append(daemon)
        return daemon

    def follow(self, run_id: str, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Read the run's events as they come until one matches; it is returned. Blocks on the pipe."""
        with subprocess.Popen(
            self.command("events", "-f", "--json", run_id),
            env=self._env_of(["events"]),
            stdout=subprocess.PIPE,
            text=True,
        ) as stream:
            assert stream.stdout is not None
            try:
                for line in stream.stdout:
                    event = json.loads(line)
                    if until(event):
                        return event
            finally:
                stream.kill()
        raise AssertionError(
            f"{run_id} ended without the awaited event:\n" + self.run("events", run_id).stdout
        )

    def wait(self, run_id: str, status: str) -> dict[str, Any]:
        """Wait until the run has ended. Returns its state, which must have `status`."""
        with subprocess.Popen(
            self.command("events", "-f", run_id), env=self._env_of(["events"]), stdout=subprocess.DEVNULL
        ) as stream:
            assert stream.wait(timeout=PATIENCE) == 0
        shown = self.show(run_id)
        assert shown["status"] == status, self.run("events", run_id).stdout + self.run("logs", run_id).stdout
        return shown

    def show(self, run_id: str) -> dict[str, Any]:
        return json.loads(self.run("show", run_id, "--json").stdout)

    def events(self, run_id: str, *types: str) -> list[dict[str, Any]]:
        """The run's events, optionally of some types."""
        lines = self.run("events", run_id, "--json").stdout.splitlines()
        return [e for e in map(json.loads, lines) if not types or e["type"] in types]

    def attempt(self, run_id: str, number: int = 1) -> AttemptDir:
        return AttemptDir(self.path / "home" / "runs" / run_id / f"attempt-{number:04d}")

    def hold(self, run_id: str, step: int, number: int = 1) -> dict[int, psutil.Process]:
        """Stop an attempt after a step. Returns rank → process: the test resumes or kills them."""
        self.hold_at(run_id, step, number)
        return self.held(run_id, number)

    def hold_at(self, run_id: str, step: int, number: int = 1) -> None:
        """Have the ranks of an attempt stop after a step that they have not reached yet; `held` waits for it."""
        self.holds.at(self.attempt(run_id, number).path, step)

    def held(self, run_id: str, number: int = 1) -> dict[int, psutil.Process]:
        """Wait until an attempt is where it is held. Returns rank → process: none of them does anything."""
        attempt = self.attempt(run_id, number)
        self.holds.wait(attempt.path, attempt.exit_file.exists)
        found = processes.ranks(attempt.order().token)
        held = {rank: psutil.Process(pid) for rank, pid in sorted(found.items())}
        for process in held.values():
            process.suspend()
        wait_until_stopped(held.values())
        return held

    def kill_ranks(self, run_id: str, number: int = 1) -> None:
        """SIGKILL the training ranks of an attempt."""
        pids = processes.ranks(self.attempt(run_id, number).order().token).values()
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill whatever still runs in it."""
        # A daemon may have started something while the list was made.
        while doomed := self._processes():
            for process in doomed:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(doomed, timeout=60)
        # A test that fails leaves its daemon: a Popen that nobody waits for is a warning, and so an error, in a later test.
        for daemon in self._daemons:
            daemon.wait(timeout=PATIENCE)

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get("SFTD_HOME") == self.env["SFTD_HOME"]:
                    found.append(process)
        return found


def at_step(step: int) -> Callable[[dict[str, Any]], bool]:
    """Matches the event of a step, or of a later one."""
    return lambda event: event["type"] == "StepCompleted" and event["payload"]["step"] >= step

"""A third launcher, which the product does not know: it has places of its own, and starts torchrun as a plain subprocess."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping

import pytest

from sftd.domain.errors import Problem
from sftd.domain.finding import Finding, ok
from sftd.domain.rules import Rules
from sftd.domain.run.failures import Remains
from sftd.domain.spec.launch import launchers
from sftd.domain.spec.launch.launchers import LauncherKind
from sftd.domain.spec.spec import Spec
from sftd.launcher import choosing, processes
from sftd.launcher.command import environment, torchrun_argv, wrapped_argv
from sftd.launcher.inventory import Need
from sftd.launcher.seam import Registered, Report
from sftd.wire.attempt.directory import AttemptDir, Order, ProcessFile
from sftd.wire.attempt.remains import find_remains

PLACES = 2


def without_gpus(spec: Spec) -> Iterator[Problem]:
    """It has no GPUs."""
    if spec.launch.device == "cuda":
        yield Problem("launch.device", "is cuda: the stub has no GPU", "set it to cpu")


def many_machines(spec: Spec) -> Iterator[Problem]:
    """It doubts that a run needs many machines."""
    if spec.launch.nnodes > 8:
        yield Problem("launch.nnodes", f"is {spec.launch.nnodes}")


STUB = LauncherKind(
    name="stub",
    shown="Farm",
    is_managed=True,
    variables=("FARM",),
    rules=Rules(refuse=(without_gpus,), warn=(many_machines,)),
)


class StubAttempt:
    """One attempt, found again by its token."""

    stacks_seconds = 0.0

    def __init__(self, directory: AttemptDir, token: str) -> None:
        self.directory = directory
        self.process = directory.process()
        self._token = token

    def is_alive(self) -> bool:
        return self.process is not None and bool(processes.survivors(self._token))

    def kill(self) -> list[int]:
        return processes.kill(processes.survivors(self._token))

    def report(self) -> Report | None:
        return Report("7", "RUNNING", trains=True) if self.is_alive() else None

    def ask_for_stacks(self) -> None:
        self.directory.ask_for_stacks()

    def stacks(self) -> list[str]:
        return []

    def remains(self) -> Remains:
        return find_remains(self.directory)


class StubLauncher:
    """Starts torchrun and forgets it: what there is to know of it is in the folder and in its environment."""

    def start(
        self, directory: AttemptDir, order: Order, need: Need, devices: list[str]
    ) -> tuple[StubAttempt, list[str]]:
        directory.create(order)
        argv = torchrun_argv(order.spec, directory)
        env = environment(os.environ, token=order.token, device="cpu", threads=need.threads, devices=devices)
        log = os.open(directory.output_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        # As a manager's: the shell is nobody's child here, so no zombie of it is left.
        quoted = wrapped_argv(argv, directory)
        subprocess.run(
            ["/bin/sh", "-c", '"$@" & ', "sh", *quoted],
            cwd=directory.path, env=env, stdout=log, stderr=log, start_new_session=True, check=True,
        )  # fmt: skip
        os.close(log)
        directory.write_process(
            ProcessFile(pid=0, create_time=0.0, host=processes.host_name(), devices=devices, job="7")
        )
        return StubAttempt(directory, order.token), argv

    def adopt(self, directory: AttemptDir, fallback_token: str) -> StubAttempt:
        return StubAttempt(directory, directory.lease() or fallback_token)


def doctor(daemon: Mapping[str, int] | None) -> list[Finding]:
    return [ok(STUB.shown, f"a daemon has {(daemon or {}).get(STUB.name, 0)} places")]


def register(patch: pytest.MonkeyPatch) -> None:
    """Have the product know the stub: its row of data and its entry in the registry."""
    patch.setitem(launchers.KINDS, STUB.name, STUB)
    made = Registered(make=lambda settings: StubLauncher(), places=lambda settings: PLACES, doctor=doctor)
    patch.setitem(choosing.LAUNCHERS, STUB.name, made)

"""A launcher whose attempts are no processes."""

from __future__ import annotations

from typing import Any

from sftd.domain.queue.demand import Need
from sftd.domain.run.failures import Remains
from sftd.wire.attempt.directory import AttemptDir, Order, ProcessFile


class Attempt:
    """Lives until it is killed."""

    def __init__(self, directory: AttemptDir, devices: list[str]) -> None:
        self.directory = directory
        self.process: ProcessFile | None = ProcessFile(pid=1, create_time=1.0, host="h", devices=devices)
        self.is_killed = False
        self.stacks_seconds = 1.0
        self.left = [Remains(None)]

    def is_alive(self) -> bool:
        return not self.is_killed

    def kill(self) -> list[int]:
        self.is_killed = True
        return []

    def report(self) -> None:
        return None

    def ask_for_stacks(self) -> None:
        raise AssertionError("it does not hang")

    def stacks(self) -> list[str]:
        return []

    def remains(self) -> Remains:
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]


class Launcher:
    """Notes what it starts, and finds it again."""

    def __init__(self) -> None:
        self.started: list[Attempt] = []

    def start(
        self, directory: AttemptDir, order: Order, need: Need, devices: list[str]
    ) -> tuple[Any, list[str]]:
        directory.create(order)
        self.started.append(Attempt(directory, devices))
        return self.started[-1], []

    def adopt(self, directory: AttemptDir, fallback_token: str) -> Any:
        return next(a for a in self.started if a.directory.path == directory.path)

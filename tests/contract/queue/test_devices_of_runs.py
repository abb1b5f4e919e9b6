"""Which devices a daemon gives to the processes of each run: real processes, several at once, across its own restart."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from sftd.daemon.loop import Daemon
from sftd.domain.log import events as e
from sftd.domain.spec.sections import Launch
from sftd.launcher.inventory import Inventory, Need
from sftd.launcher.local import LocalAttempt
from sftd.launcher.seam import Attempt
from sftd.operations.commands import lifecycle
from sftd.operations.commands.submit import Wish, submit_all
from sftd.operations.queries.runs import find_run
from sftd.projections import views
from sftd.settings import read
from sftd.store.database.engine import Store, open_engine
from sftd.store.log import event_store
from sftd.wire.attempt.directory import AttemptDir, Order
from sftd.wire.preflight import Preflight
from tests.builders.log.clock import CONTEXT
from tests.builders.log.specs import FACTS, SHAPE, SPEC
from tests.builders.patience import until

# As CUDA_VISIBLE_DEVICES of the daemon names them: neither from 0 on nor in order.
GPUS = ["3", "1", "MIG-8a1b", "0"]


class Launcher:
    """Starts attempts on this host, and reaps all of them at last: their daemon may have ended before."""

    def __init__(self) -> None:
        self.started: list[LocalAttempt] = []

    def start(
        self, directory: AttemptDir, order: Order, need: Need, devices: list[str]
    ) -> tuple[Attempt, list[str]]:
        attempt, argv = LocalAttempt.start(directory, order, need, devices)
        self.started.append(attempt)
        return attempt, argv

    def adopt(self, directory: AttemptDir, fallback_token: str) -> Attempt:
        return LocalAttempt.adopt(directory, fallback_token)


class Host:
    """A host with GPUs that there are not, its daemon, and processes that wait in torchrun's place."""

    def __init__(self, store: Store, home: Path) -> None:
        self.store, self.home = store, home
        self.others: set[str] = set()
        # How often the daemon looked for GPUs that are free.
        self.looked = 0
        self.launcher = Launcher()
        self.start()

    def start(self) -> None:
        """A daemon of this home: the first, or the next one."""
        environ = {
            "SFTD_HOME": str(self.home),
            "MLFLOW_TRACKING_URI": "",
            "SFTD_BACKOFF_SECONDS": "1000",
            "SFTD_POLL_SECONDS": "0.01",
        }
        inventory = Inventory(GPUS, 4, others=self.held_by_others)
        self.daemon = Daemon(self.store, read(environ), inventory, launcher=self.launcher)
        self.thread = threading.Thread(target=self.daemon.run)
        self.thread.start()

    def held_by_others(self) -> set[str]:
        self.looked += 1
        return self.others

    def stop(self) -> None:
        """End it; its attempts stay alive."""
        self.daemon.stop()
        self.thread.join()

    def submit(self, ranks: int, device: str = "cuda", threads: int | None = None) -> str:
        launch = Launch(nproc_per_node=ranks, device=device, threads_per_rank=threads)  # type: ignore[arg-type]
        spec = msgspec.structs.replace(SPEC, launch=launch)
        return submit_all(self.store, CONTEXT, [Wish(spec, Preflight(SHAPE, FACTS, None, 3, []))], "ada")[0]

    def launches(self, run_id: str) -> list[e.AttemptLaunched]:
        return [
            event for event in self.events("AttemptLaunched", run_id) if isinstance(event, e.AttemptLaunched)
        ]

    def events(self, name: str, *run_ids: str) -> list[e.Event]:
        with self.store.read() as connection:
            return [r.event for r in event_store.read_types(connection, run_ids, (name,))]

    def visible(self, run_id: str) -> tuple[list[str], str, str]:
        """The devices of its last launch by the log, and what its processes have: GPUs and threads."""
        before = self.looked
        until(lambda: self.launches(run_id) or self.looked > before + 50)
        assert self.launches(run_id), "no device is free"
        launched = self.launches(run_id)[-1]
        environ = Path(f"/proc/{launched.pid}/environ").read_text().split("\0")
        has = dict(line.split("=", 1) for line in environ if line)
        return launched.devices, has["CUDA_VISIBLE_DEVICES"], has["OMP_NUM_THREADS"]

    def until_it_is(self, run_id: str, status: str) -> None:
        until(lambda: find_run(self.store, run_id).status == status)

    def kill(self, run_id: str) -> None:
        """As the kernel does it, unseen by the daemon."""
        os.killpg(self.launches(run_id)[-1].pid, signal.SIGKILL)
        self.until_it_is(run_id, "retrying")


@pytest.fixture
def host(sqlite_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 600\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,MIG-8a1b,0")
    monkeypatch.setenv("OMP_NUM_THREADS", "99")
    shutil.copyfile(sqlite_template, tmp_path / "sftd.db")
    engine = open_engine(f"sqlite:///{tmp_path}/sftd.db")
    (tmp_path / "home").mkdir()
    made = Host(Store(engine, before_commit=(views.catch_up,)), tmp_path / "home")
    yield made
    made.stop()
    for attempt in made.launcher.started:
        assert attempt.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(attempt.process.pid, signal.SIGKILL)
        until(lambda attempt=attempt: not attempt.is_alive())
    engine.dispose()


def test_runs_at_once_have_devices_of_their_own(host: Host) -> None:
    two, part, last = host.submit(2), host.submit(1), host.submit(1)
    assert host.visible(two) == (["cuda:3", "cuda:1"], "3,1", "1")
    assert host.visible(part) == (["cuda:MIG-8a1b"], "MIG-8a1b", "1")
    assert host.visible(last) == (["cuda:0"], "0", "1")
    # It sees no GPU of the others.
    on_cpu = host.submit(2, "cpu", threads=2)
    assert host.visible(on_cpu) == ([f"cpu:{n}" for n in range(4)], "", "2")
    waits = host.submit(1)

    # Another daemon finds what is taken, and gives it to nobody else.
    host.stop()
    host.start()
    until(lambda: len(host.events("AttemptAdopted", two, part, last, on_cpu)) == 4)

    # What becomes free is given away: just that.
    host.kill(part)
    assert host.visible(waits) == (["cuda:MIG-8a1b"], "MIG-8a1b", "1")
    more = host.submit(2)
    host.kill(two)
    assert host.visible(more) == (["cuda:3", "cuda:1"], "3,1", "1")


def test_a_later_attempt_has_the_devices_that_are_free_then(host: Host) -> None:
    first, second = host.submit(1), host.submit(2)
    assert host.visible(first)[1] == "3"
    assert host.visible(second)[1] == "1,MIG-8a1b"
    host.kill(first)
    assert host.visible(host.submit(1))[1] == "3"
    lifecycle.resume(host.store, CONTEXT, first, "ada")
    until(lambda: len(host.launches(first)) == 2)
    assert host.visible(first) == (["cuda:0"], "0", "1")


def test_what_a_verify_computes_on_is_given_to_no_run(host: Host) -> None:
    host.others = {"cuda:3", "cuda:MIG-8a1b"}
    assert host.visible(host.submit(2))[1] == "1,0"
    waits = host.submit(1)
    host.others = {"cuda:MIG-8a1b"}
    assert host.visible(waits)[1] == "3"


def test_a_start_that_fails_keeps_no_device(host: Host) -> None:
    """Its folder cannot be made, say."""
    (host.home / "runs").write_text("")
    blocked = host.submit(4)
    host.until_it_is(blocked, "retrying")
    (host.home / "runs").unlink()
    assert host.visible(host.submit(4))[1] == "3,1,MIG-8a1b,0"

"""A mirror that only a test knows, fed by a real daemon: what a new tracker must do, and all that it must do."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import pytest

from sftd.daemon import loop
from sftd.daemon.loop import Daemon
from sftd.domain.finding import Finding, ok
from sftd.domain.log import events as e
from sftd.domain.spec.model_section import Model
from sftd.domain.spec.sections import Launch
from sftd.domain.spec.spec import Spec
from sftd.launcher.inventory import Inventory
from sftd.projections import views
from sftd.projections.mirrors.seam import MirrorUnavailable
from sftd.settings import Settings, read
from sftd.store.database.engine import Store
from sftd.store.log import event_store
from sftd.store.queue import leases
from tests.builders.patience import PATIENCE
from tests.builders.prometheus import parse

SPEC = Spec(model=Model(partial_pretrain="m"), launch=Launch(threads_per_rank=1, max_restarts=0))


class Lines:
    """A tracker that is a file: a line for each request. `tried` has an entry for each request, `arrived` for each event."""

    types = e.names(e.RunSubmitted, e.AttemptClaimed, e.RunFailed, e.ResumeRequested)

    def __init__(self, file: Path) -> None:
        self.name = file.stem
        self.file = file
        self.tried: SimpleQueue[None] = SimpleQueue()
        self.arrived: SimpleQueue[str] = SimpleQueue()
        self.answers, self.is_up = threading.Event(), True
        self.answers.set()

    def position(self, settings: Settings) -> str | None:
        return f"lines:{self.name}"

    def open(self, settings: Settings, store: Store) -> Lines:
        return self

    def check(self, settings: Settings) -> Iterator[Finding]:
        yield ok(self.name, str(self.file))

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def cursor(self, run_id: str, version: int) -> int:
        return max((line["upto"] for line in self.lines() if line["run"] == run_id), default=0)

    def send(self, run_id: str, page: Sequence[e.Recorded], upto: int, go_on: Callable[[], None]) -> None:
        go_on()
        self.tried.put(None)
        assert self.answers.wait(PATIENCE)
        if not self.is_up:
            raise MirrorUnavailable(f"{self.name} is away")
        with open(self.file, "a") as file:
            file.write(json.dumps({"run": run_id, "upto": upto, "types": [r.type for r in page]}) + "\n")
        for recorded in page:
            self.arrived.put(recorded.type)

    def forget(self) -> None:
        """The file remembers."""

    def types_of(self, run_id: str) -> list[str]:
        return [name for line in self.lines() if line["run"] == run_id for name in line["types"]]


class Nothing:
    """Starts nothing: each attempt fails at once, as it does on a full disk."""

    def start(self, *_: object) -> Any:
        raise OSError("no torchrun")

    def adopt(self, *_: object) -> Any:
        raise AssertionError("nothing was started")


def submit(store: Store, run_id: str) -> None:
    submitted = e.RunSubmitted(
        spec=msgspec.to_builtins(SPEC),
        spec_digest="s",
        planned_steps=4,
        user="ada",
        data={},
        model={},
        sftd_version="0",
    )
    with store.write() as tx:
        now = time.time_ns() // 1000
        new = e.NewEvent(event=submitted, event_id=str(uuid.uuid4()), occurred_at=now, actor="test")
        event_store.append(tx, run_id, 0, [new], now)
        leases.enqueue(tx, run_id, 0, 0)


class Serving:
    """A daemon with these mirrors, until the block ends."""

    def __init__(self, store: Store, home: Path, *mirrors: Lines) -> None:
        settings = read({"SFTD_HOME": str(home), "SFTD_POLL_SECONDS": "0.01"})
        home.mkdir(exist_ok=True)
        self.daemon = Daemon(store, settings, Inventory(0, 1), Nothing(), mirrors=mirrors)
        self.thread = threading.Thread(target=self.daemon.run)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.daemon.stop()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


STORY = ["RunSubmitted", "AttemptClaimed", "RunFailed"]


def test_each_mirror_has_its_own_outages_and_gets_every_event_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The one that is away will not come back while this daemon ends.
    monkeypatch.setattr(loop, "_LAST_SECONDS", 0.5)
    store.before_commit = (views.catch_up,)
    away, well = Lines(tmp_path / "away"), Lines(tmp_path / "well")
    away.answers.clear()
    with Serving(store, tmp_path / "home", away, well):
        submit(store, "one")
        away.tried.get(timeout=PATIENCE)
        # While one hangs, the run is driven to its end, and the other has all of it.
        assert [well.arrived.get(timeout=PATIENCE) for _ in STORY] == STORY
        away.is_up = False
        away.answers.set()
    assert away.lines() == []
    lags = parse((tmp_path / "home" / "metrics.prom").read_text())["sftd_mirror_lag_events"]
    assert {dict(labels)["mirror"] for labels in lags} == {"away", "well"}
    # The next daemon continues each where it was.
    away.is_up = True
    with Serving(store, tmp_path / "home", away, well):
        assert [away.arrived.get(timeout=PATIENCE) for _ in STORY] == STORY
        submit(store, "two")
        assert [well.arrived.get(timeout=PATIENCE) for _ in STORY] == STORY
    # What was recorded last arrives before the daemon ends.
    for mirror in (away, well):
        assert [mirror.types_of(run_id) for run_id in ("one", "two")] == [STORY, STORY]

"""What is known of a launcher as data: the queue, the checks and the words for people need no launcher's name."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import msgspec
import pytest

from sftd.cli.doctor import command as doctor
from sftd.cli.submit.command import _print_script
from sftd.cli.watch.view import _node
from sftd.domain.errors import Refused
from sftd.domain.log.events import AttemptLaunched, JobReported
from sftd.domain.queue.demand import Demand, Need, need
from sftd.domain.queue.forecast import HostCapacity, look_ahead
from sftd.domain.queue.order import Entry, Limits, Wait
from sftd.domain.spec.launch.launchers import KINDS, holder_of, kind_of
from sftd.domain.spec.rules import SPEC
from sftd.domain.spec.sections import Launch, Slurm
from sftd.domain.spec.spec import Spec
from sftd.launcher.choosing import LAUNCHERS, ByName, launcher_of
from sftd.launcher.inventory import Inventory
from sftd.launcher.local import LocalAttempt
from sftd.operations.queries.nodes import Devices, Node
from sftd.projections.mirrors.mlflow.mapping import params
from sftd.settings import read
from sftd.wire.attempt.directory import AttemptDir, Order, ProcessFile
from tests.builders.process import stub_launcher
from tests.builders.process.stub_launcher import PLACES, STUB, StubAttempt, StubLauncher


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_launcher.register(monkeypatch)


def on_stub(**launch: object) -> Spec:
    return Spec(launch=Launch(launcher="stub", **launch))  # type: ignore[arg-type]


def entry(run_id: str, launcher: str = "stub", **fields: object) -> Entry:
    demand = Demand(ranks=8, world=64, launcher=launcher) if launcher == "stub" else Demand()
    return Entry(run_id=run_id, priority=0, demand=demand, **fields)  # type: ignore[arg-type]


def test_each_launcher_of_the_spec_is_known_and_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    named = get_args(get_args(get_type_hints(Launch, include_extras=True)["launcher"])[0])
    monkeypatch.undo()
    assert set(named) == KINDS.keys() == LAUNCHERS.keys()


def test_an_attempt_takes_one_place_and_no_device_of_the_host() -> None:
    assert need(Demand.of(on_stub(device="cuda", nproc_per_node=8)), 4, 8) == Need("stub", 1, 1)
    inventory = Inventory(1, 2, {"stub": PLACES})
    assert inventory.describe() == {"gpus": 1, "cpus": 2, "stub": 2}
    assert [inventory.take(run, on_stub())[1] for run in ("a", "b")] == [["stub:0"], ["stub:1"]]
    assert inventory.fits(on_stub()) is False
    assert inventory.fits(Spec()) is True
    assert Inventory(1, 2).fits(on_stub()) is None


def test_its_runs_wait_for_its_places_only() -> None:
    row = {"gpus": 1, "cpus": 2, "stub": 1, "user_limit": 0, "project_limit": 3}
    host = HostCapacity.of("d1", "h", row)
    assert (host.places, host.limits) == ({"stub": 1}, Limits(None, 3))
    running = entry("r", status="running", owner="d1")

    def waits(*waiting: Entry, on: HostCapacity = host, beside: tuple[Entry, ...] = (running,)) -> list[Wait]:
        found = look_ahead(list(waiting), list(beside), [on], Limits(), 0)
        return [found[e.run_id].wait for e in waiting]

    first, second, local = waits(entry("a"), entry("b"), entry("c", "local"))
    assert first == Wait("devices", "1 jobs on Farm, 0 free")
    assert second == Wait("behind", "turn of a")
    assert local.kind == "start"
    assert waits(entry("a"), beside=())[0].kind == "start"
    without = HostCapacity("d2", "h", 1, 2)
    assert waits(entry("a"), on=without) == [Wait("too large", "a daemon with Farm: none has it")]


def test_a_launcher_of_a_newer_sftd_waits() -> None:
    """Its runs are in the database that this sftd shares."""
    newer = msgspec.structs.replace(entry("a"), demand=Demand(launcher="newer"))
    host = HostCapacity("d1", "h", 1, 2)
    wait = look_ahead([newer], [], [host], Limits(), 0)["a"].wait
    assert wait == Wait("too large", "a daemon with newer: none has it")
    assert Inventory(1, 2).fits(newer.demand) is None


def test_it_says_what_it_does_not_support() -> None:
    spec = on_stub(device="cuda", nnodes=9, slurm=Slurm(partition="p"))
    problems, warnings = SPEC.problems(spec), SPEC.warnings(spec)
    assert ("launch.device", "set it to cpu") in [(p.where, p.fix) for p in problems]
    assert {w.where for w in warnings} >= {"launch.nnodes", "launch.slurm"}
    assert [w.fix for w in warnings if w.where == "launch.slurm"] == ["set launch.launcher to slurm"]
    problems = SPEC.problems(Spec(launch=Launch(nnodes=2)))
    assert [p.fix for p in problems if p.where == "launch.nnodes"] == [
        "set it to 1, or launch.launcher to slurm or stub"
    ]


def test_words_name_it() -> None:
    assert STUB.describe(JobReported(job="7", state="PENDING", reason="dawn")) == "Farm: job 7 pending (dawn)"
    assert STUB.describe(JobReported(job="", state="NOT SUBMITTED")) == "Farm: not submitted"
    launched = AttemptLaunched(pid=0, create_time=0.0, host="h", directory="/a", argv=[], devices=["stub:1"])
    assert launched.summary() == "handed to Farm on h"
    devices = {"gpus": Devices(0, 0), "stub": Devices(2, 1)}
    node = Node("h", "d", "alive", 1, "/h", devices, [], 0, 0, 0.0)
    assert "1 of 2 Farm jobs used" in _node(node).plain


def test_an_attempt_is_found_by_its_order_or_by_its_places(tmp_path: Path) -> None:
    directory = AttemptDir(tmp_path / "a")
    launcher = ByName({"local": LocalAttempt, "stub": StubLauncher()})
    assert launcher_of(directory).name == "local", "nothing was started"
    spec = Spec(launch=Launch(launcher="slurm"))
    directory.create(Order(run_id="r", attempt=1, token="t", spec=spec, planned_steps=1, checkpoint_dir="c"))
    assert launcher_of(directory).name == "slurm"
    directory.order_file.write_text("{")
    directory.write_process(ProcessFile(pid=0, create_time=0.0, host="h", devices=["stub:0"]))
    assert isinstance(launcher.adopt(directory, "t"), StubAttempt)
    assert [holder_of(held).name for held in (["cuda:0"], ["cpu:3"], [])] == ["local"] * 3


def test_the_commands_ask_the_registry(tmp_path: Path) -> None:
    settings = read({"SFTD_HOME": str(tmp_path), "SFTD_SLURM_JOBS": "9"})
    assert LAUNCHERS["stub"].places(settings) == PLACES
    found = list(doctor._launcher(LAUNCHERS["stub"], settings, None))
    assert [(f.check, f.said) for f in found] == [("Farm", "a daemon has 0 places")]
    with pytest.raises(Refused, match=r"is stub, and has no job script\n +fix: add launch.launcher=slurm$"):
        _print_script(settings, on_stub(), None, [])  # type: ignore[arg-type]


def test_a_curve_has_the_section_of_its_own_launcher_only() -> None:
    sections = {"stub": {"field": "north"}, "slurm": {"time": "1"}}
    assert params({"launch": {"launcher": "stub", **sections}}) == {
        "launch.launcher": "stub",
        "launch.stub.field": "north",
    }
    assert kind_of("stub") is STUB

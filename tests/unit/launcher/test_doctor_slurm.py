"""What `sftd doctor` says of Slurm, with scripts for its commands."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from sftd.cli.doctor.services import daemon_devices
from sftd.daemon.lock import DaemonLock
from sftd.domain.finding import Finding
from sftd.launcher import processes
from sftd.launcher.slurm import commands as slurm_commands
from sftd.launcher.slurm import doctor as doctor_slurm
from sftd.settings import Settings, read
from sftd.store.database.engine import Store, open_engine
from sftd.store.database.migrate import upgrade
from sftd.store.queue import daemons
from sftd.store.queue.daemons import DaemonRow

DOWN = "Unable to contact slurm controller (connect failure)"
SINFO = """\
gpu*|up|4:00:00|10/2/4/16|gpu:h100:8(S:0-1)
gpu*|up|4:00:00|1/0/0/1|gpu:a100:4
cpu|up|infinite|0/30/0/30|(null)
old|drain|1-00:00:00|0/0/2/2|(null)
"""
WELL = {
    "sbatch": "echo slurm-wlm 22.05.8",
    "squeue": "echo '7|RUNNING|0|n1|0|None|/s|'; echo '8|PENDING|0||0|Priority|/s|'; echo '6|FAILED|0|n1|256|None|/s|'",
    "scancel": "exit 0",
    "sinfo": f"cat <<E\n{SINFO}E",
    "sacct": "echo 'Slurm accounting storage is disabled' >&2; exit 1",
}


def away(command: str, prefix: str) -> str:
    return f"echo '{command}: error: {prefix}{DOWN}' >&2; exit 1"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put these commands, and no others of Slurm's, on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "cat").symlink_to("/bin/cat")
    monkeypatch.setenv("PATH", str(folder))

    def put(**scripts: str) -> None:
        for name, script in scripts.items():
            file = folder / name
            file.write_text(f"#!/bin/sh\n{script}\n")
            file.chmod(0o700)

    return put


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    home = tmp_path / "home"
    home.mkdir()
    return read({"SFTD_HOME": str(home)})


def look(settings: Settings, store: Store | None = None) -> list[Finding]:
    found = list(doctor_slurm.examine(daemon_devices(settings, store)))
    assert {finding.check for finding in found} == {"Slurm"}
    assert all(bool(finding.fix) == (finding.state != "ok") for finding in found)
    return found


def test_where_no_slurm_is_it_is_not_used(install: Callable[..., None], settings: Settings) -> None:
    (found,) = look(settings)
    assert (found.state, found.said) == ("ok", "not used: its commands are not installed")


def test_a_slurm_in_order(install: Callable[..., None], settings: Settings) -> None:
    install(**WELL)
    commands, controller, partitions = look(settings)
    assert (commands.state, controller.state, partitions.state) == ("ok", "ok", "ok")
    assert commands.said.startswith("slurm-wlm 22.05.8, /")
    assert "2 jobs of yours, no accounting (sacct)" in controller.said
    assert partitions.said == (
        "partitions: gpu* (13 of 17 nodes, at most 4:00:00, gpu:h100:8, gpu:a100:4), cpu (30 of 30 nodes, no time limit), "
        "old (not up, 0 of 2 nodes, at most 1-00:00:00)"
    )
    install(sacct="exit 0")
    assert look(settings)[1].said.endswith("accounting answers")


def test_commands_that_are_missing(install: Callable[..., None], settings: Settings) -> None:
    install(sbatch="exit 0")
    (found,) = look(settings)
    assert (found.state, "squeue, scancel cannot be found" in found.said) == ("broken", True)


def test_commands_without_their_configuration(install: Callable[..., None], settings: Settings) -> None:
    install(**WELL)
    install(sbatch="echo 'sbatch: fatal: Unable to process configuration file' >&2; exit 1")
    (found,) = look(settings)
    assert (found.state, "SLURM_CONF" in found.fix) == ("warning", True)
    assert found.said.endswith(": Unable to process configuration file")


def test_a_controller_that_is_away(install: Callable[..., None], settings: Settings) -> None:
    """No run is lost by that: it is no error."""
    install(**WELL)
    install(squeue=f"echo 'slurm_load_jobs error: {DOWN}' >&2; exit 1")
    _, found = look(settings)
    assert (found.state, found.said) == ("warning", f"the controller does not answer: {DOWN}")


def test_a_controller_that_hangs(
    install: Callable[..., None], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_slurm, "_SECONDS", 0.2)
    install(**WELL)
    install(squeue="exec /bin/sleep 600")
    _, found = look(settings)
    assert (found.state, "squeue got no answer" in found.said) == ("warning", True)


def test_a_squeue_that_speaks_otherwise(install: Callable[..., None], settings: Settings) -> None:
    install(**WELL)
    install(squeue="echo 7 gpu sftd R")
    _, found = look(settings)
    assert (found.state, "22.05" in found.fix) == ("broken", True)


def test_partitions_without_a_node(install: Callable[..., None], settings: Settings) -> None:
    install(**WELL)
    install(sinfo="echo 'gpu*|up|4:00:00|0/0/2/2|gpu:8'; echo 'cpu|down|infinite|0/2/0/2|(null)'")
    found = look(settings)[-1]
    assert (found.state, "sinfo -R" in found.fix) == ("warning", True)
    install(sinfo=away("sinfo", "slurm_load_partitions: "))
    found = look(settings)[-1]
    assert (found.state, found.said) == ("warning", f"sinfo does not list the partitions: {DOWN}")
    install(sinfo="\n".join(f"echo 'p{n}|up|infinite|0/1/0/1|(null)'" for n in range(9)))
    assert look(settings)[-1].said.endswith(", and 3 more")


def test_a_daemon_that_was_started_without_slurm(install: Callable[..., None], settings: Settings) -> None:
    """As by a unit whose PATH does not lead to Slurm's commands."""
    install(**WELL)
    engine = open_engine(settings.database_url)
    upgrade(engine)
    store = Store(engine)
    row = DaemonRow(
        "d1", processes.host_name(), os.getpid(), 1.0, str(settings.home), '{"gpus":0,"cpus":2}', 1, 1
    )
    with store.write(appends=False) as tx:
        daemons.register(tx, row)
    assert look(settings, store)[-1].state == "ok", "it runs no more"
    with DaemonLock(settings.daemon_lock):
        found = look(settings, store)[-1]
        assert (found.state, "found no sbatch" in found.said) == ("warning", True)
        with_slurm = '{"gpus":0,"cpus":2,"slurm":100}'
        with store.write(appends=False) as tx:
            daemons.register(
                tx, msgspec.structs.replace(row, daemon_id="d2", devices=with_slurm, started_at=2)
            )
        assert look(settings, store)[-1].state == "ok"
    engine.dispose()


@pytest.mark.parametrize(
    "line",
    [
        f"squeue: error: slurm_load_jobs error: {DOWN}",
        f"slurm_load_partitions: {DOWN}",
        f"scancel: error: Kill job error on job id 5: {DOWN}",
        DOWN,
    ],
)
def test_an_error_is_told_without_its_noise(line: str) -> None:
    with pytest.raises(slurm_commands.Unanswered, match=f"^{DOWN[:24]}"):
        slurm_commands.version(lambda *_: (1, "", f"first line\n{line}\n"))

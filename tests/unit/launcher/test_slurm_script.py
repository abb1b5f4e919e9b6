"""The job script: pinned as a whole, and run by a real bash with `srun` replaced by a recorder."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sftd.domain.errors import Refused
from sftd.domain.spec.launch.slurm import asks_for_gpus
from sftd.domain.spec.parse import parse
from sftd.domain.spec.sections import Slurm
from sftd.launcher.slurm import script as slurm_script
from sftd.wire.spec.file import parse_overrides
from tests.builders.paths import GOLDEN
from tests.builders.patience import PATIENCE
from tests.builders.process.slurm_jobs import Job, script_of, spec_of


def test_the_script_is_pinned() -> None:
    """People read it, and sites approve it: a change of it is a decision."""
    made = script_of(
        folder="/shared/100% mine/attempt-0002",
        nnodes=2,
        nproc_per_node=8,
        device="cuda",
        threads_per_rank=12,
        slurm={
            "partition": "gpu",
            "account": "lab",
            "qos": "long",
            "time": "2-0",
            "constraint": "h100&nvlink",
            "exclude": "n[3,7-9]",
            "extra_args": ["--mem=0", "--exclusive"],
            "setup": "module load cuda\nexport NCCL_SOCKET_IFNAME=ib0\n",
            "stop_seconds": 600,
        },
    )
    assert made == (GOLDEN / "job.sh").read_text()
    assert "--gres=gpu:8" in made, "a GPU a rank, where nothing else was asked for"


def test_bash_takes_it() -> None:
    for nodes in (1, 2):
        made = script_of(folder='/a b/it\'s "it"', nnodes=nodes, nproc_per_node=1)
        subprocess.run(["bash", "-n"], input=made, text=True, check=True)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("partition", "a b", "contains spaces"),
        ("account", "x\n#SBATCH --uid=0", "contains spaces"),
        ("qos", 'a"', "quotes"),
        ("time", "soon", "not a Slurm time"),
        ("extra_args", ["mem=0"], "not an option"),
        ("extra_args", ["--comment=a\nrm -rf /"], "not an option"),
        ("extra_args", ["--requeue"], "sets --requeue"),
        ("extra_args", ["-N2"], "use launch.nnodes"),
        ("extra_args", ["--signal=TERM@1"], "launch.slurm.stop_seconds"),
        ("extra_args", ["--mem=0 --array=1-3"], "sets --array"),
        ("extra_args", ["--arr=1-3"], "sets --array"),
        ("extra_args", ["-M other"], "sets -M"),
        ("extra_args", ["--comment='a"], "not an option"),
        ("setup", "echo \0", "NUL"),
    ],
)
def test_what_must_not_stand_in_a_script_is_refused(key: str, value: Any, says: str) -> None:
    with pytest.raises(Refused) as refused:
        spec_of(slurm={key: value})
    (problem,) = refused.value.problems
    assert problem.where == f"launch.slurm.{key}"
    assert says in str(problem)


@pytest.mark.parametrize("time", ["90", "90:30", "4:00:00", "2-0", "2-12:30", "2-12:30:10"])
def test_slurms_times_are_taken_as_they_are_written(time: str) -> None:
    """PyYAML by itself reads 4:00:00 as the number 14400, which are ten days to Slurm."""
    (override,) = parse_overrides([f"launch.slurm.time={time}"])
    assert f"--time={time}" in script_of(slurm={"time": override[1]})


def test_auto_is_what_the_job_asks_for() -> None:
    assert slurm_script.device(spec_of()) == "cpu"
    assert slurm_script.device(spec_of(slurm={"gres": "gpu:h100:4"})) == "cuda"
    assert slurm_script.device(spec_of(slurm={"extra_args": ["--gpus-per-node=8"]})) == "cuda"
    assert "--gres=gpu" not in script_of(slurm={"extra_args": ["--gpus-per-node=8"]}, device="cuda")


@pytest.mark.parametrize(
    ("gres", "extra_args"),
    [
        ("gpu", []),
        ("gpu:2", []),
        ("gpu:h100:4", []),
        ("nvme:100,gpu:a100:1", []),
        ("gres/gpu:2", []),
        ("gres:gpu:2", []),
        ("mps:50", []),
        ("shard:1", []),
        ("", ["--gpus=2"]),
        ("", ["--gpus h100:2"]),
        ("", ["-G2"]),
        ("", ["-G 2"]),
        ("", ["--gpus-per-node=a100:8"]),
        ("", ["--gpus-per-task=1"]),
        ("", ["--gpus-per-socket=4"]),
        ("", ["--gpus-per-n=4"]),
        ("", ["--gres=gpu:2"]),
        ("", ["--gres nvme:1,gpu:2"]),
        ("", ["--tres-per-node=gres/gpu:h100=4"]),
        ("", ["--mem=0 --exclusive --gpus=8"]),
        ("gpu:0", ["--mem=0", "--gpus=8"]),
    ],
)
def test_what_asks_for_gpus(gres: str, extra_args: list[str]) -> None:
    assert asks_for_gpus(Slurm(gres=gres, extra_args=extra_args))


@pytest.mark.parametrize(
    ("gres", "extra_args"),
    [
        ("", []),
        ("none", []),
        ("gpu:0", []),
        ("gpu:h100:0", []),
        ("nvme:gpu", []),
        ("gpu_cache:2", []),
        ("", ["--gpus=0"]),
        ("", ["-G0"]),
        ("", ["--gpus-per-node=h100:0"]),
        ("", ["--gres=nvme:1"]),
        ("", ["--gres-flags=enforce-binding"]),
        ("", ["--gpu-bind=closest"]),
        ("", ["--gpu-freq=high"]),
        ("", ["--mem-per-gpu=8G"]),
        ("", ["--cpus-per-gpu=4"]),
        ("", ["--comment=gpu"]),
        ("", ["--reservation=gpu-nodes"]),
        ("", ["--wckey=gpu:4"]),
        ("", ["--nodelist=gpu[1-4]"]),
        ("", ["--comment='--gpus=2"]),
    ],
)
def test_what_only_looks_so(gres: str, extra_args: list[str]) -> None:
    assert not asks_for_gpus(Slurm(gres=gres, extra_args=extra_args))


def test_cuda_asks_for_a_gpu_a_rank_unless_a_person_says_what(tmp_path: Path) -> None:
    def gres(**slurm: Any) -> list[str]:
        made = script_of(device="cuda", nproc_per_node=4, slurm=slurm)
        return [line for line in made.splitlines() if "--gres" in line or "--gpus" in line]

    assert gres() == ["#SBATCH --gres=gpu:4"]
    assert gres(partition="gpu", extra_args=["--comment=gpu"]) == ["#SBATCH --gres=gpu:4"]
    assert gres(gres="gpu:h100:2") == ["#SBATCH --gres=gpu:h100:2"]
    assert gres(extra_args=["--gpus=8"]) == ["#SBATCH --gpus=8"]
    assert gres(gres="none") == ["#SBATCH --gres=none"]


@pytest.mark.parametrize(
    ("launch", "where"),
    [
        ({"device": "auto"}, "launch.device"),
        ({"device": "auto", "slurm": {"extra_args": ["--comment=gpu"]}}, "launch.device"),
        ({"device": "cuda", "slurm": {"gres": "nvme:1"}}, "launch.slurm.gres"),
    ],
)
def test_a_job_that_gets_no_gpu_is_warned_of(launch: dict[str, Any], where: str) -> None:
    config = {
        "model": {"path": "/m"},
        "data": {"train_files": "/t"},
        "launch": {"launcher": "slurm", **launch},
    }
    (warning,) = [found for found in parse(config)[1] if found.where.startswith("launch")]
    assert warning.where == where
    assert "GPU" in str(warning)


def test_one_start_of_one_job_trains(tmp_path: Path) -> None:
    job = Job(tmp_path / "j", "env > env; exit 3", nproc_per_node=2)
    first = job.start(7)
    assert (first.communicate(timeout=PATIENCE)[0], first.returncode) == ("", 3)
    assert job.directory.exit_code() == 3
    assert job.directory.started_job() == "7"
    told = (job.directory.path / "env").read_text().splitlines()
    assert {"SFTD_ATTEMPT_TOKEN=t", "SFTD_DEVICE=cpu", "OMP_NUM_THREADS=2", "GLOO_SOCKET_IFNAME=lo"} <= set(
        told
    )
    again = job.start(8)
    assert "job 8 may not run this attempt" in again.communicate(timeout=PATIENCE)[0]
    assert again.returncode == slurm_script.REFUSED
    assert job.directory.started_job() == "7"


def test_what_was_given_up_does_not_start(tmp_path: Path) -> None:
    job = Job(tmp_path / "j", "touch trained")
    job.directory.fence()
    late = job.start()
    late.communicate(timeout=PATIENCE)
    assert late.returncode == slurm_script.REFUSED
    assert not (job.directory.path / "trained").exists()
    assert job.directory.exit_code() is None


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_becomes_the_wish_to_stop_and_keeps_the_exit_code(
    tmp_path: Path, number: signal.Signals
) -> None:
    job = Job(tmp_path / "j", "echo trains; until [ -e stop ]; do sleep 0.01; done; exit 5")
    process = job.start()
    assert process.stdout is not None
    assert process.stdout.readline() == "trains\n"
    process.send_signal(number)
    assert process.wait(timeout=PATIENCE) == 5
    process.stdout.close()
    assert job.directory.exit_code() == 5
    assert job.directory.told() == number.name.removeprefix("SIG")


def test_whatever_setup_sets_the_stop_and_the_exit_code_are_told(tmp_path: Path) -> None:
    job = Job(
        tmp_path / "j",
        "echo trains; until [ -e stop ]; do sleep 0.01; done; exit 5",
        slurm={"setup": "set -euo pipefail\ncd /\nexport MINE=1"},
    )
    process = job.start()
    assert process.stdout is not None
    assert process.stdout.readline() == "trains\n"
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=PATIENCE) == 5
    process.stdout.close()
    assert (job.directory.exit_code(), job.directory.told()) == (5, "USR1")


def test_the_machines_are_told_where_to_meet(tmp_path: Path) -> None:
    job = Job(tmp_path / "j", "env > env", nnodes=2, nproc_per_node=1)
    # The real one is in the script: it finds the port.
    text = job.directory.script_file.read_text().replace(
        "port=$(bash", f"port=$({shlex.quote(sys.executable)}"
    )
    job.directory.script_file.write_text(text)
    process = job.start()
    assert process.communicate(timeout=PATIENCE)[0] == ""
    told = dict(
        line.split("=", 1)
        for line in (job.directory.path / "env").read_text().splitlines()
        if line.startswith("PET_")
    )
    host, port = told.pop("PET_RDZV_ENDPOINT").split(":")
    assert (host, int(port) > 1023) == ("n1", True)
    assert told == {"PET_RDZV_CONF": "is_host=true", "PET_LOCAL_ADDR": "n1"}

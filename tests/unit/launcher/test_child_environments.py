"""What each process that sftd starts knows of its surroundings: every variable and its value, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sftd.domain.spec.sections import Launch
from sftd.domain.spec.spec import Spec
from sftd.launcher.command import environment, torchrun_argv, torchrun_argv_of_node
from sftd.launcher.slurm.attempt import job_environment
from sftd.launcher.tools import run_tool
from sftd.wire.attempt.directory import AttemptDir
from tests.builders.patience import PATIENCE
from tests.builders.process.slurm_jobs import Job

SECRET = "hush-hush-9"
# Every variable in which sftd, its database's driver or MLflow looks for a secret.
SECRETS = {
    "SFTD_DATABASE_URL": f"postgresql://a:{SECRET}@h/d",
    "SFTD_NOTIFY_WEBHOOK": f"https://hooks/{SECRET}",
    "SFTD_NOTIFY_COMMAND": f"notify --token {SECRET}",
    "SFTD_NOTIFY_ON": "failed",
    "PGPASSWORD": SECRET,
    "MLFLOW_TRACKING_URI": f"http://a:{SECRET}@h",
    "MLFLOW_TRACKING_USERNAME": SECRET,
    "MLFLOW_TRACKING_PASSWORD": SECRET,
    "MLFLOW_TRACKING_TOKEN": SECRET,
}
# What people set for their training.
THEIRS = {"PATH": "/bin", "HOME": "/home/ada", "NCCL_DEBUG": "INFO", "HF_TOKEN": "theirs", "SFTD_HOME": "/s"}
# What the daemon's own shell may have, and a rank must have of its own.
LEFT_OVER = {
    "CUDA_VISIBLE_DEVICES": "5,6",
    "CUDA_DEVICE_ORDER": "FASTEST_FIRST",
    "OMP_NUM_THREADS": "99",
    "SFTD_ATTEMPT_TOKEN": "of another attempt",
    "SFTD_DEVICE": "of another attempt",
    "PYTHONSAFEPATH": "",
    "PYTHONUNBUFFERED": "",
    "TOKENIZERS_PARALLELISM": "true",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0",
}
RANKS = {
    "SFTD_ATTEMPT_TOKEN": "t",
    "PYTHONSAFEPATH": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
ONE_HOST = {
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}


@pytest.mark.parametrize(
    ("device", "devices", "visible"),
    [
        ("cpu", ["cpu:0", "cpu:1"], ""),
        ("cuda", ["cuda:3"], "3"),
        ("cuda", ["cuda:6", "cuda:2", "cuda:0"], "6,2,0"),
        ("cuda", ["cuda:MIG-8a1b", "cuda:MIG-77c2"], "MIG-8a1b,MIG-77c2"),
    ],
)
def test_ranks_of_one_host(device: str, devices: list[str], visible: str) -> None:
    given = environment(THEIRS | SECRETS | LEFT_OVER, token="t", device=device, threads=3, devices=devices)
    assert given == {
        **THEIRS,
        **RANKS,
        **ONE_HOST,
        "SFTD_DEVICE": device,
        "OMP_NUM_THREADS": "3",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": visible,
    }


def test_the_interface_that_a_person_names_is_used() -> None:
    chosen = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib1"}
    given = environment(THEIRS | chosen, token="t", device="cpu", threads=1, devices=[])
    assert {name: given[name] for name in chosen} == chosen


def options(argv: list[str]) -> dict[str, str]:
    """Each option of torchrun's argv and its value."""
    end = argv.index("sftd.trainer")
    named = [word.removeprefix("--").partition("=") for word in argv[4 : end - 1]]
    return {
        "python": " ".join([Path(argv[0]).name, *argv[1:4]]),
        **{name: value for name, _, value in named},
        "trainer": " ".join(argv[end - 1 :]),
    }


def test_torchrun_of_one_host(tmp_path: Path) -> None:
    folder = AttemptDir(tmp_path / "run-1" / "attempt-0002")
    argv = torchrun_argv(Spec(launch=Launch(nproc_per_node=6)), folder)
    assert argv[0] == sys.executable
    assert options(argv) == {
        "python": f"{Path(sys.executable).name} -P -m torch.distributed.run",
        "rdzv-backend": "c10d",
        "rdzv-conf": "store_type=file",
        "rdzv-endpoint": str(folder.rendezvous_file),
        "rdzv-id": "run-1",
        "local-addr": "127.0.0.1",
        "nnodes": "1",
        "nproc-per-node": "6",
        # sftd restarts attempts itself: what torchrun restarts would write into the same journal.
        "max-restarts": "0",
        "log-dir": str(folder.ranks_dir),
        "redirects": "3",
        "trainer": f"-m sftd.trainer {folder.path}",
    }


def test_torchrun_of_each_of_several_hosts(tmp_path: Path) -> None:
    folder = AttemptDir(tmp_path / "run-1" / "attempt-0002")
    argv = torchrun_argv_of_node(Spec(launch=Launch(nproc_per_node=6, nnodes=3)), folder)
    assert options(argv) == {
        "python": f"{Path(sys.executable).name} -P -m torch.distributed.run",
        "rdzv-backend": "c10d",
        # Two attempts of a run never meet.
        "rdzv-id": "run-1-attempt-0002",
        "nnodes": "3",
        "nproc-per-node": "6",
        "max-restarts": "0",
        "log-dir": str(folder.ranks_dir),
        "redirects": "3",
        "trainer": f"-m sftd.trainer {folder.path}",
    }


def test_sbatch_and_the_job_that_it_takes_along() -> None:
    """The variables of ranks are exported by the job's script."""
    of_another_job = {
        "SLURM_JOB_ID": "3",
        "SLURM_NTASKS": "8",
        "SBATCH_REQUEUE": "1",
        "SBATCH_ARRAY_INX": "1-9",
    }
    where = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_CLUSTERS": "c"}
    its_own = {"CUDA_VISIBLE_DEVICES": "5,6", "OMP_NUM_THREADS": "99"}
    given = job_environment(THEIRS | SECRETS | its_own | of_another_job | where)
    assert given == THEIRS | where


@pytest.mark.parametrize(
    ("launch", "expected"),
    [
        (
            {"nproc_per_node": 2},
            {**ONE_HOST, "SFTD_DEVICE": "cpu", "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""},
        ),
        # Slurm sets which GPUs the job sees, and the script must not change it.
        (
            {"nproc_per_node": 8, "slurm": {"gres": "gpu:8"}, "device": "cuda"},
            {**ONE_HOST, "SFTD_DEVICE": "cuda", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "of Slurm"},
        ),
        (
            {"threads_per_rank": 7, "device": "cpu", "slurm": {"setup": "export GLOO_SOCKET_IFNAME=ib0"}},
            {
                **ONE_HOST,
                "GLOO_SOCKET_IFNAME": "ib0",
                "SFTD_DEVICE": "cpu",
                "OMP_NUM_THREADS": "7",
                "CUDA_VISIBLE_DEVICES": "",
            },
        ),
    ],
)
def test_ranks_of_a_job_on_one_machine(
    tmp_path: Path, launch: dict[str, Any], expected: dict[str, str]
) -> None:
    """As a real bash has them when it starts torchrun."""
    job = Job(tmp_path / "j", "env -0 > env", **launch)
    slurms = {
        "PATH": f"{job.commands}:/usr/bin:/bin",
        "CUDA_VISIBLE_DEVICES": "of Slurm",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_ON_NODE": "5",
    }
    subprocess.run(["bash", str(job.directory.script_file)], env=slurms, check=True, timeout=PATIENCE)
    assert given(job.directory.path / "env") == slurms | RANKS | expected


def given(file: Path) -> dict[str, str]:
    """What `env -0` wrote, without what each shell makes for itself."""
    found = dict(line.split("=", 1) for line in file.read_text().rstrip("\0").split("\0"))
    return {name: value for name, value in found.items() if name not in ("PWD", "OLDPWD", "SHLVL", "_")}


def test_a_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may run code of a model's folder, and needs none of our secrets."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nenv -0 > {tmp_path}/env\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    theirs = THEIRS | {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "5"}
    ranks = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}
    ranks |= {"MASTER_ADDR": "h", "MASTER_PORT": "1"}
    monkeypatch.setattr(os, "environ", theirs | SECRETS | ranks)
    assert run_tool("any", [], lambda line: None) == {}
    assert given(tmp_path / "env") == theirs

"""Job scripts of Slurm, run by a real bash without Slurm."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from sftd.domain.spec.parse import parse
from sftd.domain.spec.spec import Spec
from sftd.launcher.slurm import script as slurm_script
from sftd.wire.attempt.directory import AttemptDir, Order

TORCHRUN = ["python", "-m", "torch.distributed.run", "--nnodes=2", "it's"]


def spec_of(**launch: Any) -> Spec:
    launch = {"launcher": "slurm", **launch}
    config = {"model": {"path": "/m"}, "data": {"train_files": "/t"}, "launch": launch}
    return parse(config)[0]


def order_of(spec: Spec) -> Order:
    return Order(
        run_id="brave-otter-12ab", attempt=2, token="t", spec=spec, planned_steps=3, checkpoint_dir="/c"
    )


def script_of(folder: str | Path = "/s/attempt-0002", torchrun: list[str] = TORCHRUN, **launch: Any) -> str:
    return slurm_script.script(order_of(spec_of(**launch)), AttemptDir(folder), torchrun)


class Job:
    """The script under a real bash, with `srun` that runs its command here."""

    def __init__(self, folder: Path, command: str, **launch: Any) -> None:
        folder.mkdir()
        self.directory = AttemptDir(folder / "attempt 1")
        self.directory.path.mkdir()
        self.commands = folder / "bin"
        self.commands.mkdir()
        srun = self.commands / "srun"
        # Without the options, what follows is the command.
        srun.write_text('#!/bin/bash\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n')
        srun.chmod(0o700)
        self.directory.script_file.write_text(
            script_of(self.directory.path, ["bash", "-c", command], **launch)
        )

    def start(self, job: int = 7) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.directory.script_file)],
            env={
                "PATH": f"{self.commands}:/usr/bin:/bin",
                "SLURM_JOB_ID": str(job),
                "SLURM_CPUS_ON_NODE": "5",
                "SLURMD_NODENAME": "n1",
                "SLURM_NODEID": "0",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

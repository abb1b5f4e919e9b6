"""Starts the trainer without a daemon, under the real torchrun or alone, and the real `sftd` on what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import yaml

from sftd.domain.log.events import Event, StepCompleted
from sftd.wire.attempt import journal
from sftd.wire.attempt.direct_run import DirectRun
from tests.builders import warm_python
from tests.builders.holds import Holds
from tests.builders.paths import ROOT
from tests.builders.patience import PATIENCE


def environment(**more: str) -> dict[str, str]:
    """As on a machine without GPUs where warnings are errors. Where this process has WARM, so have those that it starts."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SFTD_", "MLFLOW_"))}
    own = {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "error",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    if server := os.environ.get(warm_python.VARIABLE):
        own |= warm_python.environment(server, own)
    return kept | own | more


class Direct:
    """A config in a folder of its own, and commands that train it."""

    def __init__(self, folder: Path, model: Path, data: Path, **trainer: Any) -> None:
        self.folder = folder
        self.holds = Holds(folder / "holds")
        self.config = folder / "run.yaml"
        self.config.write_text(
            yaml.safe_dump(
                {
                    "model": {"partial_pretrain": str(model)},
                    "data": {
                        "train_files": [str(data / "train.parquet")],
                        "train_batch_size": 8,
                        "sequence_length": 64,
                    },
                    "optimizer": {"lr": 1e-3},
                    "scheduler": {"warmup_steps": 2, "min_lr_ratio": 0.1},
                    "trainer": {"max_steps": 6, "save_interval": 3} | trainer,
                    "checkpoint": {"save_dir": str(folder / "out")},
                    "launch": {"device": "cpu"},
                }
            )
        )

    def argv(self, ranks: int | None, *arguments: str) -> list[str]:
        """The command; `ranks` None is one rank without torchrun."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        return [
            *(sys.executable, *(torchrun if ranks else [])),
            *("-m", "sftd.trainer", str(self.config), *arguments),
        ]

    def start(self, ranks: int | None, *arguments: str, cold: bool = False) -> subprocess.Popen[str]:
        """Start training. `cold`: every process imports by itself, fixture `forked` or not."""
        env = environment(**({warm_python.VARIABLE: ""} if cold else {}))
        return subprocess.Popen(
            self.argv(ranks, *arguments),
            cwd=self.folder,
            env=env | self.holds.environment(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def held(self, name: str, process: subprocess.Popen[str]) -> psutil.Process:
        """Wait until the first attempt of a run has stopped where `holds` says. Returns the rank that reports."""
        return self.holds.wait(self.run(name).attempt(1).path, lambda: process.poll() is not None)

    def train(self, ranks: int | None, *arguments: str, expect: int = 0) -> tuple[str, str]:
        """Train to the end, which must have the exit code `expect`. Returns stdout and stderr."""
        process = self.start(ranks, *arguments)
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == expect, f"exit code {process.returncode}\n{out}\n{err[-6000:]}"
        return out, err

    def run(self, name: str) -> DirectRun:
        """The folder of a run."""
        return DirectRun(self.folder / "out" / name)


def events(run: DirectRun, attempt: int = 1) -> list[Event]:
    """What an attempt's journal holds."""
    return [line.event for line in journal.read(run.attempt(attempt).journal, limit=10**9)[0]]


def exact(found: list[Event]) -> dict[int, tuple[Any, ...]]:
    """What of each step must be the same bit for bit."""
    return {
        s.step: (s.loss, s.grad_norm, s.lr, s.epoch, s.tokens, s.tokens_total, s.samples_digest)
        for s in found
        if isinstance(s, StepCompleted)
    }


def sftd(home: Path, *arguments: str, expect: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The `sftd` command in a home of its own."""
    env = environment(SFTD_HOME=str(home), MLFLOW_TRACKING_URI="", COLUMNS="200")
    done = subprocess.run(
        [sys.executable, "-m", "sftd", *arguments],
        env=env | {warm_python.COMMAND_VARIABLE: "1"},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == expect, f"sftd {arguments} → {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def show(home: Path, run_id: str) -> dict[str, Any]:
    """The run's state."""
    return json.loads(sftd(home, "show", run_id, "--json").stdout)

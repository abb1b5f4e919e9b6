"""Attempts of a tiny model under the real trainer: the order, the start, the events of one that has ended."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from sftd.domain.log.events import Event, StepCompleted, ValidationCompleted
from sftd.domain.spec.parse import parse
from sftd.domain.spec.spec import Spec
from sftd.wire.attempt import journal
from sftd.wire.attempt.directory import AttemptDir, Order
from tests.builders import warm_python
from tests.builders.holds import Holds
from tests.builders.patience import HUNG, PATIENCE
from tests.builders.trainer.tiny_models import TRAIN_ROWS
from tests.builders.warm_ranks import Fault, Ranks, WarmTrainer

# Where overrides of the layout are in a spec.
MEGATRON = "model__megatron__"
E = TypeVar("E", bound=Event)


@dataclass(frozen=True)
class Run:
    """An attempt that has ended."""

    attempt: AttemptDir
    code: int
    output: str

    def events(self, kind: type[E]) -> list[E]:
        """Its events of one type, in order."""
        return [e for e in self.all_events() if isinstance(e, kind)]

    def all_events(self) -> list[Event]:
        """Its events in order."""
        return [line.event for line in journal.read(self.attempt.journal)[0]]

    def steps(self) -> dict[int, StepCompleted]:
        """Its steps by number."""
        return {e.step: e for e in self.events(StepCompleted)}

    def validations(self) -> dict[int, ValidationCompleted]:
        """Its validations by step."""
        return {e.step: e for e in self.events(ValidationCompleted)}

    def checkpoint(self, step: int) -> Path:
        """Folder of a published checkpoint."""
        return Path(self.attempt.order().checkpoint_dir) / f"step-{step:08d}"

    def errors(self) -> str:
        """What the ranks wrote into torchelastic's error files."""
        return "\n".join(p.read_text() for p in self.attempt.ranks_dir.rglob("error.json"))


class Trainer:
    """Prepares and runs attempts of the tiny Llama."""

    def __init__(
        self,
        root: Path,
        models: Path,
        data: Path,
        *,
        device: str = "cpu",
        strict: bool = True,
        warm: str | None = None,
    ) -> None:
        """`strict`: warnings are errors; not on a GPU machine, whose libraries and their warnings are its own. `warm`: what the
        fixture `warm_python` is; without it every torchrun and rank is an interpreter of its own."""
        self._root = root
        self._device = device
        self._strict = strict
        self._warm = warm
        self.models = models
        self._data = data
        self._done: dict[str, Run] = {}
        self.holds = Holds(root / "holds")

    def spec(self, ranks: int = 1, **overrides: Any) -> Spec:
        """Six steps of eight samples; `overrides` are dotted keys with __ for the dot."""
        config = {
            "model": {"partial_pretrain": str(self.models / "llama_tied")},
            "data": {
                "train_files": [str(self._data / "train.parquet")],
                "val_files": [str(self._data / "val.parquet")],
                "train_batch_size": 8,
                "sequence_length": 64,
            },
            "optimizer": {"lr": 1e-3},
            "scheduler": {"warmup_steps": 2, "min_lr_ratio": 0.1},
            "trainer": {"max_steps": 6, "save_interval": 3, "val_check_interval": 2},
            "launch": {"nproc_per_node": ranks, "device": self._device},
        }
        return parse(config, [(key.replace("__", "."), value) for key, value in overrides.items()])[0]

    def prepare(self, name: str, spec: Spec, **order: Any) -> AttemptDir:
        """Write the order of an attempt."""
        attempt = AttemptDir(self._root / name)
        shutil.rmtree(attempt.path, ignore_errors=True)
        fields = {
            "checkpoint_dir": str(attempt.path / "checkpoints"),
            "planned_steps": spec.planned_steps(TRAIN_ROWS),
        }
        attempt.create(Order(run_id="run", attempt=1, token="token", spec=spec, **fields | order))
        return attempt

    def start(
        self,
        attempt: AttemptDir,
        *,
        largest_file: int | None = None,
        script: Path | None = None,
        cold: bool = False,
    ) -> subprocess.Popen[bytes]:
        """torchrun on an attempt, warnings being errors. `script` takes the trainer's place. `cold`: all imports are its own.

        Writing past `largest_file` bytes of a file fails with EFBIG, like a full disk.
        """
        ranks = attempt.order().spec.world_size
        argv = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "1",
            "--nproc-per-node",
            str(ranks),
        ]
        argv += ["--standalone", "--max-restarts", "0", "--log-dir", str(attempt.ranks_dir)]
        argv += [str(script)] if script else ["-m", "sftd.trainer"]

        def limit() -> None:
            if largest_file is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

        with open(attempt.output_log, "wb") as log:
            return subprocess.Popen(
                [*argv, str(attempt.path)],
                env=self.environment(cold=cold),
                stdout=log,
                stderr=log,
                preexec_fn=limit,
            )

    def environment(self, *, cold: bool = False) -> dict[str, str]:
        """Of processes that train, or work on what was trained."""
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        if self._strict:
            environment["PYTHONWARNINGS"] = "error"
        if self._device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        environment |= self.holds.environment(environment)
        if self._warm is not None and not cold:
            environment[warm_python.VARIABLE] = self._warm
        return environment

    def held(self, attempt: AttemptDir, process: subprocess.Popen[bytes]) -> psutil.Process:
        """Wait until an attempt is stopped where `holds` says. Returns the rank that reports."""
        return self.holds.wait(attempt.path, lambda: process.poll() is not None)

    def finish(self, attempt: AttemptDir, process: subprocess.Popen[bytes], *, expect: int | None = 0) -> Run:
        """Wait for the end; anything but the expected exit code fails the test with the output."""
        try:
            code = process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(_hung(attempt, process))
        output = attempt.output_log.read_text(errors="replace")
        if expect is not None and code != expect:
            pytest.fail(f"exit code {code}\n{output[-6000:]}")
        return Run(attempt, code, output)

    def train(
        self, warm: WarmTrainer, attempt: AttemptDir, *, expect: int = 0, faults: Sequence[Fault] = ()
    ) -> Run:
        """Train an attempt to its end without torchrun."""
        return self.ended(attempt, self.start_warm(warm, attempt, faults), expect=expect)

    def start_warm(self, warm: WarmTrainer, attempt: AttemptDir, faults: Sequence[Fault] = ()) -> Ranks:
        """The ranks of an attempt without torchrun."""
        return warm.attempt(attempt.path, attempt.order().spec.world_size, attempt.output_log, faults)

    def ended(self, attempt: AttemptDir, ranks: Ranks, *, expect: int = 0) -> Run:
        """Wait for the end; anything but the expected exit code of a rank fails the test with the output."""
        codes = ranks.wait()
        run = Run(attempt, codes[0], attempt.output_log.read_text(errors="replace"))
        if any(code != expect for code in codes):
            pytest.fail(f"exit codes {codes}\n{run.output[-6000:]}")
        return run

    def together(
        self, attempts: Mapping[str, AttemptDir], script: Path, warm: WarmTrainer | None = None
    ) -> dict[str, Run]:
        """Run a script of tests/builders/ranks on attempts of one layout, one after the other in one set of processes: by torchrun, or
        without it on the `warm` ones."""
        first = next(iter(attempts.values()))
        (first.path / "attempts.json").write_text(json.dumps([str(a.path) for a in attempts.values()]))
        if warm is None:
            whole = self.finish(first, self.start(first, script=script))
        else:
            ranks = first.order().spec.world_size
            whole = self.ended(first, warm.script(script, [str(first.path)], ranks, first.output_log))
        return {name: Run(a, whole.code, whole.output) for name, a in attempts.items()}

    def run(self, name: str, ranks: int = 1, **overrides: Any) -> Run:
        """Train an attempt from the pretrained model to its end, once per name in the whole test session."""
        if name not in self._done:
            spec = self.spec(ranks, **overrides)
            attempt = self.prepare(name, spec)
            process = self.start(attempt)
            if (stacks := self._hangs(attempt, process)) is not None:
                # Twice in 20,000 starts, and not explained: of warm ones only, so a cold one decides. The end of the session says it.
                (self.models.parent / f"{HUNG}{name}.txt").write_text(stacks)
                attempt = self.prepare(name, spec)
                process = self.start(attempt, cold=True)
                if (stacks := self._hangs(attempt, process)) is not None:
                    pytest.fail(stacks)
            self._done[name] = self.finish(attempt, process)
        return self._done[name]

    @staticmethod
    def _hangs(attempt: AttemptDir, process: subprocess.Popen[bytes]) -> str | None:
        """Wait for the end. The stacks if it does not come within half of the patience."""
        try:
            process.wait(timeout=PATIENCE / 2)
        except subprocess.TimeoutExpired:
            return _hung(attempt, process)
        return None


def _hung(attempt: AttemptDir, process: subprocess.Popen[bytes]) -> str:
    """What the ranks of an attempt that does not end are doing, and what they printed. Ends them."""
    ranks = []
    for other in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            # A warm rank has its own environment, but not its own command line.
            environment = other.environ()
            if "RANK" in environment and str(attempt.path) in environment.get("TORCHELASTIC_ERROR_FILE", ""):
                ranks.append(other)
    told = [f"{attempt.path} did not end in time; ranks {sorted(rank.pid for rank in ranks)}"]
    for rank in ranks:
        with contextlib.suppress(psutil.Error):
            # The trainer answers with its stacks; a rank that has not begun it ends.
            rank.send_signal(signal.SIGUSR1)
            states = [Path(f"/proc/{rank.pid}/task/{t.id}/wchan").read_text() for t in rank.threads()]
            told.append(f"{rank.pid}: {rank.status()}, threads wait in {states}")
    psutil.wait_procs(ranks, timeout=5.0)
    process.kill()
    for rank in ranks:
        with contextlib.suppress(psutil.Error):
            rank.kill()
    process.wait()
    told += [f"{f.name}:\n{f.read_text(errors='replace')}" for f in sorted(attempt.stacks_dir.glob("*"))]
    return "\n".join([*told, attempt.output_log.read_text(errors="replace")[-6000:]])

"""The processes of an evaluation: a tool of the trainer, or an export and then the user's program. They end with the process
that started them, SIGKILL included: a lost evaluation never runs beside its second try."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import msgspec

from sftd.domain.errors import quote, shorten
from sftd.domain.log import events as e
from sftd.domain.queue.demand import Need
from sftd.domain.run import evaluations as decisions
from sftd.domain.run.state import CheckpointInfo, EvaluationState
from sftd.domain.spec.evaluation_section import EVALUATIONS, CommandEvaluation
from sftd.domain.text.printable import printable
from sftd.launcher import processes
from sftd.launcher.command import environment
from sftd.launcher.tools import tool_argv
from sftd.wire.attempt.directory import AttemptDir, Order
from sftd.wire.attempt.secrets import Secrets

# The shell leads the group of all processes. Standard input closes when the daemon ends.
_TIED = (
    'exec 3<&0 </dev/null; "$@" 3<&- & run=$!; { read -r _ <&3; kill -9 "-$$"; } & watch=$!; '
    'wait "$run"; code=$?; kill "$watch"; exit "$code"'
)
_USER_ERROR = 2
# A program may print in an endless loop.
_MOST_BYTES = 16 << 20
_MOST_METRICS = 1000
# The names that MLflow accepts.
_METRIC = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./ -]{0,99}")


class Done(msgspec.Struct, frozen=True):
    """The last line of the tool `evaluate`. `answers` is the Parquet file with the answers."""

    metrics: dict[str, Any]
    questions: int = 0
    questions_digest: str = ""
    environment: dict[str, Any] = {}
    answers: str | None = None


class Unusable(Exception):
    """What a program printed is not a result."""


class EvaluationProcess:
    """A running evaluation. Everything that it writes is in `folder`, which is emptied first."""

    def __init__(
        self,
        folder: Path,
        evaluation: EVALUATIONS,
        state: EvaluationState,
        checkpoint: CheckpointInfo,
        order: Order,
        need: Need,
        devices: list[str],
    ) -> None:
        """Start it. Raises `OSError`, and then nothing runs."""
        self._folder = folder
        self._evaluation = evaluation
        self._state = state
        self._began = time.monotonic()
        self._is_over = False
        self.token = token_of(order.run_id, state)
        shutil.rmtree(folder, ignore_errors=True)
        attempt = AttemptDir(folder / "attempt")
        attempt.create(order)
        where = [str(attempt.order_file), checkpoint.path]
        digest = ["--digest", checkpoint.manifest_digest]
        self._env = environment(
            os.environ, token=self.token, device=need.device, threads=need.threads, devices=devices
        ) | {
            "SFTD_EVALUATION_NAME": state.name,
            "SFTD_EVALUATION_OUTPUT": str(folder),
            "SFTD_EVALUATION_RUN": order.run_id,
            "SFTD_EVALUATION_STEP": str(state.step),
        }
        if isinstance(evaluation, CommandEvaluation):
            model = str(folder / "model")
            self._stages = [tool_argv("export", [*where, model, *digest]), [*evaluation.argv, model]]
        else:
            written = folder / "evaluation.json"
            written.write_bytes(msgspec.json.encode(evaluation))
            arguments = [*where, "--evaluation", str(written), "--output", str(folder), *digest]
            self._stages = [tool_argv("evaluate", [*arguments, "--device", need.device])]
        self._start()

    def _start(self) -> None:
        argv = self._stages.pop(0)
        with open(self._output, "wb") as output, open(self._errors, "wb") as errors:
            self._child = subprocess.Popen(
                ["/bin/sh", "-c", _TIED, "evaluation", *argv],
                cwd=self._folder,
                env=self._env,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=errors,
                start_new_session=True,
                umask=0o077,
            )

    def _let_go(self) -> None:
        """Close the pipe to a stage that has ended."""
        if self._child.stdin is not None:
            self._child.stdin.close()

    @property
    def _output(self) -> Path:
        return self._folder / "output"

    @property
    def _errors(self) -> Path:
        return self._folder / "errors"

    def poll(self) -> e.EvaluationCompleted | e.EvaluationFailed | None:
        """The end of the evaluation as an event; None while it runs. Raises `OSError`."""
        code = self._child.poll()
        if code is None:
            limit = self._evaluation.timeout_seconds
            if time.monotonic() - self._began > limit:
                return self._failed("timeout", f"it did not end within {limit:,} s and was killed")
            if max(path.stat().st_size for path in (self._output, self._errors)) > _MOST_BYTES:
                return self._failed("output", f"it printed more than {_MOST_BYTES >> 20} MiB and was killed")
            return None
        if code == 0 and self._stages:
            self._let_go()
            self._start()
            return None
        if code == 0:
            try:
                return self._completed()
            except Unusable as error:
                return self._failed("output", str(error))
        # The shell adds 128 to the number of the signal that ended its child.
        number = -code if code < 0 else code - 128
        if code < 0 or number in signal.valid_signals():
            said = self._said()
            return self._failed("killed", f"by {_signal_name(number)}" + (f": {said}" if said else ""))
        cause = "refused" if code == _USER_ERROR else "error"
        return self._failed(cause, self._said() or f"it ended with exit code {code}")

    def _failed(self, cause: str, message: str) -> e.EvaluationFailed:
        self.kill()
        return decisions.failed(self._state, cause, message)

    def _completed(self) -> e.EvaluationCompleted:
        text = self._output.read_text(errors="replace")
        if isinstance(self._evaluation, CommandEvaluation):
            done = Done(_one_object(text), environment={"argv": self._evaluation.argv})
            answers = self._folder / "answers.parquet"
            done = msgspec.structs.replace(done, answers=str(answers) if answers.is_file() else None)
        else:
            try:
                done = msgspec.json.decode(text.strip().rpartition("\n")[2], type=Done)
            except msgspec.MsgspecError as error:
                raise Unusable(f"the tool's last line is not a result ({error}): {_seen(text)}") from None
        metrics = usable_metrics(done.metrics, text)
        self.kill()
        return e.EvaluationCompleted(
            name=self._state.name,
            step=self._state.step,
            kind=self._evaluation.kind,
            metrics=metrics,
            questions=done.questions,
            questions_digest=done.questions_digest,
            manifest_digest=self._state.manifest_digest,
            environment=done.environment,
            seconds=time.monotonic() - self._began,
            answers=done.answers,
        )

    def _said(self) -> str:
        """The end of what it wrote to standard error, without secrets."""
        text = self._errors.read_bytes()[-2000:].decode(errors="replace").strip()
        return printable(Secrets.of(os.environ).hide(text))[-500:]

    def kill(self) -> None:
        """SIGKILL every process of the evaluation, and delete the exported model."""
        if self._is_over:
            return
        if self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
        # Some processes may have left the group, or remain in it without the shell.
        processes.kill(processes.survivors(self.token))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=5)
        self._let_go()
        self._is_over = True
        shutil.rmtree(self._folder / "model", ignore_errors=True)


def token_of(run_id: str, started: EvaluationState) -> str:
    """The text that marks every process of a started evaluation."""
    return f"evaluation {run_id} {started.started}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _one_object(text: str) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Unusable(f"it must print one JSON object of numbers, and printed {_seen(text)}")
    return found


def usable_metrics(found: dict[str, Any], text: str) -> dict[str, float]:
    """The metrics as floats. Raises `Unusable` unless each has a usable name and is a finite number."""
    if not found or len(found) > _MOST_METRICS:
        raise Unusable(
            f"it must print 1 to {_MOST_METRICS:,} metrics, and printed {len(found):,}: {_seen(text)}"
        )
    metrics = {}
    for name, value in found.items():
        if not _METRIC.fullmatch(name):
            raise Unusable(f"{quote(name)} is not the name of a metric: use letters, digits and _ . / -")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(float(value)):
            raise Unusable(f"the metric {name} is not a finite number: {quote(value)}")
        metrics[name] = float(value)
    return metrics


def _seen(text: str) -> str:
    """The beginning of an untrusted output, for a message."""
    shown = printable(Secrets.of(os.environ).hide(text[:400]).strip())
    return quote(shorten(shown)) if shown else "nothing"

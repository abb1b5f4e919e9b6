"""Training without a daemon or a database: `torchrun --nproc-per-node=8 -m sftd.trainer [CONFIG] [KEY=VALUE]...`.

Rank 0 does the work of submit and the daemon: it checks the config and the files in it, chooses the start of the attempt
and writes its order. The other ranks wait for the order in torchrun's store. Events are shown on the terminal and written
in the daemon's format, so that `sftd import` can load the run into the event store. The same command continues from the
last published checkpoint.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import msgspec
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sftd.domain.errors import CheckpointInvalid
from sftd.domain.log import events as e
from sftd.domain.repro.steps import steps_to_redo
from sftd.domain.run.exactness import compare_with_log
from sftd.domain.run.retention import deletable
from sftd.domain.run.state import Run
from sftd.domain.run.success import shortfall
from sftd.trainer.direct.plan import plan
from sftd.trainer.errors import LossSpike, NonFiniteLoss, UserError
from sftd.trainer.loop import attempt as loop
from sftd.trainer.runtime import process
from sftd.trainer.runtime import rendezvous as rendezvous_module
from sftd.trainer.runtime.console import print_text
from sftd.trainer.runtime.reporter import Reporter
from sftd.wire.attempt.direct_run import DirectRun, read_history, take
from sftd.wire.attempt.directory import AttemptDir
from sftd.wire.attempt.journal import now_micros
from sftd.wire.checkpoint.directory import is_checkpoint_of, remove, unread

USAGE = """\
usage: torchrun --nproc-per-node=N -m sftd.trainer [CONFIG] [KEY=VALUE]...

Train without a daemon. CONFIG is a YAML file, KEY=VALUE is laid over it; `sftd config` lists every key.
The run goes to <checkpoint.save_dir>/<trainer.experiment_name>; the same command again continues it.
"""
_PLAN = "plan"
# Rank 0 reads every row of the data files, which can take many minutes.
_CHECKS = timedelta(hours=12)
# Ctrl-C, a closed terminal, and the cluster's stop. torchrun forwards each to the ranks.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


def main(arguments: Sequence[str]) -> None:
    """Run one rank of a run without a daemon."""
    if {"-h", "--help"} & set(arguments):
        if os.environ.get("RANK", "0") == "0":
            print_text(USAGE)
        return
    # A sample answer may contain characters that the terminal's encoding lacks.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # While there is nothing to save, a signal ends this process at once.
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    try:
        process.use_single_process_defaults()
    except UserError as error:
        sys.stderr.write(f"sftd: {error}\n")
        sys.exit(2)
    rank = int(os.environ["RANK"])
    # A single rank uses the loopback device, several ranks use torchrun's address.
    store = rendezvous_module.store(None) or next(rendezvous("env://"))[0]
    # torchrun's store outlives a restart of the ranks.
    store = PrefixStore(f"sftd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    store.set_timeout(_CHECKS)
    hold = None
    if rank == 0:
        path, exit_code, hold = plan(arguments)
        store.set(_PLAN, path)
        if exit_code:
            sys.exit(exit_code)
    else:
        path = store.get(_PLAN).decode()
    if not path:
        return
    attempt = AttemptDir(path)
    run = DirectRun(attempt.path.parent)
    # While this process lives, the hold blocks a second start and an import of this run.
    hold = hold or run.share_hold()
    _train(run, attempt)
    if rank == 0:
        if process.stop_signalled():
            attempt.request_stop()
        attempt.write_exit_code(0)
        _conclude(run, attempt)
    hold.close()


def _train(run: DirectRun, attempt: AttemptDir) -> None:
    spec = attempt.order().spec
    if spec.launch.threads_per_rank is not None:
        os.environ["OMP_NUM_THREADS"] = str(spec.launch.threads_per_rank)
    for number in _STOP_SIGNALS:
        process.stop_on(number)
    try:
        loop.run(str(attempt.path), lambda folder, reports: DirectReporter(run, folder, reports))
    except (UserError, CheckpointInvalid, LossSpike, NonFiniteLoss) as error:
        _leave_error(attempt, error)
        if os.environ["RANK"] != "0":
            raise
        # The user can fix this: print one sentence, once, without a stack.
        sys.stderr.write(f"sftd: {error}\n")
        sys.exit(2 if isinstance(error, UserError) else 1)
    except BaseException as error:
        _leave_error(attempt, error)
        raise


def _leave_error(attempt: AttemptDir, error: BaseException) -> None:
    """Write the rank's error in torchelastic's format. torchelastic's own file is in a temporary folder."""
    message = {
        "message": f"{type(error).__name__}: {error}",
        "extraInfo": {"py_callstack": traceback.format_exc(), "timestamp": str(int(time.time()))},
    }
    attempt.write_rank_error(int(os.environ["LOCAL_RANK"]), json.dumps({"message": message}))


def _conclude(run: DirectRun, attempt: AttemptDir) -> None:
    submission = run.submission()
    assert submission is not None
    state = read_history(run, submission).run
    if state.status == "succeeded":
        done = (
            f"All {state.step} steps are done."
            if state.stopped_early is None
            else f"Stopped early at step {state.step}."
        )
        outcome = f"{done} The last checkpoint: {state.checkpoints[-1].path}\n"
    elif state.status == "cancelled":
        outcome = (
            f"Stopped at step {state.step} of {state.planned_steps}; the same command again continues.\n"
        )
    else:
        outcome = f"Ended early: {state.message}\n"
    print_text(
        f"{outcome}Into the event store, for `sftd show` and MLflow: sftd import {shlex.quote(str(run.path))}\n"
    )


@dataclass(frozen=True)
class _Seen:
    """The run's state so far, and the logged steps that the reporting rank must reproduce."""

    run: Run
    log: dict[int, e.StepCompleted]


class DirectReporter(Reporter):
    """Shows each event on the terminal and deletes checkpoints that no retention rule protects, as the daemon does."""

    def __init__(self, run: DirectRun, attempt: AttemptDir, is_reporter: bool) -> None:
        super().__init__(attempt, is_reporter)
        self._number = attempt.order().attempt
        submission = run.submission()
        assert submission is not None
        self._seen = None
        if is_reporter:
            history = read_history(run, submission, living=self._number)
            self._seen = _Seen(history.run, steps_to_redo(n.event for n in history.events))

    def emit(self, event: e.Event) -> None:
        """Append an event to the journal and show it."""
        super().emit(event)
        if self._seen is None:
            return
        seen = self._seen
        self._seen = _Seen(take(seen.run, event, now_micros(), self._number), seen.log)
        self._show(event)
        redone = compare_with_log(seen.log, seen.run, event)
        if redone is not None and (anomaly := redone.anomaly):
            # Not journalled: readers of the history compare the steps themselves.
            self._show(anomaly)
        if isinstance(event, e.CheckpointPublished):
            self._collect()

    def _show(self, event: e.Event) -> None:
        assert self._seen is not None
        if line := event.line(self._seen.run.planned_steps):
            print_text(f"{line}\n")

    def _collect(self) -> None:
        assert self._seen is not None
        run = self._seen.run
        if shortfall(run) is None:
            # The run is complete, so retention no longer protects its superseded checkpoints.
            run = msgspec.structs.replace(run, status="succeeded")
        for c in deletable(run):
            if not is_checkpoint_of(c.path, run.run_id):
                continue
            with unread(Path(c.path)) as free:
                if free:
                    # Record first: a leftover folder is harmless, a recorded checkpoint without its folder is not.
                    reason = "superseded" if c.superseded else "retention"
                    self.emit(e.CheckpointDeleted(step=c.step, path=c.path, bytes=c.bytes, reason=reason))
                    remove(Path(c.path))

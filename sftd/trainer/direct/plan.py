"""Rank 0's checks before a run without a daemon starts, and the order of its next attempt."""

from __future__ import annotations

import getpass
import os
import socket
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil

from sftd.domain.errors import Problem, Refused, SftdError
from sftd.domain.log.events import CheckpointDeleted
from sftd.domain.log.model_record import ModelRecord, record_of
from sftd.domain.model.rules import changed_files
from sftd.domain.run import decisions, early_stop, ids
from sftd.domain.run.decisions import Proposal
from sftd.domain.run.loss_watch import losses_before
from sftd.domain.run.state import Run
from sftd.domain.spec.spec import Spec, spec_digest
from sftd.domain.submit.facts import SubmitFacts
from sftd.domain.text.words import counted
from sftd.trainer.runtime import process
from sftd.trainer.runtime.console import print_text
from sftd.wire import preflight
from sftd.wire.attempt.direct_run import DirectHistory, DirectRun, DirectSubmission, Hold, read_history
from sftd.wire.attempt.directory import AttemptDir, ProcessFile
from sftd.wire.attempt.journal import now_micros
from sftd.wire.attempt.orders import order_of
from sftd.wire.checkpoint import directory as checkpoint_dir
from sftd.wire.preflight import Preflight
from sftd.wire.spec import file as spec_file

_DEFAULT_SAVE_DIR = "sftd-runs"
_REFUSED = 2
_BEGIN_ANOTHER = "begin another: trainer.experiment_name=NAME"


def plan(arguments: Sequence[str]) -> tuple[str, int, Hold | None]:
    """Check everything and write the order of the next attempt.

    Returns the attempt's folder, or "" when there is nothing to train; the exit code; and the hold on the run.
    """
    hold = None
    try:
        spec, warnings = _read_spec(arguments)
        run = DirectRun(Path(spec.checkpoint.save_dir) / _run_name(spec))
        has_checkpoint = any(run.checkpoint_dir.glob("step-*"))
        known = SubmitFacts(own_gpus=_own_gpus(spec), has_checkpoint=has_checkpoint)
        found = preflight.inspect(spec, known=known)
        hold = run.hold()
        attempt = _begin(run, spec, found, [*warnings, *found.warnings])
        if attempt is None:
            return "", 0, hold
        hold.share()
        return str(attempt.path), 0, hold
    except (SftdError, OSError) as error:
        _print_error(error)
        return "", _REFUSED if isinstance(error, Refused) else 1, hold


def _read_spec(arguments: Sequence[str]) -> tuple[Spec, list[Problem]]:
    """The spec from CONFIG and KEY=VALUE, with torchrun's number of ranks and nodes."""
    config, overrides = None, list(arguments)
    if overrides and ("=" not in overrides[0] or os.path.isfile(overrides[0])):
        config, *overrides = overrides
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    overrides += [f"launch.nproc_per_node={local}", f"launch.nnodes={world // local}"]
    spec, warnings = spec_file.read(config, overrides, os.getcwd())
    if not spec.checkpoint.save_dir:
        folder = str(Path.cwd() / _DEFAULT_SAVE_DIR)
        checkpoint = msgspec.structs.replace(spec.checkpoint, save_dir=folder)
        spec = msgspec.structs.replace(spec, checkpoint=checkpoint)
    return spec, warnings


def _own_gpus(spec: Spec) -> int | None:
    """The number of GPUs of this host; None for a run on CPUs."""
    if process.device_kind(spec) == "cpu":
        return None
    import torch

    return torch.cuda.device_count()


def _run_name(spec: Spec) -> str:
    return ids.folder_name(spec.trainer.experiment_name) or f"run-{spec_digest(spec)[:12]}"


def _begin(run: DirectRun, spec: Spec, found: Preflight, warnings: list[Problem]) -> AttemptDir | None:
    """Write the order of the run's next attempt. None when the run has succeeded. Raises `Refused`."""
    submission = run.submission()
    if submission is None:
        user = _user()
        event = preflight.submission(spec, found, warnings, user)
        submission = DirectSubmission.of(ids.run_id(os.urandom(4)), now_micros(), event)
        run.write_submission(submission)
    history = read_history(run, submission)
    state, new = history.run, preflight.proposal(spec, found)
    record = record_of(n.event for n in history.events)
    checkpoint = state.restart_checkpoint
    _refuse_another_run(run, state, new)
    weights = checkpoint is None or spec.model.is_partly_frozen
    _refuse_another_model(run, record, spec, found, weights=weights)
    text = f"sftd: run {state.run_id} in {run.path}\n"
    is_same_rule = spec.trainer.early_stop == state.spec.trainer.early_stop
    if (
        state.status == "succeeded"
        and new.planned_steps == state.planned_steps
        and (state.stopped_early is None or is_same_rule)
    ):
        done = f"All of its {state.planned_steps} steps are done"
        more = "a larger trainer.max_steps"
        if state.stopped_early is not None:
            done = f"It stopped early: {state.stopped_early.reason}"
            more = "another trainer.early_stop, such as null"
        print_text(
            f"{text}{done}, so nothing is left to train.\n"
            f"To train more give {more}, for another run another trainer.experiment_name.\n"
        )
        return None
    _sweep(run, history)
    attempt = run.attempt(run.attempts() + 1)
    first, events = checkpoint.step if checkpoint else 0, [n.event for n in history.events]
    next_state = msgspec.structs.replace(
        state,
        spec=spec,
        planned_steps=new.planned_steps,
        patience_from=early_stop.counts_from(state, state.step),
    )
    attempt.create(
        order_of(
            next_state,
            checkpoint,
            attempt=run.attempts() + 1,
            token=uuid.uuid4().hex,
            checkpoint_dir=run.checkpoint_dir,
            model=record,
            model_root=run.path,
            losses=losses_before(events, first),
            patience=early_stop.before(events, next_state, first),
        )
    )
    attempt.write_process(_identity(spec))
    start = f"step {checkpoint.step}" if checkpoint else "the pretrained model"
    how = "continues" if state.attempt else "starts"
    if record.files is None:
        text += "An older sftd began it without recording the model folder, so a change cannot be detected.\n"
    text += f"Attempt {state.attempt + 1} {how} from {start}: {_layout(spec)}, {counted(new.planned_steps, 'step')}\n"
    text += "".join(f"warning: {warning}\n" for warning in warnings)
    print_text(text)
    return attempt


def _sweep(run: DirectRun, history: DirectHistory) -> None:
    """Finish the deletions that a crash interrupted."""
    deleted = {n.event.path for n in history.events if isinstance(n.event, CheckpointDeleted)}
    gone = deleted - {c.path for c in history.run.checkpoints}
    checkpoint_dir.sweep(run.checkpoint_dir, map(Path, gone))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _identity(spec: Spec) -> ProcessFile:
    """The record of torchrun's process, or of this process without torchrun."""
    leader = psutil.Process(os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid())
    kind = process.device_kind(spec)
    return ProcessFile(
        pid=leader.pid,
        create_time=leader.create_time(),
        host=socket.gethostname(),
        devices=[f"{kind}:{i}" for i in range(spec.nproc_per_node)],
        argv=leader.cmdline(),
        started_at=now_micros(),
    )


def _layout(spec: Spec) -> str:
    shown = " × ".join(f"{name}{size}" for name, size in spec.parallel_sizes.items() if size > 1)
    ranks = counted(spec.world_size, "rank")
    return f"{ranks} ({shown})" if shown else ranks


def _refuse_another_run(run: DirectRun, state: Run, new: Proposal) -> None:
    """Raise `Refused` when the settings would change the completed steps: that needs another run."""
    fix = f"set it back to continue that run, or {_BEGIN_ANOTHER}"
    problems = [
        msgspec.structs.replace(problem, what=f"{problem.what} (in {run.path})", fix=fix)
        for problem in decisions.other_run(state, new)
    ]
    if not problems and new.planned_steps < state.step:
        what = f"{new.planned_steps} steps are fewer than the {state.step} completed steps in {run.path}"
        problems.append(Problem("trainer.max_steps", what, fix))
    if not problems and new.spec.checkpoint.save_dir != state.spec.checkpoint.save_dir:
        # All checkpoints of its history would be missing, and the run would start from the beginning.
        what = f"{run.path} was moved: its checkpoints were in {state.spec.checkpoint.save_dir}"
        problems.append(Problem("checkpoint.save_dir", what, "move the folder back"))
    if problems:
        raise Refused(problems)


def _refuse_another_model(
    run: DirectRun, record: ModelRecord, spec: Spec, found: Preflight, *, weights: bool
) -> None:
    """Raise `Refused` when the model folder changed."""
    fix = f"put the folder back as it was to continue the run in {run.path}, or {_BEGIN_ANOTHER}"
    if problems := changed_files(record.files, found.model_files, spec, weights=weights, fix=fix):
        raise Refused(problems)


def _print_error(error: Exception) -> None:
    if isinstance(error, Refused):
        lines = [f"refused: {counted(len(error.problems), 'problem')}; nothing was written"]
        lines += [f"  {problem}" for problem in error.problems]
    else:
        lines = [f"sftd: {error}"]
    sys.stderr.write("\n".join(lines) + "\n")
    sys.stderr.flush()

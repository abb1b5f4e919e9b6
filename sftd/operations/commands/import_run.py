"""Import runs that were trained directly, without a daemon, into the log."""

from __future__ import annotations

from contextlib import closing
from itertools import batched
from pathlib import Path

import msgspec

from sftd.domain.errors import Problem, Refused
from sftd.domain.log import events as e
from sftd.domain.run.state import Run
from sftd.operations.context import Context
from sftd.store.database.engine import Store, Tx
from sftd.store.log import event_store
from sftd.store.log.runs import load_run
from sftd.store.queue import leases
from sftd.wire.attempt.direct_run import DirectHistory, DirectRun, DirectSubmission, read_history
from sftd.wire.checkpoint import manifest

_EVENTS_PER_INSERT = 500
# If the log has one of these and the folder does not, the run was resumed here after the import.
_CONTINUED = (e.ResumeRequested.__name__, e.AttemptClaimed.__name__)


class Imported(msgspec.Struct, frozen=True):
    """The result of an import. `missing`: checkpoint folders in the history that do not exist. `damaged`: checkpoint folders
    that do not hold what was published, with the reason (see `manifest.glance`)."""

    run: Run
    new_events: int
    missing: list[str]
    damaged: dict[str, str]


def take_in(store: Store, context: Context, folder: str, *, trust_remote_code: bool = False) -> Imported:
    """Append the events of a direct run's folder that the log does not have yet. A second import appends nothing.

    The folder does not change. Raises `Refused` if it is not a run's folder, if the run is alive, if the run continued both here
    and in its folder since the last import, or if the run executes code of its model folder and `trust_remote_code` is off.
    """
    run = DirectRun(Path(folder).resolve())
    if not run.submission_file.is_file():
        what = f"{folder} is not the folder of a run that was trained without a daemon: it has no run.json"
        raise Refused(Problem("DIR", what, "give the folder that the training command named"))
    with closing(run.hold()):
        submission = run.submission()
        assert submission is not None
        if not run.attempts():
            what = f"{folder} holds a run that has not begun"
            raise Refused(Problem("DIR", what, "start it with the training command first"))
        history = read_history(run, submission)
        with store.write() as tx:
            known = event_store.event_types(tx.connection, submission.run_id)
            new = [n for n in history.events if n.event_id not in known]
            if new:
                if not trust_remote_code:
                    _refuse_code(new)
                _refuse_another_history(known, history, new, submission)
                _append(tx, context, submission.run_id, len(known), new)
            if not known:
                # `sftd resume` needs a row in the queue; the run itself does not wait.
                leases.enqueue(tx, submission.run_id, history.run.spec.launch.priority, tx.now(context.now()))
                leases.leave(tx, submission.run_id)
    with store.read() as connection:
        # After the transaction: other writers would wait while a long history is folded.
        found = load_run(connection, submission.run_id)
    missing = [c.path for c in found.checkpoints if not Path(c.path).is_dir()]
    there = [c for c in found.checkpoints if c.path not in missing]
    looks = {c.path: manifest.glance(Path(c.path), c.manifest_digest) for c in there}
    damaged = {path: reason for path, reason in looks.items() if reason}
    return Imported(found, len(new), missing, damaged)


def _refuse_code(new: list[e.NewEvent]) -> None:
    """The folder may come from another person. That its run allowed code is not the consent of this user."""
    for spec in (n.event.spec for n in new if isinstance(n.event, e.RunSubmitted | e.ResumeRequested)):
        model = (spec or {}).get("model", {})
        if model.get("trust_remote_code"):
            what = f"is on in this run: commands would run Python code in {model.get('partial_pretrain')} with your rights"
            fix = "if you trust that folder, import with --trust-remote-code"
            raise Refused(Problem("model.trust_remote_code", what, fix))


def _append(tx: Tx, context: Context, run_id: str, version: int, new: list[e.NewEvent]) -> None:
    for part in batched(new, _EVENTS_PER_INSERT):
        version = event_store.append(tx, run_id, version, part, context.now())[-1].version


def _refuse_another_history(
    known: dict[str, str], history: DirectHistory, new: list[e.NewEvent], submission: DirectSubmission
) -> None:
    run_id = submission.run_id
    ids = [n.event_id for n in history.events]
    if known and ids[0] not in known:
        what = "is the id of another run in this database"
        raise Refused(Problem(run_id, what, "import it into another database (SFTD_DATABASE_URL)"))
    of_folder = set(ids)
    continued = any(name in _CONTINUED for key, name in known.items() if key not in of_folder)
    if continued or [n.event_id for n in new] != ids[len(ids) - len(new) :]:
        raise Refused(
            Problem(
                run_id,
                "continued both in the log and in its folder since it was imported",
                f"continue one of them: `sftd resume {run_id}`, or the folder under another trainer.experiment_name",
            )
        )

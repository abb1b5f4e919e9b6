"""The log's record of a run's model folder, and the copies of its files."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from sftd.domain.log import events as e
from sftd.domain.log.model_record import TYPES, ModelRecord, record_of
from sftd.domain.run.state import Run
from sftd.domain.spec.spec import Spec
from sftd.store.database.engine import Store
from sftd.store.log import event_store
from sftd.wire.attempt.directory import model_copy
from sftd.wire.model import digest as model_digest


def recorded(store: Store, run_id: str) -> ModelRecord:
    """The log's record of a run's model folder."""
    with store.read() as connection:
        return read_record(connection, run_id)


def read_record(connection: sa.Connection, run_id: str) -> ModelRecord:
    """As `recorded`, inside a transaction. Until a fork of a checkpoint has loaded weights itself, they are its parent's."""
    types = (*TYPES, e.RunForked.__name__)
    events = [r.event for r in event_store.read_stream(connection, run_id, types=types)]
    record = record_of(events)
    parent = next((event.parent for event in events if isinstance(event, e.RunForked) and event.step), None)
    if parent is None or record.weights or record.files is None:
        return record
    weights = read_record(connection, parent).weights
    has_same_names = weights.keys() == record.files.weights.keys()
    return ModelRecord(record.files, weights) if has_same_names else record


def check_unchanged(record: ModelRecord, run_id: str, spec: Spec, *, pretrained: bool) -> bool:
    """Compare a run's model folder with its record before another attempt is queued. `pretrained`: the attempt starts from the
    weights in the folder; one with frozen weights always reads some. A folder that is not on this host is not checked here;
    the attempt checks it.

    Returns whether there is a record. Raises `Refused` if the folder changed.
    """
    if record.files is not None and Path(spec.model.partial_pretrain).is_dir():
        weights = pretrained or spec.model.is_partly_frozen
        fix = model_digest.fork_fix(run_id, weights=weights)
        model_digest.refuse_changes(record, spec, weights=weights, fix=fix)
    return record.files is not None


def unrecorded(run_id: str) -> str:
    """The warning for a run without a record."""
    return f"{run_id}: an older sftd submitted it without recording the model folder, so a change cannot be detected."


def source(store: Store, home: Path, run: Run, *, builds: bool = True) -> str:
    """The folder with the config and tokenizer for a checkpoint of `run` (see `model_digest.source`). `builds`: the caller builds
    the model, and needs the weights that are not in the checkpoint. Raises `Refused`."""
    with store.read() as connection:
        record = read_record(connection, run.run_id)
        launched = event_store.last_of(connection, run.run_id, e.AttemptLaunched.__name__)
    places = [home]
    if launched is not None and isinstance(launched.event, e.AttemptLaunched):
        # The run's folder if it was trained without a daemon, and the home of the daemon that trained it.
        run_dir = Path(launched.event.directory).parent
        places += [run_dir, run_dir.parent.parent]
    copies = [model_copy(place, record.files) for place in places] if record.files else []
    weights = builds and run.spec.model.is_partly_frozen
    return model_digest.source(record, run.spec, copies, weights=weights)

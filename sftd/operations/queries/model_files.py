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
    """As `recorded`, inside a transaction."""
    return record_of(r.event for r in event_store.read_stream(connection, run_id, types=TYPES))


def check_unchanged(record: ModelRecord, run_id: str, spec: Spec, *, pretrained: bool) -> bool:
    """Compare a run's model folder with its record before another attempt is queued. `pretrained`: the attempt starts from the
    weights in the folder. A folder that is not on this host is not checked here; the attempt checks it.

    Returns whether there is a record. Raises `Refused` if the folder changed.
    """
    if record.files is not None and Path(spec.model.partial_pretrain).is_dir():
        fix = model_digest.fork_fix(run_id, pretrained=pretrained)
        model_digest.refuse_changes(record, spec, weights=pretrained, fix=fix)
    return record.files is not None


def unrecorded(run_id: str) -> str:
    """The warning for a run without a record."""
    return f"{run_id}: an older sftd submitted it without recording the model folder, so a change cannot be detected."


def source(store: Store, home: Path, run: Run) -> str:
    """The folder with the config and tokenizer for a checkpoint of `run` (see `model_digest.source`). Raises `Refused`."""
    with store.read() as connection:
        record = read_record(connection, run.run_id)
        launched = event_store.last_of(connection, run.run_id, e.AttemptLaunched.__name__)
    places = [home]
    if launched is not None and isinstance(launched.event, e.AttemptLaunched):
        # The run's folder if it was trained without a daemon, and the home of the daemon that trained it.
        run_dir = Path(launched.event.directory).parent
        places += [run_dir, run_dir.parent.parent]
    copies = [model_copy(place, record.files) for place in places] if record.files else []
    return model_digest.source(record, run.spec, copies)

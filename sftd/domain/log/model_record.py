"""The log's record of a run's model folder."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from sftd.domain.log.events import Event, RunSubmitted, WeightsDigested
from sftd.domain.model.files import ModelFiles

# The event types that `record_of` reads.
TYPES = (RunSubmitted.__name__, WeightsDigested.__name__)


class ModelRecord(msgspec.Struct, frozen=True):
    """`files` is what submit recorded, None if an older sftd submitted the run. `weights` maps weight files to digests of all
    their bytes, from the first attempt that loaded them; empty until then."""

    files: ModelFiles | None = None
    weights: dict[str, str] = {}


def record_of(events: Iterable[Event]) -> ModelRecord:
    """The record of a run from its events. Types that are not in `TYPES` are ignored."""
    files: ModelFiles | None = None
    weights: dict[str, str] = {}
    for event in events:
        if isinstance(event, RunSubmitted):
            files = event.model_files
        elif isinstance(event, WeightsDigested):
            weights = weights or event.files
    return ModelRecord(files, weights)

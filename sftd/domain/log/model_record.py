"""What the log knows of a run's model folder."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from sftd.domain.log.events import Event, RunSubmitted, WeightsDigested
from sftd.domain.model.files import ModelFiles

# The events that say it.
TYPES = (RunSubmitted.__name__, WeightsDigested.__name__)


class ModelRecord(msgspec.Struct, frozen=True):
    """`files` is what submit found, None for a run that an older sftd submitted. `weights` maps weight files to the digests
    of all their bytes, as the first attempt that loaded them found them; empty until then."""

    files: ModelFiles | None = None
    weights: dict[str, str] = {}


def record_of(events: Iterable[Event]) -> ModelRecord:
    """The record that the events of a run make; types that are not in `TYPES` say nothing."""
    files: ModelFiles | None = None
    weights: dict[str, str] = {}
    for event in events:
        if isinstance(event, RunSubmitted):
            files = event.model_files
        elif isinstance(event, WeightsDigested):
            weights = weights or event.files
    return ModelRecord(files, weights)

"""What a resume may change: a property of each key of the spec, kept in the metadata of its field."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Meta


class OnResume(StrEnum):
    """What another value of a key makes of the steps that a run has. A key that names none is `fixed`."""

    FIXED = "fixed"
    """Another trajectory: a resume refuses it, a fork may have it."""
    LENGTH = "length"
    """The same steps as long as their learning rates stay the same."""
    FREE = "free"
    """The same steps: bit for bit, or to within rounding where it changes what is summed in which order."""


FREE, LENGTH = (Meta(extra={"on_resume": mark}) for mark in (OnResume.FREE, OnResume.LENGTH))

"""Whether a resume may change a key of the spec. The mark is in the metadata of the key's field."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Meta


class OnResume(StrEnum):
    """The effect of a new value of a key on the existing steps of a run. A key without a mark is `fixed`."""

    FIXED = "fixed"
    """Another trajectory: a resume refuses the change, a fork accepts it."""
    LENGTH = "length"
    """The same steps as long as their learning rates stay the same."""
    FREE = "free"
    """The same steps: bit for bit, or to within rounding if the order of summation changes."""


FREE, LENGTH = (Meta(extra={"on_resume": mark}) for mark in (OnResume.FREE, OnResume.LENGTH))

"""What `sftd doctor` finds: a name, a state, a sentence, and how to mend it."""

from __future__ import annotations

from typing import Literal

import msgspec

State = Literal["ok", "warning", "broken"]


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at. `mend` says what to do about it unless it is ok."""

    check: str
    state: State
    said: str
    mend: str = ""


def ok(check: str, said: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", said)


def warning(check: str, said: str, mend: str) -> Finding:
    """It works, but not as well as it should."""
    return Finding(check, "warning", said, mend)


def broken(check: str, said: str, mend: str) -> Finding:
    """Runs fail, or nothing works, until this is mended."""
    return Finding(check, "broken", said, mend)

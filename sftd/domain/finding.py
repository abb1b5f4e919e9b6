"""What `sftd doctor` finds: a name, a state, a sentence, and how to fix it."""

from __future__ import annotations

from typing import Literal

import msgspec

State = Literal["ok", "warning", "broken"]


class Finding(msgspec.Struct, frozen=True):
    """The result of one check, with a fix unless it is ok."""

    check: str
    state: State
    said: str
    fix: str = ""


def ok(check: str, said: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", said)


def warning(check: str, said: str, fix: str) -> Finding:
    """It works, but not as well as it should."""
    return Finding(check, "warning", said, fix)


def broken(check: str, said: str, fix: str) -> Finding:
    """Runs fail, or nothing works, until this is fixed."""
    return Finding(check, "broken", said, fix)

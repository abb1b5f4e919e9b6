"""Findings of `sftd doctor`: check, state, message, and fix."""

from __future__ import annotations

from typing import Literal

import msgspec

State = Literal["ok", "warning", "broken"]


class Finding(msgspec.Struct, frozen=True):
    """The result of one check, with a fix unless the state is ok."""

    check: str
    state: State
    said: str
    fix: str = ""


def ok(check: str, said: str) -> Finding:
    """A finding without a problem."""
    return Finding(check, "ok", said)


def warning(check: str, said: str, fix: str) -> Finding:
    """A problem that degrades runs or the daemon."""
    return Finding(check, "warning", said, fix)


def broken(check: str, said: str, fix: str) -> Finding:
    """A problem that makes runs or all of sftd fail until it is fixed."""
    return Finding(check, "broken", said, fix)

"""Errors that reach a user or a caller. The docstring of a class is its default message."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

import msgspec

_LONGEST = 200
_REPR = reprlib.Repr(
    maxlevel=4, maxdict=20, maxlist=20, maxtuple=20, maxset=20, maxstring=_LONGEST, maxother=_LONGEST
)


def quote(value: object) -> str:
    """The repr of a user's value for a message: at most 200 characters, in bounded time."""
    return shorten(_REPR.repr(value))


def shorten(text: str, longest: int = _LONGEST) -> str:
    """A user's text for a message, without quotes: at most `longest` characters."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def several(texts: Sequence[str], most: int = 3) -> str:
    """The first `most` texts for a message, and the number of remaining ones."""
    more = len(texts) - most
    return ", ".join(map(shorten, texts[:most])) + (f" and {more} more" if more > 0 else "")


class SftdError(Exception):
    """sftd could not do what was asked."""

    exit_code = 1

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip())


class Problem(msgspec.Struct, frozen=True):
    """One problem with a request: where it is, what is wrong, how to fix it."""

    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"\n    fix: {self.fix}" if self.fix else "")


class Refused(SftdError):
    """The request was refused; nothing was written."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem] | Problem) -> None:
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class RunNotFound(SftdError):
    """No run has this id or prefix. `sftd ls` lists the runs."""

    exit_code = 2


class AmbiguousRun(SftdError):
    """More than one run begins with this prefix."""

    exit_code = 2


class HomeUnusable(SftdError):
    """The folder SFTD_HOME does not exist, or cannot be made."""


class LeaseLost(SftdError):
    """The lease on this attempt is no longer ours: another daemon took it over."""


class ConcurrencyConflict(SftdError):
    """Another writer appended to this stream first; read it again and repeat the decision."""


class UnknownEvent(SftdError):
    """The log holds an event type or schema version that this sftd does not support: a newer sftd wrote it."""


class ViewDamaged(SftdError):
    """A row of the views cannot be read."""

    def __init__(self, table: str, run_id: str, error: Exception) -> None:
        super().__init__(
            f"{table} cannot be read for {run_id}: {error}. The log is not affected. fix: `sftd views rebuild`"
        )


class JournalCorrupt(SftdError):
    """A complete journal line cannot be read."""


class CheckpointInvalid(SftdError):
    """The checkpoint is incomplete, or is not the one that was published."""


class DatabaseNotReady(SftdError):
    """The database has no sftd tables of this version. Run `sftd init`."""

    exit_code = 2

"""The cause of an attempt's end, from its exit code, the ranks' error files, and the end of its output."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

Cause = Literal[
    "user error",
    "bad checkpoint",
    "not a number",
    "loss spike",
    "out of memory",
    "disk full",
    "communication",
    "hang",
    "killed",
    "crash",
    "incomplete",
    "lost",
    "time limit",
]
# A retry would fail in the same way, because the trainer is deterministic.
NOT_RETRIED: frozenset[str] = frozenset({"user error", "not a number", "loss spike"})


class RankError(msgspec.Struct, frozen=True):
    """The content of a rank's torchelastic error file: the exception as `Class: text`, and the last traceback lines."""

    rank: int
    exception: str
    traceback: list[str] = []


class Interruption(msgspec.Struct, frozen=True):
    """The resource manager ended an attempt that had not failed. `cancelled`: a user cancelled its job outside sftd."""

    kind: Literal["time limit", "preempted", "requeued", "cancelled"]
    message: str


class Remains(msgspec.Struct, frozen=True):
    """The evidence that an ended attempt left. `exit_code` is torchrun's, None if it wrote none. `last_word` is a message from
    its launcher; `last_cause` is the cause that this message proves, if any."""

    exit_code: int | None
    rank_errors: list[RankError] = []
    output_tail: list[str] = []
    interruption: Interruption | None = None
    last_word: str = ""
    last_cause: Cause | None = None


class Failure(msgspec.Struct, frozen=True):
    """A cause, a message of one line, and the lines that prove it."""

    cause: Cause
    message: str
    evidence: list[str] = []


_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large")
# The first match decides. A rank that fails also breaks its peers' connections, so communication comes after every other
# pattern.
_PATTERNS: tuple[tuple[Cause, re.Pattern[str] | None], ...] = (
    # Matched by class name, because this cause is never retried: a message may contain "Connection Refused".
    ("user error", re.compile(r"\b(?:UserError|DataError)\b|(?:^|: |\.)Refused:")),
    ("bad checkpoint", re.compile(r"\bCheckpointInvalid\b")),
    ("not a number", re.compile(r"\bNonFiniteLoss\b")),
    ("loss spike", re.compile(r"\bLossSpike\b")),
    (
        "out of memory",
        re.compile(
            r"OutOfMemoryError|CUDA out of memory|(?i:cuda error:? '?out of memory)|CUBLAS_STATUS_ALLOC_FAILED"
            r"|DefaultCPUAllocator: can't allocate|MemoryError\b|Cannot allocate memory"
        ),
    ),
    # Only a launcher reports this cause.
    ("lost", None),
    ("disk full", _DISK_FULL),
)
_COMMUNICATION = re.compile(
    r"NCCL|DistBackendError|[Gg]loo|Connection (?:reset|closed|refused)|Broken pipe|Timed out"
)
# torch warns that a process group was not destroyed whenever a rank ends early, whatever the reason.
_WARNING = re.compile(r"\[W\d{4} |Warning:")
_SIGNAL = re.compile(r"Signal \d+ \((SIG\w+)\)|(?:exitcode\s*:\s*-|got signal: )(\d+)")
_ERROR_LINE = re.compile(
    r"^\s*(?:\[rank\d+\]:\s*)?([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Invalid|Loss|Spike|Refused)\b.*)"
)


def is_disk_full(text: str) -> bool:
    """Whether an error reports a full disk, which may change while a run waits."""
    return _DISK_FULL.search(text) is not None


def classify(remains: Remains) -> Failure:
    """Name the cause of a failed attempt."""
    texts = [f"rank {e.rank}: {e.exception}" for e in remains.rank_errors] + remains.output_tail
    texts += [remains.last_word] if remains.last_word else []
    for cause, pattern in _PATTERNS:
        found = [t for t in texts if pattern is not None and pattern.search(t)]
        if cause == remains.last_cause:
            found.append(remains.last_word)
        if found:
            return Failure(cause, _clean(found[0]), _evidence(found, remains))
    # A rank's own exception explains its peers' broken connections and aborts, never the other way round.
    own = [t for t in texts[: len(remains.rank_errors)] if not _COMMUNICATION.search(t)]
    if own:
        return Failure("crash", _clean(own[0]), _evidence(own, remains))
    if matches := [m for t in texts if (m := _SIGNAL.search(t))]:
        named = next((m for m in matches if m.group(1)), matches[0])
        name = named.group(1) or f"signal {named.group(2)}"
        return Failure(
            "killed", f"a rank was killed by {name}", _evidence([m.string for m in matches], remains)
        )
    if found := [t for t in texts if _COMMUNICATION.search(t) and not _WARNING.search(t)]:
        return Failure("communication", _clean(found[0]), _evidence(found, remains))
    if remains.exit_code is None:
        gone = remains.last_word or "the attempt's processes are gone and left no exit code"
        return Failure("killed", gone, remains.output_tail[-3:])
    if remains.exit_code > 128 or remains.exit_code < 0:
        number = remains.exit_code - 128 if remains.exit_code > 128 else -remains.exit_code
        return Failure("killed", f"torchrun was killed by signal {number}", remains.output_tail[-3:])
    # torchrun's ChildFailedError only sums up the rank's own error before it.
    errors = [t for t in remains.output_tail if _ERROR_LINE.search(t) and "ChildFailedError" not in t]
    if errors:
        return Failure("crash", _clean(errors[-1]), _evidence(errors[-3:], remains))
    return Failure("crash", f"torchrun ended with exit code {remains.exit_code}", remains.output_tail[-5:])


def _clean(line: str) -> str:
    """The line without control characters, so that it is safe in a terminal: at most 300 characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in line).split())[:300]


def _evidence(lines: list[str], remains: Remains) -> list[str]:
    """The lines that match, then where in the code the first rank failed."""
    where = remains.rank_errors[0].traceback[-4:] if remains.rank_errors else []
    return [line.rstrip()[:500] for line in (*lines[:5], *where)]

"""The daemon's own log: the run of each line, the formats, and the rotation."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from sftd.domain.text.printable import harmless

_BYTES, _KEPT = 10_000_000, 5
_REMIND_SECONDS = 3600.0
NAMES = ("sftd.daemon", "sftd.mirror", "sftd.notify", "py.warnings")
_daemon = logging.getLogger("sftd.daemon")


class _RunLog(logging.LoggerAdapter[logging.Logger]):
    """Adds the run and attempt of a line to its record, for both formats."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return msg, {**kwargs, "extra": self.extra}


def of_run(run_id: str, attempt: int | None = None) -> logging.LoggerAdapter[logging.Logger]:
    """The daemon's log for lines about a run, or about one of its attempts."""
    about: Mapping[str, object] = {"run_id": run_id, "attempt": attempt}
    return _RunLog(_daemon, about)


class TextFormat(logging.Formatter):
    """For users: `2026-01-31 12:00:00,000 INFO    brave-otter-3f2a: attempt 1 started`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(about)s%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        run_id = getattr(record, "run_id", None)
        record.about = f"{run_id}: " if run_id else ""
        return harmless(super().format(record)).replace("\x1b", " ")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        """Escape the message: a path or the output of a rank must not control a terminal or imitate another log line."""
        if not record.message.isprintable():
            record.message = "".join(map(_visible, record.message))
        return super().formatMessage(record)


def _visible(letter: str) -> str:
    if letter == "\n":
        return "\n    "
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode()


class JsonFormat(logging.Formatter):
    """For programs: one JSON object per line, always with the same keys. A traceback is in `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(
            {
                "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
                "level": record.levelname.lower(),
                "logger": record.name,
                "run_id": getattr(record, "run_id", None),
                "attempt": getattr(record, "attempt", None),
                "message": record.getMessage(),
                "exception": self.formatException(record.exc_info) if record.exc_info else None,
            }
        )


class Outage:
    """Logs an outage once per reason and then every hour, and its end. A line per retry would rotate everything else out of
    the log in one night."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        self._said: dict[str, float] = {}

    def failed(self, reason: str) -> None:
        """A call failed for `reason`."""
        now = self._clock()
        if now - self._said.get(reason, -_REMIND_SECONDS) >= _REMIND_SECONDS:
            self._said[reason] = now
            _daemon.warning("%s: %s; trying again", self._name, reason)

    def answered(self) -> None:
        """A call succeeded."""
        if self._said:
            self._said.clear()
            _daemon.info("%s answers again", self._name)


class PrivateFile(logging.handlers.RotatingFileHandler):
    """A log file of at most `size` bytes and at most `kept` older ones, all of mode 0600.

    With `takes_output`, the stdout and stderr of this process go to the current file too.
    """

    def __init__(
        self, path: Path, *, size: int = _BYTES, kept: int = _KEPT, takes_output: bool = False
    ) -> None:
        self._takes_output = takes_output
        super().__init__(path, maxBytes=size, backupCount=kept, encoding="utf-8")

    def _open(self) -> IO[Any]:  # type: ignore[override]
        stream = open(  # noqa: SIM115  the handler closes it
            self.baseFilename, "a", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)
        )
        if self._takes_output:
            for standard in (1, 2):
                os.dup2(stream.fileno(), standard)
        return stream


def set_up(form: str) -> None:
    """Log in the format `form` ("text" or "json") to the file SFTD_DAEMON_LOG, which `--detach` sets, else to stderr."""
    path = os.environ.get("SFTD_DAEMON_LOG")
    handler = PrivateFile(Path(path), takes_output=True) if path else logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormat() if form == "json" else TextFormat())
    logging.captureWarnings(True)
    for name in NAMES:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False

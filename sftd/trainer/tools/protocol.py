"""The JSON lines that a tool writes for the process that started it."""

import json
import os
import signal
import sys
from types import FrameType
from typing import Any, TextIO


class EventWriter:
    """Writes one JSON object per line, each with the key `event`, and flushes it at once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def emit(self, event: str, **fields: Any) -> None:
        """Write one event. `fields` must be JSON-serialisable."""
        self._stream.write(json.dumps({"event": event, **fields}, ensure_ascii=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()

    def progress(self, stage: str, **fields: Any) -> None:
        """Write a `progress` event for `stage`."""
        self.emit("progress", stage=stage, **fields)


def _interrupt_once(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def claim_stdout() -> EventWriter:
    """Reserve standard output for events, and handle only the first Ctrl-C: a second signal, for example from the parent
    process, must not interrupt the clean-up.

    File descriptor 1 becomes a copy of standard error, so that output of libraries, from Python or C, does not mix with the
    events.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt_once)
    sys.stdout.flush()
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return EventWriter(events)

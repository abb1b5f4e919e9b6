"""Read the evidence of why an attempt ended: exit code, error files of the ranks, end of the output."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from sftd.domain.run.failures import RankError, Remains
from sftd.wire.attempt.directory import AttemptDir
from sftd.wire.attempt.secrets import Secrets

_TAIL_BYTES = 64 * 1024
_TAIL_LINES = 200
_FRAME = re.compile(r'\s*File "([^"]*)", line (\d+) in (\S+)')


def find_remains(directory: AttemptDir, environ: Mapping[str, str] = os.environ) -> Remains:
    """The evidence of why the attempt ended. Secrets of the ranks' environment are hidden, because the log and MLflow store
    the result. `environ` replaces that environment if an older sftd did not keep its secrets."""
    secrets = Secrets.read(directory.secrets_file) or Secrets.of(environ)
    return Remains(
        exit_code=directory.exit_code(),
        rank_errors=[
            msgspec.structs.replace(
                error,
                exception=secrets.hide(error.exception),
                traceback=[secrets.hide(line) for line in error.traceback],
            )
            for error in _rank_errors(directory)
        ],
        output_tail=[secrets.hide(line) for line in _tail(directory)],
    )


def find_stack(directory: AttemptDir, rank: int) -> str | None:
    """The innermost frames of a rank's requested stack (`LocalAttempt.ask_for_stacks`), None if it wrote none."""
    try:
        lines = directory.stack_file(rank).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    # The main thread receives the signal, so faulthandler labels it as the current one.
    start = next((n for n, line in enumerate(lines) if line.startswith("Current thread")), None)
    if start is None:
        return None
    frames = [m for line in lines[start + 1 : start + 9] if (m := _FRAME.match(line))]
    return " < ".join(f"{m[3]} ({os.path.basename(m[1])}:{m[2]})" for m in frames)


def _tail(directory: AttemptDir) -> list[str]:
    """The last lines of each rank, then of torchrun."""
    files = [*(path for _, path in directory.rank_outputs()), directory.output_log]
    return [line for path in files for line in _last_lines(path)]


def _last_lines(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
    except OSError:
        # A rank may have replaced the file by anything; the daemon must continue.
        return []


def _writable(text: object) -> str:
    """Escape lone surrogates, which the log cannot store. Python uses them for file names that are not UTF-8."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def _rank_errors(directory: AttemptDir) -> list[RankError]:
    """torchelastic's error files: `<ranks>/<rendezvous>/attempt_0/<local rank>/error.json`."""
    errors: list[tuple[int, RankError]] = []
    for path in sorted(directory.ranks_dir.glob("*/attempt_*/*/error.json")):
        try:
            message = json.loads(path.read_text())["message"]
            if isinstance(message, dict):
                text = _writable(message["message"])
                extra = message.get("extraInfo") or {}
                stack = _writable(extra.get("py_callstack", "")).splitlines()
                when = int(extra.get("timestamp", 0))
            else:
                text, stack, when = _writable(message), [], 0
            errors.append((when, RankError(rank=int(path.parent.name), exception=text, traceback=stack[-5:])))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            # A rank may have written anything there; the daemon must continue.
            continue
    # The rank that failed first is the cause. The others usually fail because they lose the connection to it.
    return [error for _, error in sorted(errors, key=lambda item: (item[0], item[1].rank))]

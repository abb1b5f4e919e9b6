"""Channels for notices: a command, or a POST to a webhook. Each has a time limit."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shlex
import signal
import subprocess
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

import sftd
from sftd.domain.errors import SftdError
from sftd.domain.notices import Notice

COMMAND_SECONDS, WEBHOOK_SECONDS = 20.0, 10.0
# The receiver rejects this notice for good: a retry would not help.
_REFUSED = (400, 413, 422)
# Read enough of the output to find and hide whole arguments, and show only its end.
_READ_BYTES, _SHOWN = 1 << 16, 300
# A part of an argument that may be secret.
_WORD = re.compile(r"[^\s'\"=<>|;&()]{6,}")


class NotSent(SftdError):
    """A notice did not arrive. `is_final`: retries cannot succeed, but later notices may."""

    def __init__(self, message: str, *, is_final: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final


class Channel(Protocol):
    """A destination of notices. `identity` is the same for the same destination on every host; `shown` contains no secret."""

    identity: str
    shown: str

    def send(self, notice: Notice) -> None:
        """Send a notice, or raise `NotSent`."""
        ...


def channels(command: str, webhook: str, folder: Path) -> list[Channel]:
    """The configured channels. A command always runs in `folder`."""
    found: list[Channel] = []
    if command:
        found.append(Command(shlex.split(command), folder=folder))
    if webhook:
        found.append(Webhook(webhook))
    return found


def _identity(kind: str, parts: Sequence[str]) -> str:
    """A digest of the settings, which may contain a secret."""
    return f"notify:{kind}:{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


class Command:
    """Runs a command with the notice as JSON on its standard input. After `seconds` the command is killed."""

    def __init__(
        self, argv: Sequence[str], seconds: float = COMMAND_SECONDS, folder: Path | None = None
    ) -> None:
        self._argv = list(argv)
        self._seconds = seconds
        self._folder = folder
        self.identity = _identity("command", self._argv)
        # Arguments may be secret.
        self.shown = f"command {os.path.basename(self._argv[0])}"

    def send(self, notice: Notice) -> None:
        """Run the command. The notice has arrived when the exit code is 0."""
        env = {**os.environ, **_variables(notice)}
        # With pipes, a command that does not read its input or leaves child processes could block the sender.
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stderr:
            stdin.write(msgspec.json.encode(notice) + b"\n")
            stdin.seek(0)
            try:
                process = subprocess.Popen(
                    self._argv,
                    stdin=stdin,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    env=env,
                    cwd=self._folder,
                    start_new_session=True,
                )
            except OSError as error:
                raise NotSent(f"it cannot be started: {error.strerror}") from error
            try:
                code = process.wait(self._seconds)
            except subprocess.TimeoutExpired:
                raise NotSent(f"it was killed after {self._seconds:g} s") from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            if code:
                size = stderr.seek(0, os.SEEK_END)
                stderr.seek(max(0, size - _READ_BYTES))
                shown = " ".join(self._hidden(stderr.read().decode(errors="replace")).split())[-_SHOWN:]
                raise NotSent(f"exit code {code}" + (f": {shown}" if shown else ""))

    def _hidden(self, text: str) -> str:
        """The command's output without its own arguments. For example, wget prints its URL."""
        words = {word for argument in self._argv[1:] for word in _WORD.findall(argument)}
        for word in sorted(words, key=len, reverse=True):
            text = text.replace(word, "…")
        return text


def _variables(notice: Notice) -> Mapping[str, str]:
    return {
        "SFTD_NOTICE_ID": notice.id,
        "SFTD_NOTICE_KIND": notice.kind,
        "SFTD_NOTICE_RUN": notice.run_id,
        "SFTD_NOTICE_TEXT": notice.text,
    }


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """A redirected POST would arrive as an empty GET."""
        return


class Webhook:
    """POSTs the notice as JSON. Slack, Mattermost and similar services show its key `text`."""

    def __init__(self, url: str, seconds: float = WEBHOOK_SECONDS) -> None:
        self._url = url
        self._seconds = seconds
        self._opener = urllib.request.build_opener(_NoRedirect)
        self.identity = _identity("webhook", [url])
        # The path is secret.
        self.shown = f"webhook at {urllib.parse.urlsplit(url).hostname}"

    def send(self, notice: Notice) -> None:
        """POST the notice. It has arrived when the answer is 2xx."""
        found: list[NotSent | None] = []
        # In a thread, because the timeout of a socket limits neither a name lookup nor the total time of a slow answer.
        worker = threading.Thread(
            target=lambda: found.append(self._post(notice)), name="webhook", daemon=True
        )
        worker.start()
        worker.join(self._seconds)
        if not found:
            raise NotSent(f"no answer within {self._seconds:g} s")
        if found[0] is not None:
            raise found[0]

    def _post(self, notice: Notice) -> NotSent | None:
        headers = {"Content-Type": "application/json", "User-Agent": f"sftd/{sftd.__version__}"}
        try:
            request = urllib.request.Request(  # noqa: S310  the settings take http and https only
                self._url, msgspec.json.encode(notice), headers, method="POST"
            )
            with self._opener.open(request, timeout=self._seconds):
                return None
        except urllib.error.HTTPError as error:
            with error:
                return NotSent(f"the answer is {error.code} {error.reason}", is_final=error.code in _REFUSED)
        except urllib.error.URLError as error:
            reason = error.reason
            why = (reason.strerror or str(reason)) if isinstance(reason, OSError) else str(reason)
            return NotSent(f"it does not answer: {why}")
        except (OSError, ValueError, http.client.HTTPException) as error:
            # The messages of the last two may quote the URL.
            return NotSent(f"it does not answer: {type(error).__name__}")

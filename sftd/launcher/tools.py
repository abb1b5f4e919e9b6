"""Run work that needs transformers in a separate process that reports JSON lines: `python -m sftd.trainer.tools.…`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from sftd.domain.errors import SftdError
from sftd.launcher.command import without_secrets

_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
Progress = Callable[[dict[str, Any]], None]


class ToolFailed(SftdError):
    """A tool process failed."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def tool_argv(module: str, arguments: list[str]) -> list[str]:
    """The command of a tool."""
    # -P: the user's working folder may hold a file with a module's name.
    return [sys.executable, "-P", "-m", f"sftd.trainer.tools.{module}", *arguments]


def run_tool(
    module: str, arguments: list[str], on_progress: Progress, request: bytes | None = None
) -> dict[str, Any]:
    """Run `python -m sftd.trainer.tools.<module> ARGUMENTS…` with `request` as standard input, which the tool must read before
    it reports anything. Passes each JSON line of the tool to `on_progress` and returns the last one. Raises `ToolFailed` with
    the tool's stderr: exit code 2 is a refusal, others are failures. Any other exception, Ctrl-C included, ends the tool
    first."""
    last: dict[str, Any] = {}
    stdin = subprocess.DEVNULL if request is None else subprocess.PIPE
    # The shell may have rank variables of an earlier job, but a tool is one process. Code of a model folder must not see
    # passwords.
    env = {name: value for name, value in without_secrets(os.environ).items() if name not in _RANK}
    with subprocess.Popen(
        tool_argv(module, arguments),
        env=env,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        errors: list[str] = []
        assert process.stdout is not None
        assert process.stderr is not None
        drain = threading.Thread(target=errors.extend, args=(process.stderr,), daemon=True)
        drain.start()
        try:
            if process.stdin is not None:
                # The stderr of a tool that died before reading has the reason.
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write((request or b"").decode())
                    process.stdin.close()
            for line in process.stdout:
                try:
                    last = msgspec.json.decode(line, type=dict[str, Any])
                except msgspec.MsgspecError:
                    errors.append(line)
                    continue
                on_progress(last)
            code = process.wait()
        except BaseException as error:
            _end(process, error)
            raise
        finally:
            drain.join()
    if code != 0:
        text = "".join(errors).strip()
        raise ToolFailed(text or f"{module} ended with exit code {code}", 2 if code == 2 else 1)
    return last


def _end(process: subprocess.Popen[str], error: BaseException) -> None:
    """End a tool after an error here. It may clean up; a second Ctrl-C kills it."""
    # Ctrl-C in a terminal reaches the tool too, but a signal to this process alone does not. The tool handles only the first.
    process.send_signal(signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
    try:
        process.wait()
    except KeyboardInterrupt:
        process.kill()
        raise

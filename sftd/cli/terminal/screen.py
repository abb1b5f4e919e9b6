"""The terminal during a live screen. rich's Live paints; this module handles job control, signals and keys."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP)


class FullScreen:
    """A terminal with an alternate screen, no cursor, and keys that are read one by one without echo.

    A context manager; `take` acquires the terminal. Its exit restores the terminal, also after an error, SIGTERM or SIGHUP;
    Ctrl-Z restores it until the job is in the foreground again. Handlers of job signals only wake `quits`, so that they do
    not write in the middle of other output.
    """

    def __init__(self, out: Console) -> None:
        from rich.live import Live

        self._out = out
        # Without Live's thread, which would paint while the job is in the background.
        self._live = Live(
            console=out, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._fd = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._before: list[Any] = []
        self._is_ours = False
        self._handlers: dict[int, Any] = {}
        self._woken, self._wake = os.pipe()

    def __enter__(self) -> FullScreen:
        for end in (self._woken, self._wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGHUP):
            self._handle(number, _exit)
        for number in (signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH):
            self._handle(number, _wake_only)
        return self

    def __exit__(self, *_: object) -> None:
        # A second Ctrl-C must not interrupt this.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
        self._give_back()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self._woken)
        os.close(self._wake)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS)

    def _handle(self, number: int, handler: Any) -> None:
        # A signal that is ignored from the start (`nohup`, a shell without job control) stays ignored.
        if (before := signal.getsignal(number)) is not signal.SIG_IGN:
            self._handlers[number] = before
            signal.signal(number, handler)

    def take(self) -> bool:
        """Take the terminal, unless another job is in its foreground. Returns whether we have it."""
        if self._is_ours or not self._is_in_front():
            return self._is_ours
        self._is_ours = True
        if self._fd is not None:
            import termios
            import tty

            # Keep the first state: after a SIGSTOP the terminal may still be in cbreak mode.
            self._before = self._before or termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
        # After a SIGSTOP, Live was not stopped, and other programs may have written.
        self._live.stop()
        self._live.start()
        return True

    def show(self, lines: Sequence[Text]) -> None:
        """Paint these lines from the top; the rest of the screen is blank."""
        from rich.console import Group

        self._live.update(Group(*lines), refresh=True)

    def _give_back(self) -> None:
        """Restore the terminal, unless it is gone."""
        # In the background the terminal belongs to another job, and the kernel stops a job that sets it.
        was_ours, self._is_ours = self._is_ours and self._is_in_front(), False
        if not was_ours:
            return
        with contextlib.suppress(OSError):
            self._live.stop()
        if self._fd is not None and self._before:
            import termios

            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def _is_in_front(self) -> bool:
        try:
            return os.tcgetpgrp(self._out.file.fileno()) == os.getpgrp()
        except OSError:
            # Not a controlling terminal: there is no job control.
            return True

    def quits(self, seconds: float) -> bool:
        """Wait at most `seconds` for a key or a signal. Returns whether `q` was pressed, or the terminal is gone."""
        keys = [self._fd] if self._fd is not None and self._is_ours else []
        ready, _, _ = select.select([self._woken, *keys], [], [], seconds)
        if self._woken in ready:
            self._handle_woken(os.read(self._woken, 256))
        if self._fd is None or self._fd not in ready or not self._is_ours:
            return False
        try:
            pressed = os.read(self._fd, 64)
        except OSError:
            return True
        return not pressed or any(key in b"qQ\x04" for key in pressed)

    def _handle_woken(self, numbers: bytes) -> None:
        if signal.SIGCONT in numbers and signal.SIGTSTP not in numbers:
            # After a SIGSTOP, which cannot be handled: another job may have used the terminal.
            self._is_ours = False
        if signal.SIGTSTP in numbers:
            self._give_back()
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTSTP)
            # SIGCONT continues here.
            signal.signal(signal.SIGTSTP, _wake_only)
            # Discard the wake-up of that SIGCONT.
            with contextlib.suppress(BlockingIOError):
                os.read(self._woken, 256)


def _exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _wake_only(_number: int, _frame: FrameType | None) -> None:
    pass

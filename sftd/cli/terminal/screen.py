"""A terminal that a board has for itself, and gives back whenever it is somebody else's turn."""

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


class Screen:
    """What a terminal shows. Only lines that are not there already are sent: most of a board stands still."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._size = (0, 0)
        self._shown: list[Text] = []

    def forget(self) -> None:
        """Somebody else has written there."""
        self._size, self._shown = (0, 0), []

    def show(self, lines: Sequence[Text], size: tuple[int, int]) -> None:
        """Have it show these lines, cut for a terminal of this (width, height)."""
        from rich.control import Control
        from rich.segment import ControlType
        from rich.text import Text

        width, height = size
        wanted = [*lines[:height], *(Text() for _ in range(height - len(lines)))]
        is_known = size == self._size
        # All of it goes out at once.
        with self._out:
            for row, line in enumerate(wanted):
                if is_known and (line, line.style) == (self._shown[row], self._shown[row].style):
                    continue
                self._out.control(Control.move_to(0, row))
                self._out.print(line, end="", no_wrap=True, overflow="crop")
                # Behind a full line the cursor still stands on its last character.
                if line.cell_len < width:
                    self._out.control(Control((ControlType.ERASE_IN_LINE, 0)))
        self._size, self._shown = size, wanted


class Terminal:
    """The terminal while a board is shown: a screen of its own, no cursor, keys one by one and unseen.

    A context; `take` takes the terminal. Whoever leaves it, by a key, an error, SIGTERM or SIGHUP, leaves the terminal as it
    was; so does Ctrl-Z, until the board is in the foreground again. Handlers of signals only wake whoever waits: nothing is
    written in the middle of something else.
    """

    def __init__(self, out: Console) -> None:
        self._out = out
        self.screen = Screen(out)
        self._fd = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._before: list[Any] = []
        self._is_ours = False
        self._handlers: dict[int, Any] = {}
        self._woken, self._wake = os.pipe()

    def __enter__(self) -> Terminal:
        for end in (self._woken, self._wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGHUP):
            self._handle(number, _end)
        for number in (signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH):
            self._handle(number, _noted)
        return self

    def __exit__(self, *_: object) -> None:
        # One more Ctrl-C does not come in between.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
        self.give_back()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self._woken)
        os.close(self._wake)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS)

    def _handle(self, number: int, handler: Any) -> None:
        # What is ignored from the start (`nohup`, a shell without jobs) stays ignored.
        if (before := signal.getsignal(number)) is not signal.SIG_IGN:
            self._handlers[number] = before
            signal.signal(number, handler)

    def take(self) -> bool:
        """Have the terminal, unless another job is in its foreground. Returns whether we have it."""
        if self._is_ours or not self._is_in_front():
            return self._is_ours
        self._is_ours = True
        if self._fd is not None:
            import termios
            import tty

            # As it was at first: behind a SIGSTOP the keys may still be read as here.
            self._before = self._before or termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
        self._out.set_alt_screen(True)
        self._out.show_cursor(False)
        self.screen.forget()
        return True

    def give_back(self) -> None:
        """Leave it as it was. A terminal that is gone needs nothing any more."""
        # In the background it is somebody else's already, and whoever sets it there is stopped.
        was_ours, self._is_ours = self._is_ours and self._is_in_front(), False
        if not was_ours:
            return
        with contextlib.suppress(OSError):
            self._out.show_cursor(True)
            self._out.set_alt_screen(False)
        if self._fd is not None and self._before:
            import termios

            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def _is_in_front(self) -> bool:
        try:
            return os.tcgetpgrp(self._out.file.fileno()) == os.getpgrp()
        except OSError:
            # It controls nobody: there are no jobs.
            return True

    def quits(self, seconds: float) -> bool:
        """Wait so long, or until something happens. Returns whether `q` was pressed, or nobody is there any more."""
        keys = [self._fd] if self._fd is not None and self._is_ours else []
        ready, _, _ = select.select([self._woken, *keys], [], [], seconds)
        if self._woken in ready:
            self._heed(os.read(self._woken, 256))
        if self._fd is None or self._fd not in ready or not self._is_ours:
            return False
        try:
            pressed = os.read(self._fd, 64)
        except OSError:
            return True
        return not pressed or any(key in b"qQ\x04" for key in pressed)

    def _heed(self, numbers: bytes) -> None:
        if signal.SIGCONT in numbers and signal.SIGTSTP not in numbers:
            # Stopped by SIGSTOP, of which nobody is told: others may have had the terminal since.
            self._is_ours = False
        if signal.SIGTSTP in numbers:
            self.give_back()
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTSTP)
            # Here it goes on, some time later.
            signal.signal(signal.SIGTSTP, _noted)
            # That it does is known.
            with contextlib.suppress(BlockingIOError):
                os.read(self._woken, 256)


def _end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _noted(_number: int, _frame: FrameType | None) -> None:
    pass

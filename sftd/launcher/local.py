"""Attempts on this host: torchrun runs in its own session, so training survives the daemon."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

import msgspec

from sftd.domain.run.failures import Remains
from sftd.launcher import processes
from sftd.launcher.command import environment, torchrun_argv, wrapped_argv
from sftd.launcher.inventory import Need
from sftd.wire.attempt.directory import AttemptDir, Order, ProcessFile
from sftd.wire.attempt.remains import find_remains, find_stack

_FULL_BYTES = 64 * 1024


class LocalAttempt:
    """An attempt's processes on this host, started by this daemon or adopted from an earlier one."""

    stacks_seconds = 2.0

    def __init__(
        self, directory: AttemptDir, process: ProcessFile | None, token: str, child: Any = None
    ) -> None:
        self.directory = directory
        self.process = process
        self._token = token
        self._child = child

    @classmethod
    def start(
        cls,
        directory: AttemptDir,
        order: Order,
        need: Need,
        devices: list[str],
        *,
        lifeline: int | None = None,
        inherited: Sequence[int] = (),
    ) -> tuple[LocalAttempt, list[str]]:
        """Write the order and start torchrun. Returns the attempt and torchrun's argv. Training survives this process, unless
        `lifeline`, the read end of a pipe, is given: then it is killed when the write end is closed. torchrun inherits the
        descriptors `inherited` and their locks. Raises `OSError`, and then nothing runs."""
        directory.create(order)
        argv = torchrun_argv(order.spec, directory)
        env = environment(
            os.environ, token=order.token, device=need.device, threads=need.threads, devices=devices
        )
        alive = directory.hold_alive()
        log = os.open(directory.output_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            child = subprocess.Popen(
                wrapped_argv(argv, directory, tied=lifeline is not None),
                cwd=directory.path,
                env=env,
                stdin=subprocess.DEVNULL if lifeline is None else lifeline,
                stdout=log,
                stderr=log,
                start_new_session=True,
                umask=0o077,
                pass_fds=[*inherited, *([alive] if alive is not None else [])],
            )
        finally:
            os.close(log)
            if alive is not None:
                os.close(alive)
        attempt = cls(directory, None, order.token, child)
        try:
            attempt.process = msgspec.structs.replace(processes.identify(child.pid), devices=devices)
            directory.write_process(attempt.process)
        except BaseException:
            # An error means that nothing runs.
            attempt.kill()
            raise
        return attempt, argv

    @classmethod
    def adopt(cls, directory: AttemptDir, fallback_token: str) -> LocalAttempt:
        """Find an attempt that an earlier daemon of this host claimed, dead or alive."""
        try:
            token = directory.order().token
        except (OSError, ValueError):
            # The daemon died between the claim and the order: nothing was started under the claim's token.
            token = fallback_token
        return cls(directory, directory.process(), token)

    def is_alive(self) -> bool:
        """Whether the attempt's leading process runs."""
        if self._child is not None:
            # Reaps the child, which would otherwise stay a zombie until this daemon ends.
            return self._child.poll() is None
        # The create time depends on the wall clock, which may have been set since. The token does not.
        return self.process is not None and (
            processes.is_alive(self.process.pid, self.process.create_time)
            or self.process.pid in processes.survivors(self._token)
        )

    def kill(self) -> list[int]:
        """SIGKILL every process of the attempt, orphans included. Returns the pids that do not die."""
        stuck: list[int] = []
        # A process may fork while the list is made, so repeat until none is found.
        for _ in range(5):
            pids = processes.survivors(self._token)
            if not pids:
                break
            stuck = processes.kill(pids)
        if self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(timeout=5)
        return stuck

    def report(self) -> None:
        """None: this host has no resource manager."""

    def ask_for_stacks(self) -> None:
        """Make every rank write its stack, for `stacks` to read."""
        for rank, pid in processes.ranks(self._token).items():
            # A rank without this file has no signal handler yet: the signal would end it.
            if self.directory.stack_file(rank).exists():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1)

    def stacks(self) -> list[str]:
        """One line per rank: its stack, innermost frame first, or why there is none."""
        lines = []
        for rank, pid in sorted(processes.ranks(self._token).items()):
            if processes.is_stopped(pid):
                lines.append(f"rank {rank}: pid {pid} is stopped (SIGSTOP)")
            else:
                lines.append(f"rank {rank}: {find_stack(self.directory, rank) or 'gives no stack'}")
        return lines

    def remains(self) -> Remains:
        """What the ended attempt left as evidence of the cause."""
        found = find_remains(self.directory)
        if found.exit_code is None and (code := self._child_code()) > 0:
            # The shell could not write its exit file to a full disk.
            found = msgspec.structs.replace(found, exit_code=code)
        if found.exit_code != 0 and not found.rank_errors and (full := self._full_disk()):
            found = msgspec.structs.replace(found, last_word=full)
        return found

    def _child_code(self) -> int:
        """Exit code of the shell around torchrun, negative for a signal. 0 also if unknown: Popen returns 0 for a child that
        another call has reaped."""
        code = self._child.poll() if self._child is not None else None
        return code or 0

    def _full_disk(self) -> str:
        """A message if the disk is full, else "". A process that fails on a full disk cannot write its error."""
        try:
            disk = os.statvfs(self.directory.path)
        except OSError:
            return ""
        left = disk.f_bavail * disk.f_frsize
        if left >= _FULL_BYTES and not (disk.f_files and disk.f_favail == 0):
            return ""
        where = self.directory.path
        return f"No space left on device: {left} bytes and {disk.f_favail} files are free in {where}"

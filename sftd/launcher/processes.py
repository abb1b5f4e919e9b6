"""Processes and their identity: pid and create time together, because pids are reused."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path

import psutil

from sftd.domain.run.identity import Identity
from sftd.launcher.command import TOKEN_VARIABLE
from sftd.wire.attempt.directory import ProcessFile

# psutil's clock has 10 ms ticks.
_SAME_SECONDS = 0.05


def host_name() -> str:
    """Name of this host."""
    return socket.gethostname()


def identity(home: Path) -> Identity:
    """The boot, pid namespace and home folder of this process. Empty on systems other than Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except FileNotFoundError:
        return Identity()
    folder = os.stat(home)
    return Identity(boot, str(namespace), f"{folder.st_dev}:{folder.st_ino}")


def identify(pid: int) -> ProcessFile:
    """Identity of a living process."""
    return ProcessFile(pid=pid, create_time=psutil.Process(pid).create_time(), host=host_name())


def is_alive(pid: int, create_time: float) -> bool:
    """Whether the process with this pid and create time still runs. A zombie does not."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - create_time) < _SAME_SECONDS and _runs(process)
    except psutil.NoSuchProcess:
        return False


def survivors(*tokens: str) -> list[int]:
    """Pids of all processes of the attempts with these tokens."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(TOKEN_VARIABLE) in tokens and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return [pid for pid in found if pid != os.getpid()]


def of_attempts(folder: Path) -> dict[int, Path]:
    """Pid → working folder, relative to `folder`, of every attempt's process that works below it."""
    found, folder = {}, folder.resolve()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError, ValueError):
            if TOKEN_VARIABLE in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = Path(process.cwd()).relative_to(folder)
    return found


def using(file: Path) -> dict[int, str]:
    """Pid → command of every other process of this user that has a file open."""
    found, name = {}, str(file.resolve())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and any(opened.path == name for opened in process.open_files()):
                found[process.pid] = " ".join(process.cmdline())
    return found


def kill(pids: list[int], timeout: float = 10.0) -> list[int]:
    """SIGKILL processes and wait at most `timeout` seconds. Returns those that live (uninterruptible sleep)."""
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            process.send_signal(signal.SIGKILL)
            processes.append(process)
    _, alive = psutil.wait_procs(processes, timeout=timeout)
    return [p.pid for p in alive if _runs(p)]


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def ranks(token: str) -> dict[int, int]:
    """Rank → pid of an attempt's training processes: the children of torchrun, without their own children."""
    found = {}
    for pid in survivors(token):
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            if (
                "RANK" in (env := process.environ())
                and "RANK" not in psutil.Process(process.ppid()).environ()
            ):
                found[int(env["RANK"])] = pid
    return found


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by SIGSTOP."""
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return False

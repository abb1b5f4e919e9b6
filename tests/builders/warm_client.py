"""In a Python that a test has started, before it imports anything: asks the server of `warm_python.py` to run the program
in its place, waits for it and passes signals on. Each start pays for what this file imports, so it imports little.
"""

from __future__ import annotations

import marshal
import os
import resource
import signal
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType
    from typing import NoReturn

VARIABLE = "WARM"
# Set for a command that a test starts, beside WARM: the daemon's own start is never replaced.
COMMAND_VARIABLE = "WARM_COMMAND"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
MESSAGE = 1 << 17
_NAMESPACES = ("pid", "mnt", "net", "user")
_BUILDERS = os.path.dirname(os.path.abspath(__file__))
# The other modules of the trainer keep torch out of their process.
_HEAVY = (
    *("torch.distributed.run", "sftd.trainer"),
    *(
        f"sftd.trainer.tools.{tool}"
        for tool in ("answer", "evaluate", "export", "export.prove", "export.reference", "probe")
    ),
    *(f"{_BUILDERS}/{name}.py" for name in ("warm_ranks", "ranks/export_all")),
    *(
        f"{os.path.dirname(os.path.dirname(_BUILDERS))}/scripts/{name}.py"
        for name in ("bench_checkpoint", "bench_generate", "bench_trainer", "write_random_model")
    ),
)


def replace_if_asked(server: str) -> None:
    """Have the server's fork be this process, if this is one whose imports take long. Returns where it is not."""
    program, _ = program_of(sys.orig_argv)
    is_command = os.environ.pop(COMMAND_VARIABLE, "") and program == "sftd"
    if not is_command and program not in _HEAVY and not program.endswith("/bin/torchrun"):
        return
    if "SLURM_JOB_ID" in os.environ or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(of_commands(server) if is_command else server)
        if connection.recv(MESSAGE).decode() != place():
            return
    except OSError:
        return
    descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
    descriptors = [fd for fd in descriptors if _is_inherited(fd)]
    ignored = [int(number) for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
    order = {
        "argv": list(sys.orig_argv),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "warnings": list(sys.warnoptions),
        "umask": _umask(),
        "limits": [resource.getrlimit(limit) for limit in LIMITS],
        "descriptors": descriptors,
        "ignored": ignored,
    }

    def forward(number: int, _frame: FrameType | None) -> None:
        connection.send(str(int(number)).encode())

    socket.send_fds(connection, [marshal.dumps(order)], descriptors)
    for number in FORWARDED:
        if number not in ignored:
            signal.signal(number, forward)
    answer = connection.recv(MESSAGE)
    end(int(answer) if answer else -signal.SIGKILL)


def of_commands(server: str) -> str:
    """Where the server of the commands listens."""
    return f"{server}-commands"


def program_of(argv: Sequence[str]) -> tuple[str, int]:
    """The module or script that `python [-P] [-u] [-W …] [-m] PROGRAM …` runs, and its place in there. Empty for anything else."""
    at = 1
    while at < len(argv) and argv[at] in ("-P", "-u", "-W", "-m"):
        at += 2 if argv[at] == "-W" else 1
    return (argv[at], at) if at < len(argv) and not argv[at].startswith("-") else ("", at)


def place() -> str:
    """A fork is only like a process of its own in the namespaces of the server."""
    return " ".join([sys.executable, *(os.readlink(f"/proc/self/ns/{name}") for name in _NAMESPACES)])


def _is_inherited(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def end(code: int) -> NoReturn:
    """End this process as another ended: a negative code is a signal."""
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)

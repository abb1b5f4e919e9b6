"""A Python that imports the trainer once, in the place of each `python -m torch.distributed.run` and `python -m sftd.trainer…`
that a test's processes start: ten seconds less of a core for each. And one that imports the commands, for each `python -m sftd`
that a test itself starts and asks this for.

The command lines of daemons, shells, torchruns, ranks and tools are the real ones; only their imports are shared.
`held/sitecustomize.py` calls `warm_client.py`, which sends a new interpreter's arguments, environment, folder, limits and
descriptors to the server that WARM names. The server forks a process that runs the same program, and the interpreter waits
for it and passes signals on. torchrun forks its ranks in the same way. Each fork writes its environment over the server's,
where /proc shows it: sftd finds the processes of an attempt there. An interpreter in another namespace, or in a job of Slurm,
imports by itself.

What this hides: the time and the order of imports, what a module reads from the environment while it is imported, and the
seed of hashes, which all forks share. Each launcher therefore keeps tests without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import marshal
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.builders.paths import ROOT
from tests.builders.warm_client import (
    COMMAND_VARIABLE,
    FORWARDED,
    LIMITS,
    MESSAGE,
    VARIABLE,
    end,
    of_commands,
    place,
    program_of,
)

# Room for the environment of any fork, which must fit where the server's was.
_ROOM = "x" * 64_000
# A process with threads is not forked: Arrow's allocator would start one.
ALONE = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
_DESCRIPTORS = 200


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """A server that imports everything at the first start. Yields what WARM must be."""
    with tempfile.TemporaryDirectory(prefix="sftd-warm-") as folder:
        path = f"{folder}/socket"
        own = {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
            "ROOM": _ROOM,
        }
        with subprocess.Popen(
            [sys.executable, "-P", __file__, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | own | ALONE,
            # Ctrl-C ends what tests started, and the server when its standard input ends.
            start_new_session=True,
        ) as server:
            assert server.stdin
            assert server.stdout
            assert server.stdout.readline(), "the warm Python did not start"
            yield path
            server.stdin.close()
        assert server.returncode == 0, (
            "the warm Python failed: what was started meanwhile has imported by itself"
        )


def environment(server: str, base: Mapping[str, str], command: Sequence[str] = ()) -> dict[str, str]:
    """What the environment of a process that a test starts must have besides `base`. A `command` of `sftd` starts warm itself,
    unless it is a daemon."""
    paths = [str(ROOT / "tests" / "builders" / "held"), *filter(None, [base.get("PYTHONPATH")])]
    own = {VARIABLE: server, "PYTHONPATH": os.pathsep.join(paths)}
    return own | ({COMMAND_VARIABLE: "1"} if command and command[0] != "daemon" else {})


def _serve(path: str) -> None:
    listeners = []
    for name in (of_commands(path), path):
        listeners.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listeners[-1].bind(name)
        listeners[-1].listen(64)
    # Nobody waits for those that wait for a fork.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    # Two processes: torch is in none of the commands.
    if os.fork() == 0:
        listeners[1].close()
        _answer(listeners[0], _import_commands)
        os._exit(0)
    # If one of the two ends, nothing waits for it: interpreters that find no listener import by themselves.
    listeners[0].close()
    _answer(listeners[1], import_all)


def _answer(listener: socket.socket, prepare: Callable[[], None]) -> None:
    """Fork for each connection, until the standard input ends. The first one waits for what `prepare` imports."""
    is_prepared = False
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    poll.register(listener, select.POLLIN)
    while not any(fd == 0 for fd, _ in poll.poll()):
        if not is_prepared:
            prepare()
            assert len(os.listdir("/proc/self/task")) == 1, (
                "an import has started a thread: forking is not safe"
            )
            gc.collect()
            # The forks share these pages.
            gc.freeze()
            is_prepared = True
        connection = listener.accept()[0]
        if os.fork() == 0:
            listener.close()
            _attend(connection)
        connection.close()


def _import_commands() -> None:
    cli = importlib.import_module("sftd.cli")
    for module, _ in cli.COMMANDS.values():
        importlib.import_module(f"sftd.cli.{module}")
    importlib.import_module("sqlalchemy.dialects.sqlite")


# All that an attempt will need, and what those import when they are used first. Nothing here starts a thread or a process
# group: forking stays safe.
_USED = """
    cloudpickle encodings.idna megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader
    megatron.core.dist_checkpointing.strategies.fully_parallel
    megatron.core.dist_checkpointing.strategies.state_dict_saver megatron.core.models.mimo numpy.ma pandas pyarrow.compute
    pyarrow.fs pyarrow.parquet sftd.trainer.runtime.megatron_edges.no_accelerator sftd.trainer.direct.direct sftd.trainer.loop.generate sftd.trainer.loop.attempt
    sftd.trainer.runtime.output_cap torch.distributed.argparse_util torch.distributed.elastic.rendezvous.c10d_rendezvous_backend
    torch.distributed.elastic.rendezvous.registry torch.distributed.launcher.api torch.utils.serialization.config transformers.models.auto.tokenization_auto zoneinfo
""".split()


def import_all() -> None:
    """Import what a rank and its torchrun need. Warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noise = importlib.import_module("sftd.trainer.runtime.megatron_edges.noise")
        noise.quiet_third_parties()
        for name in _USED:
            importlib.import_module(name)


def _attend(connection: socket.socket) -> NoReturn:
    """Fork what a connection asks for, pass signals to it, and answer with its exit code. It ends when the asker does."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.send(place().encode())
    message, descriptors, _, _ = socket.recv_fds(connection, MESSAGE, _DESCRIPTORS)
    if not message:
        os._exit(0)
    order = marshal.loads(message)
    pid = os.fork()
    if pid == 0:
        _die_with_parent()
        os.setsid()
        connection.close()
        _take_descriptors(dict(zip(order["descriptors"], descriptors, strict=True)))
        os.umask(order["umask"])
        os.chdir(order["folder"])
        for limit, value in zip(LIMITS, order["limits"], strict=True):
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(limit, value)
        sys.path[:] = order["path"]
        warnings._processoptions(order["warnings"])  # type: ignore[attr-defined]
        _become(order["argv"], order["environment"], order["ignored"])
    for fd in descriptors:
        os.close(fd)
    process = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    poll.register(process, select.POLLIN)
    while process not in (ready := {fd for fd, _ in poll.poll()}):
        if connection.fileno() in ready:
            asked = connection.recv(MESSAGE)
            os.kill(pid, int(asked) if asked else signal.SIGKILL)
            if not asked:
                poll.unregister(connection)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.send(str(code).encode())
    os._exit(0)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _take_descriptors(received: dict[int, int]) -> None:
    """Descriptors get the numbers that they have in the asker (number there → number here)."""
    above = max([*received, *received.values(), 2]) + 1
    import fcntl

    moved = {there: fcntl.fcntl(here, fcntl.F_DUPFD, above) for there, here in received.items()}
    for here in received.values():
        os.close(here)
    for there in (0, 1, 2):
        if there not in moved:
            os.close(there)
    for there, here in moved.items():
        os.dup2(here, there)
        os.close(here)


# In a fork.


def _become(argv: Sequence[str], environment: Mapping[str, str], ignored: Sequence[int] = ()) -> NoReturn:
    """Run what `argv` runs, as its process would."""
    code = 1
    try:
        # What ends with the process that was forked, such as numbers of descriptors, which another has here by then: closing one
        # took gloo's away from its thread, and that aborted ranks at random.
        weakref.finalize._registry.clear()  # type: ignore[attr-defined]
        # So that no garbage of that process is collected here, which may close descriptors as well.
        gc.freeze()
        os.environ.clear()
        os.environ.update(environment)
        _show_environment(environment)
        for number in FORWARDED:
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
        if signal.SIGINT not in ignored:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        unbuffered = "-u" in argv[1:3] or bool(environment.get("PYTHONUNBUFFERED"))
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(  # type: ignore[union-attr]
                write_through=unbuffered, line_buffering=stream is sys.stderr or stream.isatty()
            )
        code = _run(argv)
    except BaseException:  # noqa: BLE001  a fork must never return to where it was forked
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        end(code)


def _show_environment(environment: Mapping[str, str]) -> None:
    """Put it where the kernel reads it for /proc: sftd knows the processes of an attempt by that."""
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    start, end = int(fields[47]), int(fields[48])
    block = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items())
    assert len(block) < end - start, "the environment does not fit: make more room"
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, block, len(block))


def _run(argv: Sequence[str]) -> int:
    """Run a module or a script to its end. Returns the exit code."""
    import atexit
    import runpy
    import threading

    # A rank has it from its torchrun.
    if not _is_prepared:
        _prepare()
    program, at = program_of(argv)
    sys.orig_argv[:] = argv
    sys.argv[:] = argv[at:]
    code = 0
    try:
        if argv[at - 1] == "-m":
            if not {"-P", "PYTHONSAFEPATH"} & {*argv[1:3], *(n for n, v in os.environ.items() if v)}:
                sys.path.insert(0, os.getcwd())
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(program).parent))
            runpy.run_path(program, run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, int) or ended.code is None:
            code = ended.code or 0
        else:
            print(ended.code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT
    except BaseException:  # noqa: BLE001  what the interpreter does
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    return code


_is_prepared: list[bool] = []


def _prepare() -> None:
    """What Python does by itself at a start; and torchrun's ranks are forks as well."""
    import runpy

    _is_prepared.append(True)
    runpy.run_path(str(ROOT / "tests" / "builders" / "held" / "sitecustomize.py"), {"IS_FORKED": True})
    if "torch" in sys.modules:
        import torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler as torchrun

        torchrun.SubprocessHandler._popen = _start_rank


def _start_rank(handler: Any, args: Sequence[str], env: dict[str, str]) -> Any:
    """What torchrun starts a rank with, in place of Popen."""
    if args[0] != sys.executable:
        return subprocess.Popen(
            args, env=env, stdout=handler._stdout, stderr=handler._stderr, start_new_session=True
        )
    streams = {1: handler._stdout, 2: handler._stderr}
    return _Rank(lambda: _become_rank(list(args), env, streams))


def _become_rank(argv: list[str], environment: dict[str, str], streams: dict[int, Any]) -> NoReturn:
    for number, stream in streams.items():
        if stream is not None:
            os.dup2(stream.fileno(), number)
    # As Popen does: a rank holds nothing of torchrun's.
    os.closerange(3, 4096)
    _become(argv, environment)


class _Rank:
    """Of Popen, what torchrun uses."""

    def __init__(self, run: Callable[[], NoReturn]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        ready, is_ready = os.pipe()
        with warnings.catch_warnings():
            # torchrun has threads; none of them is in a rank.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.close(is_ready)
            run()
        os.close(is_ready)
        # It leads a session of its own by the time that it closes this.
        os.read(ready, 1)
        os.close(ready)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.poll() is None:
            process = os.pidfd_open(self.pid)
            ready, _, _ = select.select([process], [], [], timeout)
            os.close(process)
            if not ready:
                raise subprocess.TimeoutExpired("rank", timeout or 0)
            self.poll()
        assert self.returncode is not None
        return self.returncode


if __name__ == "__main__":
    _serve(sys.argv[1])
    # Without what libraries say when they are unloaded.
    os._exit(0)

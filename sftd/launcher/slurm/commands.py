"""Slurm's commands: what is asked of the controller, and what it answers. Nothing here remembers anything."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping

import msgspec

# (argv, environment, seconds) → (exit code, stdout, stderr). Raises `OSError` and `subprocess.TimeoutExpired`.
Run = Callable[[list[str], Mapping[str, str] | None, float], tuple[int, str, str]]

# Slurm's own commands give up after some such time, but not always.
_SECONDS = 60.0
# Variables by which a person has these commands leave jobs out, or ask before they act.
_HABITS = ("SQUEUE_", "SCANCEL_", "SACCT_", "SINFO_")
# What may hold anything comes last.
_FIELDS = ("JobID", "State", "RestartCnt", "NodeList", "exit_code", "Reason", "WorkDir")
# A job that has none of these may have processes.
ENDED = frozenset(
    {
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
        "TIMEOUT",
    }
)  # fmt: skip
WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
# sbatch says these of a job that Slurm will never take.
_NEVER = re.compile(
    r"[Ii]nvalid (?!job id)|not available|[Uu]nrecognized option|not permitted|access/permission denied|"
    r"unable to open|time limit is invalid|More processors requested than permitted|unknown option|does not exist|ambiguous"
)
# And these while it takes none now. (More time than a partition allows is no such limit.)
_LATER = re.compile(
    r"^(?!.*time limit is invalid).*(?:"
    r"inactive or drain|[Uu]nable to contact|[Ss]ocket timed out|Connection refused|[Tt]emporarily|try again|[Cc]ommunication|"
    r"[Tt]oo many|Max(?:Submit|Jobs)|[Ll]imit|Zero Bytes|rate|in transition|backup|starting up|munge)"
)


# What stands before the reason in an error's last line.
_NOISE = re.compile(
    r"^(?:\w+: (?:error|fatal): )?(?:slurm_load_\w+(?: error)?: |Kill job error on job id \S+: )?"
)


class SlurmJob(msgspec.Struct, frozen=True):
    """A job as Slurm tells of it. `state` is COMPLETING while processes may be left of one that has ended;
    `folder` is the one in which it runs: the attempt's, by which it is found again."""

    job: str
    state: str
    restarts: int = 0
    reason: str = ""
    nodes: str = ""
    exit_code: str = ""
    folder: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether no process of it is left."""
        return self.state in ENDED


class Unanswered(Exception):
    """The controller did not answer, or not what was asked."""


class Refusal(Exception):
    """sbatch did not hand the job over. `later`: it may another time; `unsure`: it may have done it all the same."""

    def __init__(
        self, message: str, *, never: bool = False, later: bool = False, unsure: bool = False
    ) -> None:
        super().__init__(message)
        self.never = never
        self.later = later
        self.unsure = unsure


def run_command(argv: list[str], env: Mapping[str, str] | None, seconds: float) -> tuple[int, str, str]:
    """Run one command to its end."""
    done = subprocess.run(
        argv,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        text=True,
        errors="replace",
        timeout=seconds,
    )
    return done.returncode, done.stdout, done.stderr


def own_jobs(run: Run) -> dict[str, SlurmJob]:
    """All jobs of this user that the controller still knows, by number, in one call. Raises `Unanswered`."""
    # What is left out here is taken for gone: without --all that is what runs in hidden partitions.
    fields = ",".join(f"{name}:|" for name in _FIELDS)
    answer = _ask(
        run, ["squeue", "--noheader", "--all", "--states=all", f"--user={os.getuid()}", f"--Format={fields}"]
    )
    found = {}
    for line in answer.splitlines():
        number, state, restarts, nodes, exit_code, reason, folder = line.removesuffix("|").split("|", 6)
        found[number] = SlurmJob(
            number,
            state,
            int(restarts or 0),
            "" if reason in ("None", "N/A") else reason,
            nodes,
            _as_written(exit_code),
            folder,
        )
    return found


def _as_written(status: str) -> str:
    """A wait status as Slurm writes it elsewhere: exit code and signal."""
    return f"{int(status) >> 8}:{int(status) & 127}" if status.isdigit() else status


def accounted(run: Run, numbers: Iterable[str]) -> dict[str, SlurmJob]:
    """What the accounting says of jobs that the controller has forgotten, in one call. Raises `Unanswered`."""
    fields = "JobIDRaw,State,NodeList,ExitCode"
    argv = ["sacct", "--noheader", "--allocations", "--parsable2", f"--format={fields}"]
    answer = _ask(run, [*argv, f"--jobs={','.join(numbers)}"])
    found = {}
    for line in answer.splitlines():
        number, state, nodes, exit_code = line.split("|")
        # "CANCELLED by 1000"
        found[number] = SlurmJob(number, state.split()[0], 0, state, nodes, exit_code)
    return found


class Partition(msgspec.Struct, frozen=True):
    """A partition: `name` ends with * when it is the default, `usable` are its nodes that run jobs or could."""

    name: str
    is_up: bool
    time_limit: str
    usable: int
    nodes: int
    gres: tuple[str, ...] = ()

    def told(self) -> str:
        """In words."""
        limit = "no time limit" if self.time_limit == "infinite" else f"at most {self.time_limit}"
        state = "" if self.is_up else "not up, "
        what = ", ".join((f"{self.usable} of {self.nodes} nodes", limit, *self.gres))
        return f"{self.name} ({state}{what})"


def version(run: Run) -> str:
    """What Slurm calls itself. Raises `Unanswered`."""
    return _ask(run, ["sbatch", "--version"]).strip()


def partitions(run: Run) -> list[Partition]:
    """All partitions that this user may see, in one call. Raises `Unanswered`."""
    found: dict[str, Partition] = {}
    # A line for each kind of node in a partition; nodes: allocated/idle/other/total.
    for line in _ask(run, ["sinfo", "--noheader", "--format=%P|%a|%l|%F|%G"]).splitlines():
        name, up, limit, counts, gres = line.split("|", 4)
        allocated, idle, _, total = (int(number) for number in counts.split("/"))
        before = found.get(name, Partition(name, up == "up", limit, 0, 0))
        kinds = (*before.gres, *(() if gres in ("", "(null)") else (re.sub(r"\(S:[^)]*\)", "", gres),)))
        found[name] = Partition(
            name,
            up == "up",
            limit,
            before.usable + allocated + idle,
            before.nodes + total,
            tuple(dict.fromkeys(kinds)),
        )
    return list(found.values())


def submit(run: Run, script: str, env: Mapping[str, str]) -> str:
    """Hand a job over. Returns its number. Raises `Refusal`."""
    try:
        code, out, err = run(["sbatch", "--parsable", script], env, _SECONDS)
    except subprocess.TimeoutExpired:
        raise Refusal("sbatch got no answer", later=True, unsure=True) from None
    except OSError as error:
        raise Refusal(f"sbatch: {error}", later=True) from None
    # With several clusters: number;cluster.
    number = out.strip().split(";")[0].splitlines()[-1:] or [""]
    if code == 0 and number[0].isdigit():
        return number[0]
    message = " ".join((err or out or f"sbatch ended with {code}").split())
    message = message.removeprefix("sbatch: error: ").replace("Batch job submission failed: ", "")
    later = _LATER.search(message) is not None
    never = not later and _NEVER.search(message) is not None
    raise Refusal(message, never=never, later=later, unsure="timed out" in message or "Zero Bytes" in message)


def cancel(run: Run, numbers: list[str]) -> None:
    """End jobs, in one call: those that wait at once, the others as fast as Slurm does. Raises `Unanswered`."""
    # Of jobs that have ended already --quiet says nothing, though the exit code may.
    _ask(run, ["scancel", "--quiet", *numbers], may_fail_silently=True)


def _ask(run: Run, argv: list[str], *, may_fail_silently: bool = False) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith(_HABITS)}
    try:
        code, out, err = run(argv, env, _SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Unanswered(f"{argv[0]} got no answer within {error.timeout:.0f} s") from None
    except OSError as error:
        raise Unanswered(f"{argv[0]}: {error.strerror or error}") from None
    if code and not (may_fail_silently and not err.strip()):
        lines = (err or out or f"ended with {code}").strip().splitlines()
        raise Unanswered(_NOISE.sub("", lines[-1]))
    return out

"""Slurm's commands and their output. Stateless."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping

import msgspec

# (argv, environment, seconds) → (exit code, stdout, stderr). Raises `OSError` and `subprocess.TimeoutExpired`.
Run = Callable[[list[str], Mapping[str, str] | None, float], tuple[int, str, str]]

# Slurm's commands usually, but not always, time out earlier.
_SECONDS = 60.0
# Users' variables that make these commands leave out jobs or ask for confirmation.
_HABITS = ("SQUEUE_", "SCANCEL_", "SACCT_", "SINFO_")
# WorkDir is last: it may contain the separator.
_FIELDS = ("JobID", "State", "RestartCnt", "NodeList", "exit_code", "Reason", "WorkDir")
# A job in any other state may have processes.
ENDED = frozenset(
    {
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
        "TIMEOUT",
    }
)  # fmt: skip
WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
# sbatch's errors for a job that Slurm will never accept.
_NEVER = re.compile(
    r"[Ii]nvalid (?!job id)|not available|[Uu]nrecognized option|not permitted|access/permission denied|"
    r"unable to open|time limit is invalid|More processors requested than permitted|unknown option|does not exist|ambiguous"
)
# sbatch's errors while Slurm accepts no job now. (A time limit above that of the partition is permanent.)
_LATER = re.compile(
    r"^(?!.*time limit is invalid).*(?:"
    r"inactive or drain|[Uu]nable to contact|[Ss]ocket timed out|Connection refused|[Tt]emporarily|try again|[Cc]ommunication|"
    r"[Tt]oo many|Max(?:Submit|Jobs)|[Ll]imit|Zero Bytes|rate|in transition|backup|starting up|munge)"
)


# Prefixes of the reason in an error's last line.
_NOISE = re.compile(
    r"^(?:\w+: (?:error|fatal): )?(?:slurm_load_\w+(?: error)?: |Kill job error on job id \S+: )?"
)


class SlurmJob(msgspec.Struct, frozen=True):
    """Slurm's report on a job. `state` is COMPLETING while an ended job may have processes. `folder` is its working folder, that
    of the attempt, by which the job is found again."""

    job: str
    state: str
    restarts: int = 0
    reason: str = ""
    nodes: str = ""
    exit_code: str = ""
    folder: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether the job has no processes left."""
        return self.state in ENDED


class Unanswered(Exception):
    """The controller did not answer, or answered with an error."""


class Refusal(Exception):
    """sbatch failed. `never`: Slurm will never accept the job. `later`: a retry may succeed. `unsure`: the job may have been
    submitted."""

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
    """All jobs of this user that the controller still lists, by number, in one call. Raises `Unanswered`, and `ValueError` for
    another format."""
    # A job that is missing here counts as gone. --all includes hidden partitions.
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
    """A wait status in Slurm's notation: exit code and signal."""
    return f"{int(status) >> 8}:{int(status) & 127}" if status.isdigit() else status


def accounted(run: Run, numbers: Iterable[str]) -> dict[str, SlurmJob]:
    """The accounting's records of jobs that the controller no longer lists, in one call. Raises `Unanswered`, and `ValueError`
    for another format."""
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
    """A partition. `name` ends with * for the default one. `usable` is the number of nodes that are allocated or idle."""

    name: str
    is_up: bool
    time_limit: str
    usable: int
    nodes: int
    gres: tuple[str, ...] = ()

    def told(self) -> str:
        """A description for users."""
        limit = "no time limit" if self.time_limit == "infinite" else f"at most {self.time_limit}"
        state = "" if self.is_up else "not up, "
        what = ", ".join((f"{self.usable} of {self.nodes} nodes", limit, *self.gres))
        return f"{self.name} ({state}{what})"


def version(run: Run) -> str:
    """Slurm's name and version. Raises `Unanswered`."""
    return _ask(run, ["sbatch", "--version"]).strip()


def partitions(run: Run) -> list[Partition]:
    """All partitions that this user may see, in one call. Raises `Unanswered`, and `ValueError` for another format."""
    found: dict[str, Partition] = {}
    # One line per kind of node in a partition. %F: allocated/idle/other/total nodes.
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
    """Submit a job. Returns its number. Raises `Refusal`."""
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
    """Cancel jobs in one call. Running ones may take a while to end. Raises `Unanswered`."""
    # With --quiet there is no message for jobs that have ended, but the exit code may be an error.
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

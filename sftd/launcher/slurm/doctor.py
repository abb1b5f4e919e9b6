"""Slurm's checks of `sftd doctor`: the daemon's calls, with the same arguments."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping

from sftd.domain.finding import Finding, broken, ok, warning
from sftd.domain.spec.launch.launchers import SLURM
from sftd.launcher.slurm import commands as slurm_commands
from sftd.launcher.slurm.commands import Partition, Unanswered

_NEEDED = ("sbatch", "squeue", "scancel")
# A user waits for the answer.
_SECONDS = 15.0
_SHOWN_PARTITIONS = 6


def examine(daemon: Mapping[str, int] | None) -> Iterator[Finding]:
    """Check Slurm's commands, controller and partitions, and whether the running daemon, with these devices and places, found
    sbatch."""
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if len(missing) == len(_NEEDED):
        yield ok("Slurm", "not used: its commands are not installed")
        return
    if missing:
        fix = "install Slurm's client commands, or put all of them on the PATH of you and of the daemon"
        yield broken("Slurm", f"{', '.join(missing)} cannot be found: no job can be driven from here", fix)
        return
    try:
        version = slurm_commands.version(_run)
    except Unanswered as error:
        fix = "these commands need slurm.conf: set SLURM_CONF to it for you and for the daemon"
        yield warning("Slurm", f"its commands do not work: {error}", fix)
        return
    yield ok("Slurm", f"{version}, {shutil.which('sbatch')}")
    yield from _controller()
    if daemon is not None and SLURM.name not in daemon:
        fix = "restart it with sbatch on its PATH (`sftd daemon --stop`, then `sftd daemon --detach`)"
        yield warning("Slurm", "the daemon found no sbatch when it started: runs for Slurm wait", fix)


def _run(argv: list[str], env: Mapping[str, str] | None, seconds: float) -> tuple[int, str, str]:
    return slurm_commands.run_command(argv, env, min(seconds, _SECONDS))


def _controller() -> Iterator[Finding]:
    began = time.perf_counter()
    try:
        jobs = slurm_commands.own_jobs(_run)
    except Unanswered as error:
        fix = "run `scontrol ping`; slurmctld and munge must run. Jobs continue, and the daemon tries again"
        yield warning("Slurm", f"the controller does not answer: {error}", fix)
        return
    except ValueError:
        fix = "use Slurm 22.05 or later; otherwise report the output of `squeue --version`"
        yield broken("Slurm", "squeue does not print the format that sftd requests", fix)
        return
    took = time.perf_counter() - began
    living = sum(not job.has_ended for job in jobs.values())
    yield ok(
        "Slurm", f"the controller answers in {took * 1000:.0f} ms; {living} jobs of yours, {_accounting()}"
    )
    try:
        found = slurm_commands.partitions(_run)
    except (Unanswered, ValueError) as error:
        yield warning("Slurm", f"sinfo does not list the partitions: {error}", "run `sinfo -s`")
        return
    yield _partitions(found)


def _accounting() -> str:
    try:
        slurm_commands.accounted(_run, ["1"])
    except (Unanswered, ValueError):
        return "no accounting (sacct): for a job that Slurm no longer lists, sftd reads its folder"
    return "accounting answers"


def _partitions(found: list[Partition]) -> Finding:
    shown = [partition.told() for partition in found[:_SHOWN_PARTITIONS]]
    if len(found) > len(shown):
        shown.append(f"and {len(found) - len(shown)} more")
    said = f"partitions: {', '.join(shown) or 'none'}"
    if not any(partition.is_up and partition.usable for partition in found):
        fix = "run `sinfo -R` for the reasons why nodes are down or drained; until one is back, jobs wait"
        return warning("Slurm", f"{said}: no node can start a job", fix)
    return ok("Slurm", said)

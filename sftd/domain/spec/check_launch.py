"""What must hold of `launch`: who may start several machines, and what may stand in a job script."""

from __future__ import annotations

import re
import shlex

from sftd.domain.errors import Problem, quote
from sftd.domain.spec.sections import Slurm
from sftd.domain.spec.slurm_gpus import asks_for_gpus
from sftd.domain.spec.spec import Spec

# One word of a line of sbatch's options: nothing that ends it, begins a comment or opens a quotation.
_WORD = re.compile(r"[^\s\"'\\#]+")
# minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds
_TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}")
_OPTION = re.compile(r"-[^\x00-\x1f\x7f]+")
# What the launcher decides by itself, by all their names, with the key that decides it.
_OWNED = {
    "--array": "", "-a": "",
    "--chdir": "", "-D": "", "--workdir": "",
    "--clusters": "", "-M": "", "--cluster": "",
    "--error": "", "-e": "",
    "--export": "launch.slurm.setup", "--export-file": "launch.slurm.setup",
    "--input": "", "-i": "",
    "--job-name": "", "-J": "",
    "--nodes": "launch.nnodes", "-N": "launch.nnodes",
    "--ntasks": "launch.nnodes", "-n": "launch.nnodes",
    "--ntasks-per-node": "launch.nproc_per_node", "--tasks-per-node": "launch.nproc_per_node",
    "--open-mode": "",
    "--output": "", "-o": "",
    "--requeue": "launch.max_restarts", "--no-requeue": "launch.max_restarts",
    "--signal": "launch.slurm.stop_seconds",
    "--wait": "", "-W": "",
    "--wrap": "",
}  # fmt: skip


def check_launch(spec: Spec, warnings: list[Problem]) -> list[Problem]:
    """Problems with `launch`; what is only doubtful is added to `warnings`."""
    launch = spec.launch
    if launch.launcher == "local":
        problems = []
        if launch.nnodes > 1:
            problems.append(
                Problem(
                    "launch.nnodes",
                    f"{launch.nnodes}: the local launcher starts ranks on the daemon's own machine only",
                    "set it to 1, or launch.launcher to slurm",
                )
            )
        if launch.slurm != Slurm():
            warnings.append(
                Problem(
                    "launch.slurm", "is not used: launch.launcher is local", "set launch.launcher to slurm"
                )
            )
        return problems
    problems = _check_words(launch.slurm) + _check_extra(launch.slurm.extra_args)
    if launch.device == "auto" and not asks_for_gpus(launch.slurm):
        warnings.append(
            Problem(
                "launch.device",
                "is auto, and launch.slurm asks for no GPU: the job trains on CPUs",
                "set it to cuda for a GPU a rank, or to cpu",
            )
        )
    if launch.device == "cuda" and launch.slurm.gres and not asks_for_gpus(launch.slurm):
        warnings.append(
            Problem(
                "launch.slurm.gres",
                f"{quote(launch.slurm.gres)} names no GPU, and launch.device is cuda: the job finds GPUs only where Slurm gives "
                "them without being asked",
                f"add gpu:{spec.nproc_per_node} to it",
            )
        )
    return problems


def _check_words(slurm: Slurm) -> list[Problem]:
    problems = []
    for name in ("partition", "account", "qos", "time", "gres", "constraint", "exclude"):
        # YAML's 90 is a number.
        value = str(getattr(slurm, name))
        where = f"launch.slurm.{name}"
        if not value:
            continue
        if not _WORD.fullmatch(value):
            what = f"{quote(value)} holds spaces, quotes, a backslash or #"
            problems.append(Problem(where, what, "write it as sbatch takes it, without those"))
        elif name == "time" and not _TIME.fullmatch(value):
            what = f"{quote(value)} is not a time as Slurm writes it"
            problems.append(
                Problem(where, what, "write minutes, hours:minutes:seconds or days-hours, such as 90 or 2-0")
            )
    if "\0" in slurm.setup:
        problems.append(Problem("launch.slurm.setup", "holds a NUL character", "write plain shell lines"))
    return problems


def _check_extra(options: list[str]) -> list[Problem]:
    where, problems = "launch.slurm.extra_args", []
    for option in options:
        try:
            # sbatch reads a line as a shell does: further options may stand behind the first.
            words = shlex.split(option)
        except ValueError:
            words = []
        if not words or not _OPTION.fullmatch(option):
            what = f"{quote(option)} is not an option on one line"
            problems.append(Problem(where, what, "write each as one text, such as --mem=0"))
        elif owned := next(filter(None, map(_owned, words)), None):
            instead = _OWNED[owned]
            fix = f"use {instead}" if instead else "leave it out"
            problems.append(Problem(where, f"{quote(option)}: sftd decides {owned} by itself", fix))
    return problems


def _owned(word: str) -> str | None:
    """Which of the launcher's own options a word names."""
    name = word.partition("=")[0]
    if not name.startswith("--"):
        # -N2 is -N 2.
        return name[:2] if name[:2] in _OWNED else None
    if name in _OWNED:
        return name
    # To sbatch, a beginning that only one option has is enough.
    return next((owned for owned in _OWNED if owned.startswith(name) and name != "--"), None)

"""What must hold of `launch.slurm`: which options a job script may have, and whether they ask for GPUs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from sftd.domain.errors import Problem, quote
from sftd.domain.spec.sections import Slurm
from sftd.domain.spec.spec import Spec

# One word of a line of sbatch's options: nothing that ends it, begins a comment or opens a quotation.
_WORD = re.compile(r"[^\s\"'\\#]+")
# minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds
_TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}")
_OPTION = re.compile(r"-[^\x00-\x1f\x7f]+")
# What the launcher decides by itself, by all of their names, with the key that decides it.
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
# The generic resources that are GPUs, or shares of one.
_GPU_NAMES = frozenset({"gpu", "mps", "shard"})
# These take a number, perhaps after a type.
_GPUS = ("--gpus", "--gpus-per-node", "--gpus-per-socket", "--gpus-per-task")
# These take a list of resources, each with its name, perhaps a type, and a number.
_GRES = ("--gres", "--tres-per-job", "--tres-per-node", "--tres-per-socket", "--tres-per-task")
# Options with a beginning like that of one above: sbatch takes a beginning that only one option has.
_OTHERS = (
    "--get-user-env",
    "--gid",
    "--gpu-bind",
    "--gpu-freq",
    "--gres-flags",
    "--tres-bind",
    "--tres-freq",
)


def check(spec: Spec) -> tuple[list[Problem], list[Problem]]:
    """(problems, warnings) of a spec whose attempts Slurm runs."""
    launch, warnings = spec.launch, list[Problem]()
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
    return problems, warnings


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
            # sbatch reads a line as a shell does: further options may follow the first.
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


def asks_for_gpus(slurm: Slurm) -> bool:
    """Whether the options of a job ask for at least one GPU."""
    return _names_gpus(slurm.gres) or any(map(_option_asks, slurm.extra_args))


def _option_asks(text: str) -> bool:
    for name, value in _options(text):
        if name in _GPUS and any(_count(part) for part in value.split(",")):
            return True
        if name in _GRES and _names_gpus(value):
            return True
    return False


def _options(text: str) -> Iterator[tuple[str, str]]:
    """The options of one text, each with its value: `--gpus=2`, `--gpus 2`, `-G2` and `-G 2` are all the same."""
    try:
        words = shlex.split(text)
    except ValueError:
        return
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("-G"):
            yield "--gpus", word[2:] or following
        elif word.startswith("--"):
            name, equals, value = word.partition("=")
            yield _whole_name(name), value if equals else following


def _whole_name(name: str) -> str:
    known = (*_GPUS, *_GRES, *_OTHERS)
    meant = [name] if name in known else [option for option in known if option.startswith(name)]
    return meant[0] if len(meant) == 1 else name


def _names_gpus(gres: str) -> bool:
    """Whether a list of generic resources holds GPUs: `gpu`, `gpu:2`, `gpu:h100:4`, `gres/gpu:h100=4`."""
    for entry in str(gres).split(","):
        name, *rest = re.split("[:=]", entry.strip().removeprefix("gres/").removeprefix("gres:"))
        if name in _GPU_NAMES and _count(rest[-1] if rest else ""):
            return True
    return False


def _count(text: str) -> int:
    """The number with which a resource ends; one where none is written."""
    number = re.search(r"(?:^|[:=])(\d+)[kKmMgG]?$", text)
    return int(number[1]) if number else 1

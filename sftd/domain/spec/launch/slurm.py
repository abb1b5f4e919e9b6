"""Rules of `launch.slurm`: the allowed options of a job script, and whether they request GPUs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from sftd.domain.errors import Problem, quote
from sftd.domain.rules import Rules
from sftd.domain.spec.sections import Slurm
from sftd.domain.spec.spec import Spec

# One word of an sbatch option line: no character that ends the word, begins a comment or opens a quotation.
_WORD = re.compile(r"[^\s\"'\\#]+")
# minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds
_TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}")
_OPTION = re.compile(r"-[^\x00-\x1f\x7f]+")
# All names of options that only the launcher sets → key of the spec that decides them, if any.
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
# Other options that share a prefix with those above. sbatch accepts any unique prefix of an option.
_OTHERS = (
    "--get-user-env",
    "--gid",
    "--gpu-bind",
    "--gpu-freq",
    "--gres-flags",
    "--tres-bind",
    "--tres-freq",
)


def unusable_slurm_word(spec: Spec) -> Iterator[Problem]:
    """Each value must be one word of an sbatch option, and the time must be a Slurm time."""
    for name in ("partition", "account", "qos", "time", "gres", "constraint", "exclude"):
        # YAML's 90 is a number.
        value = str(getattr(spec.launch.slurm, name))
        where = f"launch.slurm.{name}"
        if value and not _WORD.fullmatch(value):
            what = f"{quote(value)} contains spaces, quotes, a backslash or #"
            yield Problem(where, what, "write it as an sbatch option value, without these characters")
        elif value and name == "time" and not _TIME.fullmatch(value):
            what = f"{quote(value)} is not a Slurm time"
            yield Problem(
                where, what, "write minutes, hours:minutes:seconds or days-hours, such as 90 or 2-0"
            )


def setup_with_nul(spec: Spec) -> Iterator[Problem]:
    """A shell script cannot contain a NUL character."""
    if "\0" in spec.launch.slurm.setup:
        yield Problem("launch.slurm.setup", "contains a NUL character", "write plain shell lines")


def unusable_slurm_option(spec: Spec) -> Iterator[Problem]:
    """Each extra argument must be an option on one line that the launcher does not set."""
    where = "launch.slurm.extra_args"
    for option in spec.launch.slurm.extra_args:
        try:
            # sbatch splits a line like a shell, so further options may follow the first.
            words = shlex.split(option)
        except ValueError:
            words = []
        if not words or not _OPTION.fullmatch(option):
            what = f"{quote(option)} is not an option on one line"
            yield Problem(where, what, "write each as one text, such as --mem=0")
        elif owned := next(filter(None, map(_owned, words)), None):
            instead = _OWNED[owned]
            fix = f"use {instead}" if instead else "leave it out"
            yield Problem(where, f"{quote(option)}: sftd sets {owned} itself", fix)


def _owned(word: str) -> str | None:
    """The launcher's own option that a word sets; None if it sets none."""
    name = word.partition("=")[0]
    if not name.startswith("--"):
        # -N2 means -N 2.
        return name[:2] if name[:2] in _OWNED else None
    if name in _OWNED:
        return name
    # sbatch accepts any unique prefix of an option.
    return next((owned for owned in _OWNED if owned.startswith(name) and name != "--"), None)


def job_without_gpus(spec: Spec) -> Iterator[Problem]:
    """A job gets only the GPUs that it requests."""
    launch = spec.launch
    if asks_for_gpus(launch.slurm):
        return
    if launch.device == "auto":
        what = "is auto, and launch.slurm requests no GPU: the job trains on CPUs"
        yield Problem("launch.device", what, "set it to cuda for one GPU per rank, or to cpu")
    elif launch.device == "cuda" and launch.slurm.gres:
        what = (
            f"{quote(launch.slurm.gres)} requests no GPU, but launch.device is cuda: the job gets GPUs only if the cluster "
            "assigns them by default"
        )
        yield Problem("launch.slurm.gres", what, f"add gpu:{spec.nproc_per_node} to it")


def asks_for_gpus(slurm: Slurm) -> bool:
    """Whether the options of a job request at least one GPU."""
    return _names_gpus(slurm.gres) or any(map(_option_asks, slurm.extra_args))


def _option_asks(text: str) -> bool:
    for name, value in _options(text):
        if name in _GPUS and any(_count(part) for part in value.split(",")):
            return True
        if name in _GRES and _names_gpus(value):
            return True
    return False


def _options(text: str) -> Iterator[tuple[str, str]]:
    """(option, value) of each option in a text. `--gpus=2`, `--gpus 2`, `-G2` and `-G 2` are equivalent."""
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
    """Whether a list of generic resources includes GPUs: `gpu`, `gpu:2`, `gpu:h100:4`, `gres/gpu:h100=4`."""
    for entry in str(gres).split(","):
        name, *rest = re.split("[:=]", entry.strip().removeprefix("gres/").removeprefix("gres:"))
        if name in _GPU_NAMES and _count(rest[-1] if rest else ""):
            return True
    return False


def _count(text: str) -> int:
    """The count at the end of a resource; 1 if it has none."""
    number = re.search(r"(?:^|[:=])(\d+)[kKmMgG]?$", text)
    return int(number[1]) if number else 1


RULES = Rules(
    refuse=(unusable_slurm_word, setup_with_nul, unusable_slurm_option),
    warn=(job_without_gpus,),
)

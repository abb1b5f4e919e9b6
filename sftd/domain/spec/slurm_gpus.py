"""Which of sbatch's options ask for GPUs. Pure: texts in, an answer out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from sftd.domain.spec.sections import Slurm

# The generic resources that are GPUs, or shares of one.
_GPU_NAMES = frozenset({"gpu", "mps", "shard"})
# These take a number, perhaps after a type.
_GPUS = ("--gpus", "--gpus-per-node", "--gpus-per-socket", "--gpus-per-task")
# These take a list of resources, each with its name, perhaps a type, and a number.
_GRES = ("--gres", "--tres-per-job", "--tres-per-node", "--tres-per-socket", "--tres-per-task")
# To sbatch, a beginning that only one option has is enough.
_OTHERS = (
    "--get-user-env",
    "--gid",
    "--gpu-bind",
    "--gpu-freq",
    "--gres-flags",
    "--tres-bind",
    "--tres-freq",
)


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

"""What a run can do and hardly means to: warnings at submit. Pure: the facts are passed in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from sftd.domain.errors import Problem, several
from sftd.domain.model.checks import DataFacts
from sftd.domain.spec.launchers import kind_of
from sftd.domain.spec.spec import Spec

# Full fine-tuning of such models takes 1e-6 to 1e-4; small ones that are trained from nothing take up to 1e-3.
_LEAST_LR, _MOST_LR = 1e-8, 1e-2
_USUAL_LR = "full fine-tuning usually takes 1e-6 to 1e-4"


def doubts(
    spec: Spec, train: DataFacts, val: DataFacts | None, shared: Sequence[str], planned_steps: int
) -> list[Problem]:
    """All warnings that need no host. `shared` are the validation files whose contents are also a training file's."""
    return [
        *learning_rate(spec),
        *batch_of_data(spec, train),
        *validation_of_training(train, val, shared),
        *micro_batch(spec),
        *intervals(spec, val, planned_steps),
    ]


def learning_rate(spec: Spec) -> list[Problem]:
    """A peak that destroys a pretrained model, or leaves it as it is."""
    lr = spec.optimizer.lr
    if lr > _MOST_LR:
        what = f"{lr:g} is far above what pretrained models take: the loss will most likely diverge"
    elif lr < _LEAST_LR:
        what = f"{lr:g} is so small that the weights hardly change"
    else:
        return []
    return [Problem("optimizer.lr", what, _USUAL_LR)]


def batch_of_data(spec: Spec, train: DataFacts) -> list[Problem]:
    """A step that has more samples than there are rows."""
    batch, rows = spec.data.train_batch_size, train.usable
    if not 0 < rows < batch:
        return []
    least, most = batch // rows, -(-batch // rows)
    times = f"{least} times" if least == most else f"{least} to {most} times"
    what = f"a step has {batch} samples, but the data has {rows} rows: every step sees each row {times}"
    return [Problem("data.train_batch_size", what, f"set it to {rows} or less")]


def validation_of_training(train: DataFacts, val: DataFacts | None, shared: Sequence[str]) -> list[Problem]:
    """Validation on rows that are trained on."""
    fix = "validate on other rows: `sftd prepare --val-fraction F --val-out FILE` sets some apart"
    if val is not None and val.digest == train.digest:
        what = (
            "is the training data: its loss says nothing of new text, and keep_best keeps what fits it best"
        )
        return [Problem("data.val_files", what, fix)]
    if shared:
        return [Problem("data.val_files", f"holds files that are trained on: {several(shared)}", fix)]
    return []


def micro_batch(spec: Spec) -> list[Problem]:
    """A packed micro-batch with room for more samples than a rank has in a step."""
    if not spec.training.use_rmpad:
        return []
    room = spec.micro_batch_tokens // spec.data.sequence_length
    share = -(-spec.data.train_batch_size // spec.data_parallel_size)
    if room <= share:
        return []
    by_tokens = spec.training.micro_batch_tokens is not None
    name = "micro_batch_tokens" if by_tokens else "micro_batch_size_per_gpu"
    what = f"has room for {room} samples, but a step has at most {share} for each data-parallel rank"
    most = share * spec.data.sequence_length if by_tokens else share
    return [Problem(f"training.{name}", what, f"set it to {most} or less, or raise data.train_batch_size")]


def intervals(spec: Spec, val: DataFacts | None, planned_steps: int) -> list[Problem]:
    """Checkpoints that are never validated cannot be the best."""
    save, check = spec.trainer.save_interval, spec.trainer.val_check_interval
    if (
        val is None
        or not (spec.checkpoint.keep_best and save and check)
        or save % check == 0
        or save >= planned_steps
    ):
        return []
    both = math.lcm(save, check)
    which = (
        f"at each multiple of {both} and at the last step"
        if both < planned_steps
        else "at the last step alone"
    )
    what = f"{save} is not a multiple of trainer.val_check_interval {check}: a checkpoint is validated {which}, and no other can be the best"
    return [
        Problem(
            "trainer.save_interval", what, f"set it to a multiple of {check}, or checkpoint.keep_best to 0"
        )
    ]


class HostDevices(msgspec.Struct, frozen=True):
    """The devices of a host that may start runs."""

    name: str
    gpus: int
    cpus: int


def devices(spec: Spec, hosts: Sequence[HostDevices]) -> list[Problem]:
    """Devices that none of the known hosts has. Those of other machines are not known here."""
    if not kind_of(spec.launch.launcher).uses_host_devices or not hosts:
        return []
    ranks, gpus, cpus = spec.nproc_per_node, max(h.gpus for h in hosts), max(h.cpus for h in hosts)
    known = hosts[0].name if len(hosts) == 1 else f"the {len(hosts)} known hosts"
    if spec.launch.device == "cuda" and not gpus:
        fix = "start a daemon where there are GPUs, or set launch.device to auto"
        return [Problem("launch.device", f"is cuda, but {known} has no GPU: the run waits for one", fix)]
    on_gpus = spec.launch.device == "cuda" or (spec.launch.device == "auto" and gpus > 0)
    if on_gpus and ranks > gpus:
        what = f"{ranks} ranks need a GPU each, but {known} has at most {gpus}: the run waits for more"
        return [
            Problem(
                "launch.nproc_per_node", what, f"set it to {gpus} or less, or start a daemon that has more"
            )
        ]
    if not on_gpus and ranks > cpus:
        what = f"{ranks} ranks share the {cpus} cores of {known}: each is slow"
        return [Problem("launch.nproc_per_node", what, f"set it to {cpus} or less")]
    return []

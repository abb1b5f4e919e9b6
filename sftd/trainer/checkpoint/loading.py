"""Verification of a checkpoint and restore of the training state of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel

from sftd.domain.errors import CheckpointInvalid
from sftd.domain.log.events import CheckpointRejected
from sftd.domain.spec.spec import Spec
from sftd.trainer.checkpoint import reading as checkpoint_reading
from sftd.trainer.checkpoint.state import restore, sharded_state
from sftd.trainer.errors import UserError
from sftd.trainer.optimizer import optimizer as optimizers
from sftd.trainer.runtime.megatron_edges.training import separate_adamw_steps
from sftd.trainer.runtime.reporter import Reporter
from sftd.trainer.runtime.session import Session, gather
from sftd.trainer.trainee import Trainee
from sftd.wire.attempt.directory import Order
from sftd.wire.checkpoint import manifest as manifests
from sftd.wire.checkpoint.directory import reading
from sftd.wire.checkpoint.manifest import Manifest


def load(order: Order, session: Session, trainee: Trainee, reporter: Reporter) -> Manifest:
    """Verify the order's checkpoint, then restore model, optimizer and, in the same layout, random streams. Collective.

    Damage is detected before anything is unpickled. Emits `CheckpointRejected` and raises `CheckpointInvalid` for a
    damaged checkpoint, or one whose files do not hold the state.
    """
    assert order.checkpoint is not None
    folder = Path(order.checkpoint)
    with reading(folder):
        try:
            return _load(folder, order, session, trainee)
        except CheckpointInvalid as error:
            step = int(digits) if (digits := folder.name.rpartition("-")[2]).isdigit() else 0
            reporter.emit(CheckpointRejected(step=step, path=str(folder), reason=str(error)))
            raise


def _load(folder: Path, order: Order, session: Session, trainee: Trainee) -> Manifest:
    manifest = _agreed(lambda: _verified(folder, order.checkpoint_digest))
    if manifest.weights_only:
        raise UserError(f"{folder} holds weights only: training cannot continue from it")
    if manifest.dtype != (mine := str(session.dtype).removeprefix("torch.")):
        raise UserError(
            f"{folder} was trained in {manifest.dtype}: set model.megatron.params_dtype to it, not {mine}"
        )
    # Manifests from before expert parallelism lack its size.
    same_layout = {"ep": 1} | manifest.layout == session.layout.sizes
    wanted = sharded_state(session, trainee, is_loading=True, with_rng=same_layout)
    state = _agreed(lambda: checkpoint_reading.load(wanted, folder))

    def put_back() -> None:
        with checkpoint_reading.invalid_where_it_fails(folder):
            _restore(state, order.spec, session, trainee, with_rng=same_layout)

    _agreed(put_back)
    return manifest


def _verified(folder: Path, digest: str | None) -> Manifest:
    """The manifest. Each rank hashes its share of the files. Raises `CheckpointInvalid`."""
    manifest = manifests.read(folder, digest)
    if damage := manifests.find_damage(folder, manifest, dist.get_rank(), dist.get_world_size()):
        raise CheckpointInvalid(damage)
    return manifest


def _restore(
    state: dict[str, Any], spec: Spec, session: Session, trainee: Trainee, *, with_rng: bool
) -> None:
    optimizer = trainee.optimizer
    for i, chunk in enumerate(trainee.chunks):
        restore(chunk, state[f"model{i}"])
    optimizers.take_peak(spec, state["optimizer"])
    optimizer.load_state_dict(state["optimizer"])
    separate_adamw_steps(optimizer)
    optimizers.configure(spec, optimizer, session)
    if with_rng:
        torch.set_rng_state(state["rng"]["cpu"])
        if session.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"])
        tensor_parallel.get_cuda_rng_tracker().set_states(state["rng"]["streams"])


def _agreed[T](action: Callable[[], T]) -> T:
    """The result of `action` on this rank. Raises `CheckpointInvalid` on every rank when one raises it: all ranks must
    abandon the checkpoint, and the reporting rank needs the reason."""
    result, reason = None, None
    try:
        result = action()
    except CheckpointInvalid as error:
        reason = str(error)
    if found := next((text for text in gather(reason) if text), None):
        raise CheckpointInvalid(found)
    return cast(T, result)

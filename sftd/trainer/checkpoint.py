"""Checkpoints: staged, hashed, published by a rename; verified before they are loaded.

    <checkpoint_dir>/step-00000012.partial/   being written; worthless after a crash
    <checkpoint_dir>/step-00000012/           whole: every file is on the disk and in manifest.json

The format is Megatron's `torch_dist`, which another layout can load too.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from sftd.domain.events import AnomalyDetected, CheckpointPublished, CheckpointRejected, CheckpointStarted
from sftd.domain.spec import spec_digest
from sftd.trainer import manifest as manifests
from sftd.trainer import megatron_edges
from sftd.trainer import optimizer as optimizers
from sftd.trainer.errors import CheckpointInvalid, CheckpointSaveFailed, UserError
from sftd.trainer.folder_swap import fsync_file, publish_folder
from sftd.trainer.manifest import Manifest
from sftd.trainer.reporter import Reporter
from sftd.trainer.session import Session, gather
from sftd.trainer.trainee import Trainee
from sftd.wire.attempt_dir import Order, fsync_dir
from sftd.wire.checkpoint_dir import reading

# The only optimizer format that works without TransformerEngine and that another layout can load.
_CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
# Files, and threads that write and hash them, per rank.
_WRITERS = 2
# Free space that must be there before a checkpoint is begun, as a share of its expected size.
_HEADROOM = 1.1


@dataclass(frozen=True)
class Progress:
    """How far training has come after `step` steps; `loss` and `grad_norm` are those of the last one."""

    step: int
    tokens_total: int
    loss: float
    grad_norm: float


def folder_name(step: int) -> str:
    """Name of a published checkpoint's folder."""
    return f"step-{step:08d}"


class Checkpoints:
    """Saves and loads the training state of all ranks. Every method is called by every rank."""

    def __init__(self, order: Order, session: Session, trainee: Trainee, reporter: Reporter) -> None:
        self._order = order
        self._session = session
        self._trainee = trainee
        self._reporter = reporter
        self._folder = Path(order.checkpoint_dir)
        self._spec_digest = spec_digest(order.spec)

    def save(self, progress: Progress, versions: dict[str, str | None], *, must_succeed: bool) -> None:
        """Publish a checkpoint. A failure is an `AnomalyDetected`, and raises `CheckpointSaveFailed` if `must_succeed`."""
        started = time.perf_counter()
        self._reporter.emit(CheckpointStarted(step=progress.step))
        published = self._folder / folder_name(progress.step)
        partial = published.with_name(published.name + ".partial")
        try:
            if not self._gather(lambda: dist.get_rank() == 0 and self._is_same(published, progress))[0]:
                self._attempt(lambda: self._stage_folder(partial))
                self._gather(lambda: self._write(partial), (CheckpointException, CheckpointSaveFailed))
                entries = self._gather(lambda: self._describe_share(partial))
                self._attempt(lambda: self._publish(partial, published, progress, versions, entries))
        except CheckpointSaveFailed as error:
            reason = self._explain(error)
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            anomaly = AnomalyDetected(step=progress.step, what="checkpoint_failed", detail={"error": reason})
            self._reporter.emit(anomaly)
            if must_succeed:
                raise CheckpointSaveFailed(reason) from error
            return
        data = (published / manifests.NAME).read_bytes()
        total = len(data) + sum(entry.bytes for entry in manifests.read(published, None).files)
        self._reporter.emit(
            CheckpointPublished(
                step=progress.step,
                path=str(published),
                bytes=total,
                manifest_digest=manifests.digest(data),
                seconds=time.perf_counter() - started,
            )
        )

    def load(self) -> Manifest:
        """Verify the ordered checkpoint and restore model, optimizer and, in the same layout, random streams.

        Emits `CheckpointRejected` and raises `CheckpointInvalid` before anything of a bad one is unpickled.
        """
        assert self._order.checkpoint is not None
        folder = Path(self._order.checkpoint)
        with reading(folder):
            return self._load(folder)

    def _load(self, folder: Path) -> Manifest:
        try:
            manifest = manifests.read(folder, self._order.checkpoint_digest)
            share = manifest.files[dist.get_rank() :: dist.get_world_size()]
            damage = [reason for reason in gather(manifests.find_damage(folder, share)) if reason]
            if damage:
                raise CheckpointInvalid(damage[0])
        except CheckpointInvalid as error:
            step = int(digits) if (digits := folder.name.rpartition("-")[2]).isdigit() else 0
            self._reporter.emit(CheckpointRejected(step=step, path=str(folder), reason=str(error)))
            raise
        if manifest.dtype != (mine := str(self._session.dtype).removeprefix("torch.")):
            raise UserError(
                f"{folder} was trained in {manifest.dtype}: set model.megatron.params_dtype to it, not {mine}"
            )
        # Manifests of before there was expert parallelism do not name its size.
        same_layout = {"ep": 1} | manifest.layout == self._session.layout.sizes
        optimizer = self._trainee.optimizer
        megatron_edges.prepare_adamw_for_load(optimizer)
        state = dist_checkpointing.load(self._state(is_loading=True, with_rng=same_layout), str(folder))
        for i, chunk in enumerate(self._trainee.chunks):
            chunk.load_state_dict(
                {k: v for k, v in state[f"model{i}"].items() if not k.endswith("_extra_state")}
            )
        optimizers.take_peak(self._order.spec, state["optimizer"])
        optimizer.load_state_dict(state["optimizer"])
        megatron_edges.separate_adamw_steps(optimizer)
        optimizers.configure(self._order.spec, optimizer, self._session)
        if same_layout:
            torch.set_rng_state(state["rng"]["cpu"])
            if self._session.device.type == "cuda":
                torch.cuda.set_rng_state(state["rng"]["cuda"])
            tensor_parallel.get_cuda_rng_tracker().set_states(state["rng"]["streams"])
        return manifest

    def _state(self, *, is_loading: bool, with_rng: bool) -> dict[str, Any]:
        layout = self._session.layout
        content = dict(
            _CONTENT, dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
        # The unwrapped modules: DDP and Float16Module would put their own prefix before every name.
        state: dict[str, Any] = {
            f"model{i}": chunk.sharded_state_dict(metadata=content)
            for i, chunk in enumerate(self._trainee.chunks)
        }
        state["optimizer"] = self._trainee.optimizer.sharded_state_dict(
            state, is_loading=is_loading, metadata=content
        )
        if with_rng:
            is_cuda = self._session.device.type == "cuda"
            streams = {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state() if is_cuda else None,
                "streams": tensor_parallel.get_cuda_rng_tracker().get_states(),
            }
            place = (layout.pp_rank, layout.tp_rank, layout.dp_rank * layout.cp + layout.cp_rank)
            state["rng"] = ShardedObject(
                "rng", streams, (layout.pp, layout.tp, layout.dp * layout.cp), place, replica_id=0
            )
        return state

    def _is_same(self, published: Path, progress: Progress) -> bool:
        """Whether this very step is already published and whole, by an earlier attempt that computed the same."""
        if not published.exists():
            return False
        try:
            found = manifests.read(published, None)
        except CheckpointInvalid:
            return False
        mine = (
            self._order.run_id,
            self._spec_digest,
            progress.step,
            progress.tokens_total,
            *_exact(progress),
        )
        theirs = (
            found.run_id,
            found.spec_digest,
            found.step,
            found.tokens_total,
            found.loss,
            found.grad_norm,
        )
        return mine == theirs and manifests.find_damage(published, found.files) is None

    def _stage_folder(self, partial: Path) -> None:
        if dist.get_rank() != 0:
            return
        # A run has one attempt at a time: whatever is half written was left by one that was killed.
        for left in self._folder.glob("step-*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        need = int(_HEADROOM * self._trainee.state_bytes)
        if (free := shutil.disk_usage(partial).free) < need:
            raise OSError(
                f"No space left on device: {partial} has {free} bytes free, a checkpoint needs {need}"
            )

    def _write(self, partial: Path) -> None:
        megatron_edges.use_in_process_queue()
        state = self._state(is_loading=False, with_rng=True)
        strategy = TorchDistSaveShardedStrategy(thread_count=_WRITERS)
        with megatron_edges.keep_rank_zero_in_step():
            dist_checkpointing.save(state, str(partial), strategy, content_metadata=_CONTENT)

    def _describe_share(self, partial: Path) -> list[manifests.FileEntry]:
        names = manifests.list_files(partial)[dist.get_rank() :: dist.get_world_size()]
        for name in names:
            fsync_file(partial / name)
        return manifests.describe(partial, names)

    def _publish(
        self,
        partial: Path,
        published: Path,
        progress: Progress,
        versions: dict[str, str | None],
        entries: list[list[manifests.FileEntry]],
    ) -> None:
        if not self._session.layout.reports:
            return
        loss, grad_norm = _exact(progress)
        data = manifests.encode(
            Manifest(
                schema_version=manifests.SCHEMA_VERSION,
                run_id=self._order.run_id,
                spec_digest=self._spec_digest,
                step=progress.step,
                tokens_total=progress.tokens_total,
                samples=self._order.order_start.position(
                    progress.step, self._order.spec.data.train_batch_size
                ),
                loss=loss,
                grad_norm=grad_norm,
                layout=self._session.layout.sizes,
                dtype=str(self._session.dtype).removeprefix("torch."),
                versions=versions,
                files=sorted((e for share in entries for e in share), key=lambda e: e.name),
            )
        )
        with open(partial / manifests.NAME, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fsync_dir(partial)
        # A checkpoint must never be newer than the log: the journal's steps reach the disk before it does.
        self._reporter.flush()
        # One that is there already is damaged, or of a history that is being redone differently.
        publish_folder(partial, published)

    def _explain(self, error: CheckpointSaveFailed) -> str:
        """The error, and that the disk is full where it is: Megatron's writer swallows the reason."""
        try:
            free = shutil.disk_usage(self._folder).free
        except OSError:
            return str(error)
        is_full = free < self._trainee.state_bytes
        return (
            f"{'No space left on device: ' if is_full else ''}{error} ({free} bytes free in {self._folder})"
        )

    def _attempt(self, action: Callable[[], None]) -> None:
        self._gather(action)

    def _gather(
        self,
        action: Callable[[], Any],
        failures: tuple[type[BaseException], ...] = (OSError, RuntimeError),
    ) -> list[Any]:
        """Every rank's result. Raises `CheckpointSaveFailed` on all ranks when it fails on one.

        `failures` must leave the ranks in step: anything else that an action with collectives raises on one rank has
        to end the process, for the others are waiting in a collective of Megatron's.
        """
        result, reason = None, None
        try:
            result = action()
        except failures as error:
            reason = _cause(error)
        outcomes = gather((result, reason))
        if reasons := [r for _, r in outcomes if r]:
            raise CheckpointSaveFailed(reasons[0])
        return [r for r, _ in outcomes]


def _exact(progress: Progress) -> tuple[str, str]:
    return float(progress.loss).hex(), float(progress.grad_norm).hex()


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        return "; ".join(str(failure[0]) for failure in error.failures.values()) or str(error)
    if isinstance(error, CheckpointSaveFailed):
        return str(error)
    return f"{type(error).__name__}: {error}"

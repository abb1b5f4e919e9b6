"""Checkpoints: staged, hashed, published by a rename.

    <checkpoint_dir>/step-00000012.partial/   being written; worthless after a crash
    <checkpoint_dir>/step-00000012/           complete: every file is on the disk and in manifest.json

The format is Megatron's `torch_dist`, which any layout can load.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from sftd.domain.errors import CheckpointInvalid
from sftd.domain.log.events import AnomalyDetected, CheckpointPublished, CheckpointStarted
from sftd.domain.plan.sizes import SAVE_HEADROOM
from sftd.domain.run.failures import is_disk_full
from sftd.domain.spec.spec import spec_digest
from sftd.trainer.checkpoint import folder as checkpoint_folder
from sftd.trainer.checkpoint.folder_swap import fsync_file, publish_folder
from sftd.trainer.checkpoint.state import sharded_state
from sftd.trainer.checkpoint.writer import (
    FilePlan,
    HostCopy,
    ShareWriter,
    is_state_file,
    plan_files,
    writers,
)
from sftd.trainer.errors import CheckpointSaveFailed, UserError
from sftd.trainer.optimizer.state import CONTENT
from sftd.trainer.runtime.megatron_edges.saving import keep_rank_zero_in_step, plan_saves_with
from sftd.trainer.runtime.reporter import Reporter
from sftd.trainer.runtime.session import Session, gather
from sftd.trainer.trainee import Trainee
from sftd.wire.attempt.directory import Order, fsync_dir, make_durable
from sftd.wire.checkpoint import manifest as manifests
from sftd.wire.checkpoint.directory import once_unread
from sftd.wire.checkpoint.manifest import FileEntry, Manifest

Versions = dict[str, str | None]
_log = logging.getLogger(__name__)
# An attempt ends after this number of consecutive failed saves.
_MAX_FAILURES = 2
# How long a save waits for readers of the checkpoint that it replaces.
_READERS_SECONDS = 60.0


@dataclass(frozen=True)
class Progress:
    """Progress after `step` steps. `loss` and `grad_norm` are those of the last step."""

    step: int
    tokens_total: int
    loss: float
    grad_norm: float


@dataclass(frozen=True)
class _Pending:
    """A save whose bytes are being written."""

    progress: Progress
    versions: Versions
    started: float
    partial: Path
    published: Path
    writer: ShareWriter
    # Megatron's queue for the write results, and its callbacks after all files are written.
    results: Any
    finalize: list[Callable[[], None]]

    def collect(self) -> list[FileEntry]:
        """Wait for this rank's files. Raises `OSError`."""
        results, entries = self.writer.result()
        if self.results is not None:
            self.results.put(results)
        return entries


def folder_name(step: int) -> str:
    """Name of a published checkpoint's folder."""
    return f"step-{step:08d}"


class Checkpoints:
    """Saves the training state of all ranks. Every method is collective. `base`: see `Manifest`."""

    def __init__(self, order: Order, session: Session, trainee: Trainee, reporter: Reporter) -> None:
        self._order = order
        self._session = session
        self._trainee = trainee
        self._reporter = reporter
        self._folder = Path(order.checkpoint_dir)
        self._spec_digest = spec_digest(order.spec)
        self.base: dict[str, str] = {}
        self._host_copy = HostCopy(session.device)
        self._pending: _Pending | None = None
        # Consecutive failed saves, full disks not counted.
        self._failed = 0
        plan_saves_with(plan_files)
        # Megatron collects garbage at every save and load. Scanning the permanent objects would take 0.2 s each time.
        gc.freeze()
        atexit.register(gc.unfreeze)

    @property
    def is_written(self) -> bool:
        """Whether this rank's write of the save in flight has ended, successfully or not."""
        return self._pending is not None and self._pending.writer.is_done

    def save(self, progress: Progress, versions: Versions, *, must_succeed: bool) -> None:
        """Publish a checkpoint. A failure emits `AnomalyDetected`, and raises `CheckpointSaveFailed` if `must_succeed`.

        Raises `UserError` when the folder is no longer writable, or when two saves in a row fail: later steps would be
        lost. A full disk does not count: the next save may find room.
        """
        self.finish()
        self._begin(progress, versions, must_succeed=must_succeed, is_copied=False)
        self.finish(must_succeed=must_succeed)

    def begin(self, progress: Progress, versions: Versions) -> None:
        """Begin a save in the background; `finish` publishes it. Finishes an earlier one first."""
        self.finish()
        self._begin(progress, versions, must_succeed=False, is_copied=True)

    def _begin(self, progress: Progress, versions: Versions, *, must_succeed: bool, is_copied: bool) -> None:
        started = time.perf_counter()
        self._reporter.emit(CheckpointStarted(step=progress.step))
        published = self._folder / folder_name(progress.step)
        partial = published.with_name(published.name + ".partial")
        try:
            if self._gather(lambda: dist.get_rank() == 0 and self._is_same(published, progress))[0]:
                self._announce(progress.step, published, started)
                return
            self._gather(lambda: self._stage_folder(partial))
            requests: list[Any] = []
            plans = (CheckpointException, CheckpointSaveFailed)
            self._gather(lambda: requests.append(self._plan(partial)), plans)
        except CheckpointSaveFailed as error:
            self._fail(error, progress.step, partial, must_succeed=must_succeed)
            return
        request = requests[0]
        files, results = request.async_fn_args[1:] if request.async_fn_args else ([], None)
        copied = self._copy(files) if is_copied else None
        writer = ShareWriter(partial, *(copied or (files, lambda: None)))
        self._pending = _Pending(
            progress, versions, started, partial, published, writer, results, request.finalize_fns
        )
        if is_copied and copied is None:
            # Without a copy, the threads read the live tensors, so training must wait.
            self.finish()

    def finish(self, *, must_succeed: bool = False) -> None:
        """Wait for the save in flight, if any, and publish it. Raises as `save` does."""
        if (pending := self._pending) is None:
            return
        self._pending = None
        try:
            entries = self._gather(pending.collect)
            self._gather(lambda: self._finalize(pending), (CheckpointException, CheckpointSaveFailed))
            known = [entry for share in entries for entry in share]
            rest = self._gather(lambda: self._describe_rest(pending.partial, known))
            files = known + [entry for share in rest for entry in share]
            self._gather(lambda: self._publish(pending, files))
        except CheckpointSaveFailed as error:
            self._fail(error, pending.progress.step, pending.partial, must_succeed=must_succeed)
            return
        self._failed = 0
        self._announce(pending.progress.step, pending.published, pending.started)

    def _announce(self, step: int, published: Path, started: float) -> None:
        if not self._session.layout.reports:
            return
        data = (published / manifests.NAME).read_bytes()
        total = len(data) + sum(entry.bytes for entry in manifests.read(published, None).files)
        self._reporter.emit(
            CheckpointPublished(
                step=step,
                path=str(published),
                bytes=total,
                manifest_digest=manifests.digest(data),
                seconds=time.perf_counter() - started,
            )
        )

    def _fail(self, error: CheckpointSaveFailed, step: int, partial: Path, *, must_succeed: bool) -> None:
        found: tuple[str, str | None] | None = None
        if dist.get_rank() == 0:
            # Look at the free space before the partial folder is removed, which may have filled the disk.
            reason = self._explain(error)
            # The save may have failed because another attempt owns the folder by now.
            self._reporter.check_fence()
            shutil.rmtree(partial, ignore_errors=True)
            found = reason, checkpoint_folder.refusal(self._folder, make=True)
        # All ranks use rank 0's result, so that they take the same branch below.
        reason, refusal = gather(found)[0]
        anomaly = AnomalyDetected(step=step, what="checkpoint_failed", detail={"error": reason})
        self._reporter.emit(anomaly)
        is_full = is_disk_full(refusal or reason)
        self._failed = 0 if is_full else self._failed + 1
        if not is_full and (refusal or self._failed == _MAX_FAILURES):
            raise UserError(
                f"checkpoints cannot be written, and every further step would be lost: {refusal or reason}. Make "
                f"{self._folder} writable, then resume the run"
            ) from error
        if must_succeed:
            raise CheckpointSaveFailed(reason) from error

    def _is_same(self, published: Path, progress: Progress) -> bool:
        """Whether an earlier attempt has published a complete checkpoint of this step with the same numbers."""
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
        return mine == theirs and not found.weights_only and manifests.find_damage(published, found) is None

    def _stage_folder(self, partial: Path) -> None:
        if dist.get_rank() != 0:
            return
        self._reporter.check_fence()
        # A run has one attempt at a time, so every partial folder was left by a killed attempt.
        for leftover in self._folder.glob("step-*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        make_durable(partial)
        need = int(SAVE_HEADROOM * self._trainee.state_bytes)
        if (free := shutil.disk_usage(partial).free) < need:
            raise OSError(
                f"No space left on device: {partial} has {free} bytes free, a checkpoint needs {need}"
            )

    def _plan(self, partial: Path) -> Any:
        state = sharded_state(self._session, self._trainee, is_loading=False, with_rng=True)
        strategy = TorchDistSaveShardedStrategy(thread_count=writers())
        return dist_checkpointing.save(
            state,
            str(partial),
            strategy,
            content_metadata=CONTENT,
            async_sharded_save=True,
            async_strategy="mcore",
        )

    def _copy(self, files: list[FilePlan]) -> tuple[list[FilePlan], Callable[[], object]] | None:
        """Copy this rank's share to host memory. None on all ranks when one of them lacks the memory."""
        copied, reason = None, None
        try:
            copied = self._host_copy.take(files)
        except (MemoryError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
        if reasons := [r for r in gather(reason) if r]:
            if dist.get_rank() == 0:
                _log.warning("a checkpoint is saved while training waits: %s", reasons[0])
            return None
        return copied

    @staticmethod
    def _finalize(pending: _Pending) -> None:
        with keep_rank_zero_in_step():
            for finalize in pending.finalize:
                finalize()

    @staticmethod
    def _describe_rest(partial: Path, known: list[FileEntry]) -> list[FileEntry]:
        """The metadata files that Megatron writes on rank 0 at the end."""
        if dist.get_rank() != 0:
            return []
        names = sorted({*manifests.list_files(partial)} - {entry.name for entry in known})
        for name in names:
            fsync_file(partial / name)
        return manifests.describe(partial, names)

    def _publish(self, pending: _Pending, files: list[FileEntry]) -> None:
        if not self._session.layout.reports:
            return
        progress, partial = pending.progress, pending.partial
        loss, grad_norm = _exact(progress)
        data = manifests.encode(
            Manifest(
                schema_version=manifests.WHOLE,
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
                versions=pending.versions,
                files=sorted(files, key=lambda e: e.name),
                state_files=sorted(e.name for e in files if is_state_file(e.name)),
                base=self.base,
            )
        )
        with open(partial / manifests.NAME, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fsync_dir(partial)
        self._reporter.check_fence()
        # A checkpoint must never be newer than the log: flush the journal's steps first.
        self._reporter.flush()
        # An existing checkpoint of this step is damaged or has different numbers. Readers may have it open; the other
        # ranks wait meanwhile.
        with once_unread(pending.published, _READERS_SECONDS):
            publish_folder(partial, pending.published)

    def _explain(self, error: CheckpointSaveFailed) -> str:
        """The error, with a note if the disk is full: Megatron's writer drops the reason."""
        try:
            free = shutil.disk_usage(self._folder).free
        except OSError:
            return str(error)
        is_full = free < self._trainee.state_bytes
        return (
            f"{'No space left on device: ' if is_full else ''}{error} ({free} bytes free in {self._folder})"
        )

    @staticmethod
    def _gather(
        action: Callable[[], Any],
        failures: tuple[type[BaseException], ...] = (OSError, RuntimeError),
    ) -> list[Any]:
        """Every rank's result. Raises `CheckpointSaveFailed` on all ranks when `action` fails on one.

        `failures` are the errors that leave the ranks in step. Any other error of a collective action must end the
        process, because the other ranks wait in one of Megatron's collectives.
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

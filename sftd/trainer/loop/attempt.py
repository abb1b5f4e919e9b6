"""The attempt from start to end: load, bind, resume, then step, validate and save until the planned steps are done."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from sftd.domain.errors import Refused
from sftd.domain.log.events import AnomalyDetected, DataBound, ModelLoaded, StepCompleted, TrainingResumed
from sftd.domain.model.rules import MODEL
from sftd.domain.model.shape import ModelShape
from sftd.domain.run.loss_watch import LossWatch, What
from sftd.domain.spec.launch.launchers import kind_of
from sftd.domain.spec.learning_rate import learning_rate
from sftd.domain.spec.spec import FROM_THE_BEGINNING
from sftd.trainer import trainee as trainees
from sftd.trainer.checkpoint import folder as checkpoint_folder
from sftd.trainer.checkpoint import loading as checkpoint_loading
from sftd.trainer.checkpoint.checkpoints import Checkpoints, Progress
from sftd.trainer.checkpoint.weights_digest import WeightsDigest
from sftd.trainer.data.batches import Batching, MicroBatch
from sftd.trainer.data.rows import Ints, Rows, write_spool
from sftd.trainer.data.sample_order import mixture_of, order_of, samples_digest
from sftd.trainer.data.spool import shared_folder
from sftd.trainer.errors import DataError, LossSpike, NonFiniteLoss, UserError
from sftd.trainer.loop.figures import figures_of
from sftd.trainer.loop.meter import Meter
from sftd.trainer.loop.sums import sum_over_ranks
from sftd.trainer.loop.validate import validate
from sftd.trainer.model.files_check import checked_spec
from sftd.trainer.model.moe import balance
from sftd.trainer.runtime import process
from sftd.trainer.runtime import session as sessions
from sftd.trainer.runtime.reporter import Reporter
from sftd.wire.attempt.directory import AttemptDir, Order
from sftd.wire.data import chat_template
from sftd.wire.data.dataset import files_digest
from sftd.wire.model.folder import read_shape


def run(attempt_path: str, make_reporter: Callable[[AttemptDir, bool], Reporter] = Reporter) -> None:
    """Execute the attempt's order. Entry point of every rank. `make_reporter` builds the reporter of the events."""
    started = time.perf_counter()
    attempt = AttemptDir(attempt_path)
    order = attempt.order()
    process.leave_stack_on_request(attempt.stack_file(int(os.environ["RANK"])))
    if not kind_of(order.spec.launch.launcher).uses_host_devices:
        # No signal of the daemon reaches this process.
        process.watch_for_stack_requests(attempt.stacks_wanted_file)
    session = sessions.start(order.spec, attempt.port_file)
    reporter = make_reporter(attempt, session.layout.reports)
    try:
        RankAttempt(attempt, order, session, reporter, started).run()
        reporter.flush()
        sessions.close()
    finally:
        reporter.close()


class RankAttempt:
    """One attempt on one rank."""

    def __init__(
        self, attempt: AttemptDir, order: Order, session: sessions.Session, reporter: Reporter, started: float
    ) -> None:
        self._attempt = attempt
        self._order = order
        self._spec = checked_spec(order)
        self._session = session
        self._reporter = reporter
        shape = self._read_shape()
        if order.last_step is None:
            checkpoint_folder.check_folder(Path(order.checkpoint_dir))
        pretrained = order.checkpoint is None
        folder, is_cpu = self._spec.model.partial_pretrain, session.device.type == "cpu"
        # Finished before the first step is recorded: a recorded step implies weights whose digest is in the log.
        reads_weights = pretrained or self._spec.model.is_partly_frozen
        self._weights_digest = WeightsDigest(folder, is_cpu=is_cpu) if reads_weights else None
        self._trainee = trainees.load(self._spec, shape, session, pretrained=pretrained)
        self._environment = sessions.environment(session)
        trained = self._trainee.trained_parameters
        reporter.emit(
            ModelLoaded(
                architecture=shape.architecture,
                parameters=self._trainee.parameters,
                dtype=self._environment["dtype"],
                device=self._environment["device"],
                seconds=time.perf_counter() - started,
                environment=self._environment,
                trained_parameters=None if trained == self._trainee.parameters else trained,
            )
        )
        self._bind_data(shape)
        self._checkpoints = Checkpoints(order, session, self._trainee, reporter)
        self._progress = Progress(step=0, tokens_total=0, loss=math.nan, grad_norm=math.nan)
        self._saved_step = 0
        # Rows and micro-batches of the next step, prepared while the GPU computes the current one.
        self._next: tuple[Ints, list[MicroBatch]] | None = None
        self._is_written = False
        self._meter = Meter(shape, self._spec.model, session)
        self._watch = LossWatch(self._spec.training.spike_factor, order.losses)
        self._patience = order.patience
        self._generator = None
        if self._spec.trainer.sample_prompts and order.last_step is None:
            from sftd.trainer.loop.generate import Generator

            template = chat_template.of_files(self._spec.data.all_train_files)
            self._generator = Generator(self._spec, shape.vocab_size, template)

    def run(self) -> None:
        """Train to the last planned step, or to the first step boundary at which a stop was requested."""
        if self._order.checkpoint is not None:
            self._resume()
        if self._order.last_step is not None:
            while self._progress.step < self._order.last_step:
                self._train_step()
            return
        # A fork starts from its parent's checkpoint, but its settings or data may differ.
        resumes = Path(self._order.checkpoint or "").parent == Path(self._order.checkpoint_dir)
        if self._spec.trainer.val_before_train and not resumes:
            self._validate()
        stop = ends_early = False
        while self._progress.step < self._order.planned_steps and not (stop or ends_early):
            stop = self._train_step()
            if self._is_written:
                self._checkpoints.finish()
            is_last = self._progress.step == self._order.planned_steps
            if stop and not is_last:
                # Before the validation: the process that requested the stop may not wait that long.
                self._save(must_succeed=False)
            if is_last or _is_due(self._progress.step, self._spec.trainer.val_check_interval):
                ends_early = self._validate()
            is_last = is_last or ends_early
            if is_last or _is_due(self._progress.step, self._spec.trainer.save_interval):
                if is_last or not self._spec.checkpoint.async_save:
                    self._save(must_succeed=is_last)
                else:
                    self._begin_save()
        self._checkpoints.finish()

    def _read_shape(self) -> ModelShape:
        try:
            shape = read_shape(self._spec.model.partial_pretrain, self._spec.model.override_config)
            # Repeats the check at submit: the folder may have changed, and a direct run has no submit.
            if problems := MODEL.problems(self._spec, shape):
                raise Refused(problems)
        except Refused as refused:
            raise UserError(str(refused)) from refused
        return shape

    def _bind_data(self, shape: ModelShape) -> None:
        spec, data = self._spec, self._spec.data

        def rows(paths: list[str], sources: list[int]) -> Rows:
            decode = partial(
                write_spool,
                paths=paths,
                sequence_length=data.sequence_length,
                truncation=data.truncation,
                vocab_size=shape.vocab_size,
            )
            with shared_folder(self._attempt.rows_dir, decode) as spool:
                return Rows(spool, sources)

        is_replay = self._order.last_step is not None
        numbers = range(len(data.sources))
        self._train = rows(data.all_train_files, [n for n in numbers for _ in data.sources[n].files])
        val_files, of_sources = data.all_val_files, [n for n in numbers for _ in data.sources[n].val_files]
        of_sources = [len(numbers)] * len(data.val_files) + of_sources
        if is_replay:
            val_files, of_sources = [], []
        self._val = rows(val_files, of_sources)
        if not len(self._train):
            raise DataError(
                f"no row of {', '.join(data.all_train_files)} has a trained label within {data.sequence_length} tokens"
            )
        epoch_rows: int | None = len(self._train)
        if data.sources:
            epoch_rows = mixture_of(spec, self._train, self._order.mixture).epoch_rows
        planned = spec.planned_steps(epoch_rows)
        # Forks and runs that left samples out have a different plan.
        is_whole = self._order.order_start == FROM_THE_BEGINNING and not is_replay
        if is_whole and spec.trainer.max_steps is None and planned != self._order.planned_steps:
            raise UserError(
                f"the run was planned with {self._order.planned_steps} steps, but {len(self._train)} usable rows make "
                f"{planned}: have the data files changed?"
            )
        # Figures by source, if there are several. Validation files without a source are one, too.
        names = [source.name for source in data.sources]
        self._sources = names if len(names) > 1 else []
        self._val_sources = [*names, "val_files"] if self._sources and data.val_files else self._sources
        self._samples = order_of(spec, self._train, self._order.mixture)
        self._batching = Batching.of(spec, self._session)
        if self._session.layout.reports:
            train_digest = _unchanged(data.all_train_files, self._order.train_digest)
            val_digest = _unchanged(val_files, self._order.val_digest)
            self._reporter.emit(
                DataBound(
                    train_rows=len(self._train),
                    train_digest=train_digest,
                    val_rows=len(self._val),
                    val_digest=val_digest,
                    truncated_rows=self._train.truncated_rows,
                    dropped_rows=self._train.dropped_rows,
                    steps_per_epoch=len(self._train) / data.train_batch_size,
                    planned_steps=self._order.planned_steps,
                )
            )

    def _resume(self) -> None:
        manifest = checkpoint_loading.load(self._order, self._session, self._trainee, self._reporter)
        self._progress = Progress(manifest.step, manifest.tokens_total, math.nan, math.nan)
        self._saved_step = manifest.step
        path = self._order.checkpoint or ""
        self._reporter.emit(
            TrainingResumed(step=manifest.step, path=path, tokens_total=manifest.tokens_total)
        )

    def _train_step(self) -> bool:
        """One optimizer step. Returns whether a stop was requested. Raises `NonFiniteLoss` and `LossSpike`."""
        started = time.perf_counter()
        step, size = self._progress.step, self._spec.data.train_batch_size
        rows, batches = self._next or self._prepare(step)
        rate = learning_rate(step, self._spec, self._order.planned_steps)
        trained = int(self._train.trained[rows].sum())
        skips = "skip" in (self._spec.training.on_non_finite, self._spec.training.on_spike)
        local, norm = self._trainee.step(
            batches,
            divisor=float(self._train.weights[rows].sum()),
            learning_rate=rate,
            accept=self._accept if skips else None,
            sources=len(self._sources),
        )
        # The GPU is still computing, so this costs no time.
        self._next = self._prepare(step + 1) if step + 1 < self._order.planned_steps else None
        router = balance.take_losses(self._trainee.chunks, local.device)
        layout = self._session.layout
        sums = sum_over_ranks(
            local,
            norm,
            router,
            layout,
            batches,
            wants_stop=process.stop_signalled() or (layout.reports and self._attempt.stop_requested()),
            is_written=self._checkpoints.is_written,
            peak_memory=self._meter.peak_memory(),
        )
        seconds = time.perf_counter() - started
        if self._weights_digest is not None:
            recorded, run_id = self._order.weights, self._order.run_id
            digested = self._weights_digest.finish(sessions.gather, recorded, run_id)
            self._reporter.emit(digested)
            self._checkpoints.base = digested.files if self._spec.model.is_partly_frozen else {}
            self._weights_digest = None
        self._is_written = sums.is_written
        self._progress = Progress(step + 1, self._progress.tokens_total + trained, sums.loss, sums.grad_norm)
        lengths = self._train.lengths[rows].astype(float)
        event = StepCompleted(
            step=self._progress.step,
            epoch=self._samples.epoch(self._order.sample_position(step)),
            loss=sums.loss,
            grad_norm=sums.grad_norm,
            lr=rate,
            tokens=trained,
            tokens_real=sums.real,
            tokens_padded=sums.padded,
            tokens_total=self._progress.tokens_total,
            samples=size,
            samples_digest=samples_digest(self._train.numbers[rows]),
            seconds=seconds,
            mfu=self._meter.mfu(sums.real, float((lengths**2).sum()), seconds),
            peak_memory_bytes=sums.peak_memory,
            load_balancing_loss=sums.load_balancing if self._spec.model.moe.load_balancing_loss else None,
            z_loss=sums.z if self._spec.model.moe.z_loss else None,
            **figures_of(sums.figures, self._train, rows, self._sources),
        )
        self._reporter.emit(event)
        self._judge(event)
        return sums.stop

    def _accept(self, loss: Tensor, norm: Tensor) -> bool:
        """Whether to update the weights with a step; the same on all ranks. Waits for the GPU."""
        total = loss * self._session.layout.counts
        dist.all_reduce(total)
        what = self._watch.judge(float(total), float(norm))
        return what is None or self._policy(what) != "skip"

    def _policy(self, what: What) -> str:
        training = self._spec.training
        return training.on_non_finite if what == "non_finite_loss" else training.on_spike

    def _judge(self, event: StepCompleted) -> None:
        """Record an anomalous step. Raises `NonFiniteLoss` or `LossSpike` if the policy ends the attempt."""
        what = self._watch.judge(event.loss, event.grad_norm)
        if what is None:
            self._watch.add(event.loss)
            return
        policy = self._policy(what)
        detail = {
            "loss": event.loss,
            "median": self._watch.median,
            "grad_norm": event.grad_norm,
            "samples_digest": event.samples_digest,
            "policy": policy,
        }
        self._reporter.emit(AnomalyDetected(step=event.step, what=what, detail=detail))
        if policy == "record":
            self._watch.add(event.loss)
        # A redo never ends the attempt: in the log, training continued after this step or ended with it.
        if policy in ("stop", "rollback") and self._order.last_step is None:
            # Publish the save in flight, of an earlier step: the next attempt may start from it.
            self._checkpoints.finish()
            self._reporter.flush()
            text = f"step {event.step}: loss {event.loss}, gradient norm {event.grad_norm}"
            # Two raise statements, so that the source line in the traceback names one reason only.
            if what == "non_finite_loss":
                raise NonFiniteLoss(text)
            raise LossSpike(text)

    def _prepare(self, step: int) -> tuple[Ints, list[MicroBatch]]:
        """The rows of `step` (0-based) and this rank's micro-batches of them."""
        size = self._spec.data.train_batch_size
        place = self._order.sample_position(step)
        rows = self._samples.rows(place, size)
        return rows, self._batching.batches(self._train, rows, place)

    def _validate(self) -> bool:
        """Validate, and answer the prompts. Returns whether the run stops early; the same on all ranks."""
        step, rule = self._progress.step, self._spec.trainer.early_stop
        stop = None
        if len(self._val):
            validated = validate(
                step,
                self._trainee,
                self._val,
                self._batching,
                self._session,
                self._spec.data.train_batch_size,
                self._val_sources,
            )
            self._reporter.emit(validated)
            if rule is not None and rule.metric == "val_loss":
                self._patience = self._patience.after(rule, step, validated.loss)
                stop = self._patience.stop(rule, step)
        if self._generator:
            for event in self._generator.answers(step, self._trainee):
                self._reporter.emit(event)
        if stop is not None and 0 < step < self._order.planned_steps:
            self._reporter.emit(stop)
            return True
        return False

    def _save(self, *, must_succeed: bool) -> None:
        if self._saved_step == self._progress.step:
            return
        self._checkpoints.save(self._progress, self._versions(), must_succeed=must_succeed)
        self._saved_step = self._progress.step

    def _begin_save(self) -> None:
        """Start a save in the background. It is published after the first step by which every rank has written its share."""
        if self._saved_step == self._progress.step:
            return
        self._checkpoints.begin(self._progress, self._versions())
        self._saved_step = self._progress.step

    def _versions(self) -> dict[str, str | None]:
        return {name: self._environment[name] for name in ("sftd", "python", "torch", "megatron_core")}


def _unchanged(paths: list[str], submitted: str) -> str:
    """Digest of the files. Raises `DataError` when it differs from the submitted one."""
    found = files_digest(paths)
    if submitted and found != submitted:
        raise DataError(
            f"{', '.join(paths)} changed since the run was submitted: submit a new run, or put the old files back"
        )
    return found


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0

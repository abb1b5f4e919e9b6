"""Run evaluations on devices that no run needs. An evaluation gives its devices back as soon as a run waits for some of their
kind, and starts again later."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec

from sftd.daemon.log import of_run
from sftd.daemon.rescuer import has_stopped
from sftd.daemon.supervisor import collect
from sftd.domain.errors import SftdError
from sftd.domain.log import events as e
from sftd.domain.log.events import Micros
from sftd.domain.queue.demand import Need
from sftd.domain.run import evaluations as decisions
from sftd.domain.spec.evaluation_section import named
from sftd.domain.spec.launch.launchers import kind_of
from sftd.launcher import processes
from sftd.launcher.evaluation import EvaluationProcess, token_of
from sftd.launcher.inventory import Inventory
from sftd.operations.context import Context
from sftd.operations.driving import checkpoints, evaluations
from sftd.operations.driving.evaluations import Evaluated
from sftd.operations.queries import model_files
from sftd.settings import Settings
from sftd.store.database.engine import Store
from sftd.store.queue.daemons import DaemonRow
from sftd.wire.attempt.directory import RunDir
from sftd.wire.attempt.orders import tool_order
from sftd.wire.checkpoint.directory import reading

# Interval of the searches for evaluations that wait, and of the looks at whether a user cancelled one that runs.
_LOOK_SECONDS = 1.0


# Finds the run whose turn it is but whose devices are in use: its need and its id.
Head = Callable[[], tuple[Need, str] | None]


class _Running(msgspec.Struct):
    started: Evaluated
    process: EvaluationProcess
    need: Need
    # Keeps the checkpoint from being deleted.
    reading: ExitStack

    @property
    def holder(self) -> str:
        return _holder(self.started)


def _holder(x: Evaluated) -> str:
    """The name under which an evaluation holds devices. No run id contains a space."""
    return f"{x.run.run_id} {x.state.name} {x.state.step}"


class Evaluator:
    """The evaluations of the daemon `me`."""

    def __init__(
        self, store: Store, context: Context, settings: Settings, inventory: Inventory, me: DaemonRow
    ) -> None:
        self._store = store
        self._context = context
        self._settings = settings
        self._inventory = inventory
        self._me = me
        self._running: list[_Running] = []
        self._look_at = 0.0

    def make_room(self, head: Head) -> None:
        """Stop evaluations on devices of the kind for which a run waits. `head` finds that run."""
        if self._running and (waiting := head()) is not None:
            need, run_id = waiting
            for running in list(self._running):
                if running.need.device == need.device:
                    self._interrupt(running, f"made room for {run_id}")

    def tick(self, head: Head) -> bool:
        """Record what has ended, and start what can start; nothing starts on devices of the kind for which a run waits. Returns
        whether an evaluation started or ended."""
        busy, looks = False, time.monotonic() >= self._look_at
        for running in list(self._running):
            try:
                ended = running.process.poll()
            except OSError as error:
                ended = decisions.failed(running.started.state, "error", str(error))
            if ended is not None:
                self._record(running.started, ended, running)
                busy = True
            elif looks and not evaluations.is_current(self._store, running.started):
                self._drop(running)
        if looks or busy:
            self._look_at = time.monotonic() + _LOOK_SECONDS
            busy = self._start_one(head) or busy
        return busy

    def _start_one(self, head: Head) -> bool:
        if not any(self._is_free(device, 1) for device in ("cuda", "cpu")):
            return False
        for wanted in evaluations.waiting(self._store):
            need = self._need(wanted)
            if (
                need is not None
                and self._is_free(need.device, need.count)
                and os.path.isdir(wanted.checkpoint.path)
                and not ((waiting := head()) and waiting[0].device == need.device)
            ):
                return self._start(wanted, need)
        return False

    def _need(self, wanted: Evaluated) -> Need | None:
        """The devices of this host for an evaluation; None if it does not have them. One on CPUs takes all cores, so it runs
        alone, and only while no attempt runs here."""
        evaluation = named(wanted.run.spec.evaluation, wanted.state.name)
        if evaluation is None:
            return None
        launch, gpus = wanted.run.spec.launch, len(self._inventory.gpus)
        cores = len(self._inventory.cpus)
        device = launch.device
        if device == "auto":
            # A resource manager trained it on other hosts: on the device that the log has.
            trained = (
                wanted.run.environment.get("device", "cpu") if kind_of(launch.launcher).is_managed else ""
            )
            device = "cuda" if gpus or trained not in ("", "cpu") else "cpu"
        if device == "cpu":
            return Need("cpu", cores, cores)
        return Need("cuda", evaluation.devices, max(1, cores // gpus)) if evaluation.devices <= gpus else None

    def _is_free(self, device: str, count: int) -> bool:
        if device == "cpu":
            return self._inventory.is_idle
        return count <= len(self._inventory.free(device))

    def _start(self, wanted: Evaluated, need: Need) -> bool:
        # The last ones: runs take the first.
        devices = self._inventory.free(need.device)[-need.count :]
        with ExitStack() as stack:
            stack.enter_context(reading(Path(wanted.checkpoint.path)))
            started = evaluations.start(
                self._store, self._context, wanted, daemon=self._me.daemon_id, devices=devices
            )
            if started is None:
                return False
            try:
                process = self._process(started, need, devices)
            except (OSError, SftdError) as error:
                cause = "refused" if isinstance(error, SftdError) else "error"
                self._record(started, decisions.failed(started.state, cause, str(error)))
                return True
            self._running.append(_Running(started, process, need, stack.pop_all()))
        self._inventory.restore(_holder(started), devices)
        of_run(started.run.run_id).info(
            "evaluation %s of step %d started", wanted.state.name, wanted.state.step
        )
        return True

    def _process(self, started: Evaluated, need: Need, devices: list[str]) -> EvaluationProcess:
        run, state = started.run, started.state
        model = model_files.source(self._store, self._settings.home, run)
        template = checkpoints.chat_template(self._store, run.run_id)
        evaluation = named(run.spec.evaluation, state.name)
        assert evaluation is not None
        return EvaluationProcess(
            RunDir(self._settings.home, run.run_id).evaluation(state.name, state.step),
            evaluation,
            state,
            started.checkpoint,
            tool_order(run, started.checkpoint, model, template),
            need,
            devices,
        )

    def _record(
        self,
        started: Evaluated,
        event: e.EvaluationCompleted | e.EvaluationFailed,
        running: _Running | None = None,
    ) -> None:
        # Recorded first: if the database does not answer, the next tick comes here again.
        recorded = evaluations.end(self._store, self._context, started, event)
        if running is not None:
            self._drop(running)
        if not recorded:
            return
        of_run(started.run.run_id).info("evaluation %s", event.summary())
        try:
            # The evaluation protected its checkpoint.
            collect(self._store, self._context, started.run.run_id)
        except OSError as error:
            of_run(started.run.run_id).warning("unprotected checkpoints are not deleted: %s", error)

    def _interrupt(self, running: _Running, reason: str) -> None:
        self._drop(running)
        state = running.started.state
        event = e.EvaluationInterrupted(name=state.name, step=state.step, reason=reason)
        if evaluations.end(self._store, self._context, running.started, event):
            of_run(running.started.run.run_id).info("evaluation %s", event.summary())

    def _drop(self, running: _Running) -> None:
        """End the processes, and release devices and checkpoint."""
        running.process.kill()
        self._running.remove(running)
        self._inventory.release(running.holder)
        running.reading.close()

    def recover(self) -> None:
        """Record that evaluations whose daemon is gone are lost; they start again once."""
        mine = {running.process.token for running in self._running}
        for found in evaluations.lost(self._store, self._context.now(), self._is_gone):
            token = token_of(found.run.run_id, found.state)
            if token in mine:
                continue
            # Those of this host ended with their daemon; this waits for them.
            processes.kill(processes.survivors(token))
            message = f"the daemon {found.state.daemon} ended while it ran"
            self._record(found, decisions.failed(found.state, "lost", message))

    def _is_gone(self, daemon_id: str, owner: DaemonRow | None, now: Micros) -> bool:
        if daemon_id == self._me.daemon_id:
            # An error may have prevented its start.
            return True
        if owner is None or owner.stopped_at is not None:
            return True
        if (owner.host, owner.home) == (self._me.host, self._me.home) and self._me.identity.is_same(
            owner.identity
        ):
            return has_stopped(owner)
        return now - owner.seen_at > self._settings.silent_micros

    def nothing_left(self) -> bool:
        """Whether no evaluation runs here, and none that waits can run here."""
        return not self._running and not any(
            self._need(x) is not None and os.path.isdir(x.checkpoint.path)
            for x in evaluations.waiting(self._store)
        )

    def end(self, *, may_write: bool) -> None:
        """Stop all evaluations: they wait for the next daemon. Without `may_write`, leave the database alone."""
        for running in list(self._running):
            if may_write:
                self._interrupt(running, "the daemon ended")
            else:
                self._drop(running)

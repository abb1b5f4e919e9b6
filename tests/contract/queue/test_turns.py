"""Who starts when, on each database: order, limits, devices, holds, dependencies, preemption. Without processes: what a
daemon does with its inventory is done here by a `Farm`."""

from __future__ import annotations

import os
import random
from typing import Literal

import msgspec
import pytest

from sftd.domain.errors import ConcurrencyConflict, Refused
from sftd.domain.log import events as e
from sftd.domain.queue.order import Limits
from sftd.domain.run.failures import Failure
from sftd.domain.run.state import Run
from sftd.domain.spec.data_section import Data
from sftd.domain.spec.model_section import Model
from sftd.domain.spec.sections import Launch, Trainer
from sftd.domain.spec.spec import Spec
from sftd.launcher.inventory import Inventory
from sftd.operations.commands import hold, lifecycle
from sftd.operations.commands import submit as submit_runs
from sftd.operations.commands.submit import Wish
from sftd.operations.driving import attempts, turns
from sftd.operations.driving.attempts import Claimed
from sftd.operations.queries import queue as queue_queries
from sftd.operations.queries.runs import find_run
from sftd.projections import views
from sftd.store.database.engine import Store
from sftd.store.database.tables import queue_demands
from sftd.store.log import event_store
from sftd.store.queue import daemons
from sftd.store.queue import leases as lease_store
from sftd.store.queue.daemons import DaemonRow
from sftd.wire.attempt.journal import Line
from sftd.wire.preflight import Preflight
from tests.builders.log.attempts import lines
from tests.builders.log.clock import Clock
from tests.builders.log.histories import step
from tests.builders.log.specs import FACTS, LEASE, SHAPE

FOUND = Preflight(SHAPE, FACTS, None, 3, [])
USER_ERROR = Failure("user error", "m")


def spec(
    ranks: int = 1,
    priority: int = 0,
    *,
    preemptible: bool = False,
    project: str = "p",
    launcher: Literal["local", "slurm"] = "local",
) -> Spec:
    return Spec(
        model=Model(partial_pretrain="m"),
        data=Data(train_files=["t"]),
        trainer=Trainer(max_steps=3, project_name=project),
        launch=Launch(
            nproc_per_node=ranks, priority=priority, device="cuda", preemptible=preemptible, launcher=launcher
        ),
    )


class Farm:
    """A daemon's host with some GPUs, and a clock that moves by a millisecond with each submit."""

    def __init__(
        self, log: Store, gpus: int = 4, name: str = "d1", clock: Clock | None = None, slurm: int = 0
    ) -> None:
        self.log, self.name = log, name
        self.clock = clock or Clock()
        self.inventory = Inventory(gpus, 8, {"slurm": slurm})
        self.limits = Limits()
        self.driven: dict[str, Claimed] = {}
        row = DaemonRow(
            name,
            f"host-{name}",
            1,
            1.0,
            "/h",
            msgspec.json.encode(self.inventory.describe()).decode(),
            1,
            self.clock.time,
        )
        with log.write(appends=False) as tx:
            daemons.register(tx, row)

    def submit(
        self,
        ranks: int = 1,
        priority: int = 0,
        *,
        user: str = "ada",
        after: tuple[str, ...] = (),
        **spec_of: object,
    ) -> str:
        self.clock.time += 1000
        wish = Wish(spec(ranks, priority, **spec_of), FOUND)  # type: ignore[arg-type]
        return submit_runs.submit_all(self.log, self.clock.context, [wish], user, after=after)[0]

    def claim(self) -> str | None:
        self.clock.time += 1
        found = attempts.claim(
            self.log,
            self.clock.context,
            daemon=self.name,
            host=f"host-{self.name}",
            fits=lambda entry: self.inventory.fits(entry.demand),
            lease_micros=LEASE,
            limits=self.limits,
        )
        if found is None:
            return None
        self.inventory.take(found.run.run_id, found.run.spec)
        self.driven[found.run.run_id] = found
        return found.run.run_id

    def claim_all(self) -> list[str]:
        return list(iter(self.claim, None))

    def end(self, run_id: str, exit_code: int = 1) -> Run:
        lease = self.driven.pop(run_id).lease
        self.inventory.release(run_id)
        return attempts.finish(
            self.log,
            self.clock.context,
            lease,
            exit_code=exit_code,
            failure=USER_ERROR,
            lost=False,
            backoff_seconds=1.0,
        )

    def succeed(self, run_id: str) -> None:
        """As the trainer's journal would have it."""
        published = e.CheckpointPublished(step=3, path="/c", bytes=1, manifest_digest="m", seconds=1.0)
        told = [*lines(step(1), step(2), step(3)), Line(number=4, occurred_at=4, event=published)]
        attempts.record(self.log, self.clock.context, self.driven[run_id].lease, told, 40, {})
        assert self.end(run_id, 0).status == "succeeded"

    def train(self, run_id: str, steps: int = 1) -> None:
        told = lines(*(step(n) for n in range(1, steps + 1)))
        attempts.record(self.log, self.clock.context, self.driven[run_id].lease, told, 10 * steps, {})

    def preempt(self) -> list[str]:
        return turns.preempt(
            self.log,
            self.clock.context,
            daemon=self.name,
            fits=lambda entry: self.inventory.fits(entry.demand),
            need=self.inventory.need,
            free=lambda kind: len(self.inventory.free(kind)),
            limits=self.limits,
            silent_micros=10 * LEASE,
        )

    def anything_left(self) -> bool:
        return turns.anything_left(
            self.log, self.clock.context, lambda e: self.inventory.fits(e.demand), self.limits
        )

    def queue(self) -> dict[str, queue_queries.QueueRow]:
        rows = queue_queries.list_queue(self.log, self.clock.context, self.limits, 10 * LEASE)
        return {row.run_id: row for row in rows}

    def status(self, run_id: str) -> str:
        return find_run(self.log, run_id).status


@pytest.fixture
def farm(log: Store) -> Farm:
    return Farm(log)


# Order and devices.


def test_a_run_gets_all_its_ranks_or_none_and_keeps_its_turn(farm: Farm) -> None:
    first, large, small = farm.submit(3), farm.submit(2), farm.submit(1)
    assert farm.claim_all() == [first], "the small one does not overtake, although its device is free"
    rows = farm.queue()
    assert (rows[large].kind, rows[large].waits_for) == ("devices", "2 GPUs, 1 free")
    assert rows[small].waits_for == f"turn of {large}"
    farm.end(first)
    assert farm.claim_all() == [large, small]


def test_what_can_never_start_here_holds_up_nobody(farm: Farm) -> None:
    huge, small = farm.submit(5), farm.submit(1)
    assert farm.claim_all() == [small]
    assert farm.queue()[huge].waits_for == "no daemon has 5 GPUs"
    farm.end(small)
    assert not farm.anything_left()


def test_a_clock_that_is_set_back_keeps_nobody_waiting(store: Store) -> None:
    """A host that came up with a wrong date queues for the future; no back-off is longer than ten minutes."""
    log = Store(store.engine, before_commit=(views.catch_up,), clock=lambda _connection, local: local)
    farm = Farm(log, gpus=1)
    run_id = farm.submit()
    farm.clock.time -= 3600 * 1_000_000
    assert farm.queue()[run_id].kind == "start"
    assert farm.claim() == run_id


def test_limits_are_held_and_bind_only_their_own(farm: Farm) -> None:
    farm.limits = Limits(user=2, project=3)
    a, b = farm.submit(2, user="ada"), farm.submit(1, user="ada")
    c, d = farm.submit(2, user="bob", project="q"), farm.submit(1, user="bob", project="q")
    assert farm.claim_all() == [a, c]
    rows = farm.queue()
    assert rows[b].waits_for == "user ada has 2 of 2 devices"
    assert rows[d].kind == "limit"
    farm.end(a)
    assert farm.claim_all() == [b]
    third = farm.submit(3, user="eve")
    assert farm.queue()[third].waits_for == "more devices than user eve may have: 3 of 2"
    for run_id in (b, c):
        farm.end(run_id)
    farm.end(farm.claim_all()[0])
    assert not farm.anything_left()


@pytest.mark.parametrize("seed", [1, 2])
def test_any_workload_starts_in_order_within_the_devices_and_nobody_starves(log: Store, seed: int) -> None:
    """Large and small runs of three users come and go at random. Devices and limits are never exceeded; a run is
    overtaken only by higher priorities and, at its limit, by other users."""
    chance = random.Random(seed)
    farm = Farm(log)
    farm.limits = Limits(user=4)
    submitted: list[tuple[str, int, str]] = []
    started: list[str] = []
    while len(started) < 45:
        if len(submitted) < 45 and chance.random() < 0.5:
            # Now and then a run that takes the whole host, among many that take little.
            ranks = chance.choice([1, 1, 1, 2, 4])
            priority, user = chance.choice([0, 0, 1]), chance.choice("abc")
            submitted.append((farm.submit(ranks, priority, user=user), priority, user))
        elif farm.driven and chance.random() < 0.6:
            farm.end(chance.choice(sorted(farm.driven)))
        started += farm.claim_all()
        used = sum(c.run.spec.world_size for c in farm.driven.values())
        assert used == 4 - len(farm.inventory.free("cuda"))
    assert sorted(started) == sorted(run_id for run_id, *_ in submitted)
    place = {run_id: number for number, run_id in enumerate(started)}
    for number, (run_id, priority, user) in enumerate(submitted):
        for later, its_priority, its_user in submitted[number + 1 :]:
            if (priority, user) == (its_priority, its_user):
                assert place[run_id] < place[later]


# Holding, pausing, cancelling.


def test_a_held_run_keeps_its_place_and_others_go_ahead(farm: Farm) -> None:
    a, b, c = farm.submit(4), farm.submit(4), farm.submit(4)
    assert hold.hold(farm.log, farm.clock.context, a, "ada").status == "held"
    assert farm.claim_all() == [b]
    rows = farm.queue()
    assert (rows[a].status, rows[a].kind, rows[c].kind) == ("held", "held", "devices")
    hold.release(farm.log, farm.clock.context, a, "ada")
    farm.end(b)
    assert farm.claim_all() == [a]
    farm.end(a)
    hold.hold(farm.log, farm.clock.context, c, "ada")
    assert not farm.anything_left(), "a daemon that drains does not wait for a person"
    assert lifecycle.cancel(farm.log, farm.clock.context, c, "ada").run.status == "cancelled"
    assert farm.queue() == {}


def test_a_paused_run_leaves_the_queue_until_it_is_resumed(farm: Farm) -> None:
    run_id = farm.submit(4)
    farm.claim()
    farm.train(run_id)
    assert hold.pause(farm.log, farm.clock.context, run_id, "ada").status == "stopping"
    assert dict(turns.stopping(farm.log, farm.name)) == {run_id: False}
    assert farm.end(run_id).status == "paused"
    assert farm.queue() == {}
    assert farm.claim() is None
    lifecycle.resume(farm.log, farm.clock.context, run_id, "ada")
    assert farm.claim() == run_id
    lifecycle.cancel(farm.log, farm.clock.context, run_id, "ada", now=True)
    assert dict(turns.stopping(farm.log, farm.name)) == {run_id: True}
    assert farm.end(run_id, 137).status == "cancelled"


# Dependencies and sweeps.


def test_a_run_starts_once_those_before_it_have_succeeded(farm: Farm) -> None:
    a, b = farm.submit(1), farm.submit(1)
    c, d = farm.submit(4, after=(a, b)), farm.submit(1, after=(b,))
    f = farm.submit(1)
    assert farm.claim_all() == [a, b, f], "nobody waits for the devices of one that waits for another run"
    assert farm.queue()[c].waits_for == f"{min(a, b)} (starting)"
    farm.succeed(b)
    assert farm.claim_all() == [d]
    farm.succeed(a)
    farm.end(f)
    farm.end(d)
    assert farm.claim_all() == [c]


def test_those_that_wait_for_a_failed_run_are_cancelled_with_the_reason(farm: Farm) -> None:
    a = farm.submit(1)
    b = farm.submit(1, after=(a,))
    c, d = farm.submit(1, after=(b,)), farm.submit(1)
    hold.hold(farm.log, farm.clock.context, c, "ada")
    assert farm.claim_all() == [a, d]
    assert farm.end(a).status == "failed"
    assert [farm.status(r) for r in (b, c, d)] == ["cancelled", "cancelled", "starting"]
    assert find_run(farm.log, b).stop_reason == f"waits for {a}, which has failed"
    assert find_run(farm.log, c).stop_reason == f"waits for {b}, which was cancelled"
    with pytest.raises(Refused, match=f"{a} has failed"):
        farm.submit(1, after=(a,))
    # Both are released: the second still waits for the first.
    for run_id in (a, b):
        lifecycle.resume(farm.log, farm.clock.context, run_id, "ada")
    assert farm.claim_all() == [a]
    farm.succeed(a)
    assert farm.claim_all() == [b]


def test_cancelling_a_waiting_run_cancels_those_behind_it(farm: Farm) -> None:
    a = farm.submit(1)
    b = farm.submit(1, after=(a,))
    c = farm.submit(1, after=(b,))
    assert lifecycle.cancel(farm.log, farm.clock.context, a, "ada").dependents == [b, c]
    assert [farm.status(r) for r in (b, c)] == ["cancelled", "cancelled"]
    assert not farm.anything_left()


def test_whoever_cancels_a_run_that_trains_is_told_what_will_end_with_it(farm: Farm) -> None:
    a = farm.submit(1)
    b = farm.submit(1, after=(a,))
    c = farm.submit(1, after=(a, b))
    assert farm.claim() == a
    ending = lifecycle.cancel(farm.log, farm.clock.context, a, "ada")
    assert (ending.run.status, ending.dependents) == ("stopping", sorted([b, c]))
    assert farm.status(b) == "queued", "it may still succeed"
    farm.end(a)
    assert [farm.status(r) for r in (b, c)] == ["cancelled", "cancelled"]


def test_a_name_that_is_taken_is_drawn_again(farm: Farm) -> None:
    context = farm.clock.context
    drawn = iter([bytes(4), bytes(4), bytes(4), bytes([0, 0, 0, 1])])
    twice = type(context)(
        actor="test", now=context.now, random=lambda n: next(drawn) if n == 4 else os.urandom(n)
    )
    wishes = [Wish(spec(1), FOUND), Wish(spec(1), FOUND)]
    assert len(set(submit_runs.submit_all(farm.log, twice, wishes, "ada"))) == 2


def test_what_waits_for_a_paused_or_held_run_does_not_keep_a_daemon_from_draining(farm: Farm) -> None:
    a = farm.submit(1)
    b = farm.submit(1, after=(a,))
    farm.submit(1, after=(b,))
    hold.hold(farm.log, farm.clock.context, a, "ada")
    assert farm.claim() is None
    assert not farm.anything_left()
    hold.release(farm.log, farm.clock.context, a, "ada")
    assert farm.anything_left()


def test_a_sweep_is_queued_whole_in_its_order_or_not_at_all(farm: Farm) -> None:
    wishes = [Wish(spec(1), FOUND, (), {"optimizer.lr": n}) for n in range(3)]
    context = farm.clock.context
    ids = submit_runs.submit_all(farm.log, context, wishes, "ada", sweep="sweep-x")
    assert {find_run(farm.log, r).sweep for r in ids} == {"sweep-x"}
    farm.clock.time += 1000
    assert farm.claim_all() == ids
    with farm.log.read() as connection:
        before = event_store.last_position(connection)
    # Every run would get the same id.
    same = type(context)(
        actor="test", now=context.now, random=lambda n: bytes(n) if n == 4 else os.urandom(n)
    )
    with pytest.raises(ConcurrencyConflict, match="is at version"):
        submit_runs.submit_all(farm.log, same, wishes, "ada", sweep="sweep-y")
    with farm.log.read() as connection:
        assert event_store.last_position(connection) == before


# Preemption.


def test_a_run_of_higher_priority_takes_the_place_of_preemptible_ones(farm: Farm) -> None:
    low = [farm.submit(1, preemptible=True) for _ in range(3)]
    fixed = farm.submit(1)
    behind = farm.submit(1)
    assert farm.claim_all() == [*low, fixed]
    urgent = farm.submit(2, 5)
    assert farm.claim() is None
    assert sorted(farm.preempt()) == sorted(low[1:]), "as few as needed, the youngest first"
    assert farm.preempt() == [], "asked once"
    stopping = find_run(farm.log, low[1])
    assert (stopping.status, stopping.stop_then, stopping.preempted_by) == ("stopping", "queued", urgent)
    for run_id in low[1:]:
        run = farm.end(run_id, 1)
        assert (run.status, run.preemptions, run.fruitless_attempts, run.retry_at) == ("queued", 1, 0, None)
    assert farm.claim_all() == [urgent]
    farm.end(urgent)
    assert farm.claim_all() == low[1:], "in their old places, before those that came later"
    assert farm.queue()[behind].kind == "devices"


def test_nobody_is_preempted_in_vain(farm: Farm) -> None:
    low, fixed = farm.submit(1, preemptible=True), farm.submit(3)
    assert farm.claim_all() == [low, fixed]
    farm.submit(2, 5)
    assert farm.preempt() == [], "one device would not be enough"
    farm.submit(1, 0)
    assert farm.preempt() == [], "the same priority preempts nobody"


def test_two_daemons_do_not_both_make_room_for_one_run(farm: Farm) -> None:
    other = Farm(farm.log, name="d2", clock=farm.clock)
    low = [farm.submit(4, preemptible=True), farm.submit(4, preemptible=True)]
    assert [farm.claim(), other.claim()] == low
    farm.submit(4, 5)
    assert farm.preempt() == [low[0]]
    assert other.preempt() == []


def test_nobody_makes_room_while_another_host_has_it(farm: Farm) -> None:
    """Whichever daemon looks first: the other one is about to start the run."""
    low = farm.submit(4, preemptible=True)
    assert farm.claim() == low
    other = Farm(farm.log, name="d2", clock=farm.clock)
    urgent = farm.submit(4, 5)
    assert farm.preempt() == []
    with farm.log.write(appends=False) as tx:
        daemons.stopped(tx, "d2", farm.clock.time)
    assert farm.preempt() == [low], "a daemon that has stopped starts nothing"
    assert other.claim() == urgent


def test_a_host_without_its_checkpoint_is_no_room_for_a_run(farm: Farm) -> None:
    """Its own host makes room for it, although another one has devices free."""
    other = Farm(farm.log, name="d2", clock=farm.clock)
    urgent = farm.submit(4, 5)
    assert farm.claim() == urgent
    published = e.CheckpointPublished(step=1, path="/h/c", bytes=1, manifest_digest="m", seconds=1.0)
    told = [*lines(step(1)), Line(number=2, occurred_at=2, event=published)]
    attempts.record(farm.log, farm.clock.context, farm.driven[urgent].lease, told, 20, {})
    assert farm.end(urgent).status == "failed"
    low = farm.submit(4, preemptible=True)
    assert farm.claim() == low
    lifecycle.resume(farm.log, farm.clock.context, urgent, "ada")
    assert (farm.queue()[urgent].kind, other.driven) == ("devices", {})
    assert farm.preempt() == [low]


def test_a_daemon_that_fell_silent_does_not_keep_others_from_making_room(farm: Farm) -> None:
    other = Farm(farm.log, name="d2", clock=farm.clock)
    low = [farm.submit(4, preemptible=True), farm.submit(4, preemptible=True)]
    assert [farm.claim(), other.claim()] == low
    farm.submit(4, 5)
    assert other.preempt() == [low[1]]
    assert farm.preempt() == []
    with farm.log.write(appends=False) as tx:
        # Its lease has ended: its host may be gone for good.
        lease_store.renew(tx, [other.driven[low[1]].lease.token], 1)
    assert farm.preempt() == [low[0]]


def test_a_run_queued_by_an_older_sftd_is_looked_up_in_its_log(farm: Farm) -> None:
    large, small = farm.submit(4), farm.submit(1)
    with farm.log.write(appends=False) as tx:
        tx.execute(queue_demands.delete())
    assert farm.claim_all() == [large]
    assert farm.queue()[small].devices == 1


def test_runs_on_slurm_take_no_device_here_and_neither_waits_for_the_other(log: Store) -> None:
    farm = Farm(log, gpus=1, slurm=2)
    first, second, third = (farm.submit(8, launcher="slurm") for _ in range(3))
    here, too = farm.submit(), farm.submit()
    assert farm.claim_all() == [first, second, here], "two jobs at once, and one GPU"
    waits = {
        row.run_id: (row.kind, row.waits_for)
        for row in queue_queries.list_queue(log, farm.clock.context, Limits(), 10**9)
        if row.kind
    }
    assert waits == {third: ("devices", "1 jobs on Slurm, 0 free"), too: ("devices", "1 GPUs, 0 free")}
    farm.succeed(here)
    assert farm.claim_all() == [too]
    farm.succeed(second)
    assert farm.claim_all() == [third]
    assert Farm(log, name="d2", clock=farm.clock).claim() is None


def test_what_slurm_says_is_in_the_queue(log: Store) -> None:
    farm = Farm(log, gpus=0, slurm=1)
    run_id = farm.submit(8, launcher="slurm")
    assert farm.claim() == run_id
    lease = farm.driven[run_id].lease
    said = e.JobReported(job="7", state="PENDING", reason="Resources")
    attempts.job_reported(log, farm.clock.context, lease, said)
    (row,) = queue_queries.list_queue(log, farm.clock.context, Limits(), 10**9)
    assert (row.job, row.devices) == (said, 8)

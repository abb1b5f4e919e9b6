"""Whose turn it is, who makes room, and how it is explained. Pure."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftd.domain.queue.demand import Demand, Need, need
from sftd.domain.queue.forecast import HostCapacity, look_ahead
from sftd.domain.queue.order import Entry, Gate, Limits, Wait, choose_victims, stuck
from sftd.domain.spec.parse import parse

SECOND = 1_000_000
NONE = Limits()


def entry(run_id: str, ranks: int = 1, **other: Any) -> Entry:
    demand = Demand(ranks=ranks, world=ranks, device="cuda", preemptible=other.pop("preemptible", False))
    return Entry(run_id=run_id, priority=other.pop("priority", 0), demand=demand, **other)


def running(run_id: str, ranks: int = 1, seconds: float | None = None, owner: str = "d1") -> Entry:
    """A run with a number of seconds left."""
    return entry(
        run_id,
        ranks,
        status="running",
        owner=owner,
        planned_steps=10,
        step=0,
        seconds_per_step=None if seconds is None else seconds / 10,
    )


def host(gpus: int = 4, daemon: str = "d1") -> HostCapacity:
    return HostCapacity(daemon, f"host-of-{daemon}", gpus, 8)


def outlook(
    waiting: list[Entry], driven: list[Entry], hosts: list[HostCapacity], limits: Limits = NONE
) -> Any:
    return look_ahead(waiting, driven, hosts, limits, 100 * SECOND)


# What a run takes.


@pytest.mark.parametrize(
    ("settings", "gpus", "cpus", "expected"),
    [
        ({}, 2, 8, ("cuda", 2, 4)),
        ({}, 0, 8, ("cpu", 8, 4)),
        ({"launch.threads_per_rank": 1}, 0, 8, ("cpu", 2, 1)),
        ({"launch.device": "cpu", "launch.threads_per_rank": 3}, 4, 8, ("cpu", 6, 3)),
        # More ranks than cores is slow but works.
        ({}, 0, 1, ("cpu", 1, 1)),
    ],
)
def test_what_a_run_takes(settings: dict[str, Any], gpus: int, cpus: int, expected: Any) -> None:
    config = {"model": {"partial_pretrain": "/m"}, "data": {"train_files": ["/t"]}}
    spec, _ = parse(config, [("launch.nproc_per_node", 2), *settings.items()])
    wanted = need(Demand.of(spec), gpus, cpus)
    assert (wanted.device, wanted.count, wanted.threads) == expected


# What keeps a run waiting.


def waits(gate: Gate, run: Entry) -> Wait:
    found = gate.why_not(run)
    assert found is not None
    return found


def test_each_reason_is_told() -> None:
    gate = Gate(Limits(user=4), [running("r", 3)], now=100)
    assert waits(gate, entry("a", is_held=True)).kind == "held"
    assert waits(gate, entry("a", after={"b": "running"})) == Wait("after", "b (running)")
    assert waits(gate, entry("a", not_before=101)).kind == "backoff"
    assert gate.why_not(entry("a", not_before=100)) is None


def test_a_run_at_its_limit_is_not_overtaken_within_the_limit_but_by_all_others() -> None:
    gate = Gate(Limits(user=4), [entry("r", 3, user="ada")], now=0)
    assert waits(gate, entry("large", 2, user="ada")).text == "user ada has 3 of 4 devices"
    assert waits(gate, entry("small", 1, user="ada")).text == "turn of large (user's limit)"
    assert gate.why_not(entry("other", 4, user="bob")) is None
    gate.uncount(entry("r", 3, user="ada"))
    gate.forget_turns()
    assert gate.why_not(entry("large", 2, user="ada")) is None


def test_limits_of_user_and_project_hold_both() -> None:
    driven = [entry("r", 2, user="ada", project="p")]
    for limits, word in ((Limits(user=2), "user ada"), (Limits(project=2), "project p")):
        assert word in waits(Gate(limits, driven, 0), entry("a", 1, user="ada", project="p")).text
    assert Gate(Limits(user=2), driven, 0).why_not(entry("a", 1, user="bob", project="p")) is None


def test_a_run_larger_than_its_limit_holds_up_nobody() -> None:
    gate = Gate(Limits(user=2), [], 0)
    assert waits(gate, entry("huge", 3, user="ada")).text == "more devices than user ada may have: 3 of 2"
    assert not gate.can_ever_pass(entry("huge", 3, user="ada"))
    assert gate.why_not(entry("a", 2, user="ada")) is None


# Who makes room.


def test_victims_are_few_then_low_then_young() -> None:
    head = entry("head", 4, priority=9)

    def victims(lacking: int, *able: Entry) -> list[str]:
        return [e.run_id for e in choose_victims(head, list(able), lacking, lambda e: e.demand.ranks)]

    def low(run_id: str, ranks: int, priority: int = 0, started_at: int = 0) -> Entry:
        return entry(run_id, ranks, priority=priority, started_at=started_at, preemptible=True)

    assert victims(2, low("a", 1), low("b", 1), low("c", 2, priority=5)) == ["c"]
    assert victims(1, low("a", 1, priority=2), low("b", 1, priority=1)) == ["b"]
    assert victims(1, low("old", 1, started_at=1), low("young", 1, started_at=2)) == ["young"]
    assert victims(3, low("a", 2), low("b", 2)) == ["a", "b"]
    assert victims(5, low("a", 2), low("b", 2)) == [], "never for nothing"
    assert victims(1, low("same", 2, priority=9), entry("not asked", 2)) == []
    assert victims(0, low("a", 2)) == []


_ABLE = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 3), st.booleans()), max_size=6
)


@settings(max_examples=200, deadline=None)
@given(_ABLE, st.integers(1, 10))
def test_no_other_choice_of_victims_is_smaller(drawn: list[tuple[int, int, int, bool]], lacking: int) -> None:
    runs = [
        entry(f"r{n}", ranks, priority=priority, started_at=at, preemptible=may)
        for n, (ranks, priority, at, may) in enumerate(drawn)
    ]
    chosen = choose_victims(entry("head", 9, priority=2), runs, lacking, lambda e: e.demand.ranks)
    able = [r for r in runs if r.priority < 2 and r.demand.preemptible]
    enough = [
        group
        for size in range(len(able) + 1)
        for group in itertools.combinations(able, size)
        if sum(r.demand.ranks for r in group) >= lacking
    ]
    if not enough:
        assert chosen == []
        return
    fewest = [g for g in enough if len(g) == len(enough[0])]
    assert {e.run_id for e in chosen} in [{r.run_id for r in g} for g in fewest]


# What will never start by itself.


def test_what_waits_for_a_stuck_run_is_stuck() -> None:
    waiting = [
        entry("b", after={"held": "held"}),
        entry("c", after={"b": "queued"}),
        entry("d", after={"e": "queued"}),
        entry("e"),
        entry("large", 99),
        entry("f", after={"large": "queued"}),
    ]
    assert stuck(waiting, lambda e: e.demand.ranks < 9) == {"b", "c", "large", "f"}


# Explanations.


def test_the_head_waits_for_devices_and_those_behind_it_for_its_turn() -> None:
    found = outlook([entry("large", 4), entry("small", 1)], [running("r", 2, 60.0)], [host()])
    assert (found["large"].wait.kind, found["large"].wait.text) == ("devices", "4 GPUs, 2 free")
    assert (found["small"].wait.kind, found["small"].wait.text) == ("behind", "turn of large")
    assert found["large"].starts_at == 160 * SECOND
    assert found["small"].starts_at is None, "nobody knows how long the large one takes"


def test_what_has_been_trained_before_has_a_known_end() -> None:
    again = entry("again", 4, planned_steps=10, step=5, seconds_per_step=2.0)
    found = outlook([again, entry("next", 2)], [running("r", 4, 30.0)], [host()])
    assert (found["again"].starts_at, found["next"].starts_at) == (130 * SECOND, 140 * SECOND)


def test_a_run_whose_end_is_unknown_makes_what_follows_unknown() -> None:
    found = outlook([entry("a", 4)], [running("r", 1)], [host()])
    assert found["a"].starts_at is None


def test_dependencies_holds_and_retries_hold_up_nobody() -> None:
    waiting = [
        entry("held", is_held=True),
        entry("after", after={"r": "running"}),
        entry("retry", not_before=150 * SECOND),
        entry("free", 1),
    ]
    found = outlook(waiting, [running("r", 1, 20.0)], [host()])
    assert [found[e.run_id].wait.kind for e in waiting] == ["held", "after", "backoff", "start"]
    assert [found[e.run_id].starts_at for e in waiting] == [
        None,
        120 * SECOND,
        150 * SECOND,
        100 * SECOND,
    ]


def test_a_run_that_is_stopping_gives_its_devices_back_within_a_step_and_will_not_succeed() -> None:
    stopping = msgspec.structs.replace(running("a", 4, seconds=3600), status="stopping")
    found = outlook([entry("b", 4), entry("c", after={"a": "stopping"})], [stopping], [host()])
    assert (found["b"].wait.kind, found["b"].starts_at) == ("devices", (100 + 360) * SECOND)
    assert found["c"].starts_at is None
    loading = msgspec.structs.replace(stopping, seconds_per_step=None)
    assert outlook([entry("b", 4)], [loading], [host()])["b"].starts_at is None


def test_without_a_daemon_or_devices_nothing_is_expected() -> None:
    assert outlook([entry("a")], [], [])["a"].wait.text == "a daemon: none runs"
    found = outlook([entry("a", 9), entry("b", 1)], [], [host(), host(2, "d2")])
    assert (found["a"].wait.kind, found["a"].wait.text) == ("too large", "no daemon has 9 GPUs")
    assert found["a"].starts_at is None
    assert found["b"].wait.kind == "start", "what can never start holds up nobody"


def test_each_host_has_its_own_devices() -> None:
    hosts = [host(4, "d1"), host(2, "d2")]
    driven = [running("r1", 3, 10.0, "d1"), running("r2", 2, 50.0, "d2")]
    found = outlook([entry("four", 4), entry("two", 2)], driven, hosts)
    assert found["four"].starts_at == 110 * SECOND
    # The large one has reserved the first host, never the second.
    assert (found["two"].wait.kind, found["two"].starts_at) == ("devices", 150 * SECOND)


_WORK = st.lists(st.tuples(st.integers(1, 6), st.integers(-1, 1), st.integers(1, 5)), max_size=20)


@settings(max_examples=100, deadline=None)
@given(_WORK)
def test_no_forecast_oversubscribes_a_host_or_forgets_a_run(drawn: list[tuple[int, int, int]]) -> None:
    waiting = [
        entry(f"r{n:02d}", ranks, priority=p, planned_steps=t, seconds_per_step=1.0)
        for n, (ranks, p, t) in enumerate(drawn)
    ]
    waiting.sort(key=lambda e: (-e.priority, e.run_id))
    found = outlook(waiting, [], [host(4)])
    used: Counter[int] = Counter()
    for e in waiting:
        starts = found[e.run_id].starts_at
        assert (starts is None) == (e.demand.ranks > 4)
        if starts is not None:
            for second in range(starts // SECOND, starts // SECOND + e.planned_steps):
                used[second] += e.demand.ranks
    assert all(count <= 4 for count in used.values())


@pytest.mark.parametrize(
    ("user", "slurm_jobs"), [(None, 0), (None, 100), (2, 0)], ids=["devices", "Slurm beside", "a limit"]
)
def test_a_long_queue_is_gone_through_once(
    user: int | None, slurm_jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0
    why_not = Gate.why_not

    def counted(gate: Gate, entry: Entry) -> Wait | None:
        nonlocal asked
        asked += 1
        return why_not(gate, entry)

    monkeypatch.setattr(Gate, "why_not", counted)
    waiting = [
        Entry(run_id=f"r{n}", priority=0, demand=Demand(), planned_steps=9 + n, seconds_per_step=1.0)
        for n in range(1000)
    ]
    found = look_ahead(waiting, [], [HostCapacity("d", "node", 0, 4, {"slurm": slurm_jobs})], Limits(user), 0)
    assert sum(outlook.starts_at is not None for outlook in found.values()) > 50
    assert asked < 1000 + 100 * 10, "whoever cannot start for those before it is asked about once"


# Explanations of limits and hosts.


def test_limits_are_told_and_understood() -> None:
    limits = Limits(user=4, project=7)
    assert limits.describe() == {"user_limit": 4, "project_limit": 7}
    assert NONE.describe() == {"user_limit": 0, "project_limit": 0}
    assert Limits.told(limits.describe()) == limits
    assert Limits.told(NONE.describe()) == NONE
    assert Limits.told({"user_limit": 4}) == Limits(user=4)
    assert Limits.told({"project_limit": 4}) is None, "an older daemon does not tell them"


def test_where_two_daemons_differ_the_looser_limit_holds() -> None:
    assert Limits(4, 7).loosened(Limits(5, 6)) == Limits(5, 7)
    assert Limits(4, 7).loosened(Limits(4, None)) == Limits(4, None)
    assert Limits(None, 7).loosened(Limits(4, 9)) == Limits(None, 9)


def test_a_back_off_ends_and_none_is_longer_than_the_longest() -> None:
    late = entry("a", not_before=700 * SECOND)
    assert Gate(NONE, [], now=700 * SECOND).why_not(late) is None
    assert waits(Gate(NONE, [], now=700 * SECOND - 1), late).kind == "backoff"
    assert waits(Gate(NONE, [], now=100 * SECOND), late).kind == "backoff"
    # A clock that has been set back since.
    assert Gate(NONE, [], now=100 * SECOND - 1).why_not(late) is None


def test_a_limit_is_reached_by_the_run_that_exceeds_it() -> None:
    gate = Gate(Limits(user=4), [running("r", 3)], now=0)
    assert gate.why_not(entry("a", 1)) is None
    wait = waits(gate, entry("b", 2))
    assert wait == Wait("limit", "user  has 3 of 4 devices")
    assert waits(gate, entry("c", 1)).kind == "behind"
    assert (gate.can_ever_pass(entry("d", 4)), gate.can_ever_pass(entry("d", 5))) == (True, False)
    assert waits(gate, entry("d", 5)).kind == "limit"
    gate.forget_turns()
    assert gate.why_not(entry("c", 1)) is None


def test_the_words_of_a_wait_have_its_numbers() -> None:
    found = outlook([entry("a", 3)], [running("r", 2)], [host(4)])
    assert found["a"].wait == Wait("devices", "3 GPUs, 2 free")
    on_cpus = msgspec.structs.replace(entry("b"), demand=Demand(ranks=2, world=2, device="cpu", threads=3))
    busy = msgspec.structs.replace(on_cpus, run_id="r", status="running", owner="d1")
    assert outlook([on_cpus], [busy], [host(4)])["b"].wait == Wait("devices", "6 CPUs, 2 free")
    assert outlook([entry("c", 5)], [], [host(4)])["c"].wait == Wait("too large", "no daemon has 5 GPUs")


def test_slurms_jobs_are_counted_beside_the_hosts_devices() -> None:
    job = msgspec.structs.replace(
        entry("s"), demand=Demand(ranks=8, world=64, device="cuda", launcher="slurm")
    )
    with_slurm = HostCapacity("d1", "h", 1, 8, {"slurm": 1})
    assert outlook([job], [], [host(4)])["s"].wait.kind == "too large"
    assert outlook([job], [], [with_slurm])["s"].wait.kind == "start"
    driven = msgspec.structs.replace(job, run_id="t", status="running", owner="d1")
    assert outlook([job], [driven], [with_slurm])["s"].wait == Wait("devices", "1 jobs on Slurm, 0 free")
    # It keeps no run for the host itself waiting, nor is it kept waiting by one.
    found = outlook([job, entry("x")], [driven], [with_slurm])
    assert found["x"].wait.kind == "start"


def test_a_run_waits_for_the_host_that_has_its_checkpoint() -> None:
    there = entry("a", only_on="host-of-d2")
    assert outlook([there], [], [host(), host(daemon="d2")])["a"].wait.kind == "start"
    wait = outlook([there], [], [host()])["a"].wait
    assert (wait.kind, "host-of-d2" in wait.text) == ("checkpoint", True)


def test_starts_are_reckoned_from_the_pace_of_what_runs() -> None:
    found = outlook([entry("a", 4), entry("b", 2)], [running("r", 1, seconds=50)], [host(4)])
    assert found["a"].starts_at == (100 + 50) * SECOND
    assert found["b"].starts_at is None
    stopping = msgspec.structs.replace(running("r", 1, seconds=50), status="stopping")
    assert outlook([entry("a", 4)], [stopping], [host(4)])["a"].starts_at == (100 + 5) * SECOND
    # What waits for a run that is asked to stop is not started by its end.
    after = entry("a", 1, after={"r": "stopping"})
    assert outlook([after], [stopping], [host(4)])["a"].starts_at is None
    ending = running("r", 1, seconds=50)
    assert (
        outlook([entry("a", 1, after={"r": "running"})], [ending], [host(4)])["a"].starts_at == 150 * SECOND
    )
    # A back-off of its own comes later than the devices.
    late = entry("a", 4, not_before=170 * SECOND)
    assert outlook([late], [ending], [host(4)])["a"].starts_at == 170 * SECOND


def test_cores_and_gpus_that_do_not_share_out_are_left_over() -> None:
    assert need(Demand(ranks=3, world=3, device="cpu"), 0, 8) == Need("cpu", 6, 2)
    assert need(Demand(ranks=2, world=2, device="cuda"), 3, 8) == Need("cuda", 2, 2)
    assert need(Demand(ranks=2, world=2, device="cuda"), 16, 8) == Need("cuda", 2, 1)
    assert need(Demand(ranks=2, world=2, device="cuda", threads=5), 16, 8) == Need("cuda", 2, 5)
    assert need(Demand(ranks=8, world=64, device="cuda", launcher="slurm"), 4, 8) == Need("slurm", 1, 1)

"""What the queue promises, on each database: one claimant for each run, in order, and no write without the lease."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from sftd.domain.errors import LeaseLost
from sftd.domain.spec.spec import Spec
from sftd.store.database.engine import Store
from sftd.store.queue import leases as lease_store
from sftd.store.queue import order as queue_order
from sftd.store.queue.leases import Lease


def enqueue(store: Store, *entries: tuple[str, int, int]) -> None:
    with store.write(appends=False) as tx:
        for run_id, priority, now in entries:
            lease_store.enqueue(tx, run_id, priority, now)
            queue_order.set_demand(tx, run_id, Spec())


def claim(store: Store, token: str, now: int = 1000) -> str | None:
    with store.write() as tx:
        for entry in queue_order.in_order(tx.connection, now):
            assert lease_store.lease(tx, entry.run_id, 1, token, "owner", now + 30)
            return entry.run_id
        return None


def leases(store: Store) -> list[Lease]:
    with store.read() as connection:
        return lease_store.leases(connection)


def waiting(store: Store) -> list[tuple[str, int]]:
    with store.read() as connection:
        return [(entry.run_id, entry.not_before) for entry in queue_order.waiting(connection)]


def check(store: Store, run_id: str, token: str) -> None:
    with store.write() as tx:
        lease_store.check(tx, run_id, token)


def test_priority_comes_first_then_age_then_the_id(store: Store) -> None:
    enqueue(store, ("late", 0, 30), ("b", 0, 20), ("a", 0, 20), ("low", -5, 10), ("high", 5, 40))
    order = ["high", "a", "b", "late", "low"]
    assert [run_id for run_id, _ in waiting(store)] == order
    assert [claim(store, f"t{n}") for n in range(6)] == [*order, None]


def test_a_run_does_not_start_before_its_time(store: Store) -> None:
    enqueue(store, ("a", 0, 1), ("b", 0, 2))
    assert claim(store, "t") == "a"
    with store.write() as tx:
        lease_store.wait_again(tx, "a", not_before=500)
    assert waiting(store) == [("a", 500), ("b", 2)]
    assert claim(store, "u", now=499) == "b"
    assert claim(store, "v", now=499) is None
    assert claim(store, "v", now=500) == "a"


def test_a_long_queue_is_read_in_order_page_by_page(store: Store) -> None:
    entries = [(f"run-{number:03d}", -(number // 90), number % 7) for number in range(250)]
    enqueue(store, *entries[::-1])
    expected = [run_id for run_id, *_ in sorted(entries, key=lambda e: (-e[1], e[2], e[0]))]
    with store.read() as connection:
        assert [entry.run_id for entry in queue_order.in_order(connection, 1000)] == expected


def test_a_held_run_keeps_its_place(store: Store) -> None:
    enqueue(store, ("a", 0, 1), ("b", 0, 2))
    with store.write(appends=False) as tx:
        lease_store.hold(tx, "a")
    assert claim(store, "t") == "b"
    assert claim(store, "u") is None
    with store.write(appends=False) as tx:
        lease_store.hold(tx, "b")  # it runs: nothing happens
        lease_store.release(tx, "a")
    assert claim(store, "u") == "a"


def test_a_leased_run_is_not_leased_again(store: Store) -> None:
    enqueue(store, ("a", 0, 1))
    claim(store, "t")
    with store.write() as tx:
        assert not lease_store.lease(tx, "a", 2, "u", "owner", 99)
        assert not lease_store.lease(tx, "none", 1, "u", "owner", 99)
    assert leases(store) == [Lease("a", 1, "t", "owner", 1030)]


def test_only_the_holder_passes_the_check(store: Store) -> None:
    enqueue(store, ("a", 0, 1), ("b", 0, 2))
    claim(store, "t")
    check(store, "a", "t")
    for run_id, token in (("a", "other"), ("b", "t"), ("none", "t")):
        with pytest.raises(LeaseLost, match=run_id):
            check(store, run_id, token)


@pytest.mark.parametrize("end", ["wait_again", "leave"])
def test_a_lease_ends_with_its_attempt(store: Store, end: str) -> None:
    enqueue(store, ("a", 0, 1))
    claim(store, "t")
    with store.write() as tx:
        if end == "leave":
            lease_store.leave(tx, "a")
        else:
            lease_store.wait_again(tx, "a", not_before=1)
    assert leases(store) == []
    assert claim(store, "u") == ("a" if end == "wait_again" else None)
    with pytest.raises(LeaseLost):
        check(store, "a", "t")


def test_renewing_prolongs_what_is_held_and_tells_what_is_lost(store: Store) -> None:
    enqueue(store, ("a", 0, 1), ("b", 0, 2))
    claim(store, "t1")
    claim(store, "t2")
    with store.write(appends=False) as tx:
        assert lease_store.renew(tx, ["t1", "gone"], 5000) == {"t1"}
        assert lease_store.renew(tx, [], 9000) == set()
    assert [(entry.token, entry.expires_at) for entry in leases(store)] == [("t1", 5000), ("t2", 1030)]


def test_a_lease_is_taken_over_once(store: Store) -> None:
    enqueue(store, ("a", 0, 1))
    claim(store, "t")
    (old,) = leases(store)
    with store.write() as tx:
        assert lease_store.take_over(tx, old, "u", "second", 7000)
        assert not lease_store.take_over(tx, old, "v", "third", 8000)
    assert leases(store) == [Lease("a", 1, "u", "second", 7000)]
    with pytest.raises(LeaseLost):
        check(store, "a", "t")
    with store.write(appends=False) as tx:
        assert lease_store.renew(tx, ["t"], 9000) == set()
    check(store, "a", "u")


def test_a_write_under_a_lost_lease_is_taken_back_whole(store: Store) -> None:
    enqueue(store, ("a", 0, 1), ("b", 0, 2))
    claim(store, "t")
    with pytest.raises(LeaseLost), store.write() as tx:
        lease_store.leave(tx, "b")
        lease_store.check(tx, "a", "stale")
    assert [run_id for run_id, _ in waiting(store)] == ["b"]


def test_claimants_get_each_run_exactly_once(store: Store) -> None:
    runs = [f"run-{number:02d}" for number in range(40)]
    enqueue(store, *((run_id, 0, number) for number, run_id in enumerate(runs)))
    barrier = threading.Barrier(8)

    def work(number: int) -> list[str]:
        barrier.wait()
        mine: list[str] = []
        misses = 0
        while misses < 3:
            claimed = claim(store, f"{number}-{len(mine)}")
            if claimed is None:
                misses += 1
            else:
                mine.append(claimed)
        return mine

    with ThreadPoolExecutor(8) as pool:
        claimed = Counter(run_id for mine in pool.map(work, range(8)) for run_id in mine)
    assert claimed == Counter(runs)
    assert len({entry.token for entry in leases(store)}) == len(runs)


def test_one_of_many_takes_an_expired_lease_over(store: Store) -> None:
    enqueue(store, ("a", 0, 1))
    claim(store, "t")
    (old,) = leases(store)
    barrier = threading.Barrier(6)

    def take(number: int) -> bool:
        barrier.wait()
        with store.write() as tx:
            return lease_store.take_over(tx, old, f"new-{number}", f"daemon-{number}", 9000)

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(take, range(6)))
    assert results.count(True) == 1
    assert leases(store)[0].token == f"new-{results.index(True)}"

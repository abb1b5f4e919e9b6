"""`sftd nodes`: which daemons share the database, what they have and what they drive."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from sftd.cli import main
from sftd.domain.log import events as e
from sftd.operations.commands.submit import Wish, submit_all
from sftd.operations.context import Context
from sftd.operations.driving import attempts
from sftd.operations.queries.nodes import Devices, Node, list_nodes
from sftd.operations.queries.queue import living_hosts
from sftd.store.database.engine import Store
from sftd.store.database.tables import daemons as daemons_table
from sftd.store.queue import daemons, leases
from sftd.store.queue.daemons import DaemonRow
from sftd.wire.preflight import Preflight
from tests.builders.log.clock import CONTEXT
from tests.builders.log.specs import FACTS, LEASE, SHAPE, SPEC

SILENT = 30_000_000


def register(log: Store, daemon: str, host: str, home: str = "/home", gpus: int = 4, ago: int = 0) -> None:
    with log.write(appends=False) as tx:
        devices = json.dumps({"gpus": gpus, "cpus": 2})
        daemons.register(tx, DaemonRow(daemon, host, 1, 1.0, home, devices, CONTEXT.now(), CONTEXT.now()))
        c = daemons_table.c
        earlier = {"started_at": c.started_at - ago, "seen_at": c.seen_at - ago}
        tx.execute(sa.update(daemons_table).where(c.daemon_id == daemon).values(earlier))


def drive(log: Store, daemon: str, devices: list[str] | None) -> str:
    submit_all(log, CONTEXT, [Wish(SPEC, Preflight(SHAPE, FACTS, None, 3, []))], "ada")
    found = attempts.claim(log, CONTEXT, daemon=daemon, host="h", fits=lambda run: True, lease_micros=LEASE)
    assert found is not None
    if devices is not None:
        launched = e.AttemptLaunched(
            pid=1, create_time=1.0, host="h", directory="d", argv=[], devices=devices
        )
        attempts.launched(log, CONTEXT, found.lease, launched)
    return found.lease.run_id


def nodes(log: Store, everyone: bool = False) -> dict[str, Node]:
    return {node.daemon: node for node in list_nodes(log, CONTEXT, SILENT, everyone=everyone)}


def test_devices_in_use_are_those_of_the_runs_that_a_daemon_drives(log: Store) -> None:
    register(log, "a", "one")
    register(log, "b", "two", gpus=0)
    first, second = drive(log, "a", ["cuda:0", "cuda:2"]), drive(log, "a", None)
    third = drive(log, "b", ["cpu:0"])
    found = nodes(log)
    assert sorted(found["a"].runs) == sorted([first, second])
    assert found["a"].devices == {"gpus": Devices(4, 2), "cpus": Devices(2, 0)}
    assert found["a"].devices["gpus"].free == 2
    assert (found["b"].runs, found["b"].devices) == ([third], {"gpus": Devices(0, 0), "cpus": Devices(2, 1)})


def test_an_adopted_run_is_its_new_daemons(log: Store) -> None:
    register(log, "old", "one", ago=2 * SILENT)
    drive(log, "old", ["cuda:1"])
    register(log, "new", "one")
    assert {n: len(node.runs) for n, node in nodes(log).items()} == {"old": 1, "new": 0}
    with log.read() as connection:
        (lease,) = leases.leases(connection)
    adopted = e.AttemptAdopted(daemon="new", host="one", pid=1)
    attempts.adopt(log, CONTEXT, lease, adopted, LEASE)
    assert {n: node.devices["gpus"].used for n, node in nodes(log).items()} == {"new": 1}
    assert {n: len(node.runs) for n, node in nodes(log, everyone=True).items()} == {"old": 0, "new": 1}


def test_alive_not_observed_and_stopped_are_three_things(log: Store) -> None:
    began = time.monotonic()
    register(log, "alive", "one")
    register(log, "silent", "two", ago=2 * SILENT)
    register(log, "stopped", "three", ago=2 * SILENT)
    with log.write(appends=False) as tx:
        daemons.stopped(tx, "stopped", CONTEXT.now())
    assert {n: node.state for n, node in nodes(log).items()} == {
        "alive": "alive",
        "silent": "not observed",
        "stopped": "stopped",
    }
    unseen = nodes(log)["silent"].unseen_seconds
    assert 59 <= unseen <= 61 + time.monotonic() - began


def test_the_hosts_that_may_start_runs_are_those_of_living_daemons(log: Store) -> None:
    assert living_hosts(log, CONTEXT, SILENT) == []
    register(log, "alive", "one", gpus=8)
    register(log, "silent", "two", ago=2 * SILENT)
    register(log, "stopped", "three")
    with log.write(appends=False) as tx:
        daemons.stopped(tx, "stopped", CONTEXT.now())
    (host,) = living_hosts(log, CONTEXT, SILENT)
    assert (host.name, host.gpus, host.cpus) == ("one", 8, 2)


def test_a_daemon_whose_clock_is_wrong_is_seen_as_it_is(log: Store) -> None:
    """On a server; a SQLite file has one host, and one clock."""
    slow = Context(actor="slow", now=lambda: CONTEXT.now() - 10 * SILENT)
    with log.write(appends=False) as tx:
        daemons.register(tx, DaemonRow("slow", "one", 1, 1.0, "/home", "{}", slow.now(), slow.now()))
        daemons.seen(tx, "slow", slow.now())
    is_server = log.engine.dialect.name == "postgresql"
    assert nodes(log)["slow"].state == ("alive" if is_server else "not observed")


def test_the_command_lists_them(
    log: Store, database_url: str, clean_environment: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFTD_DATABASE_URL", database_url)
    monkeypatch.setenv("COLUMNS", "80")
    assert "No daemon has used this database yet" in CliRunner().invoke(main, ["nodes"]).stdout
    register(log, "node-17-1234-abcdef", "node-17")
    register(log, "node-18-77-abcdef", "node-18", ago=4 * SILENT)
    run_id = drive(log, "node-17-1234-abcdef", ["cuda:3"])
    shown = CliRunner().invoke(main, ["nodes"])
    assert shown.exit_code == 0
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())
    for text in ("node-17", "alive", "1/4 gpus", run_id, "not observed since"):
        assert text in shown.stdout
    first, second = json.loads(CliRunner().invoke(main, ["nodes", "--json"]).stdout)
    assert (first["host"], first["state"], first["runs"]) == ("node-17", "alive", [run_id])
    assert first["devices"]["gpus"] == {"total": 4, "used": 1, "free": 3}
    assert (second["host"], second["state"], second["runs"]) == ("node-18", "not observed", [])

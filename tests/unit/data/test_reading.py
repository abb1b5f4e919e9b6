"""How much of each source a run reads, and how it is printed."""

from __future__ import annotations

from sftd.cli.look.data import _counts
from sftd.cli.terminal import sources
from sftd.domain.data.facts import SourceFacts
from sftd.domain.data.mixture import MixtureStart
from sftd.domain.run.state import ForkPoint, Run
from sftd.domain.spec.parse import parse
from sftd.domain.spec.spec import OrderStart

SPEC = parse(
    {
        "model": {"partial_pretrain": "/m"},
        "data": {
            "sources": [
                {"name": "code", "files": ["/c"], "weight": 3},
                {"name": "chat", "files": ["/t"], "weight": 1},
            ],
            "train_batch_size": 4,
        },
        "trainer": {"max_steps": 20},
    }
)[0]
FACTS = tuple(SourceFacts(name=name, rows=40, tokens=400, digest=name) for name in ("code", "chat"))


def test_a_plan_shows_shares_and_epochs_of_each_source() -> None:
    assert list(sources.planned(SPEC, FACTS, 20)) == [
        "code: 75.0% of the samples, 1.50 epochs of 40 rows",
        "chat: 25.0% of the samples, 0.50 epochs of 40 rows",
    ]
    assert not list(sources.planned(SPEC, (), 20))


def test_a_fork_shows_its_own_rows_and_the_epochs_of_its_parents_too() -> None:
    """The parent read 30 rows of code, which is none of the fork's steps."""
    start = MixtureStart(10, {"code": 30})
    run = Run(
        "fork",
        spec=SPEC,
        sources=FACTS,
        planned_steps=20,
        step=15,
        fork=ForkPoint("parent", 10, 0, 30, start),
        order=(OrderStart(10, 30),),
    )
    assert list(sources.of_run(run)) == [
        "code: 75.0% of the samples, 1.50 epochs of 40 rows; 15 read",
        "chat: 25.0% of the samples, 0.25 epochs of 40 rows; 5 read",
    ]


def test_the_epochs_of_a_step_are_counted_by_source() -> None:
    rows = [{"source": "code", "epoch": 0}, {"source": "code", "epoch": 1}, {"source": "chat", "epoch": 4}]
    assert _counts(rows) == "2 rows of code, epoch 0 and 1, 1 row of chat, epoch 4"
    assert _counts([{"epoch": 2}, {"epoch": 2}]) == "2 rows of epoch 2"

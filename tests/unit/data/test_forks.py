"""What a fork of a run with several sources reads, and how its changes are named."""

from __future__ import annotations

from typing import Any

import pytest

from sftd.domain.data.facts import SourceFacts
from sftd.domain.data.mixture import MixtureStart
from sftd.domain.run import decisions, trajectory
from sftd.domain.run.state import Run
from sftd.domain.spec.parse import parse
from sftd.domain.spec.spec import OrderStart, Spec

CODE, CHAT = {"name": "code", "files": ["/c"], "weight": 3}, {"name": "chat", "files": ["/t"], "weight": 1}
MATH = {"name": "math", "files": ["/m"], "weight": 1}


def spec_of(*sources: dict[str, Any], **data: Any) -> Spec:
    mixed = {"sources": list(sources), "train_batch_size": 4, **data}
    return parse({"model": {"partial_pretrain": "/m"}, "data": mixed, "trainer": {"max_steps": 20}})[0]


def facts(**digests: str) -> tuple[SourceFacts, ...]:
    return tuple(SourceFacts(name=name, rows=50, tokens=500, digest=of) for name, of in digests.items())


PARENT = Run(
    "parent",
    spec=spec_of(CODE, CHAT),
    sources=facts(code="c", chat="t"),
    train_digest="ct",
    planned_steps=20,
)
MOVED = {"code": "c0", "chat": "c1t"}


@pytest.mark.parametrize(
    ("spec", "digest", "sources", "cursors"),
    [
        # After 10 steps of 4 samples: 30 rows of code, 10 of chat.
        (spec_of(CODE, CHAT), "ct", {"code": "c", "chat": "t"}, None),
        (spec_of({**CODE, "files": ["/moved"]}, CHAT), "ct", {"code": "c", "chat": "t"}, None),
        (spec_of({**CODE, "weight": 1}, CHAT), "ct", {"code": "c", "chat": "t"}, {"code": 30, "chat": 10}),
        (spec_of(CODE, CHAT, train_batch_size=8), "ct", {"code": "c", "chat": "t"}, {"code": 30, "chat": 10}),
        (spec_of(MATH, CODE), "mc", {"math": "m", "code": "c"}, {"code": 30}),
        (spec_of(CODE, CHAT), "cu", {"code": "c", "chat": "u"}, {"code": 30}),
        (spec_of({**CODE, "max_rows": 40}, CHAT), "ct", {"code": "c", "chat": "t"}, {"chat": 10}),
        # A file of code is one of chat now: the digest over all files is the same.
        (spec_of(CODE, CHAT), "ct", MOVED, {}),
        (spec_of(CODE, CHAT, shuffle=False), "ct", {"code": "c", "chat": "t"}, {}),
    ],
)
def test_each_source_with_the_same_rows_goes_on(
    spec: Spec, digest: str, sources: dict[str, str], cursors: dict[str, int] | None
) -> None:
    order, start = trajectory.forked_order(PARENT, 10, spec, digest, facts(**sources))
    if cursors is None:
        assert (order, start) == (OrderStart(10, 40), MixtureStart())
    else:
        assert start == MixtureStart(10, cursors)
        assert order == OrderStart(10, sum(cursors.values()))


def test_changes_name_the_key_of_a_source() -> None:
    new = spec_of({**CODE, "weight": 1}, MATH)
    assert trajectory.changes(PARENT.spec, new) == {
        "data.sources": [["code", "chat"], ["code", "math"]],
        "data.sources.code.weight": [3.0, 1.0],
        "data.sources.math.files": [None, ["/m"]],
        "data.sources.math.weight": [None, 1.0],
        "data.sources.math.on_exhausted": [None, "repeat"],
    }


@pytest.mark.parametrize(
    ("spec", "sources", "guilty"),
    [
        (spec_of({**CODE, "files": ["/moved"]}, CHAT), {"code": "c", "chat": "t"}, []),
        (spec_of({**CODE, "weight": 1}, CHAT), {"code": "c", "chat": "t"}, ["data.sources.code.weight"]),
        (spec_of(CODE, CHAT), MOVED, ["data.sources"]),
    ],
)
def test_a_resume_reads_the_same_rows(spec: Spec, sources: dict[str, str], guilty: list[str]) -> None:
    new = decisions.Proposal(spec, 20, "ct", "", facts(**sources))
    assert [problem.where for problem in decisions.other_run(PARENT, new)] == guilty

"""The judge: runs every check of submit, fork, resume, plan and a run without a daemon."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from sftd.domain.data import mixture
from sftd.domain.data.facts import DataFacts
from sftd.domain.errors import Problem
from sftd.domain.model.rules import MODEL
from sftd.domain.spec.spec import FROM_THE_BEGINNING, OrderStart, Spec
from sftd.domain.submit.facts import SubmitFacts
from sftd.domain.submit.fork_rules import FORK
from sftd.domain.submit.rules import FACTS, PLANNED


class Verdict(msgspec.Struct, frozen=True):
    """The result. A run with `problems` is refused and has no `warnings`. `planned_steps` is None if facts are missing."""

    problems: list[Problem]
    warnings: list[Problem] = []
    planned_steps: int | None = None


def judge(
    spec: Spec,
    facts: SubmitFacts,
    start: Callable[[DataFacts], OrderStart] = lambda train: FROM_THE_BEGINNING,
) -> Verdict:
    """Judge whether a run may be queued. The spec is already parsed, so it satisfies `SPEC` of `domain/spec/rules.py`. `start`
    maps the training data to the position from which the run reads."""
    problems = [*facts.unreadable, *FACTS.problems(spec, facts), *FORK.problems(spec, facts)]
    warnings = FACTS.warnings(spec, facts) + FORK.warnings(spec, facts)
    if facts.shape is not None:
        problems += MODEL.problems(spec, facts.shape)
        warnings += MODEL.warnings(spec, facts.shape)
    if problems or facts.shape is None or facts.train is None:
        return Verdict(problems)
    beginning = start(facts.train)
    rows: int | None = facts.train.usable
    if spec.data.sources:
        rows = mixture.of_facts(spec, facts.train.sources).epoch_rows
    planned = spec.planned_steps(rows, beginning)
    facts = msgspec.structs.replace(facts, planned_steps=planned, first_step=beginning.step)
    if problems := PLANNED.problems(spec, facts):
        return Verdict(problems)
    return Verdict([], warnings + PLANNED.warnings(spec, facts), planned)

"""Evaluations for users: what one waits for, and answers side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from sftd.domain.errors import Problem, Refused
from sftd.domain.run.state import EvaluationState, Run
from sftd.operations.context import Context
from sftd.operations.queries.queue import living_hosts
from sftd.store.database.engine import Store


def what_it_waits_for(store: Store, context: Context, run: Run, silent_micros: int) -> str:
    """Why an evaluation of the run does not run yet."""
    alive = living_hosts(store, context, silent_micros)
    if not alive:
        return "waits for a daemon: `sftd daemon --detach` starts one"
    needs_gpu = run.spec.launch.device == "cuda" or run.environment.get("device", "cpu") != "cpu"
    if needs_gpu and not any(host.gpus for host in alive):
        return "waits for a daemon on a host with a GPU: evaluations run on a daemon's host, never in a job"
    return "waits for devices that no run needs, on a host with the checkpoint"


class Answers(msgspec.Struct, frozen=True):
    """The answers of two evaluations to one question, and their scores, None if the kind gives none."""

    question: int
    prompt: str
    reference: list[str]
    ours: str
    theirs: str
    our_score: float | None
    their_score: float | None

    @property
    def change(self) -> float:
        """How much better the first answer is."""
        return (self.our_score or 0.0) - (self.their_score or 0.0)


def last_done(run: Run, name: str, step: int | None) -> EvaluationState:
    """The result of an evaluation at `step`; None is the newest. Raises `Refused`."""
    done = [x for x in run.evaluations if x.name == name and x.status == "done" and step in (None, x.step)]
    if not done:
        at = "" if step is None else f" of step {step}"
        raise Refused(
            Problem(run.run_id, f"has no result of evaluation {name}{at}", f"`sftd eval {run.run_id} --list`")
        )
    return done[-1]


def side_by_side(ours: EvaluationState, theirs: EvaluationState) -> list[Answers]:
    """The answers to the same questions. Raises `Refused` if the questions differ, or a file of answers cannot be read."""
    if ours.questions_digest != theirs.questions_digest:
        what = f"evaluation {ours.name} had other questions at step {theirs.step}"
        raise Refused(Problem("--against", what, "evaluate both again with `sftd eval`"))
    first, second = _rows(ours), _rows(theirs)
    return [
        Answers(
            number,
            str(row["prompt"]),
            [str(text) for text in row["reference"] or []],
            str(row["answer"]),
            str(second[number]["answer"]),
            row["score"],
            second[number]["score"],
        )
        for number, row in first.items()
        if number in second
    ]


def _rows(state: EvaluationState) -> dict[int, dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ["question", "prompt", "reference", "answer", "score"]
    if state.answers is None:
        what = f"evaluation {state.name} of step {state.step} wrote no answers"
        raise Refused(Problem("--against", what, "only kinds with questions do"))
    try:
        rows = pq.read_table(Path(state.answers), columns=columns).to_pylist()
        return {int(row["question"]): row for row in rows}
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        what = f"{state.answers} cannot be read: {error}"
        raise Refused(Problem("--against", what, "use the host that evaluated, or evaluate again")) from None

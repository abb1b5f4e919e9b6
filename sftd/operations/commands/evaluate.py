"""Commands on evaluations: request and cancel."""

from __future__ import annotations

from sftd.domain.run import evaluations as decisions
from sftd.domain.run.state import EvaluationState
from sftd.operations.context import Context, append_decided, current
from sftd.store.database.engine import Store


def request(
    store: Store, context: Context, run_id: str, step: int | None, name: str | None, by: str
) -> list[EvaluationState]:
    """Request evaluations (see `decisions.request`). Returns those that now wait or run for it. Raises `Refused`."""
    with store.write() as tx:
        run = current(tx.connection, run_id)
        step, decided = decisions.request(run, step, name, by)
        append_decided(tx, context, run_id, run.version, list(decided))
        run = current(tx.connection, run_id)
        return [x for x in run.evaluations if x.step == step and x.is_open and name in (None, x.name)]


def cancel(
    store: Store, context: Context, run_id: str, step: int | None, name: str | None, by: str
) -> list[EvaluationState]:
    """Give up evaluations that wait or run. A daemon kills those that run. Returns them."""
    with store.write() as tx:
        run = current(tx.connection, run_id)
        decided = decisions.cancel(run, step, name, by)
        append_decided(tx, context, run_id, run.version, list(decided))
        given_up = {(event.name, event.step) for event in decided}
        return [x for x in current(tx.connection, run_id).evaluations if (x.name, x.step) in given_up]

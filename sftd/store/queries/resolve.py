"""Resolve a user's text to runs. The text is a run's id, a unique prefix of an id, an experiment name (`NAME` or
`PROJECT/NAME`), or a sweep."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import msgspec
import sqlalchemy as sa

from sftd.domain.errors import AmbiguousRun, RunNotFound
from sftd.store.database.tables import view_files, view_runs, view_variants

_LISTED = 5
By = Literal["id", "sweep", "name", "prefix", "removed"]


class Match(msgspec.Struct, frozen=True):
    """A run that a text may mean, and the property that matches."""

    run_id: str
    status: str
    by: By


def matches(connection: sa.Connection, text: str) -> list[Match]:
    """Every run that `text` may mean. The first of these that exists: the run with this id; the members of this sweep, in
    order of submission; the runs with this name, newest first, then those whose ids begin with `text`. A removed run matches by
    its id, or by a prefix if no other run matches. Raises `RunNotFound`."""
    c = view_runs.c
    # With LIKE, % and _ in a prefix would be wildcards.
    begins = sa.func.substr(c.run_id, 1, len(text)) == text
    project, _, name = text.partition("/")
    named = (c.name == text) | ((c.name == name) & (c.project == project)) if project else c.name == text
    removed = sa.select(view_files.c.run_id).where(view_files.c.removed_at.is_not(None))
    searches: tuple[tuple[By, sa.ColumnElement[bool]], ...] = (
        ("id", c.run_id == text),
        ("sweep", c.run_id.in_(members(text)) & c.run_id.not_in(removed)),
        ("name", named & c.run_id.not_in(removed)),
        ("prefix", begins & c.run_id.not_in(removed)),
        ("removed", begins),
    )
    found: dict[str, Match] = {}
    # Python represents non-UTF-8 bytes of an argument as lone surrogates, which databases reject.
    is_text = text == text.encode(errors="ignore").decode() != ""
    for by, condition in searches if is_text else ():
        if found and by == "removed":
            break
        order = (c.submitted_at, c.run_id) if by == "sweep" else (c.submitted_at.desc(), c.run_id)
        for run_id, status in connection.execute(
            sa.select(c.run_id, c.status).where(condition).order_by(*order)
        ):
            found.setdefault(run_id, Match(run_id, status, by))
        if found and by in ("id", "sweep"):
            break
    if not found:
        raise RunNotFound(f"There is no run {text!r}. `sftd ls` lists the runs.")
    return list(found.values())


def members(sweep: str) -> sa.Select[tuple[str]]:
    """The query for the ids of a sweep's runs."""
    return sa.select(view_variants.c.run_id).where(
        view_variants.c.sweep == sweep, view_variants.c.sweep != ""
    )


def resolve_id(connection: sa.Connection, text: str, usable: Collection[str] | None = None) -> str:
    """The id of the one run that `text` means. If several match, only those whose status is in `usable` count.

    Raises `RunNotFound` or `AmbiguousRun`.
    """
    found = matches(connection, text)
    if len(found) > 1 and usable is not None:
        found = [match for match in found if match.status in usable] or found
    if len(found) > 1:
        raise AmbiguousRun(ambiguity(text, found))
    return found[0].run_id


def resolve_ids(connection: sa.Connection, text: str) -> list[str]:
    """The ids of all runs of the sweep `text`, or the id of the one run that `text` means. Raises `RunNotFound` or
    `AmbiguousRun`."""
    found = matches(connection, text)
    is_sweep = found[0].by == "sweep"
    return [match.run_id for match in found] if is_sweep else [resolve_id(connection, text)]


def ambiguity(text: str, found: Sequence[Match]) -> str:
    """The error message when `text` means several runs but the command needs one."""
    if found[0].by == "sweep":
        what = f"{text} is a sweep of {len(found)} runs; this command takes one of them"
    else:
        what = f"{text!r} could be any of {len(found)} runs"
    listed = ", ".join(f"{match.run_id} ({match.status})" for match in found[:_LISTED])
    return f"{what}: {listed}{' or others' if len(found) > _LISTED else ''}.\n    fix: give the id of one run"

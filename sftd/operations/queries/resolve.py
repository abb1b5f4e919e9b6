"""Resolve the arguments of a command to runs (see `store.queries.resolve`). Reading commands take the newest run of a name.
Writing commands refuse a name of several runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from shlex import quote

from sftd.domain.errors import AmbiguousRun, Problem, Refused
from sftd.domain.text.words import counted
from sftd.store.database.engine import Store
from sftd.store.queries.resolve import Match, ambiguity, matches, resolve_id


def one(store: Store, text: str) -> tuple[str, str]:
    """The id of the run that a reading command shows, and a remark for the user if older runs have the same name, else "".

    Raises `RunNotFound`, or `AmbiguousRun` for a prefix of several ids and for a sweep of several runs.
    """
    with store.read() as connection:
        found = matches(connection, text)
    return _newest(text, found)


def _newest(text: str, found: list[Match]) -> tuple[str, str]:
    named = [match for match in found if match.by == "name"]
    if len(found) > 1 and not named:
        raise AmbiguousRun(ambiguity(text, found))
    if len(named) > 1:
        older = counted(len(named) - 1, "older run")
        remark = f"{named[0].run_id} is the newest run named {text}; `sftd ls {quote(text)}` lists {older}."
        return named[0].run_id, remark
    return found[0].run_id, ""


def is_sweep(store: Store, text: str) -> bool:
    """Whether `text` means the runs of a sweep. Raises `RunNotFound`."""
    with store.read() as connection:
        return matches(connection, text)[0].by == "sweep"


def several(store: Store, texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """The ids of the runs that a reading command shows, in order, and remarks. A sweep adds those of its runs that are not
    listed yet. Other texts raise as in `one`."""
    run_ids: list[str] = []
    remarks: list[str] = []
    with store.read() as connection:
        for text in texts:
            found = matches(connection, text)
            if found[0].by == "sweep":
                run_ids += [match.run_id for match in found if match.run_id not in run_ids]
                continue
            run_id, remark = _newest(text, found)
            run_ids.append(run_id)
            remarks += [remark] if remark else []
    return run_ids, remarks


def one_to_change(store: Store, text: str, usable: Collection[str] | None = None) -> str:
    """The id of the run that a writing command changes. If several match, only those with a status in `usable` count.

    Raises `RunNotFound` or `AmbiguousRun`.
    """
    with store.read() as connection:
        return resolve_id(connection, text, usable)


def several_to_change(store: Store, text: str, usable: Collection[str] | None = None) -> list[str]:
    """The ids of the runs that a writing command changes. Of a sweep, these are the runs with a status in `usable`.

    Raises `RunNotFound`, `AmbiguousRun`, or `Refused` if a sweep has no such run.
    """
    with store.read() as connection:
        found = matches(connection, text)
        if found[0].by != "sweep":
            return [resolve_id(connection, text, usable)]
    if run_ids := [match.run_id for match in found if usable is None or match.status in usable]:
        return run_ids
    statuses = ", ".join(dict.fromkeys(match.status for match in found))
    what = f"none of its {len(found)} runs is in a state that this command changes ({statuses})"
    raise Refused(Problem(text, what, f"`sftd show {text}` lists them"))

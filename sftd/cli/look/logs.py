"""`sftd logs`."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from sftd.cli import app
from sftd.cli.terminal import output
from sftd.cli.terminal.plot import COLOURS
from sftd.domain.log.events import progress_types
from sftd.domain.text.words import counted

if TYPE_CHECKING:
    from sftd.domain.log.events import Recorded
    from sftd.store.database.engine import Store
    from sftd.wire.attempt.printed import Output

_PAGE = 1000
_POLL_SECONDS = 0.3
# Colours; all control sequences and control characters.
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]?|[\x00-\x08\x0a-\x1f\x7f-\x9f]"
)


@click.command("logs")
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Continue until the run has ended, across restarts.")
@click.option("-a", "--attempt", type=click.IntRange(min=1), help="Only this attempt; all when not given.")
@click.option(
    "-r", "--rank", "ranks", multiple=True, type=click.IntRange(min=0), help="Only this rank; repeatable."
)
@click.option(
    "-n",
    "--tail",
    type=click.IntRange(min=0),
    help="Begin with the last N lines of the progress, and of each rank's stdout and stderr, in the last attempt.",
)
def logs_command(
    run: str, follow: bool, attempt: int | None, ranks: tuple[int, ...], tail: int | None
) -> None:
    """Print a run's progress, a line for each step, validation and checkpoint, and the output of torchrun and its ranks.

    Every line has its attempt and, if a rank wrote it, its rank. Progress is read from the log, and left out with --rank. The
    lines of one rank are in order; those of different ranks are not. The output of ranks is only on their host.

    \b
    Example:
      sftd logs -f brave-otter
      sftd logs -f brave-otter --tail 20
      sftd logs brave-otter --attempt 1 --rank 0
    """
    from sftd.domain.errors import Problem, Refused
    from sftd.domain.run.state import ENDED
    from sftd.operations.queries import runs
    from sftd.wire.attempt.directory import RunDir
    from sftd.wire.attempt.printed import Output

    settings = app.read_settings()
    store = app.open_store(settings)
    found = runs.find_run(store, app.resolve_run(store, run))
    if attempt is not None and attempt > max(1, found.attempt):
        what = f"{found.run_id} has made {counted(found.attempt, 'attempt')}"
        raise Refused(Problem("--attempt", what, "leave it out to read all"))
    directory = RunDir(settings.home, found.run_id)
    number = attempt or (max(1, found.attempt) if tail is not None else 1)
    wanted = frozenset(ranks)
    printed = Output(directory.attempt(number), wanted, tail)
    progress = None if wanted else _Progress(store, found.run_id, tail)
    wrote = False
    if follow:
        output.when_interrupted(f"{found.run_id} continues.")
    while True:
        # Checked before reading: if the attempt is over, this round reads all that it wrote.
        found = runs.find_run(store, found.run_id)
        is_over = found.status in ENDED or number < found.attempt
        if progress is not None:
            wrote = progress.print(number, found.planned_steps) or wrote
        _print(printed, number, to_the_end=is_over or not follow)
        wrote = wrote or printed.has_lines
        if attempt is None and number < found.attempt:
            number += 1
            printed = Output(directory.attempt(number), wanted)
        elif is_over or not follow:
            break
        else:
            time.sleep(_POLL_SECONDS)
    if not wrote:
        who = f"rank {', '.join(map(str, sorted(wanted)))} of {found.run_id}" if wanted else found.run_id
        of_attempt = f" in attempt {attempt}" if attempt else ""
        output.note(f"{who} has written nothing on this host{of_attempt}")


class _Progress:
    """The progress lines of a run, each once."""

    def __init__(self, store: Store, run_id: str, last: int | None) -> None:
        """`last` is the number of lines that the first call of `print` shows; None shows all."""
        self._store = store
        self._run_id = run_id
        self._last = last
        self._version = 0

    def print(self, attempt: int, planned_steps: int) -> bool:
        """Print the new lines of an attempt, and skip those of earlier ones. Returns whether there were any."""
        lines: deque[str] = deque(maxlen=self._last)
        self._last = None
        for recorded in self._new(attempt):
            text = recorded.event.line(planned_steps) if recorded.attempt == attempt else None
            if text is not None:
                lines.append(f"{_prefix(attempt, None)} {output.printable(text)}")
        for line in lines:
            click.echo(line)
        return bool(lines)

    def _new(self, attempt: int) -> Iterator[Recorded]:
        from sftd.operations.queries import runs

        while True:
            events = runs.run_events(self._store, self._run_id, self._version, progress_types(), _PAGE)
            for recorded in events:
                if (recorded.attempt or 0) > attempt:
                    return
                self._version = recorded.version
                yield recorded
            if len(events) < _PAGE:
                return


def _prefix(attempt: int, rank: int | None) -> str:
    prefix = f"[attempt {attempt}]" if rank is None else f"[attempt {attempt} · rank {rank}]"
    if not output.is_terminal():
        return prefix
    return click.style(prefix, fg=None if rank is None else COLOURS[rank % len(COLOURS)], dim=rank is None)


def _print(printed: Output, attempt: int, *, to_the_end: bool) -> None:
    colour = output.is_terminal()
    for rank, line in printed.lines(to_the_end=to_the_end):
        click.echo(f"{_prefix(attempt, rank)} {_harmless(line, colour=colour)}")


def _harmless(line: str, *, colour: bool) -> str:
    """A rank's line without control sequences, except colours, which are reset at its end."""
    shown = _CONTROL.sub(lambda found: found[0] if colour and _COLOUR.fullmatch(found[0]) else "", line)
    return f"{shown}\x1b[0m" if "\x1b" in shown else shown

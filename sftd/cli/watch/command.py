"""`sftd watch`."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

import click

from sftd.cli import app
from sftd.cli.terminal import output
from sftd.cli.terminal.screen import FullScreen

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from sftd.operations.queries.board import Board, Observer, RunBoard, RunObserver

# Pause between two reads: at least these seconds, and this multiple of the read's own time.
_SECONDS, _REST = 0.5, 4.0
# After a read has taken this long, the screen is out of date.
_STALE_SECONDS = 5.0


@click.command("watch")
@click.argument("run", required=False)
@click.option("--once", is_flag=True, help="Print the screen once, in full.")
@click.option("--json", "as_json", is_flag=True, help="Print the contents once, as JSON.")
def watch_command(run: str | None, once: bool, as_json: bool) -> None:
    """Watch the queue, the devices and the runs, or one run, live.

    Shows devices; running runs with progress, loss and speed; waiting runs and what they wait for; failures; the latest events.
    With RUN, that run in detail, with its loss curve. `q` or Ctrl-C ends the screen; training continues. Without a
    terminal, the screen is printed once. While the database does not answer, a red line shows since when.

    \b
    Example:
      sftd watch
      sftd watch brave-otter
      sftd watch --json | jq '.runs[].seconds_left'
    """
    from sftd.domain.queue.order import Limits
    from sftd.operations.queries.board import Observer, RunObserver

    settings = app.read_settings()
    store = app.open_store(settings)
    limits = Limits(settings.user_limit, settings.project_limit)
    silent = settings.silent_micros
    observer: Observer | RunObserver
    if run is None:
        observer = Observer(store, app.context(), limits, silent)
    else:
        observer = RunObserver(store, app.context(), limits, silent, app.resolve_run(store, run))
    out = output.console()
    if as_json:
        click.echo(output.json_line(_json(_complete(observer))))
    elif once or not out.is_terminal or out.is_dumb_terminal:
        for line in _lines(_complete(observer), output.width(), None):
            out.print(line)
    else:
        _watch(observer, out)


def _complete(observer: Observer | RunObserver) -> Board | RunBoard:
    """A complete board: a long curve takes several reads."""
    board = observer.look()
    while not getattr(board, "is_complete", True):
        board = observer.look()
    return board


def _lines(board: Board | RunBoard, width: int, height: int | None) -> list[Text]:
    from sftd.cli.watch.view import board_lines, run_lines
    from sftd.operations.queries.board import Board

    return board_lines(board, width, height) if isinstance(board, Board) else run_lines(board, width, height)


def _json(board: Board | RunBoard) -> dict[str, Any]:
    import msgspec

    from sftd.cli.look import nodes, queue
    from sftd.operations.queries.board import Board

    def event(r: Any) -> dict[str, Any]:
        at = output.iso(r.occurred_at)
        return {
            "at": at,
            "run_id": r.run_id,
            "attempt": r.attempt,
            "type": r.type,
            "what": output.summary(r.event),
        }

    def line(found: Any) -> dict[str, Any]:
        run, values = found.run, msgspec.structs.asdict(found)
        names = ("run_id", "status", "attempt", "step", "planned_steps", "loss", "anomalies")
        last = event(found.last) if found.last else None
        at = output.iso(found.stepped_at)
        del values["run"]
        return {name: getattr(run, name) for name in names} | values | {"last": last, "stepped_at": at}

    common = {"at": output.iso(board.at)}
    if not isinstance(board, Board):
        goodput = board.ledger.as_json() if board.ledger else None
        more = {"goodput": goodput, "sources": msgspec.to_builtins(board.sources)}
        return common | line(board.line) | more | {"events": [event(r) for r in board.notices]}
    return common | {
        "runs": [line(found) for found in board.runs],
        "waiting": [queue.queue_json(row) for row in board.queue if row.kind],
        "nodes": [nodes.node_json(node) for node in board.nodes],
        "failures": [event(r) for r in board.failures],
        "events": [event(r) for r in board.notices],
    }


class _ObserverThread(threading.Thread):
    """Reads the database in a loop, in its own thread: keys must work while the database does not answer."""

    def __init__(self, observer: Observer | RunObserver) -> None:
        super().__init__(name="observer", daemon=True)
        self._observer = observer
        self._end = threading.Event()
        self.board: Board | RunBoard | None = None
        self.seen_at = time.time()
        # Start of the current read (monotonic seconds); None between two reads.
        self.began_at: float | None = None
        self.error = ""

    def run(self) -> None:
        """Read until `stop`."""
        import sqlalchemy as sa

        from sftd.domain.errors import SftdError

        while not self._end.is_set():
            self.began_at = began = time.monotonic()
            try:
                board = self._observer.look()
            except (sa.exc.SQLAlchemyError, SftdError, OSError) as error:
                self.error = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
            except Exception as error:  # noqa: BLE001
                # An event of a later sftd, or a defect here: without this thread the screen would freeze without a reason.
                self.error = f"{type(error).__name__}: {error}".partition("\n")[0]
            else:
                self.board, self.seen_at, self.error = board, time.time(), ""
            self.began_at = None
            rest = max(_SECONDS, _REST * (time.monotonic() - began))
            self._end.wait(rest if self.error or not self._is_reading() else 0.0)

    def _is_reading(self) -> bool:
        """Whether a part of a long curve is still unread."""
        return not getattr(self.board, "is_complete", True)

    def stop(self) -> None:
        """End the thread, without waiting for a read that hangs."""
        self._end.set()
        self.join(timeout=1.0)

    def complaint(self) -> str:
        """Why and since when the screen is out of date; empty when it is not."""
        began = self.began_at
        is_silent = began is not None and time.monotonic() - began > _STALE_SECONDS
        if not self.error and not is_silent:
            return ""
        since = output.clock(int(self.seen_at * 1e6))[11:]
        return f"cannot observe since {since}: {self.error or 'the database does not answer'}"


def _watch(observer: Observer | RunObserver, out: Console) -> None:
    from rich.text import Text

    thread = _ObserverThread(observer)
    thread.start()
    with contextlib.suppress(KeyboardInterrupt), FullScreen(out) as screen:
        while not screen.quits(_SECONDS if thread.board is not None else 0.05):
            # In the background the terminal belongs to another job.
            if not screen.take():
                continue
            board, complaint = thread.board, thread.complaint()
            width, height = out.size
            lines = [Text("reading …", "dim")] if board is None else _lines(board, width, height)
            if complaint:
                # It replaces the last line, so that nothing moves.
                lines = lines[: height - 1]
                lines += [Text()] * (height - 1 - len(lines)) + [_warning(complaint, width)]
            screen.show(lines)
    thread.stop()


def _warning(text: str, width: int) -> Text:
    from rich.text import Text

    line = Text(output.printable(text), "bold white on red", no_wrap=True)
    line.truncate(width, overflow="ellipsis")
    return line

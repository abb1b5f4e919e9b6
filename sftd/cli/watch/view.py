"""The screens of `sftd watch` as lines of text, cut to the size of the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from sftd.cli.terminal import output
from sftd.cli.terminal.plot import Series, plot, sparkline
from sftd.domain.compare.curves import thin, width_for
from sftd.domain.spec.launch.launchers import kind_of
from sftd.domain.text.words import counted

if TYPE_CHECKING:
    from sftd.domain.log.events import Micros, Recorded
    from sftd.operations.queries.board import Board, RunBoard, RunLine
    from sftd.operations.queries.nodes import Node
    from sftd.operations.queries.queue import QueueRow

# More devices are shown only as a number.
_MOST_BOXES = 32
# A printed screen shows all runs, and this many events.
_EVENTS = 10


def board_lines(board: Board, width: int, height: int | None) -> list[Text]:
    """The queue, the devices and the running runs, in at most `height` lines; all of it if None."""
    lines = [
        _title(board, width, watched=height is not None),
        *(_node(node) for node in _shown(board.nodes)),
        Text(),
    ]
    limit = 10_000 if height is None else height
    room = limit - len(lines)
    lines += _running(board, width, room * 2 // 3 if board.queue[len(board.runs) :] else room - 4)
    waiting = [row for row in board.queue if row.kind]
    if waiting:
        lines += _waiting_section(waiting, board.at, max(3, limit - len(lines) - 3))
    latest = _EVENTS if height is None else max(0, height - len(lines))
    failures = [_event(r, board.at, named=True) for r in board.failures]
    if failures and latest >= 2:
        few = failures[: max(1, min(3, latest // 2 - 2))]
        lines += [Text("failures", "bold red"), *few]
        latest = _EVENTS if height is None else height - len(lines)
    if board.notices and latest >= 3:
        # A blank line and a title come first.
        events = [_event(r, board.at, named=True) for r in board.notices[: latest - 2]]
        lines += [*([Text()] if lines[-1].plain else []), Text("latest", "bold"), *events]
    return _cut(lines, width, height)


def run_lines(board: RunBoard, width: int, height: int | None) -> list[Text]:
    """One run in detail, in at most `height` lines."""
    run, line = board.line.run, board.line
    title = Text.assemble((run.run_id, "bold"), "  ", output.status_text(run.status))
    if run.attempt:
        title.append(f"  attempt {run.attempt}", "dim")
    name = "/".join(p for p in (run.spec.trainer.project_name, run.spec.trainer.experiment_name) if p)
    title.append(f"  {name}", "dim")
    _right(title, _clock(board.at, watched=height is not None), width)
    lines = [title, _progress(line, width, name=False)]
    lines += [_facts(line, width, 0), *_where(board), *_sources(board)]
    if run.status in ("failed", "retrying") and run.message:
        lines.append(Text(f"{run.cause}: {output.printable(run.message)}", "bold red"))
    if board.row is not None and board.row.kind:
        lines.append(Text(f"waits for: {output.printable(board.row.waits_for)}", "yellow"))
    lines.append(Text())
    total = height if height is not None else 40
    events = [_event(r, board.at, named=False) for r in board.notices]
    kept = max(3, min(len(events), (total - len(lines)) // 3))
    plot_height = min(18, total - len(lines) - kept - 5)
    if len(board.history.curves) and plot_height >= 4:
        steps = width_for([board.history.curves], 2 * max(10, width - 10))
        buckets = list(thin(board.history.curves, "loss", steps))
        until = "" if board.is_complete else f" (reading: step {board.history.curves.last})"
        lines.append(Text(f"loss{until}", "bold"))
        lines += plot([Series("", buckets)], width, plot_height)
        lines.append(Text())
    lines += [Text("events", "bold"), *events[: max(0, total - len(lines) - 1)]]
    return _cut(lines, width, height)


def _cut(lines: Sequence[Text], width: int, height: int | None) -> list[Text]:
    shown = list(lines if height is None else lines[:height])
    for line in shown:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return shown


def _right(line: Text, text: str, width: int) -> None:
    """Append a text at the right end of a line, if there is room."""
    if line.cell_len + len(text) + 2 <= width:
        line.append(" " * (width - line.cell_len - len(text)))
        line.append(text, "dim")


def _clock(at: Micros, *, watched: bool) -> str:
    return output.clock(at)[11:] + ("  q quits" if watched else "")


def _title(board: Board, width: int, *, watched: bool) -> Text:
    kinds = [row.kind for row in board.queue]
    counts = {
        "running": kinds.count(""),
        "waiting": sum(1 for kind in kinds if kind and kind != "held"),
        "held": kinds.count("held"),
    }
    summary = " · ".join(f"{n} {what}" for what, n in counts.items() if n or what != "held")
    line = Text.assemble(("sftd", "bold"), f"  {summary}")
    _right(line, _clock(board.at, watched=watched), width)
    return line


def _shown(nodes: Sequence[Node]) -> Sequence[Node]:
    """All daemons except stopped ones; the latest where all are stopped."""
    return [node for node in nodes if node.state != "stopped"] or nodes[:1]


def _node(node: Node) -> Text:
    line = Text.assemble((node.host, "bold"))
    for kind, devices in node.devices.items():
        gpus = node.devices.get("gpus")
        # Where there are GPUs, runs take no CPUs.
        if devices.total and (kind != "cpus" or gpus is None or not gpus.total):
            line.append("  ")
            if devices.total <= _MOST_BOXES:
                line.append("■" * devices.used, "blue")
                line.append("□" * devices.free, "dim")
                line.append(" ")
            name = {"gpus": "GPUs", "cpus": "CPUs"}.get(kind) or f"{kind_of(kind).shown} jobs"
            line.append(f"{devices.used} of {devices.total} {name} used")
    if node.state == "alive":
        line.append("  alive", "green")
    else:
        line.append(f"  {node.state} since {output.clock(node.seen_at)}", "bold yellow")
    return line


def _running(board: Board, width: int, room: int) -> list[Text]:
    if not board.runs:
        return [Text("nothing runs", "dim"), Text()]
    # Fewer lines per run when there are many.
    each = next((n for n in (4, 3, 2) if n * len(board.runs) <= room), 1)
    lines: list[Text] = []
    for number, line in enumerate(board.runs):
        if len(lines) + each > max(room, each) and number:
            lines.append(Text(f"… {len(board.runs) - number} more running", "dim"))
            break
        lines.append(_progress(line, width, name=True))
        if each >= 2:
            lines.append(_facts(line, width, 2))
        if each >= 3:
            last = Text("  ")
            if line.last is not None:
                last.append_text(_event(line.last, board.at, named=False))
            lines.append(last)
        if each >= 4:
            lines.append(Text())
    return lines if each == 4 else [*lines, Text()]


def _progress(line: RunLine, width: int, *, name: bool) -> Text:
    run = line.run
    text = Text()
    if name:
        text.append(f"{run.run_id:<18} ", "bold")
        text.append(f"{run.status:<8} ", output.STATUS_STYLE.get(run.status, ""))
        if run.attempt > 1:
            text.append(f"#{run.attempt} ", "yellow")
    share = min(1.0, run.step / run.planned_steps) if run.planned_steps else 0.0
    left = f"  {output.duration(line.seconds_left)} left" if line.seconds_left is not None else ""
    numbers = f" {share:4.0%}  {run.step}/{run.planned_steps}{left}"
    unobserved = "" if line.observed else "  its daemon is not observed"
    size = max(5, min(60, width - text.cell_len - len(numbers) - len(unobserved)))
    full = round(share * size)
    text.append("━" * full, "blue" if run.ended_at is None else output.STATUS_STYLE.get(run.status, ""))
    text.append("━" * (size - full), "bright_black")
    return text.append(numbers).append(unobserved, "bold yellow")


def _facts(line: RunLine, width: int, indent: int) -> Text:
    run = line.run
    parts = []
    if run.loss is not None:
        parts.append(f"loss {output.loss(run.loss)}")
    if run.last_validation is not None:
        parts.append(f"val {output.loss(run.last_validation.loss)}")
    if line.token_accuracy is not None:
        parts.append(f"accuracy {line.token_accuracy:.1%}")
    if line.tokens_per_second is not None:
        parts.append(f"{line.tokens_per_second:,.0f} tokens/s")
    if line.mfu is not None:
        parts.append(f"MFU {line.mfu:.1%}")
    if line.memory is not None:
        parts.append(output.memory(line.memory))
    odd = f"{run.anomalies} anomal{'y' if run.anomalies == 1 else 'ies'}" if run.anomalies else ""
    text = Text(" " * indent + "  ".join(parts or ["no step yet"]), "" if parts else "dim")
    if odd:
        text.append(f"  {odd}", "bold red")
    room = min(60, width - text.cell_len - 2)
    if line.losses and room >= 8:
        text.append("  " + sparkline(line.losses, room), "cyan")
    return text


def _where(board: RunBoard) -> Iterator[Text]:
    """Time, devices and checkpoints of a run."""
    run, line = board.line.run, board.line
    parts = []
    if line.stepped_at is not None and run.ended_at is None:
        parts.append(f"last step {output.duration(max(0, board.at - line.stepped_at) / 1e6)} ago")
    if board.ledger is not None:
        parts.append(f"{output.duration(board.ledger.wall_seconds)} in all")
        if board.ledger.goodput:
            parts.append(f"goodput {board.ledger.goodput:.1%}")
    if line.host:
        parts.append(f"on {line.host}")
    kept = [c.step for c in run.checkpoints if not c.superseded]
    if kept:
        parts.append(f"checkpoint of step {max(kept)}")
    if run.steps_redone:
        parts.append(f"{counted(run.steps_redone, 'step')} again")
    yield Text(" · ".join(parts), "dim")


def _sources(board: RunBoard) -> Iterator[Text]:
    """The loss of each source in the last step, if there are several."""
    if board.sources:
        losses = (f"{output.printable(name)} {output.loss(of.loss)}" for name, of in board.sources.items())
        yield Text(f"loss by source  {'  '.join(losses)}")


def _waiting(row: QueueRow, now: Micros) -> Text:
    text = Text.assemble(
        (f"{row.run_id:<18} ", "bold"), (f"{row.status:<8} ", output.STATUS_STYLE.get(row.status, ""))
    )
    text.append(f"{counted(row.devices, 'device')}  ")
    what = row.waits_for
    if row.not_before is not None:
        what = f"its next try in {output.duration(max(0, row.not_before - now) / 1e6)}"
    elif row.starts_at is not None and row.starts_at > now:
        what += f"  ~{output.duration((row.starts_at - now) / 1e6)}"
    return text.append(output.printable(what), "dim")


def _waiting_section(rows: Sequence[QueueRow], now: Micros, room: int) -> list[Text]:
    shown = rows if len(rows) + 2 <= room else rows[: max(1, room - 3)]
    # Format only the rows shown: thousands may wait, and formatting costs the most.
    lines = [_waiting(row, now) for row in shown]
    more = [Text(f"… {len(rows) - len(shown)} more", "dim")] if len(shown) < len(rows) else []
    return [Text("waiting", "bold"), *lines, *more, Text()]


def _event(recorded: Recorded, now: Micros, *, named: bool) -> Text:
    text = Text.assemble((f"{_ago(now - recorded.occurred_at):>10}  ", "dim"))
    if named:
        text.append(f"{recorded.run_id} ", "bold")
    if recorded.attempt:
        text.append(f"#{recorded.attempt} ", "dim")
    bad = recorded.event.severity == "problem"
    text.append(recorded.type, "red" if bad else "")
    return text.append("  " + output.summary(recorded.event), "" if bad else "dim")


def _ago(micros: int) -> str:
    return f"{output.duration(max(0, micros) / 1e6)} ago"

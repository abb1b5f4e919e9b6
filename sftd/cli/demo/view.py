"""The demo's output: steps as they happen, answers, losses, redone steps."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from sftd.cli.terminal import output
from sftd.domain.log import events as e
from sftd.domain.text.words import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sftd.domain.log.events import Recorded


# What a run does after an event.
_NOW: dict[type[e.Event], str] = {
    e.AttemptLaunched: "starting",
    e.ModelLoaded: "validating",
    e.CheckpointStarted: "saving",
    e.CheckpointPublished: "training",
    e.AttemptFailed: "restarting",
    e.AttemptLost: "restarting",
}


class LiveSteps:
    """A progress bar on a terminal, a line for each step elsewhere."""

    def __init__(self, out: Console, steps: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._out = out
        self._steps = steps
        self._seconds: float | None = None
        self._progress = Progress(
            TextColumn("   {task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            console=out,
            disable=not out.is_terminal,
        )
        self._task = self._progress.add_task("waiting for the daemon", total=steps, numbers="")

    def __enter__(self) -> LiveSteps:
        self._progress.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        style = "bold red" if text.startswith(("kill", "ANOMALY")) else None
        self._progress.console.print(f"   {text}", style=style, markup=False)

    def show(self, recorded: Recorded) -> None:
        """Show one event."""
        event = recorded.event
        match event:
            case e.StepCompleted():
                self._show_step(event)
                return
            case e.SampleGenerated() | e.DataBound():
                # The answers are shown at the end, the data before the start.
                return
            case e.AttemptLaunched():
                self.say(f"attempt {recorded.attempt}: {event.summary()}; loading Megatron-core")
            case e.AttemptFailed():
                self.say(f"attempt {recorded.attempt} failed: {event.summary()}")
            case e.AttemptLost():
                self.say(f"attempt {recorded.attempt} lost: {event.summary()}")
            case e.TrainingResumed():
                self._progress.update(self._task, completed=event.step)
        if line := event.line(self._steps):
            self.say(line)
        if now := _NOW.get(type(event)):
            self._progress.update(self._task, description=now, numbers="")

    def _show_step(self, step: e.StepCompleted) -> None:
        self._seconds = step.seconds if self._seconds is None else 0.7 * self._seconds + 0.3 * step.seconds
        left = output.duration((self._steps - step.step) * self._seconds)
        speed = step.tokens_real / step.seconds
        numbers = f"loss {step.loss:.4f}  {speed:.0f} tokens/s  {left} left"
        self._progress.update(self._task, description="training", completed=step.step, numbers=numbers)
        if not self._out.is_terminal:
            self._out.print(f"   step {step.step:>3}/{self._steps}  {numbers}")


def validation_line(history: list[Recorded]) -> str:
    """Validation loss before and after."""
    losses = {r.event.step: r.event.loss for r in history if isinstance(r.event, e.ValidationCompleted)}
    first, last = losses[min(losses)], losses[max(losses)]
    change = (
        f"[bold green]{(last - first) / first:+.1%}[/]" if last < first else f"{(last - first) / first:+.1%}"
    )
    return f"validation loss: [bold]{first:.4f}[/] before, [bold]{last:.4f}[/] after {counted(max(losses), 'step')} ({change})"


def answers(history: list[Recorded], question: str, reference: str) -> Table:
    """The model's greedy answers before and after training, and the docstring."""
    from rich.table import Table
    from rich.text import Text

    samples = [
        r.event for r in history if isinstance(r.event, e.SampleGenerated) and r.event.prompt == question
    ]
    before = min(samples, key=lambda s: s.step)
    after = max(samples, key=lambda s: s.step)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("   question", Text(question))
    table.add_row("   before", Text(before.text + ("" if before.stopped else " …")))
    table.add_row("   after", Text(after.text + ("" if after.stopped else " …"), "bold green"))
    table.add_row("   docstring", Text(reference, "dim"))
    return table


def redone_lines(history: list[Recorded]) -> tuple[list[str], bool]:
    """The redone steps beside the log's. Returns lines to print, and whether all match bit for bit."""
    from sftd.domain.repro.steps import COMPARED, compare, redone_steps

    lines = [f"   {'step':>4}  {'loss in the log':<20}  {'loss redone':<20}"]
    all_match = True
    for was, now in redone_steps(r.event for r in history):
        matches = compare(was, now).is_exact
        all_match = all_match and matches
        verdict = "[green]equal[/]" if matches else "[bold red]DIFFERS[/]"
        lines.append(f"   {now.step:>4}  {was.loss!r:<20}  {now.loss!r:<20}  {verdict}")
    count = len(lines) - 1
    if count == 0:
        return ["   [bold red]no step was redone[/]"], False
    names = ", ".join(name.removesuffix("_digest").replace("_", " ") for name in COMPARED)
    verdict = (
        f"[bold green]{count} of {count} match the log bit for bit[/]"
        if all_match
        else "[bold red]they differ[/]"
    )
    return [*lines, f"   redone steps: {verdict} ({names})"], all_match

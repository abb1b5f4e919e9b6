"""Progress of a long command on stderr: one live line on a terminal, a line for each stage elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sftd.cli.terminal import output


@contextmanager
def spinner(title: str) -> Iterator[Callable[[str, str], None]]:
    """Yields `show(text, stage)`: a terminal shows `text`; elsewhere `stage` is printed when it changes, unless it is empty."""
    shown = output.console(stderr=True)
    last = ""
    with shown.status(output.escape(title)) as status:

        def show(text: str, stage: str) -> None:
            nonlocal last
            if shown.is_terminal:
                status.update(output.escape(text))
            elif stage and stage != last:
                last = stage
                output.note(stage)

        yield show


@contextmanager
def counter() -> Iterator[Callable[[str, int, int], None]]:
    """Yields `show(what, done, total)` for a long read of a database."""
    with spinner("opening") as show:
        yield lambda what, done, total: show(f"{what}: {done:,} of {total:,}", f"{what}: {total:,}")


def run_with_stages(
    title: str, tool: str, arguments: list[str], request: bytes | None = None
) -> dict[str, Any]:
    """Run a tool of the trainer and show its stages. Returns its last line."""
    from sftd.launcher.tools import run_tool

    with spinner(f"{title}: starting") as show:

        def on_line(line: dict[str, Any]) -> None:
            if line.get("event") == "progress":
                text = f"{title}: {line.get('stage', '')}"
                show(text, text)

        return run_tool(tool, arguments, on_line, request)


def run_with_bar(title: str, unit: str, arguments: list[str]) -> dict[str, Any]:
    """Run the tool `prepare` with a bar that counts `unit`, shown only on a terminal. Returns its last line."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from sftd.launcher.tools import run_tool

    description, count = TextColumn("{task.description}"), TextColumn("{task.fields[count]}")
    console = output.console(stderr=True)
    with Progress(
        description,
        BarColumn(),
        count,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(title, total=None, count="")

        def on_line(line: dict[str, Any]) -> None:
            if line.get("event") == "progress":
                done, stage = line.get(unit), line.get("stage")
                bar.update(
                    task,
                    description=f"{title}: {stage}" if stage else title,
                    total=line.get("total"),
                    completed=done or 0,
                    count="" if done is None else f"{done:,}",
                )

        return run_tool("prepare", arguments, on_line)

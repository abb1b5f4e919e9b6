"""`sftd prepare`."""

from __future__ import annotations

import os
from typing import Any

import click

from sftd.cli import output


@click.command("prepare")
@click.argument("sources", nargs=-1, required=True, type=click.Path())
@click.option(
    "-m",
    "--model",
    required=True,
    type=click.Path(),
    help="Model folder whose tokenizer and template are used.",
)
@click.option("-o", "--out", required=True, type=click.Path(), help="Parquet file to write.")
@click.option(
    "--max-length", type=click.IntRange(min=1), help="Longest row in tokens; unlimited when not given."
)
@click.option(
    "--truncation",
    type=click.Choice(["right", "left", "error", "drop"]),
    default="right",
    show_default=True,
    help="What happens to a longer row.",
)
@click.option(
    "--messages-key", default="messages", show_default=True, help="Field or column that holds the chat."
)
@click.option(
    "--val-fraction",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share split off for validation.",
)
@click.option("--val-out", type=click.Path(), help="Parquet file for the validation rows.")
@click.option("--trust-remote-code", is_flag=True, help="Allow the tokenizer's own code to run.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def prepare_command(
    sources: tuple[str, ...],
    model: str,
    out: str,
    max_length: int | None,
    truncation: str,
    messages_key: str,
    val_fraction: float | None,
    val_out: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Turn chats (JSONL or Parquet) into tokenised Parquet: `input_ids`, `attention_mask`, `labels`.

    The model's chat template is applied. Trained are the assistant's answers and their stop token; everything else
    is masked with -100.

    \b
    Example:
      sftd prepare chats.jsonl -m ./SmolLM2 -o train.parquet --val-fraction 0.05 --val-out val.parquet
    """
    from sftd.launcher.tools import run_tool

    if (val_fraction is None) != (val_out is None):
        raise click.UsageError("--val-fraction and --val-out belong together.")
    arguments = [
        *sources,
        "--model",
        model,
        "--out",
        out,
        "--truncation",
        truncation,
        "--messages-key",
        messages_key,
    ]
    if max_length is not None:
        arguments += ["--max-length", str(max_length)]
    if val_fraction is not None and val_out is not None:
        arguments += ["--val-fraction", str(val_fraction), "--val-out", val_out]
    if trust_remote_code:
        arguments.append("--trust-remote-code")
    done = with_progress("tokenising", "rows", ["tokenize", *arguments], run_tool)
    if as_json:
        click.echo(output.json_line(done))
        return
    for warning in done.get("warnings", []):
        output.warn(str(warning))
    click.echo(summary(done))
    click.echo(f"wrote {os.path.abspath(out)}")


def summary(done: dict[str, Any]) -> str:
    """What `tokenize` did, in one line."""
    share = done["trained_tokens"] / max(1, done["tokens"])
    text = f"{done['rows']:,} rows, {done['tokens']:,} tokens, of which {share:.0%} are trained"
    if done.get("truncated"):
        text += f"; {done['truncated']} truncated"
    if done.get("dropped"):
        text += f"; {done['dropped']} dropped"
    return text


def with_progress(what: str, unit: str, arguments: list[str], run_tool: Any) -> dict[str, Any]:
    """Run a `prepare` tool with a progress bar on stderr."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
    )
    console = output.console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None, count="")

        def show(line: dict[str, Any]) -> None:
            if line.get("event") == "progress":
                done, total = line.get(unit), line.get("total")
                stage = line.get("stage")
                progress.update(
                    task,
                    description=f"{what}: {stage}" if stage else what,
                    total=total,
                    completed=done or 0,
                    count="" if done is None else f"{done:,}",
                )

        done: dict[str, Any] = run_tool("prepare", arguments, show)
        return done

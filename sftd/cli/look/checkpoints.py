"""`sftd checkpoints`, `sftd gc`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sftd.cli import app
from sftd.cli.terminal import output
from sftd.domain.text.words import counted

if TYPE_CHECKING:
    from sftd.operations.commands.gc import Leftover

_STYLE = {"missing": "red", "rejected": "red", "superseded": "yellow", "pinned": "cyan", "deleted": "dim"}


@click.command("checkpoints")
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def checkpoints_command(run: str, as_json: bool) -> None:
    """List RUN's checkpoints, deleted ones too: size, layout, status, and why each is kept.

    \b
    published   complete, in the run's timeline  missing    its folder is not on this host
    pinned      a fork starts from it             rejected   found damaged when loading
    superseded  a later attempt began before it   deleted    no rule kept it (checkpoint.keep_*)
    weights     only weights are kept (checkpoint.after_success): for export and answers

    \b
    Example:
      sftd checkpoints brave-otter
      sftd checkpoints brave-otter --json | jq -r '.[] | select(.status == "published") | .path'
    """
    import msgspec

    from sftd.operations.driving import checkpoints
    from sftd.operations.queries import runs as run_queries

    store = app.open_store(app.read_settings())
    found = run_queries.find_run(store, app.resolve_run(store, run))
    rows = checkpoints.overview(store, found)
    if as_json:
        click.echo(
            output.json_line(
                [msgspec.structs.asdict(row) | {"published_at": output.iso(row.published_at)} for row in rows]
            )
        )
        return
    if not rows:
        click.echo(f"{found.run_id} has published no checkpoint yet.")
        return
    from rich.text import Text

    names = ("step", "size", "val", "layout", "status", "kept because")
    table = output.table(*names, right=names[:3], fold=names[-1:])
    for row in rows:
        table.add_row(
            str(row.step),
            output.size(row.bytes),
            output.loss(row.val_loss),
            output.layout(row.layout),
            Text(row.status, _STYLE.get(row.status, "green")),
            ", ".join(row.kept_because),
        )
    out = output.console()
    out.print(table)
    for folder in sorted({row.path.rpartition("/")[0] for row in rows if row.status != "deleted"}):
        out.print(f"in {output.escape(folder)}", style="dim", soft_wrap=True)


@click.command("gc")
@click.argument("prefixes", metavar="[RUN]...", nargs=-1)
@click.option("--run", "runs", metavar="RUN", multiple=True, help="Same as an argument RUN; repeatable.")
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Delete every checkpoint of each RUN, kept ones too; RUN must have ended. Checkpoints that a fork starts from stay.",
)
@click.option("--dry-run", is_flag=True, help="List what would be deleted; delete nothing.")
@click.option("-y", "--yes", is_flag=True, help="With --all: delete without asking.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def gc_command(
    prefixes: tuple[str, ...],
    runs: tuple[str, ...],
    everything: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete checkpoints that no retention rule protects, of all runs or of each RUN; where `checkpoint.after_success` keeps
    only weights, delete the training state.

    A daemon does this for the runs that it drives. This command is for the rest: runs whose daemon ended before them, deletions
    that a crash interrupted, checkpoints that were being read. It skips runs that a daemon drives, checkpoints that are being
    read, and other hosts' files. `sftd rm` removes a run with all its files.

    \b
    Example:
      sftd gc --dry-run
      sftd gc brave-otter
      sftd gc --run brave-otter --all
    """
    from sftd.operations.commands import gc
    from sftd.operations.queries import resolve

    texts = (*prefixes, *runs)
    if everything and not texts:
        raise click.UsageError("--all needs at least one RUN.")
    settings = app.read_settings()
    store, context = app.open_store(settings), app.context()
    run_ids = [run_id for text in texts for run_id in resolve.several_to_change(store, text)]

    def collect(*, dry_run: bool) -> list[Leftover]:
        return gc.leftovers(
            store, context, run_ids, dry_run=dry_run, home=settings.home, everything=everything
        )

    if everything and not (dry_run or yes):
        planned = [left for left in collect(dry_run=True) if left.is_gone]
        for left in planned:
            click.echo(f"{left.run_id}  step {left.step}  {output.size(left.bytes):>8}", err=True)
        total = output.size(sum(left.bytes for left in planned))
        app.confirm(f"Delete {counted(len(planned), 'checkpoint')}, {total}?")
    found = collect(dry_run=dry_run)
    if as_json:
        click.echo(output.json_line(found))
        return
    for left in found:
        click.echo(f"{left.run_id}  step {left.step}  {output.size(left.bytes):>8}  {left.what}")
    gone = [left for left in found if left.is_gone]
    reduced = sum(left.what == "weights kept" for left in gone)
    would = "would be " if dry_run else ""
    parts = [
        f"{counted(count, 'checkpoint')} {would}{verb}"
        for count, verb in ((len(gone) - reduced, "deleted"), (reduced, "reduced to weights"))
        if count
    ]
    total = output.size(sum(left.bytes for left in gone))
    click.echo(f"{', '.join(parts)}: {total}" if gone else "Nothing to delete.")

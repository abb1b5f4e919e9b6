"""A run in detail: its facts, its checkpoints, its history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from sftd.cli.terminal import output
from sftd.domain.text.words import counted

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from sftd.domain.log.events import Recorded, StepCompleted, ValidationCompleted
    from sftd.domain.run.goodput import Ledger
    from sftd.domain.run.state import Run
    from sftd.domain.spec.model_section import Model

# More anomalies of one kind in one attempt are counted, not listed.
_ANOMALIES = 3


def state_json(run: Run) -> dict[str, Any]:
    """A run's whole state as JSON values."""
    import msgspec

    state: dict[str, Any] = msgspec.to_builtins(run)
    del state["job_report"]
    return state | {"job": _job(run)}


def _job(run: Run) -> str:
    from sftd.domain.spec.launch.launchers import kind_of

    return kind_of(run.spec.launch.launcher).describe(run.job_report) if run.job_report else ""


def print_state(
    run: Run, history: list[Recorded], more: Iterable[tuple[str, str]] = (), speed: float | None = None
) -> None:
    """Print the facts of a run at the end of `history`, then `more` facts, and its checkpoints. `speed` is in tokens/s."""
    from rich.text import Text

    from sftd.operations.driving.checkpoints import is_missing

    out = output.console()
    facts = [
        (name, value)
        for name, value in (*_facts(run, history, speed or run.tokens_per_second), *more)
        if value
    ]
    output.print_facts(out, [(name, _harmless(v) if isinstance(v, str) else v) for name, v in facts])
    if run.checkpoints:
        out.print()
        out.print(_checkpoints_table(run))
        for checkpoint in run.checkpoints:
            mark = Text("missing: ", "red") if is_missing(checkpoint) else Text()
            out.print(mark + Text(output.printable(checkpoint.path), "dim"), soft_wrap=True)


def _harmless(lines: str) -> Text:
    from rich.text import Text

    return Text("\n".join(map(output.printable, lines.split("\n"))))


def _facts(run: Run, history: list[Recorded], speed: float | None) -> list[tuple[str, Any]]:
    from rich.text import Text

    from sftd.domain.log.events import RunSubmitted

    spec = run.spec
    status = output.status_text(run.status)
    if run.cause:
        status.append(f"  {run.cause}: {output.printable(run.message or '')}", "default")
    elif notes := [text for text in (run.stop_reason, _job(run) if run.daemon else "") if text]:
        status.append(f"  {output.printable('; '.join(notes))}", "default")
    submitted = next((r.event for r in history if isinstance(r.event, RunSubmitted)), None)
    left = (run.planned_steps - run.step) * (run.seconds_per_step or 0) if run.status == "running" else None
    validation = [
        f"{label} {output.loss(v.loss)} (step {v.step})"
        for label, v in (
            ("first", run.first_validation),
            ("best", run.best_validation),
            ("last", run.last_validation),
        )
        if v is not None
    ]
    return [
        ("run", Text(run.run_id, "bold")),
        ("status", status),
        ("project", spec.trainer.project_name),
        ("name", spec.trainer.experiment_name),
        ("forked", f"from step {run.fork.step} of {run.fork.parent}" if run.fork else ""),
        ("submitted", f"{output.clock(run.submitted_at)} by {run.user}"),
        ("model", spec.model.partial_pretrain),
        ("trained", what_is_trained(spec.model)),
        ("data", ", ".join(spec.data.train_files)),
        ("layout", output.layout(spec.parallel_sizes)),
        (
            "batch",
            f"{spec.data.train_batch_size} in micro-batches of "
            + (
                f"at most {counted(spec.micro_batch_tokens, 'token')}"
                if spec.training.use_rmpad
                else f"{spec.training.micro_batch_size_per_gpu}"
            ),
        ),
        (
            "steps",
            f"{run.step} of {run.planned_steps}"
            + (f", {output.duration(left)} left" if left else "")
            + (f", {speed:,.0f} tokens/s" if speed else ""),
        ),
        ("loss", output.loss(run.loss)),
        ("validation", ", ".join(validation)),
        ("tokens", f"{run.tokens_counted:,} trained" if run.tokens_counted else ""),
        ("redone steps", _redone(run, history) if run.steps_redone else ""),
        ("last verified", _last_replay(run)),
        ("anomalies", Text(str(run.anomalies), "bold red") if run.anomalies else ""),
        ("after", ", ".join(run.after)),
        ("sweep", run.sweep),
        ("preempted", f"{run.preemptions} times" if run.preemptions > 1 else "once" * run.preemptions),
        ("spec", run.spec_digest[:16]),
        ("disk", _disk(run)),
        ("warnings", "\n".join(submitted.warnings) if submitted else ""),
    ]


def what_is_trained(model: Model) -> str:
    """What of the model is trained, if not all of it."""
    lora = model.lora
    if model.frozen:
        return f"all weights but {', '.join([*model.freeze, *['the routers'] * model.freeze_router])}"
    if not lora.rank:
        return ""
    stored = f", beside weights in {model.quantize}" if model.quantize != "none" else ""
    start = f", from {lora.adapter}" if lora.adapter else ""
    return f"adapters of rank {lora.rank} for {', '.join(lora.projections)}{start}{stored}"


def _disk(run: Run) -> str:
    from sftd.operations.driving.checkpoints import is_missing

    if run.removed_at is not None:
        return f"removed {output.clock(run.removed_at)}"
    own = sum(not c.is_parents for c in run.checkpoints)
    gone = sum(is_missing(c) for c in run.checkpoints if not c.is_parents)
    missing = f", {gone} of them missing here" if gone else ""
    return f"{output.size(run.checkpoint_bytes)} in {counted(own, 'checkpoint')}{missing}" if own else ""


def _redone(run: Run, history: list[Recorded]) -> str:
    from sftd.domain.log.events import AnomalyDetected, SamplesSkipped
    from sftd.domain.repro.steps import REDONE_DIFFERS

    odd = sum(isinstance(r.event, AnomalyDetected) and r.event.what == REDONE_DIFFERS for r in history)
    if odd:
        return f"{run.steps_redone} ({odd} differ from the log)"
    # Steps with other samples, after a rollback, are not compared.
    which = "with the same samples " if any(isinstance(r.event, SamplesSkipped) for r in history) else ""
    how = "bit for bit" if run.is_exact else "to within rounding"
    return f"{run.steps_redone} (all {which}match the log {how})"


def _last_replay(run: Run) -> Text | str:
    from rich.text import Text

    if (replay := run.last_replay) is None:
        return ""
    steps = f"steps {replay.from_step + 1} to {replay.to_step}, {output.clock(replay.at)}: "
    if replay.diverged_at is not None:
        return Text(f"{steps}diverged at step {replay.diverged_at}", "bold red")
    return f"{steps}matched the log"


def time_facts(ledger: Ledger) -> Iterator[tuple[str, str]]:
    """A run's time by account, and its goodput."""
    from sftd.domain.run.goodput import ACCOUNTS

    def took(seconds: float) -> str:
        return f"{seconds:.1f}s" if seconds < 10 else output.duration(seconds)

    parts = [(account, took(ledger.seconds(account))) for account in ACCOUNTS]
    yield "time", ", ".join(f"{account} {text}" for account, text in parts if text != "0.0s")
    if ledger.seconds("productive"):
        share, held = ledger.goodput or 0.0, ledger.held_seconds
        yield "goodput", f"{share:.1%} of {took(held)} (all time except queued and idle)"


def figure_facts(
    step: StepCompleted | None, validation: ValidationCompleted | None
) -> Iterator[tuple[str, str]]:
    """What the last step and the last validation measured besides the loss, and the sources of each."""
    from sftd.domain.log.events import perplexity

    for name, event in (("last step", step), ("last validation", validation)):
        if event is not None and event.token_accuracy is not None:
            text = f"accuracy {event.token_accuracy:.1%}, perplexity {perplexity(event.loss):.4g}"
            yield name, f"{text}, entropy {event.entropy or 0.0:.3f} nats"
        if event is not None and event.sources:
            yield (
                "by source",
                "\n".join(
                    f"{output.printable(source)}: loss {output.loss(figures.loss)}, "
                    f"{counted(figures.rows, 'row')}, {counted(figures.tokens, 'token')}"
                    for source, figures in event.sources.items()
                ),
            )


def _checkpoints_table(run: Run) -> Table:
    from rich.text import Text

    from sftd.domain.run.retention import why_kept

    reasons, numbers = why_kept(run), ("checkpoint", "size", "val")
    table = output.table(*numbers, "kept because", right=numbers, fold=["kept because"])
    for c in run.checkpoints:
        table.add_row(
            f"step {c.step}",
            output.size(c.bytes),
            output.loss(c.val_loss),
            Text(", ".join([*(["weights only"] * c.weights_only), *reasons[c.step]])),
        )
    return table


def history_table(history: list[Recorded]) -> Table:
    """The events of `history` that are not steps, one a row."""
    from rich.text import Text

    from sftd.domain.log.events import AnomalyDetected

    count: Counter[tuple[int | None, str]] = Counter()
    table = output.table("time", "try", "event", "", right=["try"], dim=["time"], fold=[""])
    for r in history:
        if isinstance(r.event, AnomalyDetected):
            count[r.attempt, r.event.what] += 1
            if count[r.attempt, r.event.what] > _ANOMALIES:
                continue
        table.add_row(
            output.clock(r.occurred_at), str(r.attempt or ""), r.type, Text(output.summary(r.event))
        )
    for (attempt, what), number in count.items():
        if number > _ANOMALIES:
            more = f"{number - _ANOMALIES} more of attempt {attempt}: {what} (sftd events RUN -t AnomalyDetected)"
            table.add_row("", str(attempt or ""), "…", Text(more))
    return table

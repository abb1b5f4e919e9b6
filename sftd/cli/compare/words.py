"""The texts of `sftd compare`, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sftd.cli.terminal import output
from sftd.cli.terminal.plot import LETTERS
from sftd.domain.text.words import counted

if TYPE_CHECKING:
    from sftd.domain.compare.differences import Difference, Parting
    from sftd.operations.queries.compare import Figures


def letter(number: int) -> str:
    """The letter of the run with this number, from 0."""
    return LETTERS[number % 26] + ("" if number < 26 else str(number // 26))


def figure_texts(figures: Figures) -> list[tuple[str, str]]:
    """The figures of a run as texts; the names are the same for every run."""
    f = figures

    def at(value: float | str | None, step: int | None) -> str:
        return f"{output.loss(value)} at step {step}" if value is not None else ""

    def some(value: Any, text: str) -> str:
        return text if value is not None else ""

    tried = f"{f.attempts}" + (f" ({counted(f.steps_redone, 'step')} again)" if f.steps_redone else "")
    hours = f"{f.device_hours:.3g}" if f.device_hours < 100 else f"{f.device_hours:,.0f}"
    return [
        ("status", f.status),
        ("name", f.name),
        ("forked", f"at step {f.inherited_steps} of {f.parent}" if f.parent else ""),
        ("steps", f"{f.step} of {f.planned_steps}"),
        ("attempts", tried if f.attempts else ""),
        ("anomalies", str(f.anomalies or "")),
        ("last loss", output.loss(f.loss)),
        ("mean of last 5 %", output.loss(f.tail_loss)),
        ("accuracy", some(f.token_accuracy, f"{f.token_accuracy or 0:.1%}")),
        (
            "last by source",
            "\n".join(f"{output.printable(n)} {output.loss(v)}" for n, v in f.source_losses.items()),
        ),
        ("lowest loss", at(f.lowest_loss, f.lowest_loss_step)),
        ("last validation", output.loss(f.val_loss)),
        ("best validation", at(f.best_val_loss, f.best_val_step)),
        ("trained tokens", f"{f.tokens:,}" if f.tokens else ""),
        ("tokens/s", some(f.tokens_per_second, f"{f.tokens_per_second or 0:,.0f}")),
        ("MFU", some(f.mfu, f"{f.mfu or 0:.1%}")),
        ("peak memory", output.memory(f.peak_memory_bytes) if f.peak_memory_bytes else ""),
        ("wall time", output.duration(f.wall_seconds)),
        ("goodput", some(f.goodput, f"{f.goodput or 0:.1%}")),
        ("device-hours", f"{hours} on {counted(f.devices, 'device')}"),
        ("cost", some(f.cost, f"{f.cost or 0:,.2f}")),
        ("failed", output.printable(f.message or "")),
    ]


def parting_lines(parting: Parting, first: str, other: str) -> Iterator[str]:
    """Where the curves of a run part from those of the first one."""
    if not parting.steps:
        yield f"{first} and {other} have no step in common"
        return
    common = f"steps {parting.first} to {parting.last}" if parting.steps > 1 else f"step {parting.first}"
    if not parting.bits:
        yield f"{first} and {other} are the same bit for bit over the {common} that both have"
        return
    if parting.at is None:
        yield f"{first} and {other}: loss and gradient norm are the same bit for bit over {common}"
    elif parting.beyond_rounding is None:
        yield f"{first} and {other} part at step {parting.at}, by no more than rounding up to step {parting.last}"
    else:
        same = ", the same bit for bit until then" if parting.at > parting.first else ""
        beyond = (
            ""
            if parting.beyond_rounding == parting.at
            else f"; beyond rounding from {parting.beyond_rounding}"
        )
        yield f"{first} and {other} part at step {parting.at}{beyond}{same}"
    names = {
        "samples": "rows",
        "tokens": "trained tokens",
        "lr": "learning rate",
        "grad_norm": "gradient norm",
    }
    yield "  other " + ", ".join(
        f"{names.get(name, name)} from {step}" for name, step in parting.bits.items()
    )


def shown_values(difference: Difference) -> list[str]:
    """The value in each run."""
    values = enumerate(difference.values)
    return ["not recorded" if number in difference.untold else _shown(value) for number, value in values]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    # A user's text may contain control characters.
    return "not set" if value in (None, "") else output.printable(str(value))

"""The sources of a mixture as text, a line for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftd.cli.terminal import output
from sftd.domain.text.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sftd.domain.data.facts import SourceFacts
    from sftd.domain.data.reading import SourceReading
    from sftd.domain.run.state import Run
    from sftd.domain.spec.spec import Spec


def planned(spec: Spec, sources: tuple[SourceFacts, ...], planned_steps: int) -> Iterator[str]:
    """What a run from the beginning will read of each source; nothing without a mixture."""
    from sftd.domain.data import mixture, reading

    if sources:
        last = planned_steps * spec.data.train_batch_size
        for one in reading.readings(mixture.of_facts(spec, sources), 0, last):
            yield _line(one)


def of_run(run: Run) -> Iterator[str]:
    """What a run's own steps read of each source, by its end and so far; nothing without a mixture."""
    from sftd.domain.data import mixture, reading

    if run.sources:
        mixed = mixture.of_facts(run.spec, run.sources, run.mixture_start)
        first, now, last = (
            run.sample_position(step) for step in (run.first_step, run.step, run.planned_steps)
        )
        so_far = reading.readings(mixed, first, now)
        for whole, part in zip(reading.readings(mixed, first, last), so_far, strict=True):
            yield f"{_line(whole)}; {part.read:,} read"


def _line(one: SourceReading) -> str:
    rows = counted(one.rows, "row")
    return f"{output.printable(one.name)}: {one.share:.1%} of the samples, {one.epochs:.2f} epochs of {rows}"

"""Rules of a mixture: `data.sources` and `data.stages`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sftd.domain.errors import Problem, quote
from sftd.domain.rules import Rules
from sftd.domain.spec.spec import Spec

_SOURCES, _STAGES = "data.sources", "data.stages"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def sources_beside_train_files(spec: Spec) -> Iterator[Problem]:
    """Files without a source would have no weight."""
    if spec.data.sources and spec.data.train_files:
        what = "are given beside data.train_files"
        yield Problem(_SOURCES, what, "make the files of data.train_files a source")


def unusable_source(spec: Spec) -> Iterator[Problem]:
    """A source has a name of its own, which is part of metric names, and files. Figures of `data.val_files` have that name."""
    seen: set[str] = set()
    for number, source in enumerate(spec.data.sources):
        where, name = f"{_SOURCES}[{number}]", quote(source.name)
        if not _NAME.fullmatch(source.name) or source.name == "val_files":
            fix = "use letters, digits and . _ - (64 at most, a letter or digit first)"
            yield Problem(f"{where}.name", f"{name} cannot be a source's name", fix)
        elif source.name in seen:
            yield Problem(f"{where}.name", f"{name} is another source's", "give each source its own name")
        seen.add(source.name)
        if not source.files:
            yield Problem(f"{where}.files", "is empty", "give at least one Parquet file")


def weights_beside_epochs(spec: Spec) -> Iterator[Problem]:
    """Shares come either from weights, or from how often each source is read."""
    sources = spec.data.sources
    for number, source in enumerate(sources):
        where = f"{_SOURCES}[{number}]"
        if source.weight is not None and source.epochs is not None:
            yield Problem(where, "has a weight and epochs", "keep one of them")
    if 0 < sum(source.weight is not None for source in sources) < len(sources):
        what = "has a weight for some of the sources"
        yield Problem(_SOURCES, what, "give every source a weight, or none")
    elif any(source.weight is not None for source in sources) and not any(s.weight for s in sources):
        yield Problem(_SOURCES, "all weights are 0", "give at least one source a weight above 0")


def unusable_stage(spec: Spec) -> Iterator[Problem]:
    """Stages follow each other and change weights of sources."""
    data, before = spec.data, 0
    names = {source.name for source in data.sources}
    if data.stages and any(source.weight is None for source in data.sources):
        fix = "give each source a weight"
        yield Problem(_STAGES, "change weights, but the sources have none", fix)
    for number, stage in enumerate(data.stages):
        where = f"{_STAGES}[{number}]"
        if stage.until_step <= before:
            fix = "order the stages by until_step"
            yield Problem(f"{where}.until_step", f"is {stage.until_step}, after a stage until {before}", fix)
        before = stage.until_step
        if unknown := sorted(stage.weights.keys() - names):
            fix = f"use {', '.join(sorted(names)) or 'names of data.sources'}"
            yield Problem(f"{where}.weights", f"{quote(unknown[0])} is not a source", fix)
        weights = {source.name: source.weight for source in data.sources} | stage.weights
        if names and not any(weights.values()):
            yield Problem(f"{where}.weights", "all are 0", "give at least one source a weight above 0")


def mixture_without_end(spec: Spec) -> Iterator[Problem]:
    """A source that is repeated as its weight asks for has no last row."""
    repeated = [s.name for s in spec.data.sources if s.weight is not None and s.on_exhausted == "repeat"]
    if repeated and spec.trainer.max_steps is None:
        what = f"is not set, and {repeated[0]} is repeated without an end"
        fix = "set it; or give each source epochs, or on_exhausted: stop, in place of a weight that repeats"
        yield Problem("trainer.max_steps", what, fix)


MIXTURE = Rules(
    refuse=(
        sources_beside_train_files,
        unusable_source,
        weights_beside_epochs,
        unusable_stage,
        mixture_without_end,
    ),
)

"""Which settings affect the numbers of a run. A change of any other setting keeps the trajectory (a resume); a change of
one of these starts another trajectory (a fork)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from sftd.domain.data import mixture
from sftd.domain.data.facts import SourceFacts
from sftd.domain.data.mixture import MixtureStart
from sftd.domain.run.state import Run
from sftd.domain.spec.learning_rate import learning_rate
from sftd.domain.spec.on_resume import OnResume
from sftd.domain.spec.parse import LEAVES
from sftd.domain.spec.spec import FROM_THE_BEGINNING, OrderStart, Spec

# The keys that determine, with the contents of the data files, the rows and their order.
_ORDER = (
    "data.sequence_length",
    "data.truncation",
    "data.shuffle",
    "model.megatron.seed",
)
# Keys whose values follow from other keys, so that a list of changes omits them.
_DERIVED = ("training.gradient_accumulation_steps",)
# The lists whose entries have keys of their own.
_ENTRIES = ("data.sources", "evaluation")


def flatten(spec: Spec) -> dict[str, Any]:
    """Dotted key → value. Lists and `model.override_config` are values. Entries with a name are their names in order, and their
    keys as in `data.sources.NAME.weight`."""
    flat: dict[str, Any] = {}

    def walk(section: msgspec.Struct, prefix: str) -> None:
        for name in section.__struct_fields__:
            value = getattr(section, name)
            if isinstance(value, msgspec.Struct):
                walk(value, f"{prefix}{name}.")
            elif isinstance(value, list) and value and hasattr(value[0], "name"):
                flat[prefix + name] = [entry.name for entry in value]
                for entry in value:
                    inner = f"{prefix}{name}.{entry.name}."
                    walk(entry, inner)
                    del flat[f"{inner}name"]
                    if (kind := entry.__struct_config__.tag) is not None:
                        flat[f"{inner}kind"] = kind
            else:
                flat[prefix + name] = msgspec.to_builtins(value)

    walk(spec, "")
    return flat


def changes(old: Spec, new: Spec) -> dict[str, list[Any]]:
    """Dotted key → [old value, new value] for each key that differs. A new entry of a list had no value, None."""
    before, after = flatten(old), flatten(new)
    return {
        key: msgspec.to_builtins([before.get(key), value])
        for key, value in after.items()
        if value != before.get(key) and key not in _DERIVED and (value != [] or key in before)
    }


def is_derived(key: str) -> bool:
    """Whether the value of this key follows from other keys."""
    return key in _DERIVED


def on_resume(key: str) -> OnResume:
    """The effect of a new value of this key on a run's existing steps: the mark of its field, or `fixed`."""
    annotation = LEAVES.get(key) or LEAVES[next(name for name in _ENTRIES if key.startswith(f"{name}."))]
    marks = [meta.extra["on_resume"] for meta in getattr(annotation, "__metadata__", ()) if meta.extra]
    return marks[0] if marks else OnResume.FIXED


def keeps_steps(key: str) -> bool:
    """Whether another value of this key gives the same steps, bit for bit or to within rounding."""
    return on_resume(key) is OnResume.FREE


def other_trajectory(
    old: Spec, new: Spec, *, steps: int, old_planned: int, new_planned: int, anomalies: int = 0
) -> list[str]:
    """The keys of `new` that would have changed the first `steps` steps. Empty if a resume may continue with `new`.
    `anomalies` is the number of anomalies in these steps."""
    guilty = [key for key in changes(old, new) if on_resume(key) is OnResume.FIXED]
    guilty += _skips_others(old, new, steps, anomalies)
    if old_planned != new_planned and any(
        learning_rate(step, old, old_planned) != learning_rate(step, old, new_planned)
        for step in range(steps)
    ):
        guilty += [key for key in changes(old, new) if on_resume(key) is OnResume.LENGTH] or [
            "trainer.max_steps"
        ]
    return guilty


def _skips_others(old: Spec, new: Spec, steps: int, anomalies: int) -> list[str]:
    """Keys whose new values would have skipped other steps. A change from `stop` or `rollback` to `skip` is allowed, because a
    step that ended an attempt is the last of its timeline."""
    was, now = old.training, new.training
    guilty = []
    if anomalies and was.on_non_finite == "skip" != now.on_non_finite:
        guilty.append("training.on_non_finite")
    if anomalies and (
        was.on_spike == "skip" != now.on_spike or (was.on_spike, now.on_spike) == ("record", "skip")
    ):
        guilty.append("training.on_spike")
    if steps and was.spike_factor != now.spike_factor and "skip" in (was.on_spike, now.on_spike):
        guilty.append("training.spike_factor")
    return guilty


def is_files(key: str) -> bool:
    """Whether this key is a list of data files, which are compared by content."""
    is_of_source = key.startswith("data.sources.") and key.endswith((".files", ".val_files"))
    return is_of_source or key in ("data.train_files", "data.val_files")


def same_order(old: Spec, new: Spec) -> bool:
    """Whether both specs read the same samples in the same order from the same data."""
    return not any(key in _ORDER for key in changes(old, new)) and _mixing(old) == _mixing(new)


def _mixing(spec: Spec) -> Any:
    """What determines the order of a mixture, besides `_ORDER`. The contents of files are compared elsewhere."""
    data = spec.data
    sources = [msgspec.structs.replace(source, files=[], val_files=[]) for source in data.sources]
    return sources and (sources, data.weights_by, data.stages, data.train_batch_size)


def forked_order(
    parent: Run, step: int, spec: Spec, train_digest: str, sources: Sequence[SourceFacts] = ()
) -> tuple[OrderStart, MixtureStart]:
    """Where a fork of `parent` after `step` begins to read, and where its mixture begins.

    With the same data and sample order it goes on at the parent's position, else at 0. In another mixture, each source that the
    parent has too, with the same rows in the same order, goes on after the rows that the parent has read of it.
    """
    position = parent.sample_position(step)
    same_files = train_digest == parent.train_digest and tuple(sources) == parent.sources
    if same_files and same_order(parent.spec, spec):
        return OrderStart(step, position), parent.mixture_start
    if not sources or not parent.sources or any(key in _ORDER for key in changes(parent.spec, spec)):
        return OrderStart(step, 0), MixtureStart(step if sources else 0)
    read = mixture.of_facts(parent.spec, parent.sources, parent.mixture_start).cursors(position)
    own = _rows_by_name(spec, sources)
    same = {
        name for name, rows in _rows_by_name(parent.spec, parent.sources).items() if own.get(name) == rows
    }
    start = MixtureStart(step, {name: count for name, count in read.items() if name in same and count})
    return OrderStart(step, start.position), start


def _rows_by_name(spec: Spec, sources: Sequence[SourceFacts]) -> dict[str, tuple[str, int]]:
    """What determines the rows of each source."""
    return {
        facts.name: (facts.digest, mixture.rows_of(source, mixture.SourceSize(facts.rows, facts.tokens)))
        for source, facts in zip(spec.data.sources, sources, strict=True)
    }


def beginning(run: Run) -> OrderStart:
    """Where the run's own steps began to read. The planned steps are counted from here."""
    if run.fork is None:
        return FROM_THE_BEGINNING
    if run.fork.sample is None:
        return run.order[0] if run.order else FROM_THE_BEGINNING
    # The first piece of `order` is not used: a skip directly after the fork replaces it.
    return OrderStart(run.fork.step, run.fork.sample)

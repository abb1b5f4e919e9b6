"""Differences between runs: config, data, code and environment, and the step at which their curves diverge. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from sftd.domain.compare.curves import Curves
from sftd.domain.log.events import RunSubmitted
from sftd.domain.repro.environment import decides_numbers
from sftd.domain.repro.steps import is_apart, rounds_to
from sftd.domain.run.state import Run
from sftd.domain.run.trajectory import flatten, is_derived, keeps_steps

Group = Literal["config", "layout", "data", "code", "environment"]
_LAYOUT_KEYS = (
    "model.megatron.tensor_",
    "model.megatron.pipeline_",
    "model.megatron.virtual_",
    "model.megatron.context_",
    "model.megatron.expert_",
    "model.megatron.sequence_parallel",
    "launch.nnodes",
    "launch.nproc_per_node",
)
# These keys name a run and do not affect it.
_NAMES = ("trainer.project_name", "trainer.experiment_name")
# Parts of an environment that are code.
_CODE = ("sftd",)
# Parts of an environment that the config already shows.
_IN_CONFIG = ("layout", "dtype", "deterministic")
_SCAN = 4096
# The numbers of a step, in causal order.
COMPARED = ("samples", "tokens", "lr", "loss", "grad_norm")


class Difference(msgspec.Struct, frozen=True):
    """A key whose value differs between runs. A value is None if the key is not set. `keeps_steps`: another value gives the
    same steps, bit for bit or to within rounding. `untold` holds the indices of the runs whose logs do not have the key."""

    group: Group
    key: str
    values: list[Any]
    keeps_steps: bool = False
    untold: list[int] = []


class Parting(msgspec.Struct, frozen=True):
    """Where the curves of `other` diverge from those of the first run, over the common steps `first` to `last` (none if
    `last` < `first`). `bits` maps each number to the first step at which its bits differ. `rounding` maps loss and gradient
    norm to the first step at which they differ by more than rounding."""

    other: str
    first: int
    last: int
    bits: dict[str, int]
    rounding: dict[str, int]

    @property
    def steps(self) -> int:
        """Number of common steps."""
        return max(0, self.last - self.first + 1)

    @property
    def at(self) -> int | None:
        """The first step at which loss or gradient norm differs in any bit."""
        return min((self.bits[name] for name in ("loss", "grad_norm") if name in self.bits), default=None)

    @property
    def beyond_rounding(self) -> int | None:
        """The first step at which loss or gradient norm differs by more than rounding."""
        return min(self.rounding.values(), default=None)


def part(first: Curves, other: Curves, name: str, dtypes: set[str]) -> Parting:
    """Where the run `name` diverges from the first one. `dtypes` are the compute dtypes of the two runs."""
    begin, end = max(first.first, other.first), min(first.last, other.last)
    if not (len(first) and len(other)):
        end = begin - 1
    bits = {}
    for number in COMPARED:
        step = _first_other(first, other, number, begin, end)
        if step is not None:
            bits[number] = step
    rounding = {}
    for number, tolerance in rounds_to("float32" if dtypes == {"float32"} else "").items():
        if number in bits:
            a, b = first.values(number, bits[number], end), other.values(number, bits[number], end)
            step = next(
                (
                    bits[number] + n
                    for n, pair in enumerate(zip(a, b, strict=True))
                    if is_apart(*pair, tolerance)
                ),
                None,
            )
            if step is not None:
                rounding[number] = step
    return Parting(name, begin, end, bits, rounding)


def _first_other(first: Curves, other: Curves, name: str, begin: int, end: int) -> int | None:
    """The first step at which a column differs. Compares bytes: -0.0 differs from 0.0, and NaN equals NaN."""
    for start in range(begin, end + 1, _SCAN):
        stop = min(start + _SCAN - 1, end)
        a, b = (memoryview(c.values(name, start, stop)) for c in (first, other))  # type: ignore[arg-type]
        if a.tobytes() != b.tobytes():
            size = a.itemsize
            a, b = a.cast("B"), b.cast("B")
            return start + next(
                n for n in range(len(a) // size) if a[n * size :][:size] != b[n * size :][:size]
            )
    return None


def differences(runs: Sequence[Run], submitted: Sequence[RunSubmitted | None]) -> list[Difference]:
    """Everything that differs between the runs. Differences that affect the steps come first."""
    configs = [flatten(run.spec) for run in runs]
    found = [
        Difference(
            "layout" if key.startswith(_LAYOUT_KEYS) else "config", key, values, keeps_steps(key), untold
        )
        for key, values, untold in _unlike(configs)
        if key not in _NAMES and not is_derived(key)
    ]
    data = _unlike([_data(run) | _model(event) for run, event in zip(runs, submitted, strict=True)])
    found += [Difference("data", key, values, untold=untold) for key, values, untold in data]
    versions = [{"sftd (submitted by)": s.sftd_version} if s else {} for s in submitted]
    found += [Difference("code", key, values, untold=untold) for key, values, untold in _unlike(versions)]
    for key, values, untold in _unlike(_environments(runs)):
        if key.split(".")[0] not in _IN_CONFIG:
            group: Group = "code" if key in _CODE else "environment"
            found.append(Difference(group, key, values, not decides_numbers(key), untold))
    order = ("config", "data", "code", "environment", "layout")
    return sorted(found, key=lambda d: (d.keeps_steps, order.index(d.group)))


def _unlike(facts: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[Any], list[int]]]:
    """(key, values, indices of the runs without the key) for each key whose values differ, in order. A key that only one log
    has is left out."""
    for key in dict.fromkeys(key for known in facts for key in known):
        values = [known[key] for known in facts if key in known]
        if any(value != values[0] for value in values):
            untold = [number for number, known in enumerate(facts) if key not in known]
            yield key, [known.get(key) for known in facts], untold


def _data(run: Run) -> dict[str, Any]:
    digests = {"training data (sha256)": run.train_digest, "validation data (sha256)": run.val_digest}
    return {key: digest[:16] for key, digest in digests.items() if digest}


def _model(submitted: RunSubmitted | None) -> dict[str, Any]:
    if submitted is None or (files := submitted.model_files) is None:
        return {}
    return {"model files (sha256)": files.digest[:16], "weights (sha256)": files.weights_digest[:16]}


def _environments(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The environment of each run's last attempt, flattened. A variable that it does not list was not set."""
    parts: dict[str, dict[str, None]] = {}
    for run in runs:
        for key, value in run.environment.items():
            if isinstance(value, dict):
                parts.setdefault(key, {}).update(dict.fromkeys(value))
    return [
        {key: value for key, value in run.environment.items() if key not in parts}
        | {
            f"{key}.{part}": run.environment[key].get(part)
            for key, inner in parts.items()
            if isinstance(run.environment.get(key), dict)
            for part in inner
        }
        for run in runs
    ]

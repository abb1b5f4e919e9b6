"""Map events to MLflow's metrics, parameters, tags, status and datasets. Pure functions."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from sftd.domain.log import events as e
from sftd.domain.run.goodput import ACCOUNTS, Ledger
from sftd.domain.run.state import Run, Status
from sftd.domain.run.trajectory import changes
from sftd.domain.spec.launch.launchers import KINDS
from sftd.domain.spec.spec import Spec

TAG_RUN = "sftd.run"
TAG_CURSOR = "sftd.cursor"

# Increase it when names or parameters in MLflow change: the mirror then rewrites the runs that have an older form.
MAPPING = 2
# Keys of form 1 that form 2 has no more. Each was a chart with one dot, or was sorted before the loss.
FORMER_METRICS = (
    *(
        "tokens_total",
        "step_seconds",
        "tokens_per_second",
        "mfu",
        "peak_memory_gib",
        "goodput",
        "seconds_wall",
    ),
    *(f"seconds_{account}" for account in ACCOUNTS),
)
_CURVES = ("loss", "grad_norm", "lr", "val_loss")

SAMPLES_FILE = "samples.json"
ENDED = frozenset({"FINISHED", "FAILED", "KILLED"})

# MLflow's limits, in characters.
_PARAM_VALUE = 6000
_TAG_VALUE = 5000  # 8000 since MLflow 2.x, 5000 on older servers
_KEY = 250
_NAME = 250
_DATASET_NAME = 500
_DATASET_DIGEST = 36
_DATASET_SOURCE = 65_535

# MLflow also accepts paths as keys, but refuses unnormalised ones. A dotted key needs no slash.
_NOT_IN_KEY = re.compile(r"[^\w. -]")
# The default project has another name in MLflow, because MLflow's own empty experiment is `Default`.
_NO_PROJECT, _NO_PROJECT_SHOWN = "default", "sftd"
_CHANGED = "sftd.changed."
_TAKEN_BACK = ("sftd.last_checkpoint", "sftd.cause", "sftd.message", _CHANGED)
_STATUS: dict[Status, str] = {
    "queued": "SCHEDULED",
    "held": "SCHEDULED",
    "paused": "SCHEDULED",
    "succeeded": "FINISHED",
    "failed": "FAILED",
    "cancelled": "KILLED",
}


class MetricPoint(NamedTuple):
    """One value of a metric. `timestamp` is milliseconds since the epoch."""

    key: str
    value: float
    timestamp: int
    step: int


class DatasetFacts(NamedTuple):
    """A dataset of a run. `context` is "train" or "val"; `source` and `profile` are JSON."""

    context: str
    name: str
    digest: str
    source: str
    profile: str


def millis(micros: e.Micros) -> int:
    """MLflow's unit of time: milliseconds since the epoch."""
    return micros // 1000


def points(recorded: e.Recorded, highest: dict[str, int]) -> list[MetricPoint]:
    """The metrics of an event. `highest`, the highest step so far by event type, is updated.

    A step that a later attempt redoes has no metrics: it equals the logged step, whose point MLflow already has.
    """
    event = recorded.event
    if isinstance(event, e.SystemSampled):
        highest[recorded.type] = number = highest.get(recorded.type, -1) + 1
        return _system_points(event, millis(recorded.occurred_at), number)
    if not isinstance(event, e.StepCompleted | e.ValidationCompleted):
        return []
    if event.step <= highest.get(recorded.type, -1):
        return []
    highest[recorded.type] = event.step
    at = millis(recorded.occurred_at)
    if isinstance(event, e.ValidationCompleted):
        loads = {f"expert_load/layer_{layer}": load for layer, load in (event.expert_load or {}).items()}
        return [
            MetricPoint(key, value, at, event.step)
            for key, value in ({"val_loss": event.loss} | _figures(event, "val_") | loads).items()
        ]
    # MLflow's page shows the section `system/`, and no other, below the keys without a prefix.
    values = {
        "loss": event.loss,
        "grad_norm": event.grad_norm,
        "lr": event.lr,
        "system/tokens_total": float(event.tokens_total),
        "system/step_seconds": event.seconds,
    }
    if event.seconds > 0:
        values["system/tokens_per_second"] = event.tokens_real / event.seconds
    if event.mfu is not None:
        values["system/mfu"] = event.mfu
    if event.peak_memory_bytes is not None:
        values["system/peak_memory_gib"] = event.peak_memory_bytes / 2**30
    for key in ("load_balancing_loss", "z_loss"):
        if (value := getattr(event, key)) is not None:
            values[key] = value
    values |= _figures(event, "")
    return [MetricPoint(key, value, at, event.step) for key, value in values.items()]


def _figures(event: e.StepCompleted | e.ValidationCompleted, prefix: str) -> dict[str, float]:
    """Metrics beside the loss. An event of an older sftd has none."""
    if event.token_accuracy is None or event.entropy is None:
        return {}
    values = {
        "token_accuracy": event.token_accuracy,
        "entropy": event.entropy,
        "perplexity": e.perplexity(event.loss),
    }
    for name, of_source in (event.sources or {}).items():
        # A key that is no normalised path, such as `loss/..`, is refused.
        values[f"loss/{_NOT_IN_KEY.sub('_', name).strip('.') or '_'}"] = of_source.loss
    return {f"{prefix}{key}"[:_KEY]: value for key, value in values.items()}


def most_points(event: e.Event) -> int:
    """An upper bound of the event's number of points."""
    if isinstance(event, e.StepCompleted):
        router = (event.load_balancing_loss is not None) + (event.z_loss is not None)
        return 8 + router + 3 * (event.token_accuracy is not None) + len(event.sources or {})
    if isinstance(event, e.ValidationCompleted):
        loads = len(event.expert_load or {})
        return 1 + loads + 3 * (event.token_accuracy is not None) + len(event.sources or {})
    if isinstance(event, e.SystemSampled):
        return 3 + 4 * len(event.gpus)
    return 1


def _system_points(event: e.SystemSampled, at: int, number: int) -> list[MetricPoint]:
    """The system metrics that MLflow itself would log, under its names, so that its page of system metrics shows them. As in
    MLflow, `number` counts samples; the run's steps would jump back with each attempt."""
    values: dict[str, float | None] = {
        "cpu_utilization_percentage": event.cpu_percent,
        "system_memory_usage_megabytes": event.memory_used_bytes / 1e6,
        "system_memory_usage_percentage": _percent(event.memory_used_bytes, event.memory_total_bytes),
    }
    for gpu in event.gpus:
        used = gpu.memory_used_bytes
        values |= {
            f"gpu_{gpu.index}_utilization_percentage": gpu.utilization_percent,
            f"gpu_{gpu.index}_memory_usage_megabytes": used / 1e6 if used is not None else None,
            f"gpu_{gpu.index}_memory_usage_percentage": _percent(used, gpu.memory_total_bytes),
            f"gpu_{gpu.index}_power_usage_watts": gpu.power_watts,
        }
    return [
        MetricPoint(f"system/{key}", value, at, number) for key, value in values.items() if value is not None
    ]


def _percent(part: int | None, whole: int | None) -> float | None:
    return round(100 * part / whole, 1) if part is not None and whole else None


def time_tags(ledger: Ledger) -> dict[str, str]:
    """Tags with the time ledger of an ended run. As metrics, each number would be a chart with a single dot."""
    spent = ((account, ledger.seconds(account)) for account in ACCOUNTS)
    texts = {"sftd.time": ", ".join(f"{account} {seconds:.1f} s" for account, seconds in spent if seconds)}
    if ledger.goodput is not None:
        texts["sftd.goodput"] = f"{ledger.goodput:.1%}"
    return {key: text for key, text in texts.items() if text}


def inherited(recorded: e.Recorded, highest: dict[str, int], fork_step: int) -> list[MetricPoint]:
    """The metrics of a parent's event that a fork also shows. The fork validates `fork_step` itself."""
    last = fork_step - isinstance(recorded.event, e.ValidationCompleted)
    return [point for point in points(recorded, highest) if point.step <= last]


def status(run: Run) -> tuple[str, int | None]:
    """MLflow's status of a run, and its end time (ms since the epoch), None while it has not ended."""
    name = _STATUS.get(run.status, "RUNNING")
    ended = name in ENDED and run.ended_at is not None
    return name, millis(run.ended_at) if ended and run.ended_at is not None else None


def tags(run: Run, submitted: Spec) -> dict[str, str]:
    """The tags that change during a run. `submitted` is the spec in the parameters. The mirror deletes a tag in MLflow that is
    missing here if `is_taken_back` is true for it."""
    newest = max((c for c in run.checkpoints if not c.superseded), key=lambda c: c.step, default=None)
    texts = {
        "sftd.status": run.status,
        "sftd.attempts": str(run.attempt),
        "sftd.spec_digest": run.spec_digest,
        "sftd.last_checkpoint": newest.path if newest else "",
        "sftd.cause": run.cause or "",
        "sftd.message": run.message or "",
    }
    # MLflow's parameters cannot change, so the changes of a resume are tags.
    texts |= {f"{_CHANGED}{key}": _text(now) for key, (_, now) in changes(submitted, run.spec).items()}
    if run.fork:
        # Not mlflow.parentRunId: MLflow's pages collapse such a run below its parent, and omit it from the charts.
        texts |= {"sftd.parent": run.fork.parent, "sftd.fork_step": str(run.fork.step)}
    texts["sftd.sweep"] = run.sweep
    return {key: fit(text, _TAG_VALUE) for key, text in texts.items() if text}


def is_taken_back(key: str) -> bool:
    """Whether a tag must be deleted when `tags` no longer has it."""
    return key.startswith(_TAKEN_BACK)


def cursor_tag(version: int) -> str:
    """The value of `TAG_CURSOR`: the form, and the version up to which a run is copied."""
    return f"{MAPPING}:{version}"


def parse_cursor(text: str) -> tuple[int, int]:
    """(version copied in the current form, version copied in any form) from the value of `TAG_CURSOR`. A value that a user has
    damaged counts as (0, 0): MLflow ignores the events that are then sent again."""
    form, _, version = text.rpartition(":")
    if not version.isdecimal():
        return 0, 0
    return (int(version) if form == str(MAPPING) else 0), int(version)


def event_tags(event: e.Event) -> dict[str, str]:
    """The tags that a single event sets."""
    if isinstance(event, e.ModelExported):
        return {"sftd.exported": fit(f"{event.path} (step {event.step})", _TAG_VALUE)}
    if isinstance(event, e.ModelRegistered):
        return {"sftd.registered_model": fit(f"{event.name} version {event.model_version}", _TAG_VALUE)}
    return {}


def samples_table(generated: Iterable[e.SampleGenerated]) -> dict[str, Any]:
    """Answers to the sample prompts in MLflow's table format. Answers that a later attempt repeated occur once."""
    rows: dict[tuple[int, str], list[Any]] = {}
    for s in generated:
        rows.setdefault((s.step, s.prompt), [s.step, s.prompt, s.text, s.tokens, s.stopped])
    columns = ["step", "prompt", "answer", "tokens", "stopped"]
    return {"columns": columns, "data": sorted(rows.values(), key=lambda row: row[0])}


def samples_tag(refused: str | None) -> dict[str, str]:
    """A tag with the file of the table of samples, or with the reason if the store `refused` it."""
    text = SAMPLES_FILE if refused is None else f"{SAMPLES_FILE} could not be written: {refused}"
    return {"sftd.samples": fit(text, _TAG_VALUE)}


def first_tags(run_id: str, event: e.RunSubmitted) -> dict[str, str]:
    """The tags with which an MLflow run is created. Users may edit the note: it is never written again."""
    texts = {
        TAG_RUN: run_id,
        "sftd.user": event.user,
        "sftd.version": event.sftd_version,
        "mlflow.user": event.user,
        "mlflow.source.name": "sftd",
        "mlflow.source.type": "JOB",
        "mlflow.note.content": _note(run_id, event),
    }
    return {key: fit(text, _TAG_VALUE) for key, text in texts.items()}


def _note(run_id: str, event: e.RunSubmitted) -> str:
    lines = [
        f"sftd run `{run_id}`, submitted by {event.user}.",
        f"{event.planned_steps} planned steps; spec `{event.spec_digest[:12]}`.",
    ]
    model = _section(event.spec, "model").get("partial_pretrain")
    if model:
        lines.append(f"Starts from `{model}`.")
    lines += [f"{data.context}: `{data.name}` {data.profile}" for data in datasets(event)]
    lines += [f"Warning: {warning}" for warning in event.warnings]
    return "\n\n".join(lines)


def _section(spec: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = spec.get(name)
    return section if isinstance(section, Mapping) else {}


def experiment_names(event: e.RunSubmitted, prefix: str = "") -> tuple[str, ...]:
    """The names of the MLflow experiment of a run: an existing one may have any of them, a new one gets the last."""
    project = str(_section(event.spec, "trainer").get("project_name") or _NO_PROJECT)
    names = (project, _NO_PROJECT_SHOWN) if project == _NO_PROJECT else (project,)
    return tuple(fit(prefix + name, _NAME) for name in names)


def run_name(run_id: str, event: e.RunSubmitted) -> str:
    """The experiment name and the run id. Several runs often share a name."""
    name = str(_section(event.spec, "trainer").get("experiment_name") or "")
    return fit(f"{name} {run_id}".strip(), _NAME)


def params(spec: Mapping[str, Any]) -> dict[str, str]:
    """The spec with dotted keys. Values that are not strings are JSON; a value that is too long for MLflow is cut (see `fit`).
    Sections of launchers that the run does not use are left out."""
    own = _section(spec, "launch").get("launcher")
    others = tuple(f"launch.{name}" for name in KINDS if name != own)
    return {
        _NOT_IN_KEY.sub("_", key)[:_KEY]: fit(text, _PARAM_VALUE)
        for key, text in _flat(spec, "")
        if not key.startswith(others)
    }


def former(spec: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """(metrics, parameters) that the mirror may have written into a run of an older form."""
    metrics = {*FORMER_METRICS, *_CURVES}
    return metrics, {_NOT_IN_KEY.sub("_", key)[:_KEY] for key, _ in _flat(spec, "")} - params(spec).keys()


def _flat(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and (value or not key):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def fit(text: str, limit: int) -> str:
    """The text, or its beginning and a digest of the whole if it is too long. Equal texts stay equal, others differ."""
    if len(text) <= limit:
        return text
    end = f"... ({len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]})"
    return text[: limit - len(end)] + end


def datasets(event: e.RunSubmitted) -> list[DatasetFacts]:
    """The data files in the event; empty if it has none."""
    found = []
    for context in ("train", "val"):
        facts = _section(event.data, context)
        files, digest = [str(f) for f in facts.get("files") or ()], str(facts.get("digest") or "")
        if not files or not digest:
            continue
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        profile = {k: facts[k] for k in ("rows", "tokens", "trained_tokens") if k in facts}
        found.append(
            DatasetFacts(
                context=context,
                name=fit(PurePath(files[0]).name + more, _DATASET_NAME),
                digest=digest[:_DATASET_DIGEST],
                source=_source(files),
                profile=json.dumps(profile),
            )
        )
    return found


def _source(files: list[str]) -> str:
    kept = files
    while len(text := json.dumps({"files": kept, "count": len(files)})) > _DATASET_SOURCE:
        kept = kept[: len(kept) // 2]
    return text

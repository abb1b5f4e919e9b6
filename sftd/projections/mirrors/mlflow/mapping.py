"""What an event means in MLflow's words: metrics, parameters, tags, status, datasets. Pure; knows no server."""

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
from sftd.domain.spec.launchers import KINDS
from sftd.domain.spec.spec import Spec

TAG_RUN = "sftd.run"
TAG_CURSOR = "sftd.cursor"

# Raise it when a run gets other names or parameters in MLflow: the mirror then writes the runs that have an older form again.
MAPPING = 2
# What form 1 had beside the keys of today: one dot each, or named so that they came before the loss.
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

# MLflow takes paths as keys too, but refuses those that are not normal; a dotted key needs none.
_NOT_IN_KEY = re.compile(r"[^\w. -]")
# A project that nobody named. MLflow's own empty experiment is `Default`: two of that name confuse.
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
    """A dataset of a run; `context` says what for ("train", "val"), `source` and `profile` are JSON."""

    context: str
    name: str
    digest: str
    source: str
    profile: str


def millis(micros: e.Micros) -> int:
    """MLflow counts milliseconds."""
    return micros // 1000


def points(recorded: e.Recorded, highest: dict[str, int]) -> list[MetricPoint]:
    """The metrics of an event. `highest` holds the highest step seen so far by event type and is moved on.

    A step that a later attempt redoes gives nothing: a redone step equals the log, so its point is already there.
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
        return [MetricPoint("val_loss", event.loss, at, event.step)]
    # `system/` is the only prefix whose section MLflow's page shows below the keys without one.
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
    return [MetricPoint(key, value, at, event.step) for key, value in values.items()]


def most_points(event: e.Event) -> int:
    """No fewer points than the event can become."""
    if isinstance(event, e.StepCompleted):
        return 8
    if isinstance(event, e.SystemSampled):
        return 3 + 4 * len(event.gpus)
    return 1


def _system_points(event: e.SystemSampled, at: int, number: int) -> list[MetricPoint]:
    """What MLflow itself would log, and under its names, so that its page of system metrics shows it. As there, `number`
    counts samples: a run's steps would go back with each attempt."""
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
    """Where the time of a run that has ended went. Tags: as a metric each number would be a chart with a single dot."""
    spent = ((account, ledger.seconds(account)) for account in ACCOUNTS)
    texts = {"sftd.time": ", ".join(f"{account} {seconds:.1f} s" for account, seconds in spent if seconds)}
    if ledger.goodput is not None:
        texts["sftd.goodput"] = f"{ledger.goodput:.1%}"
    return {key: text for key, text in texts.items() if text}


def inherited(recorded: e.Recorded, highest: dict[str, int], fork_step: int) -> list[MetricPoint]:
    """The metrics of a parent's event that a fork shows as its own beginning. The fork validates `fork_step` itself."""
    last = fork_step - isinstance(recorded.event, e.ValidationCompleted)
    return [point for point in points(recorded, highest) if point.step <= last]


def status(run: Run) -> tuple[str, int | None]:
    """MLflow's status of a run, and when it ended (milliseconds); None while it has not."""
    name = _STATUS.get(run.status, "RUNNING")
    ended = name in ENDED and run.ended_at is not None
    return name, millis(run.ended_at) if ended and run.ended_at is not None else None


def tags(run: Run, submitted: Spec) -> dict[str, str]:
    """The tags that change while a run lasts; `submitted` is the spec that the parameters show. Those that `is_taken_back`
    names and that are missing here must not be in MLflow."""
    newest = max((c for c in run.checkpoints if not c.superseded), key=lambda c: c.step, default=None)
    texts = {
        "sftd.status": run.status,
        "sftd.attempts": str(run.attempt),
        "sftd.spec_digest": run.spec_digest,
        "sftd.last_checkpoint": newest.path if newest else "",
        "sftd.cause": run.cause or "",
        "sftd.message": run.message or "",
    }
    # MLflow's parameters cannot change: a resume's are here.
    texts |= {f"{_CHANGED}{key}": _text(now) for key, (_, now) in changes(submitted, run.spec).items()}
    if run.fork:
        # Not mlflow.parentRunId: MLflow's pages fold such a run away below its parent, and leave it out of the charts.
        texts |= {"sftd.parent": run.fork.parent, "sftd.fork_step": str(run.fork.step)}
    texts["sftd.sweep"] = run.sweep
    return {key: fit(text, _TAG_VALUE) for key, text in texts.items() if text}


def is_taken_back(key: str) -> bool:
    """Whether a tag that `tags` does not have any more is to be deleted."""
    return key.startswith(_TAKEN_BACK)


def cursor_tag(version: int) -> str:
    """The value of the tag that says how far a run is copied, and in which form."""
    return f"{MAPPING}:{version}"


def parse_cursor(text: str) -> tuple[int, int]:
    """(version that is copied in today's form, version that is copied in whatever form) from the value of the tag. One
    that a person has spoilt counts as nothing: what is sent again is there already."""
    form, _, version = text.rpartition(":")
    if not version.isdecimal():
        return 0, 0
    return (int(version) if form == str(MAPPING) else 0), int(version)


def event_tags(event: e.Event) -> dict[str, str]:
    """The tags that an event of its own right sets."""
    if isinstance(event, e.ModelExported):
        return {"sftd.exported": fit(f"{event.path} (step {event.step})", _TAG_VALUE)}
    if isinstance(event, e.ModelRegistered):
        return {"sftd.registered_model": fit(f"{event.name} version {event.model_version}", _TAG_VALUE)}
    return {}


def samples_table(generated: Iterable[e.SampleGenerated]) -> dict[str, Any]:
    """Answers to the sample prompts, in the form that MLflow shows as a table. An answer that a later attempt gave again
    is there once."""
    rows: dict[tuple[int, str], list[Any]] = {}
    for s in generated:
        rows.setdefault((s.step, s.prompt), [s.step, s.prompt, s.text, s.tokens, s.stopped])
    columns = ["step", "prompt", "answer", "tokens", "stopped"]
    return {"columns": columns, "data": sorted(rows.values(), key=lambda row: row[0])}


def samples_tag(refused: str | None) -> dict[str, str]:
    """Whether the table of samples is there, and why not if it was `refused`."""
    text = SAMPLES_FILE if refused is None else f"{SAMPLES_FILE} could not be written: {refused}"
    return {"sftd.samples": fit(text, _TAG_VALUE)}


def first_tags(run_id: str, event: e.RunSubmitted) -> dict[str, str]:
    """The tags that an MLflow run is created with. People may edit the note: it is never written again."""
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
    """The MLflow experiment that a run belongs to: the name for a new one last, before it one that it may have already."""
    project = str(_section(event.spec, "trainer").get("project_name") or _NO_PROJECT)
    names = (project, _NO_PROJECT_SHOWN) if project == _NO_PROJECT else (project,)
    return tuple(fit(prefix + name, _NAME) for name in names)


def run_name(run_id: str, event: e.RunSubmitted) -> str:
    """What people call the run, and its id: a name is often used for several runs."""
    name = str(_section(event.spec, "trainer").get("experiment_name") or "")
    return fit(f"{name} {run_id}".strip(), _NAME)


def params(spec: Mapping[str, Any]) -> dict[str, str]:
    """The spec with dotted keys. What is not a text is JSON; a value that MLflow would refuse is cut (see `fit`). A
    launcher's section is there only for its own runs."""
    own = _section(spec, "launch").get("launcher")
    others = tuple(f"launch.{name}" for name in KINDS if name != own)
    return {
        _NOT_IN_KEY.sub("_", key)[:_KEY]: fit(text, _PARAM_VALUE)
        for key, text in _flat(spec, "")
        if not key.startswith(others)
    }


def former(spec: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """(metrics, parameters) that the mirror itself may have written into a run whose form is older."""
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
    """The text itself, or its beginning with a digest of the whole: equal texts stay equal, others differ."""
    if len(text) <= limit:
        return text
    end = f"... ({len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]})"
    return text[: limit - len(end)] + end


def datasets(event: e.RunSubmitted) -> list[DatasetFacts]:
    """The data files that submit found; none where the event does not say."""
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

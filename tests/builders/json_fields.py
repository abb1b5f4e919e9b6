"""The fields of the `--json` answers that need more than a log: checked by the tests that run these commands anyway.

`tests/contract/cli/test_json_answers.py` has those of the other commands, and finds a command that neither covers.
"""

from __future__ import annotations

from typing import Any

_SUBMITTED = {"run_id", "spec_digest", "planned_steps", "warnings"}
_COMPARED = {"from_step", "to_step", "environment", "by", "run_id", "outcome", "agreeing", "recorded"}
_ROW = {"row", "file", "row_in_file", "length", "trained"}
_CHECKED = {"run_id", "experiment", "points", "behind", "differences", "is_equal"}
_EXPORTED = {"run_id", "step", "path", "bytes", "digest", "dtype"}
_WRITTEN = {"path", "rows", "tokens", "trained_tokens", "max_length", "sha256"}
_PLAN = {
    "machine",
    "ranks",
    "dtype",
    "work",
    "memory",
    "pace",
    "storage",
    "host_copy",
    "peak_memory_bytes",
    "device_bytes_needed",
}
# Command, and what of it → the fields of its answer, or of each row of it.
FIELDS: dict[str, set[str]] = {
    "config": {"key", "type", "default", "on_resume", "meaning"},
    "data --step": {
        "run_id",
        "step",
        "train_digest",
        "position",
        "rows",
        "tokens",
        "samples_digest",
        "attempts",
        "problems",
    },
    "data --step rows": _ROW | {"epoch"},
    "data --step attempts": {"attempt", "version", "agrees", "is_shown"},
    "data --row": _ROW | {"run_id", "train_digest", "steps", "read_other_files", "problems"},
    "doctor": {"check", "state", "said", "fix"},
    "eval": {
        *("name", "step", "status", "since", "daemon", "manifest_digest", "metrics", "questions"),
        *("questions_digest", "seconds", "answers", "message"),
    },
    "eval --against": {"question", "prompt", "reference", "ours", "theirs", "our_score", "their_score"},
    "export": _EXPORTED,
    "export --prove": _EXPORTED | {"proof"},
    "export --register": _EXPORTED | {"registered"},
    "fork": _SUBMITTED,
    "generate": {"step", "prompt", "text", "tokens", "stopped"},
    "import": {"run_id", "status", "new_events"},
    "mlflow check": _CHECKED,
    "mlflow rebuild": _CHECKED,
    "plan": _PLAN
    | {"devices", "memory_bytes", "fits", "best", "alternatives", "layouts_tried", "layouts_fit", "warnings"},
    "plan alternatives": _PLAN | {"set", "fits"},
    "plan best": _PLAN | {"set"},
    "plan machine": {"device", "name", "cores"},
    "plan work": {
        "largest",
        "largest_trained",
        "micro_batches",
        "real",
        "computed",
        "squares",
        "trained",
        "rows",
    },
    "plan memory": {
        "stage",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "loss",
        "workspace",
        "total",
    },
    "plan pace": {
        "step",
        "steps",
        "training",
        "validating",
        "saving",
        "starting",
        "basis",
        "calibration",
        "mfu",
        "total",
    },
    "plan storage": {
        "checkpoint",
        "weights",
        "saved",
        "kept",
        "reduced",
        "most",
        "export",
        "at_end",
        "needed",
    },
    "prepare": _WRITTEN
    | {"val", "truncated", "dropped", "rejected", "stop_token", "tokenizer_digest", "warnings"}
    | {"card", "card_text"},
    "prepare val": _WRITTEN,
    "submit": _SUBMITTED,
    "submit --grid": _SUBMITTED | {"sweep", "name", "values"},
    "verify diverged": _COMPARED | {"step", "detail"},
}


def check(name: str, answer: dict[str, Any]) -> None:
    """Fail if an answer has other fields than the table says."""
    assert set(answer) == FIELDS[name], name

"""Events of checkpoints and of the models exported from them."""

from __future__ import annotations

from typing import ClassVar

from sftd.domain.log.events.base import Event, NoticeFacts, NoticeKind, OfStep, Severity
from sftd.domain.text.words import counted, first_line, size


class CheckpointPinned(Event, frozen=True):
    """`fork` starts from this checkpoint, so it is never deleted."""

    severity: ClassVar[Severity] = "detail"

    step: int
    fork: str

    def summary(self) -> str:
        return f"step {self.step}, from which {self.fork} was forked"


class CheckpointUnpinned(Event, frozen=True):
    """`fork`, which started from this checkpoint, was removed and no longer protects the checkpoint."""

    severity: ClassVar[Severity] = "detail"

    step: int
    fork: str

    def summary(self) -> str:
        return f"step {self.step}: {self.fork}, which was forked from it, is removed"


class CheckpointStarted(Event, frozen=True):
    """A checkpoint is being staged."""

    severity: ClassVar[Severity] = "detail"

    step: int

    def summary(self) -> str:
        return f"step {self.step}"


class CheckpointPublished(OfStep, Event, frozen=True):
    """A checkpoint is complete on the disk under its final name. `manifest_digest` is the sha256 of its manifest."""

    progress: ClassVar[str] = "checkpoint saved: "
    is_lifecycle: ClassVar[bool] = True

    step: int
    path: str
    bytes: int
    manifest_digest: str
    seconds: float

    def details(self) -> str:
        return f"{size(self.bytes)} in {self.seconds:.1f} s"


class CheckpointRejected(Event, frozen=True):
    """A checkpoint failed its verification and will not be used."""

    progress: ClassVar[str | None] = "rejected checkpoint of "
    severity: ClassVar[Severity] = "problem"
    is_lifecycle: ClassVar[bool] = True
    notice_kind: ClassVar[NoticeKind | None] = "anomaly"

    step: int
    path: str
    reason: str

    def summary(self) -> str:
        return f"step {self.step}: {self.reason}"

    def notice(self, run: NoticeFacts) -> str | None:
        return f"anomaly: the checkpoint of step {self.step:,} was rejected: {first_line(self.reason)}"


class CheckpointDeleted(OfStep, Event, frozen=True):
    """Retention deleted a checkpoint."""

    progress: ClassVar[str] = "checkpoint deleted: "
    severity: ClassVar[Severity] = "detail"
    is_lifecycle: ClassVar[bool] = True

    step: int
    path: str
    bytes: int
    reason: str

    def details(self) -> str:
        return f"{size(self.bytes)} ({self.reason})"


class CheckpointReduced(Event, frozen=True):
    """The training state of a checkpoint was deleted and its weights were kept. The model can still be exported and
    prompted, but training cannot continue from it. `path`, `bytes` and `manifest_digest` describe the folder that replaces
    `former_path`; `freed_bytes` were deleted."""

    severity: ClassVar[Severity] = "detail"
    is_lifecycle: ClassVar[bool] = True

    step: int
    path: str
    former_path: str
    bytes: int
    freed_bytes: int
    manifest_digest: str

    def summary(self) -> str:
        return f"step {self.step}  {size(self.bytes)} of weights kept, {size(self.freed_bytes)} freed"


class ModelExported(Event, frozen=True):
    """The model of a checkpoint was written as a Hugging Face folder. `digest` is a sha256 over its files, `dtype` that of
    its weights."""

    is_lifecycle: ClassVar[bool] = True

    step: int
    path: str
    bytes: int
    digest: str
    dtype: str

    def summary(self) -> str:
        return f"step {self.step}  {size(self.bytes)} {self.dtype} to {self.path}"


class ModelRegistered(Event, frozen=True):
    """An exported model was registered in MLflow's model registry as `name`, `model_version`. `digest` is the export's."""

    is_lifecycle: ClassVar[bool] = True

    step: int
    name: str
    model_version: str
    digest: str
    by: str

    def summary(self) -> str:
        return f"step {self.step} as {self.name} version {self.model_version}, by {self.by}"


class ExportProven(Event, frozen=True):
    """An exported model, loaded from `path` by `versions` in a process of its own, computes what the trainer's does.

    On `rows` recorded rows, logits at `positions` trained positions differ by at most `largest_difference`; `tolerance` is
    what rounding in the dtype `rounding` may change. `tokens` of the most probable answers were compared and are the same.
    `digest` is the export's.
    """

    step: int
    path: str
    digest: str
    rows: int
    positions: int
    largest_difference: float
    tolerance: float
    rounding: str
    tokens: int
    versions: dict[str, str]

    def summary(self) -> str:
        found = (
            f"logits within {self.largest_difference:.1e} (tolerance {self.tolerance:.1e}, {self.rounding})"
        )
        return f"step {self.step}  {counted(self.rows, 'row')}, {found}, {counted(self.tokens, 'token')} equal: {self.path}"


class ExportDiverged(Event, frozen=True):
    """An exported model computes something else than the trainer's. Fields are those of `ExportProven`. `other_token` describes
    the first token of an answer that differs, empty if only logits do."""

    severity: ClassVar[Severity] = "problem"

    step: int
    path: str
    digest: str
    rows: int
    positions: int
    largest_difference: float
    tolerance: float
    rounding: str
    tokens: int
    other_token: str
    versions: dict[str, str]

    def summary(self) -> str:
        logits = f"logits differ by {self.largest_difference:.1e} (tolerance {self.tolerance:.1e}, {self.rounding})"
        return f"step {self.step}  " + "; ".join(filter(None, [logits, self.other_token])) + f": {self.path}"

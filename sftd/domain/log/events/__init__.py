"""The event types of the log. Type names and fields are contracts: once published they are versioned, never edited (see
`codec`). Times are whole microseconds since the Unix epoch (UTC); durations are seconds."""

from __future__ import annotations

from sftd.domain.log.events.attempts import AttemptAdopted as AttemptAdopted
from sftd.domain.log.events.attempts import AttemptClaimed as AttemptClaimed
from sftd.domain.log.events.attempts import AttemptFailed as AttemptFailed
from sftd.domain.log.events.attempts import AttemptLaunched as AttemptLaunched
from sftd.domain.log.events.attempts import AttemptLost as AttemptLost
from sftd.domain.log.events.attempts import AttemptPaused as AttemptPaused
from sftd.domain.log.events.attempts import AttemptPreempted as AttemptPreempted
from sftd.domain.log.events.attempts import GpuSample as GpuSample
from sftd.domain.log.events.attempts import JobReported as JobReported
from sftd.domain.log.events.attempts import SystemSampled as SystemSampled
from sftd.domain.log.events.base import AfterStop as AfterStop
from sftd.domain.log.events.base import Event as Event
from sftd.domain.log.events.base import Micros as Micros
from sftd.domain.log.events.base import NoticeFacts as NoticeFacts
from sftd.domain.log.events.base import NoticeKind as NoticeKind
from sftd.domain.log.events.base import Severity as Severity
from sftd.domain.log.events.checkpoints import CheckpointDeleted as CheckpointDeleted
from sftd.domain.log.events.checkpoints import CheckpointPinned as CheckpointPinned
from sftd.domain.log.events.checkpoints import CheckpointPublished as CheckpointPublished
from sftd.domain.log.events.checkpoints import CheckpointReduced as CheckpointReduced
from sftd.domain.log.events.checkpoints import CheckpointRejected as CheckpointRejected
from sftd.domain.log.events.checkpoints import CheckpointStarted as CheckpointStarted
from sftd.domain.log.events.checkpoints import CheckpointUnpinned as CheckpointUnpinned
from sftd.domain.log.events.checkpoints import ExportDiverged as ExportDiverged
from sftd.domain.log.events.checkpoints import ExportProven as ExportProven
from sftd.domain.log.events.checkpoints import ModelExported as ModelExported
from sftd.domain.log.events.checkpoints import ModelRegistered as ModelRegistered
from sftd.domain.log.events.evaluations import EvaluationCompleted as EvaluationCompleted
from sftd.domain.log.events.evaluations import EvaluationFailed as EvaluationFailed
from sftd.domain.log.events.evaluations import EvaluationInterrupted as EvaluationInterrupted
from sftd.domain.log.events.evaluations import EvaluationRequested as EvaluationRequested
from sftd.domain.log.events.evaluations import EvaluationStarted as EvaluationStarted
from sftd.domain.log.events.recorded import NewEvent as NewEvent
from sftd.domain.log.events.recorded import Recorded as Recorded
from sftd.domain.log.events.runs import ResumeRequested as ResumeRequested
from sftd.domain.log.events.runs import RunCancelled as RunCancelled
from sftd.domain.log.events.runs import RunDeferred as RunDeferred
from sftd.domain.log.events.runs import RunFailed as RunFailed
from sftd.domain.log.events.runs import RunForked as RunForked
from sftd.domain.log.events.runs import RunHeld as RunHeld
from sftd.domain.log.events.runs import RunReleased as RunReleased
from sftd.domain.log.events.runs import RunRemoved as RunRemoved
from sftd.domain.log.events.runs import RunSubmitted as RunSubmitted
from sftd.domain.log.events.runs import RunSucceeded as RunSucceeded
from sftd.domain.log.events.runs import StopRequested as StopRequested
from sftd.domain.log.events.runs import SweepJoined as SweepJoined
from sftd.domain.log.events.training import AnomalyDetected as AnomalyDetected
from sftd.domain.log.events.training import DataBound as DataBound
from sftd.domain.log.events.training import ModelLoaded as ModelLoaded
from sftd.domain.log.events.training import ReplayDiverged as ReplayDiverged
from sftd.domain.log.events.training import ReplayVerified as ReplayVerified
from sftd.domain.log.events.training import SampleGenerated as SampleGenerated
from sftd.domain.log.events.training import SamplesSkipped as SamplesSkipped
from sftd.domain.log.events.training import SourceFigures as SourceFigures
from sftd.domain.log.events.training import StepCompleted as StepCompleted
from sftd.domain.log.events.training import StoppedEarly as StoppedEarly
from sftd.domain.log.events.training import TrainingResumed as TrainingResumed
from sftd.domain.log.events.training import ValidationCompleted as ValidationCompleted
from sftd.domain.log.events.training import WeightsDigested as WeightsDigested
from sftd.domain.log.events.training import perplexity as perplexity

EVENT_TYPES: dict[str, type[Event]] = {cls.__name__: cls for cls in Event.__subclasses__()}


def types_where(attribute: str) -> tuple[type[Event], ...]:
    """The types whose flag `attribute`, such as `is_lifecycle`, is set."""
    return tuple(cls for cls in EVENT_TYPES.values() if getattr(cls, attribute))


def progress_types() -> tuple[str, ...]:
    """Names of the types that are shown in a run's progress."""
    return names(*(cls for cls in EVENT_TYPES.values() if cls.progress is not None))


def names(*types: type[Event]) -> tuple[str, ...]:
    """The names of types in the log."""
    return tuple(cls.__name__ for cls in types)

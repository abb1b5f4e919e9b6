"""A line for each event that matters while a run trains: what `sftd logs` shows, and what a trainer without a daemon prints."""

from __future__ import annotations

from sftd.domain.log import events as e
from sftd.domain.text.words import counted, memory, size

# Types that have a line.
TYPES = tuple(
    cls.__name__
    for cls in (
        e.ModelLoaded,
        e.DataBound,
        e.TrainingResumed,
        e.StepCompleted,
        e.ValidationCompleted,
        e.SampleGenerated,
        e.CheckpointPublished,
        e.CheckpointRejected,
        e.CheckpointDeleted,
        e.AnomalyDetected,
    )
)


def describe(event: e.Event, planned_steps: int) -> str | None:
    """The event as a line, or None for one that says nothing new."""
    match event:
        case e.ModelLoaded():
            millions = event.parameters / 1e6
            return f"model: {event.architecture}, {millions:,.1f} M parameters, {event.dtype}, {event.device}"
        case e.DataBound():
            left_out = f", {event.truncated_rows} truncated" if event.truncated_rows else ""
            left_out += f", {event.dropped_rows} dropped" if event.dropped_rows else ""
            return f"data: {counted(event.train_rows, 'row')}{left_out}, {event.val_rows:,} for validation"
        case e.TrainingResumed():
            return f"resumed from the checkpoint of step {event.step}"
        case e.StepCompleted():
            # Short: the whole line, with its attempt before it, fits 80 columns on most runs.
            speed = f"{event.tokens_real / event.seconds:,.0f} tok/s" if event.seconds > 0 else ""
            if event.mfu is not None:
                speed += f"  MFU {event.mfu:.1%}  {memory(event.peak_memory_bytes or 0)}"
            number = _step(event.step, planned_steps)
            return f"{number}  loss {event.loss:.4f}  grad {event.grad_norm:.3f}  lr {event.lr:.2e}  {speed}"
        case e.ValidationCompleted():
            return f"{_step(event.step, planned_steps)}  validation loss {event.loss:.4f} over {counted(event.tokens, 'token')}"
        case e.SampleGenerated():
            return f"{_step(event.step, planned_steps)}  {event.prompt!r} → {event.text!r}"
        case e.CheckpointPublished():
            return f"{_step(event.step, planned_steps)}  checkpoint saved: {size(event.bytes)} in {event.seconds:.1f} s"
        case e.CheckpointRejected():
            return f"checkpoint of step {event.step} is rejected: {event.reason}"
        case e.CheckpointDeleted():
            return f"{_step(event.step, planned_steps)}  checkpoint deleted ({event.reason})"
        case e.AnomalyDetected():
            return f"ANOMALY at step {event.step}: {event.what} {event.detail or ''}".rstrip()
    return None


def _step(step: int, planned_steps: int) -> str:
    return f"step {step:>{len(str(planned_steps))}}/{planned_steps}"

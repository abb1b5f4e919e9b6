"""Make an attempt's order from the run in the log."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sftd.domain.data.chat_template import ChatTemplate
from sftd.domain.log.model_record import ModelRecord
from sftd.domain.run.early_stop import Patience
from sftd.domain.run.state import CheckpointInfo, Run
from sftd.domain.spec.spec import FROM_THE_BEGINNING
from sftd.wire.attempt.directory import Order

_NO_RECORD = ModelRecord()
_NEW = Patience()


def order_of(
    run: Run,
    checkpoint: CheckpointInfo | None,
    *,
    attempt: int | None = None,
    token: str = "",
    checkpoint_dir: str | os.PathLike[str] = "",
    model: ModelRecord = _NO_RECORD,
    model_root: str | os.PathLike[str] = "",
    losses: Sequence[float] = (),
    patience: Patience = _NEW,
    last_step: int | None = None,
    template: ChatTemplate | None = None,
) -> Order:
    """The order to train from `checkpoint`; None is the pretrained model.

    With `attempt`, the order is for the run's next attempt: new steps, on the data as submitted. Without it, the order is for
    steps that the log has, for `sftd verify` and tools; the data may have changed since. See `Order` for the other arguments.
    """
    is_next = attempt is not None
    return Order(
        run_id=run.run_id,
        attempt=run.attempt if attempt is None else attempt,
        token=token,
        spec=run.spec,
        planned_steps=run.planned_steps,
        checkpoint_dir=str(checkpoint_dir),
        checkpoint=checkpoint.path if checkpoint else None,
        checkpoint_digest=checkpoint.manifest_digest if checkpoint else None,
        train_digest=run.train_digest if is_next else "",
        val_digest=run.val_digest if is_next else "",
        model_files=model.files,
        weights=model.weights,
        model_root=str(model_root),
        order_start=run.order_start if is_next else FROM_THE_BEGINNING,
        order_later=[] if is_next else list(run.order),
        mixture=run.mixture_start,
        losses=list(losses),
        patience=patience,
        last_step=last_step,
        template=template,
    )


def tool_order(
    run: Run, checkpoint: CheckpointInfo | None, model: str = "", template: ChatTemplate | None = None
) -> Order:
    """The order for a tool, built from the log: the attempt's own folder may be deleted or on another host. The tool reads config
    and tokenizer from `model`, by default the run's model folder. `template` is the chat template of the run's data."""
    if model:
        replace = msgspec.structs.replace
        spec = replace(run.spec, model=replace(run.spec.model, partial_pretrain=model))
        run = replace(run, spec=spec)
    parent = Path(checkpoint.path).parent if checkpoint else ""
    return order_of(run, checkpoint, checkpoint_dir=parent, template=template)

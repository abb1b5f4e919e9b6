"""An attempt's model folder against the record in its order, before anything is built from it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from sftd.domain.errors import Refused
from sftd.domain.model_record import ModelRecord
from sftd.domain.spec import Spec
from sftd.trainer.errors import UserError
from sftd.wire import model_digest
from sftd.wire.attempt_dir import Order, model_copy


def checked_spec(order: Order) -> Spec:
    """The spec to train with: the order's, with a model folder that is as recorded. Called by every rank; one of each host
    compares, and one of all keeps a copy of the small files.

    An attempt that starts from a checkpoint reads no weights: where the folder is gone it uses the copy. Raises
    `UserError` when the folder changed.
    """
    spec = order.spec
    if order.model_files is None:
        return spec
    copy = model_copy(Path(order.model_root), order.model_files) if order.model_root else None
    is_gone = not Path(spec.model.partial_pretrain).is_dir()
    if is_gone and order.checkpoint and copy is not None and copy.is_dir():
        model = msgspec.structs.replace(spec.model, partial_pretrain=str(copy))
        spec = msgspec.structs.replace(spec, model=model)
    if os.environ["LOCAL_RANK"] == "0":
        pretrained = order.checkpoint is None
        fix = model_digest.fork_fix(order.run_id, pretrained=pretrained)
        try:
            model_digest.refuse_changes(ModelRecord(order.model_files), spec, weights=pretrained, fix=fix)
        except Refused as refused:
            raise UserError(str(refused)) from refused
    if os.environ["RANK"] == "0" and copy is not None:
        model_digest.keep(order.model_files, spec.model.partial_pretrain, copy)
    return spec

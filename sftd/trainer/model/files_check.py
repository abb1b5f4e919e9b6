"""Compares an attempt's model folder with the record in its order, before the model is built."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from sftd.domain.errors import Refused
from sftd.domain.model.files import differences
from sftd.domain.spec.spec import Spec
from sftd.trainer.errors import UserError
from sftd.wire.attempt.directory import Order, model_copy
from sftd.wire.model import digest as model_digest


def checked_spec(order: Order) -> Spec:
    """The order's spec, with a model folder that matches the record. Called by every rank: one per host compares, and
    rank 0 keeps a copy of the small files.

    An attempt that starts from a checkpoint of the whole model reads no weights, so it uses the copy if the folder is gone.
    Raises `UserError` when the folder changed.
    """
    spec = order.spec
    weights = order.checkpoint is None or spec.model.is_partly_frozen
    if order.model_files is None:
        return spec
    copy = model_copy(Path(order.model_root), order.model_files) if order.model_root else None
    is_gone = not Path(spec.model.partial_pretrain).is_dir()
    if is_gone and not weights and copy is not None and copy.is_dir():
        model = msgspec.structs.replace(spec.model, partial_pretrain=str(copy))
        spec = msgspec.structs.replace(spec, model=model)
    if os.environ["LOCAL_RANK"] == "0":
        try:
            now = model_digest.describe(spec.model.partial_pretrain)
        except Refused as refused:
            raise UserError(str(refused)) from refused
        code = spec.model.trust_remote_code
        if changed := differences(order.model_files, now, weights=weights, code=code):
            # The fix comes first, because long messages are truncated at the end.
            fix = model_digest.fork_fix(order.run_id, weights=weights)
            raise UserError(
                f"{spec.model.partial_pretrain} changed since the run was submitted (fix: {fix}): "
                + "; ".join(f"{name}: {detail}" for name, detail in changed.items())
            )
    if os.environ["RANK"] == "0" and copy is not None:
        model_digest.keep(order.model_files, spec.model.partial_pretrain, copy)
    return spec

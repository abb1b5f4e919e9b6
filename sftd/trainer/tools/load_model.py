"""Loads the model of a checkpoint in one process, without torchrun: for answers and exports.

Reads only the model part of a checkpoint, of any layout. Creates neither an optimizer nor data-parallel buffers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.model_section import Megatron
from sftd.domain.spec.spec import Spec
from sftd.trainer.checkpoint import reading as checkpoint_reading
from sftd.trainer.checkpoint.state import restore, trained
from sftd.trainer.model import model as models
from sftd.trainer.model import weights
from sftd.trainer.model.adapters import frozen, lora
from sftd.trainer.runtime import process
from sftd.trainer.runtime import session as sessions
from sftd.trainer.runtime.session import Session


def one_rank_spec(spec: Spec, *, device: str, dtype: str | None = None) -> Spec:
    """`spec` with the layout of a single rank. `dtype`: of the weights, as in a manifest (`bfloat16`)."""
    replace = msgspec.structs.replace
    weights = dtype or spec.model.megatron.params_dtype
    megatron = msgspec.convert({"seed": spec.model.megatron.seed, "params_dtype": weights}, Megatron)
    launch = replace(spec.launch, nnodes=1, nproc_per_node=1, device=device)
    return replace(spec, model=replace(spec.model, megatron=megatron), launch=launch)


def one_rank(spec: Spec, *, device: str, dtype: str | None = None) -> Session:
    """Make this process the only rank of its world. `device` is `cpu`, `cuda` or `auto`.

    Raises `UserError` when the device is missing. End the session with `session.close`.
    """
    process.use_single_process_defaults()
    return sessions.start(one_rank_spec(spec, device=device, dtype=dtype))


def read_model(spec: Spec, shape: ModelShape, session: Session, folder: Path) -> list[GPTModel]:
    """The unsplit model of the checkpoint in `folder`, in evaluation mode.

    Call `manifest.verify` first. Raises `CheckpointInvalid` when the folder does not hold this model.
    """
    config = models.transformer_config(one_rank_spec(spec, device=session.device.type), shape, session)
    chunks = models.build(config, shape, session)
    content: dict[str, Any] = {
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    if spec.model.is_partly_frozen:
        weights.load(chunks, spec.model.partial_pretrain, shape, session.layout)
        frozen.freeze(chunks, spec.model, shape, session.layout)
    if spec.model.lora.rank:
        lora.add(chunks, spec.model, shape, session.layout, is_new=False)
    state = {f"model{i}": trained(chunk, content) for i, chunk in enumerate(chunks)}
    loaded = checkpoint_reading.load(state, folder)
    for i, chunk in enumerate(chunks):
        with checkpoint_reading.invalid_where_it_fails(folder):
            restore(chunk, loaded[f"model{i}"])
    return [chunk.eval() for chunk in chunks]

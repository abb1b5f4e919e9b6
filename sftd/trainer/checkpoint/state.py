"""This rank's part of a checkpoint as Megatron's sharded state: weights, optimizer, random streams."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel

from sftd.trainer.optimizer.state import content
from sftd.trainer.runtime.megatron_edges.training import allocate_adamw_state
from sftd.trainer.runtime.session import Session
from sftd.trainer.trainee import Trainee

# Key prefixes of the state that only a resume needs. All other keys belong to the model or to every checkpoint.
STATE_KEYS = ("optimizer.", "rng/")


def sharded_state(session: Session, trainee: Trainee, *, is_loading: bool, with_rng: bool) -> dict[str, Any]:
    """This rank's live tensors with their global offsets. `with_rng`: include the random streams."""
    layout, format_ = session.layout, content()
    # The unwrapped modules: DDP and Float16Module would prefix every name.
    state: dict[str, Any] = {f"model{i}": trained(chunk, format_) for i, chunk in enumerate(trainee.chunks)}
    allocate_adamw_state(trainee.optimizer)
    state["optimizer"] = trainee.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=format_)
    if with_rng:
        is_cuda = session.device.type == "cuda"
        streams = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if is_cuda else None,
            "streams": tensor_parallel.get_cuda_rng_tracker().get_states(),
        }
        place = (layout.pp_rank, layout.tp_rank, layout.dp_rank * layout.cp + layout.cp_rank)
        state["rng"] = ShardedObject(
            "rng", streams, (layout.pp, layout.tp, layout.dp * layout.cp), place, replica_id=0
        )
    return state


def trained(chunk: GPTModel, metadata: dict[str, Any]) -> dict[str, Any]:
    """The places of a chunk's weights in a checkpoint, without those that the run leaves frozen: the model folder has them."""
    frozen = _frozen(chunk)
    places = chunk.sharded_state_dict(metadata=metadata)
    return {name: place for name, place in places.items() if name not in frozen}


def restore(chunk: GPTModel, state: dict[str, Any]) -> None:
    """Load into a chunk what `trained` asked for. Raises what torch raises for names or shapes that do not fit."""
    own = {name: value for name, value in state.items() if not name.endswith("_extra_state")}
    chunk.load_state_dict(own | _frozen(chunk))


def _frozen(chunk: GPTModel) -> dict[str, Any]:
    return {name: p.detach() for name, p in chunk.named_parameters() if not p.requires_grad}

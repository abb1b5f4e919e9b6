"""Patches for checkpoints: planning of the files, the optimizer's share, and errors that would leave a rank waiting."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import set_crc32_options

from sftd.trainer.errors import CheckpointSaveFailed

# Private functions of Megatron and torch that size, split and write the items of a plan.
item_size = filesystem_async._item_size
split_by_size_and_type = filesystem_async._split_by_size_and_type
write_item = filesystem._write_item
WriterTransforms = filesystem._StorageWriterTransforms


@contextlib.contextmanager
def keep_rank_zero_in_step() -> Iterator[None]:
    """Delay rank 0's errors at the end of a save until the block ends, then raise `CheckpointSaveFailed`.

    state_dict_saver.py:243 (`.metadata`) and serialization.py:449 (`metadata.json`) write on rank 0 only, between
    collectives. An error there would leave the other ranks in a broadcast or barrier that rank 0 never joins.
    """
    held: list[Exception] = []

    def guard(write: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except Exception as error:  # noqa: BLE001  raised again below
                held.append(error)

        return call

    writer = filesystem_async.FileSystemWriterAsync
    finish, save_config = writer.finish, serialization.save_config
    writer.finish, serialization.save_config = guard(finish), guard(save_config)
    try:
        yield
    finally:
        writer.finish, serialization.save_config = finish, save_config
    if held:
        raise CheckpointSaveFailed(f"{type(held[0]).__name__}: {held[0]}") from held[0]


def plan_saves_with(plan_files: Callable[[SavePlan, SavePlanner, str, int], list[Any]]) -> None:
    """Have Megatron plan a save with `plan_files(plan, planner, prefix, files)`. The result is in the request's arguments.

    Megatron's own writer (filesystem_async.py) clones tensors that share memory, moves everything to the host at once,
    writes the files one by one, and spawns a Manager process to collect the results of its own threads.
    """

    def prepare(self: Any, plan: SavePlan, planner: SavePlanner) -> None:
        self.write_buckets = plan_files(plan, planner, plan.storage_data.prefix, self.thread_count)
        self.results_queue = _Results()

    filesystem_async.FileSystemWriterAsync.prepare_write_data = prepare
    # torch.save computes the CRC of each tensor while holding the GIL. The manifest has the sha256 of the whole file.
    set_crc32_options(False)


class _Results:
    """Replaces the queue in Megatron's `retrieve_write_results`."""

    def __init__(self) -> None:
        self._results: dict[int, list[WriteResult]] = {}

    def put(self, results: dict[int, list[WriteResult]]) -> None:
        self._results = results

    def get_nowait(self) -> dict[int, list[WriteResult]]:
        return self._results


def store_share(part: DistributedOptimizer, share: Callable[[dict[str, Any]], Any]) -> None:
    """Have a part of the optimizer store and load `share(model's state)`. The originals (distrib_optimizer.py:1223 and
    :1690) gather the whole state in the host memory of every rank."""

    def param_state(model: dict[str, Any], *_: object, **__: object) -> Any:
        return share(model)

    part.sharded_param_state_fully_reshardable = param_state
    # Nothing to do: the tensors of `share` are views of the optimizer's own, so the load has already filled those.
    part.load_parameter_state_from_fully_reshardable = lambda _: None


def optimizer_tensors(part: DistributedOptimizer, parameter: Tensor) -> dict[str, Tensor]:
    """This rank's share of a parameter's master copy (`param`; with the lean optimizer of itself) and of AdamW's state. As
    distrib_optimizer.py:1090, which expects FusedAdam where there is no master copy."""
    group, index = part.model_param_group_index_map[parameter]
    share = part.optimizer.param_groups[group]["params"][index]
    return {"param": share, **part.optimizer.state[share]}

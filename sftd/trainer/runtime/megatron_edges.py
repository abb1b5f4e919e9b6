"""Where megatron-core 0.19.2 does not fit without an accelerator, TransformerEngine or Apex, and the way round.

Every function names the line that makes it necessary, so that a Megatron upgrade shows which can be deleted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.jit import disable_jit_fuser
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import token_dispatcher

from sftd.trainer.errors import CheckpointSaveFailed


class CpuRngTracker(megatron_random.CudaRNGStatesTracker):
    """Megatron's named random streams on the CPU generator (random.py:303 makes CUDA states)."""

    def add(self, name: str, seed: int) -> None:
        """Start the stream `name` from `seed`. Raises `ValueError` when either is taken."""
        self._is_initialized = True
        if seed in self.seeds_ or name in self.states_:
            raise ValueError(f"random stream {name!r} or seed {seed} already exists")
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Draw from the stream `name` inside the block."""
        outer = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)


def install_for_cpu() -> None:
    """Random streams on the CPU generator (random.py), no torch.compile of tiny fusions (jit.py; 15 s, no gain), and the
    all-to-all dispatcher of experts without an accelerator: token_dispatcher.py:469 would make a side stream on a GPU, and
    moe_utils.py:1184 turns the sizes of the all-to-all into numbers only on their way from a GPU.
    """
    megatron_random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    disable_jit_fuser()
    token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = torch.cuda.current_stream()
    token_dispatcher.maybe_move_tensor_to_cpu = _as_numbers


def _as_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


@contextlib.contextmanager
def keep_rank_zero_in_step() -> Iterator[None]:
    """Hold back what rank 0 raises at the end of a save until every rank is through; then raise `CheckpointSaveFailed`.

    state_dict_saver.py:243 (`.metadata`) and serialization.py:449 (`metadata.json`) write on rank 0 alone, between
    collectives: an error there leaves the others in a broadcast or barrier that rank 0 never joins.
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


def parts_of(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of a chain (one for each kind of parameter, such as experts), or the one itself."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def adamw_of(optimizer: MegatronOptimizer) -> Iterator[torch.optim.AdamW]:
    """torch's AdamW inside each part."""
    for part in parts_of(optimizer):
        if isinstance(inner := getattr(part, "optimizer", None), torch.optim.AdamW):
            yield inner


def use_torch_adamw() -> None:
    """Have Megatron make torch's AdamW whatever is installed (optimizer/__init__.py:13 prefers TransformerEngine's, then
    Apex's): the numbers of a run and the format of its checkpoints must not hang on a package that comes or goes."""
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = True


def fuse_adamw(optimizer: MegatronOptimizer, device: torch.device) -> None:
    """One kernel for all of AdamW where the weights are on a GPU: Megatron asks for it only of TransformerEngine's or
    Apex's Adam. Also after a load, which restores the settings of the run that saved."""
    for adamw in adamw_of(optimizer):
        for group in adamw.param_groups:
            # Not by the parameters: a rank's share of a group may be empty, and the ranks must say the same.
            group["fused"] = device.type == "cuda"
            for parameter in group["params"] if group["fused"] else ():
                if "step" in (state := adamw.state[parameter]):
                    state["step"] = state["step"].to(parameter.device)


def allocate_adamw_state(optimizer: MegatronOptimizer) -> None:
    """Allocate AdamW's lazy state: distrib_optimizer.py:838 asserts that it is there, for a load and for a save. Before the
    first update it is not, and every step before a save may have been skipped."""
    for adamw in adamw_of(optimizer):
        for group in adamw.param_groups:
            for parameter in group["params"]:
                if not adamw.state[parameter]:
                    adamw.state[parameter].update(
                        step=torch.tensor(0.0, device=parameter.device if group["fused"] else None),
                        exp_avg=torch.zeros_like(parameter),
                        exp_avg_sq=torch.zeros_like(parameter),
                    )


def separate_adamw_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its own `step` after a load.

    DistributedOptimizer.load_state_dict puts one tensor into all of them, and AdamW would then count it up once per
    parameter: a silently wrong bias correction.
    """
    for adamw in adamw_of(optimizer):
        for state in adamw.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

"""Gradients and AdamW without Apex and TransformerEngine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import layers
from torch import Tensor


def accumulate_weight_gradients(accumulate: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    """Have Megatron's linear layers call `accumulate(inputs, d_outputs, main_grad)` for the gradient of a weight, unless
    Apex is installed: layers.py:680 knows only the function of its module."""
    module: Any = layers
    if not module._grad_accum_fusion_available:
        module.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
        module._grad_accum_fusion_available = True


def be_deterministic(is_on: bool) -> None:
    """torch's deterministic mode. It would also fill every torch.empty; nothing here reads uninitialised memory."""
    torch.use_deterministic_algorithms(is_on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


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

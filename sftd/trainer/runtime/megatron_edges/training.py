"""Patches for gradients and AdamW without Apex and TransformerEngine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.tensor_parallel import layers
from torch import Tensor


def accumulate_weight_gradients(accumulate: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    """Have Megatron's linear layers call `accumulate(inputs, d_outputs, main_grad)` for the gradient of a weight, unless
    Apex is installed: layers.py:680 supports Apex's function only."""
    module: Any = layers
    if not module._grad_accum_fusion_available:
        module.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
        module._grad_accum_fusion_available = True


def be_deterministic(is_on: bool) -> None:
    """Set torch's deterministic mode, without its fill of every torch.empty: no code here reads uninitialised memory."""
    torch.use_deterministic_algorithms(is_on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def parts_of(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of a chain (one per kind of parameter, such as experts), or the single one."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def adamw_of(optimizer: MegatronOptimizer) -> Iterator[torch.optim.AdamW]:
    """torch's AdamW inside each part."""
    for part in parts_of(optimizer):
        if isinstance(inner := getattr(part, "optimizer", None), torch.optim.AdamW):
            yield inner


def use_torch_adamw() -> None:
    """Have Megatron always use torch's AdamW. By default it prefers TransformerEngine's, then Apex's
    (optimizer/__init__.py:13), so a run's numbers and checkpoint format would depend on the installed packages."""
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = True


def keep_no_master_weights(config: OptimizerConfig) -> None:
    """Have DistributedOptimizer hand out shares of the BF16 weights themselves, with FP32 gradients in `decoupled_grad`.
    optimizer_config.py:404 allows it with TransformerEngine's FusedAdam only."""
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True


def has_master_weights(part: MegatronOptimizer) -> bool:
    """Whether a part of the optimizer keeps FP32 copies of BF16 weights."""
    config = part.config
    is_lean: bool = config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    return config.params_dtype != torch.float32 and not is_lean


def fuse_adamw(optimizer: MegatronOptimizer, device: torch.device) -> None:
    """Use torch's fused AdamW on a GPU. Megatron requests it only for TransformerEngine's or Apex's Adam. Call this after
    a load too, which restores the settings of the run that saved."""
    for adamw in adamw_of(optimizer):
        for group in adamw.param_groups:
            # Decided by the device, not the parameters: a rank's share may be empty, and all ranks must agree.
            group["fused"] = device.type == "cuda"
            for parameter in group["params"] if group["fused"] else ():
                if "step" in (state := adamw.state[parameter]):
                    state["step"] = state["step"].to(parameter.device)


def allocate_adamw_state(optimizer: MegatronOptimizer) -> None:
    """Allocate AdamW's lazy state: distrib_optimizer.py:838 asserts that it exists, for a load and for a save. It does not
    exist before the first update, and all steps before a save may have been skipped."""
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

    DistributedOptimizer.load_state_dict shares one tensor among all of them. AdamW would increment it once per parameter,
    which silently breaks the bias correction.
    """
    for adamw in adamw_of(optimizer):
        for state in adamw.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

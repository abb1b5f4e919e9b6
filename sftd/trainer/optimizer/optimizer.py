"""AdamW in Megatron's distributed optimizer, sharded over the data-parallel ranks: FP32 master weights and moments, or those
of `lean`."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from sftd.domain.spec.spec import Spec
from sftd.trainer.optimizer.lean import LeanAdamW
from sftd.trainer.optimizer.state import content, install_optimizer_state, own_pieces
from sftd.trainer.runtime.megatron_edges.saving import optimizer_tensors
from sftd.trainer.runtime.megatron_edges.training import (
    adamw_of,
    allocate_adamw_state,
    fuse_adamw,
    keep_no_master_weights,
    parts_of,
    use_torch_adamw,
)
from sftd.trainer.runtime.session import Session


def build(spec: Spec, model: list[DistributedDataParallel], session: Session) -> MegatronOptimizer:
    """The optimizer of this rank's chunks. Norms and biases (one-dimensional parameters) get no weight decay."""
    o = spec.optimizer
    config = OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        # Megatron's scheduler is not used, but OptimizerConfig rejects None.
        min_lr=0.0,
        weight_decay=o.weight_decay,
        adam_beta1=o.adam_beta1,
        adam_beta2=o.adam_beta2,
        adam_eps=o.adam_eps,
        bf16=session.dtype == torch.bfloat16,
        params_dtype=session.dtype,
        use_distributed_optimizer=True,
    )
    use_torch_adamw()
    if o.precision == "lean":
        keep_no_master_weights(config)
    optimizer = get_megatron_optimizer(config, model, use_gloo_process_groups=False)
    if o.precision == "lean":
        _make_lean(optimizer, model, spec.model.megatron.seed)
    install_optimizer_state(optimizer)
    configure(spec, optimizer, session)
    return optimizer


def _make_lean(optimizer: MegatronOptimizer, model: list[DistributedDataParallel], seed: int) -> None:
    places = {f"model{i}": _core(m).sharded_state_dict(metadata=content()) for i, m in enumerate(model)}
    for part in parts_of(optimizer):
        if not isinstance(part, DistributedOptimizer) or part.is_stub_optimizer:
            continue
        own = {
            optimizer_tensors(part, parameter)["param"]: [(p.taken, p.rectangle) for p in pieces]
            for parameter, pieces in own_pieces(part, places)
        }
        part.optimizer = LeanAdamW(part.optimizer.param_groups, own, seed)
    allocate_adamw_state(optimizer)


def _core(model: torch.nn.Module) -> GPTModel:
    return model if isinstance(model, GPTModel) else _core(cast(torch.nn.Module, model.module))


def configure(spec: Spec, optimizer: MegatronOptimizer, session: Session) -> None:
    """Apply the spec's settings. Needed at the start and after a load, which restores those of the run that saved."""
    o = spec.optimizer
    if o.precision == "full":
        fuse_adamw(optimizer, session.device)
    for group in optimizer.param_groups:
        # Megatron's scheduler would do this.
        group["weight_decay"] = o.weight_decay * group["wd_mult"]
        group["betas"], group["eps"] = (o.adam_beta1, o.adam_beta2), o.adam_eps


def take_peak(spec: Spec, state: object) -> None:
    """Replace the peak learning rate in a loaded state by the spec's. Megatron identifies a parameter group by it
    (distrib_optimizer.py:943), and a fork may change it."""
    if isinstance(state, dict):
        if "max_lr" in state:
            state["max_lr"] = spec.optimizer.lr
        for inner in state.values():
            take_peak(spec, inner)
    elif isinstance(state, list):
        for inner in state:
            take_peak(spec, inner)


def set_learning_rate(optimizer: MegatronOptimizer, value: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = value


@torch.no_grad()
def update(
    optimizer: MegatronOptimizer, clip_grad: float, accept: Callable[[Tensor], bool] | None = None
) -> Tensor:
    """Clip the accumulated gradients to the norm `clip_grad` (0: no clipping) and update the weights.

    Skips both if `accept(norm)` is false. Returns the norm before clipping, FP64 scalar on the device. Waits for a GPU
    only in `accept`.
    """
    optimizer.prepare_grads()
    norm = _grad_norm(optimizer)
    if accept is not None and not accept(norm):
        return norm
    if clip_grad:
        # As in torch.nn.utils.clip_grad_norm_.
        _scale(optimizer, (clip_grad / (norm + 1e-6)).clamp(max=1.0).float())
    optimizer.step_with_ready_grads()
    return norm


def _grad_norm(optimizer: MegatronOptimizer) -> Tensor:
    squares = []
    for part in parts_of(optimizer):
        grads = part.get_grads_for_grad_norm() if part.get_parameters() else []
        norms = torch._foreach_norm(grads) if grads else [torch.zeros((), device=torch.cuda.current_device())]
        square = torch.stack(list(norms)).double().square().sum()
        dist.all_reduce(square, group=part.get_grad_stats_parallel_group())
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def _scale(optimizer: MegatronOptimizer, factor: Tensor) -> None:
    for adamw in adamw_of(optimizer):
        if isinstance(adamw, LeanAdamW):
            adamw.factor = factor
        elif adamw.param_groups[0].get("fused"):
            # The fused kernel divides the gradients by it (torch's GradScaler does the same).
            adamw.grad_scale = factor.reciprocal()  # type: ignore[attr-defined]
        else:
            grads = [p.grad for group in adamw.param_groups for p in group["params"] if p.grad is not None]
            if grads:
                torch._foreach_mul_(grads, factor)

"""AdamW in Megatron's distributed optimizer: FP32 master weights and moments, sharded over the data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from sftd.domain.spec.spec import Spec
from sftd.trainer.optimizer.state import install_optimizer_state
from sftd.trainer.runtime.megatron_edges.training import adamw_of, fuse_adamw, parts_of, use_torch_adamw
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
    optimizer = get_megatron_optimizer(config, model, use_gloo_process_groups=False)
    install_optimizer_state(optimizer)
    configure(spec, optimizer, session)
    return optimizer


def configure(spec: Spec, optimizer: MegatronOptimizer, session: Session) -> None:
    """Apply the spec's settings. Needed at the start and after a load, which restores those of the run that saved."""
    o = spec.optimizer
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
        if adamw.param_groups[0].get("fused"):
            # The fused kernel divides the gradients by it (torch's GradScaler does the same).
            adamw.grad_scale = factor.reciprocal()  # type: ignore[attr-defined]
        else:
            grads = [p.grad for group in adamw.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(grads, factor)

"""AdamW in Megatron's distributed optimizer: FP32 master weights and moments, sharded over the data-parallel ranks."""

from __future__ import annotations

import math

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from sftd.domain.spec import Spec
from sftd.trainer.megatron_edges import install_optimizer_state
from sftd.trainer.session import Session


def build(spec: Spec, model: list[DistributedDataParallel], session: Session) -> MegatronOptimizer:
    """The optimizer of this rank's chunks. Norms and biases (one-dimensional parameters) get no weight decay."""
    o = spec.optimizer
    config = OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        # Megatron's scheduler is not used (see schedule.py), but None is refused.
        min_lr=0.0,
        weight_decay=o.weight_decay,
        adam_beta1=o.adam_beta1,
        adam_beta2=o.adam_beta2,
        adam_eps=o.adam_eps,
        # Megatron computes the norm only when it clips.
        clip_grad=o.clip_grad or math.inf,
        bf16=session.dtype == torch.bfloat16,
        params_dtype=session.dtype,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(config, model, use_gloo_process_groups=False)
    install_optimizer_state(optimizer)
    for group in optimizer.param_groups:
        # What Megatron's scheduler would do.
        group["weight_decay"] = o.weight_decay * group["wd_mult"]
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, value: float) -> None:
    """Use `value` for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = value

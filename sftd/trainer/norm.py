"""RMSNorm for the layer spec."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension (Zhang & Sennrich 2019).

    Megatron's own torch norm refuses sequence parallelism (torch_norm.py:50). All it lacks is the tag on the weight
    by which Megatron sums the gradients of the ranks' shares of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

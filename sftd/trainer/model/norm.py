"""RMSNorm as a module of the layer spec."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from sftd.trainer.model import ops


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm over the last dimension, by `ops.rms_norm`.

    Megatron's own torch norm rejects sequence parallelism (torch_norm.py:50), which needs only a tag on the weight:
    Megatron then sums the weight's gradients over the shares of the sequence.
    """

    eps: float

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._offset = config.model_shape.norm_offset

    @property
    def scale(self) -> Tensor:
        """What the normalised input is multiplied by: the weight, or in FP32 its sum with the family's offset."""
        return self.weight.float() + self._offset if self._offset else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., h] → [..., h]."""
        return ops.rms_norm(x, self.scale, self.eps)

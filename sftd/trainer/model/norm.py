"""RMSNorm as modules of a layer."""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
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


class HeadsNorm(RMSNorm):
    """RMSNorm over all heads of queries or keys together, of which each tensor-parallel rank has a part."""

    def __init__(self, config: TransformerConfig, heads: int) -> None:
        self._group = parallel_state.get_tensor_model_parallel_group()
        self._width = heads * config.kv_channels
        super().__init__(config, self._width // self._group.size(), config.layernorm_epsilon)
        weight: Any = self.weight
        # Its gradient is whole on the rank that holds it.
        weight.sequence_parallel = False
        weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, 0, 1

    def forward(self, x: Tensor) -> Tensor:
        """x [..., heads of this rank, d] → the same shape."""
        flat = x.flatten(-2)
        if self._group.size() == 1:
            return super().forward(flat).view(x.shape)
        flat = flat.float()
        # Every rank's output depends on the sum, so backward sums its gradient too.
        total = reduce_from_tensor_model_parallel_region(flat.square().sum(-1, keepdim=True))
        total = copy_to_tensor_model_parallel_region(total)
        normed = flat * torch.rsqrt(total / self._width + self.eps) * self.scale
        return normed.to(x.dtype).view(x.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The weight's place in a checkpoint."""
        state = self.state_dict(prefix="", keep_vars=True)
        groups = {"tp_group": self._group, "dp_cp_group": metadata["dp_cp_group"]}
        found = make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **groups)
        return cast(dict[str, Any], found)

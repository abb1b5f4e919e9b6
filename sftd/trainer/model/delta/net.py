"""The gated delta net as a module of the layer spec, in the place of Megatron's attention, and its layer."""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sftd.trainer.data.sequence_layout import KeyValueCache, SequenceLayout
from sftd.trainer.model.delta.rule import convolve, gated_delta_rule, gated_rms_norm
from sftd.trainer.model.delta.segments import chunks_of
from sftd.trainer.model.layer import DecoderLayer


class GatedDeltaNet(MegatronModule):
    """Projections of the hidden states, a short convolution, the gated delta rule, and a gated norm (transformers
    `Qwen3_5GatedDeltaNet`).

    Tensor-parallel ranks have equal parts of the key heads, with their value heads. The rows of `linear_in` are, for each key
    head: query, key, its value heads' values, their gates, their betas, their decays; those of `convolution` the first three.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **_: object) -> None:
        super().__init__(config=config)
        shape, tp = config.model_shape, parallel_state.get_tensor_model_parallel_world_size()
        self.layer_number, self.eps = layer_number, shape.rms_norm_eps
        self.key_heads = shape.delta_key_heads // tp
        self.sizes, self.value_dim = shape.delta_rows, shape.delta_value_dim
        values, shared = self.sizes[3:5]
        options: dict[str, Any] = {"config": config, "init_method": config.init_method, "bias": False}
        self.linear_in = ColumnParallelLinear(
            shape.hidden_size, shape.delta_key_heads * sum(self.sizes), gather_output=False, **options
        )
        self.linear_proj = RowParallelLinear(
            shape.delta_key_heads * values,
            shape.hidden_size,
            input_is_parallel=True,
            skip_bias_add=True,
            **options,
        )
        self.convolution = self._parameter(self.key_heads * sum(self.sizes[:3]), shape.delta_kernel)
        self.log_decay, self.decay_bias = (self._parameter(self.key_heads * shared) for _ in range(2))
        self.norm = self._parameter(self.value_dim, is_split=False)

    def _parameter(self, *sizes: int, is_split: bool = True) -> torch.nn.Parameter:
        device = "cpu" if self.config.use_cpu_initialization else torch.cuda.current_device()
        found = torch.nn.Parameter(torch.empty(sizes, dtype=self.config.params_dtype, device=device))
        if is_split:
            set_tensor_model_parallel_attributes(found, is_parallel=True, dim=0, stride=1)
        return found

    def mix(self, projected: Tensor, layout: SequenceLayout) -> Tensor:
        """Output of `linear_in` [s, b, …] → input of `linear_proj` [s, b, value heads · e]."""
        if layout.cache is not None:
            return self._continued(projected, layout, layout.cache)
        ends = (0, projected.shape[0]) if layout.chunks is None else tuple(layout.chunks[0].key_ends)
        # Saves its input only: the FP32 tensors in it would take many times the memory of the layer's others.
        return checkpoint(
            self._mix, projected, layout.positions, ends, use_reentrant=False, preserve_rng_state=False
        )

    def _mix(self, projected: Tensor, positions: Tensor, ends: tuple[int, ...]) -> Tensor:
        rows = projected.shape[1]
        by_head = projected.unflatten(-1, (self.key_heads, -1))
        convolved, gate, beta, step = by_head.split((sum(self.sizes[:3]), *self.sizes[3:]), dim=-1)
        mixed = convolve(convolved.flatten(2), self.convolution, positions).to(projected.dtype)
        q, k, v = mixed.flatten(0, 1).unflatten(-1, (self.key_heads, -1)).split(self.sizes[:3], dim=-1)
        beta, step = (x.float().flatten(2).flatten(0, 1) for x in (beta, step))
        decay = -self.log_decay.float().exp() * torch.nn.functional.softplus(step + self.decay_bias.float())
        v = v.reshape(v.shape[0], -1, self.value_dim)
        out = gated_delta_rule(q, k, v, decay, beta.sigmoid(), chunks_of(ends, rows, projected.device))
        # Each rank has the part of the norm's gradient that its heads give.
        norm = copy_to_tensor_model_parallel_region(self.norm)
        gated = gated_rms_norm(out, gate.reshape(out.shape), norm, self.eps).to(projected.dtype)
        return gated.flatten(1).unflatten(0, (-1, rows))

    def _continued(self, projected: Tensor, layout: SequenceLayout, cache: KeyValueCache) -> Tensor:
        """`mix` of tokens that follow the cached ones. The cache has `linear_in`'s output and no state: a new token costs the
        recurrence of all tokens of its answer, which is exact."""
        (held,) = cache.append(self.layer_number, layout.positions, projected.transpose(0, 1)[:, None])
        whole = held[:, 0].transpose(0, 1)
        places = torch.arange(whole.shape[0], device=whole.device)
        # Padding follows an answer's tokens, so it does not change them.
        mixed = self._mix(whole, places, (0, whole.shape[0]))
        columns = torch.arange(whole.shape[1], device=whole.device)
        return mixed[layout.positions.view(projected.shape[0], -1), columns]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The places of the parameters in a checkpoint."""
        found: dict[str, Any] = {}
        for name in ("linear_in", "linear_proj"):
            found |= getattr(self, name).sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata)
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        axes = dict.fromkeys(("convolution", "log_decay", "decay_bias"), 0)
        group = parallel_state.get_tensor_model_parallel_group()
        return found | make_sharded_tensors_for_checkpoint(
            own, prefix, axes, sharded_offsets, tp_group=group, dp_cp_group=metadata["dp_cp_group"]
        )


class DeltaLayer(DecoderLayer):
    """A layer with a gated delta net in the place of attention."""

    def project_in(self, normed: Tensor) -> Tensor:
        """[s, b, h] → [s, b, …]."""
        projected, _bias = self.self_attention.linear_in(normed)
        return cast(Tensor, projected)

    def attend(self, qkv: Tensor, angles: Tensor, layout: Any) -> Tensor:
        """Output of `linear_in` [s, b, …] → [s, b, value heads · e]."""
        return cast(Tensor, self.self_attention.mix(qkv, layout))

"""DeepSeek-V3: multi-head latent attention (MLA, DeepSeek-AI 2024) computes keys and values from a few latent dimensions of a
token.

Tensor-parallel ranks share the heads. The projections to the latent dimensions are whole on every rank, which computes them for
all tokens, or with sequence parallelism for its share.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from sftd.domain.model.shape import ModelShape
from sftd.trainer.model import ops
from sftd.trainer.model.attention import CausalAttention
from sftd.trainer.model.families.rules import Rule, mlp_rules, norm_rules
from sftd.trainer.model.families.seam import TrainedFamily
from sftd.trainer.model.layer import DecoderLayer, decoder_layer
from sftd.trainer.model.norm import RMSNorm
from sftd.trainer.model.rope import score_gain

# transformers does not use the model's.
_EPS = 1e-6
_OPTIONS: dict[str, Any] = {"bias": False, "skip_bias_add": False, "is_expert": False}


class LatentAttention(MegatronModule):
    """The projections of MLA, and `CausalAttention` between them."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection, **_: object
    ) -> None:
        super().__init__(config)
        shape = self.shape = config.model_shape
        h, heads, latent = shape.hidden_size, shape.num_attention_heads, shape.kv_lora_rank
        options = _OPTIONS | {
            "config": config,
            "init_method": config.init_method,
            "tp_group": pg_collection.tp,
        }
        self.linear_q_a: Any = None
        self.q_a_layernorm: Any = None
        if shape.q_lora_rank:
            self.linear_q_a = _Whole(config, h, shape.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config, shape.q_lora_rank, _EPS)
        column = options | {"gather_output": False}
        self.linear_q = ColumnParallelLinear(shape.q_lora_rank or h, heads * shape.head_dim, **column)
        self.linear_kv_a = _Whole(config, h, latent + shape.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config, latent, _EPS)
        rows = heads * (shape.head_dim - shape.qk_rope_head_dim + shape.v_head_dim)
        self.linear_kv_b = ColumnParallelLinear(latent, rows, **column)
        scale = score_gain(shape) * shape.head_dim**-0.5
        self.core_attention = CausalAttention(config, layer_number, None, "self", softmax_scale=scale)
        self.linear_proj = RowParallelLinear(heads * shape.v_head_dim, h, input_is_parallel=True, **options)
        self.heads = heads // pg_collection.tp.size()

    def project_in(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [s, b, h] (with sequence parallelism this rank's share of s) → of all tokens: queries
        [s, b, heads, d], keys without their rotated part beside values [s, b, heads, …], and that part [s, b, 1, r]."""
        shape, queries = self.shape, normed
        if self.linear_q_a is not None:
            queries = self.q_a_layernorm(self.linear_q_a(normed))
        q, _bias = self.linear_q(queries)
        latent, rotated = self.linear_kv_a(normed).split((shape.kv_lora_rank, shape.qk_rope_head_dim), dim=-1)
        kv, _bias = self.linear_kv_b(self.kv_a_layernorm(latent))
        if self.config.sequence_parallel:
            rotated = gather_from_sequence_parallel_region(rotated)
        else:
            rotated = copy_to_tensor_model_parallel_region(rotated)
        return *(x.unflatten(-1, (self.heads, -1)) for x in (q, kv)), rotated[:, :, None]

    def attend(self, projected: tuple[Tensor, Tensor, Tensor], angles: Tensor, layout: Any) -> Tensor:
        """The result of `project_in` and `RotaryEmbedding`'s output → [s, b, heads · v_head_dim]."""
        q, kv, rotated = projected
        shape = self.shape
        own = shape.head_dim - shape.qk_rope_head_dim
        is_interleaved = shape.rope_interleaved
        q_own, q_rotated = q.split((own, shape.qk_rope_head_dim), dim=-1)
        q = torch.cat((q_own, ops.rotate(q_rotated, angles, is_interleaved=is_interleaved)), dim=-1)
        k_own, v = kv.split((own, shape.v_head_dim), dim=-1)
        rotated = ops.rotate(rotated, angles, is_interleaved=is_interleaved)
        k = torch.cat((k_own, rotated.expand(-1, -1, self.heads, -1)), dim=-1)
        missing = shape.head_dim - shape.v_head_dim
        # The fused kernels, and the exchange of keys and values between ranks, take one width only.
        if missing and (q.is_cuda or self.config.context_parallel_size > 1):
            wide = self.core_attention(q, k, F.pad(v, (0, missing)), None, packed_seq_params=layout)
            return wide.unflatten(-1, (self.heads, -1))[..., : shape.v_head_dim].flatten(-2)
        return cast(Tensor, self.core_attention(q, k, v, None, packed_seq_params=layout))


class _Whole(torch.nn.Linear):
    """A product whose weight every tensor-parallel rank holds whole."""

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int) -> None:
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(inputs, outputs, bias=False, dtype=config.params_dtype, device=device)
        # Megatron then sums the weight's gradients over the shares of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        """Leave the weight unset: it is loaded."""


class LatentLayer(DecoderLayer):
    """A layer with `LatentAttention`."""

    def project_in(self, normed: Tensor) -> Any:
        """See `LatentAttention.project_in`."""
        return self.self_attention.project_in(normed)

    def attend(self, qkv: Any, angles: Tensor, layout: Any) -> Tensor:
        """See `LatentAttention.attend`."""
        return cast(Tensor, self.self_attention.attend(qkv, angles, layout))


def _layer(shape: ModelShape, number: int) -> Any:
    spec = decoder_layer(shape, LatentLayer, number)
    spec.submodules.self_attention = ModuleSpec(module=LatentAttention)
    return spec


def _rules(shape: ModelShape, layer: int, experts: range) -> list[Rule]:
    rules = [
        Rule("linear_q.weight", ("q_b_proj.weight" if shape.q_lora_rank else "q_proj.weight",), "rows"),
        Rule("linear_kv_a.weight", ("kv_a_proj_with_mqa.weight",)),
        Rule("kv_a_layernorm.weight", ("kv_a_layernorm.weight",)),
        Rule("linear_kv_b.weight", ("kv_b_proj.weight",), "rows"),
        Rule("linear_proj.weight", ("o_proj.weight",), "columns"),
    ]
    if shape.q_lora_rank:
        rules.append(Rule("linear_q_a.weight", ("q_a_proj.weight",)))
        rules.append(Rule("q_a_layernorm.weight", ("q_a_layernorm.weight",)))
    attention = [rule.below("self_attention.", "self_attn.") for rule in rules]
    return [*norm_rules(shape), *attention, *mlp_rules(shape, layer, experts)]


FAMILY = TrainedFamily(layer_rules=_rules, layer_spec=_layer)

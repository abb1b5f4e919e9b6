"""DeepSeek-V3: latent attention; experts with a sigmoid router after the first layers."""

from __future__ import annotations

from sftd.domain.model.shape import ModelShape
from sftd.trainer.model.families.llama import mixed
from sftd.trainer.model.families.rules import Rule
from sftd.trainer.model.families.seam import TrainedFamily
from sftd.trainer.model.latent_attention import latent_layer

# fmt: off
_LATENT_QUERIES = (
    Rule("self_attention.linear_q_a.weight", ("self_attn.q_a_proj.weight",)),
    Rule("self_attention.q_a_layernorm.weight", ("self_attn.q_a_layernorm.weight",)),
    Rule("self_attention.linear_q.weight", ("self_attn.q_b_proj.weight",), "rows"),
)
_QUERIES = (Rule("self_attention.linear_q.weight", ("self_attn.q_proj.weight",), "rows"),)
_REST = (
    Rule("input_layernorm.weight", ("input_layernorm.weight",)),
    Rule("self_attention.linear_kv_a.weight", ("self_attn.kv_a_proj_with_mqa.weight",)),
    Rule("self_attention.kv_a_layernorm.weight", ("self_attn.kv_a_layernorm.weight",)),
    Rule("self_attention.linear_kv_b.weight", ("self_attn.kv_b_proj.weight",), "rows"),
    Rule("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), "columns"),
    Rule("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",)),
)
# fmt: on


def _attention(shape: ModelShape) -> list[Rule]:
    return [*(_LATENT_QUERIES if shape.q_lora_rank else _QUERIES), *_REST]


FAMILY = TrainedFamily(layer_rules=mixed(_attention, "shared_experts"), layer_spec=latent_layer)

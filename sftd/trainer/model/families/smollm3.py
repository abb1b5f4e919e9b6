"""SmolLM3: Llama's tensors, and layers whose queries and keys have no positions (NoPE)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sftd.domain.model.shape import ModelShape
from sftd.trainer.model import ops
from sftd.trainer.model.families.llama import dense
from sftd.trainer.model.families.seam import TrainedFamily
from sftd.trainer.model.layer import DecoderLayer, decoder_layer


class UnrotatedLayer(DecoderLayer):
    """A layer without rotary embedding."""

    def attend(self, qkv: Tensor, angles: Tensor, layout: Any) -> Tensor:
        """Megatron's qkv [s, b, …] → [s, b, heads · d]."""
        attention = self.self_attention
        q, k, v = ops.split_qkv(
            qkv, attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        )
        return attention.core_attention(q, k, v, None, packed_seq_params=layout)


def _layer(shape: ModelShape, number: int) -> Any:
    return decoder_layer(shape, UnrotatedLayer if number in shape.layers_without_rope else DecoderLayer)


FAMILY = TrainedFamily(layer_rules=dense(), layer_spec=_layer)

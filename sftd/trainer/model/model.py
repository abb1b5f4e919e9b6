"""The model, built with Megatron's GPTModel and used through `loss_share` and `decoding.predict`.

megatron-core 0.19 deprecates GPTModel in favour of HybridModel, but Megatron-Bridge 0.6 still maps every dense family
to GPTModel. A switch would change this module, `layer` and the tables of `families` only.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from sftd.domain.model.parameters import padded_vocabulary
from sftd.domain.model.shape import ModelShape
from sftd.domain.model.weights import layer_kinds
from sftd.domain.spec.spec import Spec
from sftd.trainer.data.batches import MicroBatch
from sftd.trainer.model.embedding import embed
from sftd.trainer.model.families.seam import family_of
from sftd.trainer.model.gradients import accumulate_weight_gradient
from sftd.trainer.model.grouped import experts as grouped
from sftd.trainer.model.loss import linear_cross_entropy, softcapped
from sftd.trainer.model.moe import experts
from sftd.trainer.model.norm import RMSNorm
from sftd.trainer.model.rope import RotaryEmbedding
from sftd.trainer.runtime.megatron_edges.training import accumulate_weight_gradients
from sftd.trainer.runtime.session import Session


def transformer_config(spec: Spec, shape: ModelShape, session: Session) -> TransformerConfig:
    """Megatron's config of the model, with the layout of `spec`."""
    layout, is_cpu = session.layout, session.device.type == "cpu"
    recompute: dict[str, Any] = {}
    if spec.model.enable_gradient_checkpointing and spec.model.recompute == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
        if spec.model.recompute_layers:
            recompute |= {"recompute_method": "block", "recompute_num_layers": spec.model.recompute_layers}
    elif spec.model.enable_gradient_checkpointing:
        # DecoderLayer reads this.
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
    accumulate_weight_gradients(accumulate_weight_gradient)
    config = TransformerConfig(
        num_layers=shape.num_hidden_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.intermediate_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        # Of attention's output, and of the router and the experts.
        add_bias_linear=shape.output_bias,
        add_qkv_bias=shape.attention_bias,
        attention_output_gate=shape.attention_gate,
        qk_layernorm=shape.qk_norm and not shape.qk_norm_over_heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Every parameter is loaded, so random values would be wasted.
        perform_initialization=False,
        use_cpu_initialization=is_cpu,
        params_dtype=session.dtype,
        pipeline_dtype=session.dtype,
        bf16=session.dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        sequence_parallel=spec.model.megatron.sequence_parallel,
        # Σ loss ÷ Σ trained tokens over the global batch, for any micro-batch and layout.
        calculate_per_token_loss=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=True,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        # gloo has no batched point-to-point messages. An interleaved pipeline of two stages must not use them either: its
        # messages to the next and the previous stage go to the same rank, and one batch would mix them up.
        batch_p2p_comm=not is_cpu and layout.vpp == 1,
        overlap_p2p_comm=not is_cpu and layout.vpp > 1,
        deterministic_mode=False,
        # Megatron joins equal weights of all layers to one tensor of a checkpoint, but some of them may be frozen or absent.
        hetereogenous_dist_checkpoint=bool(spec.model.frozen) or len(layer_kinds(shape)) > 1,
        **experts.config_fields(spec, shape),
        **recompute,
    )
    # DecoderLayer and its parts read these.
    config.quantize, config.model_shape = spec.model.quantize, shape
    config.moe_losses, config.global_batch = spec.model.moe, spec.data.train_batch_size
    return config


def build(config: TransformerConfig, shape: ModelShape, session: Session) -> list[GPTModel]:
    """This rank's model chunks (one, or one per virtual stage), with unset weights, on its device."""
    layout, family = session.layout, family_of(shape)
    chunks = []
    for chunk in range(layout.vpp):
        stage = chunk if layout.vpp > 1 else None
        first = get_transformer_layer_offset(config, stage, layout.pp_rank)
        count = get_num_layers_to_build(config, vp_stage=stage, pp_rank=layout.pp_rank)
        layers = [family.layer_spec(shape, number) for number in range(first, first + count)]
        model = GPTModel(
            config,
            TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm),
            vocab_size=padded_vocabulary(shape.vocab_size, layout.tp),
            max_sequence_length=shape.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=shape.tie_word_embeddings,
            # Avoids building Megatron's own embedding, which is replaced below.
            position_embedding_type="none",
            vp_stage=stage,
        )
        model.position_embedding_type = "rope"
        model.rotary_pos_emb = RotaryEmbedding(shape, session.device)
        if shape.logit_softcap is not None and model.post_process:
            model.output_layer.register_forward_hook(_bounded)
        if config.recompute_method == "block" or config.recompute_granularity == "selective":
            # Megatron sets it only for layers with a norm before attention.
            for layer in model.decoder.layers[config.recompute_num_layers or 0 :]:
                layer.recompute_input_layernorm = True
        experts.mark(model)
        if grouped.are_grouped(session.device):
            grouped.use_grouped_experts(model)
        # `to`, except that quantised weights stay where they have no memory.
        chunks.append(model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(session.device)))
    return chunks


def _bounded(output_layer: Any, _arguments: Any, output: Any) -> Any:
    """Forward hook of an output layer whose logits are soft-capped."""
    logits, bias = output
    return softcapped(logits, output_layer.config.model_shape.logit_softcap), bias


def distribute(
    config: TransformerConfig, chunks: list[GPTModel], session: Session
) -> list[DistributedDataParallel]:
    """Wrap the chunks for training: FP32 gradients, reduced over the data-parallel ranks in the last backward of a step."""
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        # With overlap, Megatron's hook needs `grad_added_to_main_grad` on the weight. `computed_again` keeps a detached
        # weight without that mark, and adapters, whose gradients are small, have none.
        overlap_grad_reduce=session.device.type == "cuda"
        and session.layout.dp > 1
        and all(p.requires_grad for chunk in chunks for p in chunk.parameters())
        and config.recompute_granularity != "selective"
        and config.recompute_method != "block",
        # The loop reports a bad gradient with the step's numbers. Megatron would only assert.
        check_for_nan_in_grad=False,
    )
    modules = [Float16Module(config, chunk) if config.bf16 else chunk for chunk in chunks]
    return [
        DistributedDataParallel(config, settings, m, disable_bucketing=i > 0) for i, m in enumerate(modules)
    ]


def loss_share(
    model: torch.nn.Module, batch: MicroBatch, vocab_size: int, divisor: float, figures: Tensor
) -> Tensor:
    """Σ weight · cross-entropy of the micro-batch's trained tokens ÷ `divisor`, FP32 scalar; adds to `figures`, see
    `linear_cross_entropy`. On an inner stage: its hidden states [s, b, h]."""
    core = _core(model)
    embedded = None
    if core.pre_process:
        embedded = embed(core.embedding, batch.tokens, sequence_parallel=core.config.sequence_parallel)
        if core.config.recompute_granularity == "full":
            # A recomputed layer hands gradients to its parameters only if its input wants one. A frozen embedding's does not.
            embedded.requires_grad_()
    output = model(
        batch.tokens,
        batch.layout.positions[None],
        None,
        decoder_input=embedded,
        labels=batch.labels,
        packed_seq_params=batch.layout,
        output_processor=_sum_of_losses,
        output_processor_context=(vocab_size, divisor, batch, core, figures),
    )
    return cast(Tensor, output)


def _core(model: torch.nn.Module) -> GPTModel:
    """The model without its wrappers."""
    while not isinstance(model, GPTModel):
        model = cast(torch.nn.Module, model.module)
    return model


def _sum_of_losses(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    context: tuple[int, float, MicroBatch, GPTModel, Tensor],
    **_: object,
) -> Tensor:
    """GPTModel's hook after the last layer: hidden states [s, b, h] (or this rank's share of s) → scalar."""
    vocab_size, divisor, batch, core, figures = context
    places = batch.places
    if output_layer.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states)
    else:
        hidden_states = copy_to_tensor_model_parallel_region(hidden_states)
    hidden_states = hidden_states.flatten(0, 1)
    if places.numel() < hidden_states.shape[0]:
        # Only trained positions need logits.
        hidden_states = hidden_states.index_select(0, places)
    return linear_cross_entropy(
        hidden_states,
        output_layer.weight if output_weight is None else output_weight,
        labels.transpose(0, 1).reshape(-1)[places],
        divisor=divisor,
        vocab_size=vocab_size,
        weight_is_shared=core.pre_process and output_weight is not None,
        softcap=core.config.model_shape.logit_softcap,
        weights=batch.weights,
        figures=figures,
        sources=batch.sources,
    )

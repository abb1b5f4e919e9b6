"""The section `model` of a spec: the model, what of it is trained, and its layout over the ranks."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from sftd.domain.spec.on_resume import FREE
from sftd.domain.spec.sections import Count, Section, Size


class Megatron(Section, frozen=True):
    """`model.megatron`: layout of the model over the ranks by Megatron-core."""

    tensor_model_parallel_size: Annotated[
        Size,
        Meta(description="ranks that share each layer's matrices (TP)"),
        FREE,
    ] = 1
    pipeline_model_parallel_size: Annotated[
        Size,
        Meta(description="groups of layers on different ranks (PP)"),
        FREE,
    ] = 1
    virtual_pipeline_model_parallel_size: Annotated[
        Size | None,
        Meta(
            description="model chunks per pipeline rank (VPP, interleaved schedule); needs PP of at least 2"
        ),
        FREE,
    ] = None
    context_parallel_size: Annotated[Size, Meta(description="ranks that share each sequence (CP)"), FREE] = 1
    expert_model_parallel_size: Annotated[
        Size,
        Meta(description="ranks of a pipeline stage that share the experts of an MoE layer (EP)"),
        FREE,
    ] = 1
    sequence_parallel: Annotated[
        bool,
        Meta(description="shard norms and residuals over the TP ranks; needs TP of at least 2"),
        FREE,
    ] = False
    use_distributed_optimizer: Annotated[
        bool, Meta(description="shard optimizer state over the data-parallel ranks")
    ] = True
    seed: Annotated[Count, Meta(description="seed of data order, dropout and initialisation")] = 1234
    params_dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Meta(
            description="dtype of the weights in forward and backward; auto is bfloat16 on GPUs and with optimizer.precision lean, "
            "otherwise float32"
        ),
    ] = "auto"

    @property
    def expert_tensor_parallel_size(self) -> int:
        """Number of ranks over which each expert is split."""
        return 1 if self.expert_model_parallel_size > 1 else self.tensor_model_parallel_size


ALL_LINEAR: Final = "all-linear"
PROJECTIONS: Final = ("q", "k", "v", "o", "gate", "up", "down")
Projection = Literal["all-linear", "q", "k", "v", "o", "gate", "up", "down"]


class Lora(Section, frozen=True):
    """`model.lora`: low-rank adapters beside a frozen model, in place of training all its weights."""

    rank: Annotated[
        Count, Meta(description="rank of the adapters (8 to 64 are common); 0 trains the model's own weights")
    ] = 0
    alpha: Annotated[
        Annotated[float, Meta(gt=0.0)],
        Meta(description="an adapter's output is multiplied by alpha / rank"),
    ] = 32.0
    targets: Annotated[
        list[Projection],
        Meta(
            description="the projections that get an adapter; all-linear is every one, those of experts too"
        ),
    ] = msgspec.field(default_factory=lambda: [ALL_LINEAR])
    dropout: Annotated[
        Annotated[float, Meta(ge=0.0, lt=1.0)],
        Meta(
            description="share of an adapter's inputs that is set to 0 in training; the same in every layout and resume"
        ),
    ] = 0.0
    rslora: Annotated[bool, Meta(description="multiply by alpha / √rank instead (rank-stabilised LoRA)")] = (
        False
    )
    init: Annotated[
        Literal["kaiming", "gaussian"],
        Meta(
            description="how A begins: uniform in ± 1 / √inputs as in PEFT, or normal with deviation 1 / rank; B is 0"
        ),
    ] = "kaiming"
    adapter: Annotated[
        str, Meta(description="PEFT folder of an adapter to start from, of the same rank and targets")
    ] = ""

    @property
    def projections(self) -> tuple[str, ...]:
        """The projections that get an adapter, in the order of a layer; none without a rank."""
        named = PROJECTIONS if ALL_LINEAR in self.targets else self.targets
        return tuple(name for name in PROJECTIONS if self.rank and name in named)


class Moe(Section, frozen=True):
    """`model.moe`: losses of the routers of a mixture of experts, besides that of the tokens. Off in most fine-tuning."""

    load_balancing_loss: Annotated[
        Annotated[float, Meta(ge=0.0)],
        Meta(
            description="coefficient of the load-balancing loss, which is 1 where each sample uses all experts evenly (0.001 is common)"
        ),
    ] = 0.0
    z_loss: Annotated[
        Annotated[float, Meta(ge=0.0)],
        Meta(
            description="coefficient of the router z-loss: the mean of log² Σ exp of the router's logits (0.001 is common)"
        ),
    ] = 0.0

    @property
    def is_used(self) -> bool:
        """Whether a coefficient is not 0."""
        return self.load_balancing_loss > 0 or self.z_loss > 0


# The router's weights in the folder of any family.
_ROUTER = r"\.(gate|router)\.(weight|bias)$"


class Model(Section, frozen=True):
    """`model`: the model to train."""

    name: Annotated[Literal["megatron-sft"], Meta(description="kind of training")] = "megatron-sft"
    partial_pretrain: Annotated[
        str,
        Meta(description="Hugging Face folder of the model to start from, or a hub id in the local cache"),
    ] = ""
    enable_gradient_checkpointing: Annotated[
        bool,
        Meta(description="recompute activations in backward to save memory"),
        FREE,
    ] = False
    recompute: Annotated[
        Literal["full", "selective"],
        Meta(
            description="what gradient checkpointing recomputes: whole layers (full), or only norms and activations (selective: "
            "a third of the memory for a few percent of the time)"
        ),
        FREE,
    ] = "full"
    recompute_layers: Annotated[
        Size | None,
        Meta(
            description="with recompute full: layers of each model chunk that are recomputed whole, the first ones; the others "
            "recompute selectively; all when not set"
        ),
        FREE,
    ] = None
    trust_remote_code: Annotated[bool, Meta(description="allow code shipped in the model folder to run")] = (
        False
    )
    override_config: Annotated[
        dict[str, Any], Meta(description="keys of the model's config.json to replace")
    ] = msgspec.field(default_factory=dict)
    freeze: Annotated[
        list[str],
        Meta(
            description="regular expressions of weights of the Hugging Face model that are not trained, such as "
            "^model.embed_tokens; each must match one"
        ),
    ] = msgspec.field(default_factory=list)
    freeze_router: Annotated[bool, Meta(description="freeze the routers of a mixture of experts")] = False
    quantize: Annotated[
        Literal["none", "nf4"],
        Meta(
            description="how the frozen matrices of a run with adapters are stored: as they are, or in four bits (nf4, as in QLoRA)"
        ),
    ] = "none"
    lora: Lora = Lora()
    moe: Moe = Moe()
    megatron: Megatron = Megatron()

    @property
    def is_partly_frozen(self) -> bool:
        """Whether the run needs the model folder at every attempt: its checkpoints hold the trained weights only."""
        return self.lora.rank > 0 or bool(self.frozen)

    @property
    def frozen(self) -> list[str]:
        """Regular expressions of the weights that are not trained."""
        return [*self.freeze, *([_ROUTER] if self.freeze_router else [])]

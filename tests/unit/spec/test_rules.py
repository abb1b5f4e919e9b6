"""Every rule at submit: what it finds, and where. A rule without a row here fails a test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from sftd.domain.data.facts import DataFacts, SourceFacts
from sftd.domain.errors import Problem, Refused
from sftd.domain.model.files import ModelFile, ModelFiles
from sftd.domain.model.peft import PeftAdapter, tensors_of
from sftd.domain.model.rules import MODEL
from sftd.domain.model.shape import ModelShape
from sftd.domain.plan.disk import storage
from sftd.domain.spec.launch.launchers import KINDS
from sftd.domain.spec.model_section import PROJECTIONS
from sftd.domain.spec.parse import parse
from sftd.domain.spec.rules import SPEC
from sftd.domain.spec.spec import OrderStart, Spec
from sftd.domain.submit.facts import HostDevices, Parent, SaveFolder, SubmitFacts
from sftd.domain.submit.fork_rules import FORK
from sftd.domain.submit.judge import judge
from sftd.domain.submit.rules import FACTS, PLANNED

CONFIG = {"model": {"path": "/m"}, "data": {"train_files": ["/t"], "val_files": ["/v"]}}
SHAPE = ModelShape(
    architecture="LlamaForCausalLM",
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=100,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    # A tuple, which the log holds as a list.
    layers_without_rope=(3,),
    tie_word_embeddings=False,
    attention_bias=False,
    qk_norm=False,
)
EXPERTS = {
    "architecture": "MixtralForCausalLM",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
GPT_OSS = EXPERTS | {
    "architecture": "GptOssForCausalLM",
    "hidden_act": "clamped_swiglu",
    "expert_bias": True,
}
TP = "model.megatron.tensor_model_parallel_size"
PP = "model.megatron.pipeline_model_parallel_size"
VPP = "model.megatron.virtual_pipeline_model_parallel_size"
EP = "model.megatron.expert_model_parallel_size"
SP = "model.megatron.sequence_parallel"
RANKS, BATCH, SIZE = "launch.nproc_per_node", "data.train_batch_size", "training.micro_batch_size_per_gpu"
PACKED, TOKENS, LENGTH = "training.use_rmpad", "training.micro_batch_tokens", "data.sequence_length"
CONTEXT = "model.megatron.context_parallel_size"
DELTA_NET = {"delta_key_heads": 2, "delta_value_heads": 6, "delta_key_dim": 16, "delta_value_dim": 24}
SLURM = {"launch.launcher": "slurm", "launch.device": "cuda"}
SAVE, CHECK, SAVE_DIR = "trainer.save_interval", "trainer.val_check_interval", "checkpoint.save_dir"
RANK, TARGETS, LORA = "model.lora.rank", "model.lora.targets", {"model.lora.rank": 16}
FREEZE, QUANTIZE, DROPOUT = "model.freeze", "model.quantize", "model.lora.dropout"
ADAPTER = "model.lora.adapter"
STARTED = {RANK: 4, "model.lora.alpha": 8, TARGETS: ["q", "v"], ADAPTER: "/a"}
LAYER = "model.layers.0.self_attn."
VAL_LOSS, PATIENCE = {"metric": "val_loss", "mode": "min"}, {"patience": 2}
COMMAND = {"kind": "command", "name": "c", "argv": ["x"]}
CPUS, GPUS = HostDevices("box", 0, 2), HostDevices("node", 8, 64)


def data(rows: int = 100, digest: str = "t", **fields: Any) -> DataFacts:
    counts = {"tokens": 1, "trained_tokens": 1, "longest": 1, "truncated": 0, "unusable": 0}
    return DataFacts(**{"files": [f"/{digest}"], "digest": digest, "rows": rows} | counts | fields)


CODE, CHAT = {"name": "code", "files": ["/t"]}, {"name": "chat", "files": ["/c"]}


def facts_of(name: str, rows: int = 9, digest: str = "d") -> SourceFacts:
    return SourceFacts(name=name, rows=rows, tokens=rows, digest=digest)


def mixed(*sources: dict[str, Any]) -> dict[str, Any]:
    return {"data.train_files": [], "data.sources": list(sources)}


def stage(until_step: int, **weights: float) -> dict[str, Any]:
    return {"until_step": until_step, "weights": weights}


def staged(*sources: dict[str, Any], stages: list[dict[str, Any]]) -> dict[str, Any]:
    return mixed(*(sources or ({**CODE, "weight": 1},))) | {"data.stages": stages, "trainer.max_steps": 9}


NEED = storage(Spec(), SHAPE, 7, "float32")
MODEL_FILES = ModelFiles({"tokenizer.json": ModelFile(1, "a")}, {"w.safetensors": ModelFile(9, "b")})


def parent(checkpoint: int | None = 3, keys: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    # As it comes from the log.
    shape = msgspec.json.decode(msgspec.json.encode(SHAPE))
    plain = {"model": shape, "model_files": MODEL_FILES, "dtype": "", "is_direct": False}
    plain |= {"run_id": "calm-fox", "may_change_files": False, "checkpoint": checkpoint}
    plain |= {"own_files": MODEL_FILES, "spec": parse(CONFIG, (keys or {}).items())[0]}
    return {"parent": Parent(**plain | fields)}


def files(tokenizer: str = "a", weights: str = "b") -> dict[str, Any]:
    """The model folder as it is now."""
    was, of = MODEL_FILES, {"w.safetensors": ModelFile(9, weights)}
    return {
        "model_files": msgspec.structs.replace(
            was, files={"tokenizer.json": ModelFile(1, tokenizer)}, weights=of
        )
    }


def peft(targets: Sequence[str] = "qv", layers: int = 4, **config: Any) -> dict[str, Any]:
    """A PEFT folder for SHAPE, of rank 4 with alpha 8."""
    every = tensors_of(msgspec.structs.replace(SHAPE, num_hidden_layers=layers), 4)
    tensors = {name: size for name, ((projection,), size) in every.items() if projection in targets}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_dora": False} | config
    return {"adapter": PeftAdapter(config, tensors)}


class Row(msgspec.Struct, frozen=True):
    """A run that a rule finds something in: `keys` of its spec, `facts`, fields of its model's `shape`. Found is `what`, at
    `where`; `fix` is part of how to fix it."""

    where: str
    what: str
    keys: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    shape: dict[str, Any] = {}
    fix: str = ""


# Rule → runs that it refuses.
REFUSED: dict[str, list[Row]] = {
    "evaluations_of_one_name": [
        Row("evaluation", "2 evaluations have the name c", {"evaluation": [COMMAND, COMMAND]})
    ],
    "evaluation_between_checkpoints": [
        Row(
            "evaluation.c.every_steps",
            "150 is not a multiple of trainer.save_interval 100",
            {"evaluation": [COMMAND | {"every_steps": 150}]},
            fix="use 200",
        ),
        Row(
            "evaluation.c.every_steps",
            "only the last step has a checkpoint",
            {"evaluation": [COMMAND | {"every_steps": 100}], SAVE: 0},
        ),
    ],
    "unknown_metric": [
        Row(
            "checkpoint.keep_best",
            "no validation files",
            {"checkpoint.keep_best": VAL_LOSS, "data.val_files": []},
        ),
        Row(
            "trainer.early_stop",
            "no validation files",
            {"trainer.early_stop": VAL_LOSS | PATIENCE, "data.val_files": []},
        ),
        Row(
            "trainer.early_stop",
            "only at the start and the end",
            {"trainer.early_stop": VAL_LOSS | PATIENCE, "data.val_files": ["/v"]},
            fix="trainer.val_check_interval",
        ),
        Row(
            "trainer.early_stop",
            "unknown metric 'd/x'",
            {"trainer.early_stop": {"metric": "d/x", "mode": "max"} | PATIENCE, "evaluation": [COMMAND]},
            fix="use val_loss, c/METRIC",
        ),
        Row(
            "checkpoint.keep_best",
            "unknown metric 'c'",
            {"checkpoint.keep_best": {"metric": "c", "mode": "max"}},
        ),
    ],
    "devices_of_one_process": [
        Row(
            "evaluation.p.devices",
            "runs on one device",
            {"evaluation": [{"kind": "prompts", "name": "p", "file": "/q", "devices": 2}]},
        )
    ],
    # The spec alone.
    "no_model": [Row("model.partial_pretrain", "is not set", {"model.path": ""}, fix="Hugging Face folder")],
    "no_train_files": [
        Row("data.train_files", "is empty", {"data.train_files": []}, fix="at least one Parquet file")
    ],
    "sources_beside_train_files": [
        Row("data.sources", "beside data.train_files", {"data.sources": [CODE]}, fix="a source")
    ],
    "unusable_source": [
        Row("data.sources[1].name", "'code' is another source", mixed(CODE, CODE)),
        Row(
            "data.sources[0].name", "cannot be a source's name", mixed({**CODE, "name": "a/b"}), fix="letters"
        ),
        Row("data.sources[0].name", "'val_files' cannot", mixed({**CODE, "name": "val_files"})),
        Row("data.sources[0].files", "is empty", mixed({**CODE, "files": []}), fix="Parquet"),
    ],
    "weights_beside_epochs": [
        Row("data.sources[0]", "a weight and epochs", mixed({**CODE, "weight": 1, "epochs": 2})),
        Row("data.sources", "for some of the sources", mixed({**CODE, "weight": 1}, CHAT)),
        Row("data.sources", "all weights are 0", mixed({**CODE, "weight": 0})),
    ],
    "unusable_stage": [
        Row("data.stages", "have none", staged(CODE, stages=[{"until_step": 2, "weights": {"code": 1}}])),
        Row(
            "data.stages[0].weights",
            "'math' is not a source",
            staged(stages=[stage(2, math=1)]),
            fix="use code",
        ),
        Row("data.stages[0].weights", "all are 0", staged(stages=[stage(2, code=0)]), fix="above 0"),
        Row("data.stages[1].until_step", "is 2, after", staged(stages=[stage(3, code=1), stage(2, code=2)])),
    ],
    "mixture_without_end": [
        Row("trainer.max_steps", "code is repeated", mixed({**CODE, "weight": 1}), fix="on_exhausted: stop")
    ],
    "unusable_name": [
        Row("trainer.project_name", "contains a slash", {"trainer.project_name": "a/b"}),
        Row("trainer.project_name", "'' is empty", {"trainer.project_name": ""}),
        Row("trainer.experiment_name", "U+0009", {"trainer.experiment_name": "a\tb"}, fix="200 at most"),
        Row("trainer.experiment_name", "201 characters", {"trainer.experiment_name": "x" * 201}),
    ],
    "save_dir_with_nul": [Row(SAVE_DIR, "contains a NUL", {SAVE_DIR: "a\0b"}, fix="may write to")],
    "virtual_pipeline_alone": [Row(VPP, "at least 2 ranks", {VPP: 2})],
    "sequence_parallel_alone": [Row(SP, "one tensor-parallel rank", {SP: True}, fix="2 or more")],
    "adapter_keys_without_rank": [
        Row(
            "model.lora.alpha",
            "16.0 is not used: model.lora.rank is 0",
            {"model.lora.alpha": 16},
            fix="set m",
        ),
        Row("model.lora.adapter", "is not used", {"model.lora.adapter": "/a"}, fix="the r of that adapter"),
        Row(TARGETS, "['q'] is not used", {TARGETS: ["q"]}),
    ],
    "unusable_targets": [
        Row(TARGETS, "is empty", LORA | {TARGETS: []}, fix="list some of q, k"),
        Row(TARGETS, "beside it: q, v", LORA | {TARGETS: ["q", "all-linear", "v"]}, fix="keep all-linear"),
        Row(TARGETS, "names q, v more than", LORA | {TARGETS: ["q", "v", "o", "v", "q"]}),
        Row(TARGETS, "names all-linear more than", LORA | {TARGETS: ["all-linear", "all-linear"]}),
    ],
    "quantised_without_adapters": [Row(QUANTIZE, "all weights are trained", {QUANTIZE: "nf4"}, fix=RANK)],
    "frozen_under_adapters": [Row(FREEZE, "all else is frozen", LORA | {FREEZE: ["norm"]}, fix="leave it")],
    "unusable_expression": [Row(FREEZE, "'*x' is no regular", {FREEZE: ["norm", "*x"]}, fix=r"[0-3]\.")],
    "several_machines": [
        Row("launch.nnodes", "the daemon's own machine", {"launch.nnodes": 2}, fix="launch.launcher to slurm")
    ],
    "unusable_slurm_word": [
        Row("launch.slurm.partition", "contains spaces", SLURM | {"launch.slurm.partition": "a b"}),
        Row(
            "launch.slurm.time", "not a Slurm time", SLURM | {"launch.slurm.time": "1:0:0:0"}, fix="90 or 2-0"
        ),
    ],
    "setup_with_nul": [Row("launch.slurm.setup", "contains a NUL", SLURM | {"launch.slurm.setup": "\0"})],
    "unusable_slurm_option": [
        Row("launch.slurm.extra_args", "not an option", SLURM | {"launch.slurm.extra_args": ["mem"]}),
        Row(
            "launch.slurm.extra_args",
            "sets --nodes",
            SLURM | {"launch.slurm.extra_args": ["--mem=0 --node=2"]},
            fix="launch.nnodes",
        ),
    ],
    "ranks_of_no_whole_copy": [Row(RANKS, "1 × 3 = 3 ranks", {RANKS: 3, TP: 2}, fix="a multiple of 2")],
    "experts_not_shared_evenly": [Row(EP, "4 ranks ÷ PP 2 = 2", {EP: 4, PP: 2, RANKS: 4})],
    "packed_micro_batch_too_short": [
        Row(TOKENS, "the longest sample", {PACKED: True, TOKENS: 2047}, fix="2048 or more")
    ],
    "rank_without_sample": [
        Row(BATCH, "2 is less than the 3", {PACKED: True, RANKS: 3, BATCH: 2}, fix="3 or more")
    ],
    "uneven_batch": [
        Row(BATCH, "65 is not a multiple", {SIZE: 16, BATCH: 65}, fix="use 64 or 80"),
        Row(BATCH, "micro-batch 4 × data-parallel 2 = 8", {SIZE: 4, BATCH: 3, RANKS: 2}, fix="use 8,"),
    ],
    "uneven_interleaving": [Row(VPP, "micro-batches of a step (3)", {PP: 2, VPP: 2, BATCH: 3})],
    "warm_up_longer_than_run": [
        Row(
            "scheduler.warmup_steps",
            "more than the 5 steps",
            {"trainer.max_steps": 5, "scheduler.warmup_steps": 6},
        ),
        # 100 rows, 16 of them a step.
        Row("scheduler.warmup_steps", "more than the 7 steps", {BATCH: 16, "scheduler.warmup_steps": 8}),
    ],
    "lean_with_fp32_weights": [
        Row(
            "optimizer.precision",
            "lean keeps BF16 weights",
            {"optimizer.precision": "lean", "model.megatron.params_dtype": "float32"},
            fix="auto",
        )
    ],
    # The model.
    "unsupported_parts": [
        Row(
            "model.partial_pretrain",
            "has shared experts",
            shape={"unsupported": ("shared experts",)},
            fix="without it",
        )
    ],
    "expert_parallel_without_experts": [Row(EP, "no experts to shard", {EP: 2})],
    "router_keys_without_router": [
        Row("model.freeze_router", "has no router", {"model.freeze_router": True}, fix="leave it out"),
        Row("model.moe.z_loss", "has no router", {"model.moe.z_loss": 0.1}),
    ],
    "experts_of_a_token": [
        Row("model.partial_pretrain", "a token to 1 of 8", shape=EXPERTS | {"num_experts_per_tok": 1}),
        Row("model.partial_pretrain", "a token to 9 of 8", shape=EXPERTS | {"num_experts_per_tok": 9}),
    ],
    "groups_of_experts": [
        Row(
            "model.partial_pretrain",
            "a token to 2 experts in 1 of 3 groups",
            shape=EXPERTS | {"router_groups": 3, "router_topk_group": 1},
            fix="groups have equal sizes",
        ),
        Row(
            "model.partial_pretrain",
            "a token to 3 experts in 1 of 4 groups",
            shape=EXPERTS | {"router_groups": 4, "router_topk_group": 1, "num_experts_per_tok": 3},
        ),
    ],
    "experts_not_divided": [
        Row(EP, "3 does not divide the model's 8 experts", {EP: 3, BATCH: 9}, shape=EXPERTS, fix="1, 2, 4, 8")
    ],
    "experts_of_a_whole_sequence": [Row(SP, "same tokens to the experts", {TP: 2}, shape=EXPERTS)],
    "other_activation": [
        Row("model.partial_pretrain", "hidden_act 'gelu'", shape={"hidden_act": "gelu"}, fix="silu")
    ],
    "biased_experts_split": [
        Row(EP, "cannot split the experts of GptOss", {TP: 2, SP: True, RANKS: 2}, shape=GPT_OSS, fix="to 2")
    ],
    "other_rope": [
        Row(
            "model.partial_pretrain",
            "'axial' is not supported",
            shape={"rope_scaling": {"type": "axial"}},
        )
    ],
    "delta_net_over_context": [
        Row(
            CONTEXT,
            "gated delta nets",
            {CONTEXT: 2},
            shape={"delta_layers": (0,)} | DELTA_NET,
            fix="set it to 1",
        )
    ],
    "quantized_delta_net": [
        Row(QUANTIZE, "is nf4", {QUANTIZE: "nf4", RANK: 8}, shape={"delta_layers": (0,)} | DELTA_NET)
    ],
    "quantized_latent_attention": [
        Row(QUANTIZE, "latent attention", {QUANTIZE: "nf4", RANK: 8}, shape={"kv_lora_rank": 32}, fix="none")
    ],
    "layers_not_divided_by_tp": [
        Row(
            TP,
            "2 does not divide the model's 3 key heads of gated delta nets",
            {TP: 2},
            shape={"delta_layers": (0,)} | DELTA_NET | {"delta_key_heads": 3},
        ),
        Row(TP, "4 does not divide the model's 2 key-value heads", {TP: 4}, fix="use one of 1, 2"),
        Row(TP, "2 does not divide the model's 127 FFN units", {TP: 2}, shape={"intermediate_size": 127}),
        Row(
            TP,
            "2 does not divide the model's 33 units of the shared expert",
            {TP: 2, SP: True, EP: 2},
            shape=EXPERTS | {"shared_expert_intermediate_size": 33},
        ),
        Row(
            TP,
            "2 does not divide the model's 127 FFN units",
            {TP: 2, SP: True, EP: 2},
            shape=EXPERTS | {"layers_without_experts": (0,), "intermediate_size": 127},
        ),
    ],
    "layers_not_divided_by_pp": [
        Row(PP, "the model's 4 layers", {PP: 3}),
        Row(VPP, "PP 2 × VPP 4 = 8", {PP: 2, VPP: 4}),
    ],
    "stage_without_experts": [
        Row(
            PP,
            "stage 0 of 2 trains no experts",
            {PP: 2},
            shape=EXPERTS | {"layers_without_experts": (0, 1)},
            fix="fewer stages",
        )
    ],
    "rank_above_matrix": [
        Row(RANK, "33 is more than a side of the 32 × 64 matrix of k", {RANK: 33}, fix="to 32 or less"),
        Row(RANK, "65 is more", {RANK: 65, TARGETS: ["q", "down"]}, fix="64 or less"),
        Row(
            RANK,
            "9 × 64 matrix of gate",
            {RANK: 10, TARGETS: ["o", "gate"]},
            shape=EXPERTS | {"moe_intermediate_size": 9},
        ),
    ],
    "dropout_in_experts": [
        Row(DROPOUT, "0.1 is not", LORA | {DROPOUT: 0.1}, shape=EXPERTS, fix="targets: q, k, v, o"),
        Row(DROPOUT, "(up)", LORA | {DROPOUT: 0.1, TARGETS: ["up", "q"]}, shape=EXPERTS, fix="set it to 0"),
    ],
    "adapters_of_joined_experts": [
        Row(TARGETS, "(gate, up, down)", LORA, shape=GPT_OSS, fix="attention: q, k, v, o"),
        Row(QUANTIZE, "nf4 is not", LORA | {TARGETS: ["q"], QUANTIZE: "nf4"}, shape=GPT_OSS, fix="to none"),
    ],
    "uneven_blocks": [
        Row(
            QUANTIZE,
            "of q, k, v, gate, up have 96",
            LORA | {QUANTIZE: "nf4"},
            shape={"hidden_size": 96},
            fix="none",
        ),
        Row(QUANTIZE, "of o have 64 ÷ 2 ten", LORA | {QUANTIZE: "nf4", TP: 2}, fix="size to 1, or"),
        Row(
            QUANTIZE,
            "of down have 128 ÷ 4 ten",
            LORA | {QUANTIZE: "nf4", TP: 4},
            shape={"num_attention_heads": 16, "num_key_value_heads": 16},
            fix="size to 1 or 2, or",
        ),
        Row(
            QUANTIZE,
            "of down have 96",
            LORA | {QUANTIZE: "nf4", EP: 2, TP: 2, SP: True},
            shape=EXPERTS | {"moe_intermediate_size": 96, "num_attention_heads": 8},
            fix="set it to none",
        ),
    ],
    # What else is read.
    "override_that_is_not_read": [
        Row(
            "model.override_config.hidden_sizes",
            "is not read by the trainer",
            {"model.override_config": {"hidden_sizes": 1}},
            fix="`hidden_size`",
        ),
        Row(
            "model.override_config.zzz",
            "is not read by the trainer",
            {"model.override_config": {"hidden_size": 64, "zzz": 1}},
            fix="remove it; the trainer reads architectures",
        ),
    ],
    "fewer_gpus_than_ranks": [
        Row("launch.device", "this host has 1", {RANKS: 2}, {"own_gpus": 1}, fix="--nproc-per-node")
    ],
    "save_folder_not_writable": [
        Row(
            SAVE_DIR, "'/h' cannot be", facts={"save_folder": SaveFolder(path="/h", error="no")}, fix="_HOME"
        ),
        Row(
            SAVE_DIR,
            "written to: no",
            {SAVE_DIR: "/c"},
            {"save_folder": SaveFolder(path="/c", error="no")},
            fix="give a folder",
        ),
    ],
    "prompts_without_tokenizer": [
        Row(
            "trainer.sample_prompts",
            "no tokenizer for the prompts",
            {"trainer.sample_prompts": ["hi"]},
            {"has_tokenizer": False},
        )
    ],
    "nothing_to_train": [
        Row("data.train_files", "/t: none of the 9 rows", facts={"train": data(9, unusable=9)}),
        Row("data.val_files", "/v: none of the 9 rows", facts={"val": data(9, "v", unusable=9)}),
    ],
    "source_without_rows": [
        Row(
            "data.sources",
            "no row of code",
            mixed(CODE),
            {"train": data(sources=(facts_of("code", rows=0),))},
        )
    ],
    "rows_not_to_truncate": [
        Row(
            "data.train_files",
            "3 of 100 rows are longer",
            {"data.truncation": "error"},
            {"train": data(truncated=3, longest=3000)},
            fix="data.sequence_length to 3000",
        )
    ],
    "unsupported_adapter": [
        Row(ADAPTER, "/a: peft_type is 'IA3', not LORA", STARTED, peft(peft_type="IA3")),
        Row(ADAPTER, "use_dora is True", STARTED, peft(use_dora=True), fix="without it"),
        Row(
            ADAPTER,
            "modules_to_save is ['lm_head']; rank_pattern is {'q': 2}; bias is 'all'",
            STARTED,
            peft(modules_to_save=["lm_head"], rank_pattern={"q": 2}, bias="all"),
        ),
        Row(ADAPTER, "'pissa_niter_4', which changes", STARTED, peft(init_lora_weights="pissa_niter_4")),
        Row(ADAPTER, "has no tensors", STARTED, peft("")),
    ],
    "other_adapter_than_spec": [
        Row(
            ADAPTER,
            'rank is 4, here 8; targets is ["q", "v"], here ["all-linear"]',
            {RANK: 8, "model.lora.alpha": 8, ADAPTER: "/a"},
            peft(),
            fix='set model.lora.rank to 4, model.lora.targets to ["q", "v"]',
        ),
        Row(ADAPTER, "alpha is 16.0, here 8", STARTED, peft(lora_alpha=16), fix="alpha to 16.0"),
        Row(ADAPTER, "rslora is true, here false", STARTED, peft(use_rslora=True), fix="rslora to true"),
        Row(ADAPTER, 'targets is ["v"], here ["q", "v"]', STARTED, peft("v", target_modules="all-linear")),
    ],
    "adapter_of_another_model": [
        Row(
            ADAPTER,
            "it lacks base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight",
            STARTED,
            peft(layers=3),
            fix="on this model",
        ),
        Row(ADAPTER, "no projection has base_model.model.model.layers.4.self", STARTED, peft(layers=5)),
        Row(ADAPTER, "q_proj.lora_A.weight is 4 × 64, not 4 × 96", STARTED, peft(), {"hidden_size": 96}),
        Row(
            ADAPTER, "k_proj.lora_B.weight is 32 × 4, not 64", STARTED, peft("k"), {"num_key_value_heads": 4}
        ),
        Row(ADAPTER, "no projection has base_model.model.model.layers.0.mlp", STARTED, peft("up"), EXPERTS),
    ],
    "unmatched_freeze": [
        Row(
            FREEZE, "'^norm' matches no weight of /m", {FREEZE: ["norm", "^norm"]}, fix="such as model.embed"
        ),
        Row(FREEZE, "'lm_head' matches no", {FREEZE: ["lm_head"]}, shape={"tie_word_embeddings": True}),
    ],
    "half_frozen_product": [
        Row(
            FREEZE,
            f"freezes {LAYER}q_proj.weight, but not {LAYER}k_proj.weight, {LAYER}v_proj.weight, which",
            {FREEZE: ["q_proj"]},
            fix="match all of them",
        ),
        Row(FREEZE, "training; 3 more", {FREEZE: ["[kv]_proj"]}),
        Row(
            FREEZE, f"freezes {LAYER}v_proj.bias, but", {FREEZE: ["v_proj.b"]}, shape={"attention_bias": True}
        ),
        Row(FREEZE, "0.mlp.up_proj.weight, but not", {FREEZE: ["up"]}),
        Row(FREEZE, "3.w1.weight, but not", {FREEZE: ["experts.3.w1"]}, shape=EXPERTS),
    ],
    "nothing_left_to_train": [
        Row(FREEZE, "all 39 weights", {FREEZE: ["weight", "bias"]}, fix=RANK),
    ],
    "some_experts_frozen": [
        Row(FREEZE, "experts of layer 2", {FREEZE: [r"layers.2.*experts\.[01]\."]}, shape=EXPERTS)
    ],
    "stage_without_training": [
        Row(
            FREEZE,
            "stage 0 of 2",
            {FREEZE: ["embed", r"layers\.[01]\."], "model.megatron.pipeline_model_parallel_size": 2},
            fix="fewer stages",
        ),
    ],
    # Of forks.
    "changed_model_folder": [
        Row(
            "model.partial_pretrain",
            "/m/tokenizer.json changed since calm-fox",
            facts=parent() | files("x"),
            fix="add --changed-model",
        ),
        Row("model.partial_pretrain", "/m/w.safetensors changed", facts=parent(None) | files(weights="x")),
    ],
    "other_model_than_checkpoint": [
        Row("model.partial_pretrain", "has vocab_size 99, but", facts=parent(), shape={"vocab_size": 99})
    ],
    "other_dtype_than_checkpoint": [
        Row(
            "model.megatron.params_dtype",
            "of step 3 was trained in bfloat16",
            {"model.megatron.params_dtype": "float32"},
            parent(dtype="bfloat16"),
            fix="set it to bfloat16",
        )
    ],
    "other_base_than_checkpoint": [
        Row(
            "model.partial_pretrain",
            "/m has other weights than calm-fox started from",
            LORA,
            parent(keys=LORA, may_change_files=True) | files(weights="x"),
            fix="put them back as they were, or start again with --from-step 0 --changed-model",
        ),
        Row(
            "model.partial_pretrain",
            "/n has other weights",
            {FREEZE: ["norm"], "model.path": "/n"},
            parent(keys={FREEZE: ["norm"]}, model_files=None) | files(weights="x"),
            fix="use its folder, or",
        ),
        Row(
            "model.override_config",
            "differs from calm-fox's, and the checkpoint of step 3 holds only",
            LORA | {"model.override_config": {"rope_theta": 5}},
            parent(keys=LORA),
            fix="--from-step 0",
        ),
    ],
    "other_adapters_than_checkpoint": [
        Row(
            RANK, "is 16, but the checkpoint of step 3 is without", LORA, parent(), fix="DIR --step 3`, then"
        ),
        Row(RANK, "is 0, but the checkpoint of step 3 is of", {}, parent(keys=LORA), fix="--step 3 --merge`"),
        Row(RANK, "is 8, but the checkpoint of step 3 has adapters with 16", {RANK: 8}, parent(keys=LORA)),
        Row(TARGETS, 'is ["q"], but', LORA | {TARGETS: ["q"]}, parent(keys=LORA), fix="leave it as it was"),
        Row("model.lora.rslora", "is true", LORA | {"model.lora.rslora": True}, parent(keys=LORA)),
        Row(ADAPTER, "is not read", STARTED, parent(keys=STARTED | {ADAPTER: "/b"}), fix="--from-step 0"),
        Row("model.lora.init", "is not read", LORA | {"model.lora.init": "gaussian"}, parent(keys=LORA)),
    ],
    "other_frozen_weights_than_checkpoint": [
        Row(FREEZE, 'is ["a"], but the checkpoint of step 3 is with all', {FREEZE: ["a"]}, parent()),
        Row(
            "model.freeze_router",
            "true, but false in the checkpoint of step 3",
            {"model.freeze_router": True},
            parent(model=msgspec.json.decode(msgspec.json.encode(msgspec.structs.replace(SHAPE, **EXPERTS)))),
            shape=EXPERTS,
        ),
        Row(FREEZE, 'is [], but the checkpoint of step 3 is without ["a"]', {}, parent(keys={FREEZE: ["a"]})),
        Row(QUANTIZE, "were trained with nf4", LORA, parent(keys=LORA | {QUANTIZE: "nf4"}), fix="--merge"),
    ],
    "other_precision_than_checkpoint": [
        Row(
            "optimizer.precision",
            "is lean, but the checkpoint of step 3 was trained with full",
            {"optimizer.precision": "lean"},
            parent(),
            fix="set it to full",
        )
    ],
    "no_space_for_one_checkpoint": [
        Row(
            SAVE_DIR,
            "but one checkpoint needs",
            facts={"save_folder": SaveFolder(path="/h", above="/", free=NEED.one_save - 1)},
        )
    ],
}
# Rule → runs that it warns of.
WARNED: dict[str, list[Row]] = {
    "settings_of_another_launcher": [Row("launch.slurm", "is not used", {"launch.slurm.partition": "p"})],
    "job_without_gpus": [
        Row("launch.device", "requests no GPU", {"launch.launcher": "slurm"}, fix="set it to cuda"),
        Row(
            "launch.slurm.gres", "requests no GPU", SLURM | {"launch.slurm.gres": "x", RANKS: 4}, fix="gpu:4"
        ),
    ],
    "micro_batch_size_and_tokens": [Row(SIZE, "2 is not used", {PACKED: True, TOKENS: 4096, SIZE: 2})],
    "tokens_without_packing": [Row(TOKENS, "4096 is not used", {TOKENS: 4096})],
    "accumulation_that_does_not_decide": [
        Row(
            "training.gradient_accumulation_steps",
            "÷ (micro-batch 1 × data-parallel 2) = 4 decides",
            {"training.gradient_accumulation_steps": 3, BATCH: 8, RANKS: 2},
            fix="set it to 4",
        ),
        Row(
            "training.gradient_accumulation_steps",
            "packed into micro-batches of 4096 tokens",
            {"training.gradient_accumulation_steps": 9, PACKED: True, TOKENS: 4096, RANKS: 2},
        ),
    ],
    "epochs_and_max_steps": [
        Row("trainer.epochs", "2 is not used", {"trainer.max_steps": 5, "trainer.epochs": 2})
    ],
    "floor_without_decay": [
        Row(
            "scheduler.min_lr_ratio",
            "no decay",
            {"scheduler.type": "constant", "scheduler.min_lr_ratio": 0.1},
        )
    ],
    "decay_ratio_without_wsd": [
        Row("scheduler.decay_ratio", "only wsd has it", {"scheduler.decay_ratio": 0.3})
    ],
    "warm_up_twice": [
        Row(
            "scheduler.warmup_ratio",
            "warmup_steps=5 decides",
            {"trainer.max_steps": 9, "scheduler.warmup_steps": 5, "scheduler.warmup_ratio": 0.5},
        )
    ],
    "recompute_turned_off": [
        Row(
            "model.recompute",
            "selective is not used",
            {"model.recompute": "selective", "model.enable_gradient_checkpointing": False},
        )
    ],
    "optimizer_not_sharded": [
        Row(
            "model.megatron.use_distributed_optimizer",
            "always shards",
            {"model.megatron.use_distributed_optimizer": False},
        )
    ],
    "code_of_the_model": [
        Row("model.trust_remote_code", "runs with your rights", {"model.trust_remote_code": True})
    ],
    "no_validation": [Row("data.val_files", "there is no validation", {"data.val_files": []}, {"val": None})],
    "unusual_learning_rate": [
        Row("optimizer.lr", "far above", {"optimizer.lr": 0.011}, fix="1e-6 to 1e-4"),
        Row("optimizer.lr", "far above", LORA | {"optimizer.lr": 0.011}, fix="adapters usually use 1e-5"),
        Row("optimizer.lr", "hardly", {"optimizer.lr": 0.0}),
        Row("optimizer.lr", "hardly", {"optimizer.lr": 9e-9}),
    ],
    "micro_batch_never_filled": [
        Row(SIZE, "room for 64 samples", {PACKED: True, BATCH: 7, RANKS: 2, SIZE: 64}, fix="set it to 4 or"),
        Row(
            TOKENS,
            "at most 4 for",
            {PACKED: True, BATCH: 7, RANKS: 2, TOKENS: 2048 * 9},
            fix=f"{4 * 2048} or",
        ),
    ],
    "longer_than_pretrained": [Row(LENGTH, "the 2047 positions", shape={"max_position_embeddings": 2047})],
    "exported_merged_only": [
        Row("model.lora.targets", "gate and up of experts", LORA | {TARGETS: ["q", "up"]}, shape=EXPERTS),
        Row(
            "model.override_config",
            "has no config.json",
            LORA | {"model.override_config": {"rope_theta": 5.0}},
            fix="--merge",
        ),
    ],
    "maybe_unmounted": [
        Row(
            SAVE_DIR,
            "/a/b and its parent folders are missing in /",
            facts={"save_folder": SaveFolder(path="/a/b", unmounted="/")},
            fix="mount",
        )
    ],
    "no_tokenizer": [
        Row("model.partial_pretrain", "/m has no tokenizer: the run", facts={"has_tokenizer": False})
    ],
    "remarks_on_data": [
        Row("data.train_files", "/t: odd", facts={"train": data(remarks=("/t: odd",))}),
        Row("data.val_files", "/v: odd", facts={"val": data(digest="v", remarks=("/v: odd",))}),
    ],
    "dropped_rows": [
        Row(
            "data.train_files",
            "3 of 100 rows have no trained label and are dropped (rows 4, 7 and 1 more, from 0)",
            facts={"train": data(unusable=3, unusable_rows=(4, 7))},
        )
    ],
    "answers_without_end": [
        Row("data.train_files", "will not learn to stop", facts={"train": data(stopping=0)})
    ],
    "truncated_rows": [
        Row("data.val_files", "3 of 100 rows are longer", facts={"val": data(digest="v", truncated=3)})
    ],
    "different_templates": [
        Row(
            "data.train_files",
            "/t and /u were rendered",
            facts={"rendered_differently": ("/t", "/u")},
            fix="in the same way",
        )
    ],
    "batch_larger_than_data": [
        Row(BATCH, "10 to 11 times", {BATCH: 5000}, {"train": data(461)}, fix="461 or less"),
        Row(BATCH, "sees each row 2 times", {BATCH: 200}),
        Row(BATCH, "1 to 2 times", {BATCH: 100}, {"train": data(110, unusable=20)}, fix="90 or less"),
    ],
    "validation_on_training_data": [
        Row("data.val_files", "is the training data", facts={"val": data()}),
        Row(
            "data.val_files",
            "contains training files: /v0, /v1, /v2 and 2 more",
            facts={"trained_on": [f"/v{n}" for n in range(5)]},
        ),
    ],
    "devices_that_no_host_has": [
        Row("launch.device", "box has no GPU", {"launch.device": "cuda"}, {"hosts": [CPUS]}),
        Row(RANKS, "at most 8", {RANKS: 16}, {"hosts": [CPUS, GPUS]}, fix="8 or less"),
        Row(RANKS, "16 ranks need", {RANKS: 16, "launch.device": "cuda"}, {"hosts": [CPUS, GPUS]}),
        Row(RANKS, "4 ranks share the 2 cores of box", {RANKS: 4}, {"hosts": [CPUS]}, fix="2 or less"),
    ],
    "accepted_model_folder": [
        Row(
            "model.partial_pretrain",
            "/m/tokenizer.json changed since calm-fox",
            facts=parent(may_change_files=True) | files("x"),
        )
    ],
    "parent_without_daemon": [
        Row("calm-fox", "trained without a daemon", facts=parent(is_direct=True), fix="sftd resume calm-fox")
    ],
    "source_with_other_files": [
        Row(
            "data.sources",
            "code has other files than in calm-fox",
            mixed(CODE),
            {"train": data(sources=(facts_of("code"),))} | parent(sources=(facts_of("code", digest="c"),)),
        )
    ],
    "no_space_for_all_checkpoints": [
        Row(
            SAVE_DIR,
            "at a time",
            {BATCH: 16, SAVE: 1},
            {"save_folder": SaveFolder(path="/h", above="/", free=NEED.one_save)},
            fix="keep fewer",
        )
    ],
    "saves_without_validation": [
        Row(SAVE, "each multiple of 6 and", {SAVE: 3, CHECK: 2, "trainer.max_steps": 100}),
        Row(SAVE, "only at the last step", {SAVE: 3, CHECK: 2, "trainer.max_steps": 6}),
    ],
}


def judged(row: Row) -> tuple[list[Problem], list[Problem]]:
    """(problems, warnings) of a run, as submit finds them."""
    known = {
        "shape": msgspec.structs.replace(SHAPE, **row.shape),
        "train": data(),
        "val": data(digest="v"),
        "has_tokenizer": True,
        "save_folder": SaveFolder(path="/h", above="/", free=2**60),
    }
    try:
        spec, warnings = parse(CONFIG, row.keys.items())
    except Refused as refused:
        return refused.problems, []
    verdict = judge(spec, SubmitFacts(**known | row.facts))
    return verdict.problems, warnings + verdict.warnings


def rows(table: dict[str, list[Row]]) -> list[Any]:
    return [pytest.param(row, id=f"{name}-{n}") for name, all_ in table.items() for n, row in enumerate(all_)]


def finds(row: Row, told: list[Problem]) -> bool:
    return any(p.where == row.where and row.what in p.what and row.fix in p.fix for p in told)


@pytest.mark.parametrize("row", rows(REFUSED))
def test_a_rule_refuses(row: Row) -> None:
    problems, warnings = judged(row)
    assert finds(row, problems), problems
    assert warnings == []


@pytest.mark.parametrize("row", rows(WARNED))
def test_a_rule_warns(row: Row) -> None:
    problems, warnings = judged(row)
    assert problems == []
    assert finds(row, warnings), warnings


def names(*rules: tuple[Callable[..., Any], ...]) -> set[str]:
    return {rule.__name__ for part in rules for rule in part}


def test_every_rule_has_a_row() -> None:
    tables = (SPEC, MODEL, FACTS, FORK, PLANNED, *(kind.rules for kind in KINDS.values()))
    # Two rules ask those of the launcher.
    asking = {"unsupported_by_launcher", "doubts_of_launcher"}
    assert set(REFUSED) == names(*(table.refuse for table in tables)) - asking
    assert set(WARNED) == names(*(table.warn for table in tables)) - asking


@pytest.mark.parametrize(
    "row",
    [
        Row("", "", keys, facts, shape)
        for keys, facts, shape in (
            ({}, {}, {}),
            ({TP: 2, PP: 2, VPP: 2, SP: True, RANKS: 4}, {}, {}),
            ({EP: 2, TP: 2, SP: True}, {}, EXPERTS | {"moe_intermediate_size": 63}),
            ({}, {}, EXPERTS | {"num_experts_per_tok": 1, "norm_topk_prob": False}),
            ({}, {}, {"architecture": "Qwen2ForCausalLM", "attention_bias": True}),
            ({}, {}, {"sliding_window": 2048, "max_position_embeddings": 2048}),
            ({}, {}, {"rope_scaling": {"rope_type": "llama3"}}),
            ({RANK: 32, DROPOUT: 0.1, "model.lora.adapter": "/a"}, {}, {}),
            ({RANK: 64, TARGETS: ["q", "o", "down"], QUANTIZE: "nf4"}, {}, {}),
            (LORA | {TARGETS: ["q", "k", "v", "o"], DROPOUT: 0.1}, {}, EXPERTS),
            (LORA | {TARGETS: ["up"]}, {}, {}),
            ({"model.override_config": {"rope_theta": 5.0}}, {}, {}),
            (
                LORA | {QUANTIZE: "nf4", EP: 2, TP: 2, SP: True},
                {},
                EXPERTS | {"num_attention_heads": 8},
            ),
            (STARTED, peft(target_modules=".*_proj", lora_dropout=0.1, alpha_pattern={}), {}),
            ({RANK: 4, "model.lora.alpha": 8, ADAPTER: "/a"}, peft(PROJECTIONS), {}),
            ({FREEZE: ["weight"]}, {}, {"architecture": "Qwen2ForCausalLM", "attention_bias": True}),
            ({FREEZE: [r"layers.[02].*(_proj\.|norm)", "embed"]}, {}, {}),
            ({PACKED: True, TOKENS: 2048, SIZE: 1}, {}, {}),
            ({PACKED: True, BATCH: 8, SIZE: 8}, {}, {}),
            ({PACKED: True, RANKS: 3, BATCH: 3}, {}, {}),
            ({BATCH: 100}, {}, {}),
            ({"scheduler.warmup_steps": 7, BATCH: 16}, {}, {}),
            *(({"optimizer.lr": lr}, {}, {}) for lr in (1e-2, 1e-3, 1e-8)),
            ({"model.recompute": "selective", "model.enable_gradient_checkpointing": True}, {}, {}),
            ({"trainer.project_name": "x" * 200, "trainer.experiment_name": "a/b"}, {}, {}),
            (SLURM | {"launch.slurm.gres": "gpu:1", "launch.slurm.time": 90, "launch.nnodes": 2}, {}, {}),
            (SLURM, {"hosts": [CPUS]}, {}),
            ({RANKS: 8}, {"hosts": [CPUS, GPUS]}, {}),
            ({RANKS: 2}, {"hosts": [CPUS], "own_gpus": 2}, {}),
            ({RANKS: 16, "launch.device": "cpu"}, {"hosts": [CPUS, GPUS]}, {}),
            ({}, {"train": data(stopping=1)}, {}),
            ({"model.megatron.params_dtype": "bfloat16"}, parent(dtype="bfloat16") | files(weights="x"), {}),
            ({}, parent(model_files=None, dtype="bfloat16") | files("x"), {"rms_norm_eps": 1e-5}),
            ({}, parent(None, is_direct=True), {"vocab_size": 99}),
            (LORA | {QUANTIZE: "nf4"}, parent(None) | files(), {}),
            (LORA, parent(keys={RANK: 8, QUANTIZE: "nf4"}, checkpoint=None), {}),
            (
                LORA | {"model.lora.alpha": 1, DROPOUT: 0.1, TARGETS: list(PROJECTIONS), "model.path": "/n"},
                parent(keys=LORA, model_files=None) | files("x"),
                {},
            ),
            ({FREEZE: ["b", "a"]}, parent(keys={FREEZE: ["a", "b"]}), {}),
            ({}, parent(None, {"optimizer.precision": "lean"}), {}),
            ({"optimizer.precision": "lean"}, {}, {}),
            *(
                ({SAVE: save, CHECK: check, "trainer.max_steps": 50}, {}, {})
                for save, check in ((4, 2), (3, 0), (0, 2), (100, 30))
            ),
            ({SAVE: 3, CHECK: 2, "trainer.max_steps": 50, "checkpoint.keep_best": 0}, {}, {}),
            ({BATCH: 16}, {"save_folder": SaveFolder(path="/h", above="/", free=NEED.needed)}, {}),
            ({BATCH: 16}, {"save_folder": SaveFolder(path="/h", above="/", free=None)}, {}),
        )
    ],
)
def test_nothing_is_found_in_a_run_that_is_right(row: Row) -> None:
    assert judged(row) == ([], [])


def test_all_that_is_wrong_is_found_at_once() -> None:
    unreadable = Problem("data.train_files", "no such file")
    verdict = judge(
        parse(CONFIG, [(PP, 3)])[0],
        SubmitFacts(
            unreadable=[unreadable],
            shape=msgspec.structs.replace(SHAPE, hidden_act="gelu"),
            save_folder=SaveFolder(path="/h", error="no"),
        ),
    )
    assert {p.where for p in verdict.problems} == {
        "data.train_files",
        "model.partial_pretrain",
        SAVE_DIR,
        PP,
    }
    assert verdict.planned_steps is None


def test_a_fork_has_room_for_its_own_checkpoints() -> None:
    """What its parent has saved is on the disk already."""
    spec, _ = parse(CONFIG, [(SAVE, 1), ("checkpoint.keep_last", 9), (BATCH, 16)])
    needs = [storage(spec, SHAPE, 7, "float32", first).needed for first in (0, 5)]
    facts = SubmitFacts(
        shape=SHAPE, train=data(), save_folder=SaveFolder(path="/h", above="/", free=needs[1]), val=None
    )
    assert needs[1] < needs[0]
    assert [w.where for w in judge(spec, facts).warnings] == [SAVE_DIR]
    forked = judge(spec, facts, lambda digest: OrderStart(5, 80))
    assert (forked.warnings, forked.planned_steps) == ([], 7)

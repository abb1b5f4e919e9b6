"""Configs of other trainers: recognised, answered with sftd's names, and taken where they ask for nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from sftd.domain.errors import Problem, Refused
from sftd.domain.spec.aliases import ALIASES
from sftd.domain.spec.model_section import Lora
from sftd.domain.spec.other_configs import whose
from sftd.domain.spec.other_trainers import BY_NAME, TABLE, TOOLS
from sftd.domain.spec.parse import LEAVES, parse
from sftd.domain.spec.spec import Spec
from sftd.wire.spec.yaml_text import load_yaml

AXOLOTL = """
base_model: some/model
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: true
datasets: [{path: some/data, type: alpaca}]
val_set_size: 0.05
output_dir: ./out
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
lora_modules_to_save: [lm_head]
sequence_len: 4096
sample_packing: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
saves_per_epoch: 1
something_new: 1
"""
LLAMA_FACTORY = """
model_name_or_path: some/model
stage: sft
do_train: true
finetuning_type: full
deepspeed: ds.json
dataset: some
template: qwen
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
output_dir: out
save_steps: 500
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
learning_rate: 1.0e-5
num_train_epochs: 3.0
lr_scheduler_type: cosine
bf16: true
resume_from_checkpoint: null
"""
TRL = """
model_name_or_path: some/model
dataset_name: some/data
dataset_train_split: train
max_length: 2048
packing: true
assistant_only_loss: true
output_dir: out
learning_rate: 2.0e-5
num_train_epochs: 1
per_device_train_batch_size: 8
gradient_checkpointing: true
eval_strategy: steps
eval_steps: 100
use_peft: false
push_to_hub: true
hub_model_id: me/mine
"""
# The keys and values of verl's sft_trainer.yaml.
VERL = """
hydra:
  searchpath: [pkg://verl.trainer.config]
defaults: [optim: fsdp, _self_]
data:
  train_batch_size: 256
  micro_batch_size: null
  micro_batch_size_per_gpu: 4
  train_files: /data/train.parquet
  val_files: /data/val.parquet
  train_max_samples: -1
  val_max_samples: -1
  prompt_key: question
  response_key: answer
  prompt_dict_keys: null
  response_dict_keys: null
  multiturn:
    enable: false
    messages_key: messages
    tools_key: tools
    enable_thinking_key: enable_thinking
  max_length: 1024
  truncation: error
  balance_dp_token: False
  chat_template: null
  custom_cls:
    path: null
    name: null
  use_shm: False
  apply_chat_template_kwargs: {}
model:
  partial_pretrain: /models/base
  use_shm: False
  fsdp_config:
    model_dtype: fp32
    wrap_policy:
      min_num_params: 0
    cpu_offload: False
    offload_params: False
  external_lib: null
  enable_gradient_checkpointing: True
  trust_remote_code: False
  lora_rank: 0
  lora_alpha: 16
  target_modules: all-linear
  use_liger: False
  strategy: fsdp2
optim:
  lr: 1e-5
  betas: [0.9, 0.95]
  weight_decay: 0.01
  lr_warmup_steps_ratio: 0.1
  clip_grad: 1.0
  lr_scheduler: cosine
ulysses_sequence_parallel_size: 1
use_remove_padding: False
trainer:
  default_local_dir: checkpoints/${trainer.project_name}/${trainer.experiment_name}
  default_hdfs_dir: null
  project_name: gsm8k-sft
  experiment_name: test
  total_epochs: 4
  total_training_steps: null
  logger: ['console']
  seed: 1
  save_freq: -1
  test_freq: -1
  nnodes: 1
  n_gpus_per_node: 8
  max_ckpt_to_keep: null
  resume_mode: auto
  resume_from_path: null
  checkpoint:
    save_contents: ["model", "optimizer", "extra"]
    load_contents: ${trainer.checkpoint.save_contents}
  device: cuda
"""


def refusal(text: str, *overrides: tuple[str, Any]) -> list[Problem]:
    with pytest.raises(Refused) as refused:
        parse(load_yaml(text, "text"), overrides)
    return refused.value.problems


@pytest.mark.parametrize(
    ("text", "tool"), [(AXOLOTL, "axolotl"), (LLAMA_FACTORY, "LLaMA-Factory"), (TRL, "TRL")]
)
def test_a_config_of_another_trainer_is_answered_in_one_screen(text: str, tool: str) -> None:
    assert whose(load_yaml(text, "text")) == tool
    first, *others = refusal(text)
    assert first.what == f"looks like a config of {tool}; sftd has other names"
    assert "docs/coming-from.md" in first.fix
    assert len(others) < 22
    said = {p.where: p.what for p in others}
    assert said["learning_rate"] == "write `optimizer.lr`"
    assert not any("unknown key" in p.what for p in others)


def test_the_answer_names_what_has_no_counterpart_by_its_reason() -> None:
    said = {p.where: p.what for p in refusal(AXOLOTL)}
    assert said["lora_r"] == "write `model.lora.rank`"
    assert said["load_in_4bit"] == "write `model.quantize`: nf4, with adapters"
    assert "stay frozen" in said["lora_modules_to_save"]
    assert said["optimizer"] == "no counterpart: sftd has AdamW only"
    assert said["something_new"] == "not known"
    # False, null and what sftd does anyway.
    assert not said.keys() & {"load_in_8bit", "wandb_project", "model_type", "bf16"}


def test_what_two_tools_share_is_ascribed_to_both() -> None:
    shared = {"learning_rate": 1, "num_train_epochs": 1, "save_steps": 1, "run_name": "x"}
    assert whose(shared) == "LLaMA-Factory or TRL"


@pytest.mark.parametrize("config", [{}, {"model": {}, "learning_rate": 1}, {"a": 1, "b": 2, "c": 3, "d": 4}])
def test_other_configs_are_nobodys(config: dict[str, Any]) -> None:
    assert whose(config) == ""


def test_verls_stock_config_is_accepted() -> None:
    spec, warnings = parse(load_yaml(VERL, "text"))
    assert (spec.world_size, spec.launch.device, spec.checkpoint.save_dir) == (8, "cuda", "")
    assert (spec.trainer.epochs, spec.trainer.save_interval, spec.data.sequence_length) == (4, 0, 1024)
    assert (spec.scheduler.type, spec.scheduler.warmup_ratio, spec.training.use_rmpad) == (
        "cosine",
        0.1,
        False,
    )
    assert {w.where for w in warnings} == {
        "data.prompt_key",
        "data.response_key",
        "hydra.searchpath",
        "defaults",
        "data.multiturn",
        "model.fsdp_config",
        "model.strategy",
        "trainer.max_ckpt_to_keep",
        "trainer.checkpoint",
    }


def test_verls_adapters_are_those_of_sftd() -> None:
    """Its stock config has an alpha and targets beside a rank of 0."""
    spec, _ = parse(load_yaml(VERL, "text"), [("model.lora_rank", 32)])
    assert spec.model.lora == Lora(rank=32, alpha=16.0)
    spec, _ = parse(
        load_yaml(VERL, "text"), [("model.lora.rank", 8), ("model.target_modules", ["q_proj", "v"])]
    )
    assert (spec.model.lora.rank, spec.model.lora.targets) == (8, ["q", "v"])
    own = {"model": {"lora": {"rank": 8, "alpha": 1}}, "data": {"train_files": "/t"}}
    spec, _ = parse(own | {"model": own["model"] | {"path": "/m"}}, [("model.lora_alpha", 2)])
    assert spec.model.lora.alpha == 2.0


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.target_modules", ["q_proj", "lm_head"], "lm_head gets no adapter"),
        ("data.chat_template", "x", "sftd prepare"),
        ("data.custom_cls.path", "mine.py", "sftd prepare"),
        ("trainer.resume_from_path", "/c", "sftd resume"),
        ("data.micro_batch_size", 8, "training.micro_batch_size_per_gpu"),
    ],
)
def test_what_verls_config_asks_for_in_earnest_is_refused(key: str, value: Any, says: str) -> None:
    assert says in str(Refused(refusal(VERL, (key, value))))


@pytest.mark.parametrize(
    ("key", "here"),
    [
        ("save_steps", "trainer.save_interval"),
        ("trainer.save_steps", "trainer.save_interval"),
        ("data.per_device_train_batch_size", "training.micro_batch_size_per_gpu"),
        ("learning_rate", "optimizer.lr"),
        ("optimizer.learning_rate", "optimizer.lr"),
        ("trainer.num_train_epochs", "trainer.epochs"),
        ("data.cutoff_len", "data.sequence_length"),
        ("output_dir", "checkpoint.save_dir"),
        ("training.sample_packing", "training.use_rmpad"),
        ("lora_r", "model.lora.rank"),
        ("model.lora.r", "model.lora.rank"),
        ("peft.dim", "model.lora.rank"),
        ("model.lora.target_modules", "model.lora.targets"),
        ("load_in_4bit", "model.quantize"),
        ("model.adapter_name_or_path", "model.lora.adapter"),
        ("freeze_trainable_layers", "model.freeze"),
    ],
)
def test_a_known_name_is_suggested_before_any_that_is_spelled_alike(key: str, here: str) -> None:
    (problem,) = refusal("{model: {path: /m}, data: {train_files: /t, val_files: /v}}", (key, 3))
    assert f"write `{here}`" in problem.fix


@pytest.mark.parametrize(
    "key", ["max_samples", "data.response_kex", "trainer.resume_path", "model.lora_dim", "lora_rank"]
)
def test_nothing_wrong_is_suggested(key: str) -> None:
    (problem,) = refusal("{model: {path: /m}, data: {train_files: /t, val_files: /v}}", (key, 3))
    assert "did you mean" not in problem.fix


@pytest.mark.parametrize("letter", TOOLS)
def test_the_table_knows_the_names_of_each(letter: str) -> None:
    """Of three tools it has the names of adapters only."""
    assert sum(letter in row.tools for row in TABLE) >= (30 if letter in "altv" else 7)


def test_every_row_is_one_name_with_a_key_that_exists_or_a_reason() -> None:
    assert len(BY_NAME) == len(TABLE)
    for row in TABLE:
        assert row.here in LEAVES or (not row.here and row.note), row.name
        assert set(row.tools) <= set(TOOLS), row.name
        assert row.name not in ALIASES, row.name
        assert not (row.here and row.harmless), row.name


def test_no_row_hides_a_key_of_sftd() -> None:
    assert not LEAVES.keys() & BY_NAME.keys()
    assert (
        parse({"model": {"path": "/m"}, "data": {"train_files": "/t"}, "optimizer": {"lr": 1e-4}})[0]
        != Spec()
    )

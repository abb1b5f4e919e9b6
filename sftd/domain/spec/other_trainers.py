"""Common config names of axolotl, LLaMA-Factory, TRL and verl, those of adapters in Unsloth, NeMo and torchtune, and their
counterparts in sftd.

`docs/coming-from.md` is generated from this table, and refusals of unknown keys quote it (`other_configs`). Names that sftd
accepts are in `aliases`.
"""

from __future__ import annotations

from typing import Any

import msgspec

# Letter in the table → tool.
TOOLS = {"a": "axolotl", "l": "LLaMA-Factory", "t": "TRL", "v": "verl"}
TOOLS |= {"u": "Unsloth", "n": "NeMo and Megatron-Bridge", "o": "torchtune"}


class Known(msgspec.Struct, frozen=True):
    """A config name of other trainers. `tools` are the letters of the tools that have it. `here` is the key in sftd, "" if there
    is none. `note` describes how the value differs, or why there is no counterpart.

    `neutral` values match what sftd does anyway, so the name is ignored silently. Null is always neutral, and so is any false
    value without a counterpart. A `harmless` name may have any value and is ignored with a warning."""

    tools: str
    name: str
    here: str = ""
    note: str = ""
    neutral: tuple[Any, ...] = ()
    harmless: bool = False

    def is_neutral(self, value: Any) -> bool:
        """Whether this value is ignored without a warning."""
        return value is None or (not self.here and not value) or value in self.neutral

    @property
    def answer(self) -> str:
        """The counterpart with its note, or the reason why there is none."""
        if not self.here:
            return self.note
        return f"`{self.here}`" + (f": {self.note}" if self.note else "")


_LORA = "above 0 trains adapters (LoRA); for QLoRA also model.quantize: nf4"
_TARGETS = "q for q_proj and so on"
_FUSED = "q, k, v for linear_qkv, o for linear_proj, gate, up for linear_fc1, down for linear_fc2"
_NO_OUTPUT = "embeddings, norms and the output layer stay frozen under adapters"
_EVERY_LAYER = "every layer gets the adapters"
_PLAIN = "plain LoRA, or rsLoRA with model.lora.rslora"
_MERGE = "`sftd export RUN DIR --merge` writes the merged model, from which another run may start"
_FREEZE = "the opposite: expressions of the weights that are not trained"
_EIGHT = "frozen weights have 16 or 4 bits: see model.quantize"
_NF4 = "NF4 in blocks of 64, of a model that is not quantised yet: see model.quantize"
_SCALES = "a scale of 4 bytes for each 64 weights"
_HUB = "sftd does not upload: `sftd export` writes a folder that `hf upload` takes"
_PREPARE = "data is prepared before: see `sftd prepare`"
_MLFLOW = "MLflow mirrors every run: see docs/mlflow.md"
_MEGATRON = "Megatron-core shards the model: `sftd config model.megatron`"
_KERNELS = "sftd chooses its kernels"
_PRECISION = "bfloat16 on GPUs: see model.megatron.params_dtype"
_RESUME = "a run is resumed by the daemon, or with `sftd resume`"
_LOGGED = "every step is logged"
_TOKENISED = "Parquet files that `sftd prepare` writes"
_BATCH = "of all GPUs: micro-batch × accumulation × GPUs"
_RL = "sftd trains on labels only: no preference or reward training"
_BEST = "checkpoint.keep_best keeps the best by validation loss, or {metric, mode, count}"

_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw", "AdamW")

# fmt: off
TABLE: tuple[Known, ...] = (
    # Model
    Known("a", "base_model", "model.partial_pretrain", "a folder, or a cached hub id"),
    Known("lt", "model_name_or_path", "model.partial_pretrain", "a folder, or a cached hub id"),
    Known("a", "base_model_config", "model.partial_pretrain", "the model's own config.json is read"),
    Known("a", "overrides_of_model_config", "model.override_config"),
    Known("a", "model_type", note="read from config.json", harmless=True),
    Known("a", "tokenizer_type", note="read from the model folder", harmless=True),
    Known("a", "tokenizer_config", note="the tokenizer is that of the model folder"),
    Known("alt", "trust_remote_code", "model.trust_remote_code"),
    Known("lt", "model_revision", note="give the folder of the revision: `hf download ID --revision R --local-dir DIR`", neutral=("main",)),
    Known("l", "cache_dir", note="set HF_HUB_CACHE: a hub id is looked up there"),
    Known("a", "strict", note="keys are always checked", harmless=True),
    Known("l", "rope_scaling", "model.override_config", "write {rope_scaling: …} as config.json has it"),
    Known("l", "resize_vocab", note="add tokens to the model folder first"),
    Known("a", "special_tokens", note="set them in the model folder's tokenizer files"),
    Known("a", "tokens", note="add tokens to the model folder first"),
    Known("t", "eos_token", note="set it in the model folder's tokenizer files"),
    Known("t", "pad_token", note="sftd needs no padding token", harmless=True),
    Known("a", "flash_attention", note=_KERNELS, harmless=True),
    Known("a", "sdp_attention", note=_KERNELS, harmless=True),
    Known("a", "xformers_attention", note=_KERNELS, harmless=True),
    Known("l", "flash_attn", note=_KERNELS, harmless=True),
    Known("t", "attn_implementation", note=_KERNELS, harmless=True),
    Known("at", "torch_compile", note=_KERNELS, harmless=True),
    Known("t", "use_liger_kernel", note=_KERNELS, harmless=True),
    Known("l", "enable_liger_kernel", note=_KERNELS, harmless=True),
    Known("l", "use_unsloth", note=_KERNELS, harmless=True),
    Known("a", "plugins", note="sftd has no plugins"),
    # Adapters, frozen parts
    Known("a", "adapter", "model.lora.rank", _LORA),
    Known("l", "finetuning_type", "model.lora.rank", "above 0 is lora, 0 is full; for freeze see model.freeze", neutral=("full",)),
    Known("t", "use_peft", "model.lora.rank", _LORA, neutral=(False,)),
    Known("u", "full_finetuning", "model.lora.rank", "0, the default, trains all weights", neutral=(True,)),
    Known("n", "peft.peft_scheme", "model.lora.rank", _LORA, neutral=("none",)),
    Known("at", "lora_r", "model.lora.rank"),
    Known("lo", "lora_rank", "model.lora.rank"),
    Known("u", "r", "model.lora.rank"),
    Known("n", "peft.dim", "model.lora.rank"),
    Known("n", "peft.lora_tuning.adapter_dim", "model.lora.rank"),
    Known("altuo", "lora_alpha", "model.lora.alpha"),
    Known("n", "peft.alpha", "model.lora.alpha"),
    Known("n", "peft.lora_tuning.alpha", "model.lora.alpha"),
    Known("altuo", "lora_dropout", "model.lora.dropout"),
    Known("n", "peft.dropout", "model.lora.dropout"),
    Known("n", "peft.dropout_position", note="dropout is applied to an adapter's inputs", neutral=("pre",)),
    Known("n", "peft.lora_tuning.adapter_dropout", "model.lora.dropout"),
    Known("at", "lora_target_modules", "model.lora.targets", _TARGETS),
    Known("a", "lora_target_linear", "model.lora.targets", "all-linear, which is the default", neutral=(True,)),
    Known("l", "lora_target", "model.lora.targets", "all-linear for all; " + _TARGETS, neutral=("all",)),
    Known("tu", "target_modules", "model.lora.targets", _TARGETS),
    Known("n", "peft.target_modules", "model.lora.targets", _FUSED),
    Known("n", "peft.lora_tuning.target_modules", "model.lora.targets", _FUSED),
    Known("n", "peft.exclude_modules", "model.lora.targets", "the projections that remain"),
    Known("o", "lora_attn_modules", "model.lora.targets", _TARGETS + "; output_proj is o"),
    Known("o", "apply_lora_to_mlp", "model.lora.targets", "gate, up, down"),
    Known("o", "apply_lora_to_output", note=_NO_OUTPUT),
    Known("u", "finetune_attention_modules", "model.lora.targets", "q, k, v, o"),
    Known("u", "finetune_mlp_modules", "model.lora.targets", "gate, up, down"),
    Known("ltu", "use_rslora", "model.lora.rslora"),
    Known("a", "peft_use_rslora", "model.lora.rslora"),
    Known("tu", "init_lora_weights", "model.lora.init", "kaiming or gaussian", neutral=(True,)),
    Known("a", "peft_init_lora_weights", "model.lora.init", "kaiming or gaussian", neutral=(True,)),
    Known("n", "peft.lora_A_init_method", "model.lora.init", "kaiming or gaussian"),
    Known("n", "peft.lora_B_init_method", note="B begins as zeros", neutral=("zero",)),
    Known("n", "peft.lora_tuning.column_init_method", "model.lora.init", "kaiming or gaussian"),
    Known("n", "peft.lora_tuning.row_init_method", note="B begins as zeros", neutral=("zero",)),
    Known("a", "lora_model_dir", "model.lora.adapter"),
    Known("l", "adapter_name_or_path", "model.lora.adapter", "one folder"),
    Known("n", "peft.restore_from_path", "model.lora.adapter", "a PEFT folder"),
    Known("at", "lora_modules_to_save", note=_NO_OUTPUT),
    Known("l", "additional_target", note=_NO_OUTPUT),
    Known("u", "modules_to_save", note=_NO_OUTPUT),
    Known("u", "bias", note="adapters have no bias", neutral=("none",)),
    Known("u", "layers_to_transform", note=_EVERY_LAYER),
    Known("a", "peft_layers_to_transform", note=_EVERY_LAYER),
    Known("t", "lora_task_type", note="a causal language model is trained", harmless=True),
    Known("lt", "use_dora", note=_PLAIN),
    Known("a", "peft_use_dora", note=_PLAIN),
    Known("l", "pissa_init", note=_PLAIN),
    Known("u", "loftq_config", note=_PLAIN),
    Known("al", "loraplus_lr_ratio", note="A and B have one learning rate"),
    Known("a", "relora_steps", note=_PLAIN),
    Known("a", "lora_mlp_kernel", note=_KERNELS, harmless=True),
    Known("a", "lora_qkv_kernel", note=_KERNELS, harmless=True),
    Known("a", "lora_o_kernel", note=_KERNELS, harmless=True),
    Known("a", "lora_on_cpu", note=_KERNELS, harmless=True),
    Known("a", "merge_lora", note=_MERGE),
    Known("l", "create_new_adapter", note=_MERGE),
    Known("o", "save_adapter_weights_only", note="checkpoints hold what is trained", harmless=True),
    Known("l", "freeze_trainable_layers", "model.freeze", _FREEZE),
    Known("l", "freeze_trainable_modules", "model.freeze", _FREEZE),
    Known("l", "freeze_extra_modules", "model.freeze", _FREEZE),
    Known("a", "unfrozen_parameters", "model.freeze", _FREEZE),
    # Quantised weights
    Known("atu", "load_in_4bit", "model.quantize", "nf4, with adapters", neutral=(False,)),
    Known("au", "load_in_8bit", note=_EIGHT),
    Known("l", "quantization_bit", "model.quantize", "nf4 for 4, with adapters; 8 bits: no"),
    Known("o", "quantize_base", "model.quantize", "nf4, with adapters", neutral=(False,)),
    Known("l", "quantization_method", note=_NF4, harmless=True),
    Known("l", "quantization_type", note=_NF4, harmless=True),
    Known("t", "bnb_4bit_quant_type", note=_NF4, harmless=True),
    Known("t", "use_bnb_nested_quant", note=_SCALES, harmless=True),
    Known("l", "double_quantization", note=_SCALES, harmless=True),
    Known("a", "gptq", note=_NF4),
    # Tasks
    Known("l", "stage", note=f"{_RL}; `sft` is accepted", neutral=("sft",)),
    Known("a", "rl", note=_RL),
    Known("l", "pref_beta", note=_RL),
    # Data
    Known("a", "datasets", "data.train_files", _TOKENISED),
    Known("a", "test_datasets", "data.val_files", _TOKENISED),
    Known("l", "dataset", "data.train_files", _TOKENISED),
    Known("l", "eval_dataset", "data.val_files", _TOKENISED),
    Known("l", "dataset_dir", note="paths of data files start at the folder where you submit"),
    Known("l", "tokenized_path", "data.train_files", _TOKENISED),
    Known("t", "dataset_name", "data.train_files", _TOKENISED),
    Known("t", "dataset_config", note=_PREPARE),
    Known("t", "dataset_train_split", note="`sftd prepare --split`"),
    Known("t", "dataset_test_split", note="`sftd prepare --split`"),
    Known("t", "dataset_text_field", note=_PREPARE),
    Known("a", "dataset_prepared_path", note="`sftd prepare -o FILE` writes what data.train_files reads"),
    Known("a", "val_set_size", "data.val_files", "`sftd prepare --val-fraction F --val-out FILE`"),
    Known("l", "val_size", "data.val_files", "`sftd prepare --val-fraction F --val-out FILE`"),
    Known("l", "max_samples", note="prepare fewer rows"),
    Known("l", "template", note="the chat template is that of the model folder: see `sftd prepare`"),
    Known("av", "chat_template", note="the chat template is that of the model folder: see `sftd prepare`"),
    Known("t", "chat_template_path", note="the chat template is that of the model folder: see `sftd prepare`"),
    Known("a", "train_on_inputs", note="`sftd prepare` decides which tokens are trained"),
    Known("l", "train_on_prompt", note="`sftd prepare` decides which tokens are trained"),
    Known("l", "mask_history", note="`sftd prepare` decides which tokens are trained"),
    Known("t", "completion_only_loss", note="what `sftd prepare` does", harmless=True),
    Known("t", "assistant_only_loss", note="what `sftd prepare` does", harmless=True),
    Known("a", "sequence_len", "data.sequence_length"),
    Known("l", "cutoff_len", "data.sequence_length"),
    Known("t", "max_length", "data.sequence_length"),
    Known("t", "max_seq_length", "data.sequence_length"),
    Known("a", "sample_packing", "training.use_rmpad", "samples never see each other"),
    Known("lt", "packing", "training.use_rmpad", "samples never see each other"),
    Known("l", "neat_packing", "training.use_rmpad", "samples never see each other"),
    Known("t", "padding_free", "training.use_rmpad"),
    Known("t", "packing_strategy", note="training.use_rmpad packs whole samples into micro-batches", harmless=True),
    Known("t", "eval_packing", note="validation is packed as training is", harmless=True),
    Known("a", "eval_sample_packing", note="validation is packed as training is", harmless=True),
    Known("a", "pad_to_sequence_len", note="training.use_rmpad needs no padding", harmless=True),
    Known("t", "pad_to_multiple_of", note="sftd pads by itself", harmless=True),
    Known("at", "group_by_length", note="use training.use_rmpad against padding"),
    Known("a", "shuffle_merged_datasets", "data.shuffle"),
    Known("l", "streaming", note="data files are read piece by piece as they are"),
    Known("l", "mix_strategy", note="all rows of data.train_files are read; data.sources have weights"),
    Known("l", "interleave_probs", note="give weights in data.sources"),
    Known("l", "overwrite_cache", note="sftd keeps no cache of data", harmless=True),
    Known("l", "preprocessing_num_workers", note="`sftd prepare --workers N`", harmless=True),
    Known("t", "dataset_num_proc", note="`sftd prepare --workers N`", harmless=True),
    Known("a", "dataset_processes", note="`sftd prepare --workers N`", harmless=True),
    Known("lt", "dataloader_num_workers", note="sftd reads ahead by itself", harmless=True),
    Known("t", "remove_unused_columns", note="columns that sftd does not use are named at submit; some are refused", harmless=True),
    Known("alt", "neftune_noise_alpha", note="sftd adds no noise to embeddings"),
    # Batch and length
    Known("a", "micro_batch_size", "training.micro_batch_size_per_gpu"),
    Known("lt", "per_device_train_batch_size", "training.micro_batch_size_per_gpu"),
    Known("lt", "per_device_eval_batch_size", note="validation uses training's micro-batch", harmless=True),
    Known("a", "eval_batch_size", note="validation uses training's micro-batch", harmless=True),
    Known("alt", "gradient_accumulation_steps", "data.train_batch_size", _BATCH),
    Known("a", "num_epochs", "trainer.epochs", "a whole number"),
    Known("lt", "num_train_epochs", "trainer.epochs", "a whole number"),
    Known("alt", "max_steps", "trainer.max_steps", "-1 is to leave it out", neutral=(-1,)),
    # Optimizer and schedule
    Known("alt", "learning_rate", "optimizer.lr"),
    Known("a", "optimizer", note="sftd has AdamW only", neutral=_ADAMW),
    Known("lt", "optim", note="sftd has AdamW only", neutral=_ADAMW),
    Known("alt", "weight_decay", "optimizer.weight_decay"),
    Known("alt", "adam_beta1", "optimizer.adam_beta1"),
    Known("alt", "adam_beta2", "optimizer.adam_beta2"),
    Known("alt", "adam_epsilon", "optimizer.adam_eps"),
    Known("alt", "max_grad_norm", "optimizer.clip_grad"),
    Known("a", "lr_scheduler", "scheduler.type"),
    Known("lt", "lr_scheduler_type", "scheduler.type"),
    Known("t", "lr_scheduler_kwargs", "scheduler.min_lr_ratio", "the lowest learning rate as a share of the peak"),
    Known("a", "cosine_min_lr_ratio", "scheduler.min_lr_ratio"),
    Known("alt", "warmup_ratio", "scheduler.warmup_ratio"),
    Known("alt", "warmup_steps", "scheduler.warmup_steps"),
    Known("l", "use_galore", note="sftd has AdamW only"),
    Known("l", "use_badam", note="sftd has AdamW only"),
    # Memory, precision, devices
    Known("alt", "gradient_checkpointing", "model.enable_gradient_checkpointing"),
    Known("at", "gradient_checkpointing_kwargs", "model.recompute", "full or selective"),
    Known("l", "disable_gradient_checkpointing", "model.enable_gradient_checkpointing", "the opposite"),
    Known("t", "activation_offloading", "model.enable_gradient_checkpointing", "activations are computed again instead"),
    Known("alt", "bf16", note=_PRECISION, harmless=True),
    Known("alt", "fp16", note=_PRECISION),
    Known("at", "tf32", note=_PRECISION, harmless=True),
    Known("t", "torch_dtype", "model.megatron.params_dtype", "auto, float32 or bfloat16"),
    Known("t", "dtype", "model.megatron.params_dtype", "auto, float32 or bfloat16"),
    Known("l", "upcast_layernorm", note=_PRECISION),
    Known("alt", "deepspeed", note=_MEGATRON),
    Known("alt", "fsdp", note=_MEGATRON),
    Known("alt", "fsdp_config", note=_MEGATRON),
    Known("lt", "ddp_timeout", "launch.hang_seconds"),
    Known("t", "ddp_find_unused_parameters", note=_MEGATRON, harmless=True),
    Known("a", "context_parallel_size", "model.megatron.context_parallel_size"),
    Known("a", "sequence_parallel_degree", "model.megatron.context_parallel_size"),
    Known("a", "tensor_parallel_size", "model.megatron.tensor_model_parallel_size"),
    Known("a", "local_rank", note="torchrun numbers the ranks", harmless=True),
    # Validation, checkpoints, resume
    Known("a", "evals_per_epoch", "trainer.val_check_interval", "in steps"),
    Known("alt", "eval_steps", "trainer.val_check_interval", "in steps; 0 is at start and end only"),
    Known("lt", "eval_strategy", "trainer.val_check_interval", "in steps; 0 is at start and end only", neutral=("steps",)),
    Known("t", "eval_on_start", "trainer.val_before_train"),
    Known("lt", "do_train", note="a run trains", harmless=True),
    Known("lt", "do_eval", "data.val_files", "validation is on where there are files"),
    Known("a", "eval_table_size", "trainer.sample_prompts", "prompts that are answered at each validation"),
    Known("l", "predict_with_generate", "trainer.sample_prompts", "prompts that are answered at each validation"),
    Known("l", "compute_accuracy", note="each step and validation records the accuracy of tokens"),
    Known("at", "early_stopping_patience", note="trainer.early_stop: {metric, mode, patience, min_delta}"),
    Known("lt", "load_best_model_at_end", note=_BEST),
    Known("t", "metric_for_best_model", note=_BEST, harmless=True),
    Known("t", "greater_is_better", note=_BEST, harmless=True),
    Known("alt", "output_dir", "checkpoint.save_dir", "by default each run has its own"),
    Known("lt", "overwrite_output_dir", note="a run never overwrites another", harmless=True),
    Known("a", "saves_per_epoch", "trainer.save_interval", "in steps"),
    Known("alt", "save_steps", "trainer.save_interval", "in steps; 0 is at the end only"),
    Known("alt", "save_strategy", "trainer.save_interval", "in steps; 0 is at the end only", neutral=("steps",)),
    Known("alt", "save_total_limit", "checkpoint.keep_last"),
    Known("at", "save_safetensors", note="`sftd export` writes safetensors", harmless=True),
    Known("lt", "save_only_model", note="a checkpoint holds all that a resume needs; `sftd export` writes the weights"),
    Known("alt", "resume_from_checkpoint", note=_RESUME),
    Known("a", "auto_resume_from_checkpoints", note=_RESUME, harmless=True),
    Known("l", "export_dir", note="`sftd export RUN FOLDER`"),
    Known("at", "hub_model_id", note=_HUB),
    Known("l", "export_hub_model_id", note=_HUB),
    Known("t", "push_to_hub", note=_HUB),
    Known("a", "hub_strategy", note=_HUB, harmless=True),
    # Names and logs
    Known("lt", "run_name", "trainer.experiment_name"),
    Known("a", "wandb_name", "trainer.experiment_name"),
    Known("a", "wandb_project", "trainer.project_name", _MLFLOW),
    Known("a", "mlflow_experiment_name", "trainer.project_name"),
    Known("a", "mlflow_tracking_uri", note="set MLFLOW_TRACKING_URI for the daemon"),
    Known("a", "wandb_entity", note=_MLFLOW, harmless=True),
    Known("a", "wandb_watch", note=_MLFLOW, harmless=True),
    Known("a", "wandb_log_model", note=_MLFLOW, harmless=True),
    Known("lt", "report_to", note=_MLFLOW, neutral=("none", ["none"], "mlflow", ["mlflow"]), harmless=True),
    Known("alt", "logging_steps", note=_LOGGED, harmless=True),
    Known("t", "logging_strategy", note=_LOGGED, harmless=True),
    Known("t", "logging_first_step", note=_LOGGED, harmless=True),
    Known("t", "logging_dir", note=_MLFLOW, harmless=True),
    Known("l", "plot_loss", note="`sftd watch` and `sftd compare` plot it", harmless=True),
    Known("t", "disable_tqdm", note="see `sftd watch`", harmless=True),
    Known("a", "debug", note="see `sftd logs`", harmless=True),
    Known("alt", "seed", "model.megatron.seed"),
    Known("t", "data_seed", "model.megatron.seed", "one seed for everything"),
    # verl, without the names that are accepted (see `aliases`)
    Known("v", "data.micro_batch_size", "training.micro_batch_size_per_gpu"),
    Known("v", "data.prompt_key", note=_PREPARE, harmless=True),
    Known("v", "data.response_key", note=_PREPARE, harmless=True),
    Known("v", "data.prompt_dict_keys", note=_PREPARE, harmless=True),
    Known("v", "data.response_dict_keys", note=_PREPARE, harmless=True),
    Known("v", "data.multiturn", note=_PREPARE, harmless=True),
    Known("v", "data.tools_key", note=_PREPARE, harmless=True),
    Known("v", "data.enable_thinking_key", note=_PREPARE, harmless=True),
    Known("v", "data.chat_template", note="the chat template is that of the model folder: see `sftd prepare`"),
    Known("v", "data.apply_chat_template_kwargs", note="`sftd prepare --template-arg KEY=VALUE`"),
    Known("v", "data.custom_cls", note=_PREPARE, neutral=({"path": None, "name": None},)),
    Known("v", "data.balance_dp_token", note="training.use_rmpad shares tokens out evenly", harmless=True),
    Known("v", "data.use_shm", note="data files are mapped into memory", harmless=True),
    Known("v", "data.max_token_len_per_gpu", "training.micro_batch_tokens"),
    Known("v", "data.use_dynamic_bsz", "training.use_rmpad"),
    Known("v", "data.pad_mode", note="see training.use_rmpad", harmless=True),
    Known("v", "data.train_max_samples", note="prepare fewer rows", neutral=(-1,)),
    Known("v", "data.val_max_samples", note="prepare fewer rows", neutral=(-1,)),
    Known("v", "data.ignore_input_ids_mismatch", note=_PREPARE),
    Known("v", "data.num_workers", note="sftd reads ahead by itself", harmless=True),
    Known("v", "model.use_shm", note="the model is read from its folder", harmless=True),
    Known("v", "model.fsdp_config", note=_MEGATRON, harmless=True),
    Known("v", "model.external_lib", note="sftd loads no other modules"),
    Known("v", "model.tokenizer_path", note="the tokenizer is that of the model folder"),
    Known("v", "model.use_liger", note=_KERNELS, harmless=True),
    Known("v", "model.strategy", note=_MEGATRON, harmless=True),
    Known("v", "engine.strategy", note=_MEGATRON, harmless=True),
    Known("v", "engine.seed", "model.megatron.seed"),
    Known("v", "optim.optimizer", note="sftd has AdamW only", neutral=_ADAMW),
    Known("v", "optim.optimizer_impl", note="sftd has AdamW only", neutral=("torch.optim",)),
    Known("v", "optim.num_cycles", note="half a cycle of the cosine", neutral=(0.5,)),
    Known("v", "optim.total_training_steps", "trainer.max_steps", neutral=(-1,)),
    Known("v", "trainer.default_hdfs_dir", note="checkpoint.save_dir is a folder of this host"),
    Known("v", "trainer.resume_from_path", note=_RESUME),
    Known("v", "trainer.resume_path", note=_RESUME),
    Known("v", "trainer.logger", note=_MLFLOW, neutral=("console", ["console"]), harmless=True),
    Known("v", "trainer.checkpoint", note="a checkpoint holds all that a resume needs", harmless=True),
    Known("v", "trainer.profile_interval", note="sftd has no profiler", neutral=([-1, -1],)),
    Known("v", "actor_rollout_ref", note=_RL),
    Known("v", "algorithm", note=_RL),
    Known("v", "critic", note=_RL),
    Known("v", "reward_model", note=_RL),
    Known("v", "hydra.searchpath", note="verl's launcher finds its config files by it", harmless=True),
    Known("v", "defaults", note="verl's launcher merges config files by it: give the merged one", harmless=True),
    Known("v", "trainer.balance_batch", note="training.use_rmpad shares tokens out evenly", harmless=True),
)
# fmt: on

BY_NAME: dict[str, Known] = {row.name: row for row in TABLE}

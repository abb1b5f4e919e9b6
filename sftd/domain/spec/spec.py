"""The spec: the frozen, validated, fully resolved config of a run, identified by its digest.

`sections` defines its sections, `parse` makes a spec from a user's config, and `rules` checks combinations of keys.
"""

from __future__ import annotations

import hashlib
import math
from typing import Annotated

import msgspec
from msgspec import Meta

from sftd.domain.spec.data_section import Data
from sftd.domain.spec.evaluation_section import EVALUATIONS
from sftd.domain.spec.model_section import Model
from sftd.domain.spec.on_resume import FREE
from sftd.domain.spec.sections import Checkpoint, Launch, Optimizer, Scheduler, Section, Trainer, Training


class OrderStart(msgspec.Struct, frozen=True):
    """A start position in the endless sample order: 0-based step `step` begins at position `sample`. Both are 0 for a new run.
    A fork may continue after its parent's last sample with another batch size, or begin with other data."""

    step: int = 0
    sample: int = 0

    def position(self, step: int, batch_size: int) -> int:
        """Position of the first sample of 0-based `step`, which must be at least `self.step`."""
        return self.sample + (step - self.step) * batch_size


FROM_THE_BEGINNING = OrderStart()


class Spec(Section, frozen=True):
    """The config of a run. `parse` resolves it: it fills in `launch.nproc_per_node`, `training.gradient_accumulation_steps`,
    and `trainer.epochs` or `trainer.max_steps`."""

    model: Model = Model()
    data: Data = Data()
    training: Training = Training()
    optimizer: Optimizer = Optimizer()
    scheduler: Scheduler = Scheduler()
    trainer: Trainer = Trainer()
    checkpoint: Checkpoint = Checkpoint()
    launch: Launch = Launch()
    evaluation: Annotated[
        list[EVALUATIONS],
        Meta(description="evaluations of checkpoints; see the keys of each kind below"),
        FREE,
    ] = msgspec.field(default_factory=list)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model: TP × PP × CP."""
        m = self.model.megatron
        return m.tensor_model_parallel_size * m.pipeline_model_parallel_size * m.context_parallel_size

    @property
    def nproc_per_node(self) -> int:
        """Ranks per machine."""
        if self.launch.nproc_per_node:
            return self.launch.nproc_per_node
        m = self.model.megatron
        # Any ranks of a pipeline stage share the experts.
        stage = math.lcm(m.tensor_model_parallel_size * m.context_parallel_size, m.expert_model_parallel_size)
        return -(-stage * m.pipeline_model_parallel_size // self.launch.nnodes)

    @property
    def world_size(self) -> int:
        """Total number of ranks."""
        return self.launch.nnodes * self.nproc_per_node

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model that each take a share of the batch."""
        return max(1, self.world_size // self.model_parallel_size)

    @property
    def micro_batch_tokens(self) -> int:
        """Maximum tokens of a packed micro-batch."""
        t = self.training
        return t.micro_batch_tokens or t.micro_batch_size_per_gpu * self.data.sequence_length

    @property
    def parallel_sizes(self) -> dict[str, int]:
        """The sizes of the layout by their common abbreviations."""
        m = self.model.megatron
        return {
            "TP": m.tensor_model_parallel_size,
            "PP": m.pipeline_model_parallel_size,
            "VPP": m.virtual_pipeline_model_parallel_size or 1,
            "CP": m.context_parallel_size,
            "EP": m.expert_model_parallel_size,
            "DP": self.data_parallel_size,
        }

    @property
    def num_microbatches(self) -> int:
        """Micro-batches that one rank accumulates in one optimizer step: train_batch_size ÷ (micro-batch × DP).

        When packed, the number depends on the tokens of the step. This is then the maximum, for samples that all have
        `sequence_length` tokens.
        """
        m, size = self.model.megatron, self.training.micro_batch_size_per_gpu
        if not self.training.use_rmpad:
            return max(1, self.data.train_batch_size // (size * self.data_parallel_size))
        samples = max(1, self.micro_batch_tokens // self.data.sequence_length)
        count = -(-self.data.train_batch_size // (samples * self.data_parallel_size))
        # The interleaved schedule needs a multiple of PP; empty micro-batches fill it up.
        group = m.pipeline_model_parallel_size if (m.virtual_pipeline_model_parallel_size or 1) > 1 else 1
        return -(-count // group) * group

    def planned_steps(self, train_rows: int | None, start: OrderStart = FROM_THE_BEGINNING) -> int:
        """Optimizer steps of the whole run over `train_rows` usable rows, including the steps before `start`. None: a mixture of
        sources that are repeated, which has no epochs.

        An epoch sees every row at least once. Its last batch is filled from the next epoch, so that every step has the same
        number of samples and no row is dropped.
        """
        if self.trainer.max_steps is not None:
            return self.trainer.max_steps
        assert train_rows is not None, "such a mixture has trainer.max_steps"
        left = max(0, (self.trainer.epochs or 1) * train_rows - start.sample)
        return start.step - (-left // self.data.train_batch_size)

    def warmup_steps(self, planned_steps: int) -> int:
        """Steps of linear warm-up; `scheduler.warmup_steps` wins over `scheduler.warmup_ratio`."""
        if self.scheduler.warmup_steps is not None:
            return self.scheduler.warmup_steps
        return round(self.scheduler.warmup_ratio * planned_steps)


_DEFAULTS = Spec()
# Keys that were added later, so that digests of older specs do not include them.
_ADDED_KEYS = (
    ("checkpoint", "after_success"),
    ("data", "sources"),
    ("data", "stages"),
    ("data", "weights_by"),
    ("model", "freeze"),
    ("model", "freeze_router"),
    ("model", "lora"),
    ("model", "moe"),
    ("model", "quantize"),
    ("model", "recompute_layers"),
    ("optimizer", "precision"),
    ("scheduler", "decay_ratio"),
    ("trainer", "early_stop"),
)


def canonical_json(spec: Spec) -> bytes:
    """The spec as JSON with sorted keys: equal specs give equal bytes.

    `evaluation` and the keys of `_ADDED_KEYS` are omitted if they have their defaults, so that an older spec keeps its digest.
    """
    written = msgspec.to_builtins(spec)
    if not spec.evaluation:
        del written["evaluation"]
    for section, key in _ADDED_KEYS:
        if getattr(getattr(spec, section), key) == getattr(getattr(_DEFAULTS, section), key):
            del written[section][key]
    return msgspec.json.encode(written, order="sorted")


def spec_digest(spec: Spec) -> str:
    """sha256 (hex) of the canonical JSON."""
    return hashlib.sha256(canonical_json(spec)).hexdigest()

"""The model and optimizer of this rank, and one training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from sftd.domain.model.shape import ModelShape
from sftd.domain.plan.sizes import checkpoint_bytes
from sftd.domain.spec.spec import Spec
from sftd.trainer.data.batches import MicroBatch
from sftd.trainer.model import model as models
from sftd.trainer.model import weights
from sftd.trainer.model.adapters import frozen, lora
from sftd.trainer.model.adapters.linears import Adapters, adapters_of, sum_partial_gradients
from sftd.trainer.model.grouped import experts as grouped
from sftd.trainer.model.grouped.adapters import GroupedAdapters
from sftd.trainer.model.moe import experts
from sftd.trainer.optimizer import optimizer as optimizers
from sftd.trainer.runtime.session import Session

LossFunction = Callable[..., tuple[Tensor, Tensor, Any]]


@dataclass(frozen=True)
class Trainee:
    """The model and its optimizer on this rank. `parameters`, `trained_parameters` and `state_bytes` count the whole model."""

    shape: ModelShape
    config: TransformerConfig
    chunks: list[GPTModel]
    model: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    session: Session
    clip_grad: float
    parameters: int
    trained_parameters: int
    state_bytes: int
    adapters: list[Adapters | GroupedAdapters]

    def run(
        self,
        batches: Sequence[Any],
        forward: Callable[[Any, Any], Any],
        *,
        rows: int,
        length: int,
        forward_only: bool,
    ) -> list[Any]:
        """Run micro-batches through the pipeline schedule.

        `forward(batch, model)` → (output, loss function), see Megatron's schedules. Returns the last values of the loss
        functions' tuples on the last stage, an empty list on the others.
        """

        def step(iterator: Iterator[Any], model: Any) -> Any:
            return forward(next(iterator), model)

        iterators = [iter(batches) for _ in self.model]
        schedule = get_forward_backward_func()
        found = schedule(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.model if len(self.model) > 1 else self.model[0],
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )
        return list(found)

    def losses(
        self, batches: Sequence[MicroBatch], *, divisor: float, forward_only: bool, sources: int = 0
    ) -> Tensor:
        """Σ weight · loss over the trained tokens of this rank's micro-batches ÷ `divisor`, followed by the figures of
        `linear_cross_entropy` for `sources` sources: FP64 [3 + sources] on the device, 0 on ranks that do not compute the loss.

        Accumulates the gradient of the first unless `forward_only`. Does not wait for the device.
        """
        figures = torch.zeros(2 + sources, dtype=torch.float64, device=self.session.device)

        def forward(batch: MicroBatch, model: Any) -> tuple[Tensor, LossFunction]:
            output = models.loss_share(model, batch, self.shape.vocab_size, divisor, figures)
            return output, partial(_keep, self.session.device)

        first = batches[0]
        found = self.run(batches, forward, rows=first.rows, length=first.length, forward_only=forward_only)
        loss = torch.stack(found).double().sum()[None] if found else figures.new_zeros(1)
        return torch.cat((loss, figures))

    def step(
        self,
        batches: Sequence[MicroBatch],
        *,
        divisor: float,
        learning_rate: float,
        accept: Callable[[Tensor, Tensor], bool] | None = None,
        sources: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """One optimizer step over this rank's micro-batches of a global batch, whose trained tokens have weights that sum to
        `divisor` (without weights: their number).

        Returns (this rank's part of the sums of `losses`, the gradient norm before clipping): FP64 on the device. Does not
        wait for the device unless `accept` does. The gradient is that of Σ weight · loss ÷ Σ weight over the global batch, for
        any micro-batches and layout. With `accept`, the weights are updated only if `accept(loss, norm)` is true.
        """
        for module in self.model:
            module.zero_grad_buffer()
        self.optimizer.zero_grad()
        for adapters in self.adapters:
            adapters.begin_step()
        sums = self.losses(batches, divisor=divisor, forward_only=False, sources=sources)
        optimizers.set_learning_rate(self.optimizer, learning_rate)
        accept_norm = None if accept is None else partial(accept, sums[0])
        return sums, optimizers.update(self.optimizer, self.clip_grad, accept_norm)

    def train(self, mode: bool) -> None:
        """Set training or evaluation mode."""
        for module in self.model:
            module.train(mode)


def _keep(device: torch.device, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # The zero is Megatron's token count, which `_finalize` ignores.
    return output, torch.zeros((), dtype=torch.int, device=device), output.detach()


def _finalize(
    adapters: list[Adapters | GroupedAdapters],
    model: list[Any],
    _tokens: Tensor | None = None,
    **options: Any,
) -> None:
    # The loss is already divided. With the token count, Megatron would divide all gradients in another pass.
    for each in adapters:
        each.end_step()
    finalize_model_grads(model, None, **options)
    sum_partial_gradients(adapters)


def load(spec: Spec, shape: ModelShape, session: Session, *, pretrained: bool) -> Trainee:
    """Build the model and the optimizer. Loads the weights of the model folder if `pretrained`; otherwise those that are
    trained are unset until a checkpoint is loaded. Raises `UserError`."""
    config = models.transformer_config(spec, shape, session)
    chunks = models.build(config, shape, session)
    if pretrained or spec.model.is_partly_frozen:
        weights.load(chunks, spec.model.partial_pretrain, shape, session.layout)
    frozen.freeze(chunks, spec.model, shape, session.layout)
    if spec.model.lora.rank:
        lora.add(chunks, spec.model, shape, session.layout, is_new=pretrained)
    model = models.distribute(config, chunks, session)
    optimizer = optimizers.build(spec, model, session)
    config.grad_scale_func = optimizer.scale_loss
    together = grouped.bind_parameters(chunks, is_hooked=model[0].ddp_config.overlap_grad_reduce)
    adapters: list[Adapters | GroupedAdapters] = [*together, *adapters_of(chunks, besides=together)]
    config.finalize_model_grads_func = partial(_finalize, adapters)
    no_sync = [module.no_sync for module in model]
    config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]
    parameters, trained = _count_parameters(chunks, shape.vocab_size, session)
    state_bytes = trained * checkpoint_bytes(spec, str(session.dtype).removeprefix("torch."))
    clip_grad = spec.optimizer.clip_grad
    return Trainee(
        shape,
        config,
        chunks,
        model,
        optimizer,
        session,
        clip_grad,
        parameters,
        trained,
        state_bytes,
        adapters,
    )


def for_answers(spec: Spec, shape: ModelShape, session: Session, chunks: list[GPTModel]) -> Trainee:
    """A trainee for generation only, from loaded chunks. It has no gradients or optimizer, so `step` fails."""
    config = models.transformer_config(spec, shape, session)
    model: list[Any] = [Float16Module(config, c) if config.bf16 else c for c in chunks]
    grouped.bind_parameters(chunks)
    parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    nothing: Any = None
    return Trainee(shape, config, chunks, model, nothing, session, 0.0, parameters, 0, 0, [])


def _count_parameters(chunks: list[GPTModel], vocab_size: int, session: Session) -> tuple[int, int]:
    """Numbers of all parameters of the whole model and of those that are trained."""
    counts = [0, 0]
    copy = max(session.layout.dp_rank, session.layout.cp_rank)
    for name, parameter in (named for chunk in chunks for named in chunk.named_parameters()):
        if not experts.is_counted(parameter, copy):
            continue
        is_split = getattr(parameter, "tensor_model_parallel", False)
        # `shared` marks the last stage's copy of a tied embedding.
        if (is_split or session.layout.tp_rank == 0) and not getattr(parameter, "shared", False):
            count = parameter.numel()
            if name.endswith(("word_embeddings.weight", "output_layer.weight")):
                rows, width = parameter.shape
                count -= width * _padding_rows(rows, vocab_size, session.layout.tp_rank)
            counts[0] += count
            counts[1] += count * parameter.requires_grad
    total = torch.tensor(counts, dtype=torch.int64, device=session.device)
    dist.all_reduce(total)
    every, trained = total.tolist()
    return every, trained


def _padding_rows(rows: int, vocab_size: int, tp_rank: int) -> int:
    """Number of padding rows among this rank's `rows` of a vocabulary-parallel weight."""
    return rows - min(rows, max(0, vocab_size - tp_rank * rows))

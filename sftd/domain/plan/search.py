"""Search of the best layout for given devices: plan every valid layout and choose the fastest that fits. Of a run that does not
fit, the same for ways to train that need less."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import msgspec

from sftd.domain.model.rules import MODEL
from sftd.domain.plan.duration import Machine
from sftd.domain.plan.plan import Plan, PlanInputs, make_plan
from sftd.domain.plan.sizes import chunk_layers, whole_recomputed
from sftd.domain.spec.rules import SPEC
from sftd.domain.spec.spec import Spec

_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
# Rank of the adapters that are suggested.
_RANK = 16
# A smaller speed-up is within the error of the rates and does not justify a change of the config.
_CLOSE = 1.03


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A layout. `changes` are the keys of the spec to set for it. `without_recompute` is the bytes that each device would need
    without recomputation; None if the layout does not recompute, or would also fit without it."""

    plan: Plan
    spec: Spec
    changes: dict[str, Any]
    without_recompute: int | None = None


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """`best` is the fastest layout that fits, None if none fits. `fitting` are those that fit, by speed, one per combination of
    parallel sizes. `smallest` needs the least memory. `tried` and `fit` are numbers of layouts."""

    best: Choice | None
    fitting: list[Choice]
    smallest: Choice | None
    tried: int
    fit: int


def search(
    spec: Spec,
    facts: PlanInputs,
    machine: Machine,
    *,
    devices: int,
    memory: int,
    calibration: float | None = None,
    is_same_batch: bool = False,
) -> Search:
    """Search TP, PP, VPP, CP, EP, DP, micro-batches (unless `is_same_batch`) and recomputation. `devices` is the maximum number
    of devices over all nodes of the spec, each with `memory` bytes (on CPUs: of the host)."""
    found: list[Choice] = []
    for other in _candidates(spec, facts, devices, is_same_batch):
        if SPEC.problems(other) or MODEL.problems(other, facts.shape):
            continue
        found.append(
            Choice(
                plan=make_plan(other, facts, machine, calibration), spec=other, changes=changes(spec, other)
            )
        )
    fit = [c for c in found if _fits(c, machine, memory)]
    fit.sort(key=lambda c: (c.plan.pace.step, c.plan.needed, len(c.changes)))
    best = None
    if fit:
        close = [c for c in fit if c.plan.pace.step <= fit[0].plan.pace.step * _CLOSE]
        best = min(close, key=lambda c: (len(c.changes), c.plan.pace.step, c.plan.needed))
        best = _recomputing_less(best, spec, facts, machine, memory, calibration)
        best = _with_reason(best, facts, machine, memory)
    ways: dict[tuple[int, ...], Choice] = {}
    for choice in ([best] if best else []) + fit:
        ways.setdefault(tuple(choice.spec.parallel_sizes.values()), choice)
    return Search(
        best=best,
        fitting=list(ways.values()),
        smallest=min(found, key=lambda c: c.plan.needed, default=None),
        tried=len(found),
        fit=len(fit),
    )


def alternatives(
    spec: Spec,
    facts: PlanInputs,
    machine: Machine,
    *,
    devices: int,
    memory: int,
    calibration: float | None = None,
) -> dict[str, Choice]:
    """Ways to train that need less, by name: a lean optimizer, LoRA and QLoRA in place of a full fine-tune, QLoRA in place of LoRA.
    Of each the best layout with the micro-batches of `spec`, else with others, or where none fits the one that needs the least
    memory. The arguments are those of `search`."""
    found = {}
    for name, other in _smaller(spec):
        for is_same_batch in (True, False):
            layouts = search(
                other,
                facts,
                machine,
                devices=devices,
                memory=memory,
                calibration=calibration,
                is_same_batch=is_same_batch,
            )
            if choice := layouts.best or layouts.smallest:
                found[name] = msgspec.structs.replace(choice, changes=changes(spec, choice.spec))
            if layouts.best:
                break
    return found


def _smaller(spec: Spec) -> Iterator[tuple[str, Spec]]:
    replace, model = msgspec.structs.replace, spec.model
    full = replace(spec.optimizer, precision="full")
    if not model.lora.rank:
        if spec.optimizer == full:
            yield "lean", replace(spec, optimizer=replace(full, precision="lean"))
        model = replace(model, lora=replace(model.lora, rank=_RANK), freeze=[])
        yield "LoRA", replace(spec, model=model, optimizer=full)
    if model.quantize == "none":
        yield "QLoRA", replace(spec, model=replace(model, quantize="nf4"), optimizer=full)


def _recomputing_less(
    best: Choice, spec: Spec, facts: PlanInputs, machine: Machine, memory: int, calibration: float | None
) -> Choice:
    """The layout with as few layers recomputed whole as fit, if that is faster than all of them."""
    if whole_recomputed(best.spec, facts.shape) < 1:
        return best

    def with_layers(number: int) -> Choice:
        replace = msgspec.structs.replace
        other = replace(best.spec, model=replace(best.spec.model, recompute_layers=number))
        plan = make_plan(other, facts, machine, calibration)
        return Choice(plan=plan, spec=other, changes=changes(spec, other))

    every = chunk_layers(best.spec, facts.shape)
    numbers = range(1, every)
    least = bisect_left(numbers, True, key=lambda number: _fits(with_layers(number), machine, memory))
    if least == len(numbers):
        return best
    found = with_layers(numbers[least])
    return found if found.plan.pace.step * _CLOSE < best.plan.pace.step else best


def _with_reason(choice: Choice, facts: PlanInputs, machine: Machine, memory: int) -> Choice:
    spec = choice.spec
    if not spec.model.enable_gradient_checkpointing:
        return choice
    replace = msgspec.structs.replace
    kept = replace(spec, model=replace(spec.model, enable_gradient_checkpointing=False))
    without = Choice(plan=make_plan(kept, facts, machine), spec=kept, changes={})
    if _fits(without, machine, memory):
        return choice
    return replace(choice, without_recompute=without.plan.needed)


def changes(spec: Spec, other: Spec) -> dict[str, Any]:
    """Keys of the layout and of adapters whose values differ between the specs → their values in `other`."""
    found = {}
    for section, name in _KEYS:
        mine, theirs = (_at(s, section, name) for s in (spec, other))
        if mine != theirs:
            found[f"{section}.{name}"] = theirs
    return found


_KEYS = (
    ("model.lora", "rank"),
    ("model", "quantize"),
    ("model", "freeze"),
    ("optimizer", "precision"),
    ("launch", "nproc_per_node"),
    ("model.megatron", "tensor_model_parallel_size"),
    ("model.megatron", "pipeline_model_parallel_size"),
    ("model.megatron", "virtual_pipeline_model_parallel_size"),
    ("model.megatron", "context_parallel_size"),
    ("model.megatron", "expert_model_parallel_size"),
    ("model.megatron", "sequence_parallel"),
    ("training", "micro_batch_size_per_gpu"),
    ("training", "micro_batch_tokens"),
    ("model", "enable_gradient_checkpointing"),
    ("model", "recompute"),
    ("model", "recompute_layers"),
)


def _at(spec: Spec, section: str, name: str) -> Any:
    value: Any = spec
    for part in (*section.split("."), name):
        value = getattr(value, part)
    return value


def _fits(choice: Choice, machine: Machine, memory: int) -> bool:
    # The ranks of a CPU run share the host's memory.
    ranks = choice.spec.world_size if machine.device == "cpu" else 1
    return choice.plan.needed * ranks <= memory


def _candidates(spec: Spec, facts: PlanInputs, devices: int, is_same_batch: bool) -> Iterator[Spec]:
    for shared in _shared(spec, facts, devices):
        for batched in [shared] if is_same_batch else _batched(shared, facts):
            yield from _recomputed(batched)


def _shared(spec: Spec, facts: PlanInputs, devices: int) -> Iterator[Spec]:
    replace = msgspec.structs.replace
    powers = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= devices]
    layers, experts = facts.shape.num_hidden_layers, facts.shape.num_experts
    nodes = spec.launch.nnodes
    of_a_node = devices // nodes
    for ranks in dict.fromkeys(n for n in (of_a_node, *powers) if 1 <= n <= of_a_node):
        world = nodes * ranks
        for tp in powers:
            for pp in powers:
                for cp in powers:
                    if world % (tp * pp * cp) or layers % pp:
                        continue
                    chunks = [None] + [v for v in (2, 4) if pp > 1 and layers % (pp * v) == 0]
                    for vpp in chunks:
                        for ep in (n for n in powers if n == 1 or (experts and experts % n == 0)):
                            megatron = replace(
                                spec.model.megatron,
                                tensor_model_parallel_size=tp,
                                pipeline_model_parallel_size=pp,
                                virtual_pipeline_model_parallel_size=vpp,
                                context_parallel_size=cp,
                                expert_model_parallel_size=ep,
                                sequence_parallel=tp > 1,
                            )
                            yield replace(
                                spec,
                                model=replace(spec.model, megatron=megatron),
                                launch=replace(spec.launch, nproc_per_node=ranks),
                            )


def _batched(spec: Spec, facts: PlanInputs) -> Iterator[Spec]:
    replace, training = msgspec.structs.replace, spec.training
    most = max(1, spec.data.train_batch_size // spec.data_parallel_size)
    if not training.use_rmpad:
        for size in sorted({n for n in (*_MICRO_BATCHES, training.micro_batch_size_per_gpu) if n <= most}):
            yield replace(spec, training=replace(training, micro_batch_size_per_gpu=size))
        return
    length = spec.data.sequence_length
    # A micro-batch has at most the samples of a step.
    top = most * min(facts.train.longest or length, length)
    yield spec
    for tokens in (n * length for n in _MICRO_BATCHES):
        if tokens <= max(top, length) and tokens != spec.micro_batch_tokens:
            yield replace(spec, training=replace(training, micro_batch_tokens=tokens))


def _recomputed(spec: Spec) -> Iterator[Spec]:
    replace = msgspec.structs.replace
    model = replace(spec.model, recompute_layers=None)
    yield replace(spec, model=replace(model, enable_gradient_checkpointing=False))
    for how in ("selective", "full"):
        yield replace(spec, model=replace(model, enable_gradient_checkpointing=True, recompute=how))
    if spec.model.recompute_layers:
        yield spec

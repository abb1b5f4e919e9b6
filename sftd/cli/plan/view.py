"""A plan as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sftd.cli.terminal import output, sources
from sftd.domain.text.words import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.table import Table

    from sftd.cli.plan.target import Target
    from sftd.domain.compare.plan_outcome import Outcome
    from sftd.domain.plan.plan import Plan, PlanInputs
    from sftd.domain.plan.search import Choice, Search
    from sftd.domain.spec.spec import Spec

# Maximum number of layouts to list.
_LAYOUTS = 5
_BASIS = {
    "log": "from the pace of earlier runs of this model here",
    "measured": "from rates measured on such a GPU",
    "assumed": "a guess: this device was not measured; after a first run the log has its pace",
}


def seconds(value: float) -> str:
    """A step's time: `2.6 ms`, `0.42 s`, `12 s`."""
    if value < 0.1:
        return f"{value * 1000:.{int(value < 0.01)}f} ms"
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def summary(plan: Plan) -> str:
    """The plan in a line."""
    where = "the CPU" if plan.machine.device == "cpu" else output.escape(plan.machine.name)
    return (
        f"About {output.memory(plan.fullest.total)} a rank, {seconds(plan.pace.step)} a step, "
        f"{output.duration(plan.pace.total)} in all, {output.size(plan.storage.needed)} of disk, on {where}: `sftd plan`"
    )


def outcome_facts(outcome: Outcome | None) -> Iterator[tuple[str, str]]:
    """Planned and actual values for `sftd show`, a line for each."""
    for number, one in enumerate(outcome.compared if outcome else ()):
        show: Callable[[float], str] = output.duration if one.name == "whole run" else seconds
        if one.unit == "bytes":
            show = output.memory if one.name == "peak memory" else lambda value: output.size(int(value))
        error = "" if one.error is None else f", was {show(one.actual or 0)}: {one.error:+.1%}"
        yield ("planned" if number == 0 else " ", f"{one.name} {show(one.planned)}{error}")


def batch_text(spec: Spec) -> str:
    """The size of a micro-batch."""
    if spec.training.use_rmpad:
        return counted(spec.micro_batch_tokens, "token")
    return counted(spec.training.micro_batch_size_per_gpu, "row")


def recompute_text(spec: Spec) -> str:
    """The layers that are recomputed."""
    if not spec.model.enable_gradient_checkpointing:
        return "none"
    is_partial = spec.model.recompute == "full" and spec.model.recompute_layers
    return counted(spec.model.recompute_layers or 0, "layer") if is_partial else spec.model.recompute


def print_plan(
    spec: Spec,
    facts: PlanInputs,
    plan: Plan,
    layouts: Search,
    target: Target,
    instead: dict[str, Choice],
) -> None:
    """The whole plan. `instead`: ways to train that need less."""
    from sftd.domain.model.parameters import trained_parameters, whole_model

    out = output.console()
    machine = plan.machine
    where = f"{machine.cores} CPU cores" if machine.device == "cpu" else f"{spec.world_size} × {machine.name}"
    parameters, trained = whole_model(facts.shape), trained_parameters(spec.model, facts.shape)
    of_them = "" if trained == parameters else f", {trained / 1e6:,.1f} M trained"
    out.print(
        f"[bold]{output.escape(facts.shape.architecture)}[/], {parameters / 1e6:,.1f} M parameters{of_them}, "
        f"{output.layout(spec.parallel_sizes)}, {plan.dtype}, on {output.escape(where)}",
        soft_wrap=True,
    )
    out.print(_memory_table(spec, plan))
    fits = target.fits(plan.needed, spec.world_size)
    ranks = f" for each of {spec.world_size} ranks" if spec.world_size > 1 and machine.device == "cpu" else ""
    owner = "the host" if machine.device == "cpu" else "each device"
    spare = "" if machine.device == "cpu" else ", with the overhead of CUDA and fragmentation"
    out.print(
        f"  needs {output.memory(plan.needed)}{ranks}{spare}; {owner} has {output.memory(target.memory)}: {_verdict(fits)}",
        soft_wrap=True,
    )
    if plan.host_copy:
        out.print(
            f"  asynchronous saves: {output.memory(plan.host_copy)} of host memory for all ranks",
            soft_wrap=True,
        )
    out.print()
    for name, value in _other_facts(plan):
        out.print(f"  [dim]{name:6}[/] {value}", soft_wrap=True)
    for number, line in enumerate(sources.planned(spec, facts.train.sources, facts.planned_steps)):
        out.print(f"  [dim]{'' if number else 'data':6}[/] {output.escape(line)}", soft_wrap=True)
    out.print()
    _print_layouts(spec, layouts, target)
    if instead:
        out.print()
        _print_alternatives(instead, target)


def _memory_table(spec: Spec, plan: Plan) -> Table:
    stages = [f"stage {stage.stage}" if len(plan.memory) > 1 else "" for stage in plan.memory]
    table = output.table(
        "memory of a rank", *stages, "of what", right=stages, dim=["of what"], fold=["of what"]
    )
    work, is_cpu = plan.work, plan.machine.device == "cpu"
    reserved = "the process, gloo's copy of the gradients" if is_cpu else "cuBLAS"
    if spec.model.lora.rank:
        reserved += "; the adapters of a product as one"
    tokens = f"{counted(work.largest, 'token')} in the largest micro-batch"
    rows: list[tuple[str, str, str]] = [
        ("weights", "weights", f"{plan.dtype}{_frozen_text(spec)}"),
        ("gradients", "gradients", "FP32"),
        ("optimizer", "optimizer", f"{_moments_text(spec, plan.dtype)}; shared by DP × CP"),
        ("activations", "activations", f"{tokens}; recomputed: {recompute_text(spec)}"),
        ("logits, loss", "loss", f"{work.largest_trained:,} trained tokens at once, at most"),
        ("workspace", "workspace", reserved),
    ]
    for title, name, what in rows:
        table.add_row(title, *(output.memory(getattr(stage, name)) for stage in plan.memory), what)
    peak = "the process at its peak" if is_cpu else "of tensors: peak memory in the events"
    table.add_row("[bold]at the peak[/]", *(f"[bold]{output.memory(s.total)}[/]" for s in plan.memory), peak)
    return table


def _frozen_text(spec: Spec) -> str:
    if spec.model.quantize != "none":
        return f"; the frozen matrices in {spec.model.quantize.upper()}"
    return "; the model is frozen" if spec.model.lora.rank else ""


def _moments_text(spec: Spec, dtype: str) -> str:
    if spec.optimizer.precision == "lean":
        return "BF16 moments"
    return "moments" if dtype == "float32" else "moments, FP32 weights"


def _other_facts(plan: Plan) -> list[tuple[str, str]]:
    pace, disk, work = plan.pace, plan.storage, plan.work
    rate = f"{work.real / pace.step:,.0f} tokens/s" if pace.step else ""
    padding = max(0.0, 1 - work.real / work.computed) if work.computed else 0.0
    parts = [
        f"{name} {output.duration(value)}"
        for name, value in (
            ("starting", pace.starting),
            ("training", pace.training),
            ("validating", pace.validating),
            ("saving", pace.saving),
        )
        if round(value)
    ]
    several = f"{counted(disk.most, 'checkpoint')} of {output.size(disk.checkpoint)}"
    stays = f"{output.size(disk.at_end)} stay; an export is {output.size(disk.export)}"
    mfu = f", MFU {pace.mfu:.0%}" if pace.mfu is not None else ""
    return [
        ("step", f"{seconds(pace.step)}, {rate}{mfu}, {padding:.0%} padding"),
        ("", _BASIS[pace.basis]),
        ("run", f"{output.duration(pace.total)} for {counted(pace.steps, 'step')}: {', '.join(parts)}"),
        ("disk", f"{output.size(disk.needed)} must be free: {several} at once; {stays}"),
    ]


def _print_layouts(spec: Spec, layouts: Search, target: Target) -> None:
    out = output.console()
    devices = "the CPU" if target.machine.device == "cpu" else f"{target.devices} × {target.machine.name}"
    where = f"{output.escape(devices)} of {output.memory(target.memory)}"
    if layouts.best is None:
        out.print(f"[bold red]No layout fits[/] {where}: {layouts.tried} were tried.", soft_wrap=True)
        if layouts.smallest is not None:
            least = layouts.smallest
            out.print(
                f"The smallest needs {output.memory(least.plan.needed)} a rank: {_setting(least.changes) or 'this config'}.",
                soft_wrap=True,
            )
        return
    best = layouts.best
    table = output.table("layout", "micro-batch", "recompute", "step", "needs", right=["step", "needs"])
    for choice in layouts.fitting[:_LAYOUTS]:
        table.add_row(*_layout_row(choice), style="bold" if choice is best else "")
    out.print(
        f"Of {layouts.tried} layouts {layouts.fit} fit {where}. The fastest, one for each way to share the model:",
        soft_wrap=True,
    )
    out.print(table)
    if best.changes:
        out.print(f"  {_reason(best, spec)}. To use it, set:", soft_wrap=True)
        out.print(f"  [bold]{_setting(best.changes)}[/]", soft_wrap=True)
    else:
        out.print("  The config already has the best of them.")


def _print_alternatives(instead: dict[str, Choice], target: Target) -> None:
    out = output.console()
    numbers = ["needs", "step", "run", "checkpoint"]
    table = output.table("", "needs", "", *numbers[1:], right=numbers)
    for name, choice in instead.items():
        plan = choice.plan
        table.add_row(
            name,
            output.memory(plan.needed),
            _verdict(target.fits(plan.needed, choice.spec.world_size)),
            seconds(plan.pace.step),
            output.duration(plan.pace.total),
            output.size(plan.storage.checkpoint),
        )
    out.print("These need less:")
    out.print(table)
    for name, choice in instead.items():
        out.print(f"  {name}: [bold]{_setting(choice.changes)}[/]", soft_wrap=True)
    if "LoRA" in instead:
        out.print("  Adapters (LoRA, QLoRA) take higher learning rates: 1e-4 to 2e-4 are common.")


def _verdict(fits: bool) -> str:
    return "[green]fits[/]" if fits else "[bold red]does not fit[/]"


def _layout_row(choice: Choice) -> tuple[str, ...]:
    spec, plan = choice.spec, choice.plan
    return (
        output.layout(spec.parallel_sizes),
        batch_text(spec),
        recompute_text(spec),
        seconds(plan.pace.step),
        output.memory(plan.needed),
    )


def _reason(best: Choice, spec: Spec) -> str:
    why = ["The shortest step that fits"]
    m = best.spec.model.megatron
    shares = m.tensor_model_parallel_size * m.pipeline_model_parallel_size * m.context_parallel_size
    if shares == 1 and best.spec.world_size > 1:
        why.append("the model fits a single device, so all others take a share of the data")
    if best.without_recompute is not None:
        why.append(f"without recomputation it would need {output.memory(best.without_recompute)}")
    return "; ".join(why)


def _setting(changes: dict[str, Any]) -> str:
    import json

    def shown(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    return " ".join(f"{key}={shown(value)}" for key, value in changes.items())

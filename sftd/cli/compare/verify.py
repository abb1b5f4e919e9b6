"""`sftd verify`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sftd.cli import app
from sftd.cli.terminal import output
from sftd.cli.terminal.progress import spinner
from sftd.domain.text.words import counted

if TYPE_CHECKING:
    from sftd.domain.log.events import ReplayDiverged, ReplayVerified
    from sftd.domain.repro.verifier import Comparing
    from sftd.domain.spec.spec import Spec
    from sftd.launcher.inventory import Need
    from sftd.operations.queries.history import VerifyPlan
    from sftd.settings import Settings
    from sftd.store.database.engine import Store
    from sftd.wire.attempt.directory import Order


@click.command("verify")
@click.argument("run")
@click.option(
    "--from-step",
    type=click.IntRange(min=0),
    help="Start from this published checkpoint, 0 from the pretrained model; the oldest if not given.",
)
@click.option(
    "--to-step", type=click.IntRange(min=1), help="Last step to compare; the run's last if not given."
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Device to train on; the run's if not given."
)
@click.option("--devices", metavar="0,1,…", help="GPUs to use; free ones if not given.")
@click.option(
    "--with",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Try another setting, and record nothing; repeatable.",
)
@click.option("--keep", is_flag=True, help="Keep the scratch folder, with journal and output.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def verify_command(
    run: str,
    from_step: int | None,
    to_step: int | None,
    device: str | None,
    devices: str | None,
    changes: tuple[str, ...],
    keep: bool,
    as_json: bool,
) -> None:
    """Train recorded steps of RUN again, and compare them with the log.

    Training starts from a published checkpoint, in the run's own layout, with torchrun in a scratch folder. Loss, gradient
    norm, learning rate, trained tokens and rows of every step must match the log: bit for bit, or to within rounding where the
    run was not deterministic or its environment differs. The command stops at the first step that does not match, prints what
    differs, and records the outcome in the run's log. The run and its checkpoints are not changed; RUN may be running. Exit
    code 1: a step diverged, or could not be trained again (then nothing is recorded).

    \b
    Example:
      sftd verify brave-otter
      sftd verify brave-otter --from-step 100 --to-step 120
      sftd verify brave-otter --with model.megatron.tensor_model_parallel_size=2
    """
    import msgspec

    from sftd.domain.log.events import ReplayDiverged
    from sftd.launcher import processes
    from sftd.operations.queries import history, model_files
    from sftd.wire.attempt.orders import order_of

    settings = app.read_settings()
    store = app.open_store(settings)
    chosen = history.plan(store, app.resolve_run(store, run), from_step, to_step, host=processes.host_name())
    spec, extra = _changed(chosen, changes, device)
    run_id = chosen.run.run_id
    if not model_files.check_unchanged(chosen.model, run_id, spec, pretrained=chosen.checkpoint is None):
        output.note(model_files.unrecorded(run_id))
    planned = _planned_steps(chosen, spec, extra)
    need, taken = _devices(settings, chosen, spec, devices)
    output.when_interrupted("Nothing was recorded.")
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Clean up as after Ctrl-C.
        signal.signal(number, signal.default_int_handler)
    order = order_of(
        msgspec.structs.replace(chosen.run, spec=spec, planned_steps=planned),
        chosen.checkpoint,
        model=chosen.model,
        model_root=settings.home,
        losses=chosen.losses,
        last_step=chosen.to_step,
    )
    with _held(settings, store, taken, is_named=devices is not None) as holds:
        verdict, comparing = _compare(settings, chosen, order, extra, need, taken, holds, keep)
    if not changes:
        history.record(store, app.context(), chosen.run.run_id, verdict)
    if as_json:
        fields = {"run_id": chosen.run.run_id, "outcome": type(verdict).__name__} | msgspec.to_builtins(
            verdict
        )
        click.echo(output.json_line(fields | {"agreeing": comparing.agreeing, "recorded": not changes}))
    else:
        _print(chosen, verdict, comparing, is_trial=bool(changes))
    if isinstance(verdict, ReplayDiverged):
        sys.exit(1)


# Keys that decide which tensors a checkpoint has.
_CONTENT = {
    "model.lora.rank",
    "model.lora.targets",
    "model.freeze",
    "model.freeze_router",
    "optimizer.precision",
}


def _changed(
    chosen: VerifyPlan, changes: tuple[str, ...], device: str | None
) -> tuple[Spec, dict[str, list[Any]]]:
    """The spec to train with, and its differences from the run's: key → [recorded, now]."""
    import msgspec

    from sftd.domain.errors import Problem, Refused
    from sftd.domain.run import trajectory
    from sftd.domain.spec.parse import change
    from sftd.wire.spec.file import parse_overrides

    own = spec = chosen.run.spec
    if changes:
        spec, _ = change(own, parse_overrides(changes))
    differs = trajectory.changes(own, spec)
    if other := sorted(_CONTENT & differs.keys()):
        what = f"{other[0]} decides what a checkpoint holds, and this run's checkpoints hold something else"
        raise Refused(Problem("--with", what, "leave it out, or submit a new run"))
    replace = msgspec.structs.replace
    # All ranks on this host, wherever the run trained.
    here = replace(spec.launch, launcher="local", nnodes=1, nproc_per_node=spec.world_size)
    spec = replace(spec, launch=here)
    was = chosen.log[chosen.to_step].environment
    if spec.launch.device == "auto" and was:
        device = device or ("cpu" if was.get("device") == "cpu" else "cuda")
    if device is not None:
        # `auto` would follow the device; the checkpoint has the run's dtype.
        megatron = spec.model.megatron
        if was.get("dtype") and megatron.params_dtype == "auto":
            megatron = replace(megatron, params_dtype=was["dtype"])
        spec = replace(
            spec,
            launch=replace(spec.launch, device=device),
            model=replace(spec.model, megatron=megatron),
        )
    return spec, differs


def _devices(settings: Settings, chosen: VerifyPlan, spec: Spec, named: str | None) -> tuple[Need, list[str]]:
    """What to train on: the run's number of threads, and GPUs that no living attempt of this host holds."""
    import msgspec

    from sftd.domain.errors import Problem, Refused
    from sftd.launcher import device_holds
    from sftd.launcher.inventory import Inventory, visible_gpus
    from sftd.wire.cores import usable_cores

    others = partial(device_holds.held, settings.home)
    inventory = Inventory(visible_gpus(), settings.cpu_slots or usable_cores(), others=others)
    need = inventory.need(spec)
    threads = chosen.log[chosen.to_step].environment.get("OMP_NUM_THREADS")
    if threads and spec.launch.threads_per_rank is None:
        need = msgspec.structs.replace(need, threads=int(threads))
    if need.device == "cpu":
        if named is not None:
            raise Refused(
                Problem("--devices", "names GPUs, but the steps are trained on CPUs", "leave it out")
            )
        # Other runs can share the cores.
        return need, inventory.cpus[: need.count]
    if named is not None:
        wanted = [f"cuda:{name.strip()}" for name in named.split(",")]
        if missing := [name for name in wanted if name not in inventory.gpus]:
            have = ", ".join(name.removeprefix("cuda:") for name in inventory.gpus) or "none"
            raise Refused(Problem("--devices", f"there is no {missing[0]} here", f"this host has: {have}"))
    else:
        inventory.restore("others", chosen.held)
        wanted = inventory.free("cuda")[: need.count]
    if len(wanted) < need.count or len(set(wanted)) != len(wanted):
        what = f"the run's layout needs {counted(need.count, 'GPU')}, and {len(set(wanted))} are "
        what += "named" if named is not None else "free here"
        raise Refused(Problem("--devices", what, "name that many, such as 0,1, or wait until they are free"))
    return need, wanted[: need.count]


@contextmanager
def _held(settings: Settings, store: Store, taken: list[str], *, is_named: bool) -> Iterator[list[int]]:
    """Keep daemons from starting a run on these GPUs while the yielded descriptors are open, here or in a child. Raises
    `Refused` if a run has just started on one."""
    from sftd.domain.errors import Problem, Refused
    from sftd.launcher import device_holds, processes
    from sftd.operations.queries import history

    gpus = [device for device in taken if device.startswith("cuda:")]
    with ExitStack() as stack:
        holds = stack.enter_context(device_holds.holding(settings.home, gpus)) if gpus else []
        lost = set(gpus) & set(history.held(store, processes.host_name())) if gpus and not is_named else set()
        if lost:
            what = f"a run started on {min(lost)} just now"
            raise Refused(Problem("--devices", what, "try again, or name the GPUs"))
        yield holds


def _planned_steps(chosen: VerifyPlan, spec: Spec, differs: dict[str, list[Any]]) -> int:
    """The length of the run, which its learning rates depend on. Raises `Refused`."""
    from sftd.domain.errors import Problem, Refused
    from sftd.domain.run import trajectory
    from sftd.domain.spec.on_resume import OnResume

    if not any(trajectory.on_resume(key) is OnResume.LENGTH for key in differs):
        return chosen.run.planned_steps
    planned = spec.trainer.max_steps
    if planned is None or planned < chosen.to_step:
        what = "epochs cannot be tried, only a number of steps" if planned is None else f"is {planned}"
        fix = f"set trainer.max_steps to at least {chosen.to_step}, the last step that is compared"
        raise Refused(Problem("--with", what, fix))
    return planned


def _compare(
    settings: Settings,
    chosen: VerifyPlan,
    order: Order,
    extra: dict[str, list[Any]],
    need: Need,
    devices: list[str],
    holds: list[int],
    keep: bool,
) -> tuple[ReplayVerified | ReplayDiverged, Comparing]:
    from sftd.domain.log import events as e
    from sftd.domain.repro.verifier import Comparing
    from sftd.launcher.rerun import RerunFailed, rerun
    from sftd.wire.checkpoint.directory import reading

    run, by = chosen.run, app.user_name()
    where = f"step {chosen.from_step}" if chosen.checkpoint else "the pretrained model"
    comparing: Comparing | None = None
    with ExitStack() as stack:
        # Keeps the checkpoint from deletion until it is loaded.
        lock = stack.enter_context(ExitStack())
        if chosen.checkpoint is not None:
            lock.enter_context(reading(Path(chosen.checkpoint.path)))
        show = stack.enter_context(spinner(f"{run.run_id}: starting"))
        text = f"{run.run_id}: training again from {where} on {', '.join(devices)}"
        show(text, text)
        scratch = stack.enter_context(rerun(order, need, devices, settings.home, inherited=holds, keep=keep))
        if keep:
            output.note(f"{run.run_id}: the scratch folder is {scratch.folder}")
        for event in scratch.events():
            match event:
                case e.ModelLoaded():
                    comparing = Comparing(chosen.log, event, extra)
                case e.DataBound() if run.train_digest and event.train_digest != run.train_digest:
                    extra["train_digest"] = [run.train_digest, event.train_digest]
                case e.TrainingResumed():
                    lock.close()
                case e.StepCompleted():
                    assert comparing is not None
                    detail = comparing.add(event)
                    if detail:
                        return e.ReplayDiverged(
                            from_step=chosen.from_step,
                            to_step=chosen.to_step,
                            step=event.step,
                            detail=detail,
                            environment=comparing.environment(event.step),
                            by=by,
                        ), comparing
                    text = f"{run.run_id}: step {event.step} of {chosen.to_step}: {comparing.agreeing} agree"
                    # Without a terminal, a line for each tenth of the steps.
                    show(text, text if comparing.agreeing % max(1, chosen.count // 10) == 0 else "")
                    if event.step == chosen.to_step:
                        break
    if comparing is None or comparing.agreeing < chosen.count:
        raise RerunFailed("The steps could not be trained again: training ended early, without an error")
    verified = e.ReplayVerified(
        from_step=chosen.from_step,
        to_step=chosen.to_step,
        is_exact=comparing.is_exact,
        environment=comparing.environment(chosen.to_step),
        by=by,
    )
    return verified, comparing


def _print(
    chosen: VerifyPlan, verdict: ReplayVerified | ReplayDiverged, comparing: Comparing, *, is_trial: bool
) -> None:
    from rich.table import Table
    from rich.text import Text

    from sftd.domain.log.events import ReplayVerified
    from sftd.domain.repro.verifier import by_how_much

    out = output.console()
    first = chosen.from_step + 1
    if isinstance(verdict, ReplayVerified):
        how = "bit for bit" if verdict.is_exact else "to within rounding"
        out.print(
            f"[bold green]verified[/]: steps {first} to {verdict.to_step} match the log {how} "
            "(loss, grad norm, lr, tokens, samples)",
            soft_wrap=True,
        )
    else:
        before = f"steps {first} to {verdict.step - 1} agree" if comparing.agreeing else "the first one"
        out.print(f"[bold red]diverged[/] at step {verdict.step} ({before})", soft_wrap=True)
        table = Table.grid(padding=(0, 2))
        for name, pair in verdict.detail.items():
            was, now = pair["recorded"], pair["redone"]
            table.add_row(
                f"  {name.removesuffix('_digest').replace('_', ' ')}",
                Text(f"log {was if not isinstance(was, str) else was[:16]}"),
                Text(f"now {now if not isinstance(now, str) else now[:16]}"),
                Text(by_how_much(was, now), "dim"),
            )
        out.print(table)
    for key, (was, now) in verdict.environment.items():
        name = "training data (sha256)" if key == "train_digest" else key
        out.print(Text(f"differs: {name}: log {_short(was)}, now {_short(now)}"), soft_wrap=True)
    if not verdict.environment and not isinstance(verdict, ReplayVerified):
        out.print("The environment and the data match the log.")
    if comparing.may_round:
        out.print(
            "Rounding was allowed: the run is not deterministic, or the environment differs.", style="dim"
        )
    if is_trial:
        out.print("A trial with other settings: nothing was recorded.", style="dim")


def _short(value: object) -> str:
    text = str(value)
    return text[:16] if len(text) == 64 and " " not in text else text

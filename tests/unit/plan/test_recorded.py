"""Results compared with those that were recorded, where nobody computes each by hand: plans, and the values that each key of a
spec.

A change that is meant: `python -m tests.unit.plan.test_recorded` records them again, and `git diff` shows what changed.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

import sftd.domain
import sftd.store
import sftd.wire
from sftd.domain.data.facts import DataFacts
from sftd.domain.errors import Refused
from sftd.domain.log import codec, history
from sftd.domain.log import events as e
from sftd.domain.log.timeline import logged_steps
from sftd.domain.model.rules import MODEL
from sftd.domain.model.shape import ModelShape
from sftd.domain.notices import notice
from sftd.domain.plan import plan
from sftd.domain.plan.duration import Machine
from sftd.domain.run import decisions, goodput, retention, stops
from sftd.domain.run.failures import Failure
from sftd.domain.run.fold import evolve
from sftd.domain.run.state import Run
from sftd.domain.spec.parse import LEAVES, parse
from sftd.domain.spec.spec import Spec
from tests.builders.log.run_log import Log, step, validated
from tests.builders.paths import GOLDEN
from tests.builders.plan.model_shapes import EXPERTS, LLAMA_1B, LLAMA_7B, QWEN_600M
from tests.builders.plan.plans import (
    CP,
    DEMO,
    EP,
    H100,
    H200,
    PP,
    RMPAD,
    SP,
    TOKENS,
    TP,
    VPP,
    rows_of,
    spec_of,
)

EIGHT_CORES = Machine(device="cpu", name="cpu", cores=8)
UNKNOWN = Machine(device="cuda", name="NVIDIA GeForce RTX 4090")
A100 = Machine(device="cuda", name="NVIDIA A100-SXM4-80GB")
Given = list[tuple[str, Any]]
# Rows of many lengths, so that steps differ in their tokens.
MIXED = msgspec.structs.replace(
    DEMO,
    rows=3000,
    unusable=7,
    longest=2000,
    seen_squares=40_000_000,
    lengths=(3, 20, 40, 55, 80, 120, 600, 2000),
)
FULL: Given = [("model.enable_gradient_checkpointing", True)]
SELECTIVE: Given = [*FULL, ("model.recompute", "selective")]
BIAS = msgspec.structs.replace(LLAMA_1B, attention_bias=True, tie_word_embeddings=False)


RANK, NF4 = ("model.lora.rank", 16), ("model.quantize", "nf4")
SLURM: Given = [("launch.launcher", "slurm"), ("launch.device", "cuda")]
ONE_EXPERT = msgspec.structs.replace(EXPERTS, num_experts_per_tok=1, norm_topk_prob=True)


def ranks(number: int) -> tuple[str, Any]:
    return "launch.nproc_per_node", number


PLANS: dict[str, tuple[Given, ModelShape, DataFacts, Machine]] = {
    "one GPU": ([], LLAMA_1B, rows_of(4096), H100),
    "bias": ([("training.micro_batch_size_per_gpu", 4)], BIAS, rows_of(512), H200),
    "FP32 on a GPU": ([("model.megatron.params_dtype", "float32")], LLAMA_1B, rows_of(4096), H100),
    "another GPU": ([ranks(2)], LLAMA_1B, MIXED, UNKNOWN),
    "deterministic": ([("training.deterministic", True), ranks(4)], QWEN_600M, rows_of(1000), A100),
    "deterministic and packed": ([("training.deterministic", True), RMPAD], QWEN_600M, MIXED, H100),
    "full": ([*FULL, ranks(2)], LLAMA_7B, rows_of(2048), H200),
    "selective": (SELECTIVE, QWEN_600M, rows_of(2048), H200),
    "packed": ([RMPAD, (TOKENS, 8192), ranks(2)], LLAMA_1B, MIXED, H100),
    "TP": ([(TP, 2), ranks(4)], LLAMA_1B, MIXED, H100),
    "TP and SP": ([(TP, 4), (SP, True), ranks(4), RMPAD], QWEN_600M, MIXED, H100),
    "PP": ([(PP, 4), ranks(8)], LLAMA_7B, MIXED, H100),
    "PP, packed": ([(PP, 2), ranks(4), RMPAD, *FULL], LLAMA_1B, MIXED, H100),
    "VPP": ([(PP, 2), (VPP, 4), ranks(2)], LLAMA_1B, rows_of(4096), H100),
    "PP, TP and SP": ([(PP, 2), (TP, 2), (SP, True), ranks(4)], LLAMA_1B, MIXED, H100),
    "VPP, packed": ([(PP, 2), (VPP, 2), RMPAD, ranks(4)], LLAMA_1B, MIXED, H100),
    "experts whole, the rest in parts": ([(EP, 2), (TP, 2), (SP, True), ranks(4)], EXPERTS, MIXED, H100),
    "CP": ([(CP, 2), ranks(4)], LLAMA_1B, MIXED, H100),
    "CP with normed keys": ([(CP, 4), (TP, 2), (SP, True), ranks(8), RMPAD], QWEN_600M, MIXED, H200),
    "experts": ([(EP, 2), ranks(2), *SELECTIVE], EXPERTS, MIXED, H100),
    "experts, TP": ([(TP, 2), (SP, True), ranks(2)], EXPERTS, rows_of(100), H100),
    "experts on CPUs": ([ranks(2)], EXPERTS, MIXED, EIGHT_CORES),
    "CPUs": ([ranks(2), ("launch.threads_per_rank", 3)], LLAMA_1B, MIXED, EIGHT_CORES),
    "more threads than cores": ([ranks(4), ("launch.threads_per_rank", 3)], LLAMA_1B, DEMO, EIGHT_CORES),
    "CPUs, BF16, packed": (
        [RMPAD, ("model.megatron.params_dtype", "bfloat16")],
        QWEN_600M,
        MIXED,
        EIGHT_CORES,
    ),
    "CPUs, PP and selective": ([(PP, 2), ranks(4), *SELECTIVE], LLAMA_1B, MIXED, EIGHT_CORES),
    "asynchronous": (
        [("checkpoint.async_save", True), ("trainer.save_interval", 2), ranks(2)],
        LLAMA_1B,
        rows_of(4096),
        H100,
    ),
    "LoRA": ([RANK, *SELECTIVE], LLAMA_7B, MIXED, H100),
    "LoRA of a mixture, TP and SP": ([RANK, (TP, 2), (SP, True), ranks(4)], EXPERTS, MIXED, H100),
    "LoRA on CPUs": (
        [RANK, ranks(2), RMPAD, ("model.lora.targets", ["q", "v"])],
        LLAMA_1B,
        MIXED,
        EIGHT_CORES,
    ),
    "QLoRA": ([RANK, NF4, *FULL, RMPAD], LLAMA_7B, MIXED, H200),
    "QLoRA, PP": ([RANK, NF4, (PP, 2), (TP, 2), ranks(8)], LLAMA_7B, rows_of(2048), H100),
    "frozen": ([("model.freeze", ["embed_tokens", r"layers\.[0-7]\."]), *SELECTIVE], LLAMA_1B, MIXED, H100),
    "lean": ([("optimizer.precision", "lean"), ranks(2)], LLAMA_1B, rows_of(4096), H100),
    "validated": (
        [("trainer.val_check_interval", 3), ("data.val_files", ["v"]), ("trainer.val_before_train", False)],
        LLAMA_1B,
        rows_of(4096),
        H100,
    ),
}


def plans() -> dict[str, Any]:
    found = {}
    for name, (given, shape, data, machine) in PLANS.items():
        known = plan.PlanInputs(shape=shape, train=data, val=rows_of(700, rows=33), planned_steps=8)
        found[name] = plan.make_plan(spec_of(*given), known, machine).as_json()
        later = msgspec.structs.replace(known, first_step=5, val=None)
        found[f"{name}, a fork"] = plan.make_plan(spec_of(*given), later, machine, calibration=1.5).pace.total
    return found


def _leaves(value: Any, where: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, inner in items for k, v in _leaves(inner, f"{where}/{key}").items()}
    return {where: value}


def recorded(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def test_plans_are_as_recorded() -> None:
    found, expected = _leaves(json.loads(json.dumps(plans()))), _leaves(recorded("plans"))
    assert found.keys() == expected.keys()
    for where, value in expected.items():
        if isinstance(value, float):
            assert found[where] == pytest.approx(value, rel=1e-9), where
        else:
            assert found[where] == value, where


MINIMAL = {"model": {"partial_pretrain": "/m"}, "data": {"train_files": ["/t"], "val_files": ["/v"]}}
PROBES: tuple[Any, ...] = (
    *(None, True, "", "x", [], ["x"], {}, {"x": 1}),
    *(-1_000_001, -1_000_000, -1, -0.5, 0, 1e-9, 0.5, 1, 1.0001, 2, 1.5),
    *(65535, 65536, 1_000_000, 1_000_001, 2**53, 2**53 + 1),
    *("auto", "cpu", "cuda", "float32", "bfloat16", "float16", "full", "selective", "none", "right", "left"),
    *("error", "stop", "skip", "rollback", "record", "constant", "linear", "cosine", "polynomial"),
    *("weights", "last", "all", "local", "slurm", "megatron-sft", "4:00:00"),
)


def _refuses(key: str, value: Any) -> bool:
    """Whether the value is refused where nothing else is set."""
    try:
        parse(MINIMAL, [(key, value)])
    except Refused as refused:
        return any(p.where == key for p in refused.problems)
    return False


def values() -> dict[str, Any]:
    default = msgspec.to_builtins(Spec())
    found = {}
    for key in sorted(LEAVES):
        node: Any = default
        for name in key.split("."):
            node = node[name]
        found[key] = {
            "default": node,
            "takes": " | ".join(json.dumps(v) for v in PROBES if not _refuses(key, v)),
        }
    return found


def test_each_key_takes_the_values_that_it_took() -> None:
    found, expected = json.loads(json.dumps(values())), recorded("spec_values")
    assert found.keys() == expected.keys()
    for key, entry in expected.items():
        # 1 is no true, and 1.0 no 1.
        assert repr(found[key]) == repr(entry), key


BROKEN: dict[str, Given] = {
    "nothing": [("model.partial_pretrain", ""), ("data.train_files", [])],
    "names": [("trainer.project_name", "a/b"), ("trainer.experiment_name", "x" * 201)],
    "names at their longest": [("trainer.project_name", "p" * 200), ("trainer.experiment_name", "a/b")],
    "names of nothing": [("trainer.project_name", " "), ("trainer.experiment_name", "a\x1bb")],
    "VPP without PP": [(VPP, 2)],
    "VPP of one": [(VPP, 1)],
    "VPP and micro-batches": [(PP, 2), (VPP, 2), ranks(2), ("data.train_batch_size", 3)],
    "SP without TP": [(SP, True)],
    "ranks": [(TP, 2), (PP, 2), (CP, 2), ranks(12)],
    "ranks that fit": [(TP, 2), (PP, 2), (CP, 2), ranks(16)],
    "experts": [(EP, 3), ranks(4), (PP, 2)],
    "experts that fit": [(EP, 2), ranks(4), (PP, 2)],
    "both lengths": [("trainer.max_steps", 5), ("trainer.epochs", 2)],
    "warm-up": [("trainer.max_steps", 5), ("scheduler.warmup_steps", 6)],
    "warm-up of all": [
        ("trainer.max_steps", 5),
        ("scheduler.warmup_steps", 5),
        ("scheduler.warmup_ratio", 0.5),
    ],
    "constant with a floor": [("scheduler.type", "constant"), ("scheduler.min_lr_ratio", 0.5)],
    "recompute of nothing": [("model.recompute", "selective")],
    "no distributed optimizer": [("model.megatron.use_distributed_optimizer", False)],
    "code": [("model.trust_remote_code", True)],
    "no validation": [("data.val_files", [])],
    "accumulation": [("training.gradient_accumulation_steps", 3), ("data.train_batch_size", 8), ranks(2)],
    "accumulation that is right": [
        ("training.gradient_accumulation_steps", 4),
        ("data.train_batch_size", 8),
        ranks(2),
    ],
    "accumulation, packed": [("training.gradient_accumulation_steps", 9), RMPAD, (TOKENS, 4096), ranks(2)],
    "packed too short": [RMPAD, (TOKENS, 2047)],
    "packed just long enough": [RMPAD, (TOKENS, 2048), ("training.micro_batch_size_per_gpu", 2)],
    "packed for too many ranks": [RMPAD, ranks(3), ("data.train_batch_size", 2)],
    "packed for as many ranks": [RMPAD, ranks(3), ("data.train_batch_size", 3)],
    "tokens without packing": [(TOKENS, 4096)],
    "a batch that does not divide": [("data.train_batch_size", 10), ("training.micro_batch_size_per_gpu", 4)],
    "a batch below a micro-batch": [
        ("data.train_batch_size", 3),
        ("training.micro_batch_size_per_gpu", 4),
        ranks(2),
    ],
    "several machines": [("launch.nnodes", 2)],
    "Slurm without Slurm": [("launch.slurm.partition", "p")],
    "Slurm without GPUs": [("launch.launcher", "slurm")],
    "Slurm with other resources": [*SLURM, ("launch.slurm.gres", "lustre:1"), ranks(4)],
    "Slurm with GPUs": [*SLURM, ("launch.slurm.gres", "gres/gpu:h100=2")],
    "Slurm's GPUs among the rest": [
        *SLURM,
        ("launch.slurm.gres", "x"),
        ("launch.slurm.extra_args", ["--gpus-per-n 2"]),
    ],
    "no GPU of Slurm": [
        *SLURM,
        ("launch.slurm.gres", "x"),
        ("launch.slurm.extra_args", ["--gpus=0", "-G0", "--gpu-bind=x"]),
    ],
    "words": [
        *SLURM,
        ("launch.slurm.partition", "a b"),
        ("launch.slurm.time", "1:00:00:00"),
        ("launch.slurm.setup", "\0"),
    ],
    "times": [*SLURM, ("launch.slurm.time", "2-0")],
    "a time in minutes": [*SLURM, ("launch.slurm.time", 90)],
    "options": [
        *SLURM,
        ("launch.slurm.extra_args", ["mem", "--mem=0 --wait", "-N2", "--nod 3", "--sig", "'"]),
    ],
    "a rate": [("optimizer.lr", 0.02)],
}


def refusals() -> dict[str, Any]:
    """Where each config is refused or doubted, and the facts that are printed of it."""
    found = {}
    for name, given in BROKEN.items():
        try:
            told, kind = parse(MINIMAL, given)[1], "warned"
        except Refused as refused:
            told, kind = refused.problems, "refused"
        found[name] = [kind, *([p.where, facts_of(p.what), facts_of(p.fix)] for p in told)]
    for name, shape in (("a dense model", LLAMA_1B), ("experts", EXPERTS), ("one expert", ONE_EXPERT)):
        for given in (
            [(TP, 3), ranks(3)],
            [(PP, 3), ranks(3)],
            [(PP, 2), (VPP, 3), ranks(2)],
            [(EP, 2), ranks(2)],
            [(TP, 2), ranks(2)],
            [(EP, 3), ranks(3)],
            [("data.sequence_length", 131073)],
        ):
            spec = spec_of(*given, batch=12)
            found[f"{name} with {given}"] = [
                [[p.where, facts_of(p.what), facts_of(p.fix)] for p in told]
                for told in (MODEL.problems(spec, shape), MODEL.warnings(spec, shape))
            ]
    return found


def test_what_is_refused_or_doubted_names_the_facts_that_it_named() -> None:
    found, expected = json.loads(json.dumps(refusals())), recorded("refusals")
    assert found.keys() == expected.keys()
    for name, entry in expected.items():
        assert found[name] == entry, name


# A number, a key of the config, a quoted word: what a sentence says, however it is worded.
_FACT = re.compile(r"-?\d[\w.,+:-]*\w|\d|[a-z_]+(?:\.[a-z_0-9]+)+|(?<=')[^']+(?=')")


def facts_of(text: str | None) -> list[str] | None:
    """Return the facts in a text for people, None where there is none."""
    return None if text is None else _FACT.findall(text)


def _story() -> Log:
    """A run with all that may happen to one: crashes, rollbacks, stops, pauses, forks, clean-ups, an end and another."""
    log = Log(planned=12, checkpoint__keep_last=2, checkpoint__keep_every=4, training__deterministic=True)
    log.add(e.RunDeferred(after=["calm-fox"]), e.SweepJoined(sweep="wide-elk", values={"optimizer.lr": 1e-5}))
    log.add(*stops.hold(log.run, "ada", "data")).add(*stops.release(log.run, "bob")).claim()
    log.add(LAUNCHED, LOADED, BOUND, validated(0, 3.5)).train(5, save_every=2)
    log.add(validated(4, 2.5), e.AnomalyDetected(step=5, what="loss_spike", detail={"policy": "record"}))
    log.add(e.SampleGenerated(step=5, prompt="a", text="b", tokens=1, stopped=True), LOOK).end()
    log.claim().add(msgspec.structs.replace(LAUNCHED, pid=2), LOADED, BOUND)
    log.add(
        step(5), step(6, loss=1.5, seconds=0.25), step(6, loss=1.5, seconds=0.0), e.CheckpointStarted(step=6)
    )
    log.add(e.AnomalyDetected(step=6, what="checkpoint_failed", detail={"reason": "full"}))
    log.end(Failure("lost", "gone"), None, lost=True).claim().add(LAUNCHED, LOADED).train(7)
    log.add(*stops.preempt(log.run, "calm-fox", 5)).save().end(exit_code=0)
    log.add(e.JobReported(job="", state="SUBMITTED", reason="", nodes=""))
    log.add(e.JobReported(job="12", state="PENDING", reason="Priority", nodes="")).claim().add(
        LAUNCHED, LOADED
    )
    log.add(e.AttemptAdopted(daemon="other", host="h2", pid=3)).train(8).save().add(validated(8, 1.25))
    log.add(*stops.pause(log.run, "ada", "lunch")).end(exit_code=0)
    log.add(*decisions.request_resume(log.run, "ada", 4)).claim().add(LAUNCHED, LOADED).train(9)
    log.add(e.SamplesSkipped(step=4, sample=300, reason="loss spike")).end(Failure("bad checkpoint", "torn"))
    log.add(e.CheckpointRejected(step=8, path="/ck/step-8", reason="digest"))
    log.add(e.CheckpointPinned(step=4, fork="young-ant"), e.CheckpointPinned(step=6, fork="old-ant"))
    log.add(*decisions.request_stop(log.run, "ada", "enough"))
    if log.run.status != "cancelled":
        log.end(exit_code=0)
    log.add(*decisions.request_resume(log.run, "bob", None)).claim().add(LAUNCHED, LOADED).train(
        12, save_every=3
    )
    log.add(validated(12, 1.0)).end(exit_code=0)
    log.add(e.CheckpointDeleted(step=2, path="/ck/step-2", bytes=10, reason="r"))
    log.add(e.CheckpointUnpinned(step=4, fork="young-ant"), REDUCED)
    log.add(e.ReplayVerified(from_step=4, to_step=12, is_exact=True, environment={}, by="ada"))
    return log.add(*decisions.remove(log.run, "ada", 20))


LAUNCHED = e.AttemptLaunched(
    pid=1, create_time=1.5, host="h", directory="/a/1", argv=["torchrun"], devices=["cuda:0", "cuda:1"]
)
LOADED = e.ModelLoaded(
    architecture="Llama",
    parameters=1_234_567,
    dtype="bfloat16",
    device="cuda",
    seconds=2.5,
    environment={"device": "NVIDIA H100", "dtype": "bfloat16", "torch": "2.11", "libraries": {"x": "1"}},
)
BOUND = e.DataBound(
    train_rows=90,
    train_digest="t" * 64,
    val_rows=7,
    val_digest="v" * 64,
    steps_per_epoch=2.5,
    planned_steps=12,
    truncated_rows=2,
    dropped_rows=3,
)
LOOK = e.SystemSampled(host="h", cpu_percent=4.5, memory_used_bytes=5, memory_total_bytes=6, gpus=[])
REDUCED = e.CheckpointReduced(
    step=12,
    path="/ck/step-12.weights",
    former_path="/ck/step-12",
    bytes=4,
    freed_bytes=6,
    manifest_digest="w",
)


DULL = ("spec", "version", "updated_at")


def _every_event() -> list[e.Event]:
    """Return each event of golden/events.json, as it is read today."""
    entries = json.loads((GOLDEN / "events.json").read_text())
    return [codec.decode(entry["type"], entry["v"], json.dumps(entry["p"]).encode()) for entry in entries]


def histories() -> dict[str, Any]:
    """What each event changes of a run, and what of it is printed, sent and accounted."""
    found: dict[str, Any] = {}
    for story in ("a run", "each event"):
        if story == "a run":
            recorded = _story().recorded
        else:
            log = Log().claim()
            for event in _every_event():
                log.add(event)
            recorded = log.recorded
        run, ledger = Run("brave-otter-3f2a"), goodput.Fold()
        for one in recorded:
            old, run = msgspec.to_builtins(run), evolve(run, one)
            new = msgspec.to_builtins(run)
            told = notice(one, e.NoticeFacts("p", "n", "ada", run.step, run.planned_steps, "2.0"), ordinal=10)
            found[f"{story} {one.version} {one.type}"] = {
                "changed": {k: v for k, v in new.items() if k not in DULL and v != old[k]},
                "kept": {step: len(reasons) for step, reasons in retention.why_kept(run).items()},
                "deletable": [c.step for c in retention.deletable(run)],
                "reducible": [c.step for c in retention.reducible(run)],
                "line": facts_of(one.event.line(12)),
                "read as": msgspec.to_builtins(one.event) if story == "each event" else None,
                "notice": told and (told.kind, told.step, told.at, facts_of(told.text)),
            }
            if one.type in goodput.TYPES:
                ledger.add(one.occurred_at, one.event)
        found[f"{story}: time"] = ledger.ledger(recorded[-1].occurred_at + 5_000_000).as_json()
        found[f"{story}: milestones"] = [
            msgspec.to_builtins(m) if isinstance(m, history.Steps) else m.version
            for m in history.milestones(recorded)
        ]
        found[f"{story}: timeline"] = sorted(logged_steps(recorded))
    return found


def test_what_each_event_makes_of_a_run_is_as_recorded() -> None:
    found, expected = json.loads(json.dumps(histories())), recorded("histories")
    assert found.keys() == expected.keys()
    for moment, entry in expected.items():
        assert found[moment] == entry, moment


def structs() -> dict[str, Any]:
    """How each class that is stored or sent is written and read, and what a field is that was not written."""
    for package in (sftd.domain, sftd.wire, sftd.store):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    found: dict[str, Any] = {}
    left: list[type[msgspec.Struct]] = [msgspec.Struct]
    while left:
        cls = left.pop()
        left += cls.__subclasses__()
        if cls.__module__.startswith(("sftd.domain.", "sftd.wire.", "sftd.store.")):
            config = cls.__struct_config__
            names = ("frozen", "array_like", "omit_defaults", "forbid_unknown_fields", "tag")
            fields = {f.name: _default(f) for f in msgspec.structs.fields(cls)}
            found[cls.__name__] = [[n for n in names if getattr(config, n)], fields]
    return dict(sorted(found.items()))


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    made = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()  # type: ignore[misc]
    return type(made).__name__ if isinstance(made, msgspec.Struct) else repr(made)


def test_each_class_is_read_and_written_as_recorded() -> None:
    found, expected = structs(), recorded("structs")
    assert found.keys() == expected.keys()
    for name, entry in expected.items():
        assert found[name] == entry, name


def write() -> None:
    """Record all of it again."""
    for name, make in RECORDED.items():
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in make().items())
        (GOLDEN / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


RECORDED: dict[str, Callable[[], Any]] = {
    "plans": plans,
    "spec_values": values,
    "histories": histories,
    "refusals": refusals,
    "structs": structs,
}


if __name__ == "__main__":
    write()

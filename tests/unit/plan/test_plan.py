"""The arithmetic of plans: by hand, and beside what was measured. docs/plan.md has the formulas and the commands."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sftd.domain.compare.plan_outcome import MeasuredRun, calibration, outcome
from sftd.domain.data.facts import LENGTH_QUANTILES, DataFacts
from sftd.domain.log import events as e
from sftd.domain.model import rules as model_rules
from sftd.domain.model.flops import device_bytes
from sftd.domain.model.parameters import Held, held, whole_model
from sftd.domain.model.shape import ModelShape
from sftd.domain.plan import experts
from sftd.domain.plan.batch import workload
from sftd.domain.plan.disk import storage
from sftd.domain.plan.duration import Machine, pace, step_seconds
from sftd.domain.plan.memory import Footprint, footprints, fullest
from sftd.domain.plan.plan import PlanInputs, make_plan
from sftd.domain.plan.search import search
from sftd.domain.run.state import CheckpointInfo, Run
from sftd.domain.spec import rules as spec_rules
from sftd.domain.spec.parse import change
from sftd.domain.spec.spec import Spec
from tests.builders.plan.model_shapes import EXPERTS, LLAMA_1B, LLAMA_3B, LLAMA_7B, QWEN_600M, SMOLLM_135M
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
    TWO_CORES,
    VPP,
    rows_of,
    spec_of,
)

GIB = 2**30
replace = msgspec.structs.replace


def facts(shape: ModelShape, data: DataFacts, steps: int = 8) -> PlanInputs:
    return PlanInputs(shape=shape, train=data, val=None, planned_steps=steps)


def peak(spec: Spec, shape: ModelShape, data: DataFacts, machine: Machine, steps: int = 8) -> Footprint:
    return make_plan(spec, facts(shape, data, steps), machine).fullest


# ---- by hand ----


def test_the_whole_models_are_those_of_the_model_cards() -> None:
    assert whole_model(LLAMA_1B) == 1_235_814_400
    assert whole_model(LLAMA_7B) == 6_738_415_616
    assert whole_model(SMOLLM_135M) == 134_515_008


def test_experts_on_a_gpu_by_hand() -> None:
    # Width 8, two of four experts of 6 units, half precision: a token's two rows, gate and up, weights, places, and its choice.
    whole = 2 * 2 * (8 + 2 * 6) + 2 * 24 + 4
    assert experts.kept_bytes(spec_of(), EXPERTS, 2, 1.0) == whole
    assert experts.kept_bytes(spec_of(), EXPERTS, 2, 0.0) == whole - experts.spared_bytes(
        spec_of(), EXPERTS, 2
    )
    assert experts.spared_bytes(spec_of((EP, 2)), EXPERTS, 2) == 0
    # Ranks that split the experts see each other's tokens, and half of the units.
    split = spec_of((TP, 2), (SP, True))
    assert experts.kept_bytes(split, EXPERTS, 2, 1.0) == 2 * 2 * (8 + 6) + 2 * 24 + 4
    assert experts.backward_bytes(spec_of(), EXPERTS, 2) == 2 * (2 * (8 + 4 * 6) + 2 * 8)
    assert experts.moved_bytes(EXPERTS, 2) == 2 * 2 * (4 * 8 + 9 * 6)


def test_a_mixture_of_experts_by_hand() -> None:
    # A layer: norms 2 · 8 and 2 · 4, QKV (4 + 2 · 2) · 4 · 8, projection 4 · 4 · 8, router 4 · 8; outside: the final norm,
    # and twice 11 · 8.
    layer, expert = 16 + 8 + 256 + 128 + 32, 3 * 8 * 6
    assert held(Spec(), EXPERTS, 0) == Held(2 * layer + 8 + 2 * 88, 2 * 4 * expert)
    two = spec_of((EP, 2), ("launch.nproc_per_node", 2))
    assert held(two, EXPERTS, 0) == Held(2 * layer + 8 + 2 * 88, 2 * 2 * expert)
    # TP 2 shares QKV, projection and experts; the vocabulary is padded to 12.
    split = spec_of((TP, 2), (SP, True))
    shared = 16 + 8 + 128 + 64 + 32
    assert held(split, EXPERTS, 0) == Held(2 * shared + 8 + 2 * 48, 2 * 4 * expert // 2)


def test_pipeline_stages_by_hand() -> None:
    spec = spec_of((PP, 2))
    layer = (1_235_814_400 - 2048 - 128256 * 2048) // 16
    embedding = 128256 * 2048
    # Tied: the last stage has a copy of the embedding.
    assert held(spec, LLAMA_1B, 0).total == 8 * layer + embedding
    assert held(spec, LLAMA_1B, 1).total == 8 * layer + embedding + 2048


def test_the_parts_of_a_footprint_by_hand() -> None:
    spec = spec_of(("training.micro_batch_size_per_gpu", 2), ("launch.nproc_per_node", 2))
    found = peak(spec, LLAMA_1B, rows_of(4096), H100)
    parameters, tokens = 1_235_814_400, 2 * 4096
    assert (found.weights, found.gradients) == (2 * parameters, 4 * parameters)
    # Two data-parallel ranks share master weights and moments.
    assert found.optimizer == 12 * parameters // 2
    # A layer, in BF16: the stream twice and two norms' outputs, QKV, attention's output and its statistics, gate, up and
    # what they make; and both norms' statistics.
    layer = 2 * (4 * 2048 + 48 * 64 + 32 * 64 + 3 * 8192) + 4 * 32 + 8
    assert found.activations == 16 * layer * tokens
    # 8190 trained positions (the share of 4095 in 4096), rounded up to a chunk: 2 norm tensors, 2 hidden states, logits.
    assert found.loss == 2 * 2048 * 2 * tokens + 2 * 2048 * 2 * 8190 + 8190 * 128256 * 2


@pytest.mark.parametrize(
    ("given", "stages"),
    [
        # In flight: PP − stage of 1F1B; interleaved 2 (PP − stage − 1) + (VPP − 1) PP + 1 of half as many layers.
        ([(PP, 2)], [2 * 8, 1 * 8]),
        ([(PP, 4)], [4 * 4, 3 * 4, 2 * 4, 1 * 4]),
        ([(PP, 2), (VPP, 2)], [5 * 4, 3 * 4]),
    ],
)
def test_activations_in_a_pipeline(given: list[tuple[str, Any]], stages: list[int]) -> None:
    spec = spec_of(*given)
    work = workload(spec, rows_of(4096), 8, "cuda")
    found = footprints(spec, LLAMA_1B, work, device="cuda", dtype="bfloat16")
    one = make_plan(spec_of(), facts(LLAMA_1B, rows_of(4096)), H100).fullest.activations / 16
    layers_of_a_chunk = 16 // (spec.parallel_sizes["PP"] * spec.parallel_sizes["VPP"])
    sent = 2 * 2048 * 4096
    assert [f.activations for f in found] == [n * one + n / layers_of_a_chunk * sent for n in stages]


def test_recomputing_keeps_less() -> None:
    again = ("model.enable_gradient_checkpointing", True)
    none, selective, full = (
        peak(spec_of(*given), LLAMA_1B, rows_of(4096), H100).activations
        for given in ([], [again, ("model.recompute", "selective")], [again])
    )
    assert full == 16 * 2 * 2048 * 4096
    # Without both norms' outputs and what gate and up make.
    assert none - selective == 16 * 2 * (2 * 2048 + 8192) * 4096


# ---- beside what was measured ----

FULL = ("model.enable_gradient_checkpointing", True)
PACKED = (("training.use_rmpad", True), ("training.micro_batch_tokens", 8192))
# (the row of docs/benchmarks.md, spec, shape, device, measured peak GiB, measured tokens/s a GPU): made by
# `scripts/bench_trainer.py speed --rows 2,4,8 --deterministic` and `scripts/run_llama2_7b_megatron.sh 2` there.
ONE, SEVEN = (LLAMA_1B, 16, 4096), (LLAMA_7B, 64, 2048)
MEASURED: list[tuple[str, list[tuple[str, Any]], tuple[ModelShape, int, int], Machine, float, float]] = [
    ("1B, 2 rows", [("training.micro_batch_size_per_gpu", 2)], ONE, H100, 32.1, 64_113),
    ("1B, 4 rows", [("training.micro_batch_size_per_gpu", 4)], ONE, H100, 41.5, 65_160),
    ("1B, 8 rows", [("training.micro_batch_size_per_gpu", 8)], ONE, H100, 60.3, 66_533),
    (
        "1B, 8 rows, deterministic",
        [("training.micro_batch_size_per_gpu", 8), ("training.deterministic", True)],
        ONE,
        H100,
        60.3,
        63_571,
    ),
    ("7B, TP2, full", [(TP, 2), FULL, *PACKED], SEVEN, H200, 59.5, 9_270),
    ("7B, TP2 + SP", [(TP, 2), (SP, True), *PACKED], SEVEN, H200, 73.1, 12_020),
    ("7B, PP2 × VPP2", [(PP, 2), (VPP, 2), *PACKED], SEVEN, H200, 97.6, 12_915),
]
# By `scripts/measure_plan.py --shape …` with these keys: peak GiB, seconds of the third step. Planned before measured.
SELECTIVE = (FULL, ("model.recompute", "selective"))
BY_PARTS: list[tuple[str, list[tuple[str, Any]], ModelShape, float, float]] = [
    ("1B, 4 rows", [("training.micro_batch_size_per_gpu", 4)], LLAMA_1B, 41.523, 1.010),
    ("1B, full", [RMPAD, (TOKENS, 16384), FULL], LLAMA_1B, 23.993, 1.376),
    ("1B, selective", [RMPAD, (TOKENS, 8192), *SELECTIVE], LLAMA_1B, 29.132, 1.141),
    ("Qwen3 0.6B, 4 rows", [("training.micro_batch_size_per_gpu", 4)], QWEN_600M, 33.688, 1.005),
    ("3B, full", [RMPAD, (TOKENS, 8192), FULL], LLAMA_3B, 57.383, 3.610),
    ("Qwen3 0.6B, selective", [RMPAD, (TOKENS, 16384), *SELECTIVE], QWEN_600M, 29.319, 1.214),
]


@pytest.mark.parametrize("case", BY_PARTS, ids=[case[0] for case in BY_PARTS])
def test_memory_and_time_of_one_h100_are_as_measured(case: Any) -> None:
    _, given, shape, gib, seconds = case
    plan = make_plan(spec_of(*given), facts(shape, rows_of(4096)), H100)
    assert plan.fullest.total / GIB == pytest.approx(gib, rel=0.003)
    assert plan.pace.step == pytest.approx(seconds, rel=0.12)


@pytest.mark.parametrize("case", MEASURED, ids=[case[0] for case in MEASURED])
def test_memory_and_time_on_gpus_are_as_measured(case: Any) -> None:
    _, given, (shape, batch, length), machine, gib, tokens_per_second = case
    spec = spec_of(*given, batch=batch, length=length)
    plan = make_plan(spec, facts(shape, rows_of(length)), machine)
    # Ten percent are promised; nothing in the formula of memory was fitted.
    assert plan.fullest.total / GIB == pytest.approx(gib, rel=0.005)
    assert plan.work.real / plan.pace.step / spec.world_size == pytest.approx(tokens_per_second, rel=0.08)
    assert plan.pace.basis == "measured"


# `scripts/bench_trainer.py lengths`, packed: the largest micro-batch of the steps that it draws (the planner's, of its
# seed; the first step has no moments yet), and the measured peak GiB.
@pytest.mark.parametrize(("largest", "samples", "gib"), [(15_296, 25, 40.156), (24_320, 39, 50.626)])
def test_memory_of_packed_samples_is_as_measured(largest: int, samples: int, gib: float) -> None:
    spec = spec_of(("training.use_rmpad", True), ("training.micro_batch_tokens", 32768), batch=128)
    drawn = workload(spec, rows_of(560), 8, "cuda")
    work = replace(drawn, largest=largest, largest_trained=largest - samples)
    found = fullest(footprints(spec, LLAMA_1B, work, device="cuda", dtype="bfloat16"))
    assert found.total / GIB == pytest.approx(gib, rel=0.002)


def test_deterministic_attention_holds_scores_where_the_mlp_was() -> None:
    thin = replace(
        LLAMA_1B, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, vocab_size=64
    )

    def behind(length: int, *given: tuple[str, Any]) -> int:
        spec = spec_of(("training.deterministic", True), *given, batch=1, length=length)
        return peak(spec, thin, rows_of(length), H100).loss

    # Backward of a layer, and of the scores of two heads; the gate, the up projection and their product are let go by then.
    tokens = 8192
    expected = 2 * (2 * 64 + 3 * 2048) * tokens + 2 * tokens**2 * 2 - 3 * 2 * 64 * tokens
    assert behind(tokens) == expected
    # Packed, or where a group's scores are too many for a part, it is FlashAttention: the peak is after the last layer.
    head = 2 * (2 * 2048) * tokens + 2 * (2 * 2048 + 64) * (tokens - 1)
    assert behind(tokens, RMPAD) == head
    assert behind(32768) == 2 * (2 * 2048) * 32768 + 2 * (2 * 2048 + 64) * 32767


# Peaks of the process on two CPU cores in GB, by `python -m sftd.trainer` on the demo's config with these keys, these numbers of
# samples a step and of steps; the process's share was fitted to all but the last.
ON_CPU: list[tuple[str, list[tuple[str, Any]], int, int, float]] = [
    ("the demo", [RMPAD, ("training.micro_batch_size_per_gpu", 8)], 8, 20, 4.875),
    ("larger", [RMPAD, ("training.micro_batch_tokens", 2048)], 32, 3, 7.042),
    ("recomputed", [RMPAD, ("training.micro_batch_tokens", 2048), FULL], 32, 3, 3.882),
    ("padded", [("training.micro_batch_size_per_gpu", 16)], 16, 3, 7.040),
]


@pytest.mark.parametrize("case", ON_CPU, ids=[case[0] for case in ON_CPU])
def test_memory_on_a_cpu_is_as_measured(case: Any) -> None:
    _, given, batch, steps, gigabytes = case
    spec = spec_of(*given, batch=batch, length=512)
    found = peak(spec, SMOLLM_135M, DEMO, TWO_CORES, steps)
    assert found.total / 1e9 == pytest.approx(gigabytes, rel=0.05)


# ---- time and disk ----


def test_a_run_adds_up() -> None:
    spec = spec_of(("trainer.val_check_interval", 4), ("data.val_files", ["v"]), ("trainer.save_interval", 3))
    work = workload(spec, rows_of(4096), 8, "cuda")
    seconds, _ = step_seconds(spec, LLAMA_1B, work, H100)
    found = pace(
        spec,
        LLAMA_1B,
        work,
        H100,
        val=rows_of(4096, rows=16),
        planned_steps=8,
        first_step=2,
        checkpoint_bytes=1_150_000_000,
        calibration=2.0,
    )
    assert found.training == pytest.approx(6 * 2 * seconds)
    # Before step 1, after 4 and at the end: 16 rows are a batch, and forward is a third of it.
    assert found.validating == pytest.approx(3 * 2 * seconds / 3)
    # After 3, 6 and 8.
    assert found.saving == pytest.approx(3)
    assert found.basis == "log"
    assert found.total == found.training + found.validating + found.saving + found.starting


def test_what_is_packed_on_a_cpu_has_no_padding() -> None:
    four = DataFacts(
        files=["t"],
        digest="",
        rows=4,
        tokens=157,
        trained_tokens=14,
        longest=41,
        truncated=0,
        unusable=0,
        seen_tokens=157,
        seen_squares=38**2 + 39**2 + 39**2 + 41**2,
        lengths=(),
    )
    work = workload(spec_of(RMPAD, batch=4, length=256), four, 6, "cpu")
    assert work.computed == pytest.approx(work.real, rel=1e-3)


def test_a_fork_pays_for_its_own_steps_alone() -> None:
    spec = spec_of(
        ("trainer.max_steps", 1000),
        ("trainer.save_interval", 100),
        ("trainer.val_check_interval", 100),
        ("data.val_files", ["v"]),
        ("checkpoint.keep_last", 5),
    )
    known = replace(facts(LLAMA_1B, rows_of(4096)), planned_steps=1000, val=rows_of(4096, rows=16))
    whole, fork = (make_plan(spec, replace(known, first_step=first), H100) for first in (0, 850))
    # After 900 and 1000, and validated before the first step, too.
    assert (whole.storage.saved, fork.storage.saved, fork.storage.kept) == (10, 2, 2)
    assert fork.pace.saving == pytest.approx(whole.pace.saving * 2 / 10)
    assert fork.pace.validating == pytest.approx(whole.pace.validating * 3 / 11)


@pytest.mark.parametrize(
    ("given", "kept", "most"),
    [
        # 40 steps, saved at 10, 20, 30 and 40.
        ([("checkpoint.keep_last", 1), ("checkpoint.keep_best", 0)], 1, 2),
        ([("checkpoint.keep_last", 3)], 3, 4),
        ([("checkpoint.keep_last", 9)], 4, 4),
        ([("checkpoint.keep_last", 1), ("checkpoint.keep_every", 20), ("checkpoint.keep_best", 0)], 2, 3),
        ([("checkpoint.keep_last", 1), ("data.val_files", ["v"])], 2, 3),
    ],
)
def test_checkpoints_are_counted_as_they_are_kept(given: list[tuple[str, Any]], kept: int, most: int) -> None:
    spec = spec_of(("trainer.max_steps", 40), ("trainer.save_interval", 10), *given)
    found = storage(spec, LLAMA_1B, 40, "bfloat16")
    assert (found.saved, found.kept, found.most) == (4, kept, most)
    # As measured: 17.30 GB.
    assert found.checkpoint == pytest.approx(17.30e9, rel=1e-3)
    assert found.needed == pytest.approx((most - 1 + 1.1) * found.checkpoint)
    assert found.export == 2 * 1_235_814_400


@pytest.mark.parametrize(("choice", "whole", "reduced"), [("all", 3, 0), ("last", 2, 1), ("weights", 0, 3)])
def test_what_stays_after_success_is_counted(choice: str, whole: int, reduced: int) -> None:
    given = [("checkpoint.keep_last", 2), ("data.val_files", ["v"]), ("checkpoint.after_success", choice)]
    spec = spec_of(("trainer.max_steps", 40), ("trainer.save_interval", 10), *given)
    found = storage(spec, LLAMA_1B, 40, "bfloat16")
    assert (found.kept, found.reduced) == (3, reduced)
    assert found.at_end == whole * found.checkpoint + reduced * found.export


# ---- the best layout ----


@pytest.mark.parametrize(("last", "every", "best"), [(1, 0, 0), (3, 20, 1), (2, 15, 3), (40, 30, 2)])
def test_many_checkpoints_are_counted_at_once(last: int, every: int, best: int) -> None:
    given = [
        ("trainer.save_interval", 10),
        ("checkpoint.keep_last", last),
        ("checkpoint.keep_every", every),
    ]
    spec = spec_of(*given, ("checkpoint.keep_best", best), ("data.val_files", ["v"]))
    kept = most = 0
    for end in range(10, 310, 10):
        saved = list(range(10, end + 1, 10))
        stays = {*saved[-last:], *(s for s in saved if every and s % every == 0)}
        most, kept = max(most, kept + 1), len(stays) + min(best, len(saved) - len(stays))
        found = storage(spec, LLAMA_1B, end, "bfloat16")
        assert (found.kept, found.most) == (kept, most)
    # `sftd show` and each layout of `sftd plan` count them: a run of this length took minutes.
    assert storage(spec, LLAMA_1B, 1_000_000, "bfloat16").saved == 100_000


def test_a_small_model_is_copied_and_a_large_one_is_shared() -> None:
    spec = spec_of()
    found = search(spec, facts(LLAMA_1B, rows_of(4096)), H100, devices=8, memory=79 * GIB)
    assert found.best is not None
    assert found.best.spec.parallel_sizes == {"TP": 1, "PP": 1, "VPP": 1, "CP": 1, "EP": 1, "DP": 8}
    large = spec_of(batch=64, length=2048)
    found = search(large, facts(LLAMA_7B, rows_of(2048)), H100, devices=2, memory=79 * GIB)
    assert found.best is not None
    assert found.best.spec.model_parallel_size == 2
    assert found.best.plan.needed <= 79 * GIB


def test_every_layout_found_is_valid_and_its_keys_make_it() -> None:
    spec = spec_of(("training.use_rmpad", True), batch=32, length=2048)
    found = search(spec, facts(EXPERTS, rows_of(2048)), H100, devices=4, memory=79 * GIB)
    assert found.tried > 50
    assert any("model.megatron.expert_model_parallel_size" in c.changes for c in found.fitting)
    for choice in found.fitting:
        assert not spec_rules.SPEC.problems(choice.spec)
        assert not model_rules.MODEL.problems(choice.spec, EXPERTS)
        made, _ = change(spec, choice.changes.items())
        assert made.parallel_sizes == choice.spec.parallel_sizes
        assert made.model == choice.spec.model
        assert made.micro_batch_tokens == choice.spec.micro_batch_tokens


def test_where_nothing_fits_the_smallest_is_told() -> None:
    found = search(spec_of(), facts(LLAMA_7B, rows_of(4096)), H100, devices=1, memory=40 * GIB)
    assert (found.best, found.fitting, found.fit) == (None, [], 0)
    assert found.smallest is not None
    assert found.smallest.plan.needed > 40 * GIB
    assert found.smallest.spec.model.enable_gradient_checkpointing


def test_recomputation_is_chosen_only_where_it_must_and_says_what_it_saves() -> None:
    known = facts(LLAMA_1B, rows_of(4096))
    one = [("training.micro_batch_size_per_gpu", 1)]
    roomy = search(spec_of(*one, batch=1), known, H100, devices=1, memory=79 * GIB).best
    tight = search(spec_of(*one, batch=1), known, H100, devices=1, memory=28 * GIB).best
    assert roomy is not None
    assert tight is not None
    assert not roomy.spec.model.enable_gradient_checkpointing
    assert roomy.without_recompute is None
    assert tight.spec.model.enable_gradient_checkpointing
    assert (tight.without_recompute or 0) > 28 * GIB


def test_a_config_that_is_as_good_is_left_alone() -> None:
    spec = spec_of(("training.micro_batch_size_per_gpu", 4))
    found = search(spec, facts(LLAMA_1B, rows_of(4096)), H100, devices=1, memory=79 * GIB)
    assert found.best is not None
    assert found.best.changes == {}


def test_devices_are_those_of_all_nodes_together() -> None:
    slurm = [("launch.launcher", "slurm"), ("launch.nnodes", 2), ("launch.nproc_per_node", 4)]
    known = facts(LLAMA_1B, rows_of(4096))
    found = search(spec_of(*slurm), known, H100, devices=8, memory=79 * GIB)
    assert found.best is not None
    assert max(c.spec.world_size for c in found.fitting) == 8
    assert {c.spec.launch.nnodes for c in found.fitting} == {2}
    # What does not share out among the nodes is left over.
    found = search(spec_of(*slurm, batch=24), known, H100, devices=7, memory=79 * GIB)
    assert max(c.spec.world_size for c in found.fitting) == 6


# ---- outcomes ----

SPEC = spec_of(("training.micro_batch_size_per_gpu", 4), ("trainer.max_steps", 8))


def submitted(data: dict[str, Any] | None = None) -> e.RunSubmitted:
    return e.RunSubmitted(
        spec=msgspec.to_builtins(SPEC),
        spec_digest="",
        planned_steps=8,
        user="ada",
        data=data or {"train": msgspec.to_builtins(rows_of(4096)), "val": None},
        model={"path": "m", **msgspec.to_builtins(LLAMA_1B)},
        sftd_version="",
    )


def ended(seconds: float = 2.0, device: str = H100.name) -> Run:
    size = storage(SPEC, LLAMA_1B, 8, "bfloat16").checkpoint
    point = CheckpointInfo(8, "p", 2 * size, "d", 0, 9, 0)
    return Run(
        run_id="r",
        spec=SPEC,
        status="succeeded",
        planned_steps=8,
        step=8,
        seconds_per_step=seconds,
        environment={"device": device, "dtype": "bfloat16", "threads": 1},
        checkpoints=(point,),
    )


def last_step(peak_bytes: int) -> e.StepCompleted:
    numbers: dict[str, Any] = dict.fromkeys(
        ("epoch", "loss", "grad_norm", "lr", "tokens", "tokens_real", "tokens_padded", "tokens_total"), 0
    )
    return e.StepCompleted(
        step=8, samples=1, samples_digest="", seconds=2.0, peak_memory_bytes=peak_bytes, **numbers
    )


def test_what_was_planned_is_compared_with_what_happened() -> None:
    planned = make_plan(SPEC, facts(LLAMA_1B, rows_of(4096)), H100)
    found = outcome(ended(), submitted(), last_step(planned.fullest.total // 2), 100.0, [])
    assert found is not None
    by_name = {one.name: one for one in found.compared}
    assert by_name["peak memory"].error == pytest.approx(1.0)
    assert by_name["step"].error == pytest.approx(planned.pace.step / 2.0 - 1)
    assert by_name["whole run"].actual == 100.0
    assert by_name["checkpoint"].error == pytest.approx(-0.5)
    assert found.as_json()["compared"]["peak memory"]["planned"] == planned.fullest.total


def test_a_run_that_still_goes_on_has_no_total() -> None:
    run = msgspec.structs.replace(ended(), status="running", step=3, checkpoints=())
    found = outcome(run, submitted(), None, 100.0, [])
    assert found is not None
    by_name = {one.name: one for one in found.compared}
    assert by_name["whole run"].actual is None
    assert by_name["checkpoint"].actual is None
    assert by_name["peak memory"].error is None


def test_a_log_that_says_too_little_is_not_compared() -> None:
    assert outcome(ended(), submitted({"train": {"rows": 9}}), None, 1.0, []) is None
    before = msgspec.structs.replace(ended(), environment={})
    assert outcome(before, submitted(), None, 1.0, []) is None


def test_earlier_runs_correct_the_pace() -> None:
    work = workload(SPEC, rows_of(4096), 8, "cuda")
    formula, _ = step_seconds(SPEC, LLAMA_1B, work, H100)
    slow = [MeasuredRun(ended(formula * n), submitted()) for n in (1.5, 2.0, 9.0)]
    assert calibration(LLAMA_1B, H100, slow) == pytest.approx(2.0)
    # Another shape, or another device, says nothing.
    assert calibration(LLAMA_7B, H100, slow) is None
    assert calibration(LLAMA_1B, H200, slow) is None
    assert fullest(footprints(SPEC, LLAMA_1B, work, device="cuda", dtype="bfloat16")).stage == 0


def test_a_log_that_does_not_know_how_lengths_vary_is_planned_by_their_mean() -> None:
    known = rows_of(512, rows=10)
    unknown = replace(known, seen_tokens=0, seen_squares=0, lengths=())
    work = workload(spec_of(length=1024), unknown, 8, "cpu")
    assert (work.real, work.squares) == (16 * 512, 16 * 512**2)
    # Cut to the longest that is trained; a log without any tokens is taken at its longest.
    assert workload(spec_of(length=256), unknown, 8, "cpu").real == 16 * 256
    assert workload(spec_of(length=1024), replace(unknown, tokens=0), 8, "cpu").real == 16 * 512


def test_lengths_are_rounded_up_to_what_the_ranks_share() -> None:
    rows = rows_of(101)

    def longest(device: str, *given: tuple[str, Any]) -> int:
        return workload(spec_of(*given, length=101), rows, 8, device).largest

    assert longest("cpu") == 101
    assert longest("cuda") == 128
    assert longest("cpu", (CP, 2), ("launch.nproc_per_node", 2)) == 104
    assert longest("cuda", (CP, 2), ("launch.nproc_per_node", 2)) == 128
    assert longest("cpu", (TP, 4), (SP, True)) == 104
    assert longest("cpu", (TP, 4)) == 101
    assert longest("cpu", (TP, 3), (SP, True), (CP, 2), ("launch.nproc_per_node", 6)) == 108


def test_the_longest_of_several_rows_is_expected_between_the_quantiles() -> None:
    # Evenly spread from 0 to 2000: of one row half of it, of the larger of two two thirds.
    lengths = tuple(round(2000 * q) for q in LENGTH_QUANTILES)
    rows = replace(rows_of(1000), lengths=lengths, longest=2000)
    for size, expected in ((1, 1000.0), (2, 2000 * 2 / 3)):
        spec = spec_of(("training.micro_batch_size_per_gpu", size), batch=16, length=2000)
        work = workload(spec, rows, 8, "cpu")
        assert work.computed / 16 == pytest.approx(expected, rel=0.05)


def test_the_interleaved_schedule_takes_groups_of_micro_batches() -> None:
    for given, expected in (([], 16), ([(PP, 2)], 16), ([(PP, 2), (VPP, 2)], 16)):
        assert spec_of(*given).num_microbatches == expected
    packed = [RMPAD, (TOKENS, 3 * 4096), (PP, 4), ("launch.nproc_per_node", 4)]
    assert spec_of(*packed).num_microbatches == 6
    assert spec_of(*packed, (VPP, 2)).num_microbatches == 8


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("NVIDIA B200", 179.0),
        ("NVIDIA H200", 139.8),
        ("NVIDIA H100 NVL", 93.1),
        ("NVIDIA H100 80GB HBM3", 79.1),
        ("NVIDIA A100-SXM4-80GB", 79.1),
        ("NVIDIA L40S", 44.4),
        ("NVIDIA GeForce RTX 4090", 0.0),
    ],
)
def test_the_memory_of_a_device_is_known_by_its_name(name: str, gib: float) -> None:
    assert device_bytes(name) == int(gib * GIB)


def test_an_outcome_on_cpus_is_compared_with_a_plan_for_cpus() -> None:
    run = replace(ended(device="cpu"), environment={"device": "cpu", "dtype": "float32", "threads": 3})
    found = outcome(run, submitted(), None, 100.0, [])
    assert found is not None
    assert found.plan.machine == Machine(device="cpu", name="cpu", cores=3)
    on_gpus = outcome(ended(), submitted(), None, 100.0, [])
    assert on_gpus is not None
    assert on_gpus.plan.machine == Machine(device="cuda", name=H100.name, cores=1)

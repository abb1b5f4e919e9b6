"""Plans of runs that train a part of a model: adapters, a quantised base, frozen weights; and of a lean optimizer."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sftd.domain.model.flops import matmul_parameters, training_flops
from sftd.domain.model.parameters import Held, held, trained_parameters, whole_model
from sftd.domain.model.shape import ModelShape
from sftd.domain.plan.batch import workload
from sftd.domain.plan.disk import storage
from sftd.domain.plan.duration import Machine, step_seconds
from sftd.domain.plan.memory import Footprint
from sftd.domain.plan.plan import PlanInputs, make_plan
from sftd.domain.plan.search import alternatives
from sftd.domain.spec.parse import change
from tests.builders.plan.model_shapes import EXPERTS, LLAMA_1B, LLAMA_7B
from tests.builders.plan.plans import EP, H100, H200, PP, SP, TP, TWO_CORES, VPP, rows_of, spec_of

GIB = 2**30
RANK, NF4, FREEZE = ("model.lora.rank", 16), ("model.quantize", "nf4"), "model.freeze"
FULL = ("model.enable_gradient_checkpointing", True)
SELECTIVE = (FULL, ("model.recompute", "selective"))
LLAMA_8B = msgspec.structs.replace(
    LLAMA_7B, intermediate_size=14336, num_key_value_heads=8, vocab_size=128256
)
Given = tuple[str, Any]


def facts(shape: ModelShape, length: int = 4096) -> PlanInputs:
    return PlanInputs(shape=shape, train=rows_of(length), val=None, planned_steps=8)


def peak(shape: ModelShape, *given: Given, machine: Machine = H100) -> Footprint:
    return make_plan(spec_of(*given), facts(shape), machine).fullest


# ---- parameters ----


def test_adapters_of_a_dense_model_by_hand() -> None:
    # Inputs and outputs of q, k, v, o, gate, up and down.
    wide = (4096 + 4096) + 2 * (4096 + 1024) + (4096 + 4096) + 3 * (4096 + 14336)
    spec = spec_of(RANK)
    assert held(spec, LLAMA_8B, 0) == Held(32 * 16 * wide, 0, 8_030_261_248)
    assert trained_parameters(spec.model, LLAMA_8B) == 32 * 16 * wide == 41_943_040
    limited = spec_of(RANK, ("model.lora.targets", ["down", "q"]))
    assert trained_parameters(limited.model, LLAMA_8B) == 32 * 16 * (4096 + 4096 + 4096 + 14336)


def test_tensor_parallel_ranks_share_one_of_an_adapters_matrices() -> None:
    # B of q, k, v, gate and up, A of o and down.
    split = 4096 + 1024 + 1024 + 4096 + 2 * 14336 + 14336
    whole = 3 * 4096 + 4096 + 2 * 4096 + 4096
    spec = spec_of(RANK, (TP, 4), (PP, 2), (SP, True), ("launch.nproc_per_node", 8))
    assert held(spec, LLAMA_8B, 0).dense == 16 * 16 * (split // 4 + whole)
    assert trained_parameters(spec.model, LLAMA_8B) == 41_943_040


def test_each_expert_has_adapters() -> None:
    spec = spec_of(RANK, (EP, 2), ("launch.nproc_per_node", 2))
    # Width 8, four heads of 4 over two keys; two of four experts of 6 units.
    attention = (8 + 16) + 2 * (8 + 8) + (16 + 8)
    found = held(spec, EXPERTS, 0)
    assert (found.dense, found.experts) == (2 * 16 * attention, 2 * 2 * 16 * 3 * (8 + 6))
    assert found.frozen == held(spec_of((EP, 2), ("launch.nproc_per_node", 2)), EXPERTS, 0).total


def test_the_matrices_of_the_layers_are_quantised_and_nothing_else() -> None:
    found = held(spec_of(RANK, NF4), LLAMA_8B, 0)
    # Without embedding, output layer and norms.
    assert found.quantized == whole_model(LLAMA_8B) - 2 * 128256 * 4096 - 65 * 4096
    # Experts, but no router and no norm of queries and keys.
    assert held(spec_of(RANK, NF4), EXPERTS, 0).quantized == 2 * (384 + 4 * 3 * 8 * 6)


@pytest.mark.parametrize(
    ("expressions", "frozen"),
    [
        (["^model.embed_tokens"], 128256 * 4096),
        (["lm_head", "^model.norm"], 128256 * 4096 + 4096),
        ([r"layers\.\d+\..*layernorm"], 2 * 32 * 4096),
        ([r"^model\.layers\.(0|31)\."], 2 * ((8_030_261_248 - 2 * 128256 * 4096 - 4096) // 32)),
        (["mlp.down_proj", "q_proj"], 32 * (4096 * 14336 + 4096 * 4096)),
    ],
)
def test_frozen_weights_are_found_by_their_names(expressions: list[str], frozen: int) -> None:
    spec = spec_of((FREEZE, expressions))
    assert held(spec, LLAMA_8B, 0) == Held(8_030_261_248 - frozen, 0, frozen)
    pipeline = spec_of((FREEZE, expressions), (PP, 2), (VPP, 2))
    assert sum(held(pipeline, LLAMA_8B, stage).frozen for stage in (0, 1)) == frozen


def test_a_tied_embedding_is_frozen_in_both_places() -> None:
    spec = spec_of((FREEZE, ["embed_tokens"]), (PP, 2))
    assert [held(spec, LLAMA_1B, stage).frozen for stage in (0, 1)] == [128256 * 2048] * 2
    # Each virtual stage has its own layers: 0 to 3 and 8 to 11 are on the first rank.
    spec = spec_of((FREEZE, [r"layers\.(8|9)\."]), (PP, 2), (VPP, 2))
    layer = (1_235_814_400 - 2048 - 128256 * 2048) // 16
    assert [held(spec, LLAMA_1B, stage).frozen for stage in (0, 1)] == [2 * layer, 0]


def test_experts_are_frozen_by_their_numbers() -> None:
    spec = spec_of((FREEZE, [r"experts\.[01]\.", "mlp.gate.weight"]))
    found = held(spec, EXPERTS, 0)
    assert (found.experts, found.frozen) == (2 * 2 * 3 * 8 * 6, 2 * (2 * 3 * 8 * 6 + 4 * 8))
    mixtral = msgspec.structs.replace(EXPERTS, architecture="MixtralForCausalLM", qk_norm=False)
    spec = spec_of((FREEZE, [r"block_sparse_moe\.experts\.3\.w[123]\.weight"]))
    assert held(spec, mixtral, 0).frozen == 2 * 3 * 8 * 6


# ---- memory ----


def test_the_parts_of_a_footprint_with_adapters_by_hand() -> None:
    found, full = peak(LLAMA_8B, RANK), peak(LLAMA_8B)
    adapters = 41_943_040
    assert found.weights == 2 * (8_030_261_248 + adapters)
    assert (found.gradients, found.optimizer) == (4 * adapters, 12 * adapters)
    # Inputs are kept as in a full fine-tune, because A wants them; and A x of seven projections.
    assert found.activations - full.activations == 32 * 2 * 16 * 7 * 4096
    assert found.loss == full.loss
    # The joined matrices of q, k and v, of o, of gate and up, and of down in BF16, and their gradients in FP32.
    joined = 48 * (4096 + 6144) + 16 * (4096 + 4096) + 32 * (4096 + 28672) + 16 * (14336 + 4096)
    assert found.workspace - full.workspace == 32 * joined * (2 + 4)
    # A step of one micro-batch has no gradients yet when its activations are in memory.
    once = make_plan(spec_of(RANK, batch=1), facts(LLAMA_8B), H100).fullest
    assert found.workspace - once.workspace == 32 * joined * 4


def test_the_joined_matrices_of_a_rank_are_its_share() -> None:
    def joined(shape: ModelShape, *given: Given) -> float:
        plain = make_plan(spec_of(*given), facts(shape, 512), H100).fullest.workspace
        return (make_plan(spec_of(RANK, *given), facts(shape, 512), H100).fullest.workspace - plain) / 6

    pipeline = joined(LLAMA_8B, (TP, 4), (PP, 2), ("launch.nproc_per_node", 8))
    layer = 48 * (4096 + 1536) + 16 * (1024 + 4096) + 32 * (4096 + 7168) + 16 * (3584 + 4096)
    assert pipeline == 16 * layer
    expert = 32 * (8 + 12) + 16 * (6 + 8)
    attention = 48 * (8 + 32) + 16 * (16 + 8)
    assert joined(EXPERTS, (EP, 2), ("launch.nproc_per_node", 2)) == 2 * (attention + 2 * expert)


def test_a_product_without_an_adapter_keeps_no_input() -> None:
    every = peak(LLAMA_8B, RANK).activations
    attention = peak(LLAMA_8B, RANK, ("model.lora.targets", ["q", "k", "v", "o"])).activations
    # The second norm's output, and what gate and up make; and A x of three projections.
    assert every - attention == 32 * 2 * (4096 + 14336 + 16 * 3) * 4096
    down = peak(LLAMA_8B, RANK, ("model.lora.targets", ["down"])).activations
    assert every - down == 32 * 2 * (2 * 4096 + 16 * 6) * 4096
    # What is not kept is not spared again.
    again = peak(LLAMA_8B, RANK, ("model.lora.targets", ["down"]), *SELECTIVE).activations
    assert down - again == 32 * 2 * 14336 * 4096


def test_frozen_layers_keep_no_inputs() -> None:
    full = peak(LLAMA_8B).activations
    half = peak(LLAMA_8B, (FREEZE, [r"layers\.([0-9]|1[0-5])\."])).activations
    assert full - half == 16 * 2 * (2 * 4096 + 14336) * 4096
    # On a CPU a norm keeps its normalised input for the gradient of its weight, in FP32.
    full, norms = (
        peak(LLAMA_8B, *given, machine=TWO_CORES).activations for given in ((), ((FREEZE, ["layernorm"]),))
    )
    assert full - norms == 32 * 4 * 2 * 4096 * 4096


def test_layers_before_the_first_that_is_trained_have_no_backward() -> None:
    half = (FREEZE, ["embed_tokens", r"layers\.([0-9]|1[0-5])\."])
    assert 2 * peak(LLAMA_8B, half).activations == peak(LLAMA_8B).activations
    # Recomputed whole, a layer has one in any case. The second stage gets an input with a gradient.
    assert peak(LLAMA_8B, half, FULL).activations == peak(LLAMA_8B, FULL).activations
    stages = make_plan(spec_of(half, (PP, 2)), facts(LLAMA_8B), H100).memory
    assert (stages[0].activations, stages[1].activations > 0) == (2 * 2 * 4096 * 4096, True)
    full, found = (training_flops(LLAMA_8B, 1, 1.0, spec_of(*given).model) for given in ((), (half,)))
    layers = matmul_parameters(LLAMA_8B) - 128256 * 4096
    assert full - found == pytest.approx(4 * layers / 2 + 4 * 32 * 4096 / 2)


def test_a_quantised_base_by_hand() -> None:
    found, plain = peak(LLAMA_8B, RANK, NF4, FULL), peak(LLAMA_8B, RANK, FULL)
    quantized = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
    # Half a byte a value, and four bytes for each 64.
    assert plain.weights - found.weights == 2 * quantized - (quantized // 2 + quantized // 16)
    assert found.activations == plain.activations
    # While the gradients of gate and up are computed, the input of down has been let go.
    thin = msgspec.structs.replace(LLAMA_8B, vocab_size=64)
    layer = 2 * (4 * 4096 + 4096 + 2 * 1024 + 4096 + 3 * 14336 + 16 * 7) + 4 * 32 + 8
    assert peak(thin, RANK, FULL).loss == (layer + 2 * (2 * 14336 + 2 * 4096)) * 4096
    # While that of their input is, gate and up are decompressed and they themselves have been let go: more, of fewer tokens.
    few = make_plan(spec_of(RANK, NF4, FULL), facts(thin, 512), H100).fullest
    assert few.loss == (layer + 2 * (3 * 4096 - 14336)) * 512 + 2 * 2 * 14336 * 4096


# One H200, four micro-batches of full sequences a step: rows, keys, peak GiB, tokens/s (docs/plan.md).
MEASURED: list[tuple[int, list[Given], float, float | None]] = [
    (1, [], 34.2, 15_944),
    (1, [("training.deterministic", True)], 34.2, 15_944),
    (1, [*SELECTIVE], 28.4, 15_242),
    (1, [FULL], 18.2, 11_193),
    (4, [FULL], 22.9, 11_133),
    (1, [FULL, ("model.recompute_layers", 14)], 24.1, 13_285),
    (1, [NF4], 24.9, None),
    (1, [NF4, FULL], 8.8, None),
]


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_memory_and_time_of_adapters_are_as_measured(case: Any) -> None:
    rows, given, gib, tokens_per_second = case
    spec = spec_of(RANK, ("training.micro_batch_size_per_gpu", rows), *given, batch=4 * rows)
    plan = make_plan(spec, facts(LLAMA_8B), H200)
    assert plan.fullest.total / GIB == pytest.approx(gib, rel=0.02)
    if tokens_per_second:
        assert plan.work.real / plan.pace.step == pytest.approx(tokens_per_second, rel=0.05)


def test_some_layers_are_recomputed_whole_and_the_others_selectively() -> None:
    partial = ("model.recompute_layers", 10)
    found, full, selective = (
        peak(LLAMA_1B, RANK, *given) for given in ([FULL, partial], [FULL], [*SELECTIVE])
    )
    assert found.activations == pytest.approx((10 * full.activations + 6 * selective.activations) / 16)
    # Where one layer is not, its activations are free when the others are computed again.
    thin = msgspec.structs.replace(LLAMA_1B, vocab_size=64)
    last, every = (peak(thin, RANK, FULL, *given) for given in ([("model.recompute_layers", 15)], []))
    one = peak(thin, RANK, *SELECTIVE).activations / 16
    assert last.activations - every.activations == one - every.activations / 16
    assert every.loss - last.loss == one

    def seconds(*given: Given) -> float:
        spec = spec_of(RANK, *given)
        return step_seconds(spec, LLAMA_1B, workload(spec, rows_of(4096), 8, "cuda"), H100)[0]

    expected = (10 * seconds(FULL) + 6 * seconds(*SELECTIVE)) / 16
    assert seconds(FULL, partial) == pytest.approx(expected)
    # A virtual stage of 4 layers has no more.
    pipeline = ((PP, 2), (VPP, 2), FULL)
    assert peak(LLAMA_1B, *pipeline, partial) == peak(LLAMA_1B, *pipeline)


def test_a_lean_optimizer_by_hand() -> None:
    lean = ("optimizer.precision", "lean")
    found = peak(LLAMA_1B, lean)
    assert found.optimizer == 4 * whole_model(LLAMA_1B)
    assert (found.weights + found.gradients + found.optimizer) / whole_model(LLAMA_1B) <= 10
    assert storage(spec_of(lean), LLAMA_1B, 8, "bfloat16").checkpoint == 6 * whole_model(LLAMA_1B)


# ---- time and disk ----


def test_frozen_matrices_have_no_weight_gradient() -> None:
    tokens, squares = 4096, 4096.0**2
    full = training_flops(LLAMA_8B, tokens, squares)
    lora = training_flops(LLAMA_8B, tokens, squares, spec_of(RANK).model)
    assert full - lora == pytest.approx((2 * matmul_parameters(LLAMA_8B) - 6 * 41_943_040) * tokens)
    # The output layer and one of the layers' matrices; a lookup in a frozen embedding is no product.
    frozen = spec_of((FREEZE, ["lm_head", "embed_tokens", r"layers\.3\.mlp\.up_proj"])).model
    found = training_flops(LLAMA_8B, tokens, squares, frozen)
    assert full - found == pytest.approx(2 * (128256 * 4096 + 4096 * 14336) * tokens)
    # Of four experts a token has two, with adapters of their own.
    experts = training_flops(EXPERTS, 1, 0.0) - training_flops(EXPERTS, 1, 0.0, spec_of(RANK).model)
    adapters = 2 * 16 * ((8 + 16) + 2 * (8 + 8) + (16 + 8) + 2 * 3 * (8 + 6))
    assert experts == pytest.approx(2 * matmul_parameters(EXPERTS) - 6 * adapters)


def test_a_step_with_adapters_is_faster_and_with_nf4_a_little_slower() -> None:
    def seconds(*given: Given) -> float:
        spec = spec_of(*given)
        return step_seconds(spec, LLAMA_8B, workload(spec, rows_of(4096), 8, "cuda"), H100)[0]

    full, lora, quantized = seconds(), seconds(RANK), seconds(RANK, NF4)
    assert 0.66 < lora / full < 0.85
    # Of each of 16 micro-batches every matrix is read and written in forward and in backward.
    matrices = held(spec_of(RANK, NF4), LLAMA_8B, 0).quantized
    assert quantized - lora == pytest.approx(16 * 2 * matrices * 2.5625 / 3.4e12)
    again = seconds(RANK, NF4, FULL) - seconds(RANK, FULL)
    assert again == pytest.approx(1.5 * (quantized - lora))


def test_a_validation_is_more_of_a_step_with_adapters() -> None:
    # Forward is a third of six operations a parameter, and half of four; adapters and attention are in both.
    known = msgspec.structs.replace(facts(LLAMA_8B), val=rows_of(4096, rows=16))
    spec = spec_of(RANK, ("data.val_files", ["v"]), ("trainer.val_before_train", False))
    found = make_plan(spec, known, H100).pace
    assert found.validating / found.step == pytest.approx(0.48, abs=0.01)


@pytest.mark.parametrize(
    ("given", "checkpoint", "weights", "export"),
    [
        ([RANK], 14 * 41_943_040, 2 * 41_943_040, 2 * 41_943_040),
        ([RANK, NF4], 14 * 41_943_040, 2 * 41_943_040, 2 * 41_943_040),
        (
            [(FREEZE, ["lm_head"])],
            14 * (8_030_261_248 - 128256 * 4096),
            2 * (8_030_261_248 - 128256 * 4096),
            2 * 8_030_261_248,
        ),
    ],
)
def test_a_checkpoint_holds_what_is_trained(
    given: list[Given], checkpoint: int, weights: int, export: int
) -> None:
    spec = spec_of(("checkpoint.after_success", "weights"), *given)
    found = storage(spec, LLAMA_8B, 8, "bfloat16")
    assert (found.checkpoint, found.weights, found.export) == (checkpoint, weights, export)
    assert found.at_end == found.kept * weights


# ---- what to train in place of what does not fit ----


def test_adapters_are_suggested_for_what_does_not_fit() -> None:
    spec = spec_of(batch=4)
    found = alternatives(spec, facts(LLAMA_8B), H100, devices=1, memory=79 * GIB)
    assert list(found) == ["lean", "LoRA", "QLoRA"]
    for name in ("LoRA", "QLoRA"):
        choice = found[name]
        assert choice.plan.needed < 79 * GIB
        made, _ = change(spec, choice.changes.items())
        assert made.model == choice.spec.model
        assert made.training == spec.training
    assert found["QLoRA"].changes == {"model.lora.rank": 16, "model.quantize": "nf4"}
    assert found["lean"].changes["optimizer.precision"] == "lean"


def test_recomputation_is_suggested_with_adapters_where_they_want_it() -> None:
    spec = spec_of(("optimizer.precision", "lean"), (FREEZE, ["lm_head"]), batch=4)
    found = alternatives(spec, facts(LLAMA_8B), H100, devices=1, memory=24 * GIB)
    assert list(found) == ["LoRA", "QLoRA"]
    assert found["LoRA"].changes == {
        "model.lora.rank": 16,
        "model.freeze": [],
        "optimizer.precision": "full",
        "model.enable_gradient_checkpointing": True,
        "model.recompute_layers": 24,
    }
    # One layer less, and it does not fit.
    spec = found["LoRA"].spec
    less = msgspec.structs.replace(spec, model=msgspec.structs.replace(spec.model, recompute_layers=23))
    needed = make_plan(less, facts(LLAMA_8B), H100).needed
    assert found["LoRA"].plan.needed <= 24 * GIB < needed
    assert found["QLoRA"].changes["model.recompute"] == "selective"
    # Where nothing fits, the one that needs the least.
    least = alternatives(spec, facts(LLAMA_8B), H100, devices=1, memory=GIB)["QLoRA"]
    assert least.plan.needed == pytest.approx(11 * GIB, rel=0.05)


def test_lora_that_does_not_fit_is_suggested_in_four_bits() -> None:
    spec = spec_of(("model.lora.rank", 64), ("model.lora.targets", ["q"]), batch=4)
    found = alternatives(spec, facts(LLAMA_8B), H100, devices=1, memory=24 * GIB)
    assert list(found) == ["QLoRA"]
    assert found["QLoRA"].spec.model.lora == spec.model.lora
    assert alternatives(found["QLoRA"].spec, facts(LLAMA_8B), H100, devices=1, memory=GIB) == {}


def test_other_micro_batches_are_tried_where_their_own_are_too_large() -> None:
    spec = spec_of(RANK, ("training.micro_batch_size_per_gpu", 16))
    found = alternatives(spec, facts(LLAMA_8B), H100, devices=1, memory=20 * GIB)["QLoRA"]
    assert found.plan.needed < 20 * GIB
    assert found.changes["training.micro_batch_size_per_gpu"] < 16

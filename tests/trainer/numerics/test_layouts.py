"""Every layout computes the same: one torchrun for each, which trains the variants of packing and recomputation whose tests
are selected. `-k "[tp2-"` selects those of one layout.

Compared with `base`, one rank that trains padded micro-batches of one sample, which test_training.py compares with plain
transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from sftd.domain.log.events import ModelLoaded, SampleGenerated, StepCompleted
from sftd.domain.model.parameters import held
from sftd.wire.model.folder import read_shape
from tests.builders.paths import RANKS
from tests.builders.trainer.trainers import MEGATRON

if TYPE_CHECKING:
    import torch

    from tests.builders.trainer.trainers import Run, Trainer

SCRIPT = RANKS / "layouts_ranks.py"
TP2, PP2, CP2 = (
    {f"{MEGATRON}{kind}_parallel_size": 2} for kind in ("tensor_model", "pipeline_model", "context")
)
# Name → (ranks, what the spec says of the layout). With two ranks and nothing said, DP 2.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp1": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, TP2),
    "tp2_sp": (2, TP2 | {MEGATRON + "sequence_parallel": True}),
    "pp2": (2, PP2),
    "pp2_vpp2": (2, PP2 | {MEGATRON + "virtual_pipeline_model_parallel_size": 2}),
    "tp2_pp2": (4, TP2 | PP2),
    "cp2": (2, CP2),
    "cp2_tp2_sp": (4, CP2 | TP2 | {MEGATRON + "sequence_parallel": True}),
    "cp2_pp2": (4, CP2 | PP2),
    # Eight samples on three ranks: packed only.
    "dp3": (3, {}),
}
ROWS: dict[str, dict[str, Any]] = {
    "padded": {"training__micro_batch_size_per_gpu": 2},
    "packed": {"training__micro_batch_size_per_gpu": 2, "training__use_rmpad": True},
}
RECOMPUTE: dict[str, dict[str, Any]] = {"kept": {}, "full": {"model__enable_gradient_checkpointing": True}}
RECOMPUTE["selective"] = RECOMPUTE["full"] | {"model__recompute": "selective"}
VARIANTS = [f"{rows}-{recompute}" for rows, recompute in product(ROWS, RECOMPUTE)]
# Four ranks on two cores take their time: not every variant of context parallelism with something else.
ALL = [
    (layout, rows, recompute)
    for layout, rows, recompute in product(LAYOUTS, ROWS, RECOMPUTE)
    if (layout, rows) != ("dp3", "padded") and not (layout.startswith("cp2_") and recompute == "selective")
]
KEPT = [(layout, rows) for layout, rows, recompute in ALL if recompute == "kept"]
# Of the step's gradient: one rank and two, and micro-batches of that number of samples.
GRADIENTS = [f"{rows}-{size}" for rows, size in product(ROWS, (1, 2, 4))]
GRADIENT_LAYOUTS = ("dp1", "dp2")

Variants = dict[str, "Run"]


def plan(layout: str) -> dict[str, dict[str, Any]]:
    """Name → overrides of everything that the ranks of a layout can train."""
    variants = {}
    for name in VARIANTS:
        rows, recompute = name.split("-")
        if (layout, rows, recompute) not in ALL:
            continue
        variants[name] = ROWS[rows] | RECOMPUTE[recompute]
        if recompute == "kept":
            variants[name] |= {"trainer__sample_prompts": ["abc"], "trainer__sample_max_tokens": 8}
        else:
            variants[name] |= {"data__val_files": []}
    if layout in GRADIENT_LAYOUTS:
        for name in GRADIENTS:
            rows, size = name.split("-")
            variants[name] = ROWS[rows] | {
                "training__micro_batch_size_per_gpu": int(size),
                "trainer__max_steps": 1,
                # Clipping scales the gradient in place.
                "optimizer__clip_grad": 0.0,
                "scheduler__warmup_steps": 0,
                "data__val_files": [],
            }
    return variants


@pytest.fixture(scope="module")
def selected(request: pytest.FixtureRequest) -> dict[str, list[str]]:
    """Layout → the variants that the selected tests of this file look at, in the order of its plan."""
    seen: dict[str, set[str]] = {layout: set() for layout in LAYOUTS}
    for item in request.session.items:
        if item.path == request.path and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            for layout, variant in looked_at(item.callspec.params):
                seen[layout].add(variant)
    return {layout: [name for name in plan(layout) if name in names] for layout, names in seen.items()}


def looked_at(case: dict[str, str]) -> list[tuple[str, str]]:
    """(layout, variant) of each run that a test with these parameters compares."""
    layout = case["layout"]
    if "name" in case:
        return [("dp1", GRADIENTS[0]), (layout, case["name"])]
    rows = case.get("rows", "packed")
    return [(layout, f"{rows}-{recompute}") for recompute in {"kept", case.get("recompute", "kept")}]


@pytest.fixture(scope="module")
def runs_of(trainer: Trainer, selected: dict[str, list[str]]) -> Callable[[str], Variants]:
    """The runs of a layout by variant; each layout is trained once."""
    done: dict[str, Variants] = {}
    begun: set[str] = set()

    def find(layout: str) -> Variants:
        if layout not in done:
            assert layout not in begun, f"the ranks of {layout} have failed: see its first test"
            begun.add(layout)
            ranks, overrides = LAYOUTS[layout]
            variants = plan(layout)
            attempts = {
                name: trainer.prepare(
                    f"layouts-{layout}-{name}",
                    trainer.spec(ranks, trainer__save_interval=0, **overrides, **variants[name]),
                )
                for name in selected[layout]
            }
            done[layout] = trainer.together(attempts, SCRIPT)
        return done[layout]

    return find


@pytest.mark.parametrize(("layout", "rows", "recompute"), ALL)
def test_losses_and_gradient_norms_are_those_of_base(
    runs_of: Callable[[str], Variants], base: Run, layout: str, rows: str, recompute: str
) -> None:
    run = runs_of(layout)[f"{rows}-{recompute}"]
    assert run.steps().keys() == base.steps().keys()
    for step, expected in base.steps().items():
        found = run.steps()[step]
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert found.entropy == pytest.approx(expected.entropy, rel=1e-5)
        assert found.token_accuracy == pytest.approx(expected.token_accuracy, rel=1e-12)
        same = ("epoch", "lr", "tokens", "tokens_real", "tokens_total", "samples", "samples_digest")
        assert all(getattr(found, field) == getattr(expected, field) for field in same)
    assert run.events(ModelLoaded)[0].parameters == base.events(ModelLoaded)[0].parameters


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_knows_what_each_rank_holds(runs_of: Callable[[str], Variants], layout: str) -> None:
    run = next(iter(runs_of(layout).values()))
    spec = run.attempt.order().spec
    shape = read_shape(spec.model.partial_pretrain, {})
    found = [
        json.loads((run.attempt.path / f"held-{rank}.json").read_text()) for rank in range(spec.world_size)
    ]
    stages = range(spec.model.megatron.pipeline_model_parallel_size)
    for rank in found:
        planned = held(spec, shape, rank["stage"]).total
        assert (rank["weights"], rank["gradients"]) == (planned, planned)
    for stage in stages:
        # Two moments of FP32 weights; DP × CP ranks have a share each, together everything.
        copies = spec.model.megatron.tensor_model_parallel_size
        planned = 2 * copies * held(spec, shape, stage).total
        assert sum(rank["optimizer"] for rank in found if rank["stage"] == stage) == planned


@pytest.mark.parametrize(("layout", "rows"), KEPT)
def test_validations_and_answers_are_those_of_base(
    runs_of: Callable[[str], Variants], base: Run, layout: str, rows: str
) -> None:
    run = runs_of(layout)[f"{rows}-kept"]
    assert not list(run.attempt.rows_dir.iterdir()), "the decoded data was left behind"
    assert run.validations().keys() == base.validations().keys()
    for step, expected in base.validations().items():
        found = run.validations()[step]
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.entropy == pytest.approx(expected.entropy, rel=1e-5)
        assert (found.tokens, found.rows) == (expected.tokens, 11)
        assert found.token_accuracy == pytest.approx(expected.token_accuracy, rel=1e-12)
    answers = [(s.step, s.text, s.tokens, s.stopped) for s in run.events(SampleGenerated)]
    assert answers == [(s.step, s.text, s.tokens, s.stopped) for s in base.events(SampleGenerated)]


@pytest.mark.parametrize(("layout", "rows", "recompute"), [case for case in ALL if case[2] != "kept"])
def test_recomputing_changes_no_bit(
    runs_of: Callable[[str], Variants], layout: str, rows: str, recompute: str
) -> None:
    again, kept = (
        [(s.loss, s.grad_norm) for s in runs_of(layout)[f"{rows}-{name}"].events(StepCompleted)]
        for name in (recompute, "kept")
    )
    assert again == kept


@pytest.mark.parametrize("layout", GRADIENT_LAYOUTS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_micro_batches_and_data_parallelism_leave_the_gradient_alone(
    runs_of: Callable[[str], Variants], layout: str, name: str
) -> None:
    expected, found = load_gradient(runs_of("dp1")[GRADIENTS[0]]), load_gradient(runs_of(layout)[name])
    largest = float(expected.abs().max())
    assert largest > 0.01
    assert float((found - expected).abs().max()) < 1e-6 * largest


def load_gradient(run: Run) -> torch.Tensor:
    """What layouts_ranks.py left of a run of one step: FP32 [parameters]."""
    import torch

    return torch.load(run.attempt.path / "gradient.pt")

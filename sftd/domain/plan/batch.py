"""The workload of a step for given data: tokens of the largest micro-batch, and tokens computed per step."""

from __future__ import annotations

import functools
import math
from itertools import pairwise
from statistics import NormalDist

import msgspec

from sftd.domain.data.facts import LENGTH_QUANTILES, DataFacts
from sftd.domain.plan.sizes import length_multiple
from sftd.domain.spec.spec import Spec

_DRAWS = 400


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Counts in tokens, per whole micro-batch (over all CP ranks) or per whole step (over all ranks).

    `largest`, `largest_trained`: tokens of the largest micro-batch of the run, with padding, and those with logits.
    `micro_batches`: number per rank and step. Per step: `real` and `computed` tokens (without and with padding), `trained`
    tokens, `squares` (Σ n² over the segments of attention), and `rows`.
    """

    largest: int
    largest_trained: int
    micro_batches: int
    real: float
    computed: float
    squares: float
    trained: float
    rows: int


def workload(spec: Spec, facts: DataFacts, planned_steps: int, device: str) -> Workload:
    """The workload for the training data. Older logs lack the distribution of lengths; all rows are then taken as equal."""
    batch = spec.data.train_batch_size
    longest = min(facts.longest or spec.data.sequence_length, spec.data.sequence_length)
    rows = max(1, facts.usable)
    is_known = facts.seen_tokens > 0
    seen = facts.seen_tokens if is_known else min(facts.tokens, rows * longest) or rows * longest
    mean = seen / rows
    square = facts.seen_squares / rows if is_known else mean * mean
    share = min(1.0, facts.trained_tokens / seen)
    real = batch * mean
    lay = _packed if spec.training.use_rmpad else _padded
    largest, dense_tokens, count, computed, squares = lay(
        spec, facts, planned_steps, length_multiple(spec, device), mean, square, float(longest)
    )
    return Workload(
        largest=largest,
        largest_trained=min(largest, math.ceil(share * dense_tokens)),
        micro_batches=count,
        real=real,
        computed=computed,
        squares=squares,
        trained=share * real,
        rows=batch,
    )


def _round_up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def _packed(
    spec: Spec, facts: DataFacts, steps: int, multiple: int, mean: float, square: float, longest: float
) -> tuple[int, float, int, float, float]:
    batch, budget = spec.data.train_batch_size, float(spec.micro_batch_tokens)
    m = spec.model.megatron
    pp = m.pipeline_model_parallel_size
    unit = spec.data_parallel_size * (pp if (m.virtual_pipeline_model_parallel_size or 1) > 1 else 1)
    fullest, pieces, computed = _cut(
        batch, budget, unit, multiple, steps, mean, square, longest, is_pipeline=pp > 1
    )
    count = round(pieces / spec.data_parallel_size)
    return _round_up(fullest, multiple), fullest, max(1, count), computed, batch * square


@functools.lru_cache(maxsize=1024)
def _cut(
    batch: int,
    budget: float,
    unit: int,
    multiple: int,
    steps: int,
    mean: float,
    square: float,
    longest: float,
    *,
    is_pipeline: bool,
) -> tuple[float, float, float]:
    """(tokens of the largest micro-batch of a run, micro-batches per step, tokens per step with padding). Cached, because
    most of the thousands of layouts in a search cut a step in the same way."""
    varies = square > mean * mean * (1 + 1e-9)
    # A micro-batch holds whole samples, so half a sample of room is unused on average. The sample that
    # does not fit is more often a long one.
    lost = 0.5 * square / mean if varies else 0.0
    room = max(longest, budget - lost)
    spread = math.sqrt(max(0.0, square - mean * mean) * batch)
    bell = NormalDist()
    cuts = []
    # The tokens of a step are a sum of many lengths, so nearly normal: take evenly spaced quantiles.
    for i in range(_DRAWS if varies else 1):
        drawn = batch * mean + spread * bell.inv_cdf((i + 0.5) / _DRAWS) if varies else batch * mean
        tokens = min(max(drawn, 1.0), batch * longest)
        pieces = max(1, math.ceil(math.ceil(tokens / room - 1e-9) / unit)) * unit
        # The largest of the balanced micro-batches exceeds their mean by part of a sample.
        largest = min(budget, max(tokens / pieces + (lost / 2 if pieces > 1 else 0.0), 1.0))
        cuts.append((largest, pieces, tokens))
    cuts.sort()
    fullest = cuts[min(len(cuts) - 1, int(len(cuts) * steps / (steps + 1)))][0]
    computed = 0.0
    for largest, pieces, tokens in cuts:
        # In a pipeline all micro-batches of a step are padded to the longest.
        each = largest if is_pipeline else tokens / pieces
        # With a multiple of 1 there is no padding; the drawn number of tokens is fractional and must not be rounded up.
        computed += pieces * (each if multiple == 1 else _round_up(each, multiple)) / len(cuts)
    return fullest, sum(pieces for _, pieces, _ in cuts) / len(cuts), computed


def _padded(
    spec: Spec, facts: DataFacts, steps: int, multiple: int, mean: float, square: float, longest: float
) -> tuple[int, float, int, float, float]:
    size, batch = spec.training.micro_batch_size_per_gpu, spec.data.train_batch_size
    dp = spec.data_parallel_size
    # In a pipeline all micro-batches are padded to the longest row of the step.
    among = batch if spec.model.megatron.pipeline_model_parallel_size > 1 else size
    length = _round_up(_expected_longest(facts.lengths, among) or longest, multiple)
    count = max(1, batch // (size * dp))
    rows = count * dp * size
    largest = size * _round_up(longest, multiple)
    dense = longest + (size - 1) * mean
    return largest, dense, count, float(rows * length), float(rows) * length * length


def _expected_longest(lengths: tuple[int, ...], among: int) -> float | None:
    """Expected maximum length of `among` rows drawn at random; None if the lengths are unknown."""
    if len(lengths) != len(LENGTH_QUANTILES):
        return None
    total = 0.0
    for (low, high), (shorter, longer) in zip(pairwise(LENGTH_QUANTILES), pairwise(lengths), strict=True):
        total += (high**among - low**among) * 0.5 * (shorter + longer)
    return total

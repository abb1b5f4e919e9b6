"""Which rows a step reads, against recorded lists: a run that is resumed by a later version must read the same ones."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest

from sftd.trainer.data.sample_order import SampleOrder, samples_digest
from tests.builders.trainer.sample_orders import ORDERS


@pytest.mark.parametrize(("seed", "rows"), ORDERS)
def test_the_order_of_three_epochs_is_as_recorded(seed: int, rows: int) -> None:
    order = SampleOrder(rows, seed=seed, shuffle=True)
    expected = ORDERS[seed, rows]
    assert [order.rows(e * rows, rows).tolist() for e in range(3)] == expected
    # Back again, and with other epochs asked for in between: nothing depends on what was asked before.
    assert [order.rows(e * rows, rows).tolist() for e in (2, 0, 1)] == [expected[e] for e in (2, 0, 1)]


@pytest.mark.parametrize("size", [1, 3, 4, 10, 23, 30])
def test_a_step_reads_on_where_the_one_before_ended_across_the_ends_of_epochs(size: int) -> None:
    """23 of 10 rows: one step reads from three epochs."""
    stream = [row for epoch in ORDERS[1234, 10] for row in epoch]
    order = SampleOrder(10, seed=1234, shuffle=True)
    for start in range(len(stream) - size + 1):
        assert order.rows(start, size).tolist() == stream[start : start + size]
    assert [order.epoch(p) for p in range(30)] == [0] * 10 + [1] * 10 + [2] * 10


def test_without_shuffling_every_epoch_is_the_order_of_the_files() -> None:
    order = SampleOrder(4, seed=1234, shuffle=False)
    assert order.rows(0, 12).tolist() == [0, 1, 2, 3] * 3
    assert order.rows(6, 4).tolist() == [2, 3, 0, 1]
    assert [order.epoch(p) for p in (3, 4, 8)] == [0, 1, 2]


def test_the_digest_of_the_samples_is_sha256_over_their_numbers_in_order() -> None:
    numbers = [5, 0, 2**40]
    expected = hashlib.sha256(b"".join(struct.pack("<q", n) for n in numbers)).hexdigest()
    assert samples_digest(np.array(numbers)) == expected
    assert samples_digest(np.array(numbers[::-1])) != expected

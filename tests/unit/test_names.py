"""Run ids."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from sftd.domain import names


@given(st.binary(min_size=4, max_size=8))
def test_every_id_is_readable_and_fits_its_column(random: bytes) -> None:
    made = names.run_id(random)
    assert re.fullmatch(r"[a-z]+-[a-z]+-[0-9a-f]{4}", made)
    assert len(made) <= 20


def test_each_byte_counts() -> None:
    made = {names.run_id(bytes([a, b, 0, 0])) for a in range(256) for b in range(256)}
    assert len(made) == 256 * 256
    assert len({names.run_id(bytes([0, 0, c, d])) for c in range(256) for d in (0, 255)}) == 512


def test_the_same_bytes_give_the_same_id() -> None:
    assert names.run_id(b"\x00\x00\x3f\x2a") == "amber-badger-3f2a"

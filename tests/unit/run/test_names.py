"""Run ids."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftd.domain.run import ids


@given(st.binary(min_size=4, max_size=8))
def test_every_id_is_readable_and_fits_its_column(random: bytes) -> None:
    made = ids.run_id(random)
    assert re.fullmatch(r"[a-z]+-[a-z]+-[0-9a-f]{4}", made)
    assert len(made) <= 20


def test_each_byte_counts() -> None:
    made = {ids.run_id(bytes([a, b, 0, 0])) for a in range(256) for b in range(256)}
    assert len(made) == 256 * 256
    assert len({ids.run_id(bytes([0, 0, c, d])) for c in range(256) for d in (0, 255)}) == 512


def test_the_same_bytes_give_the_same_id() -> None:
    assert ids.run_id(b"\x00\x00\x3f\x2a") == "amber-badger-3f2a"


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("Llama 3.1_8B @x+y-z", "Llama 3.1_8B @x+y-z"),
        ("größe", "größe"),
        ("a/b:c", "a%2Fb%3Ac"),
        ("100%", "100%25"),
        (".hidden", "%2Ehidden"),
        ("-x", "%2Dx"),
        ("..", "%2E."),
        ("x" * 200, "x" * 200),
        ("ö" * 100, "ö" * 100),
    ],
)
def test_a_name_is_a_folder_that_is_neither_hidden_nor_an_option(name: str, folder: str) -> None:
    assert ids.folder_name(name) == folder


def test_a_long_name_is_cut_and_stays_different() -> None:
    one, other = ids.folder_name("x" * 201), ids.folder_name("x" * 202)
    assert one != other
    assert len(one) == 180 + 1 + 16
    assert one.startswith("x" * 180 + "-")
    assert len(ids.folder_name("ö" * 101).encode()) <= 200


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("brave-otter-3f2a", True),
        ("a", True),
        ("a" * 64, True),
        ("a" * 65, False),
        ("", False),
        ("-a", False),
        ("_a", False),
        ("a/b", False),
        ("..", False),
        ("a\n", False),
        ("ä", False),
    ],
)
def test_what_may_be_the_id_of_a_run(text: str, expected: bool) -> None:
    assert ids.is_run_id(text) is expected

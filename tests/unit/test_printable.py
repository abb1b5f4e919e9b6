"""Text of strangers as a terminal gets it."""

from __future__ import annotations

import pytest

from sftd.domain.printable import harmless


@pytest.mark.parametrize("numbers", ["", "0", "1", "31", "1;31", "38;5;244", "48:2::18:80:28", "88", "0;38"])
def test_colours_and_weights_are_left(numbers: str) -> None:
    assert harmless(f"\x1b[{numbers}mtext") == f"\x1b[{numbers}mtext"


@pytest.mark.parametrize(
    "obeyed", ["[8m", "[08m", "[1;8m", "[8;1m", "[0;008;1m", "[2J", "]0;title\x07", "c", "[1;1H"]
)
def test_what_hides_text_or_moves_it_is_not(obeyed: str) -> None:
    assert "\x1b" not in harmless(f"\x1b{obeyed}text")

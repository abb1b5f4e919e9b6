"""Text of strangers as a terminal gets it."""

from __future__ import annotations

import json

import pytest

from sftd.domain.text.printable import escaped, harmless, printable


@pytest.mark.parametrize("numbers", ["", "0", "1", "31", "1;31", "38;5;244", "48:2::18:80:28", "88", "0;38"])
def test_colours_and_weights_are_left(numbers: str) -> None:
    assert harmless(f"\x1b[{numbers}mtext") == f"\x1b[{numbers}mtext"


@pytest.mark.parametrize(
    "obeyed", ["[8m", "[08m", "[1;8m", "[8;1m", "[0;008;1m", "[2J", "]0;title\x07", "c", "[1;1H"]
)
def test_what_hides_text_or_moves_it_is_not(obeyed: str) -> None:
    assert "\x1b" not in harmless(f"\x1b{obeyed}text")


@pytest.mark.parametrize(
    "code", [0x1B, 0x7F, 0x85, 0x2028, 0x202E, 0x2066, 0xFFF9, 0xE0001, 0xE007F, 0xD800, 0xDFFF]
)
def test_what_a_terminal_obeys_is_escaped_in_json_and_a_space_elsewhere(code: int) -> None:
    said = f"ü{chr(code)}x"
    text = json.dumps(said, ensure_ascii=False)
    assert json.loads(escaped(text)) == said
    assert chr(code) not in escaped(text)
    assert harmless(f"ü\n\t{chr(code)}x") == "ü\n\t x"
    assert printable(f"ü\n{chr(code)}x") == "ü  x"


def test_what_only_shows_is_left_as_it_is() -> None:
    assert escaped('"größe 😀"') == '"größe 😀"'
    assert json.loads(escaped('"a\x7fb"')) == "a\x7fb"
    assert "\x7f" not in escaped('"a\x7fb"')
    assert harmless("größe\n😀\tx") == "größe\n😀\tx"
    assert printable("größe 😀") == "größe 😀"

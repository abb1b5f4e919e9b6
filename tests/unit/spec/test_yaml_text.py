"""YAML is read in bounded time and memory, whatever the text says."""

from __future__ import annotations

import tracemalloc

import pytest

from sftd.domain.errors import Refused
from sftd.wire.spec.yaml_text import load_value, load_yaml

LEVELS = 9


def aliases(width: int, levels: int, item: str) -> str:
    """Lists of lists of aliases: `width ** levels` values when they are expanded."""
    lines = ["a0: &a0 " + item]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


def merges(width: int, levels: int) -> str:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * width)}]}}" for n in range(1, levels)]
    return "\n".join(lines)


def chain(length: int) -> str:
    return "\n".join(["a0: &a0 [1]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, length))])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (aliases(9, LEVELS, "[x, x]"), "its aliases expand to"),
        (merges(8, LEVELS), "its aliases expand to"),
        (chain(5000), "its aliases nest deeper than"),
        ("a: &a [*a]", "the alias 'a' contains itself"),
        ("a: &a {b: {c: *a}}", "the alias 'a' contains itself"),
        ("[" * 5000 + "]" * 5000, "is nested deeper than"),
        ("a: " + "9" * 5000, "is not a whole number of at most 64 bits"),
        ("a: 0x" + "f" * 5000, "is not a whole number of at most 64 bits"),
        ("a: 0b" + "1" * 65, "is not a whole number of at most 64 bits"),
        ("a: !!int x", "'x' is not a whole number"),
        ("a: !!int ''", "'' is not a whole number"),
        ("a: !!bool maybe", "'maybe' is not true or false"),
        ("a: !!float x", "'x' is not a float"),
        ("a: !!timestamp x", "'x' is not a timestamp"),
        ("a: {? b, b: 1}", "the key 'b' is given twice"),
    ],
    ids=range(15),
)
def test_what_would_grow_beyond_its_text_is_refused(text: str, says: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(Refused) as refused:
            load_yaml(text, "run.yaml")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert says in str(refused.value)
    assert len(str(refused.value)) < 600
    assert peak < 100_000_000


def test_aliases_that_stay_small_are_expanded() -> None:
    tree = load_yaml(aliases(3, 4, "[x]"), "text")
    assert tree["a3"] == [[[["x"]] * 3] * 3] * 3


@pytest.mark.parametrize("text", ["0x____", "0b__", "-0x_"])
def test_a_number_without_a_digit_is_a_text(text: str) -> None:
    assert load_yaml(text, "text") == text


@pytest.mark.parametrize(
    ("text", "value"), [("0x_ff", 255), ("0b_11", 3), ("2**3", "2**3"), (str(2**63), 2**63)]
)
def test_numbers_with_digits_are_numbers(text: str, value: object) -> None:
    assert load_yaml(text, "text") == value


def test_a_pattern_without_quotes_is_explained_in_a_file_and_taken_on_the_command_line() -> None:
    for text in ("train_files: *.parquet", "train_files: *train"):
        with pytest.raises(Refused, match="quote a value that begins with") as refused:
            load_yaml(text, "run.yaml")
        assert refused.value.problems[0].where == "run.yaml, line 1"
    assert load_value(" *.parquet ", "key") == "*.parquet"
    assert load_value("[1, 2]", "key") == [1, 2]

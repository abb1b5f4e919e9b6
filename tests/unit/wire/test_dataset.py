"""What submit finds in data files, and every reason to refuse one."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftd.domain.data.facts import LENGTH_QUANTILES, DataFacts
from sftd.domain.errors import Refused
from sftd.wire.data import dataset
from sftd.wire.data.rows import DataFile, read_row

VOCABULARY = 50
GOOD: dict[str, list[list[int]]] = {
    "input_ids": [[1, 2, 3, 4], [5, 6]],
    "attention_mask": [[1, 1, 1, 1], [1, 1]],
    "labels": [[-100, -100, 3, 4], [-100, 6]],
}


def parquet(path: Path, columns: dict[str, Any] | None = None, **options: Any) -> str:
    pq.write_table(pa.table(GOOD if columns is None else columns), path, **options)
    return str(path)


def inspect(*paths: str, sequence_length: int = 8, truncation: str = "right") -> DataFacts:
    return dataset.inspect(
        "data.train_files",
        list(paths),
        vocab_size=VOCABULARY,
        sequence_length=sequence_length,
        truncation=truncation,
    )


def refusal(*paths: str) -> str:
    with pytest.raises(Refused) as refused:
        inspect(*paths)
    assert all(p.where == "data.train_files" and p.fix for p in refused.value.problems)
    return "\n".join(p.what for p in refused.value.problems)


def test_the_facts_of_a_good_file(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet")
    facts = inspect(path)
    assert (facts.rows, facts.tokens, facts.trained_tokens, facts.longest) == (2, 6, 3, 4)
    assert (facts.truncated, facts.unusable, facts.usable) == (0, 0, 2)
    assert facts.files == [path]


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    names = [*GOOD, "labels"]
    twice = pa.Table.from_arrays([pa.array(GOOD[name]) for name in names], names=names)
    pq.write_table(twice, tmp_path / "a.parquet")
    assert refusal(str(tmp_path / "a.parquet")).endswith("has the column 'labels' 2 times")


def test_the_facts_do_not_depend_on_how_rows_are_grouped_or_typed(tmp_path: Path) -> None:
    grouped = inspect(parquet(tmp_path / "a.parquet", row_group_size=1))
    whole = inspect(parquet(tmp_path / "b.parquet"))
    large = {k: pa.array(v, pa.large_list(pa.int16())) for k, v in GOOD.items()}
    typed = inspect(parquet(tmp_path / "c.parquet", large))
    for other in (grouped, typed):
        assert (other.rows, other.tokens, other.trained_tokens) == (
            whole.rows,
            whole.tokens,
            whole.trained_tokens,
        )


def test_the_digest_is_of_the_contents_in_order(tmp_path: Path) -> None:
    a = parquet(tmp_path / "a.parquet")
    b = parquet(tmp_path / "b.parquet", {k: v[:1] for k, v in GOOD.items()})
    data = [Path(p).read_bytes() for p in (a, b)]
    expected = hashlib.sha256(b"".join(len(d).to_bytes(8, "little") + d for d in data)).hexdigest()
    assert inspect(a, b).digest == expected
    assert inspect(b, a).digest != expected
    assert inspect(a, b).rows == 3


@pytest.mark.parametrize(
    ("truncation", "length", "trained", "truncated", "unusable"),
    [
        # Row 0 trains its third and fourth token, row 1 its second.
        ("right", 4, 3, 0, 0),
        ("right", 3, 2, 1, 0),
        ("right", 2, 1, 1, 1),
        ("right", 1, 0, 2, 2),
        # The first token that is left is not predicted.
        ("left", 3, 3, 1, 0),
        ("left", 2, 2, 1, 0),
        ("left", 1, 0, 2, 2),
    ],
)
def test_what_truncation_leaves(
    tmp_path: Path, truncation: str, length: int, trained: int, truncated: int, unusable: int
) -> None:
    facts = inspect(parquet(tmp_path / "a.parquet"), sequence_length=length, truncation=truncation)
    assert (facts.trained_tokens, facts.truncated, facts.unusable) == (trained, truncated, unusable)


@pytest.mark.parametrize("truncation", ["left", "right", "error"])
def test_padding_is_no_part_of_a_row(tmp_path: Path, truncation: str) -> None:
    """Files padded to one length are common: 3 real tokens of 9 are not truncated at 4."""
    columns = {
        "input_ids": [[1, 2, 3, 0, 0, 0, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 0, 0, 0, 0, 0, 0]],
        "labels": [[-100, 2, 3, -100, -100, -100, -100, -100, -100]],
    }
    facts = inspect(parquet(tmp_path / "a.parquet", columns), sequence_length=4, truncation=truncation)
    assert (facts.longest, facts.truncated, facts.unusable, facts.trained_tokens) == (3, 0, 0, 2)


def test_rows_that_train_nothing_are_counted(tmp_path: Path) -> None:
    columns = {
        "input_ids": [[1, 2], [3, 4], [], [5, 6]],
        "attention_mask": [[1, 1], [1, 1], [], [1, 0]],
        # Nothing at all; only the first token, which is never predicted; no token; only padding.
        "labels": [[-100, -100], [3, -100], [], [-100, 6]],
    }
    typed = {k: pa.array(v, pa.list_(pa.int64())) for k, v in columns.items()}
    facts = inspect(parquet(tmp_path / "a.parquet", typed))
    assert (facts.rows, facts.unusable, facts.trained_tokens, facts.tokens) == (4, 4, 0, 5)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(str(tmp_path / "none.parquet"))
    assert "no such file" in refusal(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"PAR1", b'{"messages": []}\n' * 9, b"\x00" * 4096])
def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    assert "is not a Parquet file" in refusal(str(path))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    many = {k: v * 5000 for k, v in GOOD.items()}
    parquet(path, many, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[40:400] = b"\xff" * 360
    path.write_bytes(content)
    assert "is damaged" in refusal(str(path))


@pytest.mark.parametrize("column", ["input_ids", "labels"])
def test_a_column_that_is_missing_is_refused(tmp_path: Path, column: str) -> None:
    without = {k: v for k, v in GOOD.items() if k != column}
    assert f"has no column '{column}'" in refusal(parquet(tmp_path / "a.parquet", without))


@pytest.mark.parametrize("column", list(GOOD))
def test_a_wrong_schema_is_refused(tmp_path: Path, column: str) -> None:
    for bad in (["x", "y"], [[1.5], [2.5]], [["x"], ["y"]], [1, 2], [[[1]], [[2]]]):
        text = refusal(parquet(tmp_path / "b.parquet", GOOD | {column: bad}))
        assert f"column '{column}' is " in text
        assert "not a list of integers" in text


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    none = {k: pa.array([], pa.list_(pa.int64())) for k in GOOD}
    assert "has no rows" in refusal(parquet(tmp_path / "a.parquet", none))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": [[-100, -100, 3, 4], None]}, "column 'labels' holds nulls"),
        ({"input_ids": [[1, None, 3, 4], [5, 6]]}, "column 'input_ids' holds nulls"),
        ({"labels": [[-100, -100, 3], [-100, 6]]}, "row 0 has 4 input_ids but 3 labels"),
        (
            {"attention_mask": [[1, 1, 1, 1], [1]]},
            "row 1 has 2 input_ids but 1 attention_mask",
        ),
        ({"input_ids": [[1, 2, 3, 50], [5, 6]]}, "token id 50 is outside the model's vocabulary of 50"),
        ({"input_ids": [[1, 2, 3, -1], [5, 6]]}, "token id -1 is outside"),
        ({"labels": [[-100, -100, 3, 50], [-100, 6]]}, "a label is neither -100 nor within"),
        ({"labels": [[-100, -1, 3, 4], [-100, 6]]}, "a label is neither -100 nor within"),
        ({"attention_mask": [[1, 1, 1, 2], [1, 1]]}, "values other than 0 and 1"),
        ({"attention_mask": [[0, 1, 1, 1], [1, 1]]}, "0 before a 1"),
        ({"attention_mask": [[1, 0, 1, 1], [1, 1]]}, "0 before a 1"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    assert says in refusal(parquet(tmp_path / "a.parquet", GOOD | change))


def facts_of(path: str) -> tuple[int, ...]:
    found = inspect(path)
    return (found.rows, found.tokens, found.trained_tokens, found.longest, found.unusable)


def test_lists_of_a_fixed_size_and_masks_of_other_kinds_are_read(tmp_path: Path) -> None:
    columns = {
        "input_ids": [[1, 2, 3, 0], [4, 5, 6, 7]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
        "labels": [[-100, 2, 3, -100], [-100, -100, 6, 7]],
    }
    expected = facts_of(parquet(tmp_path / "a.parquet", columns))
    assert expected == (2, 7, 4, 4, 0)
    fixed = {k: pa.array(v, pa.list_(pa.int32(), 4)) for k, v in columns.items()}
    assert facts_of(parquet(tmp_path / "b.parquet", fixed)) == expected
    masked = [[bool(m) for m in row] for row in columns["attention_mask"]]
    assert facts_of(parquet(tmp_path / "c.parquet", columns | {"attention_mask": masked})) == expected
    whole = {k: [v[1]] for k, v in columns.items() if k != "attention_mask"}
    assert facts_of(parquet(tmp_path / "d.parquet", whole)) == (1, 4, 2, 4, 0)


def test_labels_that_are_shifted_are_refused(tmp_path: Path) -> None:
    ids = [list(range(1, 40)), list(range(5, 30))]
    shifted = {"input_ids": ids, "labels": [[*row[1:], -100] for row in ids]}
    text = refusal(parquet(tmp_path / "a.parquet", shifted))
    assert "62 of 62 trained labels equal the next token: the labels are shifted by one" in text
    foreign = {"input_ids": ids, "labels": [[49] * len(row) for row in ids]}
    assert "differ from their own token" in refusal(parquet(tmp_path / "b.parquet", foreign))


def test_a_few_labels_of_another_token_are_reported(tmp_path: Path) -> None:
    ids = [[n % VOCABULARY for n in range(200)]]
    labels = [[7, *ids[0][1:]]]
    facts = inspect(parquet(tmp_path / "a.parquet", {"input_ids": ids, "labels": labels}))
    assert [remark.rpartition(": ")[2] for remark in facts.remarks] == [
        "1 trained labels differ from their own token"
    ]


@pytest.mark.parametrize(
    ("column", "same", "other"),
    [
        ("position_ids", [[0, 1, 2, 3], [0, 1]], [[0, 1, 0, 1], [0, 1]]),
        ("seq_idx", [[0, 0, 0, 0], [3, 3]], [[0, 0, 0, 0], [0, 1]]),
        ("token_type_ids", [[0, 0, 0, 0], [0, 0]], [[0, 0, 1, 1], [0, 0]]),
        ("seq_lengths", [[4], [2]], [[4], [1, 1]]),
        ("seq_lengths", [4, 2], [[2, 2], [2]]),
        ("cu_seqlens", [[0, 4], [0, 2]], [[0, 2, 4], [0, 2]]),
        ("loss_mask", [[0, 0, 1, 1], [0, 1]], [[0, 0, 1, 0], [0, 1]]),
        ("loss_mask", [[0, 1, 1, 0], [1, 0]], [[0, 0, 0, 0], [0, 0]]),
        ("assistant_masks", [[False, False, True, True], [True, True]], [[False] * 4, [True, True]]),
        ("weight", [1.0, 1.0], [1.0, -0.5]),
        ("loss_weights", [[0.0, 0.0, 1.0, 1.0], [0.0, 1.0]], [[0.0, 0.0, 1.0, 0.2], [0.0, math.nan]]),
    ],
)
def test_columns_that_change_what_a_row_means(
    tmp_path: Path, column: str, same: list[Any], other: list[Any]
) -> None:
    facts = inspect(parquet(tmp_path / "a.parquet", GOOD | {column: same}))
    assert (facts.trained_tokens, facts.remarks) == (3, ())
    text = refusal(parquet(tmp_path / "b.parquet", GOOD | {column: other}))
    assert column in text
    assert "row " in text


@pytest.mark.parametrize(
    ("columns", "trained", "weights"),
    [
        ({"weight": [1.0, 1.0]}, 3, None),
        ({"weight": [0.0, 1.0]}, 1, None),
        ({"weight": [0.5, 1.0]}, 3, [0.5, 0.5, 0.5, 0.5, 1, 1]),
        ({"weight": [2, 3], "loss_weights": [[9, 9, 0, 0.5], [1, 1]]}, 2, [18, 18, 0, 1, 3, 3]),
        # A mask of another tool at the predicting tokens, and one that fits neither place.
        ({"loss_weights": [[0, 1, 1, 0], [1, 0]]}, 3, None),
        ({"loss_weights": [[0, 1, 1, 0], [0, 1]]}, 2, None),
        # No mask: a weight for each label.
        ({"loss_weights": [[0, 1, 1, 0.5], [1, 1]]}, 3, [0, 1, 1, 0.5, 1, 1]),
    ],
)
def test_weights_of_rows_and_tokens(
    tmp_path: Path, columns: dict[str, Any], trained: int, weights: list[float] | None
) -> None:
    path = parquet(tmp_path / "a.parquet", GOOD | columns)
    assert inspect(path).trained_tokens == trained
    # As submit and as a run reads them.
    for judges in (True, False):
        with DataFile(path, judges=judges) as file:
            (rows,) = file.slices(VOCABULARY)
        assert (None if rows.weights is None else rows.weights.tolist()) == weights
        begins, ends = rows.kept(8, "right")
        found = [0.0, 0.0]
        for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            places = [i for i in range(begin + 1, end) if rows.labels[i] != -100]
            found[row] = sum(1 if weights is None else weights[i] for i in places)
        assert rows.sum_of_weights(begins, ends).tolist() == found


def test_padding_needs_no_weight(tmp_path: Path) -> None:
    """Some tools leave labels on padding, and weigh it with 0."""
    padded = {"input_ids": [[1, 2, 3, 0, 0]], "labels": [[-100, 2, 3, 0, 0]]}
    padded |= {"attention_mask": [[1, 1, 1, 0, 0]], "loss_mask": [[0, 1, 1, 0, 0]]}
    assert inspect(parquet(tmp_path / "a.parquet", padded)).trained_tokens == 2


def test_columns_that_are_not_used_are_named(tmp_path: Path) -> None:
    a = parquet(tmp_path / "a.parquet", GOOD | {"id": [1, 2], "length": [4, 2], "source": ["x", "y"]})
    b = parquet(tmp_path / "b.parquet", GOOD | {"id": [1, 2]})
    assert inspect(a).remarks == (f"{a}: sftd does not use the columns id, source",)
    assert inspect(b, a).remarks == (f"{b} and 1 more of 2 files: sftd does not use the columns id, source",)


def test_the_files_without_a_trained_label_are_named(tmp_path: Path) -> None:
    good = parquet(tmp_path / "a.parquet")
    none = parquet(tmp_path / "b.parquet", GOOD | {"labels": [[-100] * 4, [-100] * 2]})
    assert inspect(good, none).remarks == (f"{none}: none of its rows has a trained label within 8 tokens",)


def test_memory_is_bounded_whatever_a_file_says_of_its_size(tmp_path: Path) -> None:
    """A few KB of Parquet can hold any number of equal tokens, in one row group and in rows of any length."""
    rows, length = 3000, 1500
    starts = pa.array(range(0, (rows + 1) * length, length), pa.int32())
    values = pa.ListArray.from_arrays(starts, pa.array([7] * (rows * length), pa.int32()))
    long = parquet(tmp_path / "a.parquet", {"input_ids": values, "labels": values}, compression="zstd")
    assert Path(long).stat().st_size < 30_000
    with DataFile(long) as file:
        sizes = [part.ids.size for part in file.slices(VOCABULARY)]
    assert sum(sizes) == rows * length
    assert max(sizes) <= 1 << 20
    # One row of many times the average length, in the midst of short ones.
    skewed = [[7]] * 5000 + [[7] * 1_500_000] + [[7]] * 5000
    uneven = parquet(tmp_path / "b.parquet", {"input_ids": skewed, "labels": skewed}, compression="zstd")
    with DataFile(uneven) as file:
        parts = [(part.first, part.lengths.size) for part in file.slices(VOCABULARY)]
    assert sum(count for _, count in parts) == 10_001
    assert (5000, 1) in parts


def test_one_row_is_read_from_any_row_group(tmp_path: Path) -> None:
    ids = [[n, n + 1, n + 2] for n in range(40)]
    columns = {"input_ids": ids, "attention_mask": [[1, 1, 0]] * 40, "labels": ids}
    path = parquet(tmp_path / "a.parquet", columns, row_group_size=7)
    for number in (0, 6, 7, 39):
        row = read_row(path, number)
        assert (row.first, row.ids.tolist(), row.lengths.tolist()) == (number, [number, number + 1], [2])
    with pytest.raises(IndexError):
        read_row(path, 40)


def test_every_file_is_told_of_at_once(tmp_path: Path) -> None:
    good = parquet(tmp_path / "a.parquet")
    bad = parquet(tmp_path / "b.parquet", GOOD | {"input_ids": [[1, 2, 3, 99], [5, 6]]})
    text = refusal(good, bad, str(tmp_path / "none.parquet"))
    assert "token id 99" in text
    assert "no such file" in text
    assert "a.parquet" not in text


def test_labels_are_judged_over_all_rows_of_a_file(tmp_path: Path) -> None:
    """A few labels of other tokens are left; they are counted over all row groups, not in each one."""
    rows = 400
    ids = [[1, 2, 3, 4]] * rows
    labels = [[1, 2, 3, 4]] * rows
    columns = {"input_ids": ids, "attention_mask": [[1] * 4] * rows, "labels": [*labels[:-1], [1, 2, 3, 9]]}
    path = parquet(tmp_path / "a", columns, row_group_size=100)
    with DataFile(path) as file:
        assert sum(part.lengths.size for part in file.slices(VOCABULARY)) == rows
        assert (file.trained, file.stray) == (4 * rows, 1)
    columns["labels"] = [[5, 6, 7, 8]] * rows
    assert "1,600 of 1,600 trained labels" in refusal(parquet(tmp_path / "b", columns, row_group_size=100))
    columns["labels"] = [[2, 3, 4, -100]] * rows
    said = refusal(parquet(tmp_path / "c", columns, row_group_size=100))
    assert "1,200 of 1,200 trained labels" in said
    assert "shifted by one" in said


@pytest.mark.parametrize(
    ("name", "values", "row"),
    [
        ("loss_mask", [[0, 1, 1, 1], [1, 1], [1, 0.5, 0.5]], 2),
        ("loss_mask", [1, 0, 1], 1),
        ("weight", [1, 1, 1e40], 2),
        ("position_ids", [[0, 1, 2, 3], [0, 1], [0, 1, 0]], 2),
        ("segment_ids", [[3, 3, 3, 3], [1, 2], [4, 4, 4]], 1),
    ],
)
def test_the_row_in_which_another_tool_asks_for_something_else_is_named(
    tmp_path: Path, name: str, values: Any, row: int
) -> None:
    columns = {
        "input_ids": [[1, 2, 3, 4], [5, 6], [7, 8, 9]],
        "attention_mask": [[1, 1, 1, 1], [1, 1], [1, 1, 1]],
        "labels": [[-100, -100, 3, 4], [-100, 6], [-100, 8, 9]],
        name: values,
    }
    assert f"row {row}: " in refusal(parquet(tmp_path / "a", columns))


def test_how_lengths_vary_is_recorded(tmp_path: Path) -> None:
    lengths = list(range(2, 103))
    ids = [[1] * n for n in lengths]
    columns = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    facts = inspect(parquet(tmp_path / "a", columns, row_group_size=10), sequence_length=1000)
    # Of 2 to 102 tokens each once: a quantile is its share of a hundred, and two.
    assert facts.lengths == pytest.approx([2 + 100 * q for q in LENGTH_QUANTILES], abs=1)
    assert (facts.lengths[0], facts.lengths[-1]) == (2, 102)
    assert facts.seen_squares == sum(n * n for n in lengths)
    cut = inspect(parquet(tmp_path / "a", columns), sequence_length=50)
    assert (cut.lengths[-1], cut.longest, cut.truncated) == (50, 102, 52)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("loss_mask", pa.list_(pa.string()), "-100"),
        ("position_ids", pa.list_(pa.string()), "use_rmpad"),
        ("loss_mask", pa.list_(pa.int64()), "-100"),
        ("position_ids", pa.list_(pa.int64()), "use_rmpad"),
    ],
)
def test_a_column_of_another_tool_is_refused_with_what_to_do_instead(
    tmp_path: Path, name: str, kind: pa.DataType, words: str
) -> None:
    values = pa.array([["7"] * 4, ["7"] * 2], pa.list_(pa.string())).cast(kind)
    with pytest.raises(Refused) as refused:
        inspect(parquet(tmp_path / "a", GOOD | {name: values}))
    assert words in refused.value.problems[0].fix


def test_the_columns_that_are_there_are_named(tmp_path: Path) -> None:
    columns = {"input_ids": GOOD["input_ids"], "text": ["a", "b"]}
    assert "has no column 'labels'; it has input_ids, text" in refusal(parquet(tmp_path / "a", columns))

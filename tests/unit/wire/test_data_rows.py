"""What a row is to training, against rows written by hand. That its readers agree is in `tests/trainer/test_data_reference.py`."""

from __future__ import annotations

import numpy as np
import pytest

from sftd.domain.data import rows as data_rows

# ids, labels, truncation at 3 tokens, the ids that training sees, which of them are trained.
BY_HAND = [
    ([5, 6, 7], [-100, 6, 7], "right", [5, 6, 7], [False, True, True]),
    ([5, 6, 7, 8], [-100, 6, -100, 8], "right", [5, 6, 7], [False, True, False]),
    ([5, 6, 7, 8], [-100, 6, -100, 8], "left", [6, 7, 8], [False, False, True]),
    ([5, 6, 7], [5, -100, -100], "right", [5, 6, 7], [False, False, False]),
    ([5], [5], "left", [5], [False]),
    ([], [], "right", [], []),
]


@pytest.mark.parametrize(("ids", "labels", "truncation", "seen", "trained"), BY_HAND)
def test_a_row_is_cut_and_its_first_token_is_not_predicted(
    ids: list[int], labels: list[int], truncation: str, seen: list[int], trained: list[bool]
) -> None:
    begin, end = data_rows.kept(0, len(ids), 3, truncation)
    assert ids[begin:end] == seen
    assert data_rows.is_trained(labels[begin:end]) == trained
    begin, end = data_rows.predicted(begin, end)
    assert [label != -100 for label in labels[begin:end]] == trained[1:]


def test_many_rows_at_once_are_cut_as_each_is() -> None:
    ends = np.cumsum([len(row[0]) for row in BY_HAND])
    begins = ends - [len(row[0]) for row in BY_HAND]
    for truncation in ("right", "left"):
        found = np.array(data_rows.kept(begins, ends, 3, truncation))
        alone = [data_rows.kept(int(a), int(b), 3, truncation) for a, b in zip(begins, ends, strict=True)]
        assert found.T.tolist() == [list(pair) for pair in alone]
        again = np.array(data_rows.predicted(*found))
        assert again.T.tolist() == [list(data_rows.predicted(*pair)) for pair in alone]

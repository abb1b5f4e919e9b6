"""What a data row is, in each of the places that read one, against a plain reading of it.

Submit counts rows, the trainer decodes them, the X-ray shows the first ones, `sftd data` reads one again, and `prepare` writes
them. The rule is in `domain/data/rows.py`; the reference is a loop over lists.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftd.domain.data.facts import DataFacts
from sftd.domain.errors import Refused
from sftd.domain.spec.data_section import Data
from sftd.trainer.chat.mask import MaskedChat
from sftd.trainer.data.rows import Rows, write_spool
from sftd.trainer.errors import DataError
from sftd.trainer.tools import seen_rows
from sftd.trainer.tools.prepare import tokenize_pieces
from sftd.trainer.tools.prepare.tokenize_pieces import TokenizeOptions
from sftd.wire.data import dataset
from sftd.wire.data.rows import read_row

VOCABULARY, STOP = 40, 7


@dataclass
class Row:
    """A row as a file has it, and as training sees it."""

    ids: list[int]
    labels: list[int]
    padding: int

    def seen(self, limit: int, truncation: str) -> tuple[list[int], list[int]]:
        """Ids and labels that are left of it."""
        part = slice(-limit, None) if truncation == "left" else slice(limit)
        return self.ids[part], self.labels[part]

    def predicted(self, limit: int, truncation: str) -> list[bool]:
        """Which of these are predicted: the trained ones but the first, which nothing comes before."""
        return [n > 0 and label != -100 for n, label in enumerate(self.seen(limit, truncation)[1])]


def make_rows(seed: int, count: int) -> list[Row]:
    """Rows of all lengths, some without a trained label, some with it only at the beginning, some padded."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [draw.randrange(VOCABULARY) for _ in range(draw.choice([1, 2, 3, 5, 8, 13]))]
        chance = draw.choice([0.0, 0.3, 1.0])
        labels = [id_ if draw.random() < chance else -100 for id_ in ids]
        if draw.random() < 0.2:
            labels = [ids[0], *[-100] * (len(ids) - 1)]
        rows.append(Row(ids, labels, draw.choice([0, 0, 4])))
    return rows


def write(path: Path, rows: list[Row]) -> str:
    columns: dict[str, Any] = {
        "input_ids": [row.ids + [0] * row.padding for row in rows],
        "attention_mask": [[1] * len(row.ids) + [0] * row.padding for row in rows],
        "labels": [row.labels + [-100] * row.padding for row in rows],
    }
    types = {"input_ids": pa.int32(), "attention_mask": pa.int8(), "labels": pa.int32()}
    table = pa.table({name: pa.array(values, pa.list_(types[name])) for name, values in columns.items()})
    pq.write_table(table, path, row_group_size=5)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[list[Row]]]:
    folder = tmp_path_factory.mktemp("rows")
    parts = [make_rows(1, 23), make_rows(2, 12), make_rows(3, 17)]
    return [write(folder / f"{n}.parquet", rows) for n, rows in enumerate(parts)], parts


Cut = tuple[int, str]
CUTS: list[Cut] = [(n, way) for n in (1, 2, 5, 8, 12, 13, 20) for way in ("right", "left")]


def inspect(paths: list[str], limit: int, truncation: str) -> DataFacts:
    return dataset.inspect(
        "data.train_files",
        paths,
        vocab_size=VOCABULARY,
        sequence_length=limit,
        truncation=truncation,
        stop_ids=[STOP],
    )


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut[0]}-{cut[1]}")
def test_submit_counts_what_is_there(files: tuple[list[str], list[list[Row]]], cut: Cut) -> None:
    paths, parts = files
    rows = list(itertools.chain.from_iterable(parts))
    facts = inspect(paths, *cut)
    predicted = [row.predicted(*cut) for row in rows]
    unusable = [n for n, flags in enumerate(predicted) if not any(flags)]
    seen = [len(flags) for flags in predicted if any(flags)]
    stops = [
        any(flag and id_ == STOP for flag, id_ in zip(flags, row.seen(*cut)[0], strict=True))
        for row, flags in zip(rows, predicted, strict=True)
    ]
    found = {
        "rows": facts.rows,
        "tokens": facts.tokens,
        "trained_tokens": facts.trained_tokens,
        "longest": facts.longest,
        "truncated": facts.truncated,
        "unusable": facts.unusable,
        "usable": facts.usable,
        "unusable_rows": list(facts.unusable_rows),
        "seen_tokens": facts.seen_tokens,
        "seen_squares": facts.seen_squares,
        "stopping": facts.stopping,
    }
    assert found == {
        "rows": len(rows),
        "tokens": sum(len(row.ids) for row in rows),
        "trained_tokens": sum(map(sum, predicted)),
        "longest": max(len(row.ids) for row in rows),
        "truncated": sum(len(row.ids) > cut[0] for row in rows),
        "unusable": len(unusable),
        "usable": len(rows) - len(unusable),
        "unusable_rows": unusable[:5],
        "seen_tokens": sum(seen),
        "seen_squares": sum(n * n for n in seen),
        "stopping": sum(stops),
    }


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut[0]}-{cut[1]}")
def test_the_trainer_reads_the_rows_that_submit_counted(
    files: tuple[list[str], list[list[Row]]], cut: Cut, tmp_path: Path
) -> None:
    paths, parts = files
    rows = list(itertools.chain.from_iterable(parts))
    write_spool(tmp_path, paths, sequence_length=cut[0], truncation=cut[1], vocab_size=VOCABULARY)
    found = Rows(tmp_path)
    usable = [n for n, row in enumerate(rows) if any(row.predicted(*cut))]
    assert found.numbers.tolist() == usable
    assert found.lengths.tolist() == [len(rows[n].seen(*cut)[0]) for n in usable]
    assert found.trained.tolist() == [sum(rows[n].predicted(*cut)) for n in usable]
    cut_rows = sum(len(row.ids) > cut[0] for row in rows)
    assert (found.truncated_rows, found.dropped_rows) == (cut_rows, len(rows) - len(usable))
    for place, number in enumerate(usable):
        ids, labels = rows[number].seen(*cut)
        sample = found[place]
        assert sample.tokens.tolist() == ids
        # Each token has the next one to predict; the last one has nothing.
        assert sample.labels.tolist() == [*labels[1:], -100]


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut[0]}-{cut[1]}")
def test_the_trainer_reads_the_weights_of_the_labels(
    files: tuple[list[str], list[list[Row]]], cut: Cut, tmp_path: Path
) -> None:
    """The first of three files has no weights, the last weighs tokens and rows."""
    (plain, *_), (unweighted, *_) = files
    draw = random.Random(7)
    rows, paths = list(unweighted), [plain]
    weights = [[1.0] * len(row.ids) for row in unweighted]
    for name in ("tokens", "both"):
        more = make_rows(len(rows), 40)
        by_token = [[draw.choice([0.0, 0.5, 1.0, 3.0]) for _ in row.ids] for row in more]
        by_row = [draw.choice([0.0, 1.0, 2.0]) if name == "both" else 1.0 for _ in more]
        columns = {
            "input_ids": [row.ids for row in more],
            "labels": [row.labels for row in more],
            "loss_weights": by_token,
        }
        paths.append(str(tmp_path / f"{name}.parquet"))
        pq.write_table(pa.table(columns | ({"weight": by_row} if name == "both" else {})), paths[-1])
        found = [[w * of for w in each] for each, of in zip(by_token, by_row, strict=True)]
        for row, each in zip(more, found, strict=True):
            row.labels = [-100 if w == 0 else label for label, w in zip(row.labels, each, strict=True)]
        rows += more
        weights += found
    (tmp_path / "spool").mkdir()
    write_spool(tmp_path / "spool", paths, sequence_length=cut[0], truncation=cut[1], vocab_size=VOCABULARY)
    found_rows = Rows(tmp_path / "spool")
    usable = [n for n, row in enumerate(rows) if any(row.predicted(*cut))]
    assert found_rows.numbers.tolist() == usable
    for place, number in enumerate(usable):
        part = slice(-cut[0], None) if cut[1] == "left" else slice(cut[0])
        seen, predicted = weights[number][part], rows[number].predicted(*cut)
        of_trained = [w for w, is_one in zip(seen, predicted, strict=True) if is_one]
        assert found_rows.weights[place] == sum(of_trained)
        sample = found_rows[place]
        assert sample.weights is not None
        assert sample.weights[sample.labels != -100].tolist() == of_trained


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut[0]}-{cut[1]}")
def test_the_x_ray_shows_the_first_rows_as_they_are_trained(
    files: tuple[list[str], list[list[Row]]], cut: Cut
) -> None:
    (path, *_), (rows, *_) = files
    shown = list(dataset.first_rows(path, 7, *cut))
    assert shown == [(row.seen(*cut)[0], row.predicted(*cut)) for row in rows[:7]]


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut[0]}-{cut[1]}")
def test_data_and_prepare_cut_and_mark_a_row_as_training_does(
    files: tuple[list[str], list[list[Row]]], cut: Cut
) -> None:
    (path, *_), (rows, *_) = files
    data = Data(sequence_length=cut[0], truncation=cut[1])
    for number, row in enumerate(rows[:12]):
        seen, predicted = row.seen(*cut)[0], row.predicted(*cut)
        assert seen_rows._read(data, path, number) == (seen, predicted)
        chat = MaskedChat(row.ids, row.labels, None, unstopped=0, loses=False)
        part = tokenize_pieces._fit(chat, "", TokenizeOptions(max_length=cut[0], truncation=cut[1]))
        if isinstance(part, str):
            assert (part, any(predicted)) == ("no trained token is left", False)
        else:
            assert (row.ids[part], any(predicted)) == (seen, True)
            made = tokenize_pieces._row(chat, part, "", tokenize_pieces._Chat(b"", b"", b""))
            assert made.cut_trained == sum(row.predicted(99, "right")) - sum(predicted)


def test_one_row_is_read_from_its_place(files: tuple[list[str], list[list[Row]]]) -> None:
    for path, rows in zip(*files, strict=True):
        for number, row in enumerate(rows):
            found = read_row(path, number)
            assert (found.ids.tolist(), found.labels.tolist()) == (row.ids, row.labels)


@pytest.mark.parametrize(("id_", "is_known"), [(VOCABULARY - 1, True), (VOCABULARY, False), (-1, False)])
def test_a_token_is_of_the_vocabulary_up_to_its_last(tmp_path: Path, id_: int, is_known: bool) -> None:
    path = write(tmp_path / "rows.parquet", [Row([1, 2, id_], [-100, 2, -100], 0)])
    (tmp_path / "spool").mkdir()

    def read() -> None:
        write_spool(tmp_path / "spool", [path], sequence_length=8, truncation="right", vocab_size=VOCABULARY)

    if is_known:
        assert inspect([path], 8, "right").usable == 1
        read()
        assert Rows(tmp_path / "spool")[0].tokens.tolist() == [1, 2, id_]
        return
    with pytest.raises(Refused, match=f"token id {id_} is outside"):
        inspect([path], 8, "right")
    with pytest.raises(DataError, match=f"token id {id_} is outside"):
        read()


@pytest.mark.parametrize("length", [5, 6])
def test_a_row_of_just_the_length_is_not_too_long(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "rows.parquet", [Row([*range(1, length + 1)], [*range(1, length + 1)], 3)])
    (tmp_path / "spool").mkdir()
    options: dict[str, Any] = {"sequence_length": 5, "truncation": "error", "vocab_size": VOCABULARY}
    if length == 5:
        write_spool(tmp_path / "spool", [path], **options)
        assert np.array_equal(Rows(tmp_path / "spool").lengths, [5])
    else:
        with pytest.raises(DataError, match="row 0 has 6 tokens, more than"):
            write_spool(tmp_path / "spool", [path], **options)
    assert inspect([path], 5, "error").truncated == (length > 5)

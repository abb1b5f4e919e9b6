"""The rows of a step, or the steps of a row: `python -m sftd.trainer.tools.seen_rows ORDER (--at P... | --row R)`.

ORDER is an attempt's order.json. The result depends only on the data files and the order of samples, as in training.
Writes JSON lines to standard output, the last one `done`. Exit codes: 0; 2 with a message on standard error for an error
that the user can fix; any other code is a defect.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sftd.domain.data.rows import is_trained
from sftd.domain.spec.data_section import Data
from sftd.trainer.chat.errors import PrepareError
from sftd.trainer.data.rows import Ints, Rows, write_spool
from sftd.trainer.data.sample_order import MixedOrder, SampleOrder, order_of, samples_digest
from sftd.trainer.errors import UserError
from sftd.trainer.tools.protocol import EventWriter, claim_stdout
from sftd.wire.attempt.directory import Order, read_order
from sftd.wire.data.dataset import files_digest
from sftd.wire.data.rows import read_row

_USER_ERROR = 2
# Submit has checked the ids against the vocabulary. A check here would need the model.
_ANY_ID = 2**31


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the question and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sftd.trainer.tools.seen_rows", description="Rows and steps."
    )
    parser.add_argument("order", type=Path, help="an attempt's order.json")
    question = parser.add_mutually_exclusive_group(required=True)
    question.add_argument("--at", type=int, nargs="+", help="the rows of a step that begins at this sample")
    question.add_argument("--row", type=int, help="steps of this row, from 0 over all files")
    parser.add_argument("--after-step", type=int, default=0, help="with --row: steps after this one")
    parser.add_argument("--last-step", type=int, default=0, help="with --row: steps up to this one")
    parser.add_argument("--text", action="store_true", help="with --at: decode the rows of the first")
    arguments = parser.parse_args(argv)
    events = claim_stdout()
    try:
        _answer(arguments, events)
    except (UserError, PrepareError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return _USER_ERROR
    return 0


def _answer(arguments: argparse.Namespace, events: EventWriter) -> None:
    order = read_order(arguments.order)
    spec = order.spec
    events.progress("reading the data files")
    rows = usable(spec.data, spec.data.all_train_files)
    samples = order_of(spec, rows, order.mixture)
    if arguments.at is not None:
        seen = [_rows_of(order, rows, samples, position) for position in arguments.at]
        if arguments.text:
            _decode(order, seen[0]["rows"], events)
        found: dict[str, Any] = {"seen": seen}
    else:
        found = _steps_of(order, rows, samples, arguments.row, arguments.after_step, arguments.last_step)
    events.emit("done", train_digest=files_digest(spec.data.all_train_files), **found)


def usable(data: Data, files: list[str]) -> Rows:
    """The rows of `files` that training uses, without their tokens. Raises `UserError`."""
    with tempfile.TemporaryDirectory(prefix="sftd-") as folder:
        write_spool(
            Path(folder),
            files,
            sequence_length=data.sequence_length,
            truncation=data.truncation,
            vocab_size=_ANY_ID,
            with_tokens=False,
        )
        rows = Rows(Path(folder))
    if not len(rows):
        raise UserError(f"no row of {', '.join(files)} has a trained label")
    return rows


def tokens_of(data: Data, files: list[str], numbers: Ints) -> list[tuple[list[int], list[bool]]]:
    """For rows by their number over all files: a row's ids without padding and after truncation, and a mark for each
    trained one."""
    ends = _file_ends(files)
    places = [_place(files, ends, number) for number in numbers.tolist()]
    return [_read(data, place["file"], place["row_in_file"]) for place in places]


def _rows_of(order: Order, rows: Rows, samples: SampleOrder | MixedOrder, position: int) -> dict[str, Any]:
    chosen = samples.rows(position, order.spec.data.train_batch_size)
    files = order.spec.data.all_train_files
    ends, epochs = _file_ends(files), samples.row_epochs(position, len(chosen))
    seen = [
        {
            **_place_in_mixture(order.spec.data, ends, int(rows.numbers[row])),
            "epoch": epoch,
            "length": int(rows.lengths[row]),
            "trained": int(rows.trained[row]),
        }
        for row, epoch in zip(chosen, epochs, strict=True)
    ]
    tokens = int(rows.trained[chosen].sum())
    digest = samples_digest(rows.numbers[chosen])
    return {"position": position, "rows": seen, "tokens": tokens, "samples_digest": digest}


def _steps_of(
    order: Order, rows: Rows, samples: SampleOrder | MixedOrder, number: int, after: int, last: int
) -> dict[str, Any]:
    files = order.spec.data.all_train_files
    ends = _file_ends(files)
    if not 0 <= number < int(ends[-1]):
        raise UserError(f"there is no row {number}: the {int(ends[-1])} rows of all files are counted from 0")
    found: dict[str, Any] = {**_place_in_mixture(order.spec.data, ends, number), "steps": []}
    row = int(np.searchsorted(rows.numbers, number))
    if row == len(rows) or rows.numbers[row] != number:
        return found | {"length": 0, "trained": 0}
    size = order.spec.data.train_batch_size
    for step in range(after, last):
        position = order.sample_position(step)
        for place in np.flatnonzero(samples.rows(position, size) == row).tolist():
            (epoch,) = samples.row_epochs(position + place, 1)
            found["steps"].append({"step": step + 1, "epoch": epoch})
    return found | {"length": int(rows.lengths[row]), "trained": int(rows.trained[row])}


def _file_ends(files: list[str]) -> Ints:
    return np.cumsum([pq.read_metadata(path).num_rows for path in files])


def _place(files: list[str], ends: Ints, number: int) -> dict[str, Any]:
    """The file of row `number` (counted over all files), and its number in that file."""
    file = int(np.searchsorted(ends, number, side="right"))
    before = int(ends[file - 1]) if file else 0
    return {"row": number, "file": files[file], "row_in_file": number - before}


def _place_in_mixture(data: Data, ends: Ints, number: int) -> dict[str, Any]:
    """As `_place`, with the row's source if the training data have several."""
    files = [(source.name, file) for source in data.sources for file in source.files]
    of_source = {"source": files[int(np.searchsorted(ends, number, side="right"))][0]} if files else {}
    return _place(data.all_train_files, ends, number) | of_source


def _decode(order: Order, seen: list[dict[str, Any]], events: EventWriter) -> None:
    from sftd.trainer.chat.tokenizer import load_tokenizer

    events.progress("loading the tokenizer")
    model = order.spec.model
    tokenizer = load_tokenizer(Path(model.partial_pretrain), trust_remote_code=model.trust_remote_code)
    for row in seen:
        ids, marks = _read(order.spec.data, row["file"], row["row_in_file"])
        row["segments"] = [
            {
                "text": tokenizer.decode([i for i, _ in run], skip_special_tokens=False),
                "trained": key,
            }
            for key, run in itertools.groupby(zip(ids, marks, strict=True), key=lambda pair: pair[1])
        ]


def _read(data: Data, path: str, number: int) -> tuple[list[int], list[bool]]:
    """A row's ids without padding and after truncation, and a mark for each trained one."""
    row = read_row(path, number)
    (begin,), (end,) = row.kept(data.sequence_length, data.truncation)
    return row.ids[begin:end].tolist(), is_trained(row.labels[begin:end].tolist())


if __name__ == "__main__":
    sys.exit(main())

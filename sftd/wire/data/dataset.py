"""Inspect the data files of a run at submit (see `rows` for the format)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sftd.domain.data.facts import LENGTH_QUANTILES, DataFacts, SourceFacts
from sftd.domain.data.rows import IGNORE_INDEX, is_trained
from sftd.domain.errors import Problem, Refused
from sftd.domain.spec.data_section import Source
from sftd.wire.data.columns import UnusableFile
from sftd.wire.data.rows import DataFile, Slice

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Maximum number of unusable rows and of unused columns that a report names.
_FIRST_ROWS, _FIRST_COLUMNS = 5, 8


def files_digest(paths: list[str]) -> str:
    """sha256 (hex) over the contents of the files in order, each preceded by its size."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).stat().st_size.to_bytes(8, "little"))
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def inspect(
    where: str,
    paths: list[str],
    *,
    vocab_size: int,
    sequence_length: int,
    truncation: str,
    stop_ids: Sequence[int] = (),
    sources: Sequence[Source] = (),
) -> DataFacts:
    """Read every row of the files and collect facts. `stop_ids` are the tokens that end an answer; `sources` are those that the
    files belong to, in order.

    `where` is the spec key of the files. Raises `Refused` with the first problem of each file: missing, not Parquet, wrong
    schema, empty, lists of unequal length, nulls, token ids or labels outside the vocabulary, shifted labels, columns that
    require an unsupported feature.
    """
    import numpy as np

    problems: list[Problem] = []
    remarks: list[str] = []
    unused: dict[str, list[str]] = {}
    rows = tokens = trained = longest = truncated = unusable = stopping = 0
    unusable_rows: list[int] = []
    # [length] → number of trained rows of that length, after truncation.
    of_length = np.zeros(sequence_length + 1, np.int64)
    of_files: list[tuple[int, int]] = []
    for path in paths:
        rows_before, unusable_before, trained_before = rows, unusable, trained
        try:
            with DataFile(path) as file:
                for part in file.slices(vocab_size):
                    found = _facts(part, sequence_length, truncation, stop_ids)
                    is_unusable = found.trained == 0
                    of_length += np.bincount(found.seen[~is_unusable], minlength=sequence_length + 1)
                    if len(unusable_rows) < _FIRST_ROWS:
                        unusable_rows += (rows + np.flatnonzero(is_unusable)).tolist()
                    tokens += int(part.lengths.sum())
                    trained += int(found.trained.sum())
                    longest = max(longest, int(part.lengths.max(initial=0)))
                    truncated += int((found.seen < part.lengths).sum())
                    unusable += int(is_unusable.sum())
                    stopping += found.stopping
                    rows += int(part.lengths.size)
                for column in file.unused:
                    unused.setdefault(column, []).append(path)
                if file.stray:
                    remarks.append(f"{path}: {file.stray:,} trained labels differ from their own token")
        except UnusableFile as error:
            problems.append(Problem(where, f"{path}: {error.what}", error.fix))
            continue
        of_files.append((rows - rows_before - (unusable - unusable_before), trained - trained_before))
        if rows - rows_before == unusable - unusable_before and len(paths) > 1:
            remarks.append(f"{path}: none of its rows has a trained label within {sequence_length} tokens")
    if problems:
        raise Refused(problems)
    sizes = np.arange(sequence_length + 1)
    return DataFacts(
        files=paths,
        digest=files_digest(paths),
        rows=rows,
        tokens=tokens,
        trained_tokens=trained,
        longest=longest,
        truncated=truncated,
        unusable=unusable,
        unusable_rows=tuple(unusable_rows[:_FIRST_ROWS]),
        seen_tokens=int((of_length * sizes).sum()),
        seen_squares=int((of_length * sizes * sizes).sum()),
        lengths=_quantiles(of_length),
        stopping=stopping if stop_ids else None,
        remarks=(*remarks, *_of_columns(unused, len(paths))),
        sources=tuple(_of_sources(sources, of_files)),
    )


def _of_sources(sources: Sequence[Source], of_files: Iterable[tuple[int, int]]) -> Iterator[SourceFacts]:
    """`of_files`: usable rows of each file, and their trained tokens."""
    files = iter(of_files)
    for source in sources:
        rows, tokens = (sum(column) for column in zip(*islice(files, len(source.files)), strict=True))
        yield SourceFacts(name=source.name, rows=rows, tokens=tokens, digest=files_digest(source.files))


def _of_columns(unused: dict[str, list[str]], files: int) -> Iterator[str]:
    if not unused:
        return
    names = ", ".join([*list(unused)[:_FIRST_COLUMNS], *(["…"] if len(unused) > _FIRST_COLUMNS else [])])
    first = next(iter(unused.values()))[0]
    others = len({path for paths in unused.values() for path in paths}) - 1
    more = f" and {others} more of {files} files" if others else ""
    yield f"{first}{more}: sftd does not use the column{'s' if len(unused) > 1 else ''} {names}"


def _quantiles(of_length: npt.NDArray[np.int64]) -> tuple[int, ...]:
    """The `LENGTH_QUANTILES` of the row lengths."""
    import numpy as np

    ends = np.cumsum(of_length)
    if not ends[-1]:
        return ()
    places = (np.array(LENGTH_QUANTILES) * (ends[-1] - 1)).round().astype(np.int64)
    return tuple(np.searchsorted(ends, places, side="right").tolist())


def first_rows(
    path: str, count: int, sequence_length: int, truncation: str
) -> Iterator[tuple[list[int], list[bool]]]:
    """(ids that training sees, whether each is trained) of the first `count` rows of an inspected file."""
    with DataFile(path) as file:
        for rows in file.slices(2**31):
            for begin, end in zip(*rows.kept(sequence_length, truncation), strict=True):
                if not count:
                    return
                count -= 1
                yield rows.ids[begin:end].tolist(), is_trained(rows.labels[begin:end].tolist())


class _Facts(NamedTuple):
    """Facts of some rows: numbers of tokens that training sees and of trained tokens (int64 [rows] each), and the number of rows
    that train a token that ends an answer."""

    seen: npt.NDArray[np.int64]
    trained: npt.NDArray[np.int64]
    stopping: int


def _facts(rows: Slice, sequence_length: int, truncation: str, stop_ids: Sequence[int]) -> _Facts:
    import numpy as np

    begins, ends = rows.kept(sequence_length, truncation)
    seen, trained = ends - begins, rows.count(rows.labels != IGNORE_INDEX, begins, ends)
    if not stop_ids:
        return _Facts(seen, trained, 0)
    stops = rows.count(np.isin(rows.labels, stop_ids), begins, ends)
    return _Facts(seen, trained, int(np.count_nonzero(stops)))

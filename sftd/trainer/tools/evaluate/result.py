"""The result of an evaluation: its metrics, and the file of its answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sftd.trainer.checkpoint.folder_swap import fsync_file
from sftd.wire.attempt.directory import fsync_dir

# question: the number of the question from 0. seconds: from when the model got the prompt to the end of the answer.
_COLUMNS = pa.schema(
    [
        ("question", pa.int64()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("reference", pa.list_(pa.string())),
        ("score", pa.float64()),
        ("tokens", pa.int64()),
        ("seconds", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Result:
    """`rows`: of the answers file, by its columns. `digest`: sha256 of the questions."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    digest: str

    def write(self, folder: Path) -> Path:
        """Write `answers.parquet` durably, replacing an older one, and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder.resolve() / "answers.parquet"
        partial = path.with_name(path.name + ".partial")
        pq.write_table(pa.Table.from_pylist(self.rows, schema=_COLUMNS), partial, compression="zstd")
        fsync_file(partial)
        partial.replace(path)
        fsync_dir(path.parent)
        return path

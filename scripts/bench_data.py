"""Compare random access to samples in Parquet row groups and in decoded rows: `python scripts/bench_data.py [ROWS]`.

Row groups have 60,000 rows. Lengths are log-normal (median 350, cut at 4096). Needs a quiet machine, and about 20 KB of disk
per row.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sftd.trainer.data.rows import Rows, write_spool

ROW_GROUP = 60_000
LENGTH = 4096
VOCABULARY = 128_256


def write(path: Path, rows: int) -> None:
    """Write random rows. The first half of each row is not trained."""
    rng = np.random.default_rng(0)
    writer = None
    for start in range(0, rows, ROW_GROUP):
        count = min(ROW_GROUP, rows - start)
        sizes = np.clip(rng.lognormal(np.log(350), 1.0, count), 2, LENGTH).astype(np.int32)
        starts = np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)
        ids = rng.integers(0, VOCABULARY, starts[-1], dtype=np.int32)
        position = np.arange(ids.size) - np.repeat(starts[:-1], sizes)
        labels = np.where(position < np.repeat(sizes // 2, sizes), np.int32(-100), ids)
        columns = {"input_ids": ids, "attention_mask": np.ones(ids.size, np.int8), "labels": labels}
        table = pa.table({name: pa.ListArray.from_arrays(starts, values) for name, values in columns.items()})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table, row_group_size=ROW_GROUP)
    assert writer is not None
    writer.close()


def milliseconds(read: Callable[[int], object], rows: np.ndarray) -> float:
    """Mean time to read one of `rows`."""
    started = time.perf_counter()
    for row in rows:
        read(int(row))
    return 1e3 * (time.perf_counter() - started) / rows.size


def main(rows: int) -> None:
    """Measure both and print."""
    with tempfile.TemporaryDirectory() as name:
        path, spool = Path(name) / "rows.parquet", Path(name) / "spool"
        # In a separate process: its peak memory would hide that of reading.
        writer = multiprocessing.get_context("spawn").Process(target=write, args=(path, rows))
        writer.start()
        writer.join()
        parquet = pq.ParquetFile(path, memory_map=True)

        def from_row_group(row: int) -> list[np.ndarray]:
            table = parquet.read_row_group(row // ROW_GROUP, columns=["input_ids", "labels"])
            one = table.slice(row % ROW_GROUP, 1)
            return [column.combine_chunks().flatten().to_numpy() for column in one.columns]

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        spool.mkdir()
        started = time.perf_counter()
        write_spool(spool, [str(path)], sequence_length=LENGTH, truncation="right", vocab_size=VOCABULARY)
        seconds = time.perf_counter() - started
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        decoded = Rows(spool)
        tokens = int(decoded.lengths.sum())
        print(
            f"{rows:,} rows, {tokens:,} tokens: decoded once in {seconds:.1f} s ({tokens / seconds / 1e6:.1f} M tokens/s), "
            f"peak memory grew by {grown / 1024:.0f} MiB"
        )
        chosen = np.random.default_rng(1).integers(0, rows, 2000)
        slow = milliseconds(from_row_group, chosen[:20])
        fast = milliseconds(decoded.__getitem__, chosen)
        print(
            f"a sample: {slow:.1f} ms from row groups of {ROW_GROUP:,}, {fast:.4f} ms decoded: {slow / fast:,.0f} ×"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 240_000)

"""Write training data of random tokens, as Parquet in the trainer's schema:

    python scripts/write_random_data.py DIR --rows 1000 --vocab 128256 --length fixed:2048|lognormal:350:4096 [--seed 0]

DIR/train.parquet gets the rows, DIR/val.parquet a twentieth of that number (at least one). Tokens follow Zipf's law, like words
of a text, so a model can learn their frequencies.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
SIGMA = 1.0
_SHORTEST = 2
_VAL_SHARE = 20
# As `sftd prepare` writes them.
_ROW_GROUP = 1000


class Zipf:
    """Token ids below `vocabulary` whose frequency falls as 1 / (rank + 2.7) (Mandelbrot's form of Zipf's law)."""

    def __init__(self, vocabulary: int) -> None:
        weights = 1.0 / (np.arange(vocabulary) + 2.7)
        self._cumulative = np.cumsum(weights) / weights.sum()

    def draw(self, rng: np.random.Generator, count: int) -> Ints:
        """`count` ids."""
        found = np.searchsorted(self._cumulative, rng.random(count))
        return np.minimum(found, self._cumulative.size - 1).astype(np.int64)


def draw_lengths(rng: np.random.Generator, law: str, count: int) -> Ints:
    """`count` lengths in tokens by `fixed:N` or `lognormal:MEDIAN:LONGEST[:SIGMA]`. Longer ones are cut to LONGEST. SIGMA is that
    of the logarithm (default: 1.0). Raises `ValueError`."""
    kind, *numbers = law.split(":")
    if kind == "fixed" and len(numbers) == 1:
        return np.full(count, int(numbers[0]), np.int64)
    if kind == "lognormal" and len(numbers) in (2, 3):
        sigma = float(numbers[2]) if len(numbers) == 3 else SIGMA
        drawn = np.exp(rng.normal(np.log(float(numbers[0])), sigma, count)).round()
        return np.clip(drawn, _SHORTEST, int(numbers[1])).astype(np.int64)
    raise ValueError(f"{law!r}: write fixed:LENGTH or lognormal:MEDIAN:LONGEST[:SIGMA]")


def write(path: Path, rows: int, vocabulary: int, law: str, rng: np.random.Generator) -> int:
    """Write one file of `rows` rows, one row group at a time. Returns the number of tokens."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    zipf, total = Zipf(vocabulary), 0
    schema = pa.schema([(name, pa.list_(pa.int32())) for name in ("input_ids", "attention_mask", "labels")])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, _ROW_GROUP):
            lengths = draw_lengths(rng, law, min(_ROW_GROUP, rows - start))
            offsets = pa.array(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))
            ids = zipf.draw(rng, int(lengths.sum())).astype(np.int32)
            columns = [
                pa.ListArray.from_arrays(offsets, pa.array(values))
                for values in (ids, np.ones_like(ids), ids)
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            total += ids.size
    return total


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, required=True, help="rows of train.parquet")
    parser.add_argument("--vocab", type=int, required=True, help="ids are below this")
    parser.add_argument(
        "--length", default="fixed:2048", help="fixed:LENGTH or lognormal:MEDIAN:LONGEST[:SIGMA]"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        draw_lengths(np.random.default_rng(), arguments.length, 1)
    except ValueError as error:
        parser.error(str(error))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for number, (name, rows) in enumerate(
        (("train", arguments.rows), ("val", max(1, arguments.rows // _VAL_SHARE)))
    ):
        started = time.perf_counter()
        path = arguments.folder / f"{name}.parquet"
        rng = np.random.default_rng((arguments.seed, number))
        tokens = write(path, rows, arguments.vocab, arguments.length, rng)
        print(f"{path}: {rows} rows, {tokens} tokens in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()

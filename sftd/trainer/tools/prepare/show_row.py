"""Shows a tokenised row as text, with its trained and untrained parts."""

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sftd.domain.data.rows import is_trained
from sftd.trainer.chat.errors import PrepareError
from sftd.trainer.chat.tokenizer import load_tokenizer, tokenizer_digest
from sftd.wire.data.chat_template import METADATA_KEY
from sftd.wire.data.columns import UnusableFile
from sftd.wire.data.rows import read_row


def show_row(path: Path, model: Path, row: int, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Decode row `row` (from 0) of a file that `tokenize_files` wrote.

    Returns the fields of the `row` event: `row`, `segments` (a list of `{"text", "trained"}`, one for each run of trained or
    untrained tokens), `tokens` and `trained` (numbers of tokens). Raises PrepareError when the row does not exist or another
    tokenizer made the file.
    """
    try:
        parquet = pq.ParquetFile(path)
    except FileNotFoundError as error:
        raise PrepareError(f"There is no file {path}.") from error
    except pa.ArrowInvalid as error:
        raise PrepareError(f"{path} is not a Parquet file ({error}).") from error
    if missing := {"input_ids", "labels"}.difference(parquet.schema_arrow.names):
        raise PrepareError(
            f"{path} is not a tokenised data set: it has no column {' nor '.join(sorted(missing))}."
        )
    rows = parquet.metadata.num_rows
    if not 0 <= row < rows:
        raise PrepareError(f"{path} has no row {row}: its {rows} rows are counted from 0.")
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    metadata = json.loads((parquet.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}"))
    if metadata.get("tokenizer_digest", tokenizer_digest(tokenizer)) != tokenizer_digest(tokenizer):
        raise PrepareError(
            f"{path} was made with another tokenizer than that of {model}; name the model it was made for."
        )
    try:
        found = read_row(str(path), row)
    except UnusableFile as error:
        raise PrepareError(f"{path}: {error.what}.") from error
    ids, marks = found.ids.tolist(), is_trained(found.labels.tolist())
    segments = []
    for key, run in itertools.groupby(zip(ids, marks, strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode(
            [id_ for id_, _ in run], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        segments.append({"text": text, "trained": key})
    return {
        "row": row,
        "segments": segments,
        "tokens": len(ids),
        "trained": sum(marks),
    }

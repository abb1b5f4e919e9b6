"""The columns of a training file: those that sftd trains on, and those of other tools that would change a row's meaning.

Other tools store packing and loss masks in extra columns. sftd trains each row as one sample, with the row's labels. It compares
such columns with that: a column that agrees is ignored, and a file with one that disagrees is refused.

`weight` (a number per row) and `loss_weights` (a number per token, at the place of its label) weigh the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

LABELS = "labels"
_REQUIRED = ("input_ids", LABELS)
_MASK = "attention_mask"
_OWN_WEIGHTS = ("weight", "loss_weights")
_PREPARE = "make the file with `sftd prepare`"
_UNPACK = "write one sample per row, and let sftd pack them: training.use_rmpad=true"
_MASK_LABELS = "write -100 into labels where a token is not trained, and drop the column"

_POSITIONS = frozenset({"position_ids", "positions", "pos_ids"})
_SEGMENTS = frozenset(
    {"seq_idx", "seq_ids", "segment_ids", "sequence_ids", "sequence_id", "doc_ids", "document_ids"}
    | {"token_type_ids"}
)
_LENGTHS = frozenset({"seq_lengths", "seq_lens", "seqlens", "sequence_lengths", "sample_lengths"})
_BOUNDS = frozenset(
    {"cu_seqlens", "cu_seq_lens", "cu_seqlens_q", "cu_seqlens_k", "cu_seq_lens_q", "cu_seq_lens_k"}
)
_WEIGHTS = frozenset(
    {"loss_mask", "label_mask", "labels_mask", "response_mask", "completion_mask", "assistant_masks"}
    | {"assistant_mask", "weights", "loss_weight", "loss_scale", "sample_weight", "token_weights"}
)
_KNOWN = _POSITIONS | _SEGMENTS | _LENGTHS | _BOUNDS | _WEIGHTS
# Redundant columns.
_HARMLESS = frozenset({"length", "special_tokens_mask", "__index_level_0__"})


class UnusableFile(Exception):
    """A data file that cannot be used for training: `what` is wrong, and the `fix`."""

    def __init__(self, what: str, fix: str = _PREPARE) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


@dataclass(frozen=True)
class Lists:
    """A column: the concatenated values of all rows, and the number of values of each row (int64 [rows])."""

    values: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]

    @classmethod
    def of(cls, name: str, column: Any) -> Lists:
        """Read a column of lists, or of one value per row. Raises `UnusableFile` for nulls."""
        import numpy as np
        import pyarrow.compute as pc

        if not is_list(column.type):
            values, lengths = column, np.ones(len(column), np.int64)
        else:
            values = column.flatten()
            lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        if column.null_count or values.null_count:
            raise UnusableFile(f"column {name!r} holds nulls")
        return cls(values.to_numpy(zero_copy_only=False), lengths)


def read_columns(schema: pa.Schema, *, others: bool) -> list[str]:
    """The columns of the file to read; with `others`, also the known columns of other tools. Raises `UnusableFile` when a
    required one is missing or one has the wrong type."""
    import pyarrow as pa

    for name in _REQUIRED:
        if name not in schema.names:
            raise UnusableFile(f"has no column {name!r}; it has {', '.join(schema.names) or 'none'}")
    read = []
    for name in dict.fromkeys(schema.names):
        if name not in (*_REQUIRED, _MASK, *_OWN_WEIGHTS) and not (others and name in _KNOWN):
            continue
        if (times := schema.names.count(name)) > 1:
            raise UnusableFile(f"has the column {name!r} {times} times")
        kind = schema.field(name).type
        inner = kind.value_type if is_list(kind) else kind
        if name in _KNOWN or name in _OWN_WEIGHTS:
            if pa.types.is_null(inner):
                continue
            if not _is_number(inner):
                raise UnusableFile(f"column {name!r} is {kind}, which sftd cannot read", _fix(name))
        elif not is_list(kind) or not (
            pa.types.is_integer(inner) or (name == _MASK and pa.types.is_boolean(inner))
        ):
            raise UnusableFile(f"column {name!r} is {kind}, not a list of integers")
        read.append(name)
    return read


def unused(schema: pa.Schema) -> tuple[str, ...]:
    """The columns that sftd does not use and that may change a row's meaning."""
    known = {*_REQUIRED, _MASK, *_OWN_WEIGHTS} | _KNOWN | _HARMLESS
    return tuple(dict.fromkeys(name for name in schema.names if name not in known))


def check_columns(
    columns: Mapping[str, Lists],
    starts: npt.NDArray[np.int64],
    real: npt.NDArray[np.bool_],
    trained: npt.NDArray[np.bool_],
    first: int,
) -> None:
    """Compare the columns of other tools in some rows with what sftd trains. Raises `UnusableFile` for a difference.

    starts: [rows + 1], index of each row's first token. real: [tokens], not padding. trained: [tokens], not padding and with a
    label. first: the number of the first row.
    """
    import numpy as np

    for name, column in columns.items():
        row = None
        if name in _LENGTHS:
            row = _first(column.lengths > 1)
        elif name in _BOUNDS:
            row = _first(column.lengths > 2)
        elif not np.array_equal(column.lengths, np.diff(starts)):
            # With one value per row, only a weight matters: other columns cannot distinguish parts of the row.
            row = _first(column.values != 1) if name in _WEIGHTS and _single(column) else None
            if not _single(column):
                raise UnusableFile(f"column {name!r} has lists of other lengths than input_ids", _fix(name))
        elif name in _WEIGHTS:
            if not _is_one(column.values, trained, starts, may_lead=True):
                row = _row_of(_predicted(trained, starts) & (column.values != 1), starts)
        else:
            begins = np.repeat(starts[:-1], np.diff(starts))
            expected = np.arange(real.size) - begins if name in _POSITIONS else column.values[begins]
            row = _row_of(real & (column.values != expected), starts)
        if row is not None:
            raise UnusableFile(f"row {first + row}: {_meaning(name)}", _fix(name))


def take_weights(
    columns: dict[str, Lists], starts: npt.NDArray[np.int64], trained: npt.NDArray[np.bool_], first: int
) -> npt.NDArray[np.float32] | None:
    """Remove sftd's columns of weights from `columns`; the product of a token's weights, float32 [tokens], or None if all are 1.

    The other arguments are those of `check_columns`. Raises `UnusableFile` for a weight that is negative or not finite.
    """
    import numpy as np

    found = None
    for name in _OWN_WEIGHTS:
        if (column := columns.pop(name, None)) is None:
            continue
        sizes = np.diff(starts)
        is_by_token = np.array_equal(column.lengths, sizes)
        if not is_by_token and not _single(column):
            raise UnusableFile(f"column {name!r} has lists of other lengths than input_ids", _fix(name))
        with np.errstate(over="ignore"):
            values = (column.values if is_by_token else np.repeat(column.values, sizes)).astype(np.float32)
        bad = ~(np.isfinite(values) & (values >= 0))
        if (row := _row_of(bad, starts)) is not None:
            raise UnusableFile(f"row {first + row}: {name} holds {values[bad][0]:g}", _fix(name))
        is_mask = bool(((values == 0) | (values == 1)).all())
        if not _is_one(values, trained, starts, may_lead=is_mask):
            found = values if found is None else found * values
    return found


def _predicted(trained: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of the trained tokens are predicted: not the first of a row."""
    import numpy as np

    inner = trained.copy()
    inner[starts[:-1][np.diff(starts) > 0]] = False
    return inner


def _is_one(
    values: npt.NDArray[Any], trained: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64], *, may_lead: bool
) -> bool:
    """Whether weights [tokens] are 1 on all trained tokens. `may_lead`: some tools store the weight at the predicting token
    instead of the predicted one."""
    inner = _predicted(trained, starts)
    is_one = not (inner & (values != 1)).any()
    return is_one or (may_lead and not (inner[1:] & (values[:-1] != 1)).any())


def _meaning(name: str) -> str:
    if name in _WEIGHTS:
        return f"{name} is not 1 on all tokens that labels train, and sftd trains by labels alone"
    return f"{name} splits the row into several samples, which would attend to each other"


def _fix(name: str) -> str:
    if name in _OWN_WEIGHTS:
        return "weights are finite numbers from 0 on: one per row, or as many as the row has input_ids"
    return _MASK_LABELS if name in _WEIGHTS else _UNPACK


def _single(column: Lists) -> bool:
    return bool((column.lengths == 1).all())


def _first(flags: npt.NDArray[np.bool_]) -> int | None:
    return int(flags.argmax()) if flags.any() else None


def _row_of(flags: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64]) -> int | None:
    import numpy as np

    token = _first(flags)
    return None if token is None else int(np.searchsorted(starts, token, side="right")) - 1


def is_list(kind: pa.DataType) -> bool:
    """Whether this is one of Arrow's list types."""
    import pyarrow as pa

    tests = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    return any(test(kind) for test in tests)


def _is_number(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return any(test(kind) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean))

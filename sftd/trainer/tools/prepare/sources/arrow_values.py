"""Values of Arrow's columns as the values of JSON that they represent."""

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from sftd.wire.data.columns import is_list


def json_value(kind: pa.DataType) -> Callable[[Any], Any]:
    """A function from what `to_pylist` gives for a type to the value meant.

    A field of a struct that is null is left out: the column has the fields of all rows. Text of the type `arrow.json`, which
    Hugging Face's datasets writes for fields that are not alike in all rows, is parsed, and keeps its nulls. The function
    raises ValueError for text of that type that is not JSON.
    """
    if isinstance(kind, pa.JsonType):
        return lambda value: json.loads(value) if isinstance(value, str) else value
    if pa.types.is_struct(kind):
        fields = {field.name: json_value(field.type) for field in kind}
        return lambda value: value and {k: fields[k](v) for k, v in value.items() if v is not None}
    if pa.types.is_map(kind):
        item = json_value(kind.item_type)
        return lambda value: value and {key: item(inner) for key, inner in value}
    if is_list(kind):
        inside = json_value(kind.value_type)
        return lambda value: value and [inside(inner) for inner in value]
    return lambda value: value

"""Converts values of Arrow columns to the JSON values that they represent."""

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from sftd.wire.data.columns import is_list


def json_value(kind: pa.DataType) -> Callable[[Any], Any]:
    """A function that converts the `to_pylist` value of a type to its JSON value.

    It drops null fields of structs, because the column has the fields of all rows. It parses text of the type `arrow.json`,
    which datasets writes for fields whose type differs between rows, and keeps its nulls. It raises ValueError for such text
    that is not JSON.
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

"""Events to JSON and back, bit for bit, across schema versions.

JSON has no NaN or infinity, but the loss of a diverging run needs them. Non-finite floats are written as the strings
"NaN", "Infinity" and "-Infinity", which PostgreSQL and Python's `float` both parse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import msgspec

from sftd.domain.errors import UnknownEvent
from sftd.domain.log.events import EVENT_TYPES, Event

Payload = dict[str, Any]
_NO_FIGURES: Payload = {"token_accuracy": None, "entropy": None, "sources": None}
# (type, N) -> function from a payload of schema version N to one of version N + 1.
UPCASTS: dict[tuple[str, int], Callable[[Payload], Payload]] = {
    ("RunSubmitted", 1): lambda payload: payload | {"model_files": None},
    ("StepCompleted", 1): lambda payload: payload | {"mfu": None, "peak_memory_bytes": None},
    ("StepCompleted", 2): lambda payload: payload | {"load_balancing_loss": None, "z_loss": None},
    ("StepCompleted", 3): lambda payload: payload | _NO_FIGURES,
    ("ValidationCompleted", 1): lambda payload: payload | {"expert_load": None},
    ("ValidationCompleted", 2): lambda payload: payload | _NO_FIGURES,
    ("StopRequested", 1): lambda payload: payload | {"then": "cancelled", "now": False, "preempted_by": None},
    ("ResumeRequested", 1): lambda payload: (
        payload | {"changes": {}, "spec": None, "spec_digest": None, "planned_steps": None}
    ),
    ("ModelLoaded", 1): lambda payload: payload | {"trained_parameters": None},
    ("RunSucceeded", 1): lambda payload: payload | {"reason": ""},
    ("RunForked", 1): lambda payload: payload | {"mixture": None},
    ("AttemptPreempted", 1): lambda payload: payload | {"reason": ""},
}

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(dict[str, Any])


def json_float(value: float) -> float | str:
    """A float for JSON: unchanged if finite, else its name. `float()` parses both."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def finite(value: Any) -> Any:
    """A value of plain types with `json_float` applied to each float in it."""
    if isinstance(value, float):
        return json_float(value)
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


@cache
def _float_fields(cls: type[msgspec.Struct]) -> tuple[tuple[str, ...], tuple[tuple[str, Any], ...]]:
    """Names of the fields that are floats; (name, struct) of those that map names to a struct."""
    hints = get_type_hints(cls)
    floats, maps = [], []
    for field in msgspec.structs.fields(cls):
        hint = hints[field.name]
        for kind in get_args(hint) if isinstance(hint, UnionType) else (hint,):
            if kind is float:
                floats.append(field.name)
            elif get_origin(kind) is dict and issubclass(get_args(kind)[1], msgspec.Struct):
                maps.append((field.name, get_args(kind)[1]))
    return tuple(floats), tuple(maps)


def _restore_floats(payload: Payload, cls: type[msgspec.Struct]) -> None:
    """Replace the names of non-finite floats, see `json_float`, by the floats."""
    floats, maps = _float_fields(cls)
    for name in floats:
        if isinstance(payload.get(name), str):
            payload[name] = float(payload[name])
    for name, kind in maps:
        for each in (payload.get(name) or {}).values():
            _restore_floats(each, kind)


@cache
def _decoder_of(cls: type[Event]) -> msgspec.json.Decoder[Event]:
    return msgspec.json.Decoder(cls)


def encode(event: Event) -> tuple[str, int, str]:
    """Event → (type name, schema version, payload JSON)."""
    cls = type(event)
    payload = _encoder.encode(event)
    # msgspec writes a non-finite float as null, so a payload without null has none.
    if b"null" in payload:
        payload = _encoder.encode(finite(msgspec.to_builtins(event)))
    return cls.__name__, cls.schema_version, payload.decode()


def decode(type_name: str, schema_version: int, payload: str | bytes) -> Event:
    """(type name, schema version, payload JSON) → Event of the newest schema. Raises `UnknownEvent`."""
    cls = EVENT_TYPES.get(type_name)
    if cls is None or schema_version > cls.schema_version:
        raise UnknownEvent(
            f"The log holds {type_name} v{schema_version}, which this sftd does not support: a newer sftd wrote it."
        )
    if schema_version == cls.schema_version:
        try:
            return _decoder_of(cls).decode(payload)
        except msgspec.ValidationError:
            pass  # Either a non-finite float stored by name, or a real error, which is raised below.
    data = _decoder.decode(payload)
    for version in range(schema_version, cls.schema_version):
        data = UPCASTS[type_name, version](data)
    _restore_floats(data, cls)
    return msgspec.convert(data, cls, str_keys=True)

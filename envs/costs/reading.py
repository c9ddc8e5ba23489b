"""JSON into frozen dataclasses: every key known, every value of its type and inside its range."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from functools import cache
from typing import Any, TypeVar

from servegym.errors import InputError

T = TypeVar("T")
_type_hints = cache(typing.get_type_hints)  # evaluates source text, most of the time of a read


def number(low: float, high: float = math.inf, **options: Any) -> Any:
    """A keyword-only dataclass field with the closed range of its values; `default` as in `field`."""
    return dataclasses.field(kw_only=True, metadata={"low": low, "high": high}, **options)


def read_dataclass(cls: type[T], data: Any, where: object, path: str = "") -> T:
    """Build `cls` from parsed JSON; calls its `check(where, path)` where it has one.

    Raises:
        InputError: naming the file `where` and the dotted path of the field.
    """
    if not isinstance(data, dict):
        raise InputError(where, path or "file", type(data).__name__, "must be a JSON object")
    dot = f"{path}." if path else ""
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore
    for key in data:
        if key not in fields:
            raise InputError(where, f"{dot}{key}", key, f"unknown field; known: {', '.join(fields)}")
    hints = _type_hints(cls)  # type: ignore[arg-type]
    values = {}
    for name, item in fields.items():
        if name in data:
            values[name] = _read(hints[name], data[name], where, dot + name, item.metadata)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise InputError(where, dot + name, None, "missing")
    result = cls(**values)
    if hasattr(result, "check"):
        result.check(where, path)
    return result


def rising(where: object, path: str, axis: tuple[int, ...]) -> None:
    """Raise `InputError` unless `axis` is a non-empty rising sequence of integers from 0 or more."""
    if not axis or axis[0] < 0:
        raise InputError(where, path, list(axis[:1]), "needs at least one integer, 0 or more")
    for i in range(1, len(axis)):
        if axis[i] <= axis[i - 1]:
            raise InputError(where, f"{path}[{i}]", axis[i], "must rise from point to point")


def _read(hint: Any, value: Any, where: object, path: str, limits: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # the only union is `X | None`
        return None if value is None else _read(args[0], value, where, path, limits)
    if dataclasses.is_dataclass(hint):
        return read_dataclass(typing.cast(type, hint), value, where, path)
    if origin is tuple:
        if not isinstance(value, list):
            raise InputError(where, path, value, "must be a list")
        return tuple(_read(args[0], item, where, f"{path}[{i}]", {}) for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(where, path, value, "must be a JSON object")
        return {key: _read(args[1], item, where, f"{path}.{key}", {}) for key, item in value.items()}
    return _scalar(hint, value, where, path, limits)


def _scalar(hint: Any, value: Any, where: object, path: str, limits: Any) -> Any:
    if hint is str:
        if not isinstance(value, str) or not value:
            raise InputError(where, path, value, "must be a non-empty string")
        return value
    accepted = int if hint is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted) or not math.isfinite(value):
        raise InputError(where, path, value, f"must be {'an integer' if hint is int else 'a finite number'}")
    low, high = limits.get("low", -math.inf), limits.get("high", math.inf)
    if not low <= value <= high:
        bound = f"at least {low}" if math.isinf(high) else f"between {low} and {high}"
        raise InputError(where, path, value, f"must be {bound}")
    return hint(value)

"""The size of a network: what config.json keeps beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from servegym.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


@dataclass(frozen=True)
class NetworkConfig:
    """Hyperparameters of the graph network.

    Attributes:
        hidden: width H of every embedding.
        layers: rounds of message passing between instances and requests.
    """

    hidden: int = 32
    layers: int = 2

    def __post_init__(self) -> None:
        for name, low, high in (("hidden", 1, 4096), ("layers", 0, 64)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InputError("network", name, value, f"give an integer from {low} to {high}")


def read_config(kind: type[Config], where: object, section: str, raw: Any) -> Config:
    """Read a configuration back from JSON.

    Args:
        kind: a dataclass that validates its fields on construction.
        where: the file, for messages.
        section: the key of the table in it.
        raw: the table.

    Raises:
        InputError: for a missing, unknown or ill-typed field.
    """
    if not isinstance(raw, Mapping):
        raise InputError(where, section, raw, "expected a table")
    names = {f.name for f in fields(kind)}
    for name in sorted(names ^ set(raw)):
        hint = "missing" if name in names else "unknown field"
        raise InputError(where, f"{section}.{name}", raw.get(name), hint)
    try:
        return kind(**raw)
    except InputError as error:
        raise InputError(where, f"{section}.{error.field}", error.value, error.hint) from error

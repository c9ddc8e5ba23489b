"""The size of a network: what config.json keeps beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from servegym.errors import InputError


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

    @classmethod
    def from_dict(cls, where: object, raw: Any) -> NetworkConfig:
        """Read the configuration back from JSON.

        Raises:
            InputError: naming `where` and the field, for a missing, unknown or ill-typed one.
        """
        if not isinstance(raw, Mapping):
            raise InputError(where, "network", raw, "expected a table")
        names = {f.name for f in fields(cls)}
        for name in sorted(names ^ set(raw)):
            raise InputError(
                where, f"network.{name}", raw.get(name), "missing" if name in names else "unknown field"
            )
        try:
            return cls(**raw)
        except InputError as error:
            raise InputError(
                where, f"network.{error.field}", error.value, "out of range or ill-typed"
            ) from error

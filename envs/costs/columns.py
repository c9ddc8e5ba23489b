"""Columns of a CSV file of measurements, checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from servegym.errors import InputError


def read_csv(path: Path, numbers: tuple[str, ...], text: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The named columns; numbers must be finite and not negative.

    Raises:
        InputError: unreadable, a column that is missing or not numeric, a bad value with its row, or no row.
    """
    try:
        table = pacsv.read_csv(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(path, "file", path.name, f"cannot be read as CSV: {error}") from error
    for name in (*numbers, *text):
        if name not in table.column_names:
            raise InputError(path, name, None, "missing column")
    if table.num_rows == 0:
        raise InputError(path, "rows", 0, "needs at least one")
    result = {name: np.asarray(table[name].to_pylist(), dtype=str) for name in text}
    for name in numbers:
        column = table[name]
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            raise InputError(path, name, str(column.type), "must hold numbers")
        values = column.to_numpy().astype(float)
        bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if len(bad):
            raise InputError(path, f"{name}, row {bad[0] + 1}", values[bad[0]], "must be finite, 0 or more")
        result[name] = values
    return result

"""Readers of recorded traces: our Parquet schema, and Azure, BurstGPT and Mooncake as published."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from servegym.envs.workloads.checks import check_rows
from servegym.envs.workloads.prefixes import dense, row_offsets
from servegym.envs.workloads.workload import NO_ID
from servegym.errors import InputError

MOONCAKE_GRID_S = 3.0
MOONCAKE_BLOCK_TOKENS = 512
CHAT_BLOCK_TOKENS = 16  # vLLM's block, for conversations whose prefixes follow from their turns
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")
MOONCAKE_COLUMNS = ("timestamp", "input_length", "output_length")
PARQUET_COLUMNS = ("arrived_at_s", "prompt_tokens", "output_tokens")


@dataclass(frozen=True)
class Recorded:
    """A trace file as numbers, in the order of the file, not yet checked.

    Shapes: [N], but prefix_offsets [N + 1] and prefix_ids (flat).

    Attributes:
        arrived_at_s: seconds; meaningless unless `clocked`.
        clocked: whether the arrivals of different sessions share a clock.
        grid_s: arrivals were rounded down to a multiple of this; 0 for none.
        prompt_tokens, output_tokens: any number type; NaN where the file has nothing.
        session, turn, tenant: -1 unknown.
        priority: lower is more urgent; 0 where the file has nothing.
        gap_s: NaN unknown.
        class_id, class_names: class of each row.
        prefix_offsets, prefix_ids, prefix_block_tokens: ids of the prompt's blocks, the last may be partial.
        prompts_accumulate: a session's prompt is all that was said before and a new message.
    """

    arrived_at_s: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    session: np.ndarray
    turn: np.ndarray
    tenant: np.ndarray
    priority: np.ndarray
    gap_s: np.ndarray
    class_id: np.ndarray
    prefix_offsets: np.ndarray
    prefix_ids: np.ndarray
    class_names: tuple[str, ...] = ("default",)
    prefix_block_tokens: int = 0
    prompts_accumulate: bool = False
    clocked: bool = True
    grid_s: float = 0.0


def read(path: str | Path) -> Recorded:
    """Read a trace by its extension; errors name the file."""
    path = Path(path)
    if path.is_dir():
        raise InputError(path, "path", str(path), "is a directory; name one trace file")
    if not path.is_file():
        raise InputError(path, "path", str(path), "no such file")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(path, "extension", path.suffix, f"traces are {', '.join(READERS)} files")
    try:
        return reader(path)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(path, "contents", reason, f"not a readable {path.suffix} file") from error


def _read_parquet(path: Path) -> Recorded:
    table = pq.ParquetFile(path).read()
    missing = [column for column in PARQUET_COLUMNS if column not in table.column_names]
    if missing:
        raise InputError(path, "columns", ", ".join(table.column_names), f"there is no {', '.join(missing)}")
    _refuse_empty(path, len(table))
    meta = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    unclocked = meta.get("time") in ("none", "session-relative")
    known: dict[str, Any] = {}
    for column, name in (("session_id", "session"), ("turn", "turn"), ("tenant", "tenant")):
        if column in table.column_names:
            values = _numbers(path, table, column)
            known[name] = np.where(np.isnan(values), NO_ID, values)
    if "priority" in table.column_names:
        known["priority"] = np.nan_to_num(_numbers(path, table, "priority"), posinf=np.inf, neginf=-np.inf)
    if "gap_s" in table.column_names:
        known["gap_s"] = _numbers(path, table, "gap_s")
    if "class" in table.column_names:
        known["class_id"], known["class_names"] = _categories(table["class"])
    if "prefix_hash_ids" in table.column_names:
        known |= _prefixes(path, table["prefix_hash_ids"], meta.get("block_tokens"))
    if "new_user_tokens" in table.column_names:
        known |= {"prompts_accumulate": True, "prefix_block_tokens": CHAT_BLOCK_TOKENS}
    return _recorded(
        np.zeros(len(table)) if unclocked else _numbers(path, table, "arrived_at_s"),
        _numbers(path, table, "prompt_tokens"),
        _numbers(path, table, "output_tokens"),
        clocked=not unclocked,
        grid_s=MOONCAKE_GRID_S if "Mooncake" in meta.get("source", "") else 0.0,
        **known,
    )


def _read_csv(path: Path) -> Recorded:
    blanks = pyarrow.csv.ConvertOptions(strings_can_be_null=True)
    table = pyarrow.csv.read_csv(path, convert_options=blanks)
    _refuse_empty(path, len(table))
    if set(AZURE_COLUMNS) <= set(table.column_names):
        return _azure(path, table)
    if set(BURSTGPT_COLUMNS) <= set(table.column_names):
        return _burstgpt(path, table)
    expected = f"expected {', '.join(AZURE_COLUMNS)} (Azure) or {', '.join(BURSTGPT_COLUMNS)} (BurstGPT)"
    raise InputError(path, "columns", ", ".join(table.column_names), expected)


def _azure(path: Path, table: pa.Table) -> Recorded:
    """Azure LLM inference traces of 2023 and 2024; time counts from the first row."""
    arrived, prompt, output = AZURE_COLUMNS
    return _recorded(
        _clock(path, table, arrived), _numbers(path, table, prompt), _numbers(path, table, output)
    )


def _burstgpt(path: Path, table: pa.Table) -> Recorded:
    """BurstGPT; time counts from the first row. Failed requests have no output: see `zero_output`."""
    arrived, prompt, output = (_numbers(path, table, column) for column in BURSTGPT_COLUMNS)
    known: dict[str, Any] = {}
    if "Session ID" in table.column_names:
        known["session"], _ = _categories(table["Session ID"], unknown=None)
    if "Log Type" in table.column_names:
        known["class_id"], known["class_names"] = _categories(table["Log Type"])
    return _recorded(arrived - arrived[0], prompt, output, **known)


def _read_mooncake(path: Path) -> Recorded:
    """Mooncake's JSONL: milliseconds, and ids of 512-token blocks of which the last may be partial."""
    text = path.read_text(encoding="utf-8").rstrip()
    # line by line: pyarrow's JSON reader can crash the interpreter on malformed files
    rows = [_json_row(path, row, line) for row, line in enumerate(text.split("\n"))] if text else []
    _refuse_empty(path, len(rows))
    milliseconds, prompt, output = (_json_numbers(path, rows, column) for column in MOONCAKE_COLUMNS)
    on_grid = bool((milliseconds % (1000 * MOONCAKE_GRID_S) == 0).all())
    return _recorded(
        milliseconds / 1000,
        prompt,
        output,
        grid_s=MOONCAKE_GRID_S if on_grid else 0.0,
        **_prefixes(path, _json_lists(path, rows, "hash_ids"), str(MOONCAKE_BLOCK_TOKENS)),
    )


def _json_row(path: Path, row: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(path, f"row {row}", line[:60], f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(path, f"row {row}", line[:60], f"not an object with {', '.join(MOONCAKE_COLUMNS)}")
    return value


def _json_numbers(path: Path, rows: list[dict[str, Any]], name: str) -> np.ndarray:
    for row, values in enumerate(rows):
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**63:
            raise InputError(path, f"{name}, row {row}", value, "must be a number")
    return np.array([values[name] for values in rows], np.float64)


def _json_lists(path: Path, rows: list[dict[str, Any]], name: str) -> pa.ChunkedArray:
    lists = [values.get(name) for values in rows]
    for row, ids in enumerate(lists):
        known = ids is None or (isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**63 for i in ids))
        if not known:
            raise InputError(path, f"{name}, row {row}", str(ids)[:60], "must be a list of whole numbers")
    return pa.chunked_array([pa.array(lists, pa.list_(pa.int64()))])


READERS = {".parquet": _read_parquet, ".csv": _read_csv, ".jsonl": _read_mooncake}


def _recorded(arrived: np.ndarray, prompt: np.ndarray, output: np.ndarray, **known: Any) -> Recorded:
    """A trace of which only `known` is known."""
    n = len(arrived)
    unknown: dict[str, Any] = {column: np.full(n, NO_ID) for column in ("session", "turn", "tenant")}
    unknown |= {"priority": np.zeros(n, np.int64), "gap_s": np.full(n, np.nan)}
    unknown |= {"class_id": np.zeros(n, np.int64)}
    unknown |= {"prefix_offsets": np.zeros(n + 1, np.int64), "prefix_ids": np.zeros(0, np.int32)}
    if "session" in known and "turn" not in known:
        known["turn"] = _turns_in_order(known["session"])
    return Recorded(arrived, prompt, output, **unknown | known)


def _turns_in_order(session: np.ndarray) -> np.ndarray:
    """0-based number of each row among those of its session, -1 where the session is unknown."""
    order = np.argsort(session, kind="stable")
    _, first, counts = np.unique(session[order], return_index=True, return_counts=True)
    turn = np.empty(len(session), np.int64)
    turn[order] = np.arange(len(session)) - np.repeat(first, counts)
    return np.where(session == NO_ID, NO_ID, turn)


def _refuse_empty(path: Path, rows: int) -> None:
    if rows == 0:
        raise InputError(path, "rows", 0, "a trace needs at least one request")


def _numbers(path: Path, table: pa.Table, name: str) -> np.ndarray:
    """A column as numbers; what is missing is NaN."""
    column = table[name]
    if pa.types.is_null(column.type):
        return np.full(len(column), np.nan)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        values = column.to_pylist()
        row = next((i for i, value in enumerate(values) if not _is_number(value)), 0)
        raise InputError(path, f"{name}, row {row}", values[row], "must be a number")
    return column.to_numpy()


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


def _clock(path: Path, table: pa.Table, name: str) -> np.ndarray:
    """A column of dates and times as seconds from its first row."""
    column = table[name]
    values = column.to_pylist() if not pa.types.is_timestamp(column.type) or column.null_count else []
    for row, value in enumerate(values):
        if value is None or not _is_time(value):
            raise InputError(path, f"{name}, row {row}", value, "must be a date and time")
    stamp = pa.timestamp("ns", tz=getattr(column.type, "tz", None))
    nanoseconds = column.cast(stamp).cast(pa.int64()).to_numpy()
    return (nanoseconds - nanoseconds[0]) * 1e-9


def _is_time(value: object) -> bool:
    try:
        pa.scalar(value).cast(pa.timestamp("ns"))
    except pa.ArrowException:
        return False
    return True


def _categories(
    column: pa.ChunkedArray, unknown: str | None = "default"
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Codes [N] and names; an empty cell is `unknown`, or -1 where that is None."""
    if unknown is not None:
        column = pc.fill_null(column.cast(pa.string()), unknown)
    encoded = column.combine_chunks().dictionary_encode()
    codes = encoded.indices.fill_null(NO_ID).to_numpy(zero_copy_only=False)
    return codes, tuple(str(name) for name in encoded.dictionary.to_pylist())


def _prefixes(path: Path, column: pa.ChunkedArray, block_tokens: str | None) -> dict[str, Any]:
    """Ragged ids of a list column; nothing where all lists are empty."""
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise InputError(path, "prefix ids", str(kind), "must be lists of whole numbers")
    counts = pc.list_value_length(column).fill_null(0).to_numpy()
    ids = pc.list_flatten(column)
    if len(ids) == 0:
        return {}
    if not pa.types.is_integer(ids.type) or ids.null_count:
        raise InputError(path, "prefix ids", str(ids.type), "must be lists of whole numbers")
    if block_tokens is None or not block_tokens.isdigit() or int(block_tokens) == 0:
        raise InputError(path, "metadata block_tokens", block_tokens, "prefix ids need the tokens of a block")
    offsets = row_offsets(counts)
    negative = np.repeat(np.arange(len(counts)), counts)[ids.to_numpy() < 0]
    check_rows(str(path), "prefix ids", counts, np.isin(np.arange(len(counts)), negative), "ids are >= 0")
    return {
        "prefix_offsets": offsets,
        "prefix_ids": dense(ids.to_numpy()),
        "prefix_block_tokens": int(block_tokens),
    }

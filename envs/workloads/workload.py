"""The workload contract: equal-length arrays, one row a request, validated once at the door."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from servegym.errors import InputError

MAX_TOKENS = 2_000_000  # beyond any context window in use; larger values are units gone wrong
NO_ID = -1


@dataclass(frozen=True)
class Workload:
    """Requests of one cluster, sorted by arrival.

    Shapes: every array has N rows, but `prefix_offsets` (N + 1) and `prefix_ids` (flat).

    Attributes:
        name: where the requests come from; a file's path or a generator's name.
        arrived_at_s: float64, seconds from the start of the window. For a closed-loop turn it is a nominal
            value that only orders the rows; the real arrival is the finish of `after` plus `gap_s`.
        prompt_tokens, output_tokens: int32, at least 1.
        class_id: int16 index into `class_names`.
        priority: int16, lower is more urgent (as in vLLM); 0 is normal.
        tenant, session: int32; -1 unknown.
        turn: int32, 0-based request number in the session; -1 unknown.
        after: int32 row of the request whose finish starts this one's gap; -1 for open-loop arrivals.
            Always an earlier row, and each row is followed by at most one other.
        gap_s: float64, seconds between the finish of `after` and this arrival; 0 for open-loop rows.
        prefix_offsets, prefix_ids: row i's chained prefix-block ids are
            `prefix_ids[prefix_offsets[i]:prefix_offsets[i + 1]]`, int32. Id k covers tokens
            [k * prefix_block_tokens, (k + 1) * prefix_block_tokens) of prompt + output; equal ids mean an
            equal prefix up to that block. Ids past the prompt name blocks that the request itself generates
            and a later turn may hit. Rows without prefix information have no ids.
        prefix_block_tokens: tokens of a prefix block; 0 where the workload has no prefix information.
        class_names: names of the classes.
    """

    name: str
    arrived_at_s: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    class_id: np.ndarray
    priority: np.ndarray
    tenant: np.ndarray
    session: np.ndarray
    turn: np.ndarray
    after: np.ndarray
    gap_s: np.ndarray
    prefix_offsets: np.ndarray
    prefix_ids: np.ndarray
    prefix_block_tokens: int = 0
    class_names: tuple[str, ...] = field(default=("default",))

    def __len__(self) -> int:
        return len(self.arrived_at_s)

    @property
    def max_output_tokens(self) -> int:
        """Largest output of the workload; what a deployment would set as max_tokens."""
        return int(self.output_tokens.max())

    @property
    def rate_rps(self) -> float:
        """Mean arrival rate in requests/s over the span from 0 to the last arrival."""
        return len(self) / max(float(self.arrived_at_s[-1]), 1e-9)


def make_workload(
    name: str,
    arrived_at_s: Sequence[float] | np.ndarray,
    prompt_tokens: Sequence[int] | np.ndarray,
    output_tokens: Sequence[int] | np.ndarray,
    *,
    class_id: np.ndarray | None = None,
    priority: np.ndarray | None = None,
    tenant: np.ndarray | None = None,
    session: np.ndarray | None = None,
    turn: np.ndarray | None = None,
    after: np.ndarray | None = None,
    gap_s: np.ndarray | None = None,
    prefix_offsets: np.ndarray | None = None,
    prefix_ids: np.ndarray | None = None,
    prefix_block_tokens: int = 0,
    class_names: tuple[str, ...] = ("default",),
) -> Workload:
    """Fill in what is unknown, check everything and return the workload.

    Raises:
        InputError: naming the column, the row and the value, for entries that are negative, NaN, unsorted,
            zero-token or over-long, and for arrays of unequal length.
    """
    n = len(arrived_at_s)

    def column(values: np.ndarray | None, default: int, dtype: type) -> np.ndarray:
        return np.full(n, default, dtype) if values is None else np.ascontiguousarray(values, dtype)

    workload = Workload(
        name=name,
        arrived_at_s=np.ascontiguousarray(arrived_at_s, np.float64),
        prompt_tokens=_tokens(name, "prompt_tokens", prompt_tokens),
        output_tokens=_tokens(name, "output_tokens", output_tokens),
        class_id=column(class_id, 0, np.int16),
        priority=column(priority, 0, np.int16),
        tenant=column(tenant, NO_ID, np.int32),
        session=column(session, NO_ID, np.int32),
        turn=column(turn, NO_ID, np.int32),
        after=column(after, NO_ID, np.int32),
        gap_s=column(gap_s, 0, np.float64),
        prefix_offsets=np.zeros(n + 1, np.int64)
        if prefix_offsets is None
        else np.ascontiguousarray(prefix_offsets, np.int64),
        prefix_ids=np.zeros(0, np.int32)
        if prefix_ids is None
        else np.ascontiguousarray(prefix_ids, np.int32),
        prefix_block_tokens=prefix_block_tokens,
        class_names=class_names,
    )
    _validate(workload)
    return workload


def _tokens(name: str, column: str, values: Sequence[int] | np.ndarray) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(array) | (array != np.floor(array)))
        if bad.size:
            _refuse(name, column, array, int(bad[0]), "token counts are whole numbers")
    bad = np.flatnonzero((array < 1) | (array > MAX_TOKENS))
    if bad.size:
        _refuse(
            name, column, array, int(bad[0]), f"token counts lie in 1..{MAX_TOKENS}; drop or mend the row"
        )
    return np.ascontiguousarray(array, np.int32)


def _refuse(name: str, column: str, values: np.ndarray, row: int, hint: str) -> None:
    raise InputError(name, f"{column}, row {row}", values[row].item(), hint)


def _validate(w: Workload) -> None:
    n = len(w)
    if n == 0:
        raise InputError(w.name, "rows", 0, "a workload needs at least one request")
    for column in (
        "prompt_tokens",
        "output_tokens",
        "class_id",
        "priority",
        "tenant",
        "session",
        "turn",
        "after",
        "gap_s",
    ):
        if len(getattr(w, column)) != n:
            raise InputError(w.name, column, len(getattr(w, column)), f"expected {n} rows like arrived_at_s")
    _check(
        w,
        "arrived_at_s",
        ~np.isfinite(w.arrived_at_s) | (w.arrived_at_s < 0),
        "arrival seconds are finite and >= 0",
    )
    _check(
        w,
        "arrived_at_s",
        np.r_[False, np.diff(w.arrived_at_s) < 0],
        "rows are sorted by arrival; sort the file",
    )
    _check(w, "gap_s", ~np.isfinite(w.gap_s) | (w.gap_s < 0), "gaps are finite and >= 0")
    _check(
        w, "class_id", (w.class_id < 0) | (w.class_id >= len(w.class_names)), "not an index into class_names"
    )
    _check(w, "after", (w.after < NO_ID) | (w.after >= np.arange(n)), "must be -1 or an earlier row")
    _check_followers(w)
    _check_prefixes(w)


def _check(w: Workload, column: str, bad: np.ndarray, hint: str) -> None:
    rows = np.flatnonzero(bad)
    if rows.size:
        _refuse(w.name, column, getattr(w, column), int(rows[0]), hint)


def _check_followers(w: Workload) -> None:
    rows = np.flatnonzero(w.after >= 0)
    _, first = np.unique(w.after[rows], return_index=True)
    if len(first) < len(rows):
        row = int(np.setdiff1d(np.arange(len(rows)), first)[0])
        _refuse(w.name, "after", w.after, int(rows[row]), "each request is followed by at most one other")


def _check_prefixes(w: Workload) -> None:
    offsets = w.prefix_offsets
    if (
        len(offsets) != len(w) + 1
        or offsets[0] != 0
        or offsets[-1] != len(w.prefix_ids)
        or (np.diff(offsets) < 0).any()
    ):
        raise InputError(
            w.name,
            "prefix_offsets",
            offsets[[0, -1]].tolist(),
            "must rise from 0 to len(prefix_ids), N + 1 rows",
        )
    if len(w.prefix_ids) == 0:
        return
    if w.prefix_block_tokens < 1:
        raise InputError(
            w.name, "prefix_block_tokens", w.prefix_block_tokens, "prefix ids need their block size"
        )
    if (w.prefix_ids < 0).any():
        raise InputError(w.name, "prefix_ids", int(w.prefix_ids.min()), "ids are >= 0")
    blocks = (w.prompt_tokens.astype(np.int64) + w.output_tokens) // w.prefix_block_tokens
    too_many = np.flatnonzero(np.diff(offsets) > blocks)
    if too_many.size:
        row = int(too_many[0])
        raise InputError(
            w.name,
            f"prefix_ids, row {row}",
            int(offsets[row + 1] - offsets[row]),
            f"prompt + output hold only {blocks[row]} full blocks",
        )

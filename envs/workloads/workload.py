"""The workload contract: equal-length arrays, one row a request, validated once at the door."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from servegym.envs.workloads.checks import (
    check_rows,
    check_seconds,
    check_sorted,
    check_tokens,
    check_whole_numbers,
    refuse,
)
from servegym.errors import InputError

NO_ID = -1
_DTYPES: dict[str, type] = {
    "class_id": np.int16,
    "priority": np.int16,
    "tenant": np.int32,
    "session": np.int32,
    "turn": np.int32,
    "after": np.int32,
}
_UNKNOWN = {"class_id": 0, "priority": 0, "tenant": NO_ID, "session": NO_ID, "turn": NO_ID, "after": NO_ID}


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
    given = {
        "class_id": class_id,
        "priority": priority,
        "tenant": tenant,
        "session": session,
        "turn": turn,
        "after": after,
    }
    integers = {
        column: check_whole_numbers(name, column, np.asarray(values), _DTYPES[column])
        if values is not None
        else np.full(n, _UNKNOWN[column], _DTYPES[column])
        for column, values in given.items()
    }
    workload = Workload(
        name=name,
        arrived_at_s=np.ascontiguousarray(arrived_at_s, np.float64),
        prompt_tokens=check_tokens(name, "prompt_tokens", np.asarray(prompt_tokens)),
        output_tokens=check_tokens(name, "output_tokens", np.asarray(output_tokens)),
        **integers,
        gap_s=np.zeros(n) if gap_s is None else np.ascontiguousarray(gap_s, np.float64),
        prefix_offsets=np.ascontiguousarray(
            np.zeros(n + 1) if prefix_offsets is None else prefix_offsets, np.int64
        ),
        prefix_ids=np.ascontiguousarray([] if prefix_ids is None else prefix_ids, np.int32),
        prefix_block_tokens=prefix_block_tokens,
        class_names=class_names,
    )
    _validate(workload)
    return workload


def _validate(w: Workload) -> None:
    n = len(w)
    if n == 0:
        raise InputError(w.name, "rows", 0, "a workload needs at least one request")
    for column in ("prompt_tokens", "output_tokens", "gap_s", *_DTYPES):
        if len(getattr(w, column)) != n:
            raise InputError(w.name, column, len(getattr(w, column)), f"expected {n} rows like arrived_at_s")
    check_seconds(w.name, "arrived_at_s", w.arrived_at_s)
    check_sorted(w.name, "arrived_at_s", w.arrived_at_s)
    check_seconds(w.name, "gap_s", w.gap_s)
    not_a_class = (w.class_id < 0) | (w.class_id >= len(w.class_names))
    check_rows(w.name, "class_id", w.class_id, not_a_class, "not an index into class_names")
    not_earlier = (w.after < NO_ID) | (w.after >= np.arange(n))
    check_rows(w.name, "after", w.after, not_earlier, "must be -1 or an earlier row")
    _check_followers(w)
    _check_prefixes(w)


def _check_followers(w: Workload) -> None:
    rows = np.flatnonzero(w.after >= 0)
    _, first = np.unique(w.after[rows], return_index=True)
    if len(first) < len(rows):
        row = int(np.setdiff1d(np.arange(len(rows)), first)[0])
        refuse(w.name, "after", w.after, int(rows[row]), "each request is followed by at most one other")


def _check_prefixes(w: Workload) -> None:
    offsets, ids, block = w.prefix_offsets, w.prefix_ids, w.prefix_block_tokens
    ends = [0, len(ids)]
    if len(offsets) != len(w) + 1 or (np.diff(offsets) < 0).any() or offsets[[0, -1]].tolist() != ends:
        raise InputError(
            w.name, "prefix_offsets", offsets.shape, f"must rise from 0 to {ends[1]}, N + 1 of them"
        )
    if len(ids) == 0:
        return
    if block < 1:
        raise InputError(w.name, "prefix_block_tokens", block, "prefix ids need their block size")
    negative = np.flatnonzero(ids < 0)
    if negative.size:
        row = int(np.searchsorted(offsets, negative[0], side="right")) - 1
        raise InputError(w.name, f"prefix_ids, row {row}", int(ids[negative[0]]), "ids are at least 0")
    full = (w.prompt_tokens.astype(np.int64) + w.output_tokens) // block
    owned = np.diff(offsets)
    check_rows(w.name, "prefix_ids", owned, owned > full, "more ids than prompt + output have full blocks")

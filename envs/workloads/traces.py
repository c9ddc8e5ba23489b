"""Recorded traces as workloads."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from servegym.envs.workloads.checks import (
    MAX_SECONDS,
    check_at_least_zero,
    check_positive,
    check_rows,
    check_sorted,
    check_tokens,
    check_whole,
    check_whole_numbers,
)
from servegym.envs.workloads.formats import Recorded, read
from servegym.envs.workloads.prefixes import (
    chained_ids,
    continued_rows,
    dense,
    extend_over_outputs,
    full_blocks,
    take_rows,
)
from servegym.envs.workloads.sessions import arrange, on_ring, session_units, user_gaps
from servegym.envs.workloads.transforms import head, scale_rate, window
from servegym.envs.workloads.workload import NO_ID, Workload, make_workload
from servegym.errors import InputError

SPREAD_SEED = 0  # of the arrivals inside a grid step: the same trace is the same for everybody


def load(
    path: str | Path,
    *,
    start_s: float | None = None,
    duration_s: float | None = None,
    limit: int | None = None,
    rate_rps: float | None = None,
    seed: int = 0,
    zero_output: str = "refuse",
) -> Workload:
    """Load a recorded trace.

    Formats: `.csv` of Azure (2023, 2024) and BurstGPT and `.jsonl` of Mooncake as published; `.parquet` with
    the columns arrived_at_s, prompt_tokens, output_tokens and, where known, session_id, turn, class, tenant,
    priority, gap_s, prefix_hash_ids (with `block_tokens` in the file's metadata), new_user_tokens (prompts
    accumulate).
    With `time` = none or session-relative in the metadata the sessions have no common clock: they start as a
    Poisson process within rows / rate seconds and are played closed-loop. What runs over the end comes in at
    the start as another session, already in progress, so that the rate is stationary. Gaps that the file does
    not know are drawn from the fit of mooncake_conversation.

    Arrivals on Mooncake's 3 s grid are spread by uniform(0, 3 s), always the same draw. Prefix ids are
    renumbered 0..U-1; a row also names the blocks of its own output where the next turn begins with them.
    Where sessions are unknown but prefixes are not, a row continues the latest row that it begins with.

    Args:
        path: the file.
        start_s: start of the window, seconds; 0 by default.
        duration_s: length of the window, seconds; up to the end by default.
        limit: keep at most this many requests.
        rate_rps: mean rate in requests/s; compresses the time of a trace with a clock (see `scale_rate`),
            required without one.
        seed: seed of session starts and unknown gaps; unused where the trace has a clock and gaps.
        zero_output: what to do with requests without output, failures in most traces: "refuse" or "drop".

    Raises:
        InputError: naming the file, the column, the row and the value.
    """
    name = str(path)
    if zero_output not in ("refuse", "drop"):
        raise InputError(name, "zero_output", zero_output, "is refuse or drop")
    recorded = _checked(name, read(path), zero_output)
    if recorded.clocked:
        w = _on_clock(name, recorded, start_s, duration_s, limit)
        return w if rate_rps is None else scale_rate(w, rate_rps)
    if rate_rps is None:
        raise InputError(name, "rate_rps", None, "the trace has no clock across sessions; give a rate")
    w = _closed_loop(
        name, recorded, check_positive(name, "rate_rps", rate_rps), check_whole(name, "seed", seed, 0)
    )
    if start_s is not None or duration_s is not None:
        w = window(w, start_s or 0.0, MAX_SECONDS if duration_s is None else duration_s)
    return w if limit is None else head(w, limit)


def _checked(name: str, r: Recorded, zero_output: str) -> Recorded:
    """Refuse what cannot be played, by its row in the file; leave out rows without output where asked to."""
    untimed = ~np.isfinite(r.arrived_at_s) | (r.arrived_at_s < 0)
    check_rows(name, "arrived_at_s", r.arrived_at_s, untimed, "arrival seconds are finite and at least 0")
    check_sorted(name, "arrived_at_s", r.arrived_at_s)
    check_rows(name, "gap_s", r.gap_s, (r.gap_s < 0) | np.isinf(r.gap_s), "gaps are finite and at least 0")
    lost = r.output_tokens == 0
    if lost.all():
        raise InputError(name, "output_tokens", 0, "no request has any output")
    if zero_output == "refuse":
        hint = f"{lost.sum()} requests have no output; zero_output='drop' leaves them out"
        check_rows(name, "output_tokens", r.output_tokens, lost, hint)
    checked = replace(
        r,
        prompt_tokens=check_tokens(name, "prompt_tokens", np.where(lost, 1, r.prompt_tokens)),
        output_tokens=check_tokens(name, "output_tokens", r.output_tokens, least=0),
        session=check_whole_numbers(name, "session", r.session, np.int32),
        turn=check_whole_numbers(name, "turn", r.turn, np.int32),
        tenant=check_whole_numbers(name, "tenant", r.tenant, np.int32),
        priority=check_whole_numbers(name, "priority", r.priority, np.int16),
    )
    return _take(checked, np.flatnonzero(~lost))


def _take(r: Recorded, rows: np.ndarray) -> Recorded:
    """The given rows, with the ids of full prompt blocks only."""
    ragged = ("prefix_offsets", "prefix_ids")
    columns = {
        f.name: getattr(r, f.name)[rows]
        for f in fields(r)
        if f.name not in ragged and isinstance(getattr(r, f.name), np.ndarray)
    }
    counts = np.diff(r.prefix_offsets)[rows]
    if len(r.prefix_ids):
        counts = np.minimum(counts, columns["prompt_tokens"] // r.prefix_block_tokens)
    offsets, ids = take_rows(r.prefix_offsets, r.prefix_ids, rows, counts)
    return replace(r, **columns, prefix_offsets=offsets, prefix_ids=ids)


def _on_clock(
    name: str, r: Recorded, start_s: float | None, duration_s: float | None, limit: int | None
) -> Workload:
    """Open-loop requests at their recorded times."""
    start = 0.0 if start_s is None else check_at_least_zero(name, "start_s", start_s)
    stop = np.inf if duration_s is None else start + check_positive(name, "duration_s", duration_s)
    arrived = r.arrived_at_s + np.random.default_rng(SPREAD_SEED).uniform(0, r.grid_s, len(r.arrived_at_s))
    order = np.argsort(arrived, kind="stable")
    first, last = np.searchsorted(arrived[order], [start, stop])
    if first == last:
        span = f"requests arrive in 0..{arrived.max():.1f} s"
        raise InputError(name, "window", (start, duration_s), f"no request in it; {span}")
    order = order[first:last][: None if limit is None else check_whole(name, "limit", limit, 1)]
    r = replace(_take(r, order), arrived_at_s=arrived[order] - start)
    if len(r.prefix_ids) and (r.session == NO_ID).all():
        r, next_row = _inferred_sessions(r)
    else:
        next_row = _next_in_session(r.session)
    return _workload(name, r, next_row, np.full(len(order), NO_ID))


def _closed_loop(name: str, r: Recorded, rate_rps: float, seed: int) -> Workload:
    """Sessions on a ring (see `sessions`); each turn follows the answer to the last one."""
    unit = session_units(r.session)
    order = np.lexsort((r.turn, unit))
    r, unit = _take(r, order), unit[order]
    start_rng, gap_rng = np.random.default_rng(seed).spawn(2)
    gap_s = np.where(np.isnan(r.gap_s), user_gaps(gap_rng, r.output_tokens), r.gap_s)
    nominal_s, session, cut_off = on_ring(start_rng, unit, gap_s, r.output_tokens, rate_rps)
    # what was cut off plays before its beginning, and must not warm the cache for it
    own = np.repeat(np.where(cut_off, session + 1, 0), np.diff(r.prefix_offsets))
    ids = own * (r.prefix_ids.max(initial=0) + 1) + r.prefix_ids
    order, after = arrange(session, nominal_s)
    session = np.where(r.session == NO_ID, NO_ID, session)
    r = replace(r, arrived_at_s=nominal_s, gap_s=gap_s, session=session, prefix_ids=ids)
    r = _take(r, order)
    return _workload(name, r, _next_in_session(r.session), after)


def _workload(name: str, r: Recorded, next_row: np.ndarray, after: np.ndarray) -> Workload:
    offsets, ids = r.prefix_offsets, r.prefix_ids
    if r.prefix_block_tokens:
        next_prompt = np.where(next_row >= 0, r.prompt_tokens[next_row], 0)
        blocks = full_blocks(r.prompt_tokens, r.output_tokens, next_prompt, r.prefix_block_tokens)
        if r.prompts_accumulate:
            unit = session_units(r.session)
            alone = np.arange(unit.max() + 1)
            offsets, ids = chained_ids(unit, blocks, alone, np.zeros_like(alone))
        else:
            offsets, ids = extend_over_outputs(offsets, ids, next_row, blocks)
    return make_workload(
        name,
        r.arrived_at_s,
        r.prompt_tokens,
        r.output_tokens,
        class_id=r.class_id,
        priority=r.priority,
        tenant=r.tenant,
        session=r.session,
        turn=r.turn,
        after=after,
        gap_s=np.where(after >= 0, r.gap_s, 0),
        prefix_offsets=offsets,
        prefix_ids=dense(ids),
        prefix_block_tokens=r.prefix_block_tokens,
        class_names=r.class_names,
    )


def _next_in_session(session: np.ndarray) -> np.ndarray:
    """Row of each session's next request, -1 for none; rows are in time order, [N]."""
    order = np.argsort(session, kind="stable")
    same = (session[order][1:] == session[order][:-1]) & (session[order][1:] != NO_ID)
    next_row = np.full(len(session), NO_ID)
    next_row[order[:-1][same]] = order[1:][same]
    return next_row


def _inferred_sessions(r: Recorded) -> tuple[Recorded, np.ndarray]:
    """Sessions from prefixes: (the trace with session and turn, first row that continues each or -1)."""
    parent = continued_rows(r.prefix_offsets, r.prefix_ids)
    rows = np.arange(len(parent))
    session, turn = rows.copy(), np.zeros(len(parent), np.int64)
    for row in np.flatnonzero(parent >= 0):
        session[row], turn[row] = session[parent[row]], turn[parent[row]] + 1
    next_row = np.full(len(parent), NO_ID)
    continuing = rows[parent >= 0][::-1]
    next_row[parent[continuing]] = continuing
    return replace(r, session=session_units(session), turn=turn), next_row

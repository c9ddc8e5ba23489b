"""Workload in, workload out: windows, rates, classes. Followers and prefixes stay consistent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from servegym.envs.workloads.checks import check_at_least_zero, check_positive, check_whole
from servegym.envs.workloads.prefixes import dense, take_rows
from servegym.envs.workloads.sessions import session_units
from servegym.envs.workloads.workload import NO_ID, Workload, make_workload
from servegym.errors import InputError


def window(w: Workload, start_s: float, duration_s: float) -> Workload:
    """Requests that arrive in [start_s, start_s + duration_s), counted from start_s on.

    A closed-loop turn whose predecessor lies before the window arrives at its nominal time.
    """
    check_at_least_zero(w.name, "start_s", start_s)
    check_positive(w.name, "duration_s", duration_s)
    first, last = np.searchsorted(w.arrived_at_s, [start_s, start_s + duration_s])
    if first == last:
        span = f"requests arrive in 0..{w.arrived_at_s[-1]:.1f} s"
        raise InputError(w.name, "window", (start_s, duration_s), f"no request in it; {span}")
    return _rows(w, slice(first, last), start_s)


def head(w: Workload, n: int) -> Workload:
    """The first `n` requests, or all where there are fewer."""
    return _rows(w, slice(0, check_whole(w.name, "n", n, 1)), 0.0)


def slice_rows(w: Workload, first: int, n: int) -> Workload:
    """`n` requests from row `first` on, counted from the arrival of the first; see `window`."""
    check_whole(w.name, "n", n, 1)
    if not 0 <= first <= len(w) - n:
        raise InputError(w.name, "first", first, f"{n} rows from there are not within 0..{len(w)}")
    return _rows(w, slice(first, first + n), float(w.arrived_at_s[first]))


def scale_rate(w: Workload, rate_rps: float) -> Workload:
    """The same requests at a mean rate of `rate_rps`: all times, gaps too, are compressed by one factor.

    Bursts keep their shape, and as many other requests lie between two turns of a session as before.
    """
    factor = w.rate_rps / check_positive(w.name, "rate_rps", rate_rps)
    return _changed(w, arrived_at_s=w.arrived_at_s * factor, gap_s=w.gap_s * factor)


def scale_lengths(w: Workload, factor: float) -> Workload:
    """Prompts and outputs `factor` times as long, each of one token at least; prefix blocks shrink alike.

    Raises:
        InputError: for a factor of 0 or less, or one that leaves no whole number of tokens in a prefix block.
    """
    check_positive(w.name, "factor", factor)
    prompt, output = (
        np.maximum(np.rint(tokens * factor), 1).astype(np.int64)
        for tokens in (w.prompt_tokens, w.output_tokens)
    )
    block = round(w.prefix_block_tokens * factor)
    if abs(block - w.prefix_block_tokens * factor) > 1e-6 or (w.prefix_block_tokens and not block):
        hint = f"must leave a whole number of the {w.prefix_block_tokens} tokens of a prefix block"
        raise InputError(w.name, "factor", factor, hint)
    owned = np.diff(w.prefix_offsets)
    kept = np.minimum(owned, (prompt + output) // block) if block else owned
    offsets, ids = take_rows(w.prefix_offsets, w.prefix_ids, np.arange(len(w)), kept)
    return _changed(
        w,
        prompt_tokens=prompt,
        output_tokens=output,
        prefix_offsets=offsets,
        prefix_ids=dense(ids),
        prefix_block_tokens=block,
    )


def open_loop(w: Workload) -> Workload:
    """Every request arrives at its nominal time, whenever its predecessor finishes."""
    return _changed(w, after=None, gap_s=None)


def assign(
    w: Workload,
    *,
    classes: Mapping[str, float] | None = None,
    priorities: Mapping[int, float] | None = None,
    tenants: Mapping[int, float] | None = None,
    seed: int = 0,
) -> Workload:
    """Draw classes, priorities or tenants with the given fractions; a session keeps one of each.

    Args:
        w: the workload.
        classes: name -> fraction of the sessions (single requests count as sessions); fractions sum to 1.
        priorities: priority -> fraction; lower is more urgent.
        tenants: tenant -> fraction.
        seed: seed of the draws.
    """
    streams = np.random.default_rng(check_whole(w.name, "seed", seed, 0)).spawn(3)
    changes: dict[str, Any] = {}
    if classes is not None:
        changes["class_names"] = tuple(classes)
        changes["class_id"] = _draw(w, "classes", classes, streams[0])
    if priorities is not None:
        changes["priority"] = np.array(list(priorities))[_draw(w, "priorities", priorities, streams[1])]
    if tenants is not None:
        changes["tenant"] = np.array(list(tenants))[_draw(w, "tenants", tenants, streams[2])]
    return _changed(w, **changes)


def prioritise(w: Workload, class_priority: Mapping[str, int]) -> Workload:
    """Give every request the priority of its class; classes that are not named keep theirs.

    Raises:
        InputError: for a class that the workload does not have.
    """
    priority = w.priority.copy()
    for name, level in class_priority.items():
        if name not in w.class_names:
            hint = f"the workload's classes are {', '.join(w.class_names)}"
            raise InputError(w.name, "class_priority", name, hint)
        priority[w.class_id == w.class_names.index(name)] = level
    return _changed(w, priority=priority)


def _draw(w: Workload, field: str, fractions: Mapping[Any, float], rng: np.random.Generator) -> np.ndarray:
    """Index of the option of each request, [N]."""
    p = np.array(list(fractions.values()), np.float64)
    if not (p.size and (p >= 0).all() and abs(p.sum() - 1) < 1e-6):
        raise InputError(w.name, field, dict(fractions), "fractions are at least 0 and sum to 1")
    unit = session_units(w.session)
    return rng.choice(len(p), size=int(unit.max()) + 1, p=p / p.sum())[unit]


def _rows(w: Workload, rows: slice, start_s: float) -> Workload:
    """Neighbouring rows, their times counted from start_s."""
    picked = np.arange(len(w))[rows]
    offsets, ids = take_rows(w.prefix_offsets, w.prefix_ids, picked)
    after = np.maximum(w.after[rows] - picked[0], NO_ID)
    changes = {column: getattr(w, column)[rows] for column in _COLUMNS}
    changes["arrived_at_s"] = w.arrived_at_s[rows] - start_s
    changes["gap_s"] = np.where(after >= 0, w.gap_s[rows], 0.0)
    return _changed(w, **changes | {"after": after, "prefix_offsets": offsets, "prefix_ids": dense(ids)})


_COLUMNS = ("prompt_tokens", "output_tokens", "class_id", "priority", "tenant", "session", "turn")


def _changed(w: Workload, **changes: Any) -> Workload:
    return make_workload(**{f.name: getattr(w, f.name) for f in fields(w)} | changes)

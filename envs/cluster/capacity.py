"""Saturation: how many requests a second a fleet finishes when it never runs out of work."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from servegym.envs.cluster.settings import setting_of_spec
from servegym.envs.cluster.simulate import simulate
from servegym.envs.cluster.spec import ClusterSpec, InstanceSpec
from servegym.envs.costs import load_profile
from servegym.envs.workloads.prefixes import take_rows
from servegym.envs.workloads.workload import Workload
from servegym.errors import InputError

SAMPLE = 2048  # requests; several times what an instance runs at once
_known: dict[tuple, float] = {}


def saturation_rps(cluster: ClusterSpec, workload: Workload) -> float:
    """Offered load in requests/s beyond which the queues of a fleet grow without bound.

    Sum over the instances of the rate at which each alone finishes the workload's first 2,048 requests (those
    that fit it), all there at time 0: half of them over the time between the first and third quartile of the
    finishes, so that neither the empty start nor the last stragglers count.

    Raises:
        InputError: where no instance can take any of the requests.
    """
    rate = sum(_instance_rps(spec, cluster.prefix_caching, workload) for spec in cluster.instances)
    if rate == 0:
        longest = int((workload.prompt_tokens + workload.output_tokens).min())
        raise InputError(workload.name, "prompt_tokens + output_tokens", longest, f"exceeds {cluster.name}")
    return rate


def _instance_rps(spec: InstanceSpec, caching: bool, w: Workload) -> float:
    key = (spec, caching, w.name, len(w), int(w.prompt_tokens.sum()), int(w.output_tokens.sum()))
    if key not in _known:
        _known[key] = _measured(spec, caching, w)
    return _known[key]


def _measured(spec: InstanceSpec, caching: bool, w: Workload) -> float:
    rows = np.arange(min(len(w), SAMPLE))
    tokens = w.prompt_tokens[rows].astype(np.int64) + w.output_tokens[rows]
    rows = rows[tokens <= _room(spec)]
    if len(rows) == 0:
        return 0.0
    alone = ClusterSpec("one instance", (replace(spec, drain_at_s=None),), caching)
    records = simulate(alone, _offline(w, rows))
    finished = np.sort(records.finished_s)
    first, third = finished[len(rows) // 4], finished[3 * len(rows) // 4]
    if third == first:
        return len(rows) / float(finished[-1])
    return (3 * len(rows) // 4 - len(rows) // 4) / float(third - first)


def _room(spec: InstanceSpec) -> int:
    """Largest request in tokens that the instance can hold."""
    setting = setting_of_spec("saturation", spec, load_profile(spec.profile))
    return (setting.blocks - setting.watermark) * setting.block_tokens


def _offline(w: Workload, rows: np.ndarray) -> Workload:
    """The given requests, all there at time 0, in their order."""
    offsets, ids = take_rows(w.prefix_offsets, w.prefix_ids, rows)
    columns = ("prompt_tokens", "output_tokens", "class_id", "priority", "tenant", "session", "turn")
    return replace(
        w,
        **{name: getattr(w, name)[rows] for name in columns},
        arrived_at_s=np.zeros(len(rows)),
        after=np.full(len(rows), -1, np.int32),
        gap_s=np.zeros(len(rows)),
        prefix_offsets=offsets,
        prefix_ids=ids,
    )

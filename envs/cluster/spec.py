"""What a cluster is made of: instances, each a profile and its engine settings."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from servegym.errors import InputError

QUEUE_POLICIES = ("fcfs", "priority")
PREEMPTIONS = ("recompute", "swap")


@dataclass(frozen=True)
class InstanceSpec:
    """One engine replica; None takes the profile's default.

    Attributes:
        profile: name of a shipped profile, or a path to one.
        kv_blocks: blocks of KV memory.
        block_tokens: tokens of a KV block.
        token_budget: most tokens of an iteration (vLLM: max_num_batched_tokens).
        max_seqs: most running requests (vLLM: max_num_seqs).
        watermark: fraction of the blocks that admission leaves free.
        queue: `fcfs`, or `priority` by (priority, arrival) as in vLLM's scheduling policies.
        reserve_prompt: admit a request only when its whole prompt fits, not just its first chunk
            (vLLM: scheduler_reserve_full_isl).
        async_scheduling: choose each iteration while the one before it runs (vLLM: async_scheduling).
        preemption: what becomes of a victim by default: `recompute`, or `swap` to host memory.
        swap_gib: host memory for swapped KV, GiB; 0 leaves recompute only (vLLM 0.x: swap_space).
        swap_group: KV blocks that a copy between device and host carries: 1 as vLLM 0.x, more as FastSwitch
            (arXiv 2411.18424).
        drain_at_s: from this time on the instance gets no new requests; None: never.
    """

    profile: str
    kv_blocks: int | None = None
    block_tokens: int | None = None
    token_budget: int | None = None
    max_seqs: int | None = None
    watermark: float = 0.0
    queue: str = "fcfs"
    reserve_prompt: bool = True
    async_scheduling: bool = False
    preemption: str = "recompute"
    swap_gib: float = 0.0
    swap_group: int = 1
    drain_at_s: float | None = None


@dataclass(frozen=True)
class Migration:
    """Live migration of requests between instances, as in Llumnix (OSDI'24).

    Attributes:
        period_s: time between two occasions to migrate, seconds.
        last_blocks: when so few blocks are left to copy, the request stops and they go in one last copy.
        stages: live copies after which a migration is given up.
        slowdown: fraction by which iterations take longer beside a copy (Llumnix, figure 10: 0.010 to 0.032).
    """

    period_s: float = 0.5
    last_blocks: int = 16
    stages: int = 3
    slowdown: float = 0.023


@dataclass(frozen=True)
class ClusterSpec:
    """A fleet of instances.

    Attributes:
        name: what tables call it, for example `2xa100+2xh100`.
        instances: one entry a replica.
        prefix_caching: reuse KV blocks of equal prefixes (vLLM's automatic prefix caching).
        migration: how requests may move between instances; None: they may not.
        budget_period_s: time between two occasions to set an instance's prefill budget, seconds; 0: never.
    """

    name: str
    instances: tuple[InstanceSpec, ...]
    prefix_caching: bool = True
    migration: Migration | None = None
    budget_period_s: float = 0.0

    def __len__(self) -> int:
        return len(self.instances)


_PART = re.compile(r"(?:(\d+)x)?([^+]+)")


def parse_cluster(
    text: str,
    *,
    prefix_caching: bool = True,
    migration: Migration | None = None,
    budget_period_s: float = 0.0,
    **settings: object,
) -> ClusterSpec:
    """Read `4xa100-llama-3.1-8b+2xh100-llama-3.1-8b`; `settings` are InstanceSpec fields for every instance.

    Raises:
        InputError: for text that is not of that form.
    """
    instances: list[InstanceSpec] = []
    for part in text.split("+"):
        match = _PART.fullmatch(part.strip())
        if match is None or match[1] == "0":
            hint = "write COUNTxPROFILE, joined by +, for example 4xa100-llama-3.1-8b"
            raise InputError("cluster", "fleet", text, hint)
        instances += [replace(InstanceSpec(match[2]), **settings)] * int(match[1] or 1)  # type: ignore[arg-type]
    return ClusterSpec(text, tuple(instances), prefix_caching, migration, budget_period_s)

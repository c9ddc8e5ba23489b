"""What a cluster is made of: instances, each a profile and its engine settings."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from servegym.errors import InputError

QUEUE_POLICIES = ("fcfs", "priority")


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
    """

    profile: str
    kv_blocks: int | None = None
    block_tokens: int = 16
    token_budget: int | None = None
    max_seqs: int | None = None
    watermark: float = 0.0
    queue: str = "fcfs"
    reserve_prompt: bool = True
    async_scheduling: bool = False


@dataclass(frozen=True)
class ClusterSpec:
    """A fleet of instances.

    Attributes:
        name: what tables call it, for example `2xa100+2xh100`.
        instances: one entry a replica.
        prefix_caching: reuse KV blocks of equal prefixes (vLLM's automatic prefix caching).
    """

    name: str
    instances: tuple[InstanceSpec, ...]
    prefix_caching: bool = True

    def __len__(self) -> int:
        return len(self.instances)


_PART = re.compile(r"(?:(\d+)x)?([^+]+)")


def parse_cluster(text: str, *, prefix_caching: bool = True, **settings: object) -> ClusterSpec:
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
    return ClusterSpec(text, tuple(instances), prefix_caching)

"""An instance's settings in the model's units, from its spec and its profile; impossible ones are refused."""

from __future__ import annotations

from typing import NamedTuple

from servegym.envs.cluster.spec import PREEMPTIONS, QUEUE_POLICIES, InstanceSpec
from servegym.envs.cluster.state import NEVER, PS
from servegym.envs.costs.profile import Link, Profile
from servegym.errors import InputError

GIB = 2**30
MOST_S = 1e6  # of all times and periods, seconds
DECODE_REQUESTS, DECODE_CONTEXT = 64, 1024  # the batch at which decode_tokens_per_s is quoted


class Setting(NamedTuple):
    """The fields of `state.SETTING` beside the profile and its speeds; times in picoseconds.

    Attributes:
        blocks, block_tokens: KV blocks, and tokens of each.
        budget, max_seqs: most tokens and sequences of an iteration.
        watermark: blocks that admission leaves free.
        by_priority, reserve, caching, asynchronous: as in `InstanceSpec` and `ClusterSpec`.
        host_blocks: KV blocks of host memory; by_swap: victims go there by default.
        swap_call, swap_block, swap_group: a copy, each block of it, and the blocks that a copy carries.
        overlap: part of a copy that is hidden under compute, in thousandths.
        net_call, net_block: a copy to another instance, and each block of it.
        drain: from when on it gets no new requests.
    """

    blocks: int
    block_tokens: int
    budget: int
    max_seqs: int
    watermark: int
    by_priority: bool
    reserve: bool
    caching: bool
    asynchronous: bool
    host_blocks: int
    by_swap: bool
    swap_call: int
    swap_block: int
    swap_group: int
    overlap: int
    net_call: int
    net_block: int
    drain: int


def setting_of_spec(
    where: str, spec: InstanceSpec, profile: Profile, *, prefix_caching: bool = True, migrates: bool = False
) -> Setting:
    """The settings of one instance.

    Args:
        where: what the instance belongs to, for messages.
        prefix_caching, migrates: what the cluster does.

    Raises:
        InputError: for settings that contradict each other or that the profile has no costs for.
    """

    def require(ok: bool, field: str, value: object, hint: str) -> None:
        if not ok:
            raise InputError(f"{where}, {spec.profile}", field, value, hint)

    block_tokens = profile.block_tokens if spec.block_tokens is None else spec.block_tokens
    require(block_tokens >= 1, "block_tokens", block_tokens, "a block has at least one token")
    blocks = profile.kv_tokens // block_tokens if spec.kv_blocks is None else spec.kv_blocks
    budget = profile.token_budget if spec.token_budget is None else spec.token_budget
    max_seqs = min(profile.max_seqs, budget) if spec.max_seqs is None else spec.max_seqs
    require(blocks >= 1, "kv_blocks", blocks, "an instance has at least one block")
    require(1 <= max_seqs <= budget, "max_seqs", max_seqs, f"must lie in 1..token_budget ({budget})")
    require(0 <= spec.watermark < 1, "watermark", spec.watermark, "must lie in [0, 1)")
    require(spec.queue in QUEUE_POLICIES, "queue", spec.queue, f"choose one of {', '.join(QUEUE_POLICIES)}")
    require(spec.preemption in PREEMPTIONS, "preemption", spec.preemption, "choose recompute or swap")
    require(0 <= spec.swap_gib <= MOST_S, "swap_gib", spec.swap_gib, f"must lie in 0..{MOST_S:g}")
    require(spec.swap_group >= 1, "swap_group", spec.swap_group, "a copy carries at least one block")
    require(
        spec.preemption == "recompute" or spec.swap_gib > 0, "preemption", spec.preemption,
        "swap needs host memory: give swap_gib",
    )  # fmt: skip
    drain = NEVER if spec.drain_at_s is None else spec.drain_at_s
    require(drain >= 0, "drain_at_s", spec.drain_at_s, "must be >= 0")
    block_bytes = profile.model.kv_bytes_per_token * block_tokens
    has_swap, has_network = profile.swap is not None, profile.network is not None
    require(
        has_swap or not spec.swap_gib, "swap_gib", spec.swap_gib, "the profile has no swap costs; leave it 0"
    )
    require(
        has_network or not migrates, "migration", migrates, "the profile has no network costs; leave it out"
    )
    swap, net = _copy_ps(profile.swap, block_bytes), _copy_ps(profile.network, block_bytes)
    return Setting(
        blocks=blocks,
        block_tokens=block_tokens,
        budget=budget,
        max_seqs=max_seqs,
        watermark=int(spec.watermark * blocks),
        by_priority=spec.queue == "priority",
        reserve=spec.reserve_prompt,
        caching=prefix_caching,
        asynchronous=spec.async_scheduling,
        host_blocks=int(spec.swap_gib * GIB) // block_bytes,
        by_swap=spec.preemption == "swap",
        swap_call=swap[0] * 2 * profile.model.layers,
        swap_block=swap[1],
        swap_group=spec.swap_group,
        overlap=round(profile.swap.overlap * 1000) if profile.swap else 0,
        net_call=net[0],
        net_block=net[1],
        drain=NEVER if spec.drain_at_s is None else round(drain * PS),
    )


def _copy_ps(link: Link | None, block_bytes: int) -> tuple[int, int]:
    """Picoseconds of a call and of a block on a link; 0 without one, where nothing is copied."""
    if link is None:
        return 0, 0
    return round(link.seconds_per_call * PS), round(block_bytes / link.bytes_per_second * PS)

"""Walks of the reference simulator that are worked out on paper; all times in milliseconds.

An iteration takes 10 ms and 1 ms a token, a block holds 4 tokens. A swap takes 2 ms a copy and 1 ms a block,
a copy to another instance 30 ms and 2 ms a block. Beside a migration iterations take a tenth longer.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.reference import ReferenceCluster
from servegym.envs.cluster.settings import GIB
from servegym.envs.cluster.spec import ClusterSpec, InstanceSpec, Migration
from servegym.envs.cluster.world import build_world
from servegym.envs.costs.profile import Link, load_profile, save_profile
from servegym.envs.workloads.workload import make_workload

BLOCK_BYTES = 8
MOVES = Migration(period_s=0.05, last_blocks=1, stages=2, slowdown=0.1)


@pytest.fixture
def instance(toy_instance, tmp_path):
    """Make a toy instance with links, with host memory for `host_blocks` blocks."""

    def make(host_blocks: int = 0, overlap: float = 0.0, **settings) -> InstanceSpec:
        toy = toy_instance(1.0)
        profile = replace(
            load_profile(toy.profile),
            # A copy takes a call each for the keys and the values of the one layer.
            swap=Link(seconds_per_call=1e-3, bytes_per_second=BLOCK_BYTES / 1e-3, overlap=overlap),
            network=Link(seconds_per_call=30e-3, bytes_per_second=BLOCK_BYTES / 2e-3),
        )
        path = tmp_path / f"linked-{overlap}.json"
        save_profile(profile, path)
        settings = {"token_budget": 64, "swap_gib": host_blocks * BLOCK_BYTES / GIB, **settings}
        return replace(toy, profile=str(path), **settings)

    return make


def play(
    instances,
    arrived_ms,
    prompt,
    output,
    dispatch,
    *,
    moves=MOVES,
    budget_period_s=0.0,
    columns=None,
    **answers,
):
    """Play requests, with further columns, on instances; request k goes to instance dispatch[k]."""
    workload = make_workload("walk", np.array(arrived_ms) / 1000, prompt, output, **(columns or {}))
    cluster = ClusterSpec("walk", tuple(instances), migration=moves, budget_period_s=budget_period_s)
    world = build_world([Episode(workload, cluster, workload.output_tokens)], 1)
    played = ReferenceCluster(world, 0, lambda _, r: dispatch[r.number], **answers)
    played.run()
    return played


def move_once(number: int):
    """At the first tick a request moves from instance 0 to 1."""

    def tick(cluster):
        first = cluster.next_migrate == 2 * cluster.migrate_period
        return [(0, 1, cluster.requests[number])] if first else []

    return tick


def ms(time: float) -> int:
    """So many milliseconds in picoseconds."""
    return round(time * 1e9)


# --- swap -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "overlap", "stall"), [(1, 0.0, 6), (2, 0.0, 4), (1, 0.25, 4.5)])
def test_a_victim_swaps_out_and_in_and_both_times_the_iteration_waits(instance, group, overlap, stall):
    """Two requests of 2 blocks prefill until 18 and 37; then both need a third, and only 5 are there.

    The younger swaps out 2 blocks: 2 copies and 2 blocks are 6 ms. The older decodes alone and finishes in 4
    iterations of 11 ms; then the younger comes back and has 5 tokens left.
    """
    engine = instance(3, overlap, kv_blocks=5, preemption="swap", swap_group=group)
    older, younger = play([engine], [0, 0], [8, 8], [6, 6], [0, 0]).requests
    assert older.finished == ms(37 + stall + 4 * 11)
    assert younger.first == ms(37)
    assert younger.max_gap == ms(stall + 4 * 11 + stall + 11)
    assert younger.finished == older.finished + ms(stall + 5 * 11)
    assert (younger.preemptions, younger.lost, younger.cached, younger.hosted) == (1, 0, 0, 0)


def test_what_the_host_has_no_room_for_is_recomputed(instance):
    engine = instance(1, kv_blocks=5, preemption="swap")
    older, younger = play([engine], [0, 0], [8, 8], [6, 6], [0, 0]).requests
    assert older.finished == ms(37 + 4 * 11)
    assert younger.finished == older.finished + ms((10 + 9) + 4 * 11)  # 8 prompt tokens and one streamed
    assert (younger.preemptions, younger.lost) == (1, 8)


def test_what_the_prefix_cache_holds_does_not_come_back_from_the_host(instance):
    """The second swaps out 7 prompt tokens at 54, and waits for the third, which is more urgent.

    The first holds 5 of 8 blocks from 36 until 71; the second has computed 7 tokens beside it, and 7 more do
    not fit. The third finds the first of the same 6 prefix blocks and computes 8 + 8 + 4 tokens. In its last
    iteration, from 107, all 6 are there; 5 of them end before the second's last prompt token, so that it has
    4 tokens left, which the budget has room for, and nothing to copy.
    """
    engine = instance(2, kv_blocks=8, token_budget=8, queue="priority", reserve_prompt=False)
    ids, offsets = np.array([*range(6), *range(6)], np.int32), np.array([0, 0, 6, 12])
    columns = {"prefix_ids": ids, "prefix_offsets": offsets, "prefix_block_tokens": 4}
    played = play(
        [engine], [0, 0, 60], [16, 24, 24], [3, 1, 1], [0, 0, 0],
        victim=lambda cluster, i, running: (cluster.requests[1], True),
        columns={"priority": np.array([0, 1, 0]), **columns},
    )  # fmt: skip
    first, second, third = played.requests
    assert first.finished == ms(54 + 11 + 6)
    assert second.finished == third.finished == ms(71 + 3 * 18)
    assert (second.preemptions, second.lost, second.cached, third.cached) == (1, 0, 0, 4)
    assert played.instances[0].host_free == 2


def test_the_answer_names_victim_and_mechanism(instance):
    """The older gives way, by recompute although the engine would swap."""
    asked = []

    def victim(cluster, i, running):
        asked.append((cluster.now, i, [r.number for r in running]))
        return running[0], False

    engine = instance(3, kv_blocks=5, preemption="swap")
    older, younger = play([engine], [0, 0], [8, 8], [6, 6], [0, 0], victim=victim).requests
    assert asked == [(ms(37), 0, [0, 1])]
    assert (older.preemptions, older.lost, younger.preemptions) == (1, 9, 0)


# --- migration --------------------------------------------------------------------------------------------


def test_a_migration_of_two_stages_and_the_last_copy(instance):
    """Tokens stream at 18, 29, 40, 51; at the tick, 50, there are 10 tokens of KV: 2 full blocks.

    50   copy of 2 blocks until 84; iterations from 51 on take 12.1: 63.1, 75.2 (13 tokens), 87.3
    84   2 blocks are new, more than 1: copy of the full one until 116; 99.4, 111.5 (16 tokens)
    116  1 block is new: the request stops at the boundary, 123.6, with 17 tokens and its tenth token streamed
    123.6  last copy, of 2 blocks, until 157.6; then the destination computes the next token in 11 ms
    """
    played = play([instance(), instance()], [0], [8], [20], [0], tick=move_once(0))
    (r,) = played.requests
    assert r.max_gap == ms(34 + 11)
    assert r.finished == ms(157.6 + 10 * 11)
    assert (r.migrations, r.instance, r.lost, r.preemptions) == (1, 1, 0, 0)
    assert [inst.link_until for inst in played.instances] == [ms(157.6)] * 2


def test_a_migration_ends_when_the_request_finishes(instance):
    played = play([instance(), instance()], [0], [8], [5], [0], tick=move_once(0))
    (r,) = played.requests
    assert r.finished == ms(51 + 12.1)
    assert (r.migrations, r.instance, played.instances[1].reserved) == (0, 0, 0)
    assert played.instances[1].link_until == ms(84), "the copy had begun"


def test_a_migration_of_too_many_stages_is_given_up(instance):
    """Behind 84 nothing slows iterations, and the destination has memory for a prompt of 4 blocks."""
    moves = replace(MOVES, stages=1)
    small = instance(kv_blocks=5)
    r, blocked = play(
        [instance(), small], [0, 60], [8, 16], [8, 1], [0, 1], moves=moves, tick=move_once(0)
    ).requests
    assert r.finished == ms(51 + 3 * 12.1 + 11)
    assert (r.migrations, r.instance) == (0, 0)
    assert blocked.finished == ms(84 + 26)


def test_a_migration_is_given_up_where_the_destination_is_full(instance):
    """The other's 12 prompt tokens take from 20 to 42; at 50 it holds 4 blocks of 6, and 2 are reserved."""
    small = instance(kv_blocks=6)
    r, other = play([instance(), small], [0, 20], [8, 12], [8, 6], [0, 1], tick=move_once(0)).requests
    assert r.finished == ms(51 + 3 * 12.1 + 11)
    assert other.finished == ms(53 + 3 * 12.1 + 11)
    assert (r.migrations, r.instance) == (0, 0)


def test_a_migration_is_given_up_when_the_request_is_preempted(instance):
    """Both decode from 37 on; at 61 + 13.2 each has filled its 3 blocks, and the one that moves gives way."""
    small = instance(kv_blocks=6)
    played = play(
        [small, instance()], [0, 0], [8, 8], [6, 5], [0, 0],
        tick=move_once(0), victim=lambda cluster, i, running: (cluster.requests[0], False),
    )  # fmt: skip
    r, other = played.requests
    assert other.finished == ms(74.2 + 11)
    assert (r.preemptions, r.lost, r.migrations, r.instance) == (1, 12, 0, 0)
    assert r.finished == ms(85.2 + (10 + 13))
    assert played.instances[1].reserved == 0


def test_a_request_that_has_migrated_waits_for_a_prompt_that_takes_the_budget(instance):
    """From 150 on the destination computes 20 prompt tokens, 8 an iteration.

    That takes 19.8, beside the migration, then 18; in the third iteration there are 4 prompt tokens, and the
    request that arrived at 157.6 computes its next token.
    """
    narrow = instance(token_budget=8)
    r, prompt = play([instance(), narrow], [0, 150], [8, 20], [20, 1], [0, 1], tick=move_once(0)).requests
    joined = 150 + 19.8 + 18 + 15
    assert prompt.first == ms(joined)
    assert r.max_gap == ms(joined - 123.6)
    assert r.finished == ms(joined + 9 * 11)


def test_swaps_wait_for_the_copies_of_a_migration(instance):
    """At 74.2 the second swaps out 3 blocks, 9 ms, when the first's copy is over: from 84 until 93.

    The first ends its iteration, 12.1 without the swap, at 105.1 and stops; its last copy, of 2 blocks, ends
    at 139.1. Until then it holds 4 of 6 blocks, and its instance idles; then the second swaps in.
    """
    source = instance(3, kv_blocks=6)
    first, second = play(
        [source, instance()], [0, 0], [8, 8], [7, 5], [0, 0],
        tick=move_once(0), victim=lambda cluster, i, running: (cluster.requests[1], True),
    ).requests  # fmt: skip
    assert first.max_gap == ms(34 + 11)
    assert first.finished == ms(139.1 + 11)
    assert second.finished == ms(139.1 + 9 + 11)
    assert (first.migrations, second.migrations, second.lost) == (1, 0, 0)


@pytest.mark.parametrize(("drain_at_s", "finished"), [(None, 50 + 18), (0.05, 227 + 18)])
def test_a_waiting_request_moves_at_once_but_not_to_a_draining_instance(instance, drain_at_s, finished):
    """The first holds the only sequence until 18 + 19 * 11 = 227; the second can go at the tick."""
    source, target = instance(max_seqs=1), instance(drain_at_s=drain_at_s)
    first, second = play([source, target], [0, 0], [8, 8], [20, 1], [0, 0], tick=move_once(1)).requests
    assert first.finished == ms(227)
    assert second.finished == ms(finished)
    assert (second.migrations, second.instance) == ((0, 0) if drain_at_s else (1, 1))


def test_only_what_may_move_moves(instance):
    """To oneself, from elsewhere, beside another migration, to where it does not fit."""
    moved = []

    def tick(cluster):
        first, second, third = cluster.requests
        if cluster.now == cluster.migrate_period:
            moves = [
                (0, 0, first),
                (1, 0, first),
                (0, 2, first),
                (0, 1, first),
                (0, 1, second),
                (1, 0, third),
            ]
            moved.extend(cluster.can_move(s, d, r) for s, d, r in moves)
            yield 0, 1, first
            moved.extend(cluster.can_move(s, d, r) for s, d, r in moves)

    fleet = [instance(), instance(), instance(kv_blocks=4)]
    play(fleet, [0, 0, 0], [8, 8, 8], [20, 20, 20], [0, 0, 1], tick=tick)
    assert moved == [False, False, False, True, True, True] + 6 * [False]


# --- caps -------------------------------------------------------------------------------------------------


def test_a_cap_cuts_prompts_beside_decodes(instance):
    """Asked every 27 ms while both are there: from 29 on 4 prompt tokens an iteration, 15 ms, five times."""
    asked = []

    def budget(cluster, i):
        asked.append(cluster.now)
        return 4 if len(asked) == 1 else None

    decoding, prompt = play(
        [instance()], [0, 25], [8, 20], [20, 1], [0, 0], budget_period_s=0.027, budget=budget
    ).requests
    assert asked == [ms(27), ms(54), ms(81)]
    assert prompt.first == ms(29 + 5 * 15)
    assert decoding.max_gap == ms(15)

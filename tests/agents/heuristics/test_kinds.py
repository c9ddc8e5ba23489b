"""Victims, migrations, moves and budgets against choices worked out by hand."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from servegym.agents.heuristics import HEURISTICS, make_heuristic
from servegym.envs.cluster import rules, schema
from servegym.errors import InputError


def answer(name, obs, **params) -> int:
    rule = make_heuristic(name, **params)
    rule.reset(1, 0)
    return int(rule.act(obs)[0])


# Rows: newest admission, largest KV, lowest priority; recompute and swap of each, but no swap of the last.
VICTIMS = {
    1: {"prefill_s": 0.30},
    2: {"copy_s": 0.40, "swap": 1},
    3: {"prefill_s": 0.90},
    4: {"copy_s": 0.60, "swap": 1},
    5: {"prefill_s": 0.50},
}
RUNNING = {
    "priority": [1, 1, 2],
    "waited_s": [3.0, 9.0, 5.0],
    "kv_tokens": [1000, 4000, 2000],
    "predicted_left_tokens": [300, 50, 20],
}


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("victim_last", {}, 1),  # row 0: 0.30 < 0.40
        ("victim_largest", {}, 4),  # row 1: 0.60 < 0.90
        ("victim_lowest_priority", {}, 5),  # row 2, recompute only
        ("victim_cost_aware", {}, 4),  # per 1,000 tokens 0.3, 0.4, 0.225, 0.15, 0.25
        ("victim_least_left", {}, 1),  # 300 left
        ("victim_least_left", {"victim": "least"}, 5),  # 20 left
        ("victim_least_left_oracle", {}, 4),  # 10, 500, 100 truly left
        ("victim_least_left_oracle", {"victim": "least"}, 1),
        ("default", {}, 0),
        ("least_request", {}, 0),
        ("random", {}, 0),
        ("vllm_dp", {}, 0),
        ("budget_tpot", {}, 0),
    ],
)
def test_victims(ask, name, params, expected):
    truly_left = {1: 10, 2: 10, 3: 500, 4: 500, 5: 100}
    assert answer(name, ask("preempt", VICTIMS, RUNNING, oracle=truly_left), **params) == expected


def test_the_least_urgent_victim_is_the_last_that_arrived(ask):
    requests = RUNNING | {"priority": [1, 1, 1]}
    assert answer("victim_lowest_priority", ask("preempt", VICTIMS, requests)) == 1  # waited 3, 9, 5 s
    assert answer("victim_lowest_priority", ask("preempt", {3: {}, 5: {}}, requests)) == 5


@pytest.mark.parametrize("name", [n for n, rule in HEURISTICS.items() if rule.kinds == ("preempt",)])
def test_equal_victims_go_by_their_cost_then_by_their_index(ask, name):
    edges = {1: {"prefill_s": 0.5}, 2: {"copy_s": 0.5}, 3: {"prefill_s": 0.5}}
    assert answer(name, ask("preempt", edges, oracle={})) == 1
    edges[2]["copy_s"] = 0.25
    assert answer(name, ask("preempt", edges, oracle={})) == 2


def test_the_oracle_rule_names_what_it_lacks(ask):
    with pytest.raises(InputError, match="oracle=True"):
        answer("victim_least_left_oracle", ask("preempt", VICTIMS, RUNNING))


# Instances of 10,000 tokens: 0 is nearly full, 1 waits for a large prompt, 2 and 3 have room.
FLEET = {
    "available": [1, 1, 1, 1],
    "kv_capacity_tokens": [10_000] * 4,
    "running": [20, 4, 10, 5],
    "inflight": [20, 5, 10, 5],
    "kv_usage": [0.95, 0.4, 0.5, 0.3],
    "inflight_context_tokens": [9500, 12_000, 5000, 3000],
}
# Sources 0 and 1 (rows 0 and 1), destinations 2 and 3.
PAIRS = {1: (0, 2, 0), 2: (0, 3, 0), 5: (1, 2, 1), 6: (1, 3, 1)}
LEGAL: dict[int, dict] = {k: {} for k in PAIRS}


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        # Freeness 500/20, (6000-8000)/4, 5000/10, 7000/5.
        ("migrate_llumnix", {}, 6),
        ("migrate_llumnix", {"high": 2000}, 0),
        ("migrate_llumnix", {"low": 0, "high": 1000}, 6),
        # 400/20, -2100/5, 4900/10, 6900/5
        ("migrate_llumnix", {"mode": "artifact"}, 6),
        # 400/20, 5900/4, 4900/10, 6900/5: blind to the queue of instance 1
        ("migrate_infaas", {}, 2),
        ("migrate_infaas", {"low": 10}, 0),
    ],
)
def test_pairs_by_freeness(ask, name, params, expected):
    assert answer(name, ask("migrate", LEGAL, instances=FLEET, pairs=PAIRS), **params) == expected


def test_a_source_without_a_legal_pair_makes_way_for_the_next(ask):
    legal = {1: {}, 2: {}}
    assert answer("migrate_llumnix", ask("migrate", legal, instances=FLEET, pairs=PAIRS)) == 2
    assert answer("migrate_llumnix", ask("migrate", {1: {}}, instances=FLEET, pairs=PAIRS)) == 1


@pytest.mark.parametrize("mode", rules.MODES)
def test_urgent_requests_keep_headroom(ask, mode):
    # Reserved 10,000 - 1,600 tokens: instance 3 is left with -1400/5 (artifact -1500/5), and takes nothing.
    fleet = FLEET | {"urgent_inflight": [0, 0, 0, 1]}
    obs = ask("migrate", LEGAL, instances=fleet, pairs=PAIRS)
    assert answer("migrate_llumnix", obs, mode=mode) == 5
    assert answer("migrate_llumnix", obs, mode=mode, urgent_load=10_000.0) == 6


def test_idle_instances_take_and_draining_ones_give(ask):
    fleet = FLEET | {"running": [20, 4, 0, 5], "inflight": [20, 5, 0, 5], "available": [0, 1, 1, 1]}
    obs = ask("migrate", LEGAL, instances=fleet, pairs=PAIRS)
    for name in ("migrate_llumnix", "migrate_infaas"):
        assert answer(name, obs) == 1


def test_the_artifact_takes_from_whom_it_preempted(ask):
    roomy = FLEET | {"kv_usage": [0.2, 0.2, 0.5, 0.3], "inflight_context_tokens": [2000, 2000, 5000, 3000]}
    preempted = roomy | {"preemptions": [1, 0, 0, 0]}
    obs = ask("migrate", LEGAL, instances=roomy, pairs=PAIRS)
    assert answer("migrate_llumnix", obs, mode="artifact") == 0
    obs = ask("migrate", LEGAL, instances=preempted, pairs=PAIRS)
    assert answer("migrate_llumnix", obs, mode="artifact") == 2
    assert answer("migrate_llumnix", obs, mode="paper") == 0
    both = ask("migrate", LEGAL, instances=preempted | {"preemptions": [1, 0, 0, 1]}, pairs=PAIRS)
    assert answer("migrate_llumnix", both, mode="artifact") == 1


def test_greedy_migration_counts_seconds(ask):
    requests = {
        "predicted_left_tokens": [100, 100],
        "running": [1, 0],
        "source_step_s": [0.05, 0.05],
        "source_queue_s": [9.0, 2.0],
    }
    edges = {
        1: {"step_after_s": 0.03, "copy_s": 0.4, "queue_s": 9.0},  # 5 - 3.4: 1.6 s
        2: {"step_after_s": 0.02, "copy_s": 1.5, "queue_s": 9.0},  # 5 - 3.5: 1.5 s
        5: {"step_after_s": 0.05, "prefill_s": 0.3, "queue_s": 0.2},  # 7 - 5.5: 1.5 s
        6: {"step_after_s": 0.06, "prefill_s": 0.3, "queue_s": 0.0},  # 7 - 6.3: 0.7 s
    }
    obs = ask("migrate", edges, requests, FLEET, PAIRS)
    assert answer("migrate_greedy", obs) == 1
    assert answer("migrate_greedy", obs, least_gain_s=1.55) == 1
    assert answer("migrate_greedy", obs, least_gain_s=1.65) == 0
    draining = ask("migrate", edges, requests, FLEET | {"available": [1, 0, 1, 1]}, PAIRS)
    assert answer("migrate_greedy", draining, least_gain_s=1.65) == 5


def test_moves(ask):
    rows = {"priority": [0, 1, 1, 0], "kv_tokens": [100, 900, 700, 50]}
    obs = ask("move", {1: {}, 2: {}, 3: {}, 4: {}}, rows)
    assert answer("move_llumnix", obs) == 3
    assert answer("move_llumnix", obs, mode="artifact") == 0
    assert answer("move_llumnix", ask("move", {1: {}, 4: {}}, rows)) == 4


CAPS = {
    k: {"prefill_cap": 2048 >> (k - 1), "iteration_s": seconds}
    for k, seconds in zip(range(1, 6), (0.20, 0.11, 0.06, 0.04, 0.03), strict=True)
}


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("budget_fixed", {}, 3),  # 2048, 1024, 512
        ("budget_fixed", {"tokens": 1000.0}, 3),
        ("budget_fixed", {"tokens": 4096}, 1),
        ("budget_fixed", {"tokens": 100}, 5),  # none: the smallest
        ("budget_tpot", {}, 4),  # 0.04 <= 0.05 < 0.06
        ("budget_tpot", {"factor": 3.0}, 2),  # 0.11 <= 0.15
        ("budget_tpot", {"factor": 0.5}, 5),  # none
    ],
)
def test_budgets(ask, name, params, expected):
    assert answer(name, ask("budget", CAPS, {"slo_tpot_s": 0.05}), **params) == expected


def test_a_closed_cap_is_not_taken(ask):
    open_caps = {k: CAPS[k] for k in (1, 2, 4)}
    assert answer("budget_fixed", ask("budget", open_caps)) == 4


BUILT_IN = [name for name, rule in HEURISTICS.items() if hasattr(rule, "rule") or name == "move_llumnix"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_published_parameters_are_the_models(name):
    rule = make_heuristic(name)
    (kind,) = rule.kinds
    np.testing.assert_array_equal(rule.row(), rules.DEFAULT_PARAMS[kind][rules.RULES[kind].index(rule.rule)])


def test_lanes_with_different_questions_are_answered_alone(ask):
    """One batch of four kinds, as a Cluster environment asks; wider than a dispatch needs."""
    dispatch = ask("preempt", {})
    dispatch["kind"][0] = schema.KINDS.index("dispatch")
    dispatch["mask"][0, :5] = 1
    dispatch["candidates"][0, 1:5, 1] = np.arange(4)
    for name, values in FLEET.items():
        dispatch["instances"][0, :, schema.column(schema.INSTANCE, name)] = values
    lanes = [
        dispatch,
        ask("preempt", VICTIMS, RUNNING),
        ask("migrate", LEGAL, instances=FLEET, pairs=PAIRS),
        ask("budget", CAPS, {"slo_tpot_s": 0.05}),
    ]
    batch = {key: np.concatenate([obs[key] for obs in lanes]) for key in lanes[0]}

    def act(name):
        rule = make_heuristic(name)
        rule.reset(4, 0)
        return [rule.act(batch).tolist() for _ in range(2)]

    # In flight 20, 5, 10, 5.
    assert act("least_request") == [[2, 0, 0, 0]] * 2
    assert act("session_affinity") == [[2, 0, 0, 0]] * 2
    assert act("round_robin") == [[1, 0, 0, 0], [2, 0, 0, 0]]
    assert act("victim_largest") == [[0, 4, 0, 0]] * 2
    assert act("least_request+victim_largest+llumnix+budget_tpot") == [[2, 4, 6, 4]] * 2
    for name in ("random", "power_of_two"):
        assert all(first > 0 and rest == [0, 0, 0] for first, *rest in act(name))


def test_vllm_dp_forgets_nothing_while_others_are_asked(observe):
    """Between two dispatches an instance asks; its lane keeps what was sent since the scrape."""
    rule = make_heuristic("vllm_dp")
    rule.reset(1, 0)
    fleet = {"running": [3, 4], "scrape_age": [0.2, 0.2]}
    dispatch = observe(fleet, overall={"since_last_arrival_s": 0.1})
    assert rule.act(dispatch).tolist() == [1]
    budget = {"since_last_arrival_s": 9.0}
    other = observe(fleet | {"scrape_age": [0.0, 0.0]}, overall=budget)
    other["kind"][:] = schema.KINDS.index("budget")
    assert rule.act(other).tolist() == [0]
    assert rule.act(dispatch).tolist() == [2]  # 3 + 4, 4


def test_a_first_question_finds_the_kernel_loaded():
    """In a fresh process: in a deployment it would wait half a second."""
    code = (
        "from servegym.agents.heuristics import make_heuristic\n"
        "from servegym.envs.cluster.rules import answer_lanes\n"
        "make_heuristic('lmetric+victim_largest').reset(1, 0)\n"
        "print(answer_lanes.signatures)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Frame" in done.stdout, done.stdout

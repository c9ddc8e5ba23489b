"""The built-in rules against their formulas, written once more by feature name, over random frames."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.envs.cluster import rules, schema
from servegym.envs.cluster.observe import make_frame
from servegym.envs.cluster.vector import DispatchVectorEnv
from servegym.envs.scenario import Scenario
from servegym.errors import InputError

INF = float("inf")
PAPER, ARTIFACT = 0, 1
NAMES = [(kind, name) for kind, names in rules.RULES.items() for name in names if name != "agent"]


def random_frame(lanes, instances, seed, ties):
    """Any kinds, features over many magnitudes; with `ties` small integers times one scale a table."""
    rng = np.random.default_rng(seed)
    frame = make_frame(lanes, instances, schema.OFFERS)

    def fill(array):
        if ties:
            array[:] = rng.integers(0, 3, array.shape) * 10.0 ** rng.integers(-2, 5)
        else:
            array[:] = np.exp(rng.normal(0, 3, array.shape))

    for array in (frame.instances, frame.requests, frame.edges):
        fill(array)
    for name in ("available", "urgent_inflight", "preemptions"):
        column = schema.column(schema.INSTANCE, name)
        frame.instances[:, :, column] = rng.integers(0, 2, (lanes, instances))
    running = schema.column(schema.REQUEST, "running")
    frame.requests[:, :, running] = rng.integers(0, 2, (lanes, schema.OFFERS))
    frame.kind[:] = rng.integers(0, len(schema.KINDS) - 1, lanes)
    frame.mask[:] = rng.integers(0, 2, frame.mask.shape)
    frame.mask[:, 0] = 1
    shape = frame.mask.shape
    frame.candidates[:, :, 0] = rng.integers(0, schema.OFFERS, shape)
    frame.candidates[:, :, 1] = rng.integers(0, instances, shape)
    frame.candidates[:, :, 2] = rng.integers(0, instances, shape)
    dispatch = frame.kind == schema.KINDS.index("dispatch")
    frame.mask[dispatch, instances + 1 :] = 0
    frame.candidates[dispatch, 1 : instances + 1] = [(0, i, -1) for i in range(instances)]
    return frame


def named(table, row):
    return SimpleNamespace(**{feature.name: float(x) for feature, x in zip(table, row, strict=True)})


def candidate(frame, l, k):
    row, instance, source = frame.candidates[l, k]
    return SimpleNamespace(
        row=int(row),
        request=named(schema.REQUEST, frame.requests[l, row]),
        node=named(schema.INSTANCE, frame.instances[l, instance]),
        source=named(schema.INSTANCE, frame.instances[l, source]),
        edge=named(schema.EDGE, frame.edges[l, k]),
    )


def load(free, requests):
    return -free / max(requests, 1.0) if requests > 0 else -INF


def reserve(node, urgent_load):
    return max(0.0, node.kv_capacity_tokens - urgent_load) if node.urgent_inflight else 0.0


def paper(node, urgent_load):
    running = min(node.running, node.inflight)
    held = min(node.kv_usage * node.kv_capacity_tokens, node.inflight_context_tokens)
    head = (node.inflight_context_tokens - held) / max(node.inflight - running, 1.0)
    return load(node.kv_capacity_tokens - held - head - reserve(node, urgent_load), running)


def artifact(node, requests, watermark, urgent_load):
    free = (1 - watermark) * node.kv_capacity_tokens - node.inflight_context_tokens
    return load(free - reserve(node, urgent_load), requests)


def infaas(node, watermark):
    return load((1 - watermark - node.kv_usage) * node.kv_capacity_tokens, node.running)


def dispatch_llumnix(c, p):
    if p[0] == PAPER:
        return (paper(c.node, p[2]),)
    return (artifact(c.node, c.node.inflight, p[1], p[2]),)


def comeback(c):
    return c.edge.prefill_s + c.edge.copy_s


def migrate_llumnix(c, p):
    def migration_load(node):
        if p[0] == PAPER:
            return paper(node, p[3])
        running = min(node.running, node.inflight)
        return artifact(node, running + (node.inflight > running), 0.01, p[3])

    pressed = p[0] == ARTIFACT and c.source.preemptions > 0
    able = p[0] == PAPER or c.node.preemptions == 0
    return threshold(c, migration_load(c.source), migration_load(c.node), p[1], p[2], pressed, able)


def threshold(c, source, target, low, high, pressed=False, able=True):
    source = source if c.source.available else INF
    wanted = (pressed or source > -low) and able and target < -high and target < source
    return (-source, target) if wanted else None


def greedy(c, p):
    left, waits = c.request.predicted_left_tokens, not c.request.running
    stay = left * c.request.source_step_s + (c.request.source_queue_s if waits else 0.0)
    go = left * c.edge.step_after_s + c.edge.copy_s + c.edge.prefill_s + (c.edge.queue_s if waits else 0.0)
    draining = not c.source.available
    return (not draining, go - stay) if draining or stay - go > p[0] else None


def cap(c, small_enough):
    return (0, -c.edge.prefill_cap) if small_enough else (1, c.edge.prefill_cap)


SCORES = {
    ("dispatch", "least_request"): lambda c, p: (c.node.inflight,),
    ("dispatch", "least_tokens"): lambda c, p: (c.node.inflight_context_tokens,),
    ("dispatch", "lmetric"): lambda c, p: (
        (c.node.inflight_prefill_tokens + (c.request.prompt_tokens - c.edge.prefix_hit_tokens))
        * (c.node.inflight + 1),
    ),
    ("dispatch", "least_work"): lambda c, p: (
        c.edge.queue_s
        + c.node.inflight_predicted_tokens / max(c.node.decode_tokens_per_s, 1)
        + (c.edge.prefill_s + c.request.predicted_output_tokens / max(c.node.decode_tokens_per_s, 1)),
    ),
    ("dispatch", "mooncake"): lambda c, p: (c.edge.queue_s + c.edge.prefill_s,),
    ("dispatch", "llumnix"): dispatch_llumnix,
    ("dispatch", "infaas"): lambda c, p: (infaas(c.node, p[0]),),
    ("preempt", "last"): lambda c, p: (c.row, comeback(c)),
    ("preempt", "lowest_priority"): lambda c, p: (-c.request.priority, c.request.waited_s, comeback(c)),
    ("preempt", "largest"): lambda c, p: (-c.request.kv_tokens, comeback(c)),
    ("preempt", "cheapest"): lambda c, p: (comeback(c) / max(c.request.kv_tokens, 1), comeback(c)),
    ("preempt", "least_left"): lambda c, p: (
        c.request.predicted_left_tokens * (1 if p[0] else -1),
        comeback(c),
    ),
    ("migrate", "llumnix"): migrate_llumnix,
    ("migrate", "infaas"): lambda c, p: threshold(
        c, infaas(c.source, p[2]), infaas(c.node, p[2]), p[0], p[1]
    ),
    ("migrate", "greedy"): greedy,
    ("move", "shortest"): lambda c, p: (-c.request.priority, c.request.kv_tokens),
    ("budget", "fixed"): lambda c, p: cap(c, c.edge.prefill_cap <= p[0]),
    ("budget", "tpot"): lambda c, p: cap(c, c.edge.iteration_s <= p[0] * c.request.slo_tpot_s),
}
STOCK = [("preempt", "engine"), ("migrate", "stay"), ("move", "default"), ("budget", "keep")]


def expected(frame, l, kind, name, params):
    if schema.KINDS[frame.kind[l]] != kind or (kind, name) in STOCK:
        return 0
    scores = {}
    for k in np.flatnonzero(frame.mask[l, 1:]) + 1:
        score = SCORES[kind, name](candidate(frame, l, k), params)
        if score is not None:
            scores[int(k)] = score
    return min(scores, key=lambda k: scores[k], default=0)


def answers(frame, kind, name, params):
    out = np.empty(len(frame.kind), np.int64)
    rules.answer_lanes(frame, schema.KINDS.index(kind), rules.RULES[kind].index(name), params, out)
    return out


@pytest.mark.parametrize(("kind", "name"), sorted(set(NAMES) - {("dispatch", "round_robin")}))
@settings(max_examples=40, deadline=None)
@given(
    lanes=st.integers(1, 12),
    instances=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
    ties=st.booleans(),
    mode=st.sampled_from([PAPER, ARTIFACT]),
)
def test_rules_follow_their_formulas(kind, name, lanes, instances, seed, ties, mode):
    frame = random_frame(lanes, instances, seed, ties)
    params = rules.DEFAULT_PARAMS[kind][rules.RULES[kind].index(name)].copy()
    if name in ("llumnix", "least_left"):
        params[0] = mode
    before = [array.copy() for array in frame]
    given_answers = answers(frame, kind, name, params)
    assert given_answers.tolist() == [expected(frame, l, kind, name, params) for l in range(lanes)]
    assert frame.mask[np.arange(lanes), given_answers].all()
    for array, copy in zip(frame, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_every_rule_has_a_formula_here():
    assert set(NAMES) == {*SCORES, *STOCK, ("dispatch", "round_robin")}


def test_an_infinite_cost_is_still_better_than_the_default():
    frame = make_frame(1, 2, schema.OFFERS)
    frame.mask[0, [0, 2]] = 1
    frame.instances[0, :, schema.column(schema.INSTANCE, "inflight")] = INF
    assert answers(frame, "dispatch", "least_request", np.zeros(rules.PARAMS)) == [2]


@pytest.fixture(name="world", scope="module")
def world_fixture():
    env = DispatchVectorEnv(1, Scenario(clusters=("3xa100-llama-3.1-8b",), requests=5))
    env.reset(seed=0)
    return env._world


def test_round_robin_goes_on_where_the_lane_was(world):
    frame = make_frame(1, 5, schema.OFFERS)  # two rows are padding
    robin = rules.RULES["dispatch"].index("round_robin")
    world.lane["turn"] = 0
    masks = [[1, 1, 1]] * 4 + [[0, 0, 0], [1, 1, 1], [1, 1, 0], [0, 1, 0]]
    given_answers = []
    for mask in masks:
        frame.mask[0, :4] = [1, *mask]
        given_answers.append(rules.answer(world, frame, 0, robin, np.zeros(rules.PARAMS)))
    assert given_answers == [1, 2, 3, 1, 0, 2, 1, 2]


def test_other_rules_answer_alike_with_a_world(world):
    frame = random_frame(1, 3, seed=4, ties=False)
    frame.kind[0] = schema.KINDS.index("dispatch")
    frame.mask[0, :4] = 1
    for name in ("lmetric", "mooncake"):
        rule = rules.RULES["dispatch"].index(name)
        params = rules.DEFAULT_PARAMS["dispatch"][rule]
        assert rules.answer(world, frame, 0, rule, params) == answers(frame, "dispatch", name, params)[0]


def test_plays_names_rules():
    chosen, params = rules.plays({"preempt": "cheapest", "migrate": "infaas"})
    assert chosen.tolist() == [0, 5, 3, 0, 0, 0]
    np.testing.assert_array_equal(params[2], [48, 48, 0.01, 0])
    assert not params[[0, 1, 3, 4, 5]].any()
    assert not rules.plays({})[0].any()


@pytest.mark.parametrize(
    ("chosen", "field"),
    [({"preemption": "largest"}, "kind"), ({"preempt": "oldest"}, "preempt"), ({"move": "llumnix"}, "move")],
)
def test_unknown_kinds_and_rules(chosen, field):
    with pytest.raises(InputError, match="choose from") as error:
        rules.plays(chosen)
    assert error.value.field == field

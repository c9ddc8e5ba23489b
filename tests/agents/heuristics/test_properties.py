"""What holds for every dispatch rule on every observation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.agents.heuristics import HEURISTICS, heuristic_names, make_heuristic
from servegym.envs.cluster import schema

pytestmark = pytest.mark.filterwarnings("error")

NAMES = heuristic_names(["dispatch"])
RANDOM = {"random", "power_of_two"}
STATEFUL = {"round_robin", "vllm_dp"}
SIZES = {"lanes": st.integers(1, 5), "count": st.integers(1, 9), "seed": st.integers(0, 2**32 - 1)}


def random_batch(lanes, count, seed, ties):
    """Random features over many magnitudes; with `ties`, small integers, idle instances and closed masks."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        if ties:
            return rng.integers(0, 3, shape).astype(np.float32) * np.float32(10.0 ** rng.integers(-2, 7))
        return np.exp(rng.normal(0, 3, shape)).astype(np.float32)

    edges = draw(lanes, count + 1, len(schema.EDGE))
    # A session was last on one instance at most.
    last = np.arange(count + 1) == rng.integers(0, count + 1, (lanes, 1))
    edges[:, :, schema.column(schema.EDGE, "session_last")] = last
    mask = rng.integers(0, 2, (lanes, count + 1)) if ties else np.ones((lanes, count + 1))
    mask[:, 0] = 1
    candidates = np.zeros((lanes, count + 1, 3), np.int32)
    candidates[:, 1:, 1] = np.arange(count)
    candidates[:, :, 2] = -1
    return {
        "instances": draw(lanes, count, len(schema.INSTANCE)),
        "requests": draw(lanes, 1, len(schema.REQUEST)),
        "candidates": candidates,
        "edges": edges,
        "globals": draw(lanes, len(schema.GLOBAL)),
        "history": draw(lanes, schema.HISTORY),
        "instance_mask": np.ones((lanes, count), np.int8),
        "mask": mask.astype(np.int8),
        "kind": np.full(lanes, schema.KINDS.index("dispatch")),
        "oracle": draw(lanes, count + 1).astype(np.float64),
    }


def permute(obs, order):
    behind_default = np.r_[0, order + 1]
    moved = {"instances": obs["instances"][:, order]}
    moved |= {key: obs[key][:, behind_default] for key in ("edges", "mask", "oracle")}
    return obs | moved


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(ties=st.booleans(), **SIZES)
def test_answers_are_legal(name, lanes, count, seed, ties):
    obs = random_batch(lanes, count, seed, ties)
    rule = make_heuristic(name)
    rule.reset(lanes, seed)
    for _ in range(3):
        answers = rule.act(obs)
        assert answers.shape == (lanes,)
        assert answers.dtype == np.int64
        assert obs["mask"][np.arange(lanes), answers].all()
        if name != "default":
            assert ((answers > 0) == obs["mask"][:, 1:].any(axis=1)).all()


@pytest.mark.parametrize("name", sorted(set(NAMES) - RANDOM - {"round_robin", "default"}))
@settings(max_examples=60, deadline=None)
@given(**SIZES)
def test_permuted_instances_permute_the_answer(name, lanes, count, seed):
    obs = random_batch(lanes, count, seed, ties=False)
    order = np.random.default_rng(seed).permutation(count)
    rule = make_heuristic(name)
    rule.reset(lanes, seed)
    answers = rule.act(obs)
    rule.reset(lanes, seed)
    assert np.array_equal(order[rule.act(permute(obs, order)) - 1] + 1, answers)


@pytest.mark.parametrize("name", sorted(set(NAMES) - RANDOM))
@settings(max_examples=40, deadline=None)
@given(ties=st.booleans(), **SIZES)
def test_lanes_are_independent(name, lanes, count, seed, ties):
    ties = ties and not HEURISTICS[name].random_ties  # each lane has random numbers of its own
    steps = [random_batch(lanes, count, seed + step, ties) for step in range(3)]
    together, alone = make_heuristic(name), make_heuristic(name)
    together.reset(lanes, seed)
    answers = np.stack([together.act(obs) for obs in steps])
    for lane in range(lanes):
        alone.reset(1, seed)
        for step, obs in enumerate(steps):
            one = {key: value[lane : lane + 1] for key, value in obs.items()}
            assert alone.act(one)[0] == answers[step, lane]


@pytest.mark.parametrize("name", [name for name, rule in HEURISTICS.items() if rule.random_ties])
def test_more_lanes_and_wider_rows_change_no_answer(name):
    """Over more decisions than a block of random numbers holds."""
    few, many = make_heuristic(name), make_heuristic(name)
    few.reset(3, 5)
    many.reset(9, 5)
    answers = []
    for step in range(600):
        obs = random_batch(9, 6, seed=step, ties=True)
        obs["mask"][:3, 5:] = 0  # instances 4 and 5 are padding where only three lanes play
        narrow = {key: value[:3] for key, value in obs.items()}
        narrow |= {key: narrow[key][:, :4] for key in ("instances", "instance_mask")}
        narrow |= {key: narrow[key][:, :5] for key in ("candidates", "edges", "mask", "oracle")}
        answers.append(few.act(narrow))
        np.testing.assert_array_equal(many.act(obs)[:3], answers[-1])
    lanes = np.array(answers).T
    assert not np.array_equal(lanes[0], lanes[1])


@pytest.mark.parametrize("name", sorted(set(NAMES) - STATEFUL))
def test_reset_repeats_the_answers(name):
    obs = random_batch(32, 8, seed=5, ties=True)
    rule = make_heuristic(name)
    runs = []
    for seed in (3, 3, 4):
        rule.reset(32, seed)
        runs.append(np.stack([rule.act(obs) for _ in range(4)]))
    assert np.array_equal(runs[0], runs[1])
    seeded = name in RANDOM or HEURISTICS[name].random_ties
    assert np.array_equal(runs[0], runs[2]) != seeded


@pytest.mark.parametrize("name", sorted(STATEFUL))
def test_reset_forgets(name):
    obs = random_batch(32, 8, seed=1, ties=True)
    obs["globals"][:] = 0
    rule = make_heuristic(name)
    rule.reset(32, 0)
    first = rule.act(obs)
    assert not np.array_equal(rule.act(obs), first)
    rule.reset(32, 0)
    assert np.array_equal(rule.act(obs), first)


@pytest.mark.parametrize("name", NAMES)
def test_observation_is_left_alone(name):
    obs = random_batch(4, 5, seed=2, ties=True)
    before = {key: value.copy() for key, value in obs.items()}
    rule = make_heuristic(name)
    rule.reset(4, 0)
    rule.act(obs)
    for key, value in before.items():
        assert np.array_equal(obs[key], value)

"""The observation: a golden walk worked out by hand, staleness, noise, prefix hits and the oracle."""

import numpy as np
import pytest

from servegym.envs.cluster import observe, schema
from servegym.envs.cluster.env import DispatchEnv
from servegym.envs.cluster.episode import Episode, make_episodes
from servegym.envs.cluster.spec import ClusterSpec, parse_cluster
from servegym.envs.cluster.vector import DispatchVectorEnv
from servegym.envs.costs import cost_tables, load_profile
from servegym.envs.costs.model import iteration_ps
from servegym.envs.scenario import Scenario, Slo
from servegym.envs.workloads.workload import make_workload

FRESH = Scenario(clusters=("1xtoy",), scrape_s=0.0, slo=Slo(ttft_s=2.0, tpot_s=0.1, weight=3.0))
# available, prefill budget, urgent, host usage, engaged: of an instance without urgent requests
PLAIN = [1, 8, 0, 0, 0]
# capacity, budget, max_seqs, prefill speed of a full chunk of 8 tokens, decode speed of 4 requests
SLOW, FAST = [40, 8, 4, 8 / 0.018, 4 / 0.014], [40, 8, 4, 8 / 0.014, 4 / 0.012]


def same(array, expected):
    np.testing.assert_allclose(array, np.asarray(expected, array.dtype), rtol=1e-6, atol=0)


COLUMNS = (
    (schema.INSTANCE, {
        "RUNNING": "running", "WAITING": "waiting", "KV_USAGE": "kv_usage", "PREEMPTIONS": "preemptions",
        "SCRAPE_AGE": "scrape_age", "INFLIGHT": "inflight", "PREFILL_TOKENS": "inflight_prefill_tokens",
        "CONTEXT_TOKENS": "inflight_context_tokens", "PREDICTED_TOKENS": "inflight_predicted_tokens",
        "KV_CAPACITY": "kv_capacity_tokens", "TOKEN_BUDGET": "token_budget", "MAX_SEQS": "max_seqs",
        "PREFILL_SPEED": "prefill_tokens_per_s", "DECODE_SPEED": "decode_tokens_per_s",
        "DECODE_STEP": "decode_step_s", "AVAILABLE": "available", "PREFILL_BUDGET": "prefill_budget",
        "URGENT": "urgent_inflight", "HOST_USAGE": "host_usage", "ENGAGED": "engaged",
    }),
    (schema.REQUEST, {
        "PROMPT": "prompt_tokens", "PREDICTED": "predicted_output_tokens", "PRIORITY": "priority",
        "SLO_TTFT": "slo_ttft_s", "SLO_TPOT": "slo_tpot_s", "WEIGHT": "weight", "WAITED": "waited_s",
        "TURN": "turn", "STREAMED": "streamed_tokens", "LEFT": "predicted_left_tokens",
        "KV_TOKENS": "kv_tokens", "RUNS": "running", "PREEMPTED": "preemptions",
        "SOURCE_USAGE": "source_kv_usage", "SOURCE_STEP": "source_step_s", "SOURCE_QUEUE": "source_queue_s",
    }),
    (schema.EDGE, {
        "IS_DEFAULT": "is_default", "PREFIX_HIT": "prefix_hit_tokens", "QUEUE": "queue_s",
        "PREFILL": "prefill_s", "STEP_AFTER": "step_after_s", "KV_AFTER": "kv_after",
        "SESSION_LAST": "session_last", "SWAP": "swap", "COPY": "copy_s", "PREFILL_CAP": "prefill_cap",
        "ITERATION": "iteration_s",
    }),
    (schema.GLOBAL, {
        "INSTANCES": "instances", "ARRIVAL_RATE": "arrival_rate", "ARRIVAL_TOKENS": "arrival_prompt_tokens",
        "SINCE_LAST": "since_last_arrival_s", "ALL_INFLIGHT": "inflight",
    }),
)  # fmt: skip


@pytest.mark.parametrize(("features", "columns"), COLUMNS)
def test_columns_are_those_of_the_schema(features, columns):
    assert len(columns) == len(features)
    for constant, name in columns.items():
        assert getattr(observe, constant) == schema.column(features, name)


def test_golden_walk(toy_episode):
    env = DispatchEnv(FRESH, episodes=[toy_episode])
    obs, info = env.reset(seed=0)
    assert info == {"now_s": pytest.approx(1.0)}

    # t = 1: both idle; the default is instance 0 by index.
    same(obs["instances"], [[0] * 9 + [*SLOW, 0, *PLAIN], [0] * 9 + [*FAST, 0, *PLAIN]])
    same(obs["requests"], [[6, 2, 0, 2.0, 0.1, 3.0, 0, 0, 0, 2] + [0] * 6])
    same(obs["candidates"], [[0, 0, -1], [0, 0, -1], [0, 1, -1]])
    slow, fast = [0, 0, 0.016, 0.011, 0.2] + [0] * 5, [0, 0, 0.013, 0.0105, 0.2] + [0] * 5
    same(obs["edges"], [[1, *slow], [0, *slow], [0, *fast]])
    same(obs["globals"], [2, 0.1, 0.6, 1.0, 0])
    same(obs["history"], [0] * 15 + [1])
    assert obs["instance_mask"].tolist() == [1, 1]
    assert obs["mask"].tolist() == [1, 1, 1]
    assert obs["kind"] == 0

    # t = 1.02: instance 0 has streamed its first token at 1.016 and decodes until 1.038.
    obs, reward, terminated, truncated, info = env.step(1)
    assert (reward, terminated, truncated) == (pytest.approx(-3 * 0.02), False, False)
    assert info == {"elapsed_s": pytest.approx(0.02), "now_s": pytest.approx(1.02)}
    busy = [1, 0, 0.2, 0, 0, 1, 0, 7, 1]
    same(obs["instances"], [[*busy, *SLOW, 0.011, 1, 8, 1, 0, 0], [0] * 9 + [*FAST, 0, *PLAIN]])
    same(obs["requests"], [[10, 5, -2, 2.0, 0.1, 3.0, 0, 0, 0, 5] + [0] * 6])
    same(obs["candidates"], [[0, 1, -1], [0, 0, -1], [0, 1, -1]])
    # The prompt takes two chunks, of 8 and of 2 tokens.
    slow, fast = [0, 0, 0.030, 0.012, 23 / 40] + [0] * 5, [0, 0, 0.025, 0.0105, 15 / 40] + [0] * 5
    same(obs["edges"], [[1, *fast], [0, *slow], [0, *fast]])
    faded = np.exp(-0.002)
    same(obs["globals"], [2, 0.1 * faded + 0.1, 0.6 * faded + 1.0, 0.02, 1])
    same(obs["history"], [0] * 15 + [2])

    # t = 2.5: r0 finished at 1.038, r1, on instance 1 by default, at 1.0765; r2 is r0's next turn.
    obs, reward, terminated, truncated, info = env.step(0)
    assert reward == pytest.approx(-3 * (0.018 + 0.0565))
    assert info == {"elapsed_s": pytest.approx(1.48), "now_s": pytest.approx(2.5)}
    same(obs["instances"], [[0] * 9 + [*SLOW, 0, *PLAIN], [0] * 9 + [*FAST, 0, *PLAIN]])
    same(obs["requests"], [[4, 1, 1, 2.0, 0.1, 3.0, 0, 1, 0, 1] + [0] * 6])
    slow, fast = [0, 0, 0.014, 0.011, 5 / 40, 1] + [0] * 4, [0, 0, 0.012, 0.0105, 5 / 40] + [0] * 5
    same(obs["edges"], [[1, *slow], [0, *slow], [0, *fast]])
    rate, tokens = (0.1 * faded + 0.1) * np.exp(-0.148), (0.6 * faded + 1.0) * np.exp(-0.148)
    same(obs["globals"], [2, rate + 0.1, tokens + 0.4, 1.48, 0])
    same(obs["history"], [0] * 14 + [2, 1])

    # The end, at 2.512: nothing to decide.
    obs, reward, terminated, truncated, info = env.step(2)
    assert (reward, terminated, truncated) == (pytest.approx(-3 * 0.012), True, False)
    same(obs["instances"], [[0] * 9 + [*SLOW, 0, *PLAIN], [0] * 9 + [*FAST, 0, *PLAIN]])
    for name in ("requests", "edges"):
        assert (obs[name] == 0).all()
    assert obs["mask"].tolist() == [1, 0, 0]
    fade = np.exp(-0.0012)
    same(obs["globals"], [2, (rate + 0.1) * fade, (tokens + 0.4) * fade, 0.012, 0])
    assert env.records().instance.tolist() == [0, 1, 1]


def test_decode_progress_between_events(toy_instance):
    """Inside a stretch the router has seen the whole steps that have passed, and memory grows with them."""
    workload = make_workload("stretch", [0.0, 0.2], [4, 1], [29, 1])
    spec = ClusterSpec("toy", (toy_instance(1.0),))
    env = DispatchEnv(FRESH, episodes=[Episode(workload, spec, np.array([40, 1], np.int32))])
    env.reset(seed=0)
    obs, *_ = env.step(1)
    # 14 ms of prefill, then steps of 11 ms: 16 have passed at 0.2 s.
    node = dict(zip([f.name for f in schema.INSTANCE], obs["instances"][0], strict=True))
    assert node["inflight_context_tokens"] == 4 + 1 + 16
    assert node["inflight_predicted_tokens"] == 40 - 17
    # 2 blocks since the first step, and one more for every 4 steps since.
    assert node["kv_usage"] == pytest.approx((2 + 16 / 4) / 10)


def test_a_request_that_fits_only_one_instance(toy_instance):
    workload = make_workload("large", [0.0], [20], [8])
    fleet = ClusterSpec("toy", (toy_instance(1.0, kv_blocks=6), toy_instance(0.5)))
    env = DispatchEnv(FRESH, episodes=[Episode(workload, fleet, np.array([8], np.int32))])
    obs, _ = env.reset(seed=0)
    assert obs["mask"].tolist() == [1, 0, 1]
    assert obs["candidates"][0].tolist() == [0, 1, -1]
    assert env.action_masks().tolist() == [True, False, True]


def test_prefix_hits_shorten_the_prefill(toy_instance):
    ids = np.array([7, 8, 7, 8, 9], np.int32)
    workload = make_workload(
        "prefix", [0.0, 1.0], [8, 12], [1, 1],
        prefix_ids=ids, prefix_offsets=np.array([0, 2, 5]), prefix_block_tokens=4,
    )  # fmt: skip
    fleet = ClusterSpec("toy", (toy_instance(1.0), toy_instance(0.5)))
    env = DispatchEnv(FRESH, episodes=[Episode(workload, fleet, np.array([1, 1], np.int32))])
    env.reset(seed=0)
    obs, *_ = env.step(1)
    hit, prefill = obs["edges"][:, observe.PREFIX_HIT], obs["edges"][:, observe.PREFILL]
    same(hit, [8, 8, 0])
    same(prefill, [0.014, 0.014, 0.014 + 0.012])


def small(**changes) -> Scenario:
    fields = {
        "clusters": ("2xa100-llama-3.1-8b+1xl40s-llama-3.1-8b",),
        "loads": (0.8, 1.2),
        "requests": 150,
    }
    return Scenario(**{**fields, **changes})


def walk(scenario: Scenario, seed: int = 3):
    """Observations and times of one episode under the default rule, and its records."""
    env = DispatchEnv(scenario, episodes=make_episodes(scenario, 1, 0))
    obs, _ = env.reset(seed=seed)
    rows, done = [], False
    while not done:
        rows.append(obs)
        obs, _, done, _, _ = env.step(0)
    return rows, env.records()


def test_scraped_metrics_are_those_of_the_last_tick():
    period = 0.5
    rows, records = walk(small(scrape_s=period))
    now = np.sort(records.arrived_s)
    ticks = {}
    for t, obs in zip(now, rows, strict=True):
        for i, node in enumerate(obs["instances"]):
            age = float(node[observe.SCRAPE_AGE])
            assert -1e-6 <= age <= period + 1e-6 or t < period
            if t < period:
                continue
            tick = t - age
            ticks.setdefault(i, []).append(tick % period)
            there = (records.instance == i) & (records.dispatched_s < tick) & (records.finished_s > tick)
            assert node[observe.RUNNING] + node[observe.WAITING] == there.sum()
    phases = [np.median(values) for values in ticks.values()]
    for phase, values in zip(phases, ticks.values(), strict=True):
        np.testing.assert_allclose(values, phase, atol=1e-4)
    assert len({round(p, 3) for p in phases}) == 3, "instances are read out of step"


def test_step_times_are_those_of_the_cost_model():
    """At every decision, for both kinds of instance, with and without the request."""
    scenario = small(scrape_s=0.0)
    specs = parse_cluster(scenario.clusters[0]).instances
    tables = [cost_tables([load_profile(s.profile)], 8192, 1024) for s in specs]
    rows, _ = walk(scenario)
    for obs in rows[::5]:
        prompt = int(obs["requests"][0, 0])
        for i, node in enumerate(obs["instances"]):
            n, context = int(node[observe.INFLIGHT]), int(node[observe.CONTEXT_TOKENS])
            if n:
                step = iteration_ps(tables[i], 0, n, context, context // n, n, n, 0, 0)
                assert node[observe.DECODE_STEP] == pytest.approx(step * 1e-12, rel=1e-6)
            n, context = n + 1, context + prompt
            step = iteration_ps(tables[i], 0, n, context, context // n, n, n, 0, 0)
            assert obs["edges"][i + 1, observe.STEP_AFTER] == pytest.approx(step * 1e-12, rel=1e-6)


def test_fresh_metrics_without_a_period():
    rows, _ = walk(small(scrape_s=0.0))
    for obs in rows:
        node = obs["instances"]
        assert (node[:, observe.SCRAPE_AGE] == 0).all()
        same(node[:, observe.RUNNING] + node[:, observe.WAITING], node[:, observe.INFLIGHT])


def test_noise_has_the_stated_spread():
    """A policy that does not look is not moved by noise, so both episodes are the same."""
    exact, _ = walk(small(scrape_s=0.0, requests=400))
    noisy, _ = walk(small(scrape_s=0.0, requests=400, noise=0.2))
    column = [observe.RUNNING, observe.KV_USAGE]
    a = np.concatenate([obs["instances"][:, column].ravel() for obs in exact])
    b = np.concatenate([obs["instances"][:, column].ravel() for obs in noisy])
    assert ((a == 0) == (b == 0)).all()
    ratio = b[a > 0] / a[a > 0]
    assert ratio.mean() == pytest.approx(1.0, abs=0.02)
    assert ratio.std() == pytest.approx(0.2, rel=0.05)
    again, _ = walk(small(scrape_s=0.0, requests=400, noise=0.2))
    assert all((x["instances"] == y["instances"]).all() for x, y in zip(noisy, again, strict=True))


def test_oracle_is_the_work_left(toy_instance):
    """r0 on the slow instance has 2 of its 3 tokens to come at 1.02 s; four requests take 14 ms a step."""
    workload = make_workload("toy", [1.0, 1.02, 1.021], [6, 10, 4], [3, 4, 1])
    cluster = ClusterSpec("toy", (toy_instance(1.0), toy_instance(0.5)))
    env = DispatchVectorEnv(
        1, FRESH, episodes=[Episode(workload, cluster, np.array([2, 5, 1], np.int32))], oracle=True
    )
    obs, _ = env.reset(seed=0)
    same(obs["oracle"], [[0, 0, 0]])
    obs, *_ = env.step(np.array([1]))
    same(obs["oracle"], [[0, 2 * 0.014 / 4, 0]])
    obs, *_ = env.step(np.array([2]))
    # r1's first chunk of 8 is under way on the fast one: 2 prompt tokens to start, 4 tokens to come.
    # Both have one request in flight, so the default is the first.
    same(obs["oracle"], [[2 * 0.014 / 4, 2 * 0.014 / 4, 2 * 0.014 / 8 + 4 * 0.012 / 4]])

"""Questions from a view equal those that the environment asks for the same state."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.spec import Migration
from servegym.envs.cluster.vector import ClusterVectorEnv
from servegym.envs.costs import load_profile, save_profile
from servegym.envs.scenario import Scenario, load_scenario
from servegym.errors import InputError
from servegym.runtime.questions import (
    Dispatch,
    Stay,
    ask_budget,
    ask_dispatch,
    ask_migrate,
    ask_move,
    ask_preempt,
)
from servegym.runtime.view import ClusterView, InstanceSettings, InstanceView, RequestView
from tests.runtime.mirror import Mirror, assert_same

SWAPS = {"swap_gib": 1, "kv_blocks": 700, "preemption": "swap", "swap_group": 8, "queue": "priority"}
ASYNCHRONOUS = {"swap_gib": 4, "kv_blocks": 900, "async_scheduling": True}
WALKS = {
    "scarce": (load_scenario("scarce"), None, {"dispatch", "migrate", "move"}, 600),
    "urgent": (load_scenario("urgent"), None, {"dispatch", "migrate", "move"}, 600),
    "mixed": (load_scenario("mixed"), None, {"dispatch", "migrate", "move", "budget"}, 500),
    "mixed, drained by swap": (
        replace(
            load_scenario("mixed"), clusters=("2xl40s-llama-3.1-8b+1xa100-llama-3.1-8b",), engine=SWAPS,
            priorities={"0": 0.5, "1": 0.5}, drain={"1": 5.0}, loads=(1.5, 1.5),
        ),
        None, {"dispatch", "preempt", "migrate", "move", "budget"}, 700,
    ),
    "mixed, asynchronous, noisy": (
        replace(
            load_scenario("mixed"), clusters=("2xa100-llama-3.1-8b+2xl40s-llama-3.1-8b",),
            engine=ASYNCHRONOUS, scrape_s=0.0, noise=0.1,
        ),
        None, {"dispatch", "preempt", "migrate", "move", "budget"}, 700,
    ),
    "reasoning": (load_scenario("reasoning"), None, {"dispatch", "migrate", "move"}, 500),
    "sessions with levers": (
        replace(
            load_scenario("sessions"), engine={"kv_blocks": 2000, "swap_gib": 1, "reserve_prompt": False},
            loads=(1.2, 1.2), migration=Migration(), budget_period_s=0.5,
        ),
        None, {"dispatch", "migrate", "move", "budget"}, 600,
    ),
    "sessions, dispatch only": (load_scenario("sessions"), ("dispatch",), {"dispatch"}, 200),
}  # fmt: skip


def walk(scenario: Scenario, decisions: tuple[str, ...] | None, steps: int) -> Counter[str]:
    """Play random answers; every question is compared."""
    one = replace(scenario, clusters=scenario.clusters[:1], requests=300)
    episodes = make_episodes(one, 1, 1)
    env = ClusterVectorEnv(1, one, decisions=decisions, episodes=episodes, copy=False)
    obs, _ = env.reset(seed=5)
    world = env.lanes().world
    mirror, rng = Mirror(world, episodes[0].cluster), np.random.default_rng(0)
    asked: Counter[str] = Counter()
    for _ in range(steps):
        question = mirror.ask(obs["requests"].shape[1])
        assert_same(question, obs, world)
        asked[question.kind] += 1
        answer = int(rng.choice(list(question.actions)))
        mirror.answered(question, answer)
        obs, _, terminated, _, _ = env.step(np.array([answer]))
        if terminated[0]:
            break
    env.close()
    return asked


@pytest.mark.parametrize("name", WALKS)
def test_every_question_of_an_episode_is_the_environments(name):
    scenario, decisions, kinds, steps = WALKS[name]
    asked = walk(scenario, decisions, steps)
    assert asked.keys() >= set(kinds), asked


def test_estimates_hold_what_every_iteration_of_a_prompt_takes_more(tmp_path):
    path = tmp_path / "eager.json"
    save_profile(replace(load_profile("a100-llama-3.1-8b"), chunked_us=7000.0), path)
    scenario = replace(load_scenario("mixed"), clusters=(f"2x{path}+1xl40s-llama-3.1-8b",))
    asked = walk(scenario, None, 300)
    assert asked.keys() >= {"dispatch", "migrate", "move", "budget"}, asked


# --- a view alone -----------------------------------------------------------------------------------------


def fleet(count: int = 3, **settings) -> ClusterView:
    made = InstanceSettings.of("a100-llama-3.1-8b", kv_blocks=64, **settings)
    return ClusterView([InstanceView(made) for _ in range(count)], longest_output=16)


def send(view: ClusterView, key: str, instance: int, streamed: int = 0, **fields) -> RequestView:
    request = RequestView(key, view.now_s, 100, 20, **fields)
    view.arrived(request)
    view.dispatched(request, instance)
    view.streamed(request, streamed)
    return request


def test_a_view_is_only_read():
    view = fleet()
    for k in range(3):
        send(view, f"r{k}", 0, streamed=k)
    view.now_s = 7.0
    request = RequestView("new", 7.0, 50, 10)
    first, second = ask_dispatch(view, request), ask_dispatch(view, request)
    for name in first.obs:
        np.testing.assert_array_equal(first.obs[name], second.obs[name])
    assert first.actions[0] == Dispatch(1)  # the first of the idle ones


def test_without_an_instance_that_takes_the_request_it_stays():
    view = fleet()
    for instance in view.instances:
        instance.available = False
    question = ask_dispatch(view, RequestView("r", 0.0, 50, 10))
    assert question.actions == {0: Stay()}
    assert not question.is_open
    view.instances[1].available = True
    assert set(ask_dispatch(view, RequestView("r", 0.0, 50, 10)).actions.values()) == {Dispatch(1)}
    # However long it is, the largest instance may get it.
    assert set(ask_dispatch(view, RequestView("r", 0.0, 10**6, 10)).actions.values()) == {Dispatch(1)}


def test_a_router_infers_what_its_engines_do():
    view = fleet(2, max_seqs=8)
    for k in range(4):
        send(view, f"r{k}", 0, streamed=k)
    view.instances[0].seen_kv_usage = 0.5
    for instance in view.instances:
        instance.infer_engine()
    assert [r.key for r in view.instances[0].running] == ["r1", "r2", "r3"]
    assert [r.key for r in view.instances[0].waiting] == ["r0"]
    assert view.instances[0].free_blocks == 32
    pair = ask_migrate(view)
    assert {(a.source, a.target) for c, a in pair.actions.items() if c} == {(0, 1)}
    move = ask_move(view, 0, 1)
    assert {a.key for a in move.actions.values()} == {"r0", "r1", "r3"}  # shortest, longest, waiting
    assert ask_migrate(view, paired=[1]).actions == {0: Stay()}


def test_questions_that_make_no_sense_are_refused():
    view = fleet()
    with pytest.raises(InputError, match="running = 0"):
        ask_preempt(view, 0)
    with pytest.raises(InputError, match="waiting = 0"):
        ask_budget(view, 0)
    assert ask_move(view, 0, 1).actions == {0: Stay()}

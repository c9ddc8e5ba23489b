"""Evolved rules: what their weights mean, that the search improves them, and who teaches what."""

import json
from dataclasses import replace

import numpy as np
import pytest

from servegym.agents.evolved import ByScenario, Evolved, EvolvedDispatch, evolve, read_rule, write_rule
from servegym.agents.evolved.rule import CONTEXTS, FEATURES, SHAPE, lmetric_weights
from servegym.agents.evolved.search import _goodput
from servegym.agents.heuristics import make_heuristic
from servegym.agents.ppo import PPO, PPOConfig, imitate
from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.schema import KINDS
from servegym.envs.cluster.vector import ClusterVectorEnv
from servegym.envs.scenario import Scenario, Slo
from servegym.errors import InputError
from servegym.evaluation import measure
from servegym.models.config import NetworkConfig

TIGHT = Scenario(
    clusters=("1xa100-llama-3.1-8b+1xl40s-llama-3.1-8b",), loads=(0.8, 1.2), requests=60,
    slo=Slo(ttft_s=0.3, tpot_s=0.03), budget_period_s=0.5, name="tight",
)  # fmt: skip
LOOSE = replace(TIGHT, name="loose", clusters=("3xh100-llama-3.1-8b",))


def questions(scenario=TIGHT, lanes=4, steps=30):
    """Observations of an environment that answers by default."""
    env = ClusterVectorEnv(lanes, scenario, episodes=make_episodes(scenario, lanes, 0))
    obs, _ = env.reset(seed=0)
    for _ in range(steps):
        yield obs
        obs = env.step(np.zeros(lanes, np.int64))[0]


def weighted(**weights):
    """Weights by feature, always."""
    table = np.zeros(SHAPE)
    for name, weight in weights.items():
        table[FEATURES.index(name), CONTEXTS.index("always")] = weight
    return table


@pytest.mark.parametrize(
    ("weights", "rule"), [(weighted(inflight=1.0), "least_request"), (weighted(kv=-1.0), None)]
)
def test_single_features_are_published_rules(weights, rule):
    evolved, known = EvolvedDispatch(weights), make_heuristic(rule or "least_request")
    evolved.reset(4, 0)
    known.reset(4, 0)
    same = [(evolved.act(obs) == known.act(obs)).all() for obs in questions()]
    assert all(same) == (rule is not None)


def test_it_starts_as_lmetric_but_for_the_scale_of_tokens():
    evolved, known = EvolvedDispatch(lmetric_weights()), make_heuristic("lmetric")
    evolved.reset(4, 0)
    known.reset(4, 0)
    asked = [(obs["kind"] == 0, evolved.act(obs), known.act(obs)) for obs in questions()]
    dispatches, ours, theirs = map(np.concatenate, zip(*asked, strict=True))
    assert dispatches.sum() > 50
    assert (ours == theirs)[dispatches].mean() > 0.9


def test_contexts_change_the_answer_of_a_request():
    table = np.zeros(SHAPE)
    table[FEATURES.index("decode_speed"), CONTEXTS.index("output")] = 1.0  # long answers to the slow one
    rule = EvolvedDispatch(table)
    rule.reset(4, 0)
    obs = next(iter(questions()))
    short, long = (
        rule.act(obs | {"requests": np.full_like(obs["requests"], tokens)}) for tokens in (20.0, 2000.0)
    )
    asked = obs["kind"] == 0
    assert (short[asked] != long[asked]).all()


def test_weights_may_differ_by_lane():
    both = EvolvedDispatch(np.stack([weighted(inflight=1.0), weighted(inflight=-1.0)] * 2))
    parts = [EvolvedDispatch(weighted(inflight=w)) for w in (1.0, -1.0)]
    for rule in (both, *parts):
        rule.reset(4, 0)
    for obs in questions():
        answers, (first, second) = both.act(obs), (rule.act(obs) for rule in parts)
        assert answers.tolist() == np.where([True, False] * 2, first, second).tolist()


def test_the_searchs_goodput_is_that_of_evaluation():
    scenario = replace(TIGHT, reward="goodput")
    episodes = make_episodes(scenario, 3, 5)
    rule = Evolved("tight", "lmetric+budget_tpot", {"factor": 1.5}, lmetric_weights())
    built_in = {"budget": make_heuristic("budget_tpot", factor=1.5)}
    found = _goodput(rule.weights[None], scenario, episodes, built_in, 0, 1)
    row = measure(rule.policy(), scenario, episodes, num_threads=1)
    assert 0.05 < found[0] < 0.999  # otherwise it says little
    assert found[0] == pytest.approx(row.samples["goodput"].mean())


def test_the_search_climbs_and_repeats():
    told = []
    arguments = {"generations": 6, "population": 16, "seeds": 1, "num_threads": 1}
    found = evolve(TIGHT, "lmetric", {}, **arguments, progress=lambda *what: told.append(what))
    assert [generation for generation, *_ in told] == list(range(6))
    again = evolve(TIGHT, "lmetric", {}, **arguments)
    assert np.array_equal(found, again)
    episodes = make_episodes(TIGHT, 24, 77)
    score = [
        measure(Evolved("tight", "lmetric", {}, w).policy(), TIGHT, episodes, num_threads=1).samples
        for w in (lmetric_weights(), found)
    ]
    assert score[1]["goodput"].mean() > score[0]["goodput"].mean()


def test_files_keep_the_rule_and_refuse_others(tmp_path):
    weights = np.random.default_rng(0).normal(size=SHAPE).round(4)
    path = tmp_path / "tight.json"
    write_rule(path, Evolved("tight", "lmetric+budget_tpot", {"factor": 1.5}, weights, {"seed": 1}))
    back = read_rule(path)
    assert np.array_equal(back.weights, weights)
    assert (back.scenario, back.system, back.params) == ("tight", "lmetric+budget_tpot", {"factor": 1.5})
    assert back.policy().kinds == ("dispatch", "budget")
    raw = json.loads(path.read_text())
    for broken in (
        raw | {"weights": {"nothing": {"always": 1.0}}},
        raw | {"weights": {"inflight": {"always": float("nan")}}},
        raw | {"system": "nobody"},
        {},
        [],
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(InputError):
            read_rule(path)
    with pytest.raises(InputError, match="evolve"):
        read_rule(tmp_path / "none.json")


def test_a_population_that_cannot_be_divided_and_rules_the_model_lacks_are_refused():
    with pytest.raises(InputError, match="multiple of 4"):
        evolve(TIGHT, "lmetric", {}, generations=1, population=6)
    with pytest.raises(InputError, match="victim_least_left_oracle"):
        evolve(TIGHT, "lmetric+victim_least_left_oracle", {}, generations=1)


def test_each_scenario_has_its_teacher():
    rules = {
        "tight": Evolved("tight", "lmetric", {}, weighted(inflight=1.0)),
        "loose": Evolved("loose", "lmetric+budget_fixed", {}, weighted(inflight=-1.0)),
    }
    episodes = make_episodes(TIGHT, 2, 0) + make_episodes(LOOSE, 2, 0)
    names = [episode.scenario.name for episode in episodes]
    env = ClusterVectorEnv(4, [TIGHT, LOOSE], episodes=episodes)
    teacher = ByScenario(rules, names)
    teacher.watch(env)
    parts = [rules[name].policy() for name in ("tight", "loose")]
    for policy in (teacher, *parts):
        policy.reset(4, 0)
    obs, _ = env.reset(seed=0)
    kinds = set()
    for _ in range(60):
        mine, loose = env.lanes().world.lane["episode"], parts[1].act(obs)
        answers = teacher.act(obs)
        assert answers.tolist() == np.where(mine < 2, parts[0].act(obs), loose).tolist()
        kinds |= {KINDS[k] for k in obs["kind"][mine >= 2]}
        obs = env.step(answers)[0]
    assert kinds == {"dispatch", "budget"}
    with pytest.raises(InputError, match="loose"):
        ByScenario({"tight": rules["tight"]}, names)


def test_a_network_learns_from_them():
    scenarios = [replace(s, reward="goodput") for s in (TIGHT, LOOSE)]
    episodes = [e for s in scenarios for e in make_episodes(s, 4, 0)]
    rules = {s.name: Evolved(s.name, "lmetric", {}, weighted(inflight=1.0)) for s in scenarios}
    env = ClusterVectorEnv(16, scenarios, episodes=episodes, copy=False)
    config = PPOConfig(n_steps=32, batch_size=128, learning_rate=5e-3, num_threads=1)
    model = PPO(env, NetworkConfig(16, 1), config)
    agreements = imitate(model, ByScenario(rules, [e.scenario.name for e in episodes]), 25)
    assert agreements[0] < 0.6
    assert agreements[-1] > 0.8
    assert model.optimizer.param_groups[0]["lr"] == pytest.approx(5e-3 * (1 - 0.9 * 24 / 25))

"""Scenarios: what a TOML file or a checkpoint may say, and what the shipped ones are."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import servegym.envs.costs
from servegym.agents.heuristics import make_heuristic
from servegym.agents.play import play
from servegym.envs.cluster.episode import fleets_of, make_episodes
from servegym.envs.cluster.spec import Migration
from servegym.envs.scenario import Scenario, load_scenario, read_scenario, scenario_names
from servegym.errors import InputError

PROFILES = Path(servegym.envs.costs.__file__).parent / "profiles"

BAD = {
    "clusters = [1]": "clusters = 1: expected str",
    'clusters = "4xa100-llama-3.1-8b"': "clusters",
    'loads = ["a", "b"]': "loads = 'a': expected a finite number",
    "loads = [0.5]": "loads",
    "loads = [0.5, inf]": "loads = inf",
    "loads = [0.5, 1e9]": "loads",
    "noise = inf": "noise = inf: expected a finite number",
    "noise = true": "noise = True",
    "prediction_error = -0.1": "prediction_error",
    "beta = nan": "beta = nan",
    "scrape_s = 1e9": "scrape_s = 1000000000.0: must lie in 0..1e.06",
    "requests = 3.5": "requests = 3.5: expected int",
    "requests = true": "requests = True",
    "requests = 99999999999": "requests = 99999999999: must lie within 32 bits",
    "requests = 2000000000": "requests",
    "slo = { ttft_s = nan }": "slo.ttft_s = nan",
    "slo = { speed = 1.0 }": "slo.speed = 1.0: unknown field",
    "slo = 3": "slo = 3",
    "class_slo = { chat = 1 }": "class_slo.chat = 1",
    "class_slo = { chat = { weight = -1 } }": "chat",
    "engine = { profil = 1 }": "engine.profil = 1: unknown field",
    'engine = { profile = "a100-llama-3.1-8b" }': "engine.profile",
    'engine = { kv_blocks = "x" }': "engine.kv_blocks = 'x': expected int",
    "engine = { kv_blocks = 1e300 }": "engine.kv_blocks",
    "engine = { watermark = nan }": "engine.watermark = nan",
    "engine = { queue = 1 }": "engine.queue = 1: expected str",
    'zero_output = "keep"': "zero_output = 'keep': choose one of refuse, drop",
    "classes = { a = 0.5 }": "classes",
    "classes = { a = 1.5, b = -0.5 }": "classes",
    'classes = { a = "x" }': "classes.a = 'x'",
    "priorities = { high = 1.0 }": "priorities are whole numbers",
    "class_priority = { a = 0.5 }": "class_priority.a = 0.5: expected int",
    "class_priority = { a = 40000 }": "class_priority = {'a': 40000}: priorities are whole numbers",
    "class_priority = { a = 1 }\npriorities = { 0 = 1.0 }": "leave one of them out",
    "budget_period_s = -0.5": "budget_period_s = -0.5: must lie in 0..",
    "migration = true": "migration = True: expected Migration",
    "migration = { period = 1.0 }": "migration.period = 1.0: unknown field",
    "drain = { last = 3.0 }": "drain",
    "drain = { 0 = -1.0 }": "drain",
    "priorities = { 0 = 0.5, 40000 = 0.5 }": "priorities are whole numbers",
}


@pytest.mark.parametrize("text", BAD)
def test_ill_typed_fields_are_refused(text, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=BAD[text]):
        load_scenario(str(path))


def test_python_callers_meet_the_same_checks():
    with pytest.raises(InputError, match=r"engine\.profil"):
        Scenario(engine={"profil": 1})
    with pytest.raises(InputError, match="noise"):
        Scenario(noise=float("inf"))


@pytest.mark.parametrize("name", scenario_names())
def test_scenarios_survive_json(name):
    scenario = load_scenario(name)
    assert scenario.description
    assert read_scenario("config.json", json.loads(json.dumps(asdict(scenario)))) == scenario


def test_every_field_is_read(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        "loads = [1, 2]\nclasses = { a = 1, b = 0 }\npriorities = { -1 = 0.5, 0 = 0.5 }\n"
        "class_slo = { a = { weight = 3 } }\nengine = { kv_blocks = 500, watermark = 0 }\n"
    )
    scenario = load_scenario(str(path))
    assert scenario.loads == (1.0, 2.0)
    assert scenario.classes == {"a": 1.0, "b": 0.0}
    assert scenario.priorities == {"-1": 0.5, "0": 0.5}
    assert scenario.class_slo["a"].weight == 3.0
    assert scenario.engine["kv_blocks"] == 500


LEVERS = {
    "swap without a link to host memory": (
        {"clusters": ("1xa10-llama-7b",), "engine": {"swap_gib": 4.0}},  # its profile has no swap link
        "a10-llama-7b: swap_gib = 4.0: the profile has no swap costs",
    ),
    "swap as default without host memory": (
        {"engine": {"preemption": "swap"}},
        "preemption = 'swap': swap needs host memory",
    ),
    "an unknown preemption": ({"engine": {"preemption": "kill"}}, "choose recompute or swap"),
    "migration without pause": ({"migration": Migration(period_s=0.0)}, r"migration\.period_s = 0.0"),
    "a migration of no stage": ({"migration": Migration(stages=0)}, r"migration\.stages = 0"),
    "drain of an instance that no fleet has": ({"drain": {"4": 10.0}}, "drain = '4': the largest fleet"),
    "drain of all": ({"drain": {str(i): 10.0 for i in range(4)}}, "every instance of .* drains"),
    "a priority of a class that is not there": (
        {"class_priority": {"gold": 1}},
        "class_priority = 'gold': the workload's classes are conv",
    ),
}


@pytest.mark.parametrize("case", LEVERS)
def test_levers_that_a_cluster_lacks_are_refused(case):
    changes, message = LEVERS[case]
    scenario = Scenario(
        requests=20, workload="llumnix:128-128" if "swap without" in case else "azure2023_conv"
    )
    scenario = replace(scenario, **changes)
    with pytest.raises(InputError, match=message):
        play(make_heuristic("default"), scenario, make_episodes(scenario, 1, 0))


def test_migration_needs_a_network(tmp_path):
    profile = json.loads((PROFILES / "a100-llama-3.1-8b.json").read_text())
    path = tmp_path / "alone.json"
    path.write_text(json.dumps(profile | {"network": None}))
    scenario = Scenario(clusters=(f"2x{path}",), requests=20, migration=Migration())
    with pytest.raises(InputError, match=r"migration = .*: the profile has no network costs"):
        play(make_heuristic("default"), scenario, make_episodes(scenario, 1, 0))


def test_drains_reach_the_instances_that_a_fleet_has():
    scenario = Scenario(clusters=("2xa100-llama-3.1-8b", "4xa100-llama-3.1-8b"), drain={"3": 10.0})
    drained = [[spec.drain_at_s for spec in fleet.instances] for fleet in fleets_of(scenario)]
    assert drained == [[None, None], [None, None, None, 10.0]]


def test_class_priorities_hold_for_every_request_of_a_class():
    scenario = replace(load_scenario("urgent"), requests=300)
    (episode,) = make_episodes(scenario, 1, 0)
    w = episode.workload
    assert np.array_equal(w.priority, w.class_id)  # urgent is class 0 of priority 0
    assert 0.05 < (w.priority == 0).mean() < 0.16


@pytest.mark.parametrize("name", scenario_names())
def test_shipped_scenarios_play(name):
    scenario = replace(load_scenario(name), requests=200)
    assert 4 <= len(fleets_of(scenario)[0]) <= 8
    episodes = make_episodes(scenario, 2, 0)
    for episode, records in zip(episodes, play(make_heuristic("lmetric"), scenario, episodes), strict=True):
        assert len(records) == len(episode.workload) == 200
        assert np.isfinite(records.finished_s).all()
        assert len(set(records.instance.tolist())) > 1


def test_agents_share_prefixes():
    scenario = replace(load_scenario("agents"), requests=400)
    episodes = make_episodes(scenario, 1, 0)
    aware, blind = (play(make_heuristic(rule), scenario, episodes)[0] for rule in ("lmetric", "round_robin"))
    assert aware.cached_tokens.sum() > 1.5 * blind.cached_tokens.sum() > 0
    off = replace(scenario, prefix_caching=False)
    cold = play(make_heuristic("lmetric"), off, make_episodes(off, 1, 0))[0]
    assert cold.cached_tokens.sum() == 0

"""Scenarios: what a TOML file or a checkpoint may say, and what the shipped ones are."""

import json
from dataclasses import asdict

import pytest

from servegym.envs.scenario import Scenario, load_scenario, read_scenario, scenario_names
from servegym.errors import InputError

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

"""The sim-to-real benchmark on a transformer of a few thousand parameters: its last line, its requests."""

import json
from pathlib import Path

import pytest

from servegym.runtime.calibrate.shapes import Limits

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import sim_to_real

    shape = {"hidden_size": 48, "intermediate_size": 64, "vocab_size": 64}
    monkeypatch.setattr(sim_to_real, "SHAPE", {**sim_to_real.SHAPE, **shape, "head_dim": 4})
    monkeypatch.setattr(sim_to_real, "LIMITS", Limits(64, 4, 96, 48, 16))
    for name, value in {
        "DEPTHS": {"shallow": 1, "deep": 2},
        "REQUESTS": 24,
        "SECONDS": 0.0,
        "LEAST_CYCLES": 2,
    }.items():
        monkeypatch.setattr(sim_to_real, name, value)
    monkeypatch.setattr(sim_to_real, "POLICIES", ("round_robin", "mooncake"))
    monkeypatch.setattr("sys.argv", ["sim_to_real.py"])
    return sim_to_real


def test_the_last_line_holds_value_goal_spread_and_every_figure(tiny, capsys):
    tiny.main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["name"], line["unit"], line["goal"]) == ("sim_to_real", "%", 10.0)
    detail = line["detail"]
    assert line["value"] == pytest.approx(
        max(abs(f["error_percent"]) for p in detail["policies"] for f in p.values() if isinstance(f, dict))
    )
    figure = detail["policies"][0]["e2e_p99_s"]
    assert len(figure["predicted"]) == len(figure["measured"]) == 2
    ratio = sum(figure["predicted"]) / sum(figure["measured"])  # of means
    assert figure["error_percent"] == pytest.approx(100 * (ratio - 1), abs=0.5)
    assert [p["policy"] for p in detail["policies"]] == ["round_robin", "mooncake"]
    assert detail["machine_spread_percent"] >= 0
    assert detail["spearman_of_policies"] in (-1.0, 1.0)
    assert set(detail["held_out_percent"]) == {"shallow", "deep"}
    assert len(detail["seconds"]) == 2
    assert detail["requests"] == 24


def test_a_cycle_is_predicted_from_what_was_measured_between_its_plays(tiny, tmp_path, monkeypatch):
    import numpy as np

    pair = tiny.Pair(tmp_path)
    monkeypatch.setattr(pair, "play", lambda _: {"e2e_p50_s": 1.0})
    usual, measured = pair.measured, []

    def slower(seed):
        measured.append(seed)
        return [7 * seconds for seconds in usual(seed)]

    before = pair.cycle(0)
    monkeypatch.setattr(pair, "measured", slower)
    pair.last = slower(0)
    after = pair.cycle(1)
    assert len(measured) == 1 + len(tiny.POLICIES) // tiny.PLAYS
    ratios = [
        after.predicted[name]["e2e_p99_s"] / before.predicted[name]["e2e_p99_s"] for name in tiny.POLICIES
    ]
    assert 3 < np.median(ratios) < 16


def test_every_policy_meets_requests_that_overload_the_pair(tiny, tmp_path, monkeypatch):
    from servegym.envs.cluster.spec import ClusterSpec, InstanceSpec

    fleet = ClusterSpec(
        "pair", tuple(InstanceSpec(f"{x}100-llama-3.1-8b") for x in "ah"), prefix_caching=False
    )
    from servegym.envs.cluster.capacity import saturation_rps

    first, second = tiny.episode_of(fleet), tiny.episode_of(fleet)
    assert first.workload.arrived_at_s.tolist() == second.workload.arrived_at_s.tolist()
    assert first.workload.rate_rps == pytest.approx(tiny.LOAD * saturation_rps(fleet, first.workload))
    assert tiny.LOAD > 2
    assert set(first.workload.session) == set(range(tiny.SESSIONS))
    assert tiny.PROMPT[0] <= first.workload.prompt_tokens.min() <= first.workload.prompt_tokens.max() <= 60

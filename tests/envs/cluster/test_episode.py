"""Episodes are drawn as the scenario says, and saturation is what a fleet can take."""

from dataclasses import replace

import numpy as np
import pytest

from servegym.envs.cluster.capacity import saturation_rps
from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.simulate import simulate
from servegym.envs.cluster.spec import ClusterSpec, parse_cluster
from servegym.envs.cluster.vector import DispatchVectorEnv
from servegym.envs.scenario import Scenario
from servegym.envs.workloads import generate, scale_rate
from servegym.envs.workloads.workload import make_workload
from servegym.errors import InputError

MIXED = Scenario(clusters=("1xa100-llama-3.1-8b", "2xl40s-llama-3.1-8b"), loads=(0.4, 0.8), requests=200)


def test_draws_follow_the_scenario():
    episodes = make_episodes(MIXED, 60, 0)
    names = [e.cluster.name for e in episodes]
    assert {names.count(name) for name in MIXED.clusters} <= set(range(15, 46))
    sample = generate(MIXED.workload, 2048, seed=0)
    loads = [e.workload.rate_rps / saturation_rps(e.cluster, sample) for e in episodes]
    # A drawn window's own mean rate scatters about the rate that was asked for.
    assert np.mean(loads) == pytest.approx(0.6, rel=0.15)
    assert all(len(e.workload) == len(e.predicted_output) == 200 for e in episodes)
    error = np.concatenate([np.log(e.predicted_output / e.workload.output_tokens) for e in episodes])
    assert np.std(error) == pytest.approx(MIXED.prediction_error, rel=0.1)


def test_an_episode_depends_on_seed_and_number_alone():
    three, two = make_episodes(MIXED, 3, 4), make_episodes(MIXED, 2, 4)
    for a, b in zip(three, two, strict=False):
        assert a.cluster == b.cluster
        np.testing.assert_array_equal(a.workload.arrived_at_s, b.workload.arrived_at_s)
        np.testing.assert_array_equal(a.predicted_output, b.predicted_output)
    other = make_episodes(MIXED, 1, 5)[0]
    assert not np.array_equal(other.workload.prompt_tokens, three[0].workload.prompt_tokens)
    assert not np.array_equal(three[1].workload.prompt_tokens, three[0].workload.prompt_tokens)


def test_exact_predictions_and_settings():
    scenario = replace(MIXED, prediction_error=0.0, prefix_caching=False, engine={"token_budget": 512})
    episode = make_episodes(scenario, 1, 0)[0]
    np.testing.assert_array_equal(episode.predicted_output, episode.workload.output_tokens)
    assert not episode.cluster.prefix_caching
    assert {i.token_budget for i in episode.cluster.instances} == {512}


def test_windows_of_a_trace(tmp_path):
    path = tmp_path / "conv.csv"
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += [f"2023-11-16 18:{k // 60:02d}:{k % 60:02d}.0000000,{100 + k},{10 + k % 7}" for k in range(600)]
    path.write_text("\n".join(rows) + "\n")
    scenario = replace(MIXED, workload=str(path), requests=50)
    firsts = set()
    for episode in make_episodes(scenario, 8, 0):
        prompts = episode.workload.prompt_tokens
        np.testing.assert_array_equal(np.diff(prompts), 1)
        firsts.add(int(prompts[0]))
        assert len(prompts) == 50
    assert len(firsts) > 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workload": "nothing"}, "give the path of a trace, or one of azure2023_conv"),
        ({"clusters": ("2xnothing",)}, "nothing"),
    ],
)
def test_bad_scenarios(changes, message):
    with pytest.raises(InputError, match=message):
        make_episodes(replace(MIXED, **changes), 1, 0)


def test_a_request_that_fits_nowhere():
    with pytest.raises(InputError, match=r"no instance of .* holds more than 1600 tokens"):
        DispatchVectorEnv(1, replace(MIXED, engine={"kv_blocks": 100}))


def test_no_episodes():
    with pytest.raises(InputError, match="at least one"):
        make_episodes(MIXED, 0, 0)


def test_saturation_of_a_toy(toy_instance):
    """One at a time: 4 prompt tokens in 14 ms, 4 decodes of 11 ms; a fleet of two does twice as much."""
    workload = make_workload("even", np.zeros(40), np.full(40, 4), np.full(40, 5))
    one = ClusterSpec("one", (toy_instance(1.0, max_seqs=1),))
    assert saturation_rps(one, workload) == pytest.approx(1 / 0.058, rel=1e-6)
    assert saturation_rps(ClusterSpec("two", one.instances * 2), workload) == pytest.approx(
        2 / 0.058, rel=1e-6
    )


def test_saturation_leaves_out_what_does_not_fit(toy_instance):
    workload = make_workload("large", np.zeros(2), [4, 30], [5, 5])
    small, large = toy_instance(1.0, max_seqs=1, kv_blocks=3), toy_instance(1.0, max_seqs=1)
    assert saturation_rps(ClusterSpec("both", (small, large)), workload) > 0
    with pytest.raises(InputError, match="exceeds tiny"):
        saturation_rps(ClusterSpec("tiny", (toy_instance(1.0, kv_blocks=1),)), workload)


def test_queues_grow_beyond_saturation_and_not_below():
    cluster = parse_cluster("2xa100-llama-3.1-8b")
    workload = generate("fixed:512-128", 3000, seed=0)
    limit = saturation_rps(cluster, workload)

    def delay(load):
        records = simulate(cluster, scale_rate(workload, load * limit), "least_request")
        return np.median(records.ttft_s[-300:]) / np.median(records.ttft_s[:300])

    assert delay(0.8) < 3
    assert delay(1.3) > 10

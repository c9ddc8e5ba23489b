"""Episodes are drawn as the scenario says, and saturation is what a fleet can take."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from servegym.agents.heuristics import make_heuristic
from servegym.agents.play import play
from servegym.envs.cluster.capacity import saturation_rps
from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.schema import REQUEST, column
from servegym.envs.cluster.settings import setting_of_spec
from servegym.envs.cluster.simulate import simulate
from servegym.envs.cluster.spec import ClusterSpec, parse_cluster
from servegym.envs.cluster.vector import DispatchVectorEnv
from servegym.envs.costs import load_profile, save_profile
from servegym.envs.scenario import Scenario, Slo, load_scenario
from servegym.envs.workloads import generate, scale_rate
from servegym.envs.workloads.workload import make_workload
from servegym.errors import InputError
from servegym.evaluation import Setting, episodes_of, measure

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


def test_blocks_are_those_of_the_profile_unless_a_fleet_has_others(tmp_path):
    profile = replace(load_profile("a100-llama-3.1-8b"), kv_blocks=100, block_tokens=128)
    save_profile(profile, tmp_path / "profile.json")
    fleet = parse_cluster(str(tmp_path / "profile.json"))
    found = setting_of_spec("fleet", fleet.instances[0], profile)
    assert (found.blocks, found.block_tokens) == (100, 128)
    found = setting_of_spec("fleet", replace(fleet.instances[0], block_tokens=16), profile)
    assert (found.blocks, found.block_tokens) == (800, 16)
    assert saturation_rps(fleet, generate("fixed:12700-100", 10)) > 0
    with pytest.raises(InputError, match="exceeds"):
        saturation_rps(fleet, generate("fixed:12701-100", 10))


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


def write_trace(path, rows, metadata=None, **columns):
    """A Parquet trace whose prompts number its rows, all at the same second but for `columns`."""
    known = {
        "arrived_at_s": np.arange(rows) // 4 / 10,
        "prompt_tokens": 100 + np.arange(rows),
        "output_tokens": 10 + np.arange(rows) % 7,
    }
    table = pa.table(known | columns)
    pq.write_table(table.replace_schema_metadata(metadata or {}), path)
    return str(path)


def test_disjoint_windows_share_no_request(tmp_path):
    scenario = replace(MIXED, workload=write_trace(tmp_path / "conv.parquet", 403), requests=150)
    prompts = [e.workload.prompt_tokens for e in make_episodes(scenario, 4, 7, disjoint=True)]
    for k, own in enumerate(prompts):  # 403 // 4 rows each, though rows arrive four at a time
        np.testing.assert_array_equal(own, np.arange(100 + k * 100, 200 + k * 100))
    short = make_episodes(replace(scenario, requests=60), 4, 7, disjoint=True)
    assert [int(e.workload.prompt_tokens[0]) for e in short] == [100, 160, 220, 280]
    assert all(len(e.workload) == 60 for e in short)
    assert all(len(e.workload) == 150 for e in make_episodes(scenario, 4, 7))
    make_episodes(scenario, 8, 0, disjoint=True)
    with pytest.raises(InputError, match="requests = 403: 9 disjoint windows need 50 requests each"):
        make_episodes(scenario, 9, 0, disjoint=True)


def write_conversations(path, sessions, turns):
    rows = sessions * turns
    return write_trace(
        path,
        rows,
        {"time": "none"},
        arrived_at_s=pa.nulls(rows, pa.float64()),
        prompt_tokens=100 + 60 * np.tile(np.arange(turns), sessions),
        output_tokens=np.full(rows, 20),
        session_id=np.repeat(np.arange(sessions), turns),
        turn=np.tile(np.arange(turns), sessions),
        gap_s=np.full(rows, 0.5),
        new_user_tokens=np.full(rows, 40),
    )


def test_sessions_without_a_clock_keep_their_think_times_at_any_load(tmp_path):
    path = write_conversations(tmp_path / "turns.parquet", 400, 5)
    scenario = replace(MIXED, workload=path, requests=400, clusters=("2xl40s-llama-3.1-8b",))
    rates = []
    for load in (0.05, 0.2):
        (episode,) = make_episodes(replace(scenario, loads=(load, load)), 1, 0)
        w = episode.workload
        assert (w.after >= 0).mean() > 0.3
        np.testing.assert_array_equal(w.gap_s[w.after >= 0], 0.5)
        rates.append(w.rate_rps)
    assert rates[1] == pytest.approx(4 * rates[0], rel=0.35)
    episodes = make_episodes(scenario, 4, 0, disjoint=True)
    assert [len(e.workload) for e in episodes] == [400] * 4


def test_lengths_without_a_clock_arrive_at_the_rate(tmp_path):
    nothing = pa.nulls(300, pa.float64())
    path = write_trace(tmp_path / "lengths.parquet", 300, {"time": "none"}, arrived_at_s=nothing)
    scenario = replace(MIXED, workload=path, requests=100, clusters=MIXED.clusters[:1], loads=(0.5, 0.5))
    rates = [e.workload.rate_rps for e in make_episodes(scenario, 3, 0, disjoint=True)]
    assert rates == pytest.approx([rates[0]] * 3)


def test_requests_without_output_are_dropped_where_asked(tmp_path):
    output = np.where(np.arange(200) % 10 == 3, 0, 5)
    scenario = replace(MIXED, workload=write_trace(tmp_path / "f.parquet", 200, output_tokens=output))
    with pytest.raises(InputError, match="zero_output='drop'"):
        make_episodes(scenario, 1, 0)
    (episode,) = make_episodes(replace(scenario, zero_output="drop"), 1, 0)
    assert len(episode.workload) == 180


TRACES = sorted((Path(__file__).resolve().parents[4] / "shared" / "traces" / "eval").glob("*.parquet"))
TRACES = [path for path in TRACES if path.stem != "servegen_rate_windows"]  # rates, not requests


@pytest.mark.skipif(not TRACES, reason="no recorded traces beside the checkout")
@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_recorded_traces_are_played(path):
    scenario = Scenario(
        workload=str(path), clusters=("2xa100-llama-3.1-8b",), loads=(0.5, 0.5), requests=50,
        zero_output="drop", engine={"kv_blocks": 60_000},
    )  # fmt: skip
    episodes = make_episodes(scenario, 2, 0, disjoint=True)
    for episode, records in zip(
        episodes, play(make_heuristic("least_request"), scenario, episodes), strict=True
    ):
        assert len(records) == len(episode.workload) == 50
        assert np.isfinite(records.finished_s).all()


def test_classes_and_priorities_are_drawn():
    shares = {"classes": {"paid": 0.25, "free": 0.75}, "priorities": {"-1": 0.4, "2": 0.6}}
    scenario = replace(MIXED, requests=2000, class_slo={"paid": Slo(weight=5.0)}, **shares)
    first, second = (e.workload for e in make_episodes(scenario, 2, 0))
    assert first.class_names == ("paid", "free")
    assert (first.class_id == 0).mean() == pytest.approx(0.25, abs=0.04)
    assert set(first.priority.tolist()) == {-1, 2}
    assert (first.priority == -1).mean() == pytest.approx(0.4, abs=0.04)
    assert not np.array_equal(first.priority, second.priority)
    lane = DispatchVectorEnv(1, scenario, episodes=make_episodes(scenario, 1, 0))
    request = lane.reset(seed=0)[0]["requests"][0, 0]
    weight, priority = (request[column(REQUEST, name)] for name in ("weight", "priority"))
    assert (weight, priority) == ({0: 5.0, 1: 1.0}[int(first.class_id[0])], first.priority[0])


def test_service_levels_of_classes_that_are_not_there_are_refused():
    with pytest.raises(InputError, match="class_slo = 'gold': the workload's classes are conv"):
        make_episodes(replace(MIXED, class_slo={"gold": Slo()}), 1, 0)
    with pytest.raises(InputError, match="class_slo = 'conv': the workload's classes are a"):
        make_episodes(replace(MIXED, class_slo={"conv": Slo()}, classes={"a": 1.0}), 1, 0)


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


def means(name, policy, metric, requests):
    """Mean of a metric in two episodes of a shipped scenario."""
    scenario = load_scenario(name)
    setting = Setting(scenario.clusters[0], scenario.loads[1])
    episodes = episodes_of(replace(scenario, requests=requests), setting, 2, 0)
    return measure(make_heuristic(policy), scenario, episodes).samples[metric].mean()


def test_in_sessions_it_matters_where_the_last_turn_ran():
    aware, blind = (means("sessions", p, "cache_hits", 1000) for p in ("session_affinity", "round_robin"))
    assert aware > 0.5
    assert aware > 2 * blind


def test_in_scarce_requests_are_preempted():
    assert means("scarce", "least_request", "preemptions", 1500) > 0.005


def test_queues_grow_beyond_saturation_and_not_below():
    cluster = parse_cluster("2xa100-llama-3.1-8b")
    workload = generate("fixed:512-128", 3000, seed=0)
    limit = saturation_rps(cluster, workload)

    def delay(load):
        records = simulate(cluster, scale_rate(workload, load * limit), "least_request")
        return np.median(records.ttft_s[-300:]) / np.median(records.ttft_s[:300])

    assert delay(0.8) < 3
    assert delay(1.3) > 10

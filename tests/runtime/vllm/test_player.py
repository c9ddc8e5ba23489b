"""Workloads played on vLLM servers: in-process peers here, real servers behind the marker."""

import asyncio
import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from servegym.agents.heuristics import make_heuristic
from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.spec import ClusterSpec, InstanceSpec, Migration
from servegym.envs.costs import load_profile, save_profile
from servegym.envs.scenario import load_scenario
from servegym.envs.workloads import generate
from servegym.errors import InputError
from servegym.runtime.vllm import player as room
from servegym.runtime.vllm.player import open_player
from tests.runtime.vllm.fake_engine import FakeEngine

CONFIGS = Path(room.__file__).parents[1] / "engine" / "configs"
SCENARIO = replace(load_scenario("chat"), scrape_s=0.1)


def fleet_in(folder, count=2, **spec):
    """A fleet of one profile with the config.json of a small model beside it."""
    profile = replace(load_profile("a100-llama-3.1-8b"), kv_blocks=255, block_tokens=16, max_seqs=8)
    save_profile(profile, folder / "profile.json")
    shutil.copy(CONFIGS / "cpu-llama.json", folder / "config.json")
    return ClusterSpec("two", (InstanceSpec(str(folder / "profile.json"), **spec),) * count)


def workload(name="fixed:40-12", requests=30, rate_rps=60.0):
    return generate(name, requests, rate_rps=rate_rps)


def episode(fleet, w):
    return Episode(w, fleet, w.output_tokens)


@pytest.fixture
def peers(monkeypatch, tmp_path):
    """Engines in a thread of their own, in place of the servers that `launch` starts."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    some = [FakeEngine(), FakeEngine()]

    def call(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(10)

    @contextmanager
    def launch(settings, folder):
        log = tmp_path / "log"
        log.write_text("last words")
        for peer in some[: len(settings)]:
            call(peer.start())
        yield [SimpleNamespace(url=peer.url, log=log) for peer in some[: len(settings)]]
        for peer in some[: len(settings)]:
            call(peer.die())

    monkeypatch.setattr(room, "launch", launch)
    yield some
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def test_every_request_gets_its_tokens_where_the_policy_sent_it(peers, tmp_path):
    fleet = fleet_in(tmp_path)
    w = workload()
    player = open_player(fleet)
    records = player.play(make_heuristic("round_robin"), SCENARIO, episode(fleet, w))
    player.close()
    assert records.instance.tolist() == [0, 1] * 15
    assert [len(peer.served) for peer in peers] == [15, 15]
    assert np.array_equal(records.arrived_s, w.arrived_at_s)
    assert (records.arrived_s <= records.dispatched_s).all()
    assert (records.dispatched_s < records.first_token_s).all()
    assert (records.first_token_s < records.finished_s).all()
    assert (records.max_gap_s > 0).all()
    assert (records.max_gap_s <= records.finished_s - records.first_token_s).all()
    assert {body["max_tokens"] for peer in peers for body in peer.bodies} == {12}
    assert {len(prompt) for peer in peers for prompt in peer.served} == {40}
    assert player.counts["answered"] == 30


def test_sessions_go_on_after_their_gap_where_they_were(peers, tmp_path):
    fleet = fleet_in(tmp_path)
    w = workload(requests=12)
    after, gap_s, session, turn = w.after.copy(), w.gap_s.copy(), w.session.copy(), w.turn.copy()
    after[6:], gap_s[6:], turn[6:] = np.arange(6), 0.05, 1
    session[:] = np.arange(12) % 6
    w = replace(w, after=after, gap_s=gap_s, session=session, turn=turn)
    player = open_player(fleet)
    records = player.play(make_heuristic("session_affinity"), SCENARIO, episode(fleet, w))
    player.close()
    assert np.allclose(records.arrived_s[6:], records.finished_s[:6] + 0.05)
    assert np.array_equal(records.instance[6:], records.instance[:6])


def test_scrapes_reach_the_policy(peers, tmp_path):
    seen = []

    class Watcher:
        name, kinds, needs_oracle = "watcher", ("dispatch",), False

        def reset(self, lanes, seed):
            pass

        def act(self, obs):
            seen.append(float(obs["instances"][0, 0, 0]))
            return np.ones(1, np.int64)

    for peer in peers:
        peer.delay_s = 0.03
    fleet = fleet_in(tmp_path)
    player = open_player(fleet)
    records = player.play(Watcher(), SCENARIO, episode(fleet, workload()))
    player.close()
    assert set(records.instance) == {0}
    assert max(seen) >= 5  # running requests on instance 0, from its metrics


def test_an_engine_that_dies_is_named_with_its_log(peers, tmp_path):
    peers[0].breaks_after = 2
    fleet = fleet_in(tmp_path)
    player = open_player(fleet)
    with pytest.raises(InputError, match="last words"):
        player.play(make_heuristic("round_robin"), SCENARIO, episode(fleet, workload()))
    player.close()


def test_servers_with_another_cache_are_refused(peers, tmp_path):
    with pytest.raises(InputError, match="vLLM made it 255"):
        open_player(fleet_in(tmp_path, kv_blocks=100))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"migration": Migration()}, "migration"),
        ({"instances": {"preemption": "swap", "swap_gib": 1.0}}, "recompute"),
        ({"instances": {"drain_at_s": 1.0}}, "drain"),
    ],
)
def test_levers_that_vllm_has_not_are_refused(peers, tmp_path, changes, what):
    fleet = fleet_in(tmp_path)
    if "instances" in changes:
        changes = {"instances": tuple(replace(s, **changes["instances"]) for s in fleet.instances)}
    with pytest.raises(InputError, match=what):
        open_player(replace(fleet, **changes))


def test_policies_and_requests_that_do_not_fit_are_refused(peers, tmp_path):
    fleet = fleet_in(tmp_path)
    player = open_player(fleet)
    with pytest.raises(InputError, match="dispatch only"):
        player.play(make_heuristic("victim_largest"), SCENARIO, episode(fleet, workload()))
    with pytest.raises(InputError, match="engines hold"):
        player.play(make_heuristic("round_robin"), SCENARIO, episode(fleet, workload("fixed:5000-10")))
    with pytest.raises(InputError, match="it was two"):
        other = replace(fleet, name="other")
        player.play(make_heuristic("round_robin"), SCENARIO, episode(other, workload()))
    player.close()


def test_a_profile_without_its_model_is_refused(tmp_path):
    fleet = fleet_in(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="servegym calibrate"):
        open_player(fleet)


@pytest.mark.vllm
def test_real_servers(tmp_path):
    fleet = fleet_in(tmp_path, kv_blocks=64, block_tokens=128)
    player = open_player(fleet)
    try:
        w = workload("fixed:200-20", 24, 6.0)
        records = player.play(make_heuristic("least_request"), SCENARIO, episode(fleet, w))
    finally:
        player.close()
    assert np.isfinite(records.finished_s).all()
    assert set(records.instance) == {0, 1}
    assert (records.ttft_s > 0).all()

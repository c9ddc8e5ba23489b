"""Instances in real time: every request gets its tokens, wherever it goes meanwhile."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from servegym.agents.heuristics import make_heuristic
from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.settings import GIB
from servegym.envs.cluster.spec import ClusterSpec, InstanceSpec, Migration
from servegym.envs.scenario import Scenario
from servegym.envs.workloads.workload import make_workload
from servegym.errors import InputError
from servegym.runtime.engine import copier
from servegym.runtime.engine.cluster import EnginePlayer
from servegym.runtime.engine.config import load_config
from servegym.runtime.engine.model import Transformer

SYSTEM = "least_tokens+llumnix+victim_cost_aware+budget_tpot"


@pytest.fixture(scope="module")
def player(tiny_profile):
    player = EnginePlayer({tiny_profile: Transformer(load_config(Path(tiny_profile).parent))})
    yield player
    player.close()


def workload(n=40, longest=60):
    rng = np.random.default_rng(3)
    prompt, output = rng.integers(5, longest, n), rng.integers(1, 60, n)
    after = np.where(np.arange(n) % 5 == 4, np.arange(n) - 1, -1)
    blocks = (prompt + output) // 4
    ids = [k if k < 5 else 1000 + 100 * i + k for i in range(n) for k in range(blocks[i])]
    return make_workload(
        "test", np.sort(rng.random(n)) * 0.5, prompt, output, after=after, priority=rng.integers(0, 2, n),
        gap_s=np.where(after >= 0, 0.02, 0.0), prefix_ids=np.array(ids, np.int32),
        prefix_offsets=np.concatenate([[0], np.cumsum(blocks)]), prefix_block_tokens=4,
    )  # fmt: skip


def episode(profile, load, **settings):
    spec = InstanceSpec(
        profile, block_tokens=4, **{"kv_blocks": 50, "swap_gib": 200 * 4 * 512 / GIB, **settings}
    )
    cluster = ClusterSpec("tiny", (spec, spec), migration=Migration(0.02, 2, 3), budget_period_s=0.03)
    return Episode(load, cluster, load.output_tokens)


@pytest.mark.parametrize("policy", ["round_robin", SYSTEM])
def test_everything_is_served(player, tiny_profile, policy):
    load = workload()
    records = player.play(make_heuristic(policy), Scenario(scrape_s=0.05), episode(tiny_profile, load))
    assert np.isfinite(records.finished_s).all()
    np.testing.assert_array_equal(records.output_tokens, load.output_tokens)
    assert (records.dispatched_s >= records.arrived_s).all()
    assert (records.first_token_s > records.dispatched_s).all()
    assert (records.finished_s >= records.first_token_s).all()
    open_loop = load.after < 0
    np.testing.assert_array_equal(records.arrived_s[open_loop], load.arrived_at_s[open_loop])
    for row in np.flatnonzero(~open_loop):
        arrived = records.finished_s[load.after[row]] + load.gap_s[row]
        assert records.arrived_s[row] == pytest.approx(arrived, abs=1e-6)
    assert (records.cached_tokens > 0).sum() > 10
    assert records.preemptions.sum() > 0
    if policy == "round_robin":
        assert set(records.instance) == {0, 1}
        assert records.migrations.sum() == 0
    else:
        assert records.migrations.sum() > 0
        assert player.counts["answered"] > 40
    assert not player.counts["timeout"] + player.counts["nan"] + player.counts["mismatch"]


def test_a_copy_that_fails_ends_the_play(player, tiny_profile, monkeypatch):
    monkeypatch.setattr(copier, "copy_blocks", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        player.play(make_heuristic(SYSTEM), Scenario(), episode(tiny_profile, workload()))


def test_a_request_that_never_fits_is_refused(player, tiny_profile):
    load = make_workload("test", [0.0], [180], [40])
    with pytest.raises(InputError, match="row 0"):
        player.play(make_heuristic("round_robin"), Scenario(), episode(tiny_profile, load))


def test_an_engine_that_fails_ends_the_play(player, tiny_profile, monkeypatch):
    load = workload(4)
    case = episode(tiny_profile, load)
    player.play(make_heuristic("round_robin"), Scenario(), case)
    model = next(iter(player.models.values()))
    monkeypatch.setattr(model, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        player.play(make_heuristic("round_robin"), Scenario(), case)


def test_an_engine_without_requests_does_what_it_is_told_and_serves_what_comes(
    player, tiny_profile, monkeypatch
):
    load = workload(10)
    case = episode(tiny_profile, load)
    idled = []
    for instance in player.instances(case.cluster, load.prefix_block_tokens)[1]:
        monkeypatch.setattr(instance, "idle", partial(idled.append, instance.number))
    records = player.play(make_heuristic("round_robin"), Scenario(), case)
    assert set(idled) == {0, 1}
    assert np.isfinite(records.finished_s).all()


@pytest.mark.parametrize("field", ["block_tokens", "migration"])
def test_kv_moves_between_equals_only(tiny_profile, write_config, field):
    case = episode(tiny_profile, workload(3))
    here, there = case.cluster.instances
    other = Path(tiny_profile).with_name("other.json")
    other.write_text(Path(tiny_profile).read_text())
    models = {
        tiny_profile: Transformer(load_config(write_config())),
        str(other): Transformer(load_config(write_config(num_hidden_layers=3))),
    }
    changed = {"block_tokens": 8} if field == "block_tokens" else {"profile": str(other)}
    mixed = replace(case.cluster, instances=(here, replace(there, **changed)))
    with pytest.raises(InputError) as caught:
        EnginePlayer(models).play(make_heuristic("round_robin"), Scenario(), replace(case, cluster=mixed))
    assert caught.value.field == "migration"


def test_a_profile_without_its_model_is_refused(player):
    load = make_workload("test", [0.0], [10], [4])
    cluster = ClusterSpec("test", (InstanceSpec("a100-llama-3.1-8b", kv_blocks=10),))
    with pytest.raises(InputError, match="no model"):
        player.play(make_heuristic("round_robin"), Scenario(), Episode(load, cluster, load.output_tokens))

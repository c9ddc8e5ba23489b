"""From training on every kind of decision to the zoo, by the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from servegym.agents.ppo import load_policy
from servegym.cli import main
from servegym.errors import InputError
from servegym.runtime.bundle import load_bundle, read_golden

FULL = """
workload = "fixed:512-256"
clusters = ["3xa100-llama-3.1-8b"]
loads = [1.0, 1.4]
requests = 40
budget_period_s = 0.5
engine = { kv_blocks = 400, swap_gib = 0.1 }
migration = { period_s = 0.25 }
"""
PLAIN = 'clusters = ["2xa100-llama-3.1-8b"]\nrequests = 40\n'


def tiny(folder: Path, env: str, *arguments: str) -> list[str]:
    return [
        *("train", "--env", f"ServeGym/{env}", "-n", "512", "--n-envs", "8", "--group-size", "4"),
        *("--episodes", "8", "--ppo.n-steps", "32", "--ppo.batch-size", "128", "--eval-freq", "256"),
        *("--network.hidden", "8", "--network.layers", "1", "--eval-episodes", "2"),
        *("-f", str(folder / "runs"), "--tensorboard-log", str(folder / "tb"), *arguments),
    ]


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    for name, text in (("full", FULL), ("plain", PLAIN)):
        (folder / f"{name}.toml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def cluster(room) -> Path:
    """A policy of all decisions, trained on two scenarios."""
    scenarios = ["--scenario", str(room / "full.toml"), "--scenario", str(room / "plain.toml")]
    assert main(tiny(room, "Cluster-v0", *scenarios, "--name", "all")) == 0
    return room / "runs" / "Cluster-v0" / "all-s0"


@pytest.fixture(scope="module")
def bundle(cluster) -> Path:
    assert main(["export", "-i", str(cluster)]) == 0
    return cluster.with_name("all-s0-bundle")


def test_checkpoint_and_card_say_what_the_policy_is_for(cluster):
    task = load_policy(cluster).task
    assert task.env == "ServeGym/Cluster-v0"
    assert task.decisions == ("dispatch", "preempt", "migrate", "budget")
    assert [s["name"] for s in task.scenarios] == ["full", "plain"]
    card = (cluster / "README.md").read_text()
    assert "it takes dispatch, preempt, migrate and budget" in card
    for title in ("## full: 3xa100-llama-3.1-8b at", "## plain: 2xa100-llama-3.1-8b at"):
        assert card.count(title) == 3  # loads
    tables = json.loads((cluster / "metrics.json").read_text())["tables"]
    names = [{row["policy"] for row in table["policies"]} for table in tables]
    assert "migrate_llumnix" in names[0] and "migrate_llumnix" not in names[-1]
    assert {"all-s0", "lmetric"} <= names[0] & names[-1]


def test_bundle_answers_every_kind_like_the_network(cluster, bundle):
    exported, policy = load_bundle(bundle), load_policy(cluster)
    assert exported.task == policy.task
    golden = read_golden(bundle / "golden.safetensors")
    assert len({k for group in golden for k in group["kind"]}) == 5
    assert {group["requests"].shape[1] for group in golden} == {8}
    assert "migrate" in json.loads((bundle / "manifest.json").read_text())["actions"]
    for group in golden:
        np.testing.assert_array_equal(exported.act(group), policy.act(group))
        wide = {name: rows.copy() for name, rows in group.items()}
        wide["requests"] = np.concatenate([group["requests"]] * 2, axis=1)  # rows that no answer names
        with pytest.raises(InputError, match="request rows = 16: it reads 8"):
            exported.act(wide)


def test_agents_bring_their_environment(room, cluster, bundle, tmp_path, refused):
    play = ["evaluate", "--scenario", str(room / "full.toml"), "--loads", "1.2", "--seeds", "2"]
    play += ["-i", str(cluster), "-i", str(bundle), "-f", str(tmp_path)]
    assert main([*play, "--policies", "lmetric+llumnix", "victim_largest", "default"]) == 0
    (table,) = json.loads((tmp_path / "results.json").read_text())["tables"]
    learned = [row["metrics"] for row in table["policies"] if row["learned"]]
    assert len(table["policies"]) == 5 and learned[0] == learned[1]
    line = refused(*play, "--env", "ServeGym/Dispatch-v0")
    assert "env = 'ServeGym/Cluster-v0': it takes dispatch, preempt, migrate, budget" in line


def test_a_policy_without_its_lever_is_refused(room, tmp_path, refused):
    command = tiny(tmp_path, "Migrate-v0", "--scenario", str(room / "full.toml"), "-n", "256")
    assert main([*command, "--name", "movers", "--rules", "dispatch", "lmetric"]) == 0
    folder = tmp_path / "runs" / "Migrate-v0" / "movers-s0"
    assert load_policy(folder).task.rules["dispatch"] == "lmetric"
    line = refused("evaluate", "-i", str(folder), "--scenario", str(room / "plain.toml"), "-f", str(tmp_path))
    assert "movers-s0: decisions = 'migrate, move': scenario plain has dispatch, preempt only" in line


def test_training_refuses_what_cannot_be_learned(room, tmp_path, refused):
    plain = ["--scenario", str(room / "plain.toml")]
    line = refused(*tiny(tmp_path, "Migrate-v0", *plain))
    assert "scenario plain: decisions = 'migrate': there is no migration table" in line
    assert "none of 8 episodes asks a question" in refused(*tiny(tmp_path, "Preempt-v0", *plain))
    line = refused(*tiny(tmp_path, "Dispatch-v0", *plain, "--decisions", "preempt"))
    assert "use ServeGym/Cluster-v0 to choose" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", [[], ["--quick"]])
def test_the_zoo_holds_policies_to_their_cards(flags, cluster, tmp_path, capsys):
    shown = tmp_path / "zoo" / "Cluster-v0" / "all-s0"
    shutil.copytree(cluster, shown)
    command = ["evaluate", "zoo", "--checkpoints", str(tmp_path / "zoo"), *flags]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"{shown}: equals its card" in out and "all-s0*" in out
    metrics = json.loads((shown / "metrics.json").read_text())
    row = next(r for r in metrics["tables"][0]["policies"] if r["learned"])
    row["metrics"]["goodput"][0] += 0.001
    (shown / "metrics.json").write_text(json.dumps(metrics))
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "all-s0 goodput mean" in out and f"{shown}: DIFFERS from its card" in out


def test_the_zoo_wants_checkpoints_with_tables(cluster, tmp_path, refused):
    assert "there is no ENV/POLICY/config.json" in refused("evaluate", "zoo", "--checkpoints", str(tmp_path))
    shown = tmp_path / "Cluster-v0" / "all-s0"
    shutil.copytree(cluster, shown)
    (shown / "metrics.json").unlink()
    assert "metrics.json" in refused("evaluate", "zoo", "--checkpoints", str(tmp_path))

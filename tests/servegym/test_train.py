import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from servegym.agents.ppo import load_policy, read_info
from servegym.cli import main
from servegym.envs.cluster.schema import schema_hash
from servegym.envs.costs.profile import profile_path
from servegym.training import EvaluationCallback


def weights(checkpoint: Path) -> dict[str, np.ndarray]:
    return load_file(checkpoint / "policy.safetensors")


def test_training_leaves_a_checkpoint_with_its_card(trained):
    assert {p.name for p in trained.iterdir()} == {
        "policy.safetensors",
        "config.json",
        "metrics.json",
        "README.md",
    }
    text = (trained / "README.md").read_text()
    assert schema_hash() in text
    assert "least_request" in text
    assert "us (torch" in text
    assert "±" in text
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["decisions"] >= 2000
    assert metrics["seed"] == 0
    names = [row["policy"] for row in metrics["tables"][0]["policies"]]
    assert "ppo-mixed-s0" in names
    assert len(names) >= 11
    assert load_policy(trained).name == "ppo-mixed-s0"


def test_an_existing_checkpoint_is_not_overwritten(trained, train_command, refused):
    before = weights(trained)
    assert "--resume" in refused(*train_command(trained.parents[2]))
    assert all(np.array_equal(before[name], array) for name, array in weights(trained).items())


def test_a_stopped_run_resumes_where_it_was_and_ends_the_same(
    trained, train_command, tmp_path, capsys, monkeypatch, refused
):
    step = EvaluationCallback._on_rollout_start

    def interrupt(self: EvaluationCallback) -> None:
        if self.model.num_timesteps >= 1000:
            signal.raise_signal(signal.SIGINT)
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(EvaluationCallback, "_on_rollout_start", interrupt)
        assert main(train_command(tmp_path)) == 130
    out = capsys.readouterr().out
    assert "stopped at 1,280 decisions" in out
    assert "--resume" in out

    folder = tmp_path / "runs" / "Dispatch-v0" / "ppo-mixed-s0"
    line = refused(*train_command(tmp_path, "--resume", "--n-envs", "16"))
    assert "n_envs = 8" in line

    assert main(train_command(tmp_path, "--resume")) == 0
    assert "at 1,280 of 2,048 decisions" in capsys.readouterr().out
    whole = weights(trained)
    assert all(np.array_equal(whole[name], array) for name, array in weights(folder).items())


def stop_at_once(self: EvaluationCallback) -> None:
    if self.model.num_timesteps >= 256:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("changed", ["trace.csv", "mine.json"])
def test_a_run_does_not_resume_on_changed_files(
    changed, train_command, tmp_path, monkeypatch, refused, capsys
):
    lines = [f"2023-11-16 18:00:{k // 2:02}.{k % 2 * 5},{100 + k},{10 + k % 7}" for k in range(100)]
    (tmp_path / "trace.csv").write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    shutil.copy(profile_path("a100-llama-3.1-8b"), tmp_path / "mine.json")
    fleet = ("--cluster", f"2x{tmp_path / 'mine.json'}", "--workload", str(tmp_path / "trace.csv"))
    command = [*train_command(tmp_path), *fleet]
    with monkeypatch.context() as patch:
        patch.setattr(EvaluationCallback, "_on_rollout_start", stop_at_once)
        assert main(command) == 130
    capsys.readouterr()
    with (tmp_path / changed).open("a") as file:
        file.write("\n" if changed == "mine.json" else "2023-11-16 18:01:00.0,100,10\n")
    line = refused(*command, "--resume")
    assert "sha256 of" in line
    assert changed in line


def test_only_unfinished_runs_resume(trained, train_command, refused, tmp_path):
    assert "config.json" in refused(*train_command(tmp_path, "--resume"))
    assert "cannot be resumed" in refused(*train_command(trained.parents[2], "--resume"))


def test_maskable_ppo_trains_the_same_kind_of_checkpoint(train_command, tmp_path, refused, capsys):
    pytest.importorskip("sb3_contrib")
    assert main(train_command(tmp_path, "--algo", "maskable_ppo", "-n", "256")) == 0
    assert "gae_horizon_s has no effect" in capsys.readouterr().err
    folder = tmp_path / "runs" / "Dispatch-v0" / "maskable_ppo-mixed-s0"
    assert load_policy(folder).name == "maskable_ppo-mixed-s0"
    assert "only ppo can be resumed" in refused(
        *train_command(tmp_path, "--algo", "maskable_ppo", "--resume")
    )


def test_a_trace_too_short_for_the_comparison_is_refused_before_training(train_command, tmp_path, refused):
    lines = [f"2023-11-16 18:00:{k // 2:02}.{k % 2 * 5},{100 + k},{10 + k % 7}" for k in range(99)]
    trace = tmp_path / "trace.csv"
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    line = refused(*train_command(tmp_path, "--workload", str(trace), "--eval-freq", "0"))
    assert "2 disjoint windows need 50 requests each" in line
    assert not (tmp_path / "runs").exists()


BAD = {
    "environment": (["--env", "ServeGym/Fly-v0"], "ServeGym/Dispatch-v0"),
    "scenario": (["--scenario", "moon"], "choose one of"),
    "reward": (["--reward", "applause"], "latency, goodput"),
    "loads": (["--loads", "0.9", "0.5"], "loads"),
    "algorithm": (["--algo", "dqn"], "maskable_ppo"),
    "seed": (["--seed", "2147483648"], "seed = 2147483648"),
    "decisions": (["-n", "-1"], "n_timesteps = -1"),
    "teacher": (["--imitate", "lmetrik"], "neither a folder nor a heuristic; did you mean lmetric?"),
    "nothing to learn": (["-n", "0"], "--lookahead-updates"),
    "look-ahead": (["--lookahead-updates", "1", "--lookahead-width", "0"], "width = 0"),
    "look-ahead's rule": (["--lookahead-rules", "dispatch", "round_robin"], "round_robin"),
    "profile": (["--cluster", "4xtpu"], "tpu"),
    "fleet": (["--cluster", "0xa100-llama-3.1-8b"], "COUNTxPROFILE"),
    "device": (["--device", "abacus"], "device = 'abacus'"),
    "discount": (["--ppo.beta", "0.5"], "--beta"),
    "log folder": (["-f", __file__], "is a file"),
    "workload": (["--workload", "no_such"], "no_such"),
    "trace": (["--workload", "no/such.csv"], "no/such.csv"),
}


def test_the_decisions_of_whole_roll_outs_are_announced(train_command, tmp_path, capsys):
    """Of 8 lanes and 32 steps; -n 100 is one of them."""
    assert main(train_command(tmp_path, "-n", "100", "--eval-freq", "0", "--eval-episodes", "1")) == 0
    assert ": 256 decisions in 8 lanes" in capsys.readouterr().out
    folder = tmp_path / "runs" / "Dispatch-v0" / "ppo-mixed-s0"
    assert read_info(folder).steps == 256


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_nothing_is_written(case, train_command, tmp_path, refused):
    arguments, told = BAD[case]
    assert told in refused(*train_command(tmp_path, *arguments))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [("--network.hidden", "0", "hidden = 0"), ("--ppo.clip-range", "-1", "clip_range")],
)
def test_bad_hyperparameters_are_refused_by_the_parser(flag, value, told, train_command, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(train_command(tmp_path, flag, value))
    assert stop.value.code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_bad_scenario_files_are_refused(tmp_path, refused, train_command):
    path = tmp_path / "mine.toml"
    for text, told in (
        ("speed = 3", "speed = 3"),
        ("requests = 'many'", "requests = 'many'"),
        ("loads = [", "TOML"),
        ("slo = { ttft_s = -1.0 }", "slo"),
        ("engine = { kv_blocks = 4 }", "tokens"),  # no instance can hold a request
    ):
        path.write_text(text)
        line = refused(*train_command(tmp_path, "--scenario", str(path)))
        assert told in line
        assert not (tmp_path / "runs").exists()


def test_damaged_checkpoints_are_refused(trained, tmp_path, refused):
    folder = Path(shutil.copytree(trained, tmp_path / "ckpt"))
    config = json.loads((folder / "config.json").read_text())
    output = tmp_path / "bundle"
    (folder / "config.json").write_text(json.dumps({**config, "schema_hash": "feedfeedfeedfeed"}))
    assert "schema_hash = 'feedfeedfeedfeed'" in refused("export", "-i", str(folder), "-o", str(output))
    (folder / "config.json").write_text("{")
    assert "config.json" in refused("export", "-i", str(folder), "-o", str(output))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "policy.safetensors").write_bytes(b"no")
    assert "policy.safetensors" in refused("export", "-i", str(folder), "-o", str(output))
    (folder / "policy.safetensors").write_bytes((trained / "policy.safetensors").read_bytes())
    for text in ("[]", "{"):
        (folder / "metrics.json").write_text(text)
        assert "metrics.json: JSON" in refused("export", "-i", str(folder), "-o", str(output))
    assert "no checkpoint" in refused("export", "-i", str(tmp_path / "nowhere"), "-o", str(output))
    assert not output.exists()


def test_imitates_a_heuristic_first(train_command, tmp_path, capsys):
    assert main(train_command(tmp_path, "--imitate", "least_tokens", "--imitate-updates", "2")) == 0
    assert "imitation of least_tokens: the same answer to" in capsys.readouterr().out
    assert main(train_command(tmp_path / "x", "--imitate", "teacher")) == 2
    assert "heuristics: name" in capsys.readouterr().err


def test_learns_from_look_ahead_alone(train_command, tmp_path, capsys):
    flags = ("--lookahead-updates", "2", "--lookahead-horizon-s", "0.5", "--lookahead-width", "1", "-n", "0")
    assert main(train_command(tmp_path, *flags)) == 0
    assert "short of the best answers" in capsys.readouterr().out
    folder = tmp_path / "runs" / "Dispatch-v0" / "ppo-mixed-s0"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["decisions"] == 0
    assert metrics["settings"]["lookahead_updates"] == 2
    assert load_policy(folder).name == "ppo-mixed-s0"

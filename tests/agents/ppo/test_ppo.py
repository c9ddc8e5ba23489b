import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from servegym.agents.heuristics import make_heuristic
from servegym.agents.play import play
from servegym.agents.ppo import PPO, NetworkPolicy, PPOConfig
from servegym.agents.ppo.ppo import STATISTICS
from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.vector import DispatchVectorEnv
from servegym.envs.scenario import Scenario
from servegym.errors import InputError
from servegym.models.config import NetworkConfig

SCENARIO = Scenario(
    clusters=("2xa100-llama-3.1-8b+1xl40s-llama-3.1-8b",), requests=64, loads=(0.8, 0.9), noise=0.0
)

SMALL = PPOConfig(n_steps=16, batch_size=128, n_epochs=3, learning_rate=5e-3, beta=0.5, num_threads=1)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.network.parameters()])


def mean_e2e(policy, episodes):
    return np.mean([records.e2e_s.mean() for records in play(policy, SCENARIO, episodes, num_threads=1)])


def test_learns_to_dispatch():
    """Two fast instances and a slow one, busy: waiting where the fresh network sends requests costs."""
    episodes = make_episodes(SCENARIO, 16, 0)
    env = DispatchVectorEnv(32, SCENARIO, episodes=episodes, copy=False, group_size=8)
    config = PPOConfig(n_steps=32, batch_size=256, learning_rate=5e-3, num_threads=1)
    model = PPO(env, NetworkConfig(16, 1), config, seed=1)
    held_out = make_episodes(SCENARIO, 8, 1)
    before = mean_e2e(NetworkPolicy(model.network), held_out)
    model.learn(60_000)
    assert mean_e2e(NetworkPolicy(model.network), held_out) < 0.8 * before
    random = mean_e2e(make_heuristic("random"), held_out)
    assert mean_e2e(NetworkPolicy(model.network), held_out) < 0.9 * random


def test_same_seed_same_run_and_another_seed_another(make_env):
    runs = [weights(PPO(make_env(8), config=SMALL, seed=seed).learn(512)) for seed in (4, 4, 5)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_threads_share_a_minibatch_without_changing_its_gradient(make_env):
    one, two = (
        PPO(make_env(8), config=PPOConfig(n_steps=16, batch_size=128, num_threads=n), seed=2).learn(128)
        for n in (1, 2)
    )
    np.testing.assert_array_equal(one.buffer.steps.actions, two.buffer.steps.actions)
    torch.testing.assert_close(weights(one), weights(two), rtol=0, atol=1e-5)


def test_the_update_starts_from_the_policy_that_played(make_env):
    """Ratios of the first minibatch are 1 to rounding: torch and the kernel are one network."""
    model = PPO(make_env(8), config=SMALL, seed=2).learn(128)
    fresh = PPO(make_env(8), config=SMALL, seed=2)
    fresh.buffer = model.buffer
    _, statistics = fresh._gradient(torch.arange(128), 1.0)
    named = dict(zip(STATISTICS, statistics.tolist(), strict=True))
    assert abs(named["approx_kl"]) < 1e-6
    assert named["clipfrac"] == 0


def test_rescaling_keeps_the_values(make_env):
    model = PPO(make_env(8), config=SMALL)
    model.learn(8 * 16)

    def values():
        with torch.no_grad():
            _, values = model.network({k: torch.from_numpy(v) for k, v in model.observation.items()})
        return model.normalizer.mean + model.normalizer.std * values.double().numpy()

    before = values()
    model._rescale_values(np.linspace(50, 90, 100))
    assert model.normalizer.mean > 20
    np.testing.assert_allclose(values(), before, rtol=1e-4, atol=1e-4)


def test_logs_stable_tags(make_env, tmp_path):
    PPO(make_env(8), config=SMALL, log_dir=tmp_path).learn(8 * 16 * 3)
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {"charts/SPS", "charts/episodic_return", "losses/approx_kl", "losses/clipfrac"}
    assert tags >= {"losses/explained_variance", "losses/entropy", "losses/policy_loss", "losses/value_loss"}
    shares = [events.Scalars(f"time/{phase}")[-1].value for phase in ("collect", "advantage", "update")]
    assert sum(shares) == pytest.approx(1)
    assert [e.step for e in events.Scalars("charts/SPS")] == [128, 256, 384]


def test_tracks_offline_without_an_account(make_env, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    model = PPO(make_env(8), config=SMALL, log_dir=tmp_path, track="test").learn(8 * 16)
    model.logger.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_callback_can_stop_training(make_env):
    class Stop(BaseCallback):
        def _on_step(self):
            return self.num_timesteps < 80

    model = PPO(make_env(8), config=SMALL).learn(10_000, callback=Stop())
    assert model.num_timesteps == 80


def test_refuses_other_autoreset_modes(make_env):
    with pytest.raises(InputError, match="autoreset_mode"):
        PPO(make_env(2, autoreset_mode="NextStep"))


def test_refuses_numbers_that_are_not_finite(make_env):
    model = PPO(make_env(2), config=SMALL)
    with torch.no_grad():
        model.network.value_out.weight *= np.nan
    with pytest.raises(InputError, match="not finite"):
        model.learn(100)


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_steps", 0), ("gae_horizon_s", 0.0), ("learning_rate", float("nan")), ("n_epochs", 2.5)],
)
def test_refuses_bad_hyperparameters(field, value):
    with pytest.raises(InputError, match=field):
        PPOConfig(**{field: value})


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_saves_a_place_to_resume_from(make_env, tmp_path):
    script = f"""
        import importlib.util, sys
        sys.path.insert(0, {str(Path(__file__).parents[3])!r})
        spec = importlib.util.spec_from_file_location("fake", {str(Path(__file__).parent / "conftest.py")!r})
        fake = importlib.util.module_from_spec(spec); spec.loader.exec_module(fake)
        from servegym.agents.ppo import PPO, PPOConfig, CheckpointCallback
        from stable_baselines3.common.callbacks import BaseCallback
        class Ready(BaseCallback):
            def _on_step(self):
                print("ready", flush=True)
                return True
        config = PPOConfig(n_steps=16, batch_size=128)
        save = CheckpointCallback({str(tmp_path / "c")!r}, 10**9)
        PPO(fake.make_environment(8), config=config).learn(10**9, [Ready(), save])
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    model = PPO.resume(tmp_path / "c", make_env(8))
    assert model.num_timesteps > 0
    assert model.num_timesteps % (8 * 16) == 0

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

from servegym.agents.ppo import PPO, PPOConfig
from servegym.envs.cluster import schema
from servegym.errors import InputError

SMALL = PPOConfig(n_steps=16, batch_size=128, n_epochs=3, learning_rate=5e-3, beta=0.5, num_threads=1)


INFLIGHT = schema.column(schema.INSTANCE, "inflight")


def best(obs):
    return np.where(obs["instance_mask"] == 1, obs["instances"][..., INFLIGHT], np.inf).min(1)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.network.parameters()])


def test_learns_to_pick_the_least_loaded_instance_of_any_fleet(least_inflight):
    config = PPOConfig(n_steps=8, batch_size=128, n_epochs=3, learning_rate=1e-2, beta=0.5, num_threads=1)
    model = PPO(least_inflight(64, 5), config=config, seed=1).learn(16_000)
    larger = least_inflight(64, 64)
    obs, _ = larger.reset(seed=9)
    rewards, first = [], []
    for _ in range(10):
        actions, _ = model.predict(obs)
        first.append((obs["instances"][:, 0, INFLIGHT] == best(obs)).mean())
        obs, reward, *_ = larger.step(actions)
        rewards.append(reward.mean())
    assert np.mean(rewards) > 0.95
    assert np.mean(first) < 0.2  # what playing one instance blindly would get


def test_same_seed_same_run_and_another_seed_another(least_inflight):
    runs = [weights(PPO(least_inflight(8), config=SMALL, seed=seed).learn(512)) for seed in (4, 4, 5)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_threads_share_a_minibatch_without_changing_its_gradient(least_inflight):
    one, two = (
        PPO(least_inflight(8), config=PPOConfig(n_steps=16, batch_size=128, num_threads=n), seed=2).learn(256)
        for n in (1, 2)
    )
    torch.testing.assert_close(weights(one), weights(two), rtol=0, atol=1e-5)


def test_draws_follow_the_policy_and_never_an_illegal_answer(least_inflight):
    model = PPO(least_inflight(4000, 4), config=PPOConfig(n_steps=1))
    model.observation, _ = model.vector_env.reset(seed=0)
    for rows in model.observation.values():
        rows[:] = rows[1]  # every lane asks the same question: 3 of 4 instances are real
    with torch.no_grad():
        model.network.head_score.weight *= 300
    log_probs, _ = model._evaluate(model.buffer.put(0, model.observation))
    counts = np.bincount(model._decide(0), minlength=5)
    expected = log_probs[0].exp().numpy()
    assert expected[4] == 0 == counts[4]
    assert expected.max() > 0.3
    np.testing.assert_allclose(counts / 4000, expected, atol=4 * 0.5 / 4000**0.5)


def test_truncation_bootstraps_and_termination_does_not(least_inflight):
    model = PPO(least_inflight(6), config=SMALL, seed=0)
    model.learn(6 * 16)
    buffer = model.buffer
    lanes = np.arange(6) % 3 == 0
    assert buffer.ends[:, lanes].any()
    assert buffer.ends[:, ~lanes].any()
    assert (buffer.next_values[:, lanes][buffer.ends[:, lanes]] != 0).all()
    assert (buffer.next_values[:, ~lanes][buffer.ends[:, ~lanes]] == 0).all()
    np.testing.assert_array_equal(
        buffer.next_values[:-1][~buffer.ends[:-1]], buffer.values[1:][~buffer.ends[:-1]]
    )
    np.testing.assert_allclose(buffer.elapsed_s, 0.1)


def test_rescaling_keeps_the_values(least_inflight):
    model = PPO(least_inflight(8), config=SMALL)
    model.learn(8 * 16)
    obs = {name: torch.from_numpy(rows) for name, rows in model.observation.items()}
    _, before = model._evaluate(obs)
    model._rescale_values(np.linspace(50, 90, 100))
    assert model.normalizer.mean > 20
    np.testing.assert_allclose(model._evaluate(obs)[1], before, rtol=1e-4, atol=1e-4)


def test_logs_stable_tags(least_inflight, tmp_path):
    PPO(least_inflight(8), config=SMALL, log_dir=tmp_path).learn(8 * 16 * 3)
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {"charts/SPS", "charts/episodic_return", "losses/approx_kl", "losses/clipfrac"}
    assert tags >= {"losses/explained_variance", "losses/entropy", "losses/policy_loss", "losses/value_loss"}
    shares = {
        phase: events.Scalars(f"time/{phase}")[-1].value for phase in ("env", "policy", "update", "collect")
    }
    assert shares["collect"] + shares["update"] == pytest.approx(1)
    assert shares["env"] + shares["policy"] == pytest.approx(shares["collect"])
    assert [e.step for e in events.Scalars("charts/SPS")] == [128, 256, 384]


def test_tracks_offline_without_an_account(least_inflight, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    model = PPO(least_inflight(8), config=SMALL, log_dir=tmp_path, track="test").learn(8 * 16)
    model.logger.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_callback_can_stop_training(least_inflight):
    class Stop(BaseCallback):
        def _on_step(self):
            return self.num_timesteps < 80

    model = PPO(least_inflight(8), config=SMALL).learn(10_000, callback=Stop())
    assert model.num_timesteps == 80


def test_refuses_other_autoreset_modes(least_inflight):
    env = least_inflight(2)
    env.metadata = {"autoreset_mode": "next"}
    with pytest.raises(InputError, match="autoreset_mode"):
        PPO(env)


def test_refuses_a_reward_that_is_not_finite(least_inflight):
    env = least_inflight(2)
    step = env.step
    env.step = lambda actions: [x if i != 1 else x * np.nan for i, x in enumerate(step(actions))]
    with pytest.raises(InputError, match="not finite"):
        PPO(env, config=SMALL).learn(100)


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_steps", 0), ("gae_horizon_s", 0.0), ("learning_rate", float("nan")), ("n_epochs", 2.5)],
)
def test_refuses_bad_hyperparameters(field, value):
    with pytest.raises(InputError, match=field):
        PPOConfig(**{field: value})


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_saves_a_place_to_resume_from(least_inflight, tmp_path):
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
        PPO(fake.LeastInflight(8), config=config).learn(10**9, [Ready(), save])
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
    model = PPO.resume(tmp_path / "c", least_inflight(8))
    assert model.num_timesteps > 0
    assert model.num_timesteps % (8 * 16) == 0

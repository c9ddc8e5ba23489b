"""The vector checker finds what it is for."""

import numpy as np
import pytest

from servegym.envs.cluster.checker import check_vector_env
from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.vector import DispatchVectorEnv
from servegym.envs.scenario import Scenario

SMALL = Scenario(clusters=("2xa100-llama-3.1-8b",), requests=6)
EPISODES = make_episodes(SMALL, 3, 0)


def broken(change, mode="SameStep", **arguments):
    """An environment whose steps `change` alters: (env, observation, reward, ...) -> the same."""

    class Broken(DispatchVectorEnv):
        steps = 0

        def step(self, actions):
            self.steps += 1
            return change(self, *super().step(actions))

    return Broken(2, SMALL, episodes=EPISODES, autoreset_mode=mode, **arguments)


def untouched(env, *step):
    return step


def test_sound_environment():
    check_vector_env(broken(untouched))
    check_vector_env(broken(untouched, "NextStep"))


def test_shared_buffers():
    with pytest.raises(AssertionError, match="wrote into the last observation"):
        check_vector_env(broken(untouched, copy=False))


def drifting(env, obs, reward, *rest):
    return obs, reward + env.steps * 1e-9, *rest


def wide(env, obs, reward, *rest):
    return obs, reward.astype(np.float32), *rest


def no_default(env, obs, *rest):
    obs["mask"][1, 0] = 0
    return obs, *rest


def negative(env, obs, *rest):
    obs["instances"][0, 0, 0] = -1
    return obs, *rest


def short(env, obs, *rest):
    del obs["edges"]
    return obs, *rest


def no_final(env, obs, reward, terminated, truncated, info):
    info.pop("final_obs", None)
    return obs, reward, terminated, truncated, info


def both(env, obs, reward, terminated, truncated, info):
    return obs, reward, terminated, terminated.copy(), info


def scalar_info(env, obs, reward, terminated, truncated, info):
    return obs, reward, terminated, truncated, {**info, "elapsed_s": info["elapsed_s"][:1]}


def endless(env, obs, reward, terminated, truncated, info):
    return obs, reward, np.zeros_like(terminated), truncated, {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drifting, "two runs with the same seed"),
        (wide, "reward is float32"),
        (no_default, "candidate 0 of lane 1 is not legal"),
        (negative, "instances lies outside its space"),
        (short, "arrays"),
        (no_final, "no final_obs though lane 0 ended"),
        (both, "both terminated and truncated"),
        (scalar_info, r"info\['elapsed_s'\] has shape"),
        (endless, "did not end within 50 steps"),
    ],
)
def test_broken_environments(change, message):
    with pytest.raises(AssertionError, match=message):
        check_vector_env(broken(change), max_steps=50)


def paid_reset(env, obs, reward, *rest):
    return obs, reward - 1.0, *rest


def test_reward_in_the_step_of_a_reset():
    with pytest.raises(AssertionError, match="reward in the step of a reset"):
        check_vector_env(broken(paid_reset, "NextStep"))

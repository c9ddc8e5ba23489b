"""A checker for vector environments; Gymnasium's `check_env` takes single ones only.

`check_vector_env` plays random legal answers until every lane has ended an episode, twice with the same seed,
and raises `AssertionError` with the lane and the array at fault.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

AFTER_END = 3  # steps that are played after the last lane's first end, across its reset
Step = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


def check_vector_env(env: VectorEnv, *, seed: int = 0, max_steps: int = 100_000) -> None:
    """Check spaces, dtypes, masks, autoreset, determinism and that returned arrays are the caller's own.

    Args:
        env: an environment whose observation is a dict with `mask`, int8 [B, C]; it returns copies.
        seed: seed of the resets and of the answers.
        max_steps: steps within which every lane has to end an episode.

    Raises:
        AssertionError: naming what does not hold.
    """
    mode = env.metadata.get("autoreset_mode")
    assert mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP), f"metadata['autoreset_mode'] = {mode}"
    first = _play(env, mode, seed, max_steps)
    second = _play(env, mode, seed, max_steps)
    assert len(first) == len(second), f"{len(first)} and {len(second)} steps with the same seed"
    for k, (a, b) in enumerate(zip(first, second, strict=True)):
        _check_equal(a, b, f"step {k} of two runs with the same seed")


def _play(env: VectorEnv, mode: AutoresetMode, seed: int, max_steps: int) -> list[Step]:
    rng = np.random.default_rng(seed)
    obs, info = env.reset(seed=seed)
    _check_observation(env, obs, "reset")
    assert isinstance(info, dict), f"reset returned info of {type(info)}"
    ended = np.zeros(env.num_envs, bool)
    resetting = np.zeros(env.num_envs, bool)
    steps: list[Step] = []
    beyond = 0
    while beyond < AFTER_END:
        assert len(steps) < max_steps, f"lane {ended.argmin()} did not end within {max_steps} steps"
        before = {name: array.copy() for name, array in obs.items()}
        step = env.step(_random_legal(obs["mask"], rng))
        _check_equal((before,), (obs,), f"step {len(steps)} wrote into the last observation")
        _check_step(env, step, f"step {len(steps)}")
        obs, reward, terminated, truncated, info = step
        done = terminated | truncated
        step = (*step[:4], _of_ended(info, done))
        if mode == AutoresetMode.SAME_STEP:
            _check_final(env, info, done, f"step {len(steps)}")
        else:
            assert "final_obs" not in info, "final_obs is for SAME_STEP"
            assert not done[resetting].any(), f"step {len(steps)}: a lane ended in the step that reset it"
            assert (reward[resetting] == 0).all(), f"step {len(steps)}: reward in the step of a reset"
            resetting = done
        ended |= done
        beyond += bool(ended.all())
        steps.append(step)
    return steps


def _random_legal(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A legal answer for each lane, all equally likely."""
    return np.where(mask == 1, rng.random(mask.shape), -1.0).argmax(axis=1)


def _check_observation(env: VectorEnv, obs: dict[str, np.ndarray], where: str) -> None:
    names = set(env.observation_space.spaces)  # type: ignore[attr-defined]
    assert set(obs) == names, f"{where}: arrays {sorted(obs)} instead of {sorted(names)}"
    for name, space in env.observation_space.spaces.items():  # type: ignore[attr-defined]
        array = obs[name]
        assert array.dtype == space.dtype, f"{where}: {name} is {array.dtype}, its space {space.dtype}"
        assert array.shape == space.shape, f"{where}: {name} is {array.shape}, its space {space.shape}"
        assert space.contains(array), f"{where}: {name} lies outside its space"
    illegal = np.flatnonzero(obs["mask"][:, 0] != 1)
    assert len(illegal) == 0, f"{where}: candidate 0 of lane {illegal[0]} is not legal"
    lanes, answers = np.nonzero(obs["mask"])
    for column in (1, 2):
        named = obs["candidates"][lanes, answers, column]
        missing = (named >= 0) & (obs["instance_mask"][lanes, named] == 0)
        assert not missing.any(), (
            f"{where}: lane {lanes[missing.argmax()]} offers an instance that is not there"
        )


def _check_step(env: VectorEnv, step: Step, where: str) -> None:
    obs, reward, terminated, truncated, info = step
    _check_observation(env, obs, where)
    for name, array, kind in (
        ("reward", reward, np.float64),
        ("terminated", terminated, np.bool_),
        ("truncated", truncated, np.bool_),
    ):
        assert array.shape == (env.num_envs,), f"{where}: {name} has shape {array.shape}"
        assert array.dtype == kind, f"{where}: {name} is {array.dtype}"
    assert np.isfinite(reward).all(), f"{where}: reward of lane {np.isfinite(reward).argmin()} is not finite"
    assert not (terminated & truncated).any(), f"{where}: a lane is both terminated and truncated"
    for name, array in info.items():
        if isinstance(array, np.ndarray):
            assert array.shape == (env.num_envs,), f"{where}: info[{name!r}] has shape {array.shape}"


def _check_final(env: VectorEnv, info: dict[str, Any], done: np.ndarray, where: str) -> None:
    if not done.any():
        assert "final_obs" not in info, f"{where}: final_obs though no lane ended"
        return
    assert "final_obs" in info, f"{where}: no final_obs though lane {done.argmax()} ended"
    assert (info["_final_obs"] == done).all(), f"{where}: _final_obs is not the lanes that ended"
    for name, space in env.single_observation_space.spaces.items():  # type: ignore[attr-defined]
        for lane in np.flatnonzero(done):
            final = info["final_obs"][name][lane]
            assert space.contains(final), f"{where}: final_obs {name} of lane {lane} lies outside its space"


def _of_ended(info: dict[str, Any], done: np.ndarray) -> dict[str, Any]:
    """An info whose finals are cut to the lanes that ended; of the others they may hold anything."""
    finals = {
        name: {key: array[done] for key, array in info[name].items()}
        for name in ("final_obs", "final_info")
        if name in info
    }
    return info | finals


def _check_equal(a: Any, b: Any, where: str) -> None:
    """Compare nested tuples and dicts of arrays to the bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: {sorted(a)} and {sorted(b)}"
        for name in a:
            _check_equal(a[name], b[name], f"{where}, {name}")
    elif isinstance(a, tuple):
        for x, y in zip(a, b, strict=True):
            _check_equal(x, y, where)
    else:
        assert np.array_equal(a, b), f"{where}: arrays differ"

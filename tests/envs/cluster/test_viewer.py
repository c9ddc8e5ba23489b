"""Pictures: what is drawn is what the cluster holds."""

from dataclasses import replace
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import RenderCollection

from servegym.envs.cluster import schema, viewer
from servegym.envs.cluster.env import DispatchEnv
from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.moment import Move, words
from servegym.envs.scenario import Scenario
from servegym.errors import InputError

SMALL = Scenario(clusters=("2xa10-llama-7b+1xl40s-llama-3.1-8b",), requests=30)


@pytest.fixture(scope="module")
def seen():
    """An observation and a moment in the middle of an episode, with requests on every instance."""
    env = DispatchEnv(SMALL, episodes=make_episodes(SMALL, 1, 0))
    observation, _ = env.reset(seed=0)
    for k in range(12):
        observation, *_ = env.step(1 + k % 3)
    return observation, env.moment()


def colors(picture: np.ndarray, i: int) -> list[tuple[int, ...]]:
    """The pixels along the middle of a bar."""
    left, top, right, bottom = viewer.bar_box(i)
    return [tuple(pixel) for pixel in picture[(top + bottom) // 2, left:right].tolist()]


def test_bars_are_the_kv_usage(seen):
    observation, moment = seen
    assert moment.held.min() > 0
    picture = viewer.picture(observation, moment)
    for i, held in enumerate(moment.held):
        assert abs(colors(picture, i).count(viewer.HELD) - viewer.BAR_WIDTH * held) <= 1


@pytest.mark.parametrize(("held", "cached"), [(0.0, 0.0), (0.25, 0.5), (0.5, 0.5), (1.0, 0.0)])
def test_held_and_cached_are_apart(seen, held, cached):
    observation, moment = seen
    count = len(moment.held)
    moment = replace(moment, held=np.full(count, held), cached=np.full(count, cached))
    bar = colors(viewer.picture(observation, moment), 1)
    counts = [bar.count(color) for color in (viewer.HELD, viewer.CACHED, viewer.EMPTY)]
    assert counts == [viewer.BAR_WIDTH * part for part in (held, cached, 1 - held - cached)]


def squares(picture: np.ndarray, i: int) -> list[tuple[int, ...]]:
    _, top, _, bottom = viewer.bar_box(i)
    step = viewer.SQUARE + 1
    row = picture[(top + bottom) // 2, viewer.SQUARES_LEFT + viewer.SQUARE // 2 :: step][
        : viewer.MOST_SQUARES
    ]
    kinds = (viewer.DECODING, viewer.PREFILLING, viewer.WAITING)
    return [tuple(pixel) for pixel in row.tolist() if tuple(pixel) in kinds]


def test_a_square_for_each_request(seen):
    observation, moment = seen
    counts = np.array([[3, 1, 2], [0, 0, 0], [1000, 0, 4]])
    decoding, prefilling, waiting = counts.T
    moment = replace(moment, decoding=decoding, prefilling=prefilling, waiting=waiting)
    picture = viewer.picture(observation, moment)
    assert squares(picture, 0) == [viewer.DECODING] * 3 + [viewer.PREFILLING] + [viewer.WAITING] * 2
    assert squares(picture, 1) == []
    crowd = squares(picture, 2)
    assert len(crowd) == viewer.MOST_SQUARES and crowd.count(viewer.WAITING) == 4


def test_a_filled_triangle_at_the_default_and_hollow_ones_at_the_others(seen):
    observation, moment = seen
    observation = observation | {"mask": np.array([1, 1, 1, 0], np.int8)}
    default = int(observation["candidates"][0, 1])
    picture = viewer.picture(observation, moment)
    inside = []
    for i in range(3):
        left, top, _, bottom = viewer.bar_box(i)
        inside.append(tuple(picture[(top + bottom) // 2, left - 15].tolist()))
    legal = {0, 1, default}
    assert [color == viewer.INK for color in inside] == [i == default for i in range(3)]
    edges = [viewer.bar_box(i) for i in range(3)]
    outlined = [tuple(picture[top + 5, left - 18].tolist()) == viewer.INK for left, top, _, _ in edges]
    assert outlined == [i in legal for i in range(3)]


def test_migrations_are_arrows_and_marks(seen):
    observation, moment = seen
    before = viewer.picture(observation, moment)
    assert not (before == viewer.MOVING).all(2).any()
    moved = replace(moment, moves=(Move(5, 2, 0, "live copy", 1),), draining=np.array([False, True, False]))
    arrow = (viewer.picture(observation, moved) == viewer.MOVING).all(2)
    rows = np.flatnonzero(arrow.any(1))
    _, top, _, bottom = viewer.bar_box(0)
    assert top <= rows.min() <= bottom
    widths = arrow.sum(1)
    tip = widths[rows.min() : rows.min() + 8]
    assert (np.diff(tip[:6]) >= 0).all() and tip.max() > 4, "the head points at the destination"
    lines = viewer.text(observation, moved).splitlines()
    assert [line.split("cached")[1] for line in lines if line.startswith("instance")] == [
        " engaged", " draining", " engaged",
    ]  # fmt: skip
    assert lines[-1] == "live copy 1: request 5, 2 to 0"


def test_the_sparkline_is_the_history(seen):
    observation, moment = seen
    history = np.zeros(schema.HISTORY, np.float32)
    history[[0, 15]] = 4, 2
    picture = viewer.picture(observation | {"history": history}, moment)
    area = picture[24 : 24 + viewer.SPARK_HEIGHT, viewer.SPARK_LEFT : viewer.SPARK_LEFT + viewer.SPARK_WIDTH]
    heights = (area == viewer.FAINT).all(2).sum(0)[4 :: viewer.SPARK_WIDTH // schema.HISTORY]
    assert heights.tolist() == [viewer.SPARK_HEIGHT] + [0] * 14 + [viewer.SPARK_HEIGHT // 2]


def test_text_names_question_default_and_last_answer(seen):
    observation, moment = seen
    r, default = moment.asked[0], observation["candidates"][0, 1]
    lines = viewer.text(observation, moment, "request 3 to instance 2").splitlines()
    assert lines[0].startswith(f"t = {moment.now_s:.3f} s: ")
    assert lines[1].startswith(f"dispatch? request {r}: {observation['requests'][0, 0]:.0f} prompt tokens")
    assert lines[2] == f"default: request {r} to instance {default}; 4 legal answers"
    assert lines[3] == "last answer: request 3 to instance 2"
    assert len(lines) == 4 + 3


@pytest.mark.parametrize(
    ("kind", "answer", "candidate", "edge", "told"),
    [
        ("dispatch", 2, (0, 1, -1), {}, "request 40 to instance 1"),
        ("preempt", 3, (1, 2, -1), {}, "recompute request 41 on instance 2"),
        ("preempt", 4, (1, 2, -1), {"swap": 1}, "swap request 41 on instance 2"),
        ("migrate", 0, (-1, 0, -1), {}, "nothing moves"),
        ("migrate", 1, (0, 2, 1), {}, "instance 1 to 2"),
        ("move", 1, (0, 2, 1), {}, "request 40 to instance 2"),
        ("budget", 1, (0, 1, -1), {"prefill_cap": 512}, "512 prompt tokens an iteration on instance 1"),
    ],
)
def test_answers_in_words(kind, answer, candidate, edge, told):
    observation = {
        "kind": np.int64(schema.KINDS.index(kind)),
        "candidates": np.zeros((17, 3), np.int32),
        "edges": np.zeros((17, len(schema.EDGE)), np.float32),
    }
    observation["candidates"][answer] = candidate
    for name, value in edge.items():
        observation["edges"][answer, schema.column(schema.EDGE, name)] = value
    assert words(observation, answer, (40, 41)) == told


def test_gymnasium_renders_every_mode():
    env = gym.make("ServeGym/Dispatch-v0", scenario=SMALL, episodes=make_episodes(SMALL, 1, 0))
    assert env.metadata["render_modes"] == ["ansi", "rgb_array"]
    check_env(env.unwrapped)
    with pytest.raises(InputError, match="choose None, ansi or rgb_array"):
        DispatchEnv(SMALL, render_mode="human")
    with pytest.raises(InputError, match="call reset first"):
        DispatchEnv(SMALL, episodes=make_episodes(SMALL, 1, 0)).moment()


def test_frames_of_an_episode_make_a_film():
    scenario = replace(SMALL, requests=5)
    episodes = make_episodes(scenario, 1, 0)
    env = RenderCollection(DispatchEnv(scenario, episodes=episodes, render_mode="rgb_array"))
    env.reset(seed=0)
    terminated = False
    while not terminated:
        _, _, terminated, _, _ = env.step(1)
    frames = env.render()
    assert len(frames) == 6
    assert {(f.shape, f.dtype) for f in frames} == {((112 + 3 * 32, 1024, 3), np.dtype(np.uint8))}
    assert all((a != b).any() for a, b in pairwise(frames))
    assert not (frames[-1] == viewer.HELD).all(2)[viewer.HEADER :].any(), "nothing is held at the end"

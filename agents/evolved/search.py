"""The cross-entropy method over the weights of a dispatch rule.

Rubinstein's method as Szita and Lorincz use it for policies ("Learning Tetris using the noisy cross-entropy
method", 2006): draw weights from a Gaussian, play them all on the same episodes, move mean and spread towards
those of the best quarter, and never let the spread fall to 0. Weights of the best count by the logarithm of
their rank, and draws come in pairs mu + d, mu - d. Each generation meets new episodes, so that nothing is
fitted to the luck of a few. It needs no credit assignment: a whole episode's goodput is what a set of weights
is worth, which is why it finds what policy gradients hardly see, such as keeping instances for a class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from servegym.agents.evolved.rule import SHAPE, EvolvedDispatch, lmetric_weights, other_rules
from servegym.agents.heuristics._builtin import BuiltIn
from servegym.envs.cluster import schema
from servegym.envs.cluster.decisions import kinds_of
from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.vector import ClusterVectorEnv
from servegym.envs.metrics import class_slos
from servegym.envs.scenario import Scenario
from servegym.errors import InputError
from servegym.evaluation import Setting, decisions_of, episodes_of, three_loads

SPREAD = 0.35  # at first, of the weights without a context; the others' is smaller
CONTEXT_SPREAD = 0.25
LEAST_SPREAD = 0.05
KEPT = 0.7  # of the old spread in the new one
EPISODE_SEED = 3_000_000  # far from those of training and evaluation
Progress = Callable[[int, float, float], None]


def evolve(
    scenario: Scenario,
    system: str,
    params: Mapping[str, Any],
    *,
    generations: int,
    population: int = 32,
    seeds: int = 2,
    seed: int = 0,
    num_threads: int = 2,
    progress: Progress = lambda *_: None,
) -> np.ndarray:
    """Search dispatch weights for the most goodput on the middle fleet of a scenario, over three loads.

    Args:
        scenario: what is played.
        system, params: heuristics that answer all other questions.
        generations: how often the population is drawn and played.
        population: weights drawn in a generation, a multiple of 4.
        seeds: episodes of each load in a generation.
        seed: of the draws.
        num_threads: of the cluster model.
        progress: told the generation, the goodput of its mean weights, and that of the population.

    Returns:
        the mean weights behind the last generation, float64 [F, C].

    Raises:
        InputError: for a population that cannot be divided, or rules that the cluster model does not play.
    """
    if population < 4 or population % 4:
        raise InputError("evolve", "population", population, "give a multiple of 4")
    rules = _built_in(scenario, system, params)
    generator = np.random.default_rng(seed)
    mean = lmetric_weights()
    spread = np.full(SHAPE, CONTEXT_SPREAD)
    spread[:, 0] = SPREAD
    for generation in range(generations):
        first = EPISODE_SEED + 1000 * (seed * 1000 + generation)
        episodes = _episodes(scenario, seeds, first)
        steps = generator.standard_normal((population // 2, *SHAPE)) * spread
        drawn = mean + np.concatenate([steps, -steps])
        drawn[0] = mean  # one of them says how far the search is
        found = _goodput(drawn, scenario, episodes, rules, first, num_threads)
        progress(generation, float(found[0]), float(found.mean()))
        mean, spread = _narrow(mean, spread, drawn[np.argsort(-found)[: population // 4]])
    return mean


def _narrow(mean: np.ndarray, spread: np.ndarray, best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread for the next generation, from the best of this one, [N, F, C] in order."""
    shares = np.log(len(best) + 0.5) - np.log(np.arange(1, len(best) + 1))
    shares /= shares.sum()
    towards = best - mean
    own = np.sqrt(np.tensordot(shares, towards**2, 1))
    return mean + np.tensordot(shares, towards, 1), np.maximum(KEPT * spread + (1 - KEPT) * own, LEAST_SPREAD)


def _episodes(scenario: Scenario, seeds: int, seed: int) -> list[Episode]:
    cluster = scenario.clusters[len(scenario.clusters) // 2]
    settings = [Setting(cluster, load) for load in three_loads(scenario)]
    return [episode for setting in settings for episode in episodes_of(scenario, setting, seeds, seed)]


def _built_in(scenario: Scenario, system: str, params: Mapping[str, Any]) -> dict[str, BuiltIn]:
    """The rules of the system that the cluster model itself can play, where the scenario has their lever."""
    kinds = kinds_of(decisions_of(scenario))
    rules = {kind: rule for kind, rule in other_rules(system, params).items() if kind in kinds}
    for rule in rules.values():
        if rule.needs_oracle or not isinstance(rule, BuiltIn):
            raise InputError("evolve", "system", rule.name, "the cluster model has no such rule")
    return rules  # type: ignore[return-value]


def _goodput(
    drawn: np.ndarray,
    scenario: Scenario,
    episodes: Sequence[Episode],
    rules: Mapping[str, BuiltIn],
    seed: int,
    num_threads: int,
) -> np.ndarray:
    """Mean goodput of each set of weights [N, F, C] over the episodes, all played at once, float64 [N]."""
    counted = replace(scenario, reward="goodput")
    lanes = [replace(episode, scenario=counted) for _ in drawn for episode in episodes]
    env = ClusterVectorEnv(
        len(lanes),
        counted,
        decisions=("dispatch",),
        rules={kind: rule.rule for kind, rule in rules.items()},
        episodes=lanes,
        num_threads=num_threads,
        copy=False,
    )
    for kind, rule in rules.items():
        env.lanes().rules.params[schema.KINDS.index(kind)] = rule.row()
    dispatch = EvolvedDispatch(np.repeat(drawn, len(episodes), axis=0))
    dispatch.reset(len(lanes), seed)
    obs, _ = env.reset(seed=[seed + k for _ in drawn for k in range(len(episodes))])
    gained, ended = np.zeros(len(lanes)), np.zeros(len(lanes), bool)
    while not ended.all():
        obs, reward, terminated, _, _ = env.step(dispatch.act(obs))
        gained += np.where(ended, 0.0, reward)
        ended |= terminated
    env.close()
    possible = np.array([_weight(episode) for episode in lanes])
    return (gained / possible).reshape(len(drawn), -1).mean(1)


def _weight(episode: Episode) -> float:
    """What all requests of an episode are worth together."""
    scenario, workload = episode.scenario, episode.workload
    assert scenario is not None
    slos = class_slos(workload.class_names, scenario.slo, scenario.class_slo)
    return float(np.array([slo.weight for slo in slos])[workload.class_id].sum())

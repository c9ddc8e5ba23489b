"""Tuning: which parameters of a rule's search space score best."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import product

import numpy as np

from servegym.agents.heuristics._rule import Rule

MOST = 30

Parameters = dict[str, object]


def candidates(rule: type[Rule], seed: int) -> list[Parameters]:
    """Parameters to try: the published ones and the rest of the grid, of which `seed` draws `MOST` in all."""
    space = rule.search_space
    defaults = inspect.signature(rule).parameters
    published: Parameters = {name: defaults[name].default for name in space}
    grid = (dict(zip(space, values, strict=True)) for values in product(*space.values()))
    rest: list[Parameters] = [parameters for parameters in grid if parameters != published]
    if len(rest) >= MOST:
        drawn = np.random.default_rng(seed).choice(len(rest), MOST - 1, replace=False)
        rest = [rest[i] for i in sorted(drawn)]
    return [published, *rest]


def tune(rule: type[Rule], score: Callable[[Rule], float], seed: int) -> Parameters:
    """The parameters of highest score; the published ones unless others are better.

    Args:
        rule: with its search space.
        score: how well a rule does, higher is better.
        seed: of the draw from a grid of more than `MOST`.
    """
    return max(candidates(rule, seed), key=lambda parameters: score(rule(**parameters)))

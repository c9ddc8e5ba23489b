"""Tuning: which parameters of a rule's search space score best."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np

from servegym.agents.heuristics import defaults, make_heuristic, search_space
from servegym.agents.policy import Policy

MOST = 30

Parameters = dict[str, object]


def candidates(name: str, seed: int) -> list[Parameters]:
    """Parameters to try: the published ones and the rest of the grid, of which `seed` draws `MOST` in all."""
    space, known = search_space(name), defaults(name)
    published: Parameters = {field: known[field] for field in space}
    grid = (dict(zip(space, values, strict=True)) for values in product(*space.values()))
    rest: list[Parameters] = [parameters for parameters in grid if parameters != published]
    if len(rest) >= MOST:
        drawn = np.random.default_rng(seed).choice(len(rest), MOST - 1, replace=False)
        rest = [rest[i] for i in sorted(drawn)]
    return [published, *rest]


def tune(name: str, score: Callable[[Policy], float], seed: int) -> Parameters:
    """The parameters of highest score; the published ones unless others are better.

    Args:
        name: of a heuristic with a search space.
        score: how well it does with some parameters, higher is better.
        seed: of the draw from a grid of more than `MOST`.
    """
    return max(candidates(name, seed), key=lambda parameters: score(make_heuristic(name, **parameters)))

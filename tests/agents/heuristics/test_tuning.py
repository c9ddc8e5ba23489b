from __future__ import annotations

import pytest

from servegym.agents.heuristics import defaults, heuristic_names, search_space
from servegym.agents.heuristics.tuning import MOST, candidates, tune


@pytest.mark.parametrize("name", heuristic_names())
def test_candidates_are_the_grid_or_thirty_of_it(name):
    space = search_space(name)
    size = 1
    for values in space.values():
        size *= len(values)
    tried = candidates(name, seed=3)
    assert len(tried) == min(size, MOST) == len({tuple(p.values()) for p in tried})
    assert all(p[field] in space[field] for p in tried for field in p)
    assert tried[0] == defaults(name)
    assert candidates(name, seed=3) == tried
    assert (candidates(name, seed=4) != tried) == (size > MOST)


def test_the_best_score_wins_and_a_tie_keeps_what_is_published():
    assert tune("vllm_dp", lambda r: -abs(r.waiting_weight - 7), 0) == {"waiting_weight": 8.0}
    assert tune("vllm_dp", lambda r: min(r.waiting_weight, 4.0), 0) == {"waiting_weight": 4.0}
    assert tune("vllm_dp", lambda r: float("nan"), 0) == {"waiting_weight": 4.0}

from __future__ import annotations

import inspect

import pytest

from servegym.agents.heuristics import HEURISTICS, heuristic_names
from servegym.agents.heuristics.tuning import MOST, candidates, tune


@pytest.mark.parametrize("name", heuristic_names())
def test_candidates_are_the_grid_or_thirty_of_it(name):
    rule = HEURISTICS[name]
    size = 1
    for values in rule.search_space.values():
        size *= len(values)
    tried = candidates(rule, seed=3)
    assert len(tried) == min(size, MOST) == len({tuple(p.values()) for p in tried})
    assert all(p[field] in rule.search_space[field] for p in tried for field in p)
    defaults = inspect.signature(rule).parameters
    assert tried[0] == {field: defaults[field].default for field in rule.search_space}
    assert candidates(rule, seed=3) == tried
    assert (candidates(rule, seed=4) != tried) == (size > MOST)


def test_the_best_score_wins_and_a_tie_keeps_what_is_published():
    rule = HEURISTICS["vllm_dp"]
    assert tune(rule, lambda r: -abs(r.waiting_weight - 7), 0) == {"waiting_weight": 8.0}
    assert tune(rule, lambda r: min(r.waiting_weight, 4.0), 0) == {"waiting_weight": 4.0}
    assert tune(rule, lambda r: float("nan"), 0) == {"waiting_weight": 4.0}

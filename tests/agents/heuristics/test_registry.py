"""Names, parameters and search spaces."""

from __future__ import annotations

import inspect
from itertools import product

import pytest

from servegym.agents.heuristics import HEURISTICS, heuristic_names, make_heuristic
from servegym.errors import InputError


def test_names_agree():
    assert heuristic_names() == list(HEURISTICS)
    assert all(make_heuristic(name).name == name for name in HEURISTICS)


def test_only_the_oracle_rule_needs_the_oracle():
    assert [name for name in HEURISTICS if make_heuristic(name).needs_oracle] == ["least_work_oracle"]


@pytest.mark.parametrize("name", heuristic_names())
def test_search_space_covers_the_parameters_and_their_defaults(name):
    rule = HEURISTICS[name]
    parameters = {} if rule.__init__ is object.__init__ else dict(inspect.signature(rule).parameters)
    assert set(rule.search_space) == set(parameters)
    for field, values in rule.search_space.items():
        assert parameters[field].default in values
    for values in product(*rule.search_space.values()):
        tuned = make_heuristic(name, **dict(zip(rule.search_space, values, strict=True)))
        assert [getattr(tuned, field) for field in rule.search_space] == list(values)


@pytest.mark.parametrize(
    ("name", "params", "field"),
    [
        ("no_such_rule", {}, "name"),
        ("random", {"seed": 3}, "seed"),
        ("llmd", {"weight": 1}, "weight"),
        ("llmd", {"kv_weight": "2"}, "kv_weight"),
        ("llmd", {"kv_weight": None}, "kv_weight"),
        ("dynamo", {"overlap_weight": True}, "overlap_weight"),
        ("dynamo", {"overlap_weight": -1}, "overlap_weight"),
        ("vllm_dp", {"waiting_weight": float("nan")}, "waiting_weight"),
        ("sglang_cache_aware", {"match_threshold": 1.5}, "match_threshold"),
        ("sglang_cache_aware", {"abs_threshold": float("inf")}, "abs_threshold"),
        ("infaas", {"watermark": 2}, "watermark"),
        ("llumnix", {"mode": "fast"}, "mode"),
        ("llumnix", {"mode": ["paper"]}, "mode"),
    ],
)
def test_bad_names_and_parameters(name, params, field):
    with pytest.raises(InputError) as error:
        make_heuristic(name, **params)
    assert error.value.field == field


@pytest.mark.parametrize("name", sorted(set(HEURISTICS) - {"default"}))
def test_other_lanes_than_prepared_are_an_error(name, observe):
    rule = make_heuristic(name)
    with pytest.raises(InputError, match="lanes = 1"):
        rule.act(observe({"inflight": [0]}))
    rule.reset(2, 0)
    with pytest.raises(InputError, match="reset prepared for 2"):
        rule.act(observe({"inflight": [0]}))

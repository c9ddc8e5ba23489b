"""Names, parameters and search spaces."""

from __future__ import annotations

from itertools import product

import pytest

from servegym.agents.heuristics import (
    HEURISTICS,
    defaults,
    heuristic_names,
    heuristic_of,
    make_heuristic,
    search_space,
)
from servegym.envs.cluster.rule_names import RULES
from servegym.errors import InputError


def test_names_agree():
    assert heuristic_names()[: len(HEURISTICS)] == list(HEURISTICS)
    assert all(make_heuristic(name).name == name for name in heuristic_names())


def test_only_oracle_rules_need_the_oracle():
    names = [name for name in heuristic_names() if make_heuristic(name).needs_oracle]
    assert names == ["least_work_oracle", "victim_least_left_oracle"]


@pytest.mark.parametrize("name", heuristic_names())
def test_search_space_covers_the_parameters_and_their_defaults(name):
    space = search_space(name)
    assert set(space) == set(defaults(name))
    for field, values in space.items():
        assert defaults(name)[field] in values
    if name in HEURISTICS:
        for values in product(*space.values()):
            tuned = make_heuristic(name, **dict(zip(space, values, strict=True)))
            assert [getattr(tuned, field) for field in space] == list(values)


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
        ("dispatch_llumnix", {"mode": ["paper"]}, "mode"),
        ("migrate_greedy", {"least_gain_s": "1"}, "least_gain_s"),
        ("victim_least_left", {"victim": "last"}, "victim"),
        ("budget_tpot", {"factor": float("inf")}, "factor"),
    ],
)
def test_bad_names_and_parameters(name, params, field):
    with pytest.raises(InputError) as error:
        make_heuristic(name, **params)
    assert error.value.field == field


def test_an_unknown_name_may_be_a_path_or_a_slip(tmp_path):
    (tmp_path / "bundle").mkdir()
    for name, told in (
        ("runs/nope", "neither a folder nor a heuristic; see `servegym heuristics`"),
        ("lmetric+llumnics", "did you mean llumnix?"),
        (str(tmp_path / "bundle"), "a folder, not a heuristic"),
    ):
        with pytest.raises(InputError, match=told):
            make_heuristic(name)


@pytest.mark.parametrize("name", sorted(set(heuristic_names()) - {"default"}))
def test_other_lanes_than_prepared_are_an_error(name, observe):
    rule = make_heuristic(name)
    with pytest.raises(InputError, match="lanes = 1"):
        rule.act(observe({"inflight": [0]}, oracle=[0]))
    rule.reset(2, 0)
    with pytest.raises(InputError, match="reset prepared for 2"):
        rule.act(observe({"inflight": [0]}, oracle=[0]))


def test_every_rule_of_the_model_has_its_heuristic_but_what_happens_unasked():
    unasked = {"preempt": "engine", "migrate": "stay", "move": "default", "budget": "keep"}
    for kind, rules in RULES.items():
        for rule in rules[1:]:
            if unasked.get(kind) == rule:
                with pytest.raises(InputError, match=rule):
                    heuristic_of(kind, rule)
            else:
                assert kind in heuristic_of(kind, rule).kinds
    assert heuristic_of("preempt", "cheapest").name == "victim_cost_aware"
    assert heuristic_of("dispatch", "llumnix").name == "dispatch_llumnix"

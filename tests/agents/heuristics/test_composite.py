"""Several rules as one policy."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.agents.heuristics import (
    Composite,
    defaults,
    describe,
    heuristic_names,
    make_heuristic,
    search_space,
)
from servegym.agents.play import play
from servegym.envs.cluster.episode import make_episodes
from servegym.envs.scenario import Scenario
from servegym.errors import InputError


def parts(name, **params):
    policy = make_heuristic(name, **params)
    return {kind: rule.name for kind, rule in zip(policy.kinds, policy.rules, strict=True)}


LLUMNIX = {"dispatch": "dispatch_llumnix", "migrate": "migrate_llumnix", "move": "move_llumnix"}


def test_names_joined_by_plus():
    assert parts("llumnix") == LLUMNIX
    assert parts("lmetric+llumnix") == LLUMNIX | {"dispatch": "lmetric"}
    assert parts("llumnix+budget_tpot+victim_last") == LLUMNIX | {
        "budget": "budget_tpot",
        "preempt": "victim_last",
    }
    assert make_heuristic("lmetric+llumnix").name == "lmetric+llumnix"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("lmetric+", ""),
        ("lmetric+telepathy", "telepathy"),
        ("lmetric+mooncake", "mooncake"),
        ("llumnix+lmetric", "lmetric"),
        ("default+lmetric", "default"),
    ],
)
def test_a_part_that_is_unknown_or_idle_is_an_error(name, part):
    with pytest.raises(InputError) as error:
        make_heuristic(name)
    assert error.value.value == part


def test_parameters_go_to_every_rule_that_has_them():
    policy = make_heuristic("llumnix", mode="artifact", high=160.0)
    dispatch, migrate, move = policy.rules
    assert (dispatch.mode, migrate.mode, move.rule) == ("artifact", "artifact", "default")
    assert (migrate.low, migrate.high) == (48.0, 160.0)
    assert defaults("llumnix") == {
        "mode": "paper",
        "watermark": 0.01,
        "urgent_load": 1600.0,
        "low": 48.0,
        "high": 48.0,
    }
    assert search_space("llumnix").keys() == defaults("llumnix").keys()
    with pytest.raises(InputError, match="its parameters are mode") as error:
        make_heuristic("llumnix", factor=2.0)
    assert error.value.field == "factor"
    with pytest.raises(InputError, match="migrate_llumnix: low"):
        make_heuristic("lmetric+llumnix", low=-1)


def test_composite_of_own_rules(ask):
    victim, budget = make_heuristic("victim_least_left_oracle"), make_heuristic("budget_fixed")
    policy = Composite("mine", preempt=victim, budget=budget)
    assert policy.kinds == ("preempt", "budget")
    assert policy.needs_oracle
    assert not make_heuristic("llumnix").needs_oracle
    policy.reset(1, 0)
    assert policy.act(ask("budget", {1: {"prefill_cap": 64}}, oracle={})).tolist() == [1]
    assert policy.act(ask("move", {1: {}}, oracle={})).tolist() == [0]
    with pytest.raises(InputError, match="it answers budget"):
        Composite("mine", preempt=budget)
    with pytest.raises(InputError, match="it answers nothing"):
        Composite("mine", dispatch=make_heuristic("default"))


def test_names_by_kinds():
    assert heuristic_names(["preempt"]) == [
        "default",
        "victim_last",
        "victim_lowest_priority",
        "victim_largest",
        "victim_cost_aware",
        "victim_least_left",
        "victim_least_left_oracle",
    ]
    assert set(heuristic_names(["migrate"])) == {
        "default",
        "migrate_llumnix",
        "migrate_infaas",
        "migrate_greedy",
        "move_llumnix",
    }
    assert "llumnix" not in heuristic_names(["dispatch"])
    assert "dispatch_llumnix" in heuristic_names(["dispatch"])
    assert "lmetric+llumnix" in heuristic_names(["dispatch", "migrate"])
    every = ["dispatch", "preempt", "migrate", "move", "budget"]
    assert heuristic_names(every) == heuristic_names()


def test_descriptions():
    assert "OSDI'26" in describe("lmetric")
    assert describe("lmetric+llumnix").splitlines() == [
        "dispatch: lmetric",
        "migrate: migrate_llumnix",
        "move: move_llumnix",
    ]


def test_a_system_dispatches_as_its_rule():
    scenario = Scenario(clusters=("2xa100-llama-3.1-8b+1xl40s-llama-3.1-8b",), requests=60)
    episodes = make_episodes(scenario, 2, 0)
    for name, dispatch in (("llumnix", "dispatch_llumnix"), ("lmetric+llumnix", "lmetric")):
        whole = play(make_heuristic(name), scenario, episodes)
        alone = play(make_heuristic(dispatch), scenario, episodes)
        for a, b in zip(whole, alone, strict=True):
            np.testing.assert_array_equal(a.instance, b.instance)

"""Published dispatch rules, one a file, by name.

Every rule is a `servegym.agents.policy.Policy`; it answers 1 + the chosen instance.
"""

from __future__ import annotations

import inspect

from servegym.agents.heuristics._rule import Rule
from servegym.agents.heuristics.default import Default
from servegym.agents.heuristics.dynamo import Dynamo
from servegym.agents.heuristics.infaas import INFaaS
from servegym.agents.heuristics.least_request import LeastRequest
from servegym.agents.heuristics.least_tokens import LeastTokens
from servegym.agents.heuristics.least_work_oracle import LeastWorkOracle
from servegym.agents.heuristics.least_work_predicted import LeastWorkPredicted
from servegym.agents.heuristics.llmd import LLMD
from servegym.agents.heuristics.llumnix import Llumnix
from servegym.agents.heuristics.lmetric import LMetric
from servegym.agents.heuristics.mooncake import Mooncake
from servegym.agents.heuristics.power_of_two import PowerOfTwo
from servegym.agents.heuristics.random import Random
from servegym.agents.heuristics.round_robin import RoundRobin
from servegym.agents.heuristics.session_affinity import SessionAffinity
from servegym.agents.heuristics.sglang_cache_aware import SGLangCacheAware
from servegym.agents.heuristics.vllm_dp import VllmDP
from servegym.errors import InputError

HEURISTICS: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        Default,
        Random,
        RoundRobin,
        LeastRequest,
        PowerOfTwo,
        LeastTokens,
        SessionAffinity,
        VllmDP,
        SGLangCacheAware,
        LLMD,
        Dynamo,
        LMetric,
        INFaaS,
        Llumnix,
        Mooncake,
        LeastWorkPredicted,
        LeastWorkOracle,
    )
}


def heuristic_names() -> list[str]:
    """The names that `make_heuristic` knows, simplest rules first."""
    return list(HEURISTICS)


def make_heuristic(name: str, **params: object) -> Rule:
    """The rule of that name with its published parameters, or with `params` in their place.

    Raises:
        InputError: an unknown name, or a parameter that the rule does not have or cannot take.
    """
    if name not in HEURISTICS:
        raise InputError("heuristics", "name", name, f"choose from {', '.join(HEURISTICS)}")
    rule = HEURISTICS[name]
    known = [] if rule.__init__ is object.__init__ else list(inspect.signature(rule).parameters)
    for field, value in params.items():
        if field not in known:
            raise InputError(name, field, value, f"its parameters are {', '.join(known) or 'none'}")
    return rule(**params)

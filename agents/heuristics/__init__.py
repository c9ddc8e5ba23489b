"""Published rules for every kind of question, one a file, by name.

Each is a `servegym.agents.policy.Policy` that answers the kinds of questions in its `kinds` and leaves
others to the default, so it is also a complete policy: vLLM's is `vllm_dp`, INFaaS++ is `infaas`. Names
joined by `+` make one policy of several rules; each question goes to the first of them that answers its kind,
for example `lmetric+llumnix+budget_tpot`.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path

from servegym.agents.heuristics._rule import Rule
from servegym.agents.heuristics.budget_fixed import BudgetFixed
from servegym.agents.heuristics.budget_tpot import BudgetTPOT
from servegym.agents.heuristics.composite import Composite
from servegym.agents.heuristics.default import Default
from servegym.agents.heuristics.dispatch_llumnix import DispatchLlumnix
from servegym.agents.heuristics.dynamo import Dynamo
from servegym.agents.heuristics.infaas import INFaaS
from servegym.agents.heuristics.least_request import LeastRequest
from servegym.agents.heuristics.least_tokens import LeastTokens
from servegym.agents.heuristics.least_work_oracle import LeastWorkOracle
from servegym.agents.heuristics.least_work_predicted import LeastWorkPredicted
from servegym.agents.heuristics.llmd import LLMD
from servegym.agents.heuristics.lmetric import LMetric
from servegym.agents.heuristics.migrate_greedy import MigrateGreedy
from servegym.agents.heuristics.migrate_infaas import MigrateINFaaS
from servegym.agents.heuristics.migrate_llumnix import MigrateLlumnix
from servegym.agents.heuristics.mooncake import Mooncake
from servegym.agents.heuristics.move_llumnix import MoveLlumnix
from servegym.agents.heuristics.power_of_two import PowerOfTwo
from servegym.agents.heuristics.random import Random
from servegym.agents.heuristics.round_robin import RoundRobin
from servegym.agents.heuristics.session_affinity import SessionAffinity
from servegym.agents.heuristics.sglang_cache_aware import SGLangCacheAware
from servegym.agents.heuristics.victim_cost_aware import VictimCostAware
from servegym.agents.heuristics.victim_largest import VictimLargest
from servegym.agents.heuristics.victim_last import VictimLast
from servegym.agents.heuristics.victim_least_left import VictimLeastLeft
from servegym.agents.heuristics.victim_least_left_oracle import VictimLeastLeftOracle
from servegym.agents.heuristics.victim_lowest_priority import VictimLowestPriority
from servegym.agents.heuristics.vllm_dp import VllmDP
from servegym.envs.cluster import schema
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
        DispatchLlumnix,
        Mooncake,
        LeastWorkPredicted,
        LeastWorkOracle,
        VictimLast,
        VictimLowestPriority,
        VictimLargest,
        VictimCostAware,
        VictimLeastLeft,
        VictimLeastLeftOracle,
        MigrateLlumnix,
        MigrateINFaaS,
        MigrateGreedy,
        MoveLlumnix,
        BudgetFixed,
        BudgetTPOT,
    )
}
# Published systems of several rules, and what an expert would join.
SYSTEMS = {"llumnix": ("dispatch_llumnix", "migrate_llumnix", "move_llumnix")}
COMBINATIONS = (
    "lmetric+llumnix",
    "least_work_predicted+llumnix",
    "lmetric+llumnix+victim_cost_aware+budget_tpot",
    "least_work_predicted+llumnix+victim_cost_aware+budget_tpot",
)


def heuristic_names(kinds: Iterable[str] | None = None) -> list[str]:
    """The rules, simplest first, then shipped systems; `make_heuristic` also joins others by `+`.

    Args:
        kinds: only what answers no other questions than these; `migrate` covers `move`, its second half.
            None: all.
    """
    names = [*HEURISTICS, *SYSTEMS, *COMBINATIONS]
    if kinds is None:
        return names
    asked = set(kinds)
    if "migrate" in asked:
        asked.add("move")
    return [name for name in names if asked.issuperset(_parts(name))]


def make_heuristic(name: str, **params: object) -> Rule | Composite:
    """The rule or system of that name with its published parameters, or with `params` in their place.

    Args:
        name: one of `heuristic_names`, or several joined by `+`.
        params: each goes to every rule that has it.

    Raises:
        InputError: an unknown name, a rule that has nothing left to answer, or a parameter that no rule has
            or that it cannot take.
    """
    parts, known = _parts(name), defaults(name)
    for field, value in params.items():
        if field not in known:
            raise InputError(name, field, value, f"its parameters are {', '.join(known) or 'none'}")
    if name in HEURISTICS:
        return HEURISTICS[name](**params)
    rules = {}
    for kind, rule in parts.items():
        rules[kind] = rule(**{field: params[field] for field in rule.defaults() if field in params})
    return Composite(name, **rules)


def heuristic_of(kind: str, rule: str) -> Rule:
    """The heuristic that plays a rule of the cluster model, of `rule_names.RULES`, outside of it.

    Raises:
        InputError: for a rule that has none, such as what the stock system does unasked.
    """
    for known in HEURISTICS.values():
        if kind in known.kinds and rule in (getattr(known(), "rule", None), known.name):
            return known()
    raise InputError("heuristics", kind, rule, "no heuristic plays this rule outside of the model")


def defaults(name: str) -> dict[str, object]:
    """The parameters of a rule or system with their published values."""
    return {field: value for rule in _parts(name).values() for field, value in rule.defaults().items()}


def search_space(name: str) -> dict[str, tuple]:
    """The tunable parameters of a rule or system, and the values to try."""
    return {field: values for rule in _parts(name).values() for field, values in rule.search_space.items()}


def describe(name: str) -> str:
    """What it does, by which formula, and where that was published."""
    if name in HEURISTICS:
        return inspect.getdoc(sys.modules[HEURISTICS[name].__module__]) or ""
    return "\n".join(f"{kind}: {rule.name}" for kind, rule in _parts(name).items())


def _parts(name: str) -> dict[str, type[Rule]]:
    """Kind -> the first of the joined rules that answers it."""
    chosen: dict[str, type[Rule]] = {}
    for part in name.split("+"):
        if part not in HEURISTICS and part not in SYSTEMS:
            raise InputError("heuristics", "name", part, _why_unknown(part))
        rules = [HEURISTICS[rule] for rule in SYSTEMS.get(part, (part,))]
        answers = {kind: rule for rule in rules for kind in rule.kinds}
        if "+" in name and chosen.keys() >= answers.keys():
            raise InputError("heuristics", "name", part, f"in {name} nothing is left for it to answer")
        chosen = answers | chosen
    return {kind: chosen[kind] for kind in schema.KINDS if kind in chosen}


def _why_unknown(name: str) -> str:
    """Most commands take a policy's folder, too, so the name may be a mistyped path."""
    what = "a folder, not a heuristic" if Path(name).is_dir() else "neither a folder nor a heuristic"
    close = " or ".join(difflib.get_close_matches(name, [*HEURISTICS, *SYSTEMS]))
    return f"{what}; {close and f'did you mean {close}? '}see `servegym heuristics`"

"""Who answers which question: the agent, or a built-in rule of the cluster model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from servegym.envs.cluster.rule_names import RULES
from servegym.envs.cluster.schema import OFFERS
from servegym.envs.cluster.spec import ClusterSpec
from servegym.errors import InputError

# What an agent can take. A migration is two questions in a row: the pair of instances, then the request.
DECISIONS = ("dispatch", "preempt", "migrate", "budget")
QUESTIONS = {"migrate": ("migrate", "move")}
# Registered environments and what they leave to the agent; None is all that the scenario's levers allow.
ENVIRONMENTS: dict[str, tuple[str, ...] | None] = {
    "ServeGym/Dispatch-v0": ("dispatch",),
    "ServeGym/Preempt-v0": ("preempt",),
    "ServeGym/Migrate-v0": ("migrate",),
    "ServeGym/Budget-v0": ("budget",),
    "ServeGym/Cluster-v0": None,
}
_MISSING = {
    "migrate": "there is no migration table in it",
    "budget": "its budget_period_s is 0",
}


def allowed_decisions(clusters: Iterable[ClusterSpec]) -> tuple[str, ...]:
    """The decisions that the levers of some of these fleets allow, in the order of `DECISIONS`."""
    fleets = list(clusters)
    off = set()
    if not any(fleet.migration for fleet in fleets):
        off.add("migrate")
    if not any(fleet.budget_period_s for fleet in fleets):
        off.add("budget")
    return tuple(name for name in DECISIONS if name not in off)


def divide(
    decisions: Sequence[str] | None,
    rules: Mapping[str, str] | None,
    clusters: Iterable[ClusterSpec],
    where: str,
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Divide the questions that can come up between an agent and built-in rules.

    Args:
        decisions: what the agent asks for; None is all that the levers allow.
        rules: kind -> name of a built-in rule; kinds left out get the first one, which is what the engine or
            a plain router does.
        clusters: the fleets, with their levers.
        where: what has those levers, for messages.

    Returns:
        what the agent takes, in the order of `DECISIONS`, and the rule of each kind of question that can come
        up and the agent does not take.

    Raises:
        InputError: for an agent that takes nothing, an unknown decision, kind or rule, a rule for what the
            agent takes, and whatever has its lever off.
    """
    allowed = allowed_decisions(clusters)
    taken = _check_decisions(decisions, allowed, where)
    return taken, _check_rules(rules, taken, allowed, where)


def _check_decisions(
    decisions: Sequence[str] | None, allowed: tuple[str, ...], where: str
) -> tuple[str, ...]:
    if decisions is None:
        return allowed
    if isinstance(decisions, str) or not decisions:
        raise InputError("environment", "decisions", decisions, f"give some of {', '.join(DECISIONS)}")
    for name in decisions:
        if name not in DECISIONS:
            raise InputError("environment", "decisions", name, f"choose from {', '.join(DECISIONS)}")
        if name not in allowed:
            raise InputError(where, "decisions", name, f"{_MISSING[name]}; choose from {', '.join(allowed)}")
    return tuple(name for name in DECISIONS if name in decisions)


def kinds_of(decisions: Sequence[str]) -> tuple[str, ...]:
    """The kinds of question that these decisions consist of."""
    return tuple(kind for name in decisions for kind in QUESTIONS.get(name, (name,)))


def request_rows(decisions: Sequence[str], rules: Mapping[str, str]) -> int:
    """Request rows R of the observation: a dispatch is about one request, other questions about several.

    Other questions than dispatches are asked where the agent takes them or a rule beyond the stock system's
    answers them, which reads them in the same arrays.
    """
    asked = set(kinds_of(decisions)) | {kind for kind, rule in rules.items() if rule != RULES[kind][1]}
    return 1 if asked <= {"dispatch"} else OFFERS


def _check_rules(
    rules: Mapping[str, str] | None, decisions: Sequence[str], allowed: Sequence[str], where: str
) -> dict[str, str]:
    taken, possible = kinds_of(decisions), kinds_of(allowed)
    chosen = {kind: RULES[kind][1] for kind in possible if kind not in taken}
    for kind, name in (rules or {}).items():
        if kind not in RULES:
            raise InputError("environment", "rules", kind, f"kinds are {', '.join(RULES)}")
        if name not in RULES[kind][1:]:
            raise InputError(
                "environment", f"rules.{kind}", name, f"choose one of {', '.join(RULES[kind][1:])}"
            )
        if kind in taken:
            raise InputError("environment", f"rules.{kind}", name, "the agent answers these; leave it out")
        if kind not in chosen:
            lever = next(decision for decision in DECISIONS if kind in kinds_of((decision,)))
            raise InputError(where, f"rules.{kind}", name, _MISSING[lever])
        chosen[kind] = name
    return chosen

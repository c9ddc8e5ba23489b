"""What a policy was trained for: the questions that it answers and where they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from servegym.envs.cluster.decisions import DECISIONS, ENVIRONMENTS
from servegym.envs.cluster.rule_names import RULES
from servegym.envs.scenario import Scenario, read_scenario
from servegym.errors import InputError


@dataclass(frozen=True)
class Task:
    """An environment with its scenarios, as plain data for config.json and manifests.

    Attributes:
        env: id of the environment.
        decisions: what the policy takes.
        rules: kind of question -> built-in rule that answers it, of those that the policy does not take.
        scenarios: each as `dataclasses.asdict` gives it.
    """

    env: str = "ServeGym/Dispatch-v0"
    decisions: tuple[str, ...] = ("dispatch",)
    rules: dict[str, str] = field(default_factory=dict)
    scenarios: tuple[dict[str, Any], ...] = ()

    def read_scenarios(self, where: Path) -> list[Scenario]:
        """The scenarios; errors name the file `where`.

        Raises:
            InputError: for unknown and ill-typed fields.
        """
        return [read_scenario(where, raw) for raw in self.scenarios]


def read_task(where: object, raw: Any) -> Task:
    """A task back from JSON.

    Raises:
        InputError: naming the file `where`, for a field that is missing, unknown or cannot be right.
    """
    known = set(Task.__dataclass_fields__)
    if not isinstance(raw, Mapping) or set(raw) != known:
        found = sorted(raw) if isinstance(raw, Mapping) else raw
        raise InputError(where, "task", found, f"expected {', '.join(sorted(known))}")
    decisions, rules, scenarios = raw["decisions"], raw["rules"], raw["scenarios"]
    checks = {
        "env": raw["env"] in list(ENVIRONMENTS),
        "decisions": isinstance(decisions, list) and decisions and all(d in DECISIONS for d in decisions),
        "rules": isinstance(rules, dict) and all(v in RULES.get(k, ()) for k, v in rules.items()),
        "scenarios": isinstance(scenarios, list) and all(isinstance(s, dict) for s in scenarios),
    }
    for name, right in checks.items():
        if not right:
            raise InputError(where, f"task.{name}", raw[name], "unknown to this version of ServeGym")
    return Task(raw["env"], tuple(decisions), dict(rules), tuple(scenarios))

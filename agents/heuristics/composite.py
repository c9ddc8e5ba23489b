"""A complete policy made of one rule for each kind of question."""

from __future__ import annotations

import numpy as np

from servegym.agents.heuristics._rule import Rule
from servegym.agents.policy import Observation
from servegym.errors import InputError


class Composite:
    """Every question goes to the rule of its kind; kinds without a rule get the default.

    Args:
        name: the name that tables use.
        rules: kind -> its rule, for example `dispatch=LMetric(), migrate=MigrateLlumnix()`.

    Raises:
        InputError: a rule that does not answer questions of its kind.
    """

    def __init__(self, name: str, **rules: Rule) -> None:
        for kind, rule in rules.items():
            if kind not in rule.kinds:
                hint = f"it answers {', '.join(rule.kinds) or 'nothing'}"
                raise InputError(name, kind, rule.name, hint)
        self.name = name
        self.rules = tuple(rules.values())
        self.kinds = tuple(rules)
        self.needs_oracle = any(rule.needs_oracle for rule in self.rules)

    def reset(self, lanes: int, seed: int) -> None:
        """Forget everything and prepare for `lanes` parallel clusters."""
        for rule in self.rules:
            rule.reset(lanes, seed)

    def act(self, obs: Observation) -> np.ndarray:
        """As `Rule.act`: each rule answers 0 to the questions of the others."""
        return sum((rule.act(obs) for rule in self.rules), np.zeros(len(obs["mask"]), np.int64))

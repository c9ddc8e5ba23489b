"""Dispatch rules whose weights are searched, scenario by scenario: teachers for networks."""

from servegym.agents.evolved.rule import Evolved, EvolvedDispatch, read_rule, write_rule
from servegym.agents.evolved.search import evolve
from servegym.agents.evolved.teacher import ByScenario

__all__ = ["ByScenario", "Evolved", "EvolvedDispatch", "evolve", "read_rule", "write_rule"]

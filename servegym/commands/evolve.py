"""`servegym evolve`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from servegym.agents.evolved import Evolved, evolve, write_rule
from servegym.errors import InputError
from servegym.files import check_folder, command_line, git_revision, say
from servegym.flags import Setup, check_seed


@dataclass(kw_only=True)
class Command(Setup):
    """Search a dispatch rule for each scenario by the cross-entropy method.

    Writes FOLDER/SCENARIO.json. Such rules are teachers: `servegym train --imitate FOLDER` makes a network
    answer as they do, each in its scenario, before PPO goes on.
    """

    system: str = "lmetric"
    """Heuristics, joined by `+`, that answer all questions but dispatches."""
    params: dict[str, float] = field(default_factory=dict)
    """Parameters of these heuristics, such as `factor 1.5`."""
    generations: int = 25
    """How often a population of weights is drawn and played; 0 leaves `lmetric`."""
    population: int = 32
    """Weights drawn in each; a multiple of 4."""
    episodes: int = 2
    """Episodes of each of three loads that all of them play, new ones in each generation."""
    seed: int = 0
    """Seed of the draws and the episodes."""
    num_threads: int = 2
    """Threads of the cluster model."""
    folder: Annotated[str, tyro.conf.arg(aliases=("-f",))] = "runs/evolved"
    """Where the rules go."""

    def run(self) -> int:
        """Search, write."""
        for name in ("episodes", "num_threads"):
            if getattr(self, name) < 1:
                raise InputError("evolve", name, getattr(self, name), "must be at least 1")
        if self.generations < 0:
            raise InputError("evolve", "generations", self.generations, "must be >= 0")
        check_seed("evolve", self.seed)
        check_folder(self.folder)
        for scenario in self.resolve():

            def progress(generation: int, own: float, mean: float, name: str = scenario.name) -> None:
                say(f"{name}, generation {generation}: goodput {own:.1%}, of the population {mean:.1%}")

            weights = evolve(
                scenario,
                self.system,
                self.params,
                generations=self.generations,
                population=self.population,
                seeds=self.episodes,
                seed=self.seed,
                num_threads=self.num_threads,
                progress=progress,
            )
            facts = {"command": command_line(), "revision": git_revision()}
            path = Path(self.folder) / f"{scenario.name}.json"
            write_rule(path, Evolved(scenario.name, self.system, self.params, weights, facts))
            say(f"written: {path}")
        return 0

"""The flags that train and evaluate share: which scenarios, and what differs from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro

from servegym.envs.cluster.decisions import ENVIRONMENTS
from servegym.envs.cluster.spec import parse_cluster
from servegym.envs.costs import load_profile
from servegym.envs.scenario import Scenario, load_scenario
from servegym.errors import InputError

DEFAULT_SCENARIO = "mixed"


def check_seed(command: str, seed: int) -> None:
    """Refuse seeds that not every generator of random numbers takes.

    Raises:
        InputError: outside of 0..2^31 - 1.
    """
    if not 0 <= seed < 2**31:
        raise InputError(command, "seed", seed, f"must lie in 0..{2**31 - 1}")


@dataclass(kw_only=True)
class Setup:
    """Flags that pick scenarios; those left out keep what the scenario says."""

    scenario: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Name (see `servegym scenarios`) or TOML file; repeat for several. `mixed` by default."""
    workload: str | None = None
    """Generator (see `servegym data`) or trace file."""
    cluster: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Fleet, such as 4xa100-llama-3.1-8b+2xh100-llama-3.1-8b; repeat for several."""
    requests: int | None = None
    """Requests of an episode; evaluation on a trace takes fewer where its disjoint windows are shorter."""
    zero_output: str | None = None
    """A trace's requests without output, failures in most: refuse them or drop them."""
    reward: str | None = None
    """latency or goodput."""
    beta: float | None = None
    """Discount rate, 1/s."""
    scrape_s: float | None = None
    """Seconds between scrapes of the engines' metrics; 0 reads them afresh at every decision."""
    noise: float | None = None
    """Relative standard error of scraped metrics."""
    prediction_error: float | None = None
    """Standard deviation of the log of predicted / true output length."""
    prefix_caching: bool | None = None
    """Automatic prefix caching."""

    def resolve(self, **overrides: Any) -> list[Scenario]:
        """The scenarios with the flags applied.

        Args:
            overrides: fields of the scenarios that win over file and flags.

        Raises:
            InputError: a bad scenario file, a bad value, or a fleet of several models.
        """
        names = (
            "workload",
            "requests",
            "zero_output",
            "reward",
            "beta",
            "scrape_s",
            "noise",
            "prediction_error",
            "prefix_caching",
        )
        flags = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.cluster:
            flags["clusters"] = tuple(self.cluster)
        chosen = self.scenario or (DEFAULT_SCENARIO,)
        scenarios = [replace(load_scenario(name), **{**flags, **overrides}) for name in chosen]
        for fleet in dict.fromkeys(text for scenario in scenarios for text in scenario.clusters):
            check_models(fleet)
        return scenarios


def check_models(fleet: str) -> None:
    """Refuse a fleet whose instances serve different models: no request could go to any of them.

    Models are told apart by their shapes: a calibrated profile has its own name for a model, and precisions
    may differ.

    Raises:
        InputError: for that, for text that is no fleet, and for a profile that is not there.
    """
    models = [load_profile(instance.profile).model for instance in parse_cluster(fleet).instances]
    shapes = {replace(model, name="", parameters=1, bytes_per_value=1): model.name for model in models}
    if len(shapes) > 1:
        names = " and ".join(shapes.values())
        raise InputError("cluster", "fleet", fleet, f"a fleet serves one model, not {names}")


def check_environment(command: str, env: str) -> None:
    """Refuse the id of an environment that there is not.

    Raises:
        InputError: naming those that there are.
    """
    if env not in ENVIRONMENTS:
        raise InputError(command, "env", env, f"choose one of {', '.join(ENVIRONMENTS)}")

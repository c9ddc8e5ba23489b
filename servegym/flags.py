"""The flags that train and evaluate share: which environment, and how it differs from its scenario."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro

from servegym.envs.scenario import Scenario, load_scenario
from servegym.errors import InputError

ENVIRONMENTS = ("ServeGym/Dispatch-v0",)


def check_seed(command: str, seed: int) -> None:
    """Refuse seeds that not every generator of random numbers takes.

    Raises:
        InputError: outside of 0..2^31 - 1.
    """
    if not 0 <= seed < 2**31:
        raise InputError(command, "seed", seed, f"must lie in 0..{2**31 - 1}")


@dataclass(kw_only=True)
class Setup:
    """Flags that pick a scenario; those left out keep what the scenario says."""

    env: str = ENVIRONMENTS[0]
    """Environment id."""
    scenario: str = "mixed"
    """Name (see `servegym scenarios`) or TOML file."""
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

    def resolve(self, **overrides: Any) -> Scenario:
        """The scenario with the flags applied.

        Args:
            overrides: fields of the scenario that win over file and flags.

        Raises:
            InputError: an unknown environment, a bad scenario file, or a bad value.
        """
        if self.env not in ENVIRONMENTS:
            raise InputError("servegym", "env", self.env, f"choose one of {', '.join(ENVIRONMENTS)}")
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
        return replace(load_scenario(self.scenario), **{**flags, **overrides})

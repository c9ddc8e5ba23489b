"""`servegym validate`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from servegym.agents.heuristics import make_heuristic
from servegym.agents.policy import Policy
from servegym.envs.cluster.episode import fleets_of
from servegym.envs.scenario import Scenario, load_scenario
from servegym.errors import InputError
from servegym.files import check_folder, command_line, console, git_revision, say, trace_hashes, write_json
from servegym.flags import check_models, check_seed
from servegym.loading import load_agent
from servegym.runtime.players import open_player
from servegym.runtime.validate import FIGURES, RANKED, Validation, as_json, make_episode, validate

POLICIES = ("round_robin", "random", "least_request", "least_tokens", "lmetric", "mooncake")


@dataclass(kw_only=True)
class Command:
    """Play a trace on real engines under several policies, then in the cluster model: measured | predicted.

    The engines run in real time, each policy several times; the model plays the very same requests with the
    calibrated profiles that the fleet names. Prints P50 and P99 of TTFT, TPOT and E2E by policy with the
    error of the prediction and the machine's own run-to-run spread, and how alike both rank the policies.
    """

    trained_agent: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Bundles or checkpoints to play beside the heuristics."""
    cluster: str
    """Fleet of calibrated profiles, such as 2xruns/calibrate/cpu-cpu-llama/profile.json, joined by +."""
    runtime: str = "torch"
    """torch: the thin runtime, in this process; vllm: real vLLM servers."""
    device: str = "cpu"
    """cpu or cuda."""
    trace: str = "azure2023_conv"
    """Generator (see `servegym data`) or trace file."""
    policies: tuple[str, ...] = POLICIES
    """Heuristics (see `servegym heuristics`)."""
    scenario: str | None = None
    """Name or TOML file of a scenario whose levers, service levels and staleness hold; its fleet, workload
    and load do not. By default no levers but dispatch."""
    requests: int = 200
    """Requests to play."""
    load: float = 0.9
    """Arrival rate as a fraction of the fleet's saturation in the model."""
    length_scale: float = 1.0
    """Factor of all prompt and output lengths."""
    repeats: int = 2
    """Plays of each policy on the engines."""
    seed: int = 0
    """Of a generator's requests, length predictions, policies and the order of the plays."""
    log_folder: Annotated[str, tyro.conf.arg(aliases=("-f",))] = "runs/validate"
    """Where validation.json goes."""

    def run(self) -> int:
        """Play, print, write."""
        check_folder(self.log_folder)
        check_seed("validate", self.seed)
        for name in ("requests", "repeats"):
            if getattr(self, name) < 1:
                raise InputError("validate", name, getattr(self, name), "must be at least 1")
        if not 0 < self.load < math.inf:
            raise InputError("validate", "load", self.load, "must be finite and > 0")
        check_models(self.cluster)
        base = load_scenario(self.scenario) if self.scenario else Scenario()
        scenario = replace(base, clusters=(self.cluster,), workload=self.trace)
        (fleet,) = fleets_of(scenario)
        policies: list[Policy] = [load_agent(path) for path in self.trained_agent]
        policies += [make_heuristic(name) for name in self.policies]
        if not policies:
            raise InputError("validate", "policies", self.policies, "name at least one policy")
        player = open_player(self.runtime, fleet, self.device)
        try:
            episode = make_episode(
                fleet, self.trace, scenario, requests=self.requests, load_fraction=self.load,
                length_scale=self.length_scale, seed=self.seed,
            )  # fmt: skip
            with Console(stderr=True).status("validate") as status:
                found = validate(
                    player, policies, scenario, episode, repeats=self.repeats, seed=self.seed,
                    progress=lambda text: status.update(f"validate: {text}"),
                )  # fmt: skip
        finally:
            player.close()
        show(found)
        target = Path(self.log_folder) / "validation.json"
        write_json(target, {**self._origin(), **as_json(found)})
        say(f"written: {target}")
        return 0

    def _origin(self) -> dict[str, Any]:
        return {
            "command": command_line(),
            "revision": git_revision(),
            "traces": trace_hashes(self.trace),
            "runtime": self.runtime,
            "cluster": self.cluster,
            "load": self.load,
            "length_scale": self.length_scale,
            "repeats": self.repeats,
            "seed": self.seed,
        }


def show(found: Validation) -> None:
    """Print the tables."""
    out = console()
    out.print(
        f"{found.requests} requests at {found.rate_rps:.3g}/s; measured | predicted, error % (spread %)"
    )
    table = Table("policy", *(_title(figure) for figure in FIGURES))
    for comparison in found.comparisons:
        cells = (
            f"{_ms(comparison.typical(figure))} | {_ms(comparison.predicted[figure])} ms, "
            f"{comparison.error(figure):+.1f} ({_plain(comparison.spread(figure), 1)})"
            for figure in FIGURES
        )
        table.add_row(comparison.policy, *cells)
    out.print(table)
    ranks = Table("policies ranked by", "Spearman", "Kendall", "Spearman of the repeats")
    for metric in RANKED:
        agreement = found.agreement(metric)
        numbers = (*(agreement[k] for k in ("spearman", "kendall")), found.repeatability(metric)["spearman"])
        ranks.add_row(_title(metric), *(_plain(number, 2) for number in numbers))
    out.print(ranks)
    for comparison in found.comparisons:
        fallbacks = {k: n for k, n in comparison.decisions.items() if n and k != "answered"}
        if fallbacks:
            out.print(f"{comparison.policy}: the fallback answered {fallbacks}", highlight=False)
    out.print(
        f"largest error {found.largest_error():.1f}%, largest spread of the machine "
        f"{_plain(found.largest_spread(), 1)}%",
        highlight=False,
    )


def _title(metric: str) -> str:
    name, part, _ = metric.split("_")
    return f"{name.upper()} {part.upper() if part != 'mean' else part}"


def _plain(value: float, digits: int) -> str:
    """Fixed digits; a dash where a single play or equal policies say nothing."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}"

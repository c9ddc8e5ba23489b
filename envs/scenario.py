"""A scenario: the name for workload + cluster + SLO + levers + staleness, one small TOML file each."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from servegym.errors import InputError

REWARDS = ("latency", "goodput")
_DIRECTORY = Path(__file__).parent / "scenarios"
# What TOML gives for a field of this type; tables for all others.
_KINDS: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool, "tuple": tuple}


@dataclass(frozen=True)
class Slo:
    """Service level of a class: both must hold for a request to count as good.

    Attributes:
        ttft_s: time to first token, seconds from arrival.
        tpot_s: mean time per output token after the first, seconds.
        weight: what a request of the class is worth in rewards and weighted goodput.
    """

    ttft_s: float = 1.0
    tpot_s: float = 0.05
    weight: float = 1.0


@dataclass(frozen=True)
class Scenario:
    """Everything that defines an environment but its seed.

    Attributes:
        name: what `--scenario` calls it.
        description: one line for `servegym scenarios`.
        workload: a generator's name or a trace's path.
        clusters: fleets such as `4xa100-llama-3.1-8b+2xh100-llama-3.1-8b`; an episode draws one.
        loads: lowest and highest offered load as a fraction of the fleet's saturation throughput on the
            workload; an episode draws uniformly between them.
        requests: requests of an episode.
        slo: service level of every class without an entry in `class_slo`.
        class_slo: service levels by class name.
        reward: `latency` or `goodput`; formulas in `servegym.envs.cluster.reward`.
        beta: discount rate of the semi-Markov process, 1/s. A decision is felt for the seconds that its
            request lives; with a horizon much beyond that (0.02/s was tried) training on mixed fleets
            diverged.
        scrape_s: period of the metrics scrape, seconds; 0 reads them fresh at every decision.
        noise: relative standard error of scraped metrics.
        prediction_error: standard deviation of the log of the output-length prediction's factor.
        prefix_caching: vLLM's automatic prefix caching.
        engine: InstanceSpec fields that hold for every instance, for example {"token_budget": 512}.
    """

    name: str = "custom"
    description: str = ""
    workload: str = "azure2023_conv"
    clusters: tuple[str, ...] = ("4xa100-llama-3.1-8b",)
    loads: tuple[float, float] = (0.5, 1.0)
    requests: int = 512
    slo: Slo = field(default_factory=Slo)
    class_slo: dict[str, Slo] = field(default_factory=dict)
    reward: str = "latency"
    beta: float = 0.1
    scrape_s: float = 0.2
    noise: float = 0.0
    prediction_error: float = 0.5
    prefix_caching: bool = True
    engine: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, hint: str) -> None:
            if not ok:
                raise InputError(f"scenario {self.name}", name, getattr(self, name), hint)

        require(len(self.clusters) > 0, "clusters", "name at least one fleet")
        rising = len(self.loads) == 2 and 0 < self.loads[0] <= self.loads[1]
        require(rising, "loads", "give [lowest, highest], both > 0")
        require(self.requests > 0, "requests", "an episode has at least one request")
        require(self.reward in REWARDS, "reward", f"choose one of {', '.join(REWARDS)}")
        for name in ("beta", "scrape_s", "noise", "prediction_error"):
            require(getattr(self, name) >= 0, name, "must be >= 0")
        for name, slo in {"slo": self.slo, **self.class_slo}.items():
            if min(slo.ttft_s, slo.tpot_s) <= 0 or slo.weight < 0:
                hint = "ttft_s and tpot_s are > 0, weight is >= 0"
                raise InputError(f"scenario {self.name}", name, slo, hint)


def scenario_names() -> list[str]:
    """Names of the scenarios that ship with the package."""
    return sorted(path.stem for path in _DIRECTORY.glob("*.toml"))


def load_scenario(name_or_path: str) -> Scenario:
    """A shipped scenario by name, or one from a TOML file.

    Raises:
        InputError: for an unknown name, unreadable TOML, and unknown or ill-typed fields.
    """
    path = _DIRECTORY / f"{name_or_path}.toml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        hint = f"choose one of {', '.join(scenario_names())} or give a TOML file"
        raise InputError("scenario", "name", name_or_path, hint)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(path, "TOML", str(error), "mend the syntax") from error
    return read_scenario(path, {"name": path.stem, **raw})


def read_scenario(path: Path, raw: dict[str, Any]) -> Scenario:
    """A scenario from plain data, as TOML or `dataclasses.asdict` give it; errors name `path`.

    Raises:
        InputError: for unknown and ill-typed fields.
    """
    values = _typed(path, Scenario, raw)
    if "slo" in values:
        values["slo"] = _slo(path, "slo", values["slo"])
    values["class_slo"] = {k: _slo(path, f"class_slo.{k}", v) for k, v in values.get("class_slo", {}).items()}
    return Scenario(**values)


def _slo(path: Path, where: str, raw: Any) -> Slo:
    if not isinstance(raw, dict):
        raise InputError(path, where, raw, "write it as a table with ttft_s, tpot_s, weight")
    return Slo(**_typed(path, Slo, raw))


def _typed(path: Path, cls: type, raw: dict[str, Any]) -> dict[str, Any]:
    """Check names and types of a table against a dataclass; lists become tuples, integers floats."""
    known = {f.name: f for f in fields(cls)}
    values = {}
    for name, value in raw.items():
        if name not in known:
            raise InputError(path, name, value, f"unknown field; known are {', '.join(known)}")
        kind = str(known[name].type)
        if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(value, list):
            value = tuple(value)
        wanted = _KINDS.get(kind.partition("[")[0], dict)
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise InputError(path, name, value, f"expected {kind}")
        values[name] = value
    return values

"""A scenario: the name for workload + cluster + SLO + levers + staleness, one small TOML file each."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from servegym.envs.cluster.spec import InstanceSpec, Migration
from servegym.errors import InputError

REWARDS = ("latency", "goodput")
ZERO_OUTPUT = ("refuse", "drop")
LARGEST = 1e6  # of all real numbers: seconds, loads, errors and weights beyond it are units gone wrong
MOST_REQUESTS = 10_000_000
_DIRECTORY = Path(__file__).parent / "scenarios"


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
        zero_output: what to do with a trace's requests without output, `refuse` or `drop`.
        classes: class name -> fraction of the sessions, drawn for each episode; empty keeps the workload's.
        priorities: priority -> fraction of the sessions, drawn likewise; lower is more urgent, and engines
            heed it with `queue = "priority"` in `engine`. The priorities are text, as TOML's keys are.
        class_priority: class name -> priority of all its requests, in place of drawn priorities.
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
        migration: the lever to move requests between instances; without the table they stay.
        budget_period_s: time between two occasions to set an instance's prefill budget; 0: never.
        drain: instance number (as text) -> seconds from when on it gets no new requests.
    """

    name: str = "custom"
    description: str = ""
    workload: str = "azure2023_conv"
    clusters: tuple[str, ...] = ("4xa100-llama-3.1-8b",)
    loads: tuple[float, float] = (0.5, 1.0)
    requests: int = 512
    zero_output: str = "refuse"
    classes: dict[str, float] = field(default_factory=dict)
    priorities: dict[str, float] = field(default_factory=dict)
    class_priority: dict[str, int] = field(default_factory=dict)
    slo: Slo = field(default_factory=Slo)
    class_slo: dict[str, Slo] = field(default_factory=dict)
    reward: str = "latency"
    beta: float = 0.1
    scrape_s: float = 0.2
    noise: float = 0.0
    prediction_error: float = 0.5
    prefix_caching: bool = True
    engine: dict[str, Any] = field(default_factory=dict)
    migration: Migration | None = None
    budget_period_s: float = 0.0
    drain: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, hint: str) -> None:
            if not ok:
                raise InputError(f"scenario {self.name}", name, getattr(self, name), hint)

        require(len(self.clusters) > 0, "clusters", "name at least one fleet")
        rising = len(self.loads) == 2 and 0 < self.loads[0] <= self.loads[1] <= LARGEST
        require(rising, "loads", f"give [lowest, highest], both > 0 and at most {LARGEST:g}")
        require(0 < self.requests <= MOST_REQUESTS, "requests", f"must lie in 1..{MOST_REQUESTS}")
        for name, options in (("reward", REWARDS), ("zero_output", ZERO_OUTPUT)):
            require(getattr(self, name) in options, name, f"choose one of {', '.join(options)}")
        for name in ("beta", "scrape_s", "noise", "prediction_error", "budget_period_s"):
            require(0 <= getattr(self, name) <= LARGEST, name, f"must lie in 0..{LARGEST:g}")
        for name in ("classes", "priorities"):
            shares = getattr(self, name).values()
            whole = not shares or (min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6)
            require(whole, name, "fractions are at least 0 and sum to 1")
        for number, at_s in self.drain.items():
            known = number.isascii() and number.isdigit() and 0 <= at_s <= LARGEST
            require(known, "drain", f"give instance number -> seconds in 0..{LARGEST:g}")
        levels = [*self.priorities, *map(str, self.class_priority.values())]
        name = "class_priority" if self.class_priority else "priorities"
        require(all(map(_is_priority, levels)), name, "priorities are whole numbers in -32768..32767")
        both = bool(self.priorities and self.class_priority)
        require(not both, "class_priority", "priorities are drawn or go by class; leave one of them out")
        for name, slo in {"slo": self.slo, **self.class_slo}.items():
            positive = 0 < slo.ttft_s <= LARGEST and 0 < slo.tpot_s <= LARGEST
            if not (positive and 0 <= slo.weight <= LARGEST):
                hint = f"ttft_s and tpot_s are > 0, weight is >= 0, all at most {LARGEST:g}"
                raise InputError(f"scenario {self.name}", name, slo, hint)
        if "profile" in self.engine:
            raise InputError(
                f"scenario {self.name}", "engine.profile", self.engine["profile"], "name it in clusters"
            )
        _typed(f"scenario {self.name}", InstanceSpec, self.engine, "engine.")


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
    return Scenario(**_typed(path, Scenario, raw))


def _is_priority(text: str) -> bool:
    try:
        return -(2**15) <= int(text) < 2**15
    except ValueError:
        return False


def _typed(where: object, cls: type, raw: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Check names and types of a table against a dataclass; lists become tuples, integers floats."""
    kinds = get_type_hints(cls)
    values = {}
    for name, value in raw.items():
        if name not in kinds:
            raise InputError(where, prefix + name, value, f"unknown field; known are {', '.join(kinds)}")
        values[name] = _value(where, prefix + name, kinds[name], value)
    return values


def _value(where: object, name: str, kind: Any, value: Any) -> Any:
    """A value as the type `kind`: scalars, `X | None`, `tuple[X, ...]`, `dict[str, X]`, Slo and Migration."""
    if isinstance(kind, UnionType):
        return None if value is None else _value(where, name, get_args(kind)[0], value)
    if kind is Any:
        return value
    if kind in (Slo, Migration) and isinstance(value, dict):
        return kind(**_typed(where, kind, value, f"{name}."))
    if get_origin(kind) is dict and isinstance(value, dict):
        return {k: _value(where, f"{name}.{k}", get_args(kind)[1], v) for k, v in value.items()}
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(_value(where, name, get_args(kind)[0], v) for v in value)
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        hint = "expected a finite number" if kind is float else f"expected {getattr(kind, '__name__', kind)}"
        raise InputError(where, name, value, hint)
    if kind is int and abs(value) >= 2**31:
        raise InputError(where, name, value, "must lie within 32 bits")
    return value

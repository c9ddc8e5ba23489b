"""`servegym export`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from servegym.agents.heuristics import make_heuristic
from servegym.agents.play import play
from servegym.agents.policy import Observation, Policy
from servegym.agents.ppo import NetworkPolicy
from servegym.agents.ppo.checkpoint import CheckpointInfo, read_network
from servegym.envs.cluster.episode import make_episodes
from servegym.envs.scenario import Scenario
from servegym.errors import InputError
from servegym.files import console, trace_hashes
from servegym.flags import check_seed
from servegym.models.features import ARRAYS
from servegym.runtime.export import Origin, export_bundle

# Golden observations: idle, busy and late in short episodes, and the first question of each kind.
LANES, REQUESTS, MOMENTS = 4, 256, (5, 45, 90)


@dataclass(kw_only=True)
class Command:
    """Turn a checkpoint into a bundle: ONNX, safetensors, manifest, golden answers and card.

    The bundle appears only after ONNX Runtime and numpy gave the network's own answers to observations from
    its scenario.
    """

    trained_agent: Annotated[str, tyro.conf.arg(aliases=("-i",))]
    """Checkpoint folder."""
    output: Annotated[str | None, tyro.conf.arg(aliases=("-o",))] = None
    """Folder of the bundle; `bundle` beside the checkpoint by default. An older bundle there is replaced."""
    fallback: str = "least_tokens"
    """Heuristic to play at a time-out, NaN or stale state."""
    seed: int = 0
    """Seed of the episodes that the golden observations come from."""

    def run(self) -> int:
        """Export, check, and say how fast it decides."""
        check_seed("export", self.seed)
        make_heuristic(self.fallback)
        folder = Path(self.trained_agent)
        network, info = read_network(folder)
        scenarios = info.task.read_scenarios(folder / "config.json")
        policy = NetworkPolicy(network, folder.resolve().name, info.task)
        target = Path(self.output) if self.output else folder.with_name(f"{policy.name}-bundle")
        observations = [o for s in scenarios for o in golden_observations(policy, s, self.seed)]
        bundle = export_bundle(network, observations, target, self._origin(policy, info, scenarios))
        decision = bundle.manifest["decision_us"]
        console().print(
            f"{target}: answers agree in torch, ONNX Runtime and numpy on {sum(map(_rows, observations))} "
            f"observations; {decision['p50']} us a decision among {decision['instances']} instances "
            f"({decision['runtime']})"
        )
        return 0

    def _origin(self, policy: Policy, info: CheckpointInfo, scenarios: list[Scenario]) -> Origin:
        traces = [trace_hashes(scenario.workload) for scenario in scenarios]
        return Origin(
            policy=policy.name,
            command=info.command,
            revision=_metrics(Path(self.trained_agent)).get("revision"),
            task=info.task,
            decisions=info.steps,
            seed=info.seed,
            traces={name: digest for found in traces for name, digest in found.items()},
            fallback=self.fallback,
        )


def golden_observations(policy: NetworkPolicy, scenario: Scenario, seed: int) -> list[dict[str, np.ndarray]]:
    """What the policy sees on each fleet of its scenario, one batch of lanes a fleet and moment."""
    seen = []
    for cluster in scenario.clusters:
        fleet = replace(scenario, clusters=(cluster,), requests=REQUESTS)
        recorder = _Recorder(policy)
        play(recorder, fleet, make_episodes(fleet, LANES, seed), num_threads=1, seed=seed)
        seen += recorder.seen
    return seen


class _Recorder:
    """Plays a policy and keeps what it saw at some moments."""

    needs_oracle = False

    def __init__(self, policy: NetworkPolicy) -> None:
        self.name, self.seen = policy.name, list[dict[str, np.ndarray]]()
        self.kinds, self.task = policy.kinds, policy.task
        self._policy, self._moment, self._asked = policy, 0, set[int]()

    def reset(self, lanes: int, seed: int) -> None:
        self._policy.reset(lanes, seed)

    def act(self, obs: Observation) -> np.ndarray:
        kinds = set(obs["kind"].tolist())
        if self._moment in MOMENTS or not kinds <= self._asked:
            self.seen.append({name: np.array(obs[name]) for name in ARRAYS})
        self._asked |= kinds
        self._moment += 1
        return self._policy.act(obs)


def _rows(observation: Observation) -> int:
    return len(observation["kind"])


def _metrics(folder: Path) -> dict[str, Any]:
    """metrics.json of a checkpoint; nothing where training did not get as far."""
    path = folder / "metrics.json"
    hint = "damaged; delete it or use another checkpoint"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(path, "JSON", str(error), hint) from error
    if not isinstance(metrics, dict):
        raise InputError(path, "JSON", type(metrics).__name__, hint)
    return metrics
